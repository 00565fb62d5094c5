"""``colqwen3 search``: a ranking, and pictures of the answering regions.

The ranking is printed whatever becomes of the pictures. A page that cannot be drawn is reported on standard error and
is no error; a folder that cannot be written, or a damaged index, is exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from colqwen3_retrievers.cli.console import INDEX_HELP, URL_HELP, json_filter, print_json, print_message
from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError, PageError, StoreError
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.pages.page import Hit, Page, Query
from colqwen3_retrievers.retrieval.evidence import file_stem, indexed_picture, page_map, picture_folder, write_picture
from colqwen3_retrievers.retrieval.similarity_maps import POOLED_NOTE, SimilarityMap
from colqwen3_retrievers.stores.protocol import Record
from colqwen3_retrievers.stores.where import ALIASES, FIELDS
from colqwen3_retrievers.vectors.multi_vector import MultiVector

_BOXES = 3


def add_parser(commands: Any) -> None:
    """Add the command to those of ``colqwen3``."""
    parser = commands.add_parser("search", help="search an index")
    parser.add_argument("query", nargs="?", default="", metavar="QUERY", help="a text")
    parser.add_argument("--image", metavar="FILE", help="an image to search by, alone or with the text")
    parser.add_argument("--index", required=True, metavar="INDEX", help=INDEX_HELP)
    parser.add_argument("--images-dir", metavar="DIR", help="the folder of page images, with Qdrant")
    parser.add_argument("-k", type=int, default=5, metavar="N", help="number of pages (5)")
    parser.add_argument(
        "--where",
        metavar="JSON",
        help='a filter, as {"source": "a.pdf", "page": {"$lte": 9}}. A page\'s own fields are '
        f"{', '.join([*FIELDS, *ALIASES])}; any other name, or one behind metadata., is a key of its metadata",
    )
    parser.add_argument(
        "--heatmap",
        metavar="DIR",
        help="write the pages with the answering regions drawn; --json lists them. A page that cannot be drawn is "
        "reported and is no error; a folder that cannot be written is one, after the ranking",
    )
    parser.add_argument("--heatmap-tokens", action="store_true", help="with --heatmap, also a picture per query token")
    parser.add_argument("--model", metavar="MODEL", help="the present location of the index's model")
    parser.add_argument("--device", metavar="NAME", help="cuda, mps or cpu")
    parser.add_argument("--url", action="append", default=[], metavar="URL", help=URL_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=run, usage_error=parser.error)


def run(options: argparse.Namespace) -> int:
    """Search an index, print the ranking, and draw the pages.

    Returns:
        The exit code.

    Raises:
        ColQwen3Error: the search failed, and nothing was printed.
        SystemExit: a wrong command line.
    """
    if options.heatmap == "":
        options.usage_error("--heatmap: expected a folder")
    if options.heatmap_tokens and options.heatmap is None:
        options.usage_error("--heatmap-tokens: needs --heatmap, which says where to")
    folder = None if options.heatmap is None else picture_folder(options.heatmap, "--heatmap")
    query = Query(options.query or None, options.image)
    where = json_filter(options.where) if options.where else None
    evidence: dict[str, dict[str, Any]] = {}
    complete = True
    with contextlib.ExitStack() as stack:
        place = {"images_dir": options.images_dir, "read_only": True}
        index = stack.enter_context(PageIndex.open(options.index, **place))
        if options.device or options.model or options.url:
            encoder = ColQwen3Encoder.from_info(
                index.info, model=options.model, device=options.device, url=options.url or None
            )
            index = stack.enter_context(PageIndex.open(options.index, encoder, **place))
        [vectors] = index.encoder.submit_queries([query]).result()
        hits = index.search(vectors, k=options.k, where=where)
        if not options.json:
            for rank, hit in enumerate(hits, start=1):
                print(f"{rank:3}  {hit.score:8.3f}  {describe(hit.page)}", flush=True)
            if not hits:
                print_message("no pages")
        if folder is not None:
            evidence, complete = draw_hits(index, vectors, hits, folder, tokens=options.heatmap_tokens)
    if options.json:
        rows = [_row(hit) | evidence.get(hit.page.id, {}) for hit in hits]
        print_json(rows)
    return 0 if complete else 1


def describe(page: Page) -> str:
    """Return a page's source, number and label on one line.

    >>> describe(Page(source="a.pdf", number=7, label="iv"))
    'a.pdf, page 7 (iv)'
    """
    label = f" ({page.label})" if page.label and page.label != str(page.number) else ""
    return " ".join(f"{page.source or page.id}, page {page.number}{label}".split())  # a file's name may have newlines


def draw_hits(
    index: PageIndex, query: MultiVector, hits: Sequence[Hit], folder: Path, *, tokens: bool
) -> tuple[dict[str, dict[str, Any]], bool]:
    """Find the answering regions of each hit and write its pictures.

    Args:
        index: that was searched.
        query: from ``encode_queries``.
        hits: of ``index.search``.
        folder: for the pictures; made if it is missing.
        tokens: whether each query token gets a picture too.

    Returns:
        Page id -> ``boxes``, ``pooled``, and ``heatmaps``, the files written; and whether no picture failed. After the
        first that cannot be written, only regions are found.
    """
    evidence: dict[str, dict[str, Any]] = {}
    complete = True
    for rank, hit in enumerate(hits, start=1):
        try:
            records = index.get([hit.page.id], vectors=True)  # one at a time: each is a page's vectors
            regions = page_map(query, records[0].multi_vector) if records else None
            if regions is None:
                _report_undrawn(
                    hit.page,
                    "it has no regions, as no picture of it was encoded" if records else "it was deleted meanwhile",
                )
                continue
            boxes = [dataclasses.asdict(box) for box in regions.boxes(top=_BOXES)]
            evidence[hit.page.id] = {"boxes": boxes, "pooled": regions.pooled}
            if complete and (written := _draw_page(records[0], regions, rank, folder, tokens=tokens)):
                evidence[hit.page.id]["heatmaps"] = written
        except StoreError as exc:
            if complete:  # once: all pictures go to one folder
                print_message(exc)
            complete = False
    return evidence, complete


def _draw_page(record: Record, regions: SimilarityMap, rank: int, folder: Path, *, tokens: bool) -> list[str]:
    page = record.page
    try:
        picture = indexed_picture(record)
    except (PageError, ConfigError) as exc:
        return _report_undrawn(page, str(exc))
    if picture is None:
        return _report_undrawn(page, "the index keeps no picture of it")
    name = f"{rank:02}-{file_stem(Path(page.source).stem or page.id)}-{page.number}"
    written = [_write(regions.overlay(picture, boxes=_BOXES), folder / f"{name}.png")]
    for token in range(len(regions.per_token)) if tokens else ():
        word = "" if regions.tokens is None else f"-{file_stem(regions.tokens[token], 40)}"
        overlay = regions.overlay(picture, token=token, boxes=1)
        written.append(_write(overlay, folder / f"{name}-token-{token + 1:02}{word}.png"))
    if regions.pooled:
        print_message(f"{describe(page)}: {POOLED_NOTE}")
    return written


def _write(overlay: Image.Image, path: Path) -> str:
    write_picture(overlay, path)
    print(path, file=sys.stderr)
    return str(path)


def _report_undrawn(page: Page, reason: str) -> list[str]:
    print_message(f"{describe(page)}: not drawn: {reason}")
    return []


def _row(hit: Hit) -> dict[str, Any]:
    page = hit.page
    return {
        "id": page.id,
        "score": hit.score,
        "source": page.source,
        "page": page.number,
        "label": page.label,
        "image": str(page.image_path) if page.image_path else None,
        "metadata": page.metadata,
    }
