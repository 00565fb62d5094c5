"""``colqwen3 search``: a ranking, and pictures of where on its pages the answer stands.

What was found is printed whatever becomes of the pictures. A page that has none, or none that can be shown, is told of
on standard error and is no error; a folder that cannot be written is one, and so is a damaged index: exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colqwen3_retrievers.cli.console import json_filter, tell
from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError, PageError, StoreError
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.pages.page import Hit, Page, Query
from colqwen3_retrievers.retrieval.evidence import file_stem, indexed_picture, page_map, picture_folder, write_picture
from colqwen3_retrievers.retrieval.similarity_maps import POOLED_NOTE, SimilarityMap
from colqwen3_retrievers.stores.protocol import Record
from colqwen3_retrievers.stores.where import ALIASES, FIELDS, Condition, metadata_names
from colqwen3_retrievers.vectors.multi_vector import MultiVector

_BOXES = 3


def add_search_arguments(parser: argparse.ArgumentParser, *, place: str, url: str) -> None:
    """Declare the arguments of ``colqwen3 search``.

    Args:
        parser: of the command.
        place: what an index's location may be.
        url: what a server's address may be.

    >>> parser = argparse.ArgumentParser()
    >>> add_search_arguments(parser, place="a folder", url="of a server")
    >>> parser.parse_args(["revenue", "--index", "my-index"]).k
    5
    """
    parser.add_argument("query", nargs="?", default="", metavar="QUERY", help="a text")
    parser.add_argument("--image", metavar="FILE", help="an image to search by, alone or beside the text")
    parser.add_argument("--index", required=True, metavar="INDEX", help=place)
    parser.add_argument("--images-dir", metavar="DIR", help="where page images lie, with Qdrant")
    parser.add_argument("-k", type=int, default=5, metavar="N", help="how many pages (5)")
    parser.add_argument(
        "--where",
        metavar="JSON",
        help='a filter, as {"source": "a.pdf", "page": {"$lte": 9}}. A page\'s own fields are '
        f"{', '.join([*FIELDS, *ALIASES])}; any other name, or one behind metadata., is a key of its metadata",
    )
    parser.add_argument(
        "--heatmap",
        metavar="DIR",
        help="write the pages with the answering regions drawn; --json lists them. A page that cannot be drawn is told "
        "of and is no error; a folder that cannot be written is one, after the ranking",
    )
    parser.add_argument("--heatmap-tokens", action="store_true", help="with --heatmap, a picture a query token too")
    parser.add_argument("--model", metavar="MODEL", help="where the index's model lies now")
    parser.add_argument("--device", metavar="NAME", help="cuda, mps or cpu")
    parser.add_argument("--url", action="append", default=[], metavar="URL", help=url)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(wrong=parser.error)


def run_search(options: argparse.Namespace) -> int:
    """Ask an index, print what it finds, and draw it.

    Args:
        options: of :func:`add_search_arguments`.

    Returns:
        The exit code.

    Raises:
        ColQwen3Error: the search itself failed, and nothing was printed.
        SystemExit: a wrong command line.
    """
    if options.heatmap == "":
        options.wrong("--heatmap: expected a folder")
    if options.heatmap_tokens and options.heatmap is None:
        options.wrong("--heatmap-tokens: needs --heatmap, which says where to")
    folder = None if options.heatmap is None else picture_folder(options.heatmap, "--heatmap")
    query = Query(options.query or None, options.image)
    where = json_filter(options.where) if options.where else None
    with contextlib.ExitStack() as stack:
        place = {"images_dir": options.images_dir, "read_only": True}
        index = stack.enter_context(PageIndex.open(options.index, **place))
        if options.device or options.model or options.url:
            encoder = ColQwen3Encoder.from_info(
                index.info, model=options.model, device=options.device, url=options.url or None
            )
            index = stack.enter_context(PageIndex.open(options.index, encoder, **place))
        [asked] = index.encoder.submit_queries([query]).result()
        hits = index.search(asked, k=options.k, where=where)
        if not options.json:
            for rank, hit in enumerate(hits, start=1):
                print(f"{rank:3}  {hit.score:8.3f}  {describe(hit.page)}", flush=True)
            if not hits:
                tell("no pages")
        if not hits:
            _tell_unknown_names(index, where)
        drawing = None
        if folder is not None:
            drawing = HitDrawing(index, asked, folder, tokens=options.heatmap_tokens)
            drawing.draw(hits)
    if options.json:
        told = {} if drawing is None else drawing.told
        print(json.dumps([_hit(hit) | told.get(hit.page.id, {}) for hit in hits], ensure_ascii=False, indent=1))
    return 1 if drawing is not None and drawing.failed else 0


def describe(page: Page) -> str:
    """Name a page as a reader would look for it.

    >>> describe(Page(source="a.pdf", number=7, label="iv"))
    'a.pdf, page 7 (iv)'
    """
    label = f" ({page.label})" if page.label and page.label != str(page.number) else ""
    return " ".join(f"{page.source or page.id}, page {page.number}{label}".split())  # one line whatever the file's name


def _tell_unknown_names(index: PageIndex, where: dict[str, Any] | None) -> None:
    """Tell of names in a filter that no page has: a slip, more likely than not."""
    for name in [] if index.store.is_empty() else metadata_names(where):
        if not index.ids(Condition(name, False, "exists")):
            own = ", ".join([*FIELDS, *ALIASES])
            tell(f"--where: no page has {name!r} in its metadata; own fields are {own}")


class HitDrawing:
    """Pictures of one search's hits.

    Args:
        index: where they were found.
        query: what was asked.
        folder: where pictures go, made when there is one.
        tokens: whether each query token gets a picture too.

    Attributes:
        told: of each page by id: ``boxes``, ``pooled``, and ``heatmaps``, the files written.
        failed: whether a picture could not be written.
    """

    def __init__(self, index: PageIndex, query: MultiVector, folder: Path, *, tokens: bool) -> None:
        self.told: dict[str, dict[str, Any]] = {}
        self.failed = False
        self._index, self._query, self._folder, self._tokens = index, query, folder, tokens

    def draw(self, hits: Sequence[Hit]) -> None:
        """Find each hit's regions and write its pictures; after a fault of the folder only the regions."""
        for rank, hit in enumerate(hits, start=1):
            try:
                self._draw(rank, hit)
            except StoreError as exc:
                if not self.failed:  # the first says it all: one disk, one folder
                    tell(exc)
                self.failed = True

    def _draw(self, rank: int, hit: Hit) -> None:
        records = self._index.get([hit.page.id], vectors=True)  # one at a time: each is a page's vectors
        if not records:
            return _not_drawn(hit.page, "it was deleted meanwhile")
        record = records[0]
        found = page_map(self._query, record.multi_vector)
        if found is None:
            return _not_drawn(hit.page, "it has no regions, for no picture of it was encoded")
        kept = self.told[hit.page.id] = {
            "boxes": [dataclasses.asdict(box) for box in found.boxes(top=_BOXES)],
            "pooled": found.pooled,
        }
        if not self.failed:
            kept |= self._written(rank, record, found)
        return None

    def _written(self, rank: int, record: Record, found: SimilarityMap) -> dict[str, Any]:
        page = record.page
        try:
            picture = indexed_picture(record)
        except (PageError, ConfigError) as exc:
            _not_drawn(page, str(exc))
            return {}
        if picture is None:
            _not_drawn(page, "the index keeps no picture of it")
            return {}
        name = f"{rank:02}-{file_stem(Path(page.source).stem or page.id)}-{page.number}"
        written = [self._write(f"{name}.png", found.overlay(picture, boxes=_BOXES))]
        for token in range(len(found.per_token)) if self._tokens else ():
            word = "" if found.tokens is None else f"-{file_stem(found.tokens[token], 40)}"
            drawn = found.overlay(picture, token=token, boxes=1)
            written.append(self._write(f"{name}-token-{token + 1:02}{word}.png", drawn))
        if found.pooled:
            tell(f"{describe(page)}: {POOLED_NOTE}")
        return {"heatmaps": written}

    def _write(self, name: str, drawn: Any) -> str:
        path = str(write_picture(drawn, self._folder / name))
        print(path, file=sys.stderr)
        return path


def _not_drawn(page: Page, reason: str) -> None:
    tell(f"{describe(page)}: not drawn: {reason}")


def _hit(hit: Hit) -> dict[str, Any]:
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
