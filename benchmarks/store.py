"""The embedded store measured: candidates against exact search, compact codes against each other, and growth.

    python benchmarks/store.py --cache DIR [--only search codes pooled growth] [--write benchmarks/store.md]

The pages of ``tiny`` are encoded once into DIR. Times are processor time, medians of rounds in which the compared
things take turns; on a shared machine their ratios mean something, they themselves less.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import store_data
import torch
from compression import pooled_by, signs_of
from store_data import Corpus

from colqwen3_retrievers import EncoderInfo, MultiVector, PackedEmbeddings, Page, maxsim
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore
from colqwen3_retrievers.stores.protocol import Record
from colqwen3_retrievers.vectors.codes import page_code, quantise, query_codes
from colqwen3_retrievers.vectors.compression import pool_tokens
from colqwen3_retrievers.vectors.kernels import default_kernel, default_scan
from colqwen3_retrievers.vectors.multi_vector import Float32

K = 10
ROUNDS = 5


class Counting:
    """The default kernel, counting the pages it scores."""

    def __init__(self) -> None:
        self.kernel, self.pages = default_kernel(), 0

    def __call__(self, queries: PackedEmbeddings, documents: PackedEmbeddings, /) -> Float32:
        """Score."""
        self.pages += len(documents)
        return self.kernel(queries, documents)


def unit(rows: np.ndarray) -> Float32:
    """Float32 rows of length 1."""
    wide = rows.astype(np.float32)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def build(
    folder: Path, pages: Sequence[np.ndarray], dim: int, code_factor: int, kernel: Counting, code_bits: int = 8
) -> EmbeddedStore:
    """Make a store of pages; give it opened."""
    info = EncoderInfo("bench", "bench", "tomoro", dim, 1, 1280, False, 1)
    store = EmbeddedStore(folder, info=info, kernel=kernel, code_factor=code_factor, code_bits=code_bits)
    for first in range(0, len(pages), 250):
        batch = enumerate(pages[first : first + 250], start=first)
        store.add([Record(Page(f"p{n:06d}", metadata={"n": n}), MultiVector(unit(page))) for n, page in batch])
    return store


def milliseconds(work: Callable[[], object]) -> float:
    """Time one call by the processor time of all threads, which a busy machine stretches less."""
    start = time.process_time()
    work()
    return 1000 * (time.process_time() - start)


def search(corpora: Iterable[Corpus], kinds: Sequence[tuple[int, int]], scratch: Path) -> Iterator[str]:
    """Recall and speed of the default search against exact=True."""
    yield "## Default search against `exact=True`\n"
    yield f"k = {K}; one query at a time; the same threads; every round alternates the two.\n"
    columns = (
        "pages", "tokens a page", "tokens a row of codes", "bits", "KB a page, codes / tokens", "candidates, mean",
        "recall@10", "exact ms", "default ms", "speed-up", "default with a filter (10 %) ms",
        "speed-up of 32 queries at once",
    )  # fmt: skip
    yield f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    for corpus in corpora:
        for factor, bits in kinds:
            kernel, folder = Counting(), scratch / f"{corpus.name}-{factor}-{bits}"
            with build(folder, list(corpus.pages), corpus.dim, factor, kernel, bits) as store:
                size = {name: sum(p.stat().st_size for p in folder.glob(f"{name}-*")) for name in ("tokens", "codes")}
                queries = corpus.queries
                found = [store.search([query], K)[0] for query in queries]
                kernel.pages = 0
                found = [store.search([query], K)[0] for query in queries]
                candidates = kernel.pages / len(queries)
                exact = store.search(queries, K, exact=True)
                names = [[{m.record.page.id for m in hits} for hits in answers] for answers in (found, exact)]
                recall = np.mean([len(a & b) / K for a, b in zip(*names, strict=True)])
                times: dict[str, list[float]] = {name: [] for name in ("exact", "default", "filter", "many", "manyx")}
                for turn in range(ROUNDS):
                    for query in queries[turn * 5 : turn * 5 + 5]:
                        times["exact"].append(milliseconds(lambda q=query: store.search([q], K, exact=True)))
                        times["default"].append(milliseconds(lambda q=query: store.search([q], K)))
                        some = {"n": {"$lt": len(corpus.pages) // 10}}
                        times["filter"].append(milliseconds(lambda q=query, w=some: store.search([q], K, where=w)))
                for _ in range(3):
                    times["manyx"].append(milliseconds(lambda q=queries[:32]: store.search(q, K, exact=True)))
                    times["many"].append(milliseconds(lambda q=queries[:32]: store.search(q, K)))
                ms = {name: statistics.median(values) for name, values in times.items()}
                n = len(corpus.pages)
                sizes = f"{size['codes'] / n / 1024:.1f} / {size['tokens'] / n / 1024:.1f}"
                values = (
                    corpus.name, f"{corpus.pages.lengths.mean():.0f}", factor, bits, sizes, f"{candidates:.0f}",
                    f"{recall:.4f}", f"{ms['exact']:.1f}", f"{ms['default']:.1f}",
                    f"**{ms['exact'] / ms['default']:.1f}x**", f"{ms['filter']:.1f}",
                    f"{ms['manyx'] / ms['many']:.1f}x",
                )  # fmt: skip
                yield f"| {' | '.join(map(str, values))} |"
            shutil.rmtree(folder)
    yield ""


def codes(corpora: list[Corpus]) -> Iterator[str]:
    """What each compression costs in bytes and keeps of the exact order."""
    yield "## Compressions: bytes a page, and what is kept of the exact order\n"
    yield "recall@10 is that of a search by the compressed vectors alone; C=50 and C=100 say which share of the exact"
    yield "ten best is among the first 50 and 100 by them, to be scored exactly. Queries are never pooled; 1 bit is"
    yield "compared with float queries.\n"
    yield "| pages | compression | KB a page | recall@10 | C=50 | C=100 |\n|---|---|---|---|---|---|"
    for corpus in corpora:
        queries = PackedEmbeddings.pack(corpus.queries[:100])
        exact = maxsim(queries, corpus.pages, kernel=default_kernel())
        best = np.argsort(-exact, axis=1, kind="stable")[:, :K]
        pages = [page.astype(np.float32) for page in corpus.pages]

        def row(name: str, size: float, scores: Float32, best: np.ndarray = best, corpus: Corpus = corpus) -> str:
            order = np.argsort(-scores, axis=1, kind="stable")
            shares = [
                np.mean([len(set(o[:c]) & set(b)) / K for o, b in zip(order, best, strict=True)]) for c in (K, 50, 100)
            ]
            kept = " | ".join(f"{share:.3f}" for share in shares)
            return f"| {corpus.name} | {name} | {size / 1024 / len(corpus.pages):.1f} | {kept} |"

        def approximate(made: list[np.ndarray], queries: PackedEmbeddings = queries) -> Float32:
            return maxsim(queries, PackedEmbeddings.pack(made), kernel=default_kernel())

        components = corpus.pages.vectors.size
        yield row("float16, all tokens", 2 * components, exact)
        made = [quantise(page) for page in pages]
        yield row("int8, all tokens", components, approximate([rows * scale for rows, scale in made]))
        bits = [signs_of(page) for page in pages]
        yield row("1 bit, all tokens", components / 8, approximate(bits))
        for factor in (2, 3, 6):
            pooled = [pool_tokens(page, factor)[0] for page in pages]
            yield row(f"Ward by {factor}, float16", 2 * sum(p.size for p in pooled), approximate(pooled))
            if factor == 3:
                bits = [signs_of(page) for page in pooled]
                yield row("Ward by 3, 1 bit", sum(p.size for p in pooled) / 8, approximate(bits))
                flat = [pooled_by("sequential", page, 3) for page in pages]
                yield row("sequential by 3, float16", 2 * sum(p.size for p in flat), approximate(flat))
            made_codes = [page_code(page, factor) for page in pages]
            lengths = np.asarray([len(code.rows) for code in made_codes])
            scales = np.asarray([code.scale for code in made_codes], dtype=np.float32)
            joined = np.concatenate([code.rows for code in made_codes])
            scanned = default_scan()(query_codes(queries), joined, np.cumsum(lengths) - lengths, lengths, scales)
            yield row(f"**codes of the store, by {factor}** (Ward, int8, spread)", joined.nbytes, scanned)
    yield ""


def pooled(corpus: Corpus) -> Iterator[str]:
    """Whether pages that come pooled may be pooled further for their codes."""
    yield "## Pages that come pooled\n"
    yield "Shares of the exact ten best, by the pooled pages themselves, among the first candidates by their codes.\n"
    yield "| pages | pooled by | tokens a row of codes | KB a page | C=50 | C=100 |\n|---|---|---|---|---|---|"
    queries = PackedEmbeddings.pack(corpus.queries[:100])
    for factor in (2, 3):
        pages = [pool_tokens(page.astype(np.float32), factor)[0] for page in corpus.pages]
        exact = maxsim(queries, PackedEmbeddings.pack(pages), kernel=default_kernel())
        best = np.argsort(-exact, axis=1, kind="stable")[:, :K]
        for further in (1, 2, 3):
            made = [page_code(page, further) for page in pages]
            lengths = np.asarray([len(code.rows) for code in made])
            scales = np.asarray([code.scale for code in made], dtype=np.float32)
            rows = np.concatenate([code.rows for code in made])
            scanned = default_scan()(query_codes(queries), rows, np.cumsum(lengths) - lengths, lengths, scales)
            order = np.argsort(-scanned, axis=1, kind="stable")
            found = [
                np.mean([len(set(o[:c]) & set(b)) / K for o, b in zip(order, best, strict=True)]) for c in (50, 100)
            ]
            shares = " | ".join(f"{share:.3f}" for share in found)
            yield f"| {corpus.name} | {factor} | {further} | {rows.nbytes / 1024 / len(pages):.1f} | {shares} |"
    yield ""


def growth(scratch: Path, sizes: Sequence[int]) -> Iterator[str]:
    """How opening, memory and latency grow with random pages, among which nothing is a clear answer."""
    yield "## Growth: pages of 256 random vectors, d = 128\n"
    yield "Random pages are all alike, so every search takes the most candidates it ever does (800).\n"
    columns = (
        "pages", "tokens, MB", "codes, MB", "open, s", "first search, s", "search ms", "exact ms",
        "resident memory after searches, MB", "of it not shared with the files, MB",
    )  # fmt: skip
    yield f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    for size in sizes:
        folder = scratch / f"growth-{size}"
        store = build(folder, [], 128, 3, Counting())
        info = store.info
        store.close()
        with EmbeddedStore(folder, info=info) as store:
            for first in range(0, size, 500):
                batch = range(first, min(first + 500, size))
                store.add([Record(Page(f"p{n:06d}"), MultiVector(store_data.random_page(n))) for n in batch])
        child = os.fork()  # a fresh process, so that its memory is that of searching
        if child == 0:
            _grown(folder, size)
            os._exit(0)
        os.waitpid(child, 0)
        yield (folder / "told").read_text()
        shutil.rmtree(folder)
    yield ""


def _grown(folder: Path, size: int) -> None:
    megabytes = {name: sum(p.stat().st_size for p in folder.glob(f"{name}-*")) / 2**20 for name in ("tokens", "codes")}
    start = time.perf_counter()
    store = EmbeddedStore(folder, read_only=True)
    opened = time.perf_counter() - start
    queries = [store_data.random_page(10**6 + n, tokens=25) for n in range(9)]
    first = milliseconds(lambda: store.search([queries[0]], K))
    times = [milliseconds(lambda q=query: store.search([q], K)) for query in queries]
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory, own = (int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon"))
    exact = [milliseconds(lambda q=query: store.search([q], K, exact=True)) for query in queries[:4]]
    (folder / "told").write_text(
        f"| {size:,} | {megabytes['tokens']:.0f} | {megabytes['codes']:.0f} | {opened:.3f} | {first / 1000:.2f} | "
        f"{statistics.median(times):.0f} | {statistics.median(exact[1:]):.0f} | {memory:.0f} | {own:.0f} |"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True)
    parts = ("search", "codes", "pooled", "growth")
    parser.add_argument("--only", nargs="*", choices=parts, default=parts)
    parser.add_argument("--pages", type=int, default=2000)
    parser.add_argument(
        "--kinds", nargs="*", default=("3x8", "6x8", "1x1", "3x1"), help="tokens a row x bits, of search"
    )
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    lines = [
        "# The embedded store, measured\n",
        f"`python benchmarks/store.py --only {' '.join(options.only)}` on {platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, numpy {np.__version__}.\n",
    ]
    sys.stdout.write("\n".join(lines) + "\n")

    def keep(more: Iterator[str]) -> None:
        for line in more:
            lines.append(line)
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    with tempfile.TemporaryDirectory(dir=options.cache) as scratch:
        if options.only != ["growth"]:
            tiny = store_data.tiny(options.cache, options.pages)
        if "search" in options.only:
            made = (store_data.clustered(dim, options.pages) for dim in (128, 320))
            kinds = [(int(factor), int(bits)) for factor, bits in (kind.split("x") for kind in options.kinds)]
            keep(search(itertools.chain([tiny], made), kinds, Path(scratch)))
        if "codes" in options.only:
            keep(codes([tiny, store_data.clustered(128, min(600, options.pages))]))
        if "pooled" in options.only:
            keep(pooled(tiny))
        if "growth" in options.only:
            keep(growth(Path(scratch), (2000, 20_000)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(f"peak memory of the benchmark itself: {peak:.0f} MB\n")
    if options.write:
        options.write.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
