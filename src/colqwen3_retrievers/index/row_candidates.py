"""Candidates from a store of single vectors, several rows a page; exact MaxSim over them afterwards.

Pooled token embeddings are rows any vector store can keep. Each token of a question looks for the rows most similar to
it, and the pages they are of are candidates. ``benchmarks/bridge.md`` says how many of the best pages are among them,
beside the one vector a page of :mod:`~colqwen3_retrievers.vectors.single_vector`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.index.search import Question, Searching, in_order, to_encode
from colqwen3_retrievers.pages.page import Hit
from colqwen3_retrievers.stores.protocol import check_ids
from colqwen3_retrievers.stores.where import Filter, Where, parse
from colqwen3_retrievers.vectors.compression import ward_clusters
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo, Float32, MultiVector

MAX_ROWS: Final = 1024
"""Most rows a page."""

_BATCH = 64  # pages read at a time
_VERSION = 1  # of how rows are made


@dataclass(frozen=True, slots=True, eq=False)
class CandidateRow:
    """One row of a page, for a store of single vectors.

    Attributes:
        id: of the row: the page's, ``#row=`` and a number from 0. Rows of a page made again overwrite themselves.
        page_id: of the page; what :meth:`PageIndex.rescore` takes. Keep it beside the row.
        vector: float32 (dim,), of length 1.
        scheme: what the rows of a store must have in common with each other and with what asks it.
    """

    id: str
    page_id: str
    vector: Float32
    scheme: str


def pooled_rows(vectors: MultiVector | Float32, rows: int) -> Float32:
    """Cut a page's token embeddings down to a few: unit means of Ward's clusters.

    Args:
        vectors: (n_tokens, dim), unit rows.
        rows: most rows, at least 1.

    Returns:
        float32 (at most ``rows``, dim), unit rows.

    Source: token pooling, Clavie et al. 2024 (arXiv 2409.14683), with a number of rows instead of a factor.

    >>> pooled_rows(np.float32([[1, 0], [1, 0], [0, 1]]), 2).round(2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    tokens = np.asarray(vectors, dtype=np.float32)
    clusters = ward_clusters(tokens, min(rows, len(tokens)))
    order = np.argsort(clusters, kind="stable")
    sums = np.add.reduceat(tokens[order], np.flatnonzero(np.diff(clusters[order], prepend=-1)), axis=0)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    unit: Float32 = (sums / np.maximum(lengths, 1e-12))[lengths[:, 0] > 1e-6]
    return unit if len(unit) else tokens[:1]  # tokens that cancel out stand for nothing


class RowCandidates(Searching):
    """The half of ``PageIndex`` that works with a store of single vectors."""

    @property
    def info(self) -> EncoderInfo:
        """What made the multi-vectors, as the index knows it; no model is needed."""
        return self._opened().info

    def candidate_rows(self, rows: int = 16, *, where: Where | Filter | None = None) -> Iterator[CandidateRow]:
        """Give pooled rows of the pages, for any vector store to keep; nothing is encoded.

        Args:
            rows: most rows a page, 1 to 1,024. More find more.
            where: only of these pages, as for :meth:`search`.

        Yields:
            Rows, page by page, in the order of the pages' ids. Those of :attr:`CandidateRow.scheme` alike may share a
            store, with cosine or inner product.

        Raises:
            ConfigError: ``rows`` out of its range, or a bad filter.

        >>> index = PageIndex.open("my-index")                                                 # doctest: +SKIP
        >>> for row in index.candidate_rows(16):                                               # doctest: +SKIP
        ...     collection.upsert(row.id, embedding=row.vector, metadata={"page_id": row.page_id})
        """
        if isinstance(rows, bool) or not isinstance(rows, int) or not 1 <= rows <= MAX_ROWS:
            raise ConfigError(f"rows: expected a whole number from 1 to {MAX_ROWS:,}, got {rows!r}")
        return self._rows(rows, self._opened().ids(parse(where)))

    def _rows(self, rows: int, ids: list[str]) -> Iterator[CandidateRow]:
        scheme = self.row_scheme(rows)
        for first in range(0, len(ids), _BATCH):
            for record in self._opened().get(ids[first : first + _BATCH], vectors=True):
                if record.multi_vector is None:
                    continue
                for number, vector in enumerate(pooled_rows(record.multi_vector, rows)):
                    yield CandidateRow(f"{record.page.id}#row={number}", record.page.id, vector, scheme)

    def row_scheme(self, rows: int = 16) -> str:
        """Name what rows of this index are made of, to call a collection by: all that shaped them, and their number.

        >>> PageIndex.open("my-index").row_scheme(16)                                          # doctest: +SKIP
        'rows16-v1-d3b07384d113edec'
        """
        shaped = {name: value for name, value in self.info.to_dict().items() if name not in ("model", "revision")}
        told = json.dumps(shaped, sort_keys=True, default=str).encode()
        return f"rows{rows}-v{_VERSION}-{hashlib.sha256(told).hexdigest()[:16]}"

    def row_queries(self, query: Question) -> Float32:
        """Give the vectors to ask a store of rows for: one for each token of a question.

        A page that several of them find, or find near, is the better candidate; which number of rows to ask for is the
        store's business, some 50 each were measured.

        Args:
            query: as for :meth:`search`.

        Returns:
            float32 (n_tokens, dim), unit rows.

        Raises:
            ConfigError: something that is no query.
            EncodeError: it cannot be encoded.

        >>> PageIndex.open("my-index").row_queries("what was the revenue?").shape              # doctest: +SKIP
        (16, 128)
        """
        texts, ready = to_encode([query])
        made = self._ready().submit_queries(texts).result() if texts else []
        return in_order(ready, made)[0].vectors

    def rescore(self, query: Question, ids: Iterable[str], k: int = 5) -> list[Hit]:
        """Order candidates that another store found by exact MaxSim.

        Args:
            query: as for :meth:`search`.
            ids: of pages, not of rows; twice counts once, and ids that are not there are no error.
            k: most hits, at least 1.

        Returns:
            Hits, best first, equal scores by id; none when there are no candidates.

        Raises:
            ConfigError, EncodeError: as for :meth:`search`.

        >>> found = {match.metadata["page_id"] for match in matches}                           # doctest: +SKIP
        >>> PageIndex.open("my-index").rescore("what was the revenue?", found, k=3)            # doctest: +SKIP
        [Hit(...), Hit(...), Hit(...)]
        """
        candidates = list(dict.fromkeys(check_ids(ids)))
        if not candidates:
            return []
        return self.search(query, k, where={"id": {"$in": candidates}}, exact=True)
