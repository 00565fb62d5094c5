"""Searching an index: what can be asked, and how what a store finds becomes hits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from colqwen3_retrievers.datatypes import MultiVector
from colqwen3_retrievers.documents import Hit, Page, Query
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.page_images import PageImages
from colqwen3_retrievers.stores import MultiVectorStore
from colqwen3_retrievers.stores.protocol import GroupBy, check_search
from colqwen3_retrievers.stores.where import Filter, Where, parse

Question = str | Query | MultiVector | Image.Image | Path | bytes
"""What can be searched for: a text, a query, an image (PIL, path or bytes), or a multi-vector made before."""


@dataclass(frozen=True, slots=True)
class Search:
    """The arguments of a search, checked before anything is encoded.

    Args:
        k: most hits, at least 1.
        where: a filter, or None.
        exact: whether every page must be scored.
        group_by: ``"source"`` or None.
        window: neighbours on each side, from 0.

    Raises:
        ConfigError: one that cannot be used; it is named.

    >>> Search(5, {"year": 2020}, False, None, window=-1)
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: window: expected a whole number from 0, got -1
    """

    k: int
    where: Where | Filter | None
    exact: bool
    group_by: GroupBy | None
    window: int

    def __post_init__(self) -> None:
        """Check, and parse the filter."""
        check_search(self.k, self.group_by)
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 0:
            raise ConfigError(f"window: expected a whole number from 0, got {self.window!r}")
        object.__setattr__(self, "where", parse(self.where))

    def run(self, store: MultiVectorStore, images: PageImages, queries: list[MultiVector]) -> list[list[Hit]]:
        """Search a store and give each page its image and neighbours."""
        found = store.search(queries, self.k, where=self.where, exact=self.exact, group_by=self.group_by)
        return [
            [
                Hit(images.with_image(match.record), match.score, self._neighbours(match.record.page, store, images))
                for match in matches
            ]
            for matches in found
        ]

    def _neighbours(self, page: Page, store: MultiVectorStore, images: PageImages) -> tuple[Page, ...]:
        if not self.window or not page.source:  # a page without a source stands beside nothing
            return ()
        between = {"$gte": page.number - self.window, "$lte": page.number + self.window}
        beside = store.ids({"source": page.source, "number": between})
        pages = map(images.with_image, store.get(page_id for page_id in beside if page_id != page.id))
        return tuple(sorted(pages, key=lambda other: (other.number, other.id)))


def to_encode(questions: Sequence[Question]) -> tuple[list[str | Query], list[MultiVector | None]]:
    """Tell what has to be encoded from what is a multi-vector already.

    Returns:
        Queries for the encoder, and for each question its multi-vector or None; :func:`in_order` joins them again.

    Raises:
        ConfigError: something that is no question.

    >>> to_encode(["revenue", Query(image=b"...")])
    (['revenue', Query(text=None, image=b'...')], [None, None])
    """
    queries: list[str | Query] = []
    ready: list[MultiVector | None] = []
    for question in questions:
        ready.append(question if isinstance(question, MultiVector) else None)
        if isinstance(question, str | Query):
            queries.append(question)
        elif isinstance(question, Image.Image | Path | bytes):
            queries.append(Query(image=question))
        elif not isinstance(question, MultiVector):
            expected = "a text, a Query, an image (PIL, Path or bytes) or a MultiVector"
            raise ConfigError(f"query: expected {expected}, got {type(question).__name__}")
    return queries, ready


def in_order(ready: list[MultiVector | None], encoded: list[MultiVector]) -> list[MultiVector]:
    """Put encoded queries where :func:`to_encode` left a gap."""
    following = iter(encoded)
    return [given if given is not None else next(following) for given in ready]
