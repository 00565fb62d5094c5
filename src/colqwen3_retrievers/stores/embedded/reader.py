"""What an embedded store does without writing: all that readers beside a writer need."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from sqlite3 import Connection
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from colqwen3_retrievers.errors import DimensionError, StoreError
from colqwen3_retrievers.stores.embedded import rows as table
from colqwen3_retrievers.stores.embedded.catalogue import Catalogue, Segment, read_segments, select_keys
from colqwen3_retrievers.stores.embedded.extents import Extents
from colqwen3_retrievers.stores.embedded.files import StoreFiles, best
from colqwen3_retrievers.stores.embedded.row_files import ROW_TYPE, FileGoneError
from colqwen3_retrievers.stores.embedded.two_stage import EXACT_PAGES, two_stage
from colqwen3_retrievers.stores.protocol import GroupBy, Match, Record, check_ids, check_search
from colqwen3_retrievers.stores.where import Filter, Where, parse
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo, MultiVector, PackedEmbeddings

_MAX_SCORES = 2**24  # scores held at once, 64 MB: more queries than that allows are searched for in turns
_TRIES = 8  # readings that may find a file gone by a compaction before it is called a fault
T = TypeVar("T")


class EmbeddedReader:
    """The reading half of ``EmbeddedStore``, which fills its attributes."""

    _folder: Path
    _read_only: bool
    _info: EncoderInfo
    _code_factor: int
    _code_bits: int
    _catalogue: Catalogue
    _files: StoreFiles

    @property
    def info(self) -> EncoderInfo:
        """What shaped the multi-vectors."""
        return self._info

    @property
    def location(self) -> str:
        """The folder, absolute."""
        return str(self._folder)

    @property
    def folder(self) -> Path:
        """The folder."""
        return self._folder

    @property
    def read_only(self) -> bool:
        """Whether it was opened for reading only."""
        return self._read_only

    def get(self, ids: Iterable[str], *, vectors: bool = False) -> list[Record]:
        """Give records by id; see the protocol."""
        asked = check_ids(ids)

        def read(connection: Connection) -> list[Record]:
            found = table.by_id(connection, asked)
            if not vectors:
                return [record for record, _ in found]
            segments = self._segments(connection)
            return [self._with_vectors(record, place, segments) for record, place in found]

        return self._reading(read)

    def search(
        self,
        queries: Sequence[MultiVector | ArrayLike],
        k: int,
        *,
        where: Where | Filter | None = None,
        exact: bool = False,
        group_by: GroupBy | None = None,
    ) -> list[list[Match]]:
        """Find the ``k`` best records for each query; see the protocol."""
        wanted = check_search(k, group_by)
        tree = parse(where)
        if len(queries) == 0:
            return []
        packed = PackedEmbeddings.pack(queries)
        if packed.dim != self._info.dim:
            raise DimensionError(f"{self.location}: query", expected=self._info.dim, actual=packed.dim)

        def find(connection: Connection, every: bool) -> list[list[Match]]:
            connection, extents = self._catalogue.extents(connection)
            if tree is not None:
                extents = extents.take(np.searchsorted(extents.keys, select_keys(connection, tree)))
            if not len(extents.keys):
                return [[] for _ in queries]
            return self._find(connection, packed, extents, wanted, group_by, every or len(extents.keys) <= EXACT_PAGES)

        try:
            return self._reading(lambda connection: find(connection, exact))
        except FileGoneError:  # a code file that somebody removed: token embeddings are enough
            return self._reading(lambda connection: find(connection, True))

    def ids(self, where: Where | Filter | None = None) -> list[str]:
        """Give ids in code point order; see the protocol."""
        tree = parse(where)
        with self._catalogue.reading() as connection:
            if tree is None:
                return [row[0] for row in connection.execute("SELECT id FROM pages ORDER BY id")]
            keys = select_keys(connection, tree).tolist()
            sql = "SELECT id FROM pages WHERE key = ?"
            return sorted(connection.execute(sql, (key,)).fetchone()[0] for key in keys)

    def images(self, among: Iterable[str] | None = None) -> set[str]:
        """Give the image references records hold; see the protocol."""
        with self._catalogue.reading() as connection:
            if among is None:
                return {row[0] for row in connection.execute("SELECT image FROM pages WHERE image IS NOT NULL")}
            sql = "SELECT 1 FROM pages WHERE image = ?"
            return {item for item in set(among) if connection.execute(sql, (item,)).fetchone()}

    def is_empty(self) -> bool:
        """Return whether there are no records."""
        with self._catalogue.reading() as connection:
            return connection.execute("SELECT 1 FROM pages LIMIT 1").fetchone() is None

    def __len__(self) -> int:
        """Count the records."""
        with self._catalogue.reading() as connection:
            return int(connection.execute("SELECT count(*) FROM pages").fetchone()[0])

    def __contains__(self, id: object) -> bool:
        """Whether there is a record with this id."""
        with self._catalogue.reading() as connection:
            return isinstance(id, str) and bool(table.keys_of(connection, [id]))

    def __repr__(self) -> str:
        """Name the folder."""
        return f"EmbeddedStore({self.location!r}{', read_only=True' if self._read_only else ''})"

    @property
    def code_factor(self) -> int:
        """Tokens for each row of a page's code."""
        return self._code_factor

    @property
    def code_bits(self) -> int:
        """Bits of a component of a page's code: 8 or 1."""
        return self._code_bits

    def _read_state(self) -> tuple[EncoderInfo, int, int]:
        with self._catalogue.reading() as connection:
            sql = "SELECT info, token_type, code_factor, code_bits FROM state"
            stored, token_type, code_factor, code_bits = connection.execute(sql).fetchone()
        if token_type != ROW_TYPE.str:
            raise StoreError(
                f"{self._folder}: token embeddings of type {token_type!r}; this release reads {ROW_TYPE.str!r}"
            )
        return EncoderInfo.from_dict(json.loads(stored)), code_factor, code_bits

    def _reading(self, read: Callable[[Connection], T]) -> T:
        """Read in one transaction, and again when a compaction by another process took away a file meanwhile."""
        seen: set[int] = set()
        while True:
            with self._catalogue.reading() as connection:
                try:
                    return read(connection)
                except FileGoneError:
                    (layout,) = connection.execute("SELECT layout FROM state").fetchone()
                    if layout in seen or len(seen) == _TRIES:
                        raise
                    seen.add(layout)

    def _segments(self, connection: Connection) -> dict[int, Segment]:
        segments = read_segments(connection)
        self._files.keep(segments)
        return segments

    def _checked_segments(self, connection: Connection) -> dict[int, Segment]:
        segments = read_segments(connection)
        for segment in segments.values():
            self._files.check(segment)
        return segments

    def _find(
        self,
        connection: Connection,
        queries: PackedEmbeddings,
        extents: Extents,
        k: int,
        group_by: GroupBy | None,
        exact: bool,
    ) -> list[list[Match]]:
        segments = self._segments(connection)
        turn = max(1, _MAX_SCORES // len(extents.keys))
        found: list[list[Match]] = []
        for first in range(0, len(queries), turn):
            some = PackedEmbeddings.pack([queries[i] for i in range(first, min(first + turn, len(queries)))])
            if exact:
                scores = self._files.scores(connection, some, extents, segments)
                picked = [best(connection, extents.keys, row, k, group_by) for row in scores]
            else:
                picked = two_stage(connection, self._files, some, extents, segments, k, group_by)
            found += [[Match(table.by_key(connection, key), score) for score, key in hits] for hits in picked]
        return found

    def _with_vectors(self, record: Record, place: table.Place, segments: dict[int, Segment]) -> Record:
        stored = self._files.page(record.page.id, place, segments)
        return Record(record.page, table.multi_vector(stored, place), record.image)
