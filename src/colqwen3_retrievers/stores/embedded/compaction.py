"""Rewriting an embedded store's files without dead rows, and with sound codes.

A segment is written into new files under new names; one transaction makes them the segment's, and only then the old
files are removed. A process killed in between leaves new files that no segment names, which the next writer removes.
Readers that hold a map of an old file go on with it; those that open it too late start again from the new state.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from colqwen3_retrievers.errors import ConfigError, StoreError
from colqwen3_retrievers.stores.embedded.catalogue import Catalogue, Segment, read_segments
from colqwen3_retrievers.stores.embedded.files import StoreFiles, file_names
from colqwen3_retrievers.stores.embedded.row_files import Float16, chunks
from colqwen3_retrievers.vectors.codes import page_code

DEAD_SHARE: Final = 0.3
"""Share of dead bytes beyond which a segment is rewritten automatically."""

DEAD_BYTES: Final = 8 * 2**20
"""Fewest dead bytes for that: below it, rewriting costs more than it frees."""

SEGMENT_BYTES: Final = 2**30
"""Token embeddings in a file before the next one is started: what a rewrite copies at most."""

_COPIED_AT_ONCE = 16 * 2**20

_PLACES = (
    "SELECT key, start, rows, code_start, code_rows, code_scale, code_crc32 FROM pages WHERE segment = ? ORDER BY key"
)
_MOVE = "UPDATE pages SET start = ?, code_start = ?, code_rows = ?, code_scale = ?, code_crc32 = ? WHERE key = ?"
_REPLACE = "UPDATE segments SET name = ?, rows = ?, dead = 0, codes = ?, code_rows = ? WHERE segment = ?"


class Compactor:
    """Rewrites segments; the caller is the only thread that writes.

    Args:
        catalogue: open for writing.
        files: of the same store.
        code_factor: tokens for each row of a page's code.
    """

    def __init__(self, catalogue: Catalogue, files: StoreFiles, code_factor: int) -> None:
        self._catalogue = catalogue
        self._files = files
        self._code_factor = code_factor

    def rewrite_due(self) -> None:
        """Rewrite segments with enough dead rows, and one whose code file is gone."""
        segments = self._segments()
        uncoded = [segment for segment in segments if not self._files.codes.exists(segment.codes)]
        due = uncoded[:1]  # one with each write, for the codes of a full segment take minutes
        for segment in segments:
            dead_bytes = segment.dead * self._files.tokens.row_bytes
            if segment not in due and dead_bytes >= DEAD_BYTES and segment.dead > DEAD_SHARE * segment.rows:
                due.append(segment)
        for segment in due:
            self.rewrite(segment)

    def rewrite_wasteful(self) -> int:
        """Rewrite segments with any dead row or unsound code; return the bytes freed."""
        freed = 0
        for segment in self._segments():
            with self._catalogue.reading() as connection:
                places = connection.execute(_PLACES, (segment.number,))
                wasteful = segment.dead or any(self._sound_code(segment, place) is None for place in places)
            freed += self.rewrite(segment) if wasteful else 0
        return freed

    def rewrite(self, segment: Segment) -> int:
        """Write a segment again, without dead rows and with all its codes.

        Returns:
            The bytes freed.

        Raises:
            StoreError: the disk is full, and the like; everything is as before.
        """
        with self._catalogue.reading() as connection:
            (layout,) = connection.execute("SELECT layout FROM state").fetchone()
            places = connection.execute(_PLACES, (segment.number,)).fetchall()
        keys, starts, rows = np.array([place[:3] for place in places], dtype=np.int64).reshape(-1, 3).T
        tokens, codes = file_names(segment.number, layout + 1)
        try:
            self._files.tokens.create(tokens)
            self._files.codes.create(codes)
            mapped = self._files.tokens.rows(segment.name, segment.rows)
            written = 0
            for _, packed in chunks(mapped, starts, rows, chunk_bytes=_COPIED_AT_ONCE):
                self._files.tokens.append(tokens, written, packed.vectors)
                written += len(packed.vectors)
            code_places, code_rows = self._write_codes(codes, segment, places, mapped)
            moves = zip((np.cumsum(rows) - rows).tolist(), code_places, keys.tolist(), strict=True)
            with self._catalogue.writing() as connection:
                connection.executemany(_MOVE, [(start, *code_place, key) for start, code_place, key in moves])
                connection.execute(_REPLACE, (tokens, written, codes, code_rows, segment.number))
                connection.execute("DELETE FROM tombstones WHERE segment = ?", (segment.number,))
                connection.execute("UPDATE state SET layout = layout + 1")
        except BaseException:
            self._files.tokens.remove(tokens)
            self._files.codes.remove(codes)
            raise
        self._files.tokens.remove(segment.name)
        self._files.codes.remove(segment.codes)
        return (segment.rows - written) * self._files.tokens.row_bytes

    def _segments(self) -> list[Segment]:
        with self._catalogue.reading() as connection:
            return list(read_segments(connection).values())

    def _sound_code(self, segment: Segment, place: Sequence[Any]) -> NDArray[np.int8] | None:
        """Return a page's code as it is on disk, or None when it is not what was written."""
        start, count, _, crc32 = place[3:]
        try:
            rows = self._files.codes.rows(segment.codes, segment.code_rows)[start : start + count]
        except StoreError:
            return None
        return rows if zlib.crc32(rows.data) == crc32 else None

    def _write_codes(
        self, name: str, segment: Segment, places: list[tuple[Any, ...]], mapped: Float16
    ) -> tuple[list[tuple[int, int, float, int]], int]:
        """Write a segment's codes, sound ones as they are; return places and row count."""
        code_places: list[tuple[int, int, float, int]] = []
        pending: list[NDArray[np.int8]] = []
        written = size = 0
        for place in places:
            rows, scale = self._sound_code(segment, place), place[5]
            if rows is None:
                start, count = place[1:3]
                try:
                    code = page_code(mapped[start : start + count], self._code_factor, self._files.code_bits)
                except ConfigError as exc:  # NaN or infinity, which nobody could add
                    raise StoreError(f"{self._files.folder / segment.name}: damaged from row {start}: {exc}") from exc
                rows, scale = code.rows, code.scale
            code_places.append((written + size, len(rows), scale, zlib.crc32(rows.data)))
            pending.append(rows)
            size += len(rows)
            if size * rows.shape[1] >= _COPIED_AT_ONCE:
                self._files.codes.append(name, written, np.concatenate(pending))
                written, size, pending = written + size, 0, []
        if pending:
            self._files.codes.append(name, written, np.concatenate(pending))
        return code_places, written + size
