"""Records as rows of the catalogue, and back."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from colqwen3_retrievers.errors import StoreError
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.stores.embedded.filters import fact_rows, text_bytes
from colqwen3_retrievers.stores.embedded.row_files import Float16
from colqwen3_retrievers.stores.protocol import Record
from colqwen3_retrievers.vectors.codes import PageCode

_RECORD: Final = "p.id, p.source, p.number, p.label, p.sha256, p.image, c.metadata, c.text, c.shape"
_SELECT: Final = (
    f"SELECT {_RECORD}, c.crc32, p.segment, p.start, p.rows, p.crc32 "  # noqa: S608 - constants
    "FROM pages AS p JOIN contents AS c USING (key) WHERE "
)


@dataclass(frozen=True, slots=True)
class Place:
    """A multi-vector's layout as JSON, and where its vectors are, with their checksum."""

    shape: str
    segment: int
    start: int
    rows: int
    crc32: int


def insert(
    connection: sqlite3.Connection, record: Record, segment: int, start: int, rows: Float16, code: PageCode, at: int
) -> None:
    """Write a record with vectors at row ``start`` of ``segment``, its code at ``at``."""
    page, multi_vector = record.page, record.multi_vector
    assert multi_vector is not None  # noqa: S101 - check_records refused it otherwise
    columns = {
        "segment": segment, "start": start, "rows": len(rows), "crc32": zlib.crc32(rows.data),
        "id": page.id, "source": page.source, "number": page.number, "label": page.label, "sha256": page.sha256,
        "image": record.image, "code_start": at, "code_rows": len(code.rows), "code_scale": code.scale,
        "code_crc32": zlib.crc32(code.rows.data),
    }  # fmt: skip
    sql = f"INSERT INTO pages ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"  # noqa: S608 - constants
    key = connection.execute(sql, tuple(columns.values())).lastrowid
    metadata, shape = json.dumps(page.metadata), json.dumps(multi_vector.layout())
    recorded = (page.id, page.source, page.number, page.label, page.sha256, record.image, metadata, page.text, shape)
    connection.execute(
        "INSERT INTO contents VALUES (?, ?, CAST(? AS TEXT), ?, ?)",
        (key, metadata, text_bytes(page.text), shape, _checksum(recorded)),
    )
    connection.executemany(
        "INSERT INTO facts VALUES (?1, ?2, ?3, CASE typeof(?4) WHEN 'blob' THEN CAST(?4 AS TEXT) ELSE ?4 END, ?5)",
        [(key, *fact) for fact in fact_rows(page.metadata)],
    )


def remove(connection: sqlite3.Connection, keys: list[int]) -> None:
    """Remove pages by key, and leave a tombstone of each."""
    (generation,) = connection.execute("SELECT generation FROM state").fetchone()
    connection.executemany(
        "INSERT INTO tombstones SELECT key, ?, segment FROM pages WHERE key = ?", [(generation, key) for key in keys]
    )
    connection.executemany(
        "UPDATE segments SET dead = dead + p.rows FROM (SELECT segment, rows FROM pages WHERE key = ?) AS p "
        "WHERE segments.segment = p.segment",
        [(key,) for key in keys],
    )
    connection.executemany("DELETE FROM pages WHERE key = ?", [(key,) for key in keys])


def keys_of(connection: sqlite3.Connection, ids: list[str]) -> list[int]:
    """Return the keys of the ids in the store, in their order, each once."""
    rows = (_first_row(connection, "SELECT key FROM pages WHERE id = ?", item) for item in dict.fromkeys(ids))
    return [row[0] for row in rows if row is not None]


def by_id(connection: sqlite3.Connection, ids: list[str]) -> Iterator[tuple[Record, Place]]:
    """Iterate over the records of these ids, in their order, with their places.

    Raises:
        StoreError: what the catalogue records about a page is not what was written.
    """
    for item in ids:
        row = _first_row(connection, f"{_SELECT} p.id = ?", item)
        if row is not None:
            yield _record(row), Place(row[8], *row[10:])


def by_key(connection: sqlite3.Connection, key: int) -> Record:
    """Return the record of a key in the store; raises as :func:`by_id`."""
    return _record(connection.execute(f"{_SELECT} p.key = ?", (key,)).fetchone())


def _first_row(connection: sqlite3.Connection, sql: str, item: str) -> Any:
    try:
        return connection.execute(sql, (item,)).fetchone()
    except UnicodeEncodeError:  # half a surrogate pair, which no id has
        return None


def _record(row: tuple[Any, ...]) -> Record:
    page_id, source, number, label, sha256, image, metadata, text = row[:8]
    if row[9] != _checksum(row[:9]):
        raise StoreError(
            f"what the catalogue says of {page_id!r} is not what was written (its checksum differs): the disk or a "
            "copy of the folder is at fault; add the page again"
        )
    page = Page(page_id, source, number, label, text=text, metadata=json.loads(metadata), sha256=sha256)
    return Record(page, None, image)


def _checksum(values: tuple[Any, ...]) -> int:
    """Return the checksum of texts, numbers and None, with their lengths."""
    checksum = 0
    for value in values:
        raw = str(value).encode("utf-8", "surrogatepass")
        checksum = zlib.crc32(raw, zlib.crc32(f"{'n' if value is None else 't'}{len(raw)}".encode(), checksum))
    return checksum
