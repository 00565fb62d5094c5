"""Reranking 100 candidate pages: known to an index, in a warm cache, new, or encoded anew for every query.

    python benchmarks/rerank.py [--pages 100] [--write]

Prints Markdown tables; ``--write`` puts them into ``benchmarks/rerank.md``. The last way is that of
llama-index-postprocessor-colpali-rerank 0.5.0, which opens and encodes every candidate on each call and keeps nothing;
its encoder is exchanged for ours, so that the ways of working are compared and not the models. All ways get the same
pages, queries and encoder, in turn; times are medians over queries, and only their ratios mean anything.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import llama_index.core
import numpy as np
import torch
from langchain_core.documents import Document
from llama_index.core.schema import ImageNode, NodeWithScore
from PIL import Image, ImageDraw, ImageFont

import colqwen3_retrievers.langchain as ours_in_langchain
import colqwen3_retrievers.llama_index as ours_in_llama_index
from colqwen3_retrievers import ColQwen3Encoder, PageIndex, load_pages

SIZES = ((448, 640), (640, 448), (576, 768), (704, 960), (960, 544))
QUERIES = ("total payable", "supply of nickel alloy", "revenue by region")
CONCURRENT = 100
TICK = 0.005  # seconds between ticks of the event loop's other task


def write_pages(folder: Path, count: int) -> None:
    """Pages of text, in the sizes of scans, slides and receipts."""
    rng, font = np.random.default_rng(0), ImageFont.load_default(15)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(3, 9))) for _ in range(500)]
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        image = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(image)
        for y in range(24, height - 30, 22):
            draw.text((24, y), " ".join(rng.choice(words, width // 60)), fill="black", font=font)
        image.save(folder / f"{number:03}.png")


def ways(encoder: ColQwen3Encoder, index: PageIndex, nodes: Sequence[NodeWithScore]) -> list[tuple[str, list[float]]]:
    """Seconds of each way for each query, the ways in turn."""
    documents = [
        Document("", id=given.node_id, metadata={"image_path": given.node.metadata["file_path"]}) for given in nodes
    ]
    llama_index, langchain = ours_in_llama_index.ColQwen3Reranker, ours_in_langchain.ColQwen3Reranker
    indexed = llama_index(encoder=encoder, index=index)
    also_indexed = langchain(encoder=encoder, index=index)
    kept = llama_index(encoder=encoder)
    kept.postprocess_nodes(list(nodes), query_str="warm")  # every page once
    calls: dict[str, Callable[[str], object]] = {
        "LlamaIndex, pages in the index": lambda query: indexed.postprocess_nodes(list(nodes), query_str=query),
        "LangChain, pages in the index": lambda query: also_indexed.compress_documents(documents, query),
        "LlamaIndex, a later query over the cache": lambda query: kept.postprocess_nodes(list(nodes), query_str=query),
        "LlamaIndex, empty cache": lambda query: llama_index(encoder=encoder).postprocess_nodes(
            list(nodes), query_str=query
        ),
        "encoding every page for every query": lambda query: llama_index(
            encoder=encoder, cache_bytes=0
        ).postprocess_nodes(list(nodes), query_str=query),
    }
    for name in list(calls)[:3]:  # files are read and code is warm then
        calls[name]("warm")
    found: dict[str, list[float]] = {name: [] for name in calls}
    for query in QUERIES:
        for name, call in calls.items():
            start = time.perf_counter()
            call(query)
            found[name].append(time.perf_counter() - start)
    return list(found.items())


async def gap(ask: Callable[[str], Awaitable[object]]) -> tuple[float, int, float]:
    """Ask many questions at once: the longest time between two ticks, the ticks, and the seconds of all."""
    ticks = [time.perf_counter()]

    async def tick() -> None:
        while True:
            await asyncio.sleep(TICK)
            ticks.append(time.perf_counter())

    ticking = asyncio.create_task(tick())
    start = time.perf_counter()
    await asyncio.gather(*(ask(f"{QUERIES[n % len(QUERIES)]} {n}") for n in range(CONCURRENT)))
    spent = time.perf_counter() - start
    ticking.cancel()
    return float(np.diff([*ticks, time.perf_counter()]).max()), len(ticks), spent


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=100)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ColQwen3Encoder("tiny", device="cpu") as encoder:
        work = Path(folder)
        (work / "pages").mkdir()
        write_pages(work / "pages", options.pages)
        with PageIndex.open(work / "index", encoder) as index:
            index.add(load_pages(work / "pages"))
            tokens = np.mean([len(record.multi_vector) for record in index.get(index.ids(), vectors=True)])
            nodes = [
                NodeWithScore(
                    node=ImageNode(
                        id_=page.id,
                        image_path=str(work / "pages" / page.source),
                        metadata={"file_path": str(work / "pages" / page.source)},
                    ),
                    score=0.0,
                )
                for page in load_pages(work / "pages")
            ]
            measured = ways(encoder, index, nodes)
            base = statistics.median(measured[0][1])
            rows = [f"| {name} | {statistics.median(t) / base:.1f} | {min(t) / base:.1f} to {max(t) / base:.1f} |"
                    for name, t in measured]  # fmt: skip
            gaps = []
            first = ours_in_llama_index.ColQwen3Retriever(index, similarity_top_k=5)
            second = ours_in_langchain.ColQwen3Retriever(index=index, k=5)
            asked = {"LlamaIndex, aretrieve": first.aretrieve, "LangChain, ainvoke": second.ainvoke}
            for name, ask in asked.items():
                asyncio.run(gap(ask))  # threads and code paths are warm then
                longest, ticks, spent = asyncio.run(gap(ask))
                gaps.append(f"| {name} | {1e3 * longest:.0f} | {ticks} | {longest / spent:.3f} |")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    core = llama_index.core.__version__
    versions = f"torch {torch.__version__}, llama-index-core {core}, Python {platform.python_version()}"
    text = f"""# Reranking

Made by `python benchmarks/rerank.py --pages {options.pages} --write` on {machine}, {versions}, with `tiny`:
{options.pages} candidate pages of {tokens:.0f} tokens on average in {len(SIZES)} sizes, {len(QUERIES)} queries,
the ways in turn.

| candidates | time, the first row being 1 | of single queries |
|---|---|---|
{chr(10).join(rows)}

Encoding every page for every query is how llama-index-postprocessor-colpali-rerank 0.5.0 works; its encoder is
exchanged for ours here. The last two rows do the same work once: what lies between them is what else the machine was
doing. The larger the model, the larger these ratios: the first three rows never run it on a page.

## The event loop under {CONCURRENT} questions at once

A task on the same loop ticks every {1e3 * TICK:.0f} ms all the while.

| | longest gap, ms | ticks | longest gap, share of the whole |
|---|---|---|---|
{chr(10).join(gaps)}
"""
    print(text)
    if options.write:
        (Path(__file__).parent / "rerank.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
