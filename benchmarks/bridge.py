"""What single vectors find of the pages that MaxSim puts first: pages of the tiny checkpoint and synthetic pages.

    python benchmarks/bridge.py --cache DIR [--pages 300] [--synthetic 1000] [--write]

Prints Markdown tables; ``--write`` puts them into ``benchmarks/bridge.md``. Pages of the checkpoint are encoded once
and kept in the folder. Besides the methods of the library it measures what was considered and left out. Figures are
means of three seeds: of what a method draws, and, for synthetic pages, of the pages themselves.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import store_data
from held_out import held_out
from reporting import machine
from store_data import clustered

from colqwen3_retrievers import PackedEmbeddings, maxsim
from colqwen3_retrievers.index.row_candidates import pooled_rows
from colqwen3_retrievers.vectors.kernels import default_kernel
from colqwen3_retrievers.vectors.multi_vector import Float32
from colqwen3_retrievers.vectors.single_vector import SingleVectorSettings, single_vectors

CANDIDATES = (20, 50, 100)
SEEDS = (0, 1, 2)  # of what a method draws, and of synthetic pages: figures are means over them
ROWS_A_SEARCH = 50  # rows that a search for one query token gives


@dataclass(frozen=True)
class Corpus:
    """Pages, queries, and the order of the pages by exact MaxSim."""

    pages: list[Float32]
    queries: list[Float32]
    exact: np.ndarray
    relevant: list[set[int]] | None

    @classmethod
    def make(cls, pages: list[Float32], queries: list[Float32], relevant: list[set[int]] | None = None) -> Corpus:
        """Score every page."""
        scores = maxsim(queries, PackedEmbeddings.pack(pages), kernel=default_kernel())
        return cls(pages, queries, np.argsort(-scores, axis=1, kind="stable"), relevant)


Scores = Callable[[int], tuple[np.ndarray, int]]
"""Computes scores (n_queries, n_pages) with a seed, and says how many numbers a page takes."""


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def methods(corpus: Corpus) -> Iterator[tuple[str, Scores]]:
    """All that is measured, with its name."""
    width = corpus.pages[0].shape[1]
    means = unit(np.stack([query.mean(axis=0) for query in corpus.queries]))

    def mean(_: int) -> tuple[np.ndarray, int]:
        return means @ unit(np.stack([page.mean(axis=0) for page in corpus.pages])).T, width

    def rows(count: int) -> Scores:
        def scores(_: int) -> tuple[np.ndarray, int]:
            pooled = [pooled_rows(page, count) for page in corpus.pages]
            return np.stack([(means @ page.T).max(axis=1) for page in pooled], axis=1), count * width

        return scores

    def rows_a_token(count: int) -> Scores:
        """A search for each query token: a page has the sum of what was found of it, the least where nothing was."""

        def scores(_: int) -> tuple[np.ndarray, int]:
            pooled = [pooled_rows(page, count) for page in corpus.pages]
            owner = np.repeat(np.arange(len(pooled)), [len(page) for page in pooled])
            every, found = np.concatenate(pooled), np.zeros((len(corpus.queries), len(pooled)))
            for number, query in enumerate(corpus.queries):
                for similarity in query @ every.T:
                    nearest = np.argpartition(-similarity, ROWS_A_SEARCH)[:ROWS_A_SEARCH]
                    best = np.full(len(pooled), similarity[nearest].min())
                    np.maximum.at(best, owner[nearest], similarity[nearest])
                    found[number] += best
            return found, count * width

        return scores

    def ours(settings: SingleVectorSettings) -> Scores:
        def scores(seed: int) -> tuple[np.ndarray, int]:
            seeded = replace(settings, seed=seed)
            pages = single_vectors(corpus.pages, seeded)
            return single_vectors(corpus.queries, seeded, is_query=True) @ pages.T, settings.dim

        return scores

    def projected(settings: SingleVectorSettings, dim: int) -> Scores:
        """The paper's last step: random signs and buckets bring a long encoding down to ``dim``."""

        def scores(seed: int) -> tuple[np.ndarray, int]:
            rng, seeded = np.random.default_rng(seed), replace(settings, seed=seed)
            bucket, sign = rng.integers(0, dim, settings.dim), rng.choice([-1.0, 1.0], settings.dim)
            made = []
            for inputs, is_query in ((corpus.queries, True), (corpus.pages, False)):
                short = np.zeros((dim, len(inputs)), dtype=np.float32)
                np.add.at(short, bucket, (single_vectors(inputs, seeded, is_query=is_query) * sign).T)
                made.append(unit(short.T))
            return made[0] @ made[1].T, dim

        return scores

    yield "normalised mean", mean
    for count in (4, 16):
        yield f"{count} pooled rows a page, mean of the query", rows(count)
    for count in (4, 16):
        yield f"{count} pooled rows a page, a search a query token", rows_a_token(count)
    for dim in (1024, 2048, 4096, 10_240):
        yield f"fde {dim:,}", ours(SingleVectorSettings(width, "fde", dim))
    yield "fde 10,240 projected to 2,048", projected(SingleVectorSettings(width, "fde", 10_240), 2048)
    for dim, nearest in ((1024, 16), (2048, 4), (2048, 16), (2048, 64), (4096, 16)):
        yield f"directions {dim:,}, nearest {nearest}", ours(SingleVectorSettings(width, "directions", dim, nearest))


