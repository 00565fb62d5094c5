"""The arithmetic of docs/growing.md: bytes, nodes, hours and seconds for millions of pages.

    python scripts/growing.py             # print the tables
    python scripts/growing.py --write     # put them into the page
    python scripts/growing.py --measure   # measure what they assume of Qdrant's engine and of a client (qdrant-edge-py)

Every assumption stands in `Assumptions` with where it comes from; give others to see what becomes of the figures.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "growing.md"
BEGIN, END = "<!-- computed by scripts/growing.py -->", "<!-- end of what is computed -->"
SIZES = (1_000_000, 10_000_000, 100_000_000)
DIMS = (128, 320)

MEASURED_TOKENS, MEASURED_POOLED, MEASURED_QUERY = 700, 234, 25


@dataclass(frozen=True)
class Assumptions:
    """What the figures rest on. Each is named in the page."""

    tokens: int = 1296
    """Token embeddings a page: the default bound of 1,280 visual tokens, and 16 of the prompt."""
    pool: int = 3
    """Original tokens for each pooled one; the default."""
    payload: int = 12_000
    """Bytes on disk a page: three kilobytes of text in the three forms that filters read, metadata and clusters."""
    ram_besides: int = 1_000
    """Bytes of memory a page for ids and payload indexes."""
    replicas: int = 1
    """Copies of each shard."""
    node_cores: int = 32
    node_ram: float = 256e9
    node_disk: float = 7.5e12
    """A node of the kind that clouds rent for databases: 32 cores, 256 GB, two local NVMe disks."""
    filled: float = 0.8
    """Share of a node's memory and disk that is used; the rest is for optimising segments and the page cache."""
    parallel: float = 0.7
    """Share of its cores that a search alone on a node keeps busy."""
    disk_speed: float = 3e9
    """Bytes a second that a node reads from its disks at random, in pieces of a page."""
    candidates: int = 105
    """Pages that each shard scores exactly for k=20; one shard a node is assumed."""
    scan_seconds: tuple[tuple[int, float], ...] = ((128, 42e-6), (320, 50e-6))
    """Core-seconds a page of 234 pooled int8 tokens against a query of 25, by dim: measured."""
    rescore_seconds: tuple[tuple[int, float], ...] = ((128, 176e-6), (320, 346e-6))
    """Core-seconds a page of 700 float16 tokens against a query of 25, by dim: measured."""
    client_seconds: tuple[tuple[int, float], ...] = ((128, 0.07), (320, 0.17))
    """Core-seconds of a client a page: Ward pooling of 1,296 tokens, making the point, gRPC: measured."""
    parameters: float = 4.0e9
    vision_parameters: float = 0.4e9
    """A 4B checkpoint, and its vision tower, which reads four patches for each visual token."""
    gpu_flops: float = 990e12
    gpu_share: float = 0.35
    """bfloat16 of one H100 as its maker states it, and the share of it that prefill reaches; not measured here."""
    gpus: int = 8
    """vLLM servers of one GPU each."""
    graph_visits: int = 4_000
    """Pages that a search visits in an HNSW graph of 16 links a page; not measured here."""

    @property
    def pooled(self) -> int:
        """Pooled tokens a page."""
        return math.ceil(self.tokens / self.pool)


@dataclass(frozen=True)
class Figures:
    """What a number of pages of a dim comes to; bytes, seconds and counts."""

    full: float
    pooled_disk: float
    pooled_ram: float
    disk: float
    ram: float
    nodes: int
    encode: float
    client_cores: float
    search: float
    scan_core_seconds: float
    nodes_for_a_second: int
    graph_search: float


def page_bytes(dim: int, given: Assumptions) -> tuple[int, int, int]:
    """Bytes a page: float16 of all tokens, float16 of the pooled ones (both on disk), int8 of these (in memory)."""
    return 2 * given.tokens * dim, 2 * given.pooled * dim, given.pooled * dim


def pages_a_second(given: Assumptions) -> float:
    """Pages one GPU encodes a second: two operations a parameter and token, four patches a visual token."""
    operations = 2 * given.parameters * given.tokens + 2 * given.vision_parameters * 4 * given.tokens
    return given.gpu_flops * given.gpu_share / operations


def figures(pages: int, dim: int, given: Assumptions | None = None) -> Figures:
    """Work the figures out."""
    given = given or Assumptions()
    full, pooled_disk, pooled_ram = page_bytes(dim, given)
    copies = pages * given.replicas
    disk = copies * (full + pooled_disk + given.payload)
    ram = copies * (pooled_ram + given.ram_besides)
    nodes = math.ceil(max(ram / (given.node_ram * given.filled), disk / (given.node_disk * given.filled)))
    a_page = dict(given.scan_seconds)[dim] * given.pooled / MEASURED_POOLED
    exact = dict(given.rescore_seconds)[dim] * given.tokens / MEASURED_TOKENS
    at_once = given.node_cores * given.parallel
    rescoring = given.candidates * (full / given.disk_speed + exact / at_once)
    scan = pages * a_page
    rate = pages_a_second(given) * given.gpus
    return Figures(
        full=copies * full,
        pooled_disk=copies * pooled_disk,
        pooled_ram=copies * pooled_ram,
        disk=disk,
        ram=ram,
        nodes=nodes,
        encode=pages / rate,
        client_cores=rate * dict(given.client_seconds)[dim],
        search=scan / (nodes * at_once) + rescoring,
        scan_core_seconds=scan,
        nodes_for_a_second=max(nodes, math.ceil(scan / (at_once * (1 - rescoring)))),
        graph_search=given.graph_visits * a_page + rescoring,  # one core walks a graph, each shard its own
    )


