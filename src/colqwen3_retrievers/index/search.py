"""Searching an index: what can be asked, and how what a store finds becomes hits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.index.opened_index import OpenedIndex
from colqwen3_retrievers.index.page_images import PageImages
from colqwen3_retrievers.pages.page import Hit, Page, Query
from colqwen3_retrievers.stores.protocol import GroupBy, MultiVectorStore, check_search
from colqwen3_retrievers.stores.where import Filter, Where, parse
from colqwen3_retrievers.vectors.multi_vector import MultiVector

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


class Searching(OpenedIndex):
    """The searching half of :class:`~colqwen3_retrievers.index.page_index.PageIndex`."""

    def search(
        self,
        query: Question,
        k: int = 5,
        *,
        where: Where | Filter | None = None,
        exact: bool = False,
        group_by: GroupBy | None = None,
        window: int = 0,
    ) -> list[Hit]:
        """Find the pages that answer a query best.

        Args:
            query: a text (a string is always one), a :class:`Query`, an image (PIL, `pathlib.Path` or bytes), or a
                multi-vector made before.
            k: most hits, at least 1.
            where: only among these pages; the language is that of :mod:`~colqwen3_retrievers.stores.where`.
            exact: whether to score every page; False lets a store score candidates only.
            group_by: ``"source"`` gives the best page of each source.
            window: pages before and after each hit, by number in its source, as ``hit.neighbours``; the filter does
                not bear on them.

        Returns:
            Hits, best first, equal scores by id; none when the index is empty.

        Raises:
            ConfigError: ``k`` below 1, a bad filter, or something that is no query.
            EncodeError: the query cannot be encoded.
            StoreMismatchError: the encoder rebuilt from what the index knows is not the one that made it.

        >>> PageIndex.open("my-index").search("revenue in 2020", k=3, where={"year": 2020})   # doctest: +SKIP
        [Hit(page=Page(id='a.pdf#page=7', ...), score=17.3, neighbours=()), ...]
        """
        return self.search_many([query], k, where=where, exact=exact, group_by=group_by, window=window)[0]

    def search_many(
        self,
        queries: Sequence[Question],
        k: int = 5,
        *,
        where: Where | Filter | None = None,
        exact: bool = False,
        group_by: GroupBy | None = None,
        window: int = 0,
    ) -> list[list[Hit]]:
        """Search for several queries at once: encoded together, and each page read once. See :meth:`search`.

        Returns:
            The hits of each query, in order.
        """
        if isinstance(queries, str | bytes | Path | Query | MultiVector) or not isinstance(queries, Sequence):
            raise ConfigError(f"queries: expected a list, got {type(queries).__name__}; search takes a single one")
        asked = Search(k, where, exact, group_by, window)
        texts, ready = to_encode(queries)
        if not queries or not len(self._opened()):
            return [[] for _ in queries]
        made = self._ready().submit_queries(texts).result() if texts else []
        return asked.run(self._opened(), self._images, in_order(ready, made))

    async def asearch(
        self,
        query: Question,
        k: int = 5,
        *,
        where: Where | Filter | None = None,
        exact: bool = False,
        group_by: GroupBy | None = None,
        window: int = 0,
    ) -> list[Hit]:
        """Search without blocking the event loop; cancelling it cancels the encoding. See :meth:`search`."""
        asked = Search(k, where, exact, group_by, window)
        texts, ready = to_encode([query])
        if not await asyncio.to_thread(lambda: len(self._opened())):
            return []
        made: list[MultiVector] = []
        if texts:  # submitting may load a model, so it too belongs in a thread
            future = await asyncio.to_thread(lambda: self._ready().submit_queries(texts))
            made = await asyncio.wrap_future(future)
        return (await asyncio.to_thread(asked.run, self._opened(), self._images, in_order(ready, made)))[0]
