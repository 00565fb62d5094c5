"""Records as rows of the catalogue, and back."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from colqwen3_retrievers.errors import StoreError
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.stores.embedded.filters import fact_rows, text_bytes
from colqwen3_retrievers.stores.embedded.row_files import Float16
from colqwen3_retrievers.stores.protocol import Record
from colqwen3_retrievers.vectors.codes import PageCode
from colqwen3_retrievers.vectors.multi_vector import MultiVector

_RECORD: Final = "p.key, p.id, p.source, p.number, p.label, p.sha256, p.image, c.metadata, c.text, c.shape, c.clusters"
_PLACE: Final = "p.segment, p.start, p.rows, p.crc32"
_COLUMNS: Final = f"{_RECORD}, c.crc32, {_PLACE}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a page's token embeddings lie, their checksum, and what else makes a multi-vector of them."""

    segment: int
    start: int
    rows: int
    crc32: int
    shape: str
    clusters: bytes | None


def insert(
    connection: sqlite3.Connection, record: Record, segment: int, start: int, rows: Float16, code: PageCode, at: int
) -> None:
    """Write one record whose token embeddings lie at row ``start`` of ``segment``, its code at row ``at``."""
    page, multi_vector = record.page, record.multi_vector
    assert multi_vector is not None  # noqa: S101 - check_records refused it otherwise
    values = (
        *(segment, start, len(rows), zlib.crc32(rows.data)),
        *(page.id, page.source, page.number, page.label, page.sha256, record.image),
        *(at, len(code.rows), code.scale, zlib.crc32(code.rows.data)),
    )
    columns = "segment, start, rows, crc32, id, source, number, label, sha256, image"
    marks = ", ".join("?" * len(values))
    key = connection.execute(
        f"INSERT INTO pages ({columns}, code_start, code_rows, code_scale, code_crc32) VALUES ({marks})",  # noqa: S608 - constants
        values,
    ).lastrowid
    clusters = None if multi_vector.clusters is None else multi_vector.clusters.astype("<i4").tobytes()
    metadata, shape = json.dumps(page.metadata), _shape(multi_vector)
    said = (page.id, page.source, page.number, page.label, page.sha256, record.image, metadata, page.text, shape)
    connection.execute(
        "INSERT INTO contents VALUES (?, ?, CAST(? AS TEXT), ?, ?, ?)",
        (key, metadata, text_bytes(page.text), shape, clusters, _checksum((*said, clusters))),
    )
    connection.executemany(
        "INSERT INTO facts VALUES (?1, ?2, ?3, CASE typeof(?4) WHEN 'blob' THEN CAST(?4 AS TEXT) ELSE ?4 END, ?5)",
        [(key, *fact) for fact in fact_rows(page.metadata)],
    )


def remove(connection: sqlite3.Connection, keys: list[int]) -> None:
    """Forget pages by key and leave a tombstone of each; their contents and facts go with them."""
    (generation,) = connection.execute("SELECT generation FROM state").fetchone()
    connection.executemany(
        "INSERT INTO tombstones SELECT key, ?, segment, start, rows FROM pages WHERE key = ?",
        [(generation, key) for key in keys],
    )
    connection.executemany(
        "UPDATE segments SET dead = dead + p.rows FROM (SELECT segment, rows FROM pages WHERE key = ?) AS p "
        "WHERE segments.segment = p.segment",
        [(key,) for key in keys],
    )
    connection.executemany("DELETE FROM pages WHERE key = ?", [(key,) for key in keys])


def keys_of(connection: sqlite3.Connection, ids: list[str]) -> list[int]:
    """Give the keys of the ids that are there, in their order, each once."""
    found = (_one(connection, "SELECT key FROM pages WHERE id = ?", item) for item in dict.fromkeys(ids))
    return [row[0] for row in found if row is not None]


def by_id(connection: sqlite3.Connection, ids: list[str]) -> Iterator[tuple[Record, Place]]:
    """Give the records of the ids that are there, in their order, and where their token embeddings lie.

    Raises:
        StoreError: what the catalogue says of a page is not what was written.
    """
    sql = f"SELECT {_COLUMNS} FROM pages AS p JOIN contents AS c USING (key) WHERE p.id = ?"  # noqa: S608 - constants
    for item in ids:
        row = _one(connection, sql, item)
        if row is not None:
            yield _record(row), Place(*row[12:], *row[9:11])


def by_key(connection: sqlite3.Connection, key: int) -> Record:
    """Give the record of a key that is there; raises as :func:`by_id`."""
    sql = f"SELECT {_COLUMNS} FROM pages AS p JOIN contents AS c USING (key) WHERE p.key = ?"  # noqa: S608 - constants
    return _record(connection.execute(sql, (key,)).fetchone())


def multi_vector(rows: Float16, place: Place) -> MultiVector:
    """Make a multi-vector of its stored rows, float32 copies of them."""
    shape = json.loads(place.shape)
    return MultiVector(
        rows.astype(np.float32),
        content=slice(*shape["content"]),
        visual=None if shape["visual"] is None else slice(*shape["visual"]),
        tokens=None if shape["tokens"] is None else tuple(shape["tokens"]),
        grid=None if shape["grid"] is None else (shape["grid"][0], shape["grid"][1]),
        clusters=None if place.clusters is None else np.frombuffer(place.clusters, dtype="<i4").astype(np.int32),
    )


def _one(connection: sqlite3.Connection, sql: str, item: str) -> Any:
    try:
        return connection.execute(sql, (item,)).fetchone()
    except UnicodeEncodeError:  # half a surrogate pair: no id can be that
        return None


def _record(row: tuple[Any, ...]) -> Record:
    page_id, source, number, label, sha256, image, metadata, text = row[1:9]
    if row[11] is not None and row[11] != _checksum(row[1:11]):
        raise StoreError(
            f"what the catalogue says of {page_id!r} is not what was written (its checksum differs): the disk or a "
            "copy of the folder is at fault; add the page again"
        )
    page = Page(
        id=page_id,
        source=source,
        number=number,
        label=label,
        text=text,
        metadata=json.loads(metadata),
        sha256=sha256,
    )
    return Record(page, None, image)


def _shape(made: MultiVector) -> str:
    return json.dumps(
        {
            "content": _cut(made.content),
            "visual": None if made.visual is None else _cut(made.visual),
            "grid": None if made.grid is None else [int(side) for side in made.grid],
            "tokens": made.tokens,
        }
    )


def _checksum(said: tuple[Any, ...]) -> int:
    """Checksum of all that is said about a page: texts, numbers, bytes and None, told apart and with their lengths."""
    sum_of_all = 0
    for value in said:
        kind = "n" if value is None else "b" if isinstance(value, bytes) else "t"
        raw = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        sum_of_all = zlib.crc32(raw, zlib.crc32(f"{kind}{len(raw)}".encode(), sum_of_all))
    return sum_of_all


def _cut(part: slice) -> list[int | None]:
    return [None if bound is None else int(bound) for bound in (part.start, part.stop, part.step)]