def tables(given: Assumptions | None = None) -> str:
    """Give the tables as Markdown."""
    given = given or Assumptions()
    lines = [
        "| pages | dim | float16, disk | pooled float16, disk | pooled int8, memory | nodes | index, hours "
        "| search, s | nodes for 1 s | with a graph, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for pages in SIZES:
        for dim in DIMS:
            made = figures(pages, dim, given)
            lines.append(
                f"| {pages // 1_000_000} million | {dim} | {_bytes(made.full)} | {_bytes(made.pooled_disk)} | "
                f"{_bytes(made.pooled_ram)} | {made.nodes} | {made.encode / 3600:,.1f} | {made.search:.1f} | "
                f"{made.nodes_for_a_second} | {made.graph_search:.1f} |"
            )
    lines += ["", "| a page | " + " | ".join(f"dim {dim}" for dim in DIMS) + " |", "|---|" + "---|" * len(DIMS)]
    sizes = [page_bytes(dim, given) for dim in DIMS]
    for label, position in (("float16", 0), ("pooled float16", 1), ("pooled int8", 2)):
        lines.append(f"| {label} | " + " | ".join(f"{size[position]:,} bytes" for size in sizes) + " |")
    rate = pages_a_second(given)
    cores = ", ".join(f"{figures(SIZES[0], dim, given).client_cores:.0f} at dim {dim}" for dim in DIMS)
    lines += [
        "",
        f"One GPU encodes {rate:.0f} pages a second, {given.gpus} of them {rate * given.gpus:.0f}; the clients between "
        f"them and Qdrant need cores: {cores}.",
    ]
    return "\n".join(lines)


def page_with_tables(page: str) -> str:
    """Give the page with the tables as they are computed now."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


def measure(dim: int, pages: int = 400) -> None:
    """Measure core-seconds a page: Qdrant's engine, one search thread; and what a client does."""
    import numpy as np
    import qdrant_edge as edge

    from colqwen3_retrievers import MultiVector, Page
    from colqwen3_retrievers.stores.protocol import Record
    from colqwen3_retrievers.stores.qdrant.points import make_point

    rng = np.random.default_rng(0)

    def unit(rows: int) -> Any:
        made = rng.standard_normal((rows, dim)).astype(np.float32)
        return made / np.linalg.norm(made, axis=1, keepdims=True)

    def core_seconds(call: Callable[[], object], times: int = 7) -> float:
        least = math.inf
        for _ in range(times):
            started = time.process_time()
            call()
            least = min(least, time.process_time() - started)
        return least

    def vector(codes: bool) -> edge.EdgeVectorParams:
        return edge.EdgeVectorParams(
            size=dim, distance=edge.Distance.Dot, on_disk=True, datatype=edge.VectorStorageDatatype.Float16,
            multivector_config=edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim),
            hnsw_config=edge.HnswIndexConfig(m=0, ef_construct=100, full_scan_threshold=10_000),
            quantization_config=edge.ScalarQuantizationConfig(edge.ScalarType.Int8, always_ram=True) if codes else None,
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        config = edge.EdgeConfig(
            vectors={"full": vector(False), "pooled": vector(True)}, max_search_threads=1,
            optimizers=edge.EdgeOptimizersConfig(indexing_threshold=1000, default_segment_number=1),
        )  # fmt: skip
        shard = edge.EdgeShard.create(folder, config)
        for n in range(pages):
            rows = unit(MEASURED_TOKENS)
            vectors = {"full": rows.tolist(), "pooled": rows[:MEASURED_POOLED].tolist()}
            shard.update(edge.UpdateOperation.upsert_points([edge.Point(id=n, vector=vectors)]))
        shard.optimize()
        query = unit(MEASURED_QUERY).tolist()
        codes = edge.SearchParams(quantization=edge.QuantizationSearchParams(rescore=False))
        for name, using, params in (
            ("pooled int8", "pooled", codes),
            ("all, float16", "full", edge.SearchParams(exact=True)),
        ):
            asked = edge.QueryRequest(limit=10, query=edge.Query.Nearest(query, using=using), params=params)
            spent = core_seconds(lambda asked=asked: shard.query(asked)) / pages
            print(f"dim {dim}: {name}: {spent * 1e6:.0f} microseconds of a core a page")
        shard.close()
    given = Assumptions()
    record = Record(Page(id="a", sha256="0", text="x" * 3000), MultiVector(unit(given.tokens)))

    def client() -> None:
        from qdrant_client.conversions.conversion import RestToGrpc

        RestToGrpc.convert_point_struct(make_point(record, pool=given.pool)[0]).SerializeToString()

    print(f"dim {dim}: a client: {core_seconds(client, 3):.3f} seconds of a core a page")


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e6:.1f} MB"


def main() -> int:
    """Print, write or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/growing.md")
    parser.add_argument("--measure", action="store_true", help="measure what is assumed of the engine and of a client")
    options = parser.parse_args()
    if options.measure:
        for dim in DIMS:
            measure(dim)
    elif options.write:
        PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tables())
    return 0


if __name__ == "__main__":
    sys.exit(main())
