"""Rows for stores of single vectors, several a page, to find candidates that exact MaxSim then orders.

Pooled token embeddings are rows that any vector store can hold. Each token of a query looks for the most similar rows,
and their pages are the candidates. ``benchmarks/bridge.md`` measures how many of the best pages are among them,
compared with the one vector a page of :mod:`~colqwen3_retrievers.vectors.single_vector`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from colqwen3_retrievers.index.page_records import batches
from colqwen3_retrievers.stores.protocol import MultiVectorStore
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
        id: the page's id, ``#row=`` and a number from 0, so that rows of a page made again overwrite themselves.
        page_id: the page's id, which :meth:`PageIndex.rescore` takes; store it with the row.
        vector: float32 (dim,), of length 1.
        scheme: what the rows of a store must have in common with each other and with queries.
    """

    id: str
    page_id: str
    vector: Float32
    scheme: str


def pooled_rows(vectors: MultiVector | Float32, rows: int) -> Float32:
    """Pool a page's token embeddings into a few: unit means of Ward's clusters.

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
    return unit if len(unit) else tokens[:1]  # tokens that cancel out have no mean direction


def candidate_rows(store: MultiVectorStore, ids: list[str], rows: int) -> Iterator[CandidateRow]:
    """Yield the pooled rows of these pages, page by page."""
    scheme = row_scheme(store.info, rows)
    for batch in batches(ids, _BATCH):
        for record in store.get(batch, vectors=True):
            if record.multi_vector is None:
                continue
            for number, vector in enumerate(pooled_rows(record.multi_vector, rows)):
                yield CandidateRow(f"{record.page.id}#row={number}", record.page.id, vector, scheme)


def row_scheme(info: EncoderInfo, rows: int) -> str:
    """Return a name for the rows of an encoder: everything that shapes them, and their number."""
    shaping = {name: value for name, value in info.to_dict().items() if name not in ("model", "revision")}
    data = json.dumps(shaping, sort_keys=True, default=str).encode()
    return f"rows{rows}-v{_VERSION}-{hashlib.sha256(data).hexdigest()[:16]}"
