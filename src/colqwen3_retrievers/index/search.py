"""Searching an index: the checked arguments of a search, and how a store's matches become hits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.index.page_records import PageRecords
from colqwen3_retrievers.pages.images import ImageSource, is_image
from colqwen3_retrievers.pages.page import Hit, Page, Query
from colqwen3_retrievers.stores.protocol import GroupBy, check_search
from colqwen3_retrievers.stores.where import ALIASES, FIELDS, Filter, Where, metadata_names, parse
from colqwen3_retrievers.vectors.multi_vector import MultiVector

_log = logging.getLogger(__name__)

Question = str | Query | MultiVector | ImageSource
"""What can be searched for: a text, a query, an image (but no path as a string), or a multi-vector encoded before."""


@dataclass(frozen=True, slots=True)
class Search:
    """The arguments of :meth:`PageIndex.search`, checked before anything is encoded.

    Raises:
        ConfigError: an argument that cannot be used, named.

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
        check_search(self.k, self.group_by)
        object.__setattr__(self, "window", whole_number(self.window, "window"))
        object.__setattr__(self, "where", parse(self.where))

    def run(self, records: PageRecords, queries: list[MultiVector]) -> list[list[Hit]]:
        """Search an index's store, and return pages with their images and neighbours."""
        report_unknown_names(records, self.where)
        matches = records.store.search(queries, self.k, where=self.where, exact=self.exact, group_by=self.group_by)
        return [
            [
                Hit(records.images.with_image(match.record), match.score, self._neighbours(match.record.page, records))
                for match in of_query
            ]
            for of_query in matches
        ]

    def _neighbours(self, page: Page, records: PageRecords) -> tuple[Page, ...]:
        if not self.window or not page.source:  # a page without a source has no neighbours
            return ()
        between = {"$gte": page.number - self.window, "$lte": page.number + self.window}
        ids = records.store.ids({"source": page.source, "number": between})
        pages = map(records.images.with_image, records.store.get(page_id for page_id in ids if page_id != page.id))
        return tuple(sorted(pages, key=lambda other: (other.number, other.id)))


def report_unknown_names(records: PageRecords, where: Where | Filter | None) -> None:
    """Log a warning for each metadata name in a filter that no page has: most likely it is misspelt.

    A name is looked up once in an open index, so that repeated searches cost nothing.
    """
    for name in metadata_names(where):
        if name not in records.filter_names:
            if not records.store.has_name(name):
                if records.store.is_empty():
                    return
                own = ", ".join([*FIELDS, *ALIASES])
                _log.warning("where: no page has %r in its metadata; a page's own fields are %s", name, own)
            records.filter_names.add(name)


def to_encode(questions: Sequence[Question]) -> tuple[list[str | Query], list[MultiVector | None]]:
    """Separate questions that have to be encoded from multi-vectors.

    Returns:
        Queries for the encoder, and for each question its multi-vector or None; :func:`in_order` joins them again.

    Raises:
        ConfigError: an object that is no question.

    >>> to_encode(["revenue", Query(image=b"...")])
    (['revenue', Query(text=None, image=b'...')], [None, None])
    """
    queries: list[str | Query] = []
    vectors: list[MultiVector | None] = []
    for question in questions:
        vectors.append(question if isinstance(question, MultiVector) else None)
        if isinstance(question, str | Query):
            queries.append(question)
        elif is_image(question):
            queries.append(Query(image=question))
        elif not isinstance(question, MultiVector):
            expected = "a text, a Query, an image (no string) or a MultiVector"
            raise ConfigError(f"query: expected {expected}, got {type(question).__name__}")
    return queries, vectors


def in_order(vectors: list[MultiVector | None], encoded: list[MultiVector]) -> list[MultiVector]:
    """Fill the gaps that :func:`to_encode` left with encoded queries."""
    following = iter(encoded)
    return [vector if vector is not None else next(following) for vector in vectors]
