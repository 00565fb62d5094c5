"""Rewriting an embedded store's files without what nobody needs any more, and making codes that are missing.

A segment is rewritten into new files under new names; one transaction then says so, and only after it the old files go.
Killed in between, the new files are those nobody names, which the next writer removes. Readers that still hold a map of
an old file go on reading it; those that open it too late begin again with what the catalogue says then.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from colqwen3_retrievers.errors import ConfigError, StoreError
from colqwen3_retrievers.stores.embedded.catalogue import Catalogue, Segment, read_segments
from colqwen3_retrievers.stores.embedded.files import StoreFiles
from colqwen3_retrievers.vectors.codes import PageCode, page_code

DEAD_SHARE: Final = 0.3
"""Share of dead bytes in a segment beyond which it is rewritten without being asked."""

DEAD_BYTES: Final = 8 * 2**20
"""Fewest dead bytes for that: below it, rewriting costs more than it gives."""

SEGMENT_BYTES: Final = 2**30
"""Token embeddings in a file before the next one is begun: what a rewriting copies at most."""

_COPIED_AT_ONCE = 16 * 2**20
_FILE = re.compile(r"tokens-\d{6}(-\d+)?\.f16|codes-\d{6}(-\d+)?\.i8")

_LIVE_COLUMNS = "key, start, rows, code_start, code_rows, code_scale, code_crc32"
_LIVE = f"SELECT {_LIVE_COLUMNS} FROM pages WHERE segment = ? ORDER BY key"  # noqa: S608 - a constant
_MOVE = "UPDATE pages SET start = ?, code_start = ?, code_rows = ?, code_scale = ?, code_crc32 = ? WHERE key = ?"
_REPLACE = "UPDATE segments SET name = ?, rows = ?, dead = 0, codes = ?, code_rows = ? WHERE segment = ?"
_CODED = "UPDATE pages SET code_start = ?, code_rows = ?, code_scale = ?, code_crc32 = ? WHERE key = ?"


def file_names(segment: int, turn: int = 0) -> tuple[str, str]:
    """Give the names of a segment's token file and code file; ``turn`` tells rewritten ones apart.

    >>> file_names(1), file_names(1, 7)
    (('tokens-000001.f16', 'codes-000001.i8'), ('tokens-000001-7.f16', 'codes-000001-7.i8'))
    """
    stem = f"{segment:06d}-{turn}" if turn else f"{segment:06d}"
    return f"tokens-{stem}.f16", f"codes-{stem}.i8"


def remove_orphans(folder: Path, segments: Sequence[Segment]) -> None:
    """Remove files that a killed rewriting left, or whose removal was refused. Only the writer may."""
    named = {name for segment in segments for name in (segment.name, segment.codes)}
    for path in folder.iterdir():
        if _FILE.fullmatch(path.name) and path.name not in named:
            path.unlink(missing_ok=True)


class Compactor:
    """Rewrites segments and makes missing codes; the caller is the only thread that writes.

    Args:
        catalogue: open for writing.
        files: of the same store.
        code_factor: tokens for each row of a page's code.
        code_bits: of its components.
    """

    def __init__(self, catalogue: Catalogue, files: StoreFiles, code_factor: int, code_bits: int) -> None:
        self._catalogue = catalogue
        self._files = files
        self._code_factor = code_factor
        self._code_bits = code_bits

    def due(self) -> list[Segment]:
        """Give the segments in which enough is dead."""
        with self._catalogue.reading() as connection:
            segments = read_segments(connection).values()
        return [
            segment
            for segment in segments
            if segment.dead * self._files.tokens.row_bytes >= DEAD_BYTES and segment.dead > DEAD_SHARE * segment.rows
        ]

    def wasteful(self) -> list[Segment]:
        """Give the segments in which anything is dead, or any code is missing or damaged."""
        with self._catalogue.reading() as connection:
            segments = read_segments(connection)
            bare = {row[0] for row in connection.execute("SELECT DISTINCT segment FROM pages WHERE code_rows = 0")}
            return [
                s for s in segments.values() if s.dead or s.number in bare or not self._codes_are_sound(connection, s)
            ]

    def rewrite(self, segment: Segment) -> int:
        """Write a segment anew, without what is dead and with all its codes.

        Returns:
            The bytes that became free.

        Raises:
            StoreError: the disk is full, and the like; all is as before.
        """
        with self._catalogue.reading() as connection:
            (layout,) = connection.execute("SELECT layout FROM state").fetchone()
            live = np.array(connection.execute(_LIVE, (segment.number,)).fetchall(), dtype=np.float64).reshape(-1, 7)
        tokens, codes = file_names(segment.number, layout + 1)
        starts, rows = live[:, 1].astype(np.int64), live[:, 2].astype(np.int64)
        try:
            self._files.tokens.create(tokens)
            self._files.codes.create(codes)
            mapped = self._files.tokens.rows(segment.name, segment.rows)
            done = 0
            for part in _runs(mapped, starts, rows):
                self._files.tokens.append(tokens, done, part)
                done += len(part)
            placed, code_rows = self._write_codes(codes, segment, live, mapped)
            ends = np.cumsum(rows)
            with self._catalogue.writing() as connection:
                moved = zip((ends - rows).tolist(), placed, live[:, 0].astype(np.int64).tolist(), strict=True)
                connection.executemany(_MOVE, [(start, *place, key) for start, place, key in moved])
                connection.execute(_REPLACE, (tokens, done, codes, code_rows, segment.number))
                connection.execute("DELETE FROM tombstones WHERE segment = ?", (segment.number,))
                connection.execute("UPDATE state SET layout = layout + 1")
        except BaseException:
            self._files.tokens.remove(tokens)
            self._files.codes.remove(codes)
            raise
        self._files.tokens.remove(segment.name)
        if segment.codes:
            self._files.codes.remove(segment.codes)
        return (segment.rows - done) * self._files.tokens.row_bytes

    def code_some(self, most: int) -> int:
        """Make codes for at most ``most`` pages that have none, in place; give how many were made.

        Raises:
            StoreError: the disk is full, and the like; all is as before.
        """
        with self._catalogue.reading() as connection:
            sql = "SELECT key, segment, start, rows FROM pages WHERE code_rows = 0 ORDER BY key LIMIT ?"
            bare = connection.execute(sql, (most,)).fetchall()
            segments = read_segments(connection)
        if not bare:
            return 0
        segment = segments[bare[0][1]]
        bare = [page for page in bare if page[1] == segment.number]
        mapped = self._files.tokens.rows(segment.name, segment.rows)
        made = [self._code(segment, mapped[start : start + rows], start) for _, _, start, rows in bare]
        if not self._files.codes.exists(segment.codes):
            self._files.codes.create(segment.codes)
        self._files.codes.append(segment.codes, segment.code_rows, np.concatenate([code.rows for code in made]))
        at = segment.code_rows
        with self._catalogue.writing() as connection:
            for (key, *_), code in zip(bare, made, strict=True):
                place = (at, len(code.rows), code.scale, zlib.crc32(code.rows.data))
                connection.execute(_CODED, (*place, key))
                at += len(code.rows)
            connection.execute("UPDATE segments SET code_rows = ? WHERE segment = ?", (at, segment.number))
            connection.execute("UPDATE state SET layout = layout + 1")
        return len(bare)

    def forget_missing_codes(self) -> None:
        """Let pages whose code file is gone be pages without codes, so that their codes are made again."""
        with self._catalogue.reading() as connection:
            segments = read_segments(connection)
        gone = [s for s in segments.values() if s.code_rows and not self._files.codes.exists(s.codes)]
        if not gone:
            return
        with self._catalogue.writing() as connection:
            for segment in gone:
                connection.execute("UPDATE pages SET code_rows = 0 WHERE segment = ?", (segment.number,))
                connection.execute("UPDATE segments SET code_rows = 0 WHERE segment = ?", (segment.number,))
            connection.execute("UPDATE state SET layout = layout + 1")

    def _codes_are_sound(self, connection: Connection, segment: Segment) -> bool:
        live = connection.execute(_LIVE, (segment.number,))
        return all(self._sound_code(segment, page) is not None for page in live)

    def _sound_code(self, segment: Segment, page: Sequence[Any]) -> NDArray[np.int8] | None:
        """Give a page's code as it is on disk, or None when it is not what was written."""
        start, count, crc32 = int(page[3]), int(page[4]), int(page[6])
        try:
            rows = self._files.codes.rows(segment.codes, segment.code_rows)[start : start + count] if count else None
        except StoreError:
            return None
        return None if rows is None or zlib.crc32(rows.data) != crc32 else rows

    def _code(self, segment: Segment, rows: NDArray[np.float16], start: int) -> PageCode:
        try:
            return page_code(rows, self._code_factor, self._code_bits)
        except ConfigError as exc:  # NaN or infinity, which nobody could add
            raise StoreError(f"{self._files.folder / segment.name}: damaged from row {start}: {exc}") from exc

    def _write_codes(
        self, name: str, segment: Segment, live: NDArray[np.float64], mapped: NDArray[np.float16]
    ) -> tuple[list[tuple[int, int, float, int]], int]:
        """Write all codes of a segment's pages, those that are sound as they are; give their places and the rows."""
        placed: list[tuple[int, int, float, int]] = []
        waiting: list[NDArray[np.int8]] = []
        written = size = 0
        for page in live:
            rows, scale = self._sound_code(segment, page), float(page[5])
            if rows is None:
                start = int(page[1])
                rows, scale = self._code(segment, mapped[start : start + int(page[2])], start)
            placed.append((written + size, len(rows), scale, zlib.crc32(rows.data)))
            waiting.append(rows)
            size += len(rows)
            if size * rows.shape[1] >= _COPIED_AT_ONCE:
                self._files.codes.append(name, written, np.concatenate(waiting))
                written, size, waiting = written + size, 0, []
        if waiting:
            self._files.codes.append(name, written, np.concatenate(waiting))
        return placed, written + size


def _runs(
    rows: NDArray[np.float16], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> Iterator[NDArray[np.float16]]:
    """Give pages' rows in order, those side by side together, some megabytes at a time."""
    most = max(1, _COPIED_AT_ONCE // (rows.itemsize * rows.shape[1]))
    begin = end = -1
    for start, count in zip(starts.tolist(), lengths.tolist(), strict=True):
        if start != end or end - begin >= most:
            if end > begin:
                yield rows[begin:end]
            begin = start
        end = start + count
    if end > begin:
        yield rows[begin:end]
