"""Records as Qdrant points, and back."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from colqwen3_retrievers.errors import InputTooLongError, StoreError, require
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.stores.protocol import Record
from colqwen3_retrievers.stores.qdrant.collection import FULL, MAX_FLOATS, POOLED
from colqwen3_retrievers.stores.qdrant.filters import filter_payload, point_id
from colqwen3_retrievers.vectors.compression import pool_tokens
from colqwen3_retrievers.vectors.multi_vector import MultiVector

BYTES_A_FLOAT: Final = 12  # in JSON
FLOATS_A_REQUEST: Final = 1_048_576  # some 12 MB of JSON; a server takes 32 MB unless told otherwise
POINTS_A_REQUEST: Final = 256

NAMED: Final = ["id"]
BRIEF: Final = ["id", "group", "record", "image"]
WHOLE: Final = [*BRIEF, "shape", "crc32"]
"""Parts of a payload to request: for an id, for a page, and for its multi-vector too."""

_PAGE_FIELDS: Final = ("id", "source", "number", "label", "text", "metadata", "sha256")

Float16 = NDArray[np.float16]


def make_point(record: Record, *, pool: int) -> tuple[Any, int]:
    """Return the point of a record, and its size as a number of floats.

    Its payload: ``id``, ``group`` (what hits are grouped by), ``image``, ``record`` (the page as JSON text, which keeps
    any text and any number), ``shape`` (:meth:`MultiVector.layout` as JSON), ``crc32`` of the float16 token embeddings,
    and what filters use (see :func:`~colqwen3_retrievers.stores.qdrant.filters.filter_payload`).

    Args:
        record: with a multi-vector.
        pool: 0 for no vector for candidates, 1 for the token embeddings themselves.
    """
    models = require("qdrant", "qdrant_client.models", "qdrant-client")
    page, multi_vector = record.page, record.multi_vector
    assert multi_vector is not None  # noqa: S101 - check_records refused it otherwise
    full: Float16 = np.asarray(multi_vector).astype("<f2")
    # The nearest number of eight decimals is always rounded back to the same float16, whose steps below 1 are 6e-8 or
    # more, and is half as long in JSON.
    vectors = {FULL: np.round(full.astype(np.float64), 8)}
    if pool:
        rows = pool_tokens(multi_vector, pool)[0] if pool > 1 else full
        vectors[POOLED] = np.round(rows.astype(np.float64), 6)
    payload = {
        "id": page.id,
        "group": f"source {page.source}" if page.source else f"id {page.id}",
        "record": json.dumps({name: getattr(page, name) for name in _PAGE_FIELDS}),
        "shape": json.dumps(multi_vector.layout()),
        "crc32": zlib.crc32(full.tobytes()),
        **filter_payload(page),
    }
    if record.image is not None:
        payload["image"] = record.image
    point = models.PointStruct(
        id=point_id(page.id), vector={name: rows.tolist() for name, rows in vectors.items()}, payload=payload
    )
    return point, sum(rows.size for rows in vectors.values()) + len(json.dumps(payload)) // BYTES_A_FLOAT


def check_size(multi_vector: Any, name: str, index: int | None = None) -> None:
    """Check that a multi-vector is not too large for Qdrant.

    Raises:
        InputTooLongError: it gives the figures and what would fit, with ``index`` and ``name``.
    """
    tokens, dim = np.asarray(multi_vector).shape
    if tokens * dim >= MAX_FLOATS:
        raise InputTooLongError(
            f"{tokens:,} tokens of dim {dim} are {tokens * dim:,} floats, and Qdrant takes fewer than "
            f"{MAX_FLOATS:,}: at most {(MAX_FLOATS - 1) // dim:,} tokens of that dim. Encode with a smaller dim, with "
            "pool_factor, or with a smaller max_visual_tokens",
            limit=(MAX_FLOATS - 1) // dim,
            actual=tokens,
            index=index,
            name=name,
        )


def requests(points: Iterable[tuple[Any, int]], most: int = POINTS_A_REQUEST) -> Iterator[list[Any]]:
    """Cut points or searches, with sizes in floats, into lists for one request.

    >>> [len(batch) for batch in requests(iter([("a", 900_000), ("b", 100_000), ("c", 100_000)]))]
    [2, 1]
    """
    batch: list[Any] = []
    total = 0
    for point, floats in points:
        if batch and (total + floats > FLOATS_A_REQUEST or len(batch) == most):
            yield batch
            batch, total = [], 0
        batch.append(point)
        total += floats
    if batch:
        yield batch


def check_origin(points: list[Any], location: str) -> list[Any]:
    """Return points as they are, checked to be written by this library.

    Raises:
        StoreError: one was not; its id is named.
    """
    for point in points:
        if not isinstance((point.payload or {}).get("id"), str):
            raise StoreError(
                f"{location}: point {point.id} was not written by this library; delete it, and give other programs a "
                "collection of their own"
            )
    return points


def read_record(payload: Mapping[str, Any]) -> Record:
    """Return the record of a payload, without its multi-vector."""
    return Record(Page(**json.loads(payload["record"])), None, payload.get("image"))


def read_multi_vector(payload: Mapping[str, Any], vectors: Mapping[str, Any], location: str) -> MultiVector:
    """Return the multi-vector of a point.

    Raises:
        StoreError: its token embeddings are not what was written.
    """
    rows: Float16 = np.asarray(vectors[FULL], dtype=np.float32).astype("<f2")
    if zlib.crc32(rows.tobytes()) != payload["crc32"]:
        raise StoreError(
            f"{location}: the token embeddings of {payload['id']!r} are not what was written (their checksum differs): "
            "another program changed them, or the server's disk is at fault; add the page again"
        )
    return MultiVector.from_layout(rows, json.loads(payload["shape"]))
