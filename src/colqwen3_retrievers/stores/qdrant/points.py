"""Records as points of Qdrant's, and back."""

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
"""Parts of a payload that are asked for: a name, a page, or all that is needed to make its multi-vector again."""

Float16 = NDArray[np.float16]


def make_point(record: Record, *, pool: int) -> tuple[Any, int]:
    """Make the point of a record, and say what it weighs: its floats, and what else it says counted as floats.

    Its payload: ``id``, ``group`` (what hits are grouped by), ``image``, ``record`` (the page as JSON text, in which
    any text and any number survives), ``shape`` (slices, grid, token strings, clusters), ``crc32`` of the float16 token
    embeddings, and what filters look at (see :func:`~.qdrant_filters.filter_payload`).

    Args:
        record: with a multi-vector.
        pool: 0 for no vector of candidates, 1 for the token embeddings themselves.

    Raises:
        InputTooLongError: more floats than a multi-vector of Qdrant's may have.
    """
    models = require("qdrant", "qdrant_client.models", "qdrant-client")
    page, multi_vector = record.page, record.multi_vector
    assert multi_vector is not None  # noqa: S101 - check_records refused it otherwise
    check_size(multi_vector, f"page {page.id!r}")
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
        "record": _page_to_json(page),
        "shape": _shape_to_json(multi_vector),
        "crc32": zlib.crc32(full.tobytes()),
        **filter_payload(page),
    }
    if record.image is not None:
        payload["image"] = record.image
    point = models.PointStruct(
        id=point_id(page.id), vector={name: rows.tolist() for name, rows in vectors.items()}, payload=payload
    )
    return point, sum(rows.size for rows in vectors.values()) + len(json.dumps(payload)) // BYTES_A_FLOAT


def check_size(multi_vector: Any, label: str, index: int | None = None) -> None:
    """Refuse a multi-vector that Qdrant does not take.

    Raises:
        InputTooLongError: it gives the figures and what would fit; ``.index`` is ``index``.
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
            name=label,
        )


def requests(points: Iterable[tuple[Any, int]], most: int = POINTS_A_REQUEST) -> Iterator[list[Any]]:
    """Cut points, or questions, that come with what they weigh in floats into lists that fit into one request each.

    >>> [len(batch) for batch in requests(iter([("a", 900_000), ("b", 100_000), ("c", 100_000)]))]
    [2, 1]
    """
    batch: list[Any] = []
    carried = 0
    for point, floats in points:
        if batch and (carried + floats > FLOATS_A_REQUEST or len(batch) == most):
            yield batch
            batch, carried = [], 0
        batch.append(point)
        carried += floats
    if batch:
        yield batch


def check_ours(points: list[Any], location: str) -> list[Any]:
    """Give points as they are, all of them written by this library.

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
    """Make a record without multi-vector of a payload."""
    return Record(Page(**json.loads(payload["record"])), None, payload.get("image"))


def read_multi_vector(payload: Mapping[str, Any], vectors: Mapping[str, Any], location: str) -> MultiVector:
    """Make the multi-vector of a point again.

    Raises:
        StoreError: its token embeddings are not what was written.
    """
    rows: Float16 = np.asarray(vectors[FULL], dtype=np.float32).astype("<f2")
    if zlib.crc32(rows.tobytes()) != payload["crc32"]:
        raise StoreError(
            f"{location}: the token embeddings of {payload['id']!r} are not what was written (their checksum differs): "
            "another program changed them, or the server's disk is at fault; add the page again"
        )
    shape = json.loads(payload["shape"])
    return MultiVector(
        rows.astype(np.float32),
        content=slice(*shape["content"]),
        visual=None if shape["visual"] is None else slice(*shape["visual"]),
        tokens=None if shape["tokens"] is None else tuple(shape["tokens"]),
        grid=None if shape["grid"] is None else (shape["grid"][0], shape["grid"][1]),
        clusters=None if shape["clusters"] is None else np.asarray(shape["clusters"], dtype=np.int32),
    )


def _page_to_json(page: Page) -> str:
    names = ("id", "source", "number", "label", "text", "metadata", "sha256")
    return json.dumps({name: getattr(page, name) for name in names})


def _shape_to_json(made: MultiVector) -> str:
    """Write all of a multi-vector but its token embeddings."""
    return json.dumps(
        {
            "content": _cut(made.content),
            "visual": None if made.visual is None else _cut(made.visual),
            "grid": None if made.grid is None else [int(side) for side in made.grid],
            "tokens": made.tokens,
            "clusters": None if made.clusters is None else made.clusters.tolist(),
        }
    )


def _cut(part: slice) -> list[int | None]:
    return [None if bound is None else int(bound) for bound in (part.start, part.stop, part.step)]