def judge(corpus: Corpus, order: np.ndarray) -> list[float]:
    """What is among the candidates, in the order of the table's columns."""
    pairs = list(zip(order, corpus.exact, strict=True))
    values = [np.mean([len(set(got[:c]) & set(best[:10])) / 10 for got, best in pairs]) for c in CANDIDATES]
    values += [np.mean([best[0] in got[:c] for got, best in pairs]) for c in CANDIDATES]
    if corpus.relevant is not None:
        asked = list(zip(order, corpus.relevant, strict=True))
        values += [np.mean([bool(set(got[:c]) & wanted) for got, wanted in asked]) for c in CANDIDATES]
    return [float(value) for value in values]


def table(name: str, corpora: Sequence[Corpus]) -> str:
    """Measure every method on one corpus for each seed; those may be one and the same."""
    heads = [f"10 best @{count}" for count in CANDIDATES] + [f"the best @{count}" for count in CANDIDATES]
    if corpora[0].relevant is not None:
        heads += [f"a relevant one @{count}" for count in CANDIDATES]
    values: dict[str, list[list[float]]] = {}
    spent: dict[str, list[float]] = {}
    numbers: dict[str, int] = {}
    for seed, corpus in zip(SEEDS, corpora, strict=True):
        for method, scores in methods(corpus):
            random = method.startswith(("fde", "directions"))
            if seed and not random and corpus is corpora[0]:
                continue  # it would give the same once more
            start = time.perf_counter()
            found, numbers[method] = scores(seed)
            spent.setdefault(method, []).append((time.perf_counter() - start) / len(corpus.pages) * 1e3)
            values.setdefault(method, []).append(judge(corpus, np.argsort(-found, axis=1, kind="stable")))
        print(f"{name}: seed {seed}", file=sys.stderr, flush=True)
    lines = [f"| method | numbers a page | ms a page | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    for method, rows in values.items():
        cells = " | ".join(f"{value:.3f}" for value in np.mean(rows, axis=0))
        lines.append(f"| {method} | {numbers[method]:,} | {np.mean(spent[method]):.0f} | {cells} |")
    return f"## {name}\n\n" + "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--pages", type=int, default=300)
    parser.add_argument("--synthetic", type=int, default=1000)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    real = held_out(options.cache, options.pages)
    chance = [f"{min(1, count / len(real.pages)):.3f}" for count in CANDIDATES]
    tables = [
        table(
            f"{len(real.pages)} held-out pages, {real.model}, {real.pages.lengths.mean():.0f} tokens a page "
            f"(chance: {', '.join(chance)})",
            [Corpus.make([page.astype(np.float32) for page in real.pages], real.queries, real.relevant)] * len(SEEDS),
        )
    ]
    made = [clustered(128, options.synthetic, seed=store_data.SEED + seed) for seed in SEEDS]
    chance = [f"{min(1, count / options.synthetic):.3f}" for count in CANDIDATES]
    tables.append(
        table(
            f"{options.synthetic:,} synthetic, clustered pages, {made[0].pages.lengths.mean():.0f} tokens a page "
            f"(chance: {', '.join(chance)})",
            [Corpus.make([page.astype(np.float32) for page in one.pages], one.queries) for one in made],
        )
    )
    text = f"""# One vector a page as a first stage

Made by `python benchmarks/bridge.py --cache DIR --pages {options.pages} --synthetic {options.synthetic} --write` on
{machine("numpy", "scipy")}.

For each query, pages are ordered by one vector (cosine), and the first 20, 50 and 100 are candidates: "10 best" is the
share of the ten best pages by exact MaxSim that are among them, "the best" how often the first is, "a relevant one" how
often a page that holds every word of the query is. What is random is the mean of {len(SEEDS)} seeds; single seeds
differ by a few hundredths. Time is encoding and comparing, pages and queries together, and noisy.

The choice: `fde` with 2,048 numbers is the default of `SingleVectorSettings`. On real pages of `tiny` it finds more
than `directions`, which there does little better than chance, though it is weak itself; on synthetic pages of clear
clusters `directions` finds a little more, so it stays as the other option. One of the two corpora alone would
mislead, either way. With more numbers both find more, not in every single step. Sixteen pooled rows a page, with a
search for each query token, find far more of real pages than any single vector of the same size, and less of
synthetic ones: `PageIndex.candidate_rows` gives them to a store of single vectors, `PageIndex.rescore` orders what it
finds by exact MaxSim.

{chr(10).join(tables)}
"""
    print(text)
    if options.write:
        (Path(__file__).parent / "bridge.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
