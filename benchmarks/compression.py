"""What each compression costs: bytes a page, and what is still found on held-out pages with the tiny checkpoint.

    python benchmarks/compression.py --cache DIR [--pages 300] [--write]

Prints a Markdown table; ``--write`` puts it into ``benchmarks/compression.md``. Pages are encoded once and kept in the
folder. Everything is scored exactly, by MaxSim in float32 over what the code stands for; queries are never compressed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from held_out import HeldOut, held_out
from numpy.typing import NDArray
from reporting import machine

from colqwen3_retrievers import PackedEmbeddings, maxsim
from colqwen3_retrievers.vectors.codes import quantise
from colqwen3_retrievers.vectors.compression import cluster_means, l2_normalise, pool_tokens, truncate
from colqwen3_retrievers.vectors.kernels import default_kernel
from colqwen3_retrievers.vectors.multi_vector import Float32

FACTORS = (1, 2, 3, 4, 6)
DIMS = (128, 64, 32)
Code = Literal["float16", "int8", "1 bit"]
PoolingMethod = Literal["hierarchical", "kmeans", "sequential"]
CODES: tuple[Code, ...] = ("float16", "int8", "1 bit")


class Quality(NamedTuple):
    """Means over queries.

    Attributes:
        success_1: share whose first page holds every word of it.
        ndcg_5: of the first five, pages that hold every word being relevant and others not.
        success_10: share of the first ten of the uncompressed scores that are among the first ten.
    """

    success_1: float
    ndcg_5: float
    success_10: float


def coded(rows: Float32, code: Code) -> tuple[Float32, int]:
    """What token embeddings are after a code, as float32, and the bytes it takes."""
    if code == "float16":
        return rows.astype(np.float16).astype(np.float32), rows.size * 2
    if code == "int8":
        codes, scales = quantise(rows, each_row=True)
        return codes * scales, codes.nbytes + scales.size * 4
    return signs_of(rows), len(rows) * -(-rows.shape[1] // 8)


def signs_of(rows: Float32) -> Float32:
    """What one bit a component keeps of token embeddings: unit rows of plus or minus 1 / sqrt(dim)."""
    return np.where(rows > 0, 1, -1).astype(np.float32) / np.float32(np.sqrt(rows.shape[1]))


def pooled_by(method: PoolingMethod, rows: Float32, factor: int) -> Float32:
    """Pool a page by the library's method, or by one of two to compare it with."""
    if method == "hierarchical" or factor == 1:
        return pool_tokens(rows, factor)[0]
    clusters = np.arange(len(rows)) // factor if method == "sequential" else kmeans(rows, -(-len(rows) // factor))
    return l2_normalise(cluster_means(rows.astype(np.float64), clusters)[0])


def kmeans(rows: Float32, n_clusters: int, rounds: int = 10) -> NDArray[np.int64]:
    """Cluster unit rows by spherical k-means, from seeds each the farthest from those before it."""
    nearest = rows @ rows.mean(axis=0)
    seeds = [int(nearest.argmin())]
    nearest = rows @ rows[seeds[0]]
    while len(seeds) < n_clusters:
        seeds.append(int(nearest.argmin()))
        np.maximum(nearest, rows @ rows[seeds[-1]], out=nearest)
    centres = rows[seeds]
    for _ in range(rounds):
        labels = (rows @ centres.T).argmax(axis=1)
        sums = np.zeros_like(centres)
        np.add.at(sums, labels, rows)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(lengths > 1e-6, sums / np.maximum(lengths, 1e-6), centres)
    return np.unique((rows @ centres.T).argmax(axis=1), return_inverse=True)[1]


def best_pages(queries: list[Float32], pages: list[Float32]) -> np.ndarray:
    """Positions of all pages for each query, best first."""
    scores = maxsim(queries, PackedEmbeddings.pack(pages), kernel=default_kernel())
    return np.argsort(-scores, axis=1, kind="stable")


def quality(order: np.ndarray, exact: np.ndarray, relevant: list[set[int]]) -> Quality:
    """Judge an order of pages."""
    discounts = 1 / np.log2(np.arange(2, 7))
    gains = np.array([[page in found for page in row[:5]] for row, found in zip(order, relevant, strict=True)])
    ideal = np.array([discounts[: min(5, len(found))].sum() for found in relevant])
    first_ten = [len(set(row[:10]) & set(best[:10])) / 10 for row, best in zip(order, exact, strict=True)]
    return Quality(float(gains[:, 0].mean()), float(((gains @ discounts) / ideal).mean()), float(np.mean(first_ten)))


def table(data: HeldOut) -> str:
    """Measure every combination and lay the results out as Markdown."""
    full = [page.astype(np.float32) for page in data.pages]
    exact = best_pages(data.queries, full)
    lines = [
        "| pooling | factor | dim | code | KB a page | of full | success@1 | nDCG@5 | recall@10 of exact | pool ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    whole = sum(page.size * 2 for page in full)
    runs: list[tuple[PoolingMethod, int, int, tuple[Code, ...]]] = [
        ("hierarchical", factor, dim, CODES) for dim in DIMS for factor in FACTORS
    ]
    others: tuple[PoolingMethod, ...] = ("kmeans", "sequential")
    runs += [(method, factor, DIMS[0], ("float16",)) for method in others for factor in FACTORS[1:]]
    queries = {dim: [truncate(query, dim) for query in data.queries] for dim in DIMS}
    for method, factor, dim, codes in runs:
        start = time.perf_counter()
        pooled = [pooled_by(method, truncate(page, dim), factor) for page in full]
        spent = (time.perf_counter() - start) / len(full) * 1e3
        for code in codes:
            made = [coded(page, code) for page in pooled]
            size = sum(count for _, count in made)
            got = quality(best_pages(queries[dim], [rows for rows, _ in made]), exact, data.relevant)
            cells = [
                "none" if factor == 1 else method, str(factor), str(dim), code, f"{size / len(made) / 1024:.1f}",
                f"{size / whole:.1%}", f"{got.success_1:.3f}", f"{got.ndcg_5:.3f}", f"{got.success_10:.3f}",
                "" if factor == 1 else f"{spent:.0f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--pages", type=int, default=300)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    data = held_out(options.cache, options.pages)
    tokens = math.floor(data.pages.lengths.mean())
    text = f"""# What compression costs

Made by `python benchmarks/compression.py --cache DIR --pages {options.pages} --write` on {machine("numpy")}.

With {data.model}: {len(data.pages)} held-out pages of the training of `tiny`, {tokens} tokens a page on average,
{len(data.queries)} queries of one to four printed words. A page is relevant when it holds every word; success@1 is the
share of queries whose first page is relevant. "recall@10 of exact" is the share of the ten best pages by
uncompressed scores that are still among the ten best. Queries keep their token embeddings in float32, cut to the same
dim. What `tiny` loses to a smaller dim or a larger factor says nothing of the billions of parameters of a real
checkpoint; the order of the methods does, with care.

{table(data)}
"""
    print(text)
    if options.write:
        (Path(__file__).parent / "compression.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
