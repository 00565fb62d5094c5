"""Where pages lie in the embedded store's token and code files, as arrays of one length."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_ROWS_AT_ONCE = 1 << 16

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Extents:
    """Where the committed pages of one generation lie, in the order of their keys: arrays of one length.

    All are int64 but ``code_scales``, which is float64; ``code_rows`` is 0 where a page has no code.
    """

    generation: int
    layout: int
    keys: Int64
    segments: Int64
    starts: Int64
    rows: Int64
    crc32: Int64
    code_starts: Int64
    code_rows: Int64
    code_crc32: Int64
    code_scales: NDArray[np.float64]

    def take(self, index: NDArray[np.intp] | NDArray[np.bool_]) -> Extents:
        """Give the pages at these positions."""
        return Extents(self.generation, self.layout, *(array[index] for array in self.columns()))

    def columns(self) -> list[NDArray[Any]]:
        """Give the arrays."""
        return [getattr(self, name) for name in _COLUMNS]


_COLUMNS: Final = tuple(item.name for item in fields(Extents))[2:]
_SELECTED: Final = "key, segment, start, rows, crc32, code_start, code_rows, code_crc32, code_scale"


def read_extents(connection: sqlite3.Connection, known: Extents | None) -> Extents:
    """Read where the pages lie, as of the connection's transaction.

    Args:
        connection: inside a transaction.
        known: an earlier state of the same layout, of which only what changed is read; None reads all.
    """
    generation, layout = read_state(connection)
    after = int(known.keys[-1]) if known is not None and len(known.keys) else 0
    sql = f"SELECT {_SELECTED} FROM pages WHERE key > ? ORDER BY key"  # noqa: S608 - a constant
    found = connection.execute(sql, (after,))
    blocks = [np.empty((0, len(_COLUMNS)))]
    while rows := found.fetchmany(_ROWS_AT_ONCE):
        blocks.append(np.array(rows, dtype=np.float64))  # which holds whole numbers up to 2**53
    columns = [column.astype(np.int64) for column in np.concatenate(blocks).T[:-1]]
    columns.append(np.concatenate(blocks)[:, -1].copy())
    if known is not None:
        gone = connection.execute("SELECT key FROM tombstones WHERE generation > ?", (known.generation,)).fetchall()
        keep = ~np.isin(known.keys, np.array(gone, dtype=np.int64).ravel())
        columns = [np.concatenate([old[keep], new]) for old, new in zip(known.columns(), columns, strict=True)]
    return Extents(generation, layout, *columns)


def read_state(connection: sqlite3.Connection) -> tuple[int, int]:
    """Read generation, which every write raises, and layout, which compaction does."""
    generation, layout = connection.execute("SELECT generation, layout FROM state").fetchone()
    return generation, layout
