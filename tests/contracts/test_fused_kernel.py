"""The fused kernel in Triton's interpreter and through its compiler, neither of which needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(code: str, **variables: str) -> None:
    """Run lines in another process, for Triton reads its variables when it is imported."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=250,
        cwd=Path(__file__).parents[2], env={**plain, **variables, "PYTHONPATH": "."},
    )  # fmt: skip
    assert done.stdout == "same\n", done.stdout + done.stderr[-2000:]


def test_it_finds_what_numpy_finds() -> None:
    run(
        """
import numpy as np
from colqwen3_retrievers.vectors.kernels.gpu_scan import DeviceScan
from colqwen3_retrievers.vectors.kernels.scan import bit_scan, numpy_scan
from tests.contracts.test_scans import bit_codes, codes, queries

scan = DeviceScan("cpu", fused=True)
shapes = (1, [1], [1]), (16, [3, 1, 7], [1, 4, 2, 9]), (128, [25, 40], [5, 1, 12]), (320, [33, 70], [2, 8])
for dim, asked, pages in (*shapes, (120, [2], [5]), (504, [2], [5, 1]), (640, [2], [5, 1]), (8, [300], [1, 1])):
    made = queries(dim, asked, dim)
    for ours, right, given in (
        (scan, numpy_scan, codes(dim, pages, dim)),
        (bit_scan(scan, dim), bit_scan(numpy_scan, dim), bit_codes(dim, pages, dim)),
    ):
        np.testing.assert_allclose(ours(made, *given), right(made, *given), rtol=1e-6)
        some = [given[0], *(array[::2] for array in given[1:])]
        np.testing.assert_allclose(ours(made, *some), right(made, *some), rtol=1e-6)
print("same")
""",
        TRITON_INTERPRET="1",
    )


def test_codes_beyond_two_gigabytes() -> None:
    """Of which all but the last page are zeros that nobody reads."""
    run(
        """
import numpy as np, torch
from colqwen3_retrievers.vectors.kernels.triton_scan import page_maxima

codes = np.zeros((2**31 // 136 // 8 * 8 + 80, 136), dtype=np.int8)
rng = np.random.default_rng(0)
codes[-16:] = rng.integers(-127, 128, (16, 136))
tokens = rng.integers(-127, 128, (3, 136)).astype(np.int8)
at = torch.tensor([len(codes) - 16])
assert int(at) * 136 > 2**31
found = page_maxima(torch.from_numpy(codes), at, torch.tensor([16]), torch.from_numpy(tokens))
assert found.tolist() == [(codes[-16:].astype(int) @ tokens.T.astype(int)).max(0).tolist()]
print("same")
""",
        TRITON_INTERPRET="1",
    )


def test_memory_stays_within_its_bound() -> None:
    run(
        """
import numpy as np
from colqwen3_retrievers.vectors.kernels import gpu_scan
from tests.contracts.test_scans import codes, most_held, queries

scan = gpu_scan.DeviceScan("cpu", fused=True)
asked, given = queries(1, [40, 30], 16), codes(2, [1] * 260, 16)
whole = scan(asked, *given)
assert most_held(lambda: scan(asked, *given)) > 1 << 18
gpu_scan.MOST_BYTES = 1 << 17
assert most_held(lambda: scan(asked, *given)) <= 1.25 * 2**17  # the interpreter takes copies
np.testing.assert_array_equal(scan(asked, *given), whole)
print("same")
""",
        TRITON_INTERPRET="1",
    )


def test_it_is_launched_on_the_device_of_the_codes_once_it_was_seen_to_work() -> None:
    run(
        """
import warnings, torch
from colqwen3_retrievers.vectors.kernels import gpu_scan, triton_scan

warnings.simplefilter("error")
assert gpu_scan.fused_works(torch.device("cpu"), 136) and gpu_scan.fused_works(torch.device("cpu"), 328)
assert not gpu_scan.fused_works(torch.device("cpu"), 520)  # too wide: torch's, without a warning
current, launched, launch = [], [], triton_scan._page_maxima
class Device(torch.cuda.device):
    def __enter__(self):
        current.append(self.idx)
    def __exit__(self, *exc):
        current.pop()
class Launch:
    def __getitem__(self, grid):
        launched.append(list(current))
        return launch[grid]
torch.cuda.device, triton_scan._page_maxima = Device, Launch()
codes, one = torch.ones(8, 16, dtype=torch.int8), torch.tensor([0])
assert triton_scan.page_maxima(codes, one, one + 8, codes[:1]).tolist() == [[16]]
assert launched == [[-1]], launched  # a CPU has no number
print("same")
""",
        TRITON_INTERPRET="1",
    )


def test_the_compiled_kernel_reads_eight_bytes_at_a_time() -> None:
    """A width that is only known when it runs makes it read single bytes, and wait for them."""
    run("""
import re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from colqwen3_retrievers.vectors.kernels import triton_scan

fn = triton_scan._page_maxima
known = dict(codes="*i8", starts="*i64", lengths="*i64", tokens="*i8", best="*i32")
types = {p.name: "constexpr" if p.is_constexpr else known.get(p.name, "i32") for p in fn.params}
for width in (136, 328):
    head, tail = triton_scan.parts(width)
    given = dict(WIDTH=width, HEAD=head, TAIL=tail, ROWS=triton_scan._ROWS, TOKENS=64)
    values = {(at,): given[name] for at, (name, kind) in enumerate(types.items()) if kind == "constexpr"}
    aligned = {(at,): [["tt.divisibility", 16]] for at in range(5)}
    made = compile(
        ASTSource(fn=fn, signature=types, constexprs=values, attrs=aligned), target=GPUTarget("cuda", 90, 32),
        options=dict(num_warps=triton_scan._WARPS, num_stages=triton_scan._STAGES),
    )
    copies = re.findall(r"cp\\.async\\.c[ag]\\.shared\\.global [^;]*, (0x\\w+)", made.asm["ptx"])
    assert copies and set(copies) <= {"0x8", "0x10"}, set(copies)
    assert not re.search(r"ld\\.global[.\\w:]*\\.b8", made.asm["ptx"])
    assert re.search(r"(mma\\.sync|wgmma)[.\\w]*s8", made.asm["ptx"])
    assert made.metadata.shared <= 64 << 10  # three programs a core, and a place in older cards
print("same")
""")


def test_programs_of_one_page_are_neighbours() -> None:
    """So that the second block of query tokens finds the page's codes in the cache."""
    run(
        """
import torch
from colqwen3_retrievers.vectors.kernels import triton_scan

launch = triton_scan._page_maxima
class OnePage:
    def __getitem__(self, grid):
        assert grid == (3 * 4,), grid  # one axis: the others end at 65,535
        return launch[(4,)]
triton_scan._page_maxima = OnePage()
codes = (torch.arange(24 * 16) % 255 - 127).to(torch.int8).view(24, 16)
tokens = (torch.arange(200 * 16) % 251 - 125).to(torch.int8).view(200, 16)
found = triton_scan.page_maxima(codes, torch.tensor([0, 8, 16]), torch.full((3,), 8), tokens)
assert torch.equal(found[0].long(), (codes[:8].long() @ tokens.long().T).amax(0))
print("same")
""",
        TRITON_INTERPRET="1",
    )
