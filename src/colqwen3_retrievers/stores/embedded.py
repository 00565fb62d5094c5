"""The embedded store: a folder on a local disk, with nothing to install and nothing to run.

::

    my-index/
      catalogue.sqlite       what is committed: ids, metadata, where token embeddings lie (and its -wal and -shm)
      tokens-000001.f16      token embeddings, appended, float16
      writer.lock            who writes
      images/                page images, kept by PageIndex

**Commit.** Token embeddings are appended and synced first, then one SQLite transaction makes them count. A process that
dies in between leaves bytes nobody counts; the next writer cuts them off. Replaced and deleted pages leave their bytes
behind until the files are compacted.

**Who may do what.** One writer, held by a lock the system drops when the process ends; any number of readers, in this
process and others, each seeing one consistent state per call.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from sqlite3 import Connection
from typing import Final, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from colqwen3_retrievers.datatypes import EncoderInfo, Float32, MultiVector, PackedEmbeddings
from colqwen3_retrievers.errors import ConfigError, DimensionError, StoreError
from colqwen3_retrievers.kernels import default_kernel
from colqwen3_retrievers.late_interaction import Kernel, maxsim
from colqwen3_retrievers.stores import rows as table
from colqwen3_retrievers.stores.catalogue import FILE_NAME, Catalogue, Extents, create, select_keys
from colqwen3_retrievers.stores.lock import WriterLock
from colqwen3_retrievers.stores.protocol import (
    GroupBy,
    Match,
    Record,
    check_addable,
    check_ids,
    check_info,
    check_records,
    check_search,
)
from colqwen3_retrievers.stores.token_files import ROW_TYPE, Float16, TokenFiles, chunks
from colqwen3_retrievers.stores.where import Filter, Where, parse

FIRST_SEGMENT: Final = "tokens-000001.f16"
_MAX_SCORES = 2**24  # scores held at once, 64 MB: more queries than that allows are searched for in turns


class EmbeddedStore:
    """Multi-vectors in a folder; a :class:`~colqwen3_retrievers.stores.protocol.MultiVectorStore`.

    Scores are MaxSim in float32 over the stored float16 token embeddings, and every search is exact.

    Args:
        folder: a store's folder, or a new or empty one.
        info: what made the multi-vectors. Needed for a new store; compared with an existing one.
        read_only: opens beside another writer, and on ground that cannot be written to.
        kernel: what computes MaxSim; None takes :func:`colqwen3_retrievers.kernels.default_kernel` when searching.

    Raises:
        StoreMismatchError: the store was made by another model, dim, pooling or rendering.
        StoreUnavailableError: another writer has it open; the message says who.
        StoreError: not a store, a format this release does not know, or a token file that was cut.

    Example:
        >>> import tempfile
        >>> from colqwen3_retrievers.documents import Page
        >>> info = EncoderInfo("ab12", "tiny", "tomoro", 2, 1, 1280, False, 1)
        >>> folder = tempfile.TemporaryDirectory()
        >>> with EmbeddedStore(folder.name, info=info) as store:
        ...     store.add([Record(Page(source="a.pdf"), MultiVector(np.eye(2, dtype=np.float32)))])
        ...     [(match.record.page.id, match.score) for match in store.search([[[0.6, 0.8]]], k=1)[0]]
        [('a.pdf#page=1', 0.80...)]
        >>> folder.cleanup()
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        info: EncoderInfo | None = None,
        read_only: bool = False,
        kernel: Kernel | None = None,
    ) -> None:
        self._folder = Path(folder).expanduser().absolute()  # the process may change its folder, the store may not
        self._kernel = kernel
        self._read_only = read_only
        self._given = info
        self._write_lock = threading.RLock()
        with contextlib.ExitStack() as opened:
            if not read_only:
                _make_room(self._folder, info)
                opened.callback(WriterLock(self._folder).release)
                if info is not None and not (self._folder / FILE_NAME).exists():
                    TokenFiles(self._folder, info.dim).create(FIRST_SEGMENT)
                    create(self._folder, json.dumps(info.to_dict()), ROW_TYPE.str, FIRST_SEGMENT)
            if not (self._folder / FILE_NAME).is_file():
                raise StoreError(f"{self._folder}: no index there")
            self._catalogue = Catalogue(self._folder, read_only=read_only)
            opened.callback(self._catalogue.close)
            self._info = self._read_info()
            if info is not None:
                check_info(self._info, info, self.location)
            self._tokens = TokenFiles(self._folder, self._info.dim)
            opened.callback(self._tokens.close)
            with self._catalogue.reading() as connection:
                for name, rows in _segments(connection).values():
                    self._tokens.check(name, rows)
                    if not read_only:
                        self._tokens.truncate(name, rows)
            self._finalizer = weakref.finalize(self, opened.pop_all().close)

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

    def add(self, records: Iterable[Record]) -> None:
        """Keep records, each in place of the one with its id; see the protocol."""
        check_addable(self._info, self._given, self.location)
        checked = check_records(records, self._info.dim)
        arrays = [np.asarray(record.multi_vector).astype(ROW_TYPE) for record in checked]
        if not arrays:
            return
        with self._undoing_tokens(), self._catalogue.writing() as connection:
            segment, (name, start) = max(_segments(connection).items())
            self._tokens.append(name, start, np.concatenate(arrays))
            table.remove(connection, table.keys_of(connection, [record.page.id for record in checked]))
            for record, array in zip(checked, arrays, strict=True):
                table.insert(connection, record, segment, start, array)
                start += len(array)
            connection.execute("UPDATE segments SET rows = ? WHERE segment = ?", (start, segment))

    def delete(self, ids: Iterable[str] | None = None, *, where: Where | Filter | None = None) -> int:
        """Forget records; see the protocol."""
        named = None if ids is None else check_ids(ids)
        tree = parse(where)
        if named is None and tree is None:
            raise ConfigError("delete: give ids, or a where that says which pages; an empty one would mean all of them")
        with self._write_lock, self._catalogue.writing() as connection:
            keys = select_keys(connection, tree).tolist() if tree is not None else None
            if named is not None:
                meant = table.keys_of(connection, named)
                among = None if keys is None else set(keys)
                keys = [key for key in meant if among is None or key in among]
            assert keys is not None  # noqa: S101 - one of the two was given
            table.remove(connection, keys)
            return len(keys)

    def get(self, ids: Iterable[str], *, vectors: bool = False) -> list[Record]:
        """Give records by id; see the protocol."""
        with self._catalogue.reading() as connection:
            found = list(table.by_id(connection, check_ids(ids), vectors=vectors))
            if not vectors:
                return [record for record, _ in found]
            segments = _segments(connection)
            return [self._with_vectors(record, place, segments) for record, place in found if place is not None]

    def search(
        self,
        queries: Sequence[MultiVector | ArrayLike],
        k: int,
        *,
        where: Where | Filter | None = None,
        exact: bool = False,
        group_by: GroupBy | None = None,
    ) -> list[list[Match]]:
        """Find the ``k`` best records for each query; see the protocol. Every search is exact, whatever ``exact``."""
        wanted = check_search(k, group_by)
        tree = parse(where)
        if len(queries) == 0:
            return []
        packed = PackedEmbeddings.pack(queries)
        if packed.dim != self._info.dim:
            raise DimensionError(f"{self.location}: query", expected=self._info.dim, actual=packed.dim)
        with self._catalogue.reading() as connection:
            connection, extents = self._catalogue.extents(connection)
            if tree is not None:
                keys = select_keys(connection, tree)
                extents = extents.take(np.searchsorted(extents.keys, keys))
            if not len(extents.keys):
                return [[] for _ in queries]
            segments = _segments(connection)
            turn = max(1, _MAX_SCORES // len(extents.keys))
            found: list[list[Match]] = []
            for first in range(0, len(packed), turn):
                some = PackedEmbeddings.pack([packed[i] for i in range(first, min(first + turn, len(packed)))])
                for scores in self._scan(some, extents, segments):
                    found.append(_best(connection, extents, scores, wanted, group_by))
            return found

    def ids(self, where: Where | Filter | None = None) -> list[str]:
        """Give ids in code point order; see the protocol."""
        tree = parse(where)
        with self._catalogue.reading() as connection:
            if tree is None:
                return [row[0] for row in connection.execute("SELECT id FROM pages ORDER BY id")]
            keys = select_keys(connection, tree).tolist()
            return sorted(_name(connection, key)[0] for key in keys)

    def images(self, among: Iterable[str] | None = None) -> set[str]:
        """Give the image references records hold; see the protocol."""
        with self._catalogue.reading() as connection:
            if among is None:
                return {row[0] for row in connection.execute("SELECT image FROM pages WHERE image IS NOT NULL")}
            sql = "SELECT 1 FROM pages WHERE image = ?"
            return {item for item in set(among) if connection.execute(sql, (item,)).fetchone()}

    def __len__(self) -> int:
        """Count the records."""
        with self._catalogue.reading() as connection:
            return int(connection.execute("SELECT count(*) FROM pages").fetchone()[0])

    def __contains__(self, id: object) -> bool:
        """Whether there is a record with this id."""
        with self._catalogue.reading() as connection:
            return isinstance(id, str) and bool(table.keys_of(connection, [id]))

    def close(self) -> None:
        """Let go of the files and of the right to write; calls under way finish first or fail cleanly."""
        with self._write_lock:
            self._finalizer()

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def __repr__(self) -> str:
        """Name the folder."""
        return f"EmbeddedStore({self.location!r}{', read_only=True' if self._read_only else ''})"

    def _read_info(self) -> EncoderInfo:
        with self._catalogue.reading() as connection:
            stored, token_type = connection.execute("SELECT info, token_type FROM state").fetchone()
        if token_type != ROW_TYPE.str:
            raise StoreError(
                f"{self._folder}: token embeddings of type {token_type!r}; this release reads {ROW_TYPE.str!r}"
            )
        return EncoderInfo.from_dict(json.loads(stored))

    @contextlib.contextmanager
    def _undoing_tokens(self) -> Iterator[None]:
        """Be the only thread that writes, and cut off what was appended when it does not come to a commit."""
        with self._write_lock:
            try:
                yield
            except BaseException:
                with contextlib.suppress(Exception):  # the error that brought us here says more
                    if not self._read_only:
                        with self._catalogue.reading() as connection:
                            for name, rows in _segments(connection).values():
                                self._tokens.truncate(name, rows)
                raise

    def _scan(self, queries: PackedEmbeddings, extents: Extents, segments: dict[int, tuple[str, int]]) -> Float32:
        """Score every page of ``extents`` against every query: float32 (n_queries, n_pages)."""
        scores = np.empty((len(queries), len(extents.keys)), dtype=np.float32)
        for segment, (name, committed) in segments.items():
            inside = np.flatnonzero(extents.segments == segment)
            if not len(inside):
                continue
            mapped = self._tokens.rows(name, committed)
            for part, packed in chunks(mapped, extents.starts[inside], extents.rows[inside]):
                scores[:, inside[part]] = maxsim(queries, packed, kernel=self._kernel or default_kernel())
        return scores

    def _with_vectors(self, record: Record, place: table.Place, segments: dict[int, tuple[str, int]]) -> Record:
        name, committed = segments[place.segment]
        stored: Float16 = self._tokens.rows(name, committed)[place.start : place.start + place.rows]
        if zlib.crc32(stored.tobytes()) != place.crc32:
            raise StoreError(
                f"{self._folder / name}: the token embeddings of {record.page.id!r} are not what was written (their "
                "checksum differs): the disk or a copy of the folder is at fault; add the page again"
            )
        return Record(record.page, table.multi_vector(stored, place), record.image)


def _make_room(folder: Path, info: EncoderInfo | None) -> None:
    """Make sure that a store is there, or that one may be made there."""
    if (folder / FILE_NAME).exists():
        return
    try:
        entries = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    except OSError as exc:
        raise StoreError(f"{folder}: cannot be opened as a folder: {exc.strerror}") from exc
    own = ("writer.lock", FIRST_SEGMENT, f"{FILE_NAME}.new")  # of a creation that was killed
    foreign = [name for name in entries if not name.startswith(own)]
    if foreign:
        raise StoreError(f"{folder}: not an index, and not empty (it holds {foreign[0]!r}); give a new or empty folder")
    if FIRST_SEGMENT in entries and (folder / FIRST_SEGMENT).stat().st_size:
        raise StoreError(f"{folder}: it holds token embeddings, but {FILE_NAME!r} is missing")
    if info is None:
        raise StoreError(f"{folder}: no index there; to make one, say what encodes its pages (encoder= or info=)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StoreError(f"{folder}: cannot be made: {exc.strerror}") from exc


def _segments(connection: Connection) -> dict[int, tuple[str, int]]:
    """Token files by segment: name and committed rows."""
    return {row[0]: (row[1], row[2]) for row in connection.execute("SELECT segment, name, rows FROM segments")}


def _name(connection: Connection, key: int) -> tuple[str, str]:
    found: tuple[str, str] = connection.execute("SELECT id, source FROM pages WHERE key = ?", (key,)).fetchone()
    return found


def _best(
    connection: Connection, extents: Extents, scores: NDArray[np.float32], k: int, group_by: GroupBy | None
) -> list[Match]:
    """Pick the ``k`` highest scores, equal ones by id, looking names up only for those that may be among them."""
    total = len(scores)
    looked_at = k if group_by is None else 4 * k
    while True:
        looked_at = min(looked_at, total)
        least = np.partition(scores, total - looked_at)[total - looked_at]
        at_least = np.flatnonzero(scores >= least)
        named = ((-float(scores[i]), *_name(connection, int(extents.keys[i])), int(extents.keys[i])) for i in at_least)
        picked: dict[str, tuple[float, int]] = {}
        for negative, page_id, source, key in sorted(named):
            group = page_id if group_by is None else f"source {source}" if source else f"id {page_id}"
            if group not in picked:
                picked[group] = (-negative, key)
            if len(picked) == k:
                break
        if len(picked) == k or len(at_least) == total:
            return [Match(table.by_key(connection, key), score) for score, key in picked.values()]
        looked_at *= 4
