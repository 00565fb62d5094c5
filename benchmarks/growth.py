"""Both stores as a corpus grows: size on disk, time to build, latency of a search, and what it finds.

    python benchmarks/growth.py [--pages 250 1000 4000] [--write]        # under six minutes
    QDRANT_URL=qdrant://host:6333 python benchmarks/growth.py            # the distributed store on a server
    python benchmarks/growth.py --quick

Without a server, Qdrant's own engine runs in this process (qdrant-edge-py, of the test extra) behind its REST interface
as a few lines of Python speak it: searching and storing are Qdrant's, the time to build is mostly JSON's in Python.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import store_data
from reporting import machine, publish, table

from colqwen3_retrievers import EncoderInfo, MultiVector, PackedEmbeddings, Page, maxsim, open_store
from colqwen3_retrievers.stores.protocol import MultiVectorStore, Record
from colqwen3_retrievers.vectors.kernels import default_kernel
from colqwen3_retrievers.vectors.multi_vector import Float32

ROOT = Path(__file__).parents[1]
DIM, TOKENS, K = 128, 256, 10
BATCH = 50


def unit(rows: np.ndarray) -> Float32:
    """Float32 rows of length 1."""
    wide = rows.astype(np.float32)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


@contextlib.contextmanager
def embedded(folder: Path, info: EncoderInfo) -> Iterator[MultiVectorStore]:
    """The store in a folder."""
    store = open_store(folder, info=info)
    yield store
    store.close()


@contextlib.contextmanager
def distributed(folder: Path, info: EncoderInfo) -> Iterator[MultiVectorStore]:
    """The store in Qdrant: on the server that QDRANT_URL names, in a collection of its own, or in this process."""
    if "QDRANT_URL" in os.environ:
        collection = f"colqwen3-benchmark-{uuid.uuid4().hex}"
        store = open_store(f"{os.environ['QDRANT_URL'].rstrip('/')}/{collection}", info=info)
        try:
            yield store
        finally:
            store.close()
            _drop(collection)
        return
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from tests.contracts.qdrant_edge_engine import EdgeEngine
    from tests.contracts.qdrant_server import serving

    engine = EdgeEngine(folder, indexing_threshold=1_000)
    with serving(engine=engine) as server:
        store = open_store(server.address(), info=info)
        store.optimize = lambda: engine.optimize("pages")  # type: ignore[attr-defined]  # as a server does by itself
        yield store
        store.close()
    engine.close()


def _drop(collection: str) -> None:
    from colqwen3_retrievers.stores.qdrant.connection import connect, parse_address

    address = parse_address(f"{os.environ['QDRANT_URL'].rstrip('/')}/{collection}")
    client = connect(address, api_key=os.environ.get("QDRANT_API_KEY"), timeout=60)
    client.delete_collection(collection)
    client.close()


def measure(store: MultiVectorStore, pages: Sequence[np.ndarray], queries: Sequence[Float32]) -> list[object]:
    """Fill a store and search it: the last cells of a row."""
    start = time.perf_counter()
    for first in range(0, len(pages), BATCH):
        batch = enumerate(pages[first : first + BATCH], start=first)
        store.add([Record(Page(f"p{number:06d}"), MultiVector(unit(page))) for number, page in batch])
    if hasattr(store, "optimize"):
        store.optimize()
    building = time.perf_counter() - start
    for query in queries[:3]:  # the first search opens maps and starts threads
        store.search([query], K)
    found, times = [], []
    for query in queries:
        start = time.perf_counter()
        found.append({match.record.page.id for match in store.search([query], K)[0]})
        times.append(1000 * (time.perf_counter() - start))
    packed = PackedEmbeddings.pack([unit(page) for page in pages])
    scores = maxsim(list(queries), packed, kernel=default_kernel())
    best = [{f"p{i:06d}" for i in row[:K]} for row in np.argsort(-scores, axis=1, kind="stable")]
    recall = statistics.mean(len(a & b) / min(K, len(pages)) for a, b in zip(found, best, strict=True))
    return [
        f"{building:.1f}", f"{len(pages) / building:.0f}",
        f"{statistics.median(times):.1f}", f"{np.percentile(times, 95):.1f}", f"{recall:.3f}",
    ]  # fmt: skip


def sizes(folder: Path, pages: Sequence[np.ndarray]) -> list[object]:
    """KB a page that a closed store keeps, the same over float16, and KB a page of its write-ahead log."""
    kept = log = 0
    for path in folder.rglob("*"):
        if path.is_file():
            room = 512 * path.stat().st_blocks  # holes take none
            log, kept = (log + room, kept) if path.parent.name == "wal" else (log, kept + room)
    if not kept:
        return ["on the server", "", ""]
    float16 = 2 * DIM * sum(map(len, pages))
    return [f"{kept / len(pages) / 1024:.1f}", f"{kept / float16:.2f}", f"{log / len(pages) / 1024:.0f}"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pages", type=int, nargs="*", default=(250, 1000, 4000))
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--stores", nargs="*", default=("embedded", "distributed"))
    parser.add_argument("--quick", action="store_true", help="30 pages in the embedded store")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/growth.md")
    options = parser.parse_args()
    if options.quick:
        options.pages, options.queries, options.stores = (30,), 5, ("embedded",)
    corpus = store_data.clustered(DIM, max(options.pages), TOKENS, options.queries)
    everything = list(corpus.pages)
    info = EncoderInfo("bench", "bench", "tomoro", DIM, 1, 1280, False, 1)
    makers = {"embedded": embedded, "distributed": distributed}
    rows = []
    for count in options.pages:
        for name in options.stores:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
                pages = everything[:count]
                with makers[name](Path(scratch), info) as store:
                    measured = measure(store, pages, corpus.queries)
                rows.append([name, f"{count:,}", *sizes(Path(scratch), pages), *measured])
                print(rows[-1], file=sys.stderr, flush=True)
    server = "a Qdrant server"
    if "QDRANT_URL" not in os.environ:
        server = """Qdrant's engine in this process (qdrant-edge-py), where the time to build
is mostly that of JSON in the Python that stands in for a server, and a search pays for it too"""
    columns = (
        "store", "pages", "KB a page on disk", "over float16", "KB a page of log", "build s", "pages a second",
        "search ms, median", "search ms, 95 %", "recall@10",
    )  # fmt: skip
    text = f"""# Both stores as a corpus grows

Made by `python benchmarks/growth.py --write` on {machine("numpy", "qdrant-client", "qdrant-edge-py")}.

Synthetic pages of about {TOKENS} tokens, dim {DIM}, whose ranks 2 to 10 are near ties; {options.queries} queries, one
at a time, k = {K}; building includes pooling and codes. Recall is of the ten pages that MaxSim over everything puts
first. Sizes are those of a closed store; what Qdrant's engine keeps of its write-ahead log is told apart.
The distributed store is {server}.

{table(columns, rows)}
"""
    publish(__file__, text, write=options.write)


if __name__ == "__main__":
    main()
