"""MaxSim of one query over 1,000, 5,000 and 20,000 pages: ours against the peers, and against what the machine can do.

    build/peers/bin/python benchmarks/maxsim.py [--write]        # sh benchmarks/peers.sh builds that environment
    python benchmarks/maxsim.py --quick                          # seconds; without peers where they are not installed

Everyone gets the pages' token embeddings in memory, in float32 and in the form it works on fastest: packed, a list, or
padded beforehand (which is not timed). Ours is measured over float16 too, as stores keep it. The memory bandwidth is
that of summing as many bytes, the arithmetic peak that of a large matrix product, both with the same threads.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peers import installed
from reporting import in_turn, machine, publish, ratio, table

from colqwen3_retrievers import PackedEmbeddings, maxsim
from colqwen3_retrievers.vectors.kernels import torch_kernel
from colqwen3_retrievers.vectors.late_interaction import numpy_kernel
from colqwen3_retrievers.vectors.multi_vector import Float32

QUERY_TOKENS = 25
OURS = "**ours, torch**"


def unit_rows(rng: np.random.Generator, rows: int, dim: int) -> Float32:
    """Random unit rows."""
    made = rng.standard_normal((rows, dim), dtype=np.float32)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return made


def padded_einsum(query: torch.Tensor, padded: torch.Tensor, mask: torch.Tensor) -> Float32:
    """What much code does: one einsum over padded pages, some hundred at a time, masked, maximum, sum."""
    found = []
    for first in range(0, len(padded), 256):
        similar = torch.einsum("qd,ntd->nqt", query, padded[first : first + 256])
        similar = similar.masked_fill(~mask[first : first + 256, None], -torch.inf)
        found.append(similar.amax(-1).sum(-1))
    return torch.cat(found).numpy()


def ways_of(query: Float32, documents: PackedEmbeddings) -> dict[str, Callable[[], Float32]]:
    """Every way that is installed, by name."""
    kernel = torch_kernel("cpu")
    half = PackedEmbeddings(documents.vectors.astype(np.float16), documents.offsets)
    ways: dict[str, Callable[[], Float32]] = {
        OURS: lambda: maxsim(query, documents, kernel=kernel)[0],
        "ours, torch, over float16": lambda: maxsim(query, half, kernel=kernel)[0],
        "ours, numpy": lambda: maxsim(query, documents, kernel=numpy_kernel)[0],
    }
    pages = list(documents)
    tensors = [torch.from_numpy(page) for page in pages]
    asked = torch.from_numpy(query)
    padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    mask = torch.arange(padded.shape[1])[None] < torch.from_numpy(documents.lengths)[:, None]
    ways["padded einsum (torch)"] = lambda: padded_einsum(asked, padded, mask)
    if installed("colpali_engine"):
        base = importlib.import_module("colpali_engine.utils.processing_utils").BaseVisualRetrieverProcessor
        ways["colpali-engine score_multi_vector"] = lambda: base.score_multi_vector([asked], tensors, device="cpu")[
            0
        ].numpy()
    if installed("sentence_transformers"):
        theirs = importlib.import_module("sentence_transformers.util").maxsim
        ways["sentence-transformers maxsim, a list"] = lambda: theirs([asked], tensors)[0].numpy()
        ways["sentence-transformers maxsim, padded"] = lambda: theirs(asked[None], padded, b_mask=mask)[0].numpy()
    if installed("maxsim_cpu"):
        module = importlib.import_module("maxsim_cpu")
        ways["maxsim-cpu, a list"] = lambda: np.asarray(module.maxsim_scores_variable(query, pages))
    return ways


def bandwidth(size: int) -> float:
    """Bytes a second at which all threads read memory that no cache holds."""
    values = torch.zeros(size // 4)
    return size / _best(lambda: values.sum())


@functools.cache
def peak() -> float:
    """Operations a second of a large float32 matrix product."""
    left = torch.randn(3072, 3072)
    return float(2 * 3072**3 / _best(lambda: left @ left))


def _best(work: Callable[[], object], tries: int = 5) -> float:
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(count: int, tokens: int, dim: int, rounds: int) -> list[list[object]]:
    """Measure one size: rows of the table."""
    rng = np.random.default_rng(4)
    lengths = rng.integers(tokens // 2, tokens * 3 // 2, count)
    documents = PackedEmbeddings(unit_rows(rng, int(lengths.sum()), dim), np.concatenate([[0], np.cumsum(lengths)]))
    query = unit_rows(rng, QUERY_TOKENS, dim)
    size = documents.vectors.nbytes
    read, compute = bandwidth(min(size, 1 << 31)), peak()
    ways = ways_of(query, documents)
    times = in_turn(ways, rounds)
    expected = ways["ours, numpy"]()
    rows: list[list[object]] = []
    for name, way in ways.items():
        seconds = statistics.median(times[name])
        moved = size / 2 if "float16" in name else size
        rows.append(
            [
                f"{count:,}", name, f"{1000 * seconds:.1f}",
                "" if name == OURS else f"{ratio(times[OURS], times[name]):.2f}x",
                f"{moved / seconds / read:.0%}",
                f"{2 * QUERY_TOKENS * documents.vectors.size / seconds / compute:.0%}",
                f"{np.abs(way() - expected).max():.0e}",
            ]
        )  # fmt: skip
    rows[0][2] = f"{rows[0][2]} (floor {1000 * max(size / read, 50 * documents.vectors.size / compute):.1f})"
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pages", type=int, nargs="*", default=(1000, 5000, 20_000))
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="50 pages")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/maxsim.md")
    options = parser.parse_args()
    if options.quick:
        options.pages, options.rounds = (50,), 1
    rows = [row for count in options.pages for row in measure(count, options.tokens, options.dim, options.rounds)]
    columns = (
        "pages", "kernel", "ms", "ours is faster by", "of memory bandwidth", "of arithmetic peak", "largest difference",
    )  # fmt: skip
    text = f"""# MaxSim on a CPU

Made by `build/peers/bin/python benchmarks/{Path(__file__).name} --write` on {machine("numpy", "maxsim-cpu")}.

One query of {QUERY_TOKENS} tokens against pages of about {options.tokens} tokens, dim {options.dim}, float32 in memory;
{options.rounds} rounds in which all take turns, medians; ratios are within rounds. A padded form is made beforehand
and its making not timed. The floor is the longer of reading every byte once and of the products alone, at the bandwidth
and the peak measured here. "Largest difference" is of scores, against the definition in numpy.

{table(columns, rows)}
"""
    publish(__file__, text, write=options.write)


if __name__ == "__main__":
    main()
