"""MaxSim of one query over a corpus: the kernels against each other, in one run.

    python benchmarks/maxsim.py [--pages 500] [--tokens 700] [--dim 128]

Prints a Markdown table of ratios. Times on a shared machine mean little; ratios within one run, interleaved, mean more.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from colqwen3_retrievers import PackedEmbeddings, maxsim
from colqwen3_retrievers.datatypes import Float32
from colqwen3_retrievers.kernels import torch_kernel
from colqwen3_retrievers.late_interaction import Kernel, numpy_kernel


def unit_rows(rng: np.random.Generator, rows: int, dim: int) -> Float32:
    """Random unit rows."""
    made = rng.standard_normal((rows, dim), dtype=np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def padded_einsum(queries: PackedEmbeddings, documents: PackedEmbeddings, /) -> Float32:
    """What most code does: pad, one einsum over everything, mask by minus infinity, maximum, sum."""
    longest = int(documents.lengths.max())
    padded = torch.zeros((len(documents), longest, documents.dim))
    mask = torch.zeros((len(documents), longest), dtype=torch.bool)
    for i, document in enumerate(documents):
        padded[i, : len(document)] = torch.from_numpy(document.astype(np.float32))
        mask[i, : len(document)] = True
    rows = []
    for query in queries:
        similar = torch.einsum("qd,ntd->nqt", torch.from_numpy(query.astype(np.float32)), padded)
        rows.append(similar.masked_fill(~mask[:, None], -torch.inf).amax(-1).sum(-1))
    return torch.stack(rows).numpy()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=700)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rng = np.random.default_rng(4)
    lengths = rng.integers(options.tokens // 2, options.tokens * 3 // 2, options.pages)
    documents = PackedEmbeddings.pack([unit_rows(rng, n, options.dim) for n in lengths], dtype=np.float16)
    query = unit_rows(rng, 25, options.dim)
    kernels: dict[str, Kernel] = {
        "padded einsum (torch)": padded_einsum,
        "numpy_kernel": numpy_kernel,
        "torch_kernel('cpu')": torch_kernel("cpu"),
    }
    if torch.cuda.is_available():
        kernels["torch_kernel('cuda')"] = torch_kernel("cuda")
    times: dict[str, list[float]] = {name: [] for name in kernels}
    expected = maxsim(query, documents)
    for turn in range(options.rounds + 1):
        for name, kernel in kernels.items():
            seconds = _time(lambda kernel=kernel: maxsim(query, documents, kernel=kernel))
            if turn:  # the first round warms up
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["padded einsum (torch)"]
    print(
        f"{options.pages} pages of about {options.tokens} tokens, dim {options.dim}, float16; one query of 25 tokens."
    )
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, numpy {np.__version__}\n"
    )
    print("| kernel | median ms | against padded einsum | largest difference |\n|---|---|---|---|")
    for name, kernel in kernels.items():
        worst = np.abs(maxsim(query, documents, kernel=kernel) - expected).max()
        print(f"| {name} | {1000 * medians[name]:.1f} | {base / medians[name]:.2f}x | {worst:.1e} |")


def _time(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
