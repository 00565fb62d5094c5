"""The embedded store's catalogue: one SQLite file that records what is committed.

It uses a write-ahead log with ``synchronous=FULL``: a transaction that returned is on disk, each reader in any process
sees one consistent state, and a process killed at any moment leaves the state of the last commit.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from colqwen3_retrievers.errors import ColQwen3Error, StoreError, StoreUnavailableError
from colqwen3_retrievers.fork import ForkSafeLock, after_fork, before_fork, inherited, no_fork
from colqwen3_retrievers.stores.embedded.filters import compile_filter, register
from colqwen3_retrievers.stores.embedded.row_files import sync_folder
from colqwen3_retrievers.stores.where import Filter

FILE_NAME: Final = "catalogue.sqlite"
APPLICATION_ID: Final = 0x43513352  # "CQ3R", in the header of the file
FORMAT_VERSION: Final = 1

SCHEMA: Final = """
-- one row: the encoder info, a counter of commits and one of rearrangements (both only grow), the number of tokens for
-- each row of a page's code, and the bits of a component of it
CREATE TABLE state (only INTEGER PRIMARY KEY CHECK (only = 1), info TEXT NOT NULL, token_type TEXT NOT NULL,
    generation INTEGER NOT NULL, layout INTEGER NOT NULL, code_factor INTEGER NOT NULL, code_bits INTEGER NOT NULL);
-- token files with their code files; rows are the committed ones (a file may be longer), dead are the token rows of
-- replaced and deleted pages
CREATE TABLE segments (segment INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, rows INTEGER NOT NULL,
    dead INTEGER NOT NULL, codes TEXT NOT NULL, code_rows INTEGER NOT NULL);
-- one row a page, narrow because the first search reads the whole table. Keys are never reused, and pages ordered by
-- key are stored in that order: (segment, start) grows with key
CREATE TABLE pages (key INTEGER PRIMARY KEY AUTOINCREMENT, segment INTEGER NOT NULL REFERENCES segments,
    start INTEGER NOT NULL, rows INTEGER NOT NULL, crc32 INTEGER NOT NULL, id TEXT NOT NULL UNIQUE,
    source TEXT NOT NULL, number INTEGER NOT NULL, label TEXT, sha256 TEXT NOT NULL, image TEXT,
    code_start INTEGER NOT NULL, code_rows INTEGER NOT NULL, code_scale REAL NOT NULL, code_crc32 INTEGER NOT NULL);
CREATE INDEX pages_source ON pages (source, number);
CREATE INDEX pages_sha256 ON pages (sha256);
CREATE INDEX pages_image ON pages (image) WHERE image IS NOT NULL;
-- what is read only for requested pages; shape is MultiVector.layout() as JSON; crc32 covers everything recorded about
-- the page
CREATE TABLE contents (key INTEGER PRIMARY KEY REFERENCES pages ON DELETE CASCADE, metadata TEXT NOT NULL,
    text TEXT NOT NULL, shape TEXT NOT NULL, crc32 INTEGER NOT NULL);
-- flattened metadata for filters, see filters.fact_rows
CREATE TABLE facts (key INTEGER NOT NULL REFERENCES pages ON DELETE CASCADE, name TEXT NOT NULL, kind TEXT NOT NULL,
    value, place INTEGER NOT NULL, PRIMARY KEY (key, name, place)) WITHOUT ROWID;
CREATE INDEX facts_value ON facts (name, kind, value);
-- removed pages, which open readers must drop
CREATE TABLE tombstones (key INTEGER PRIMARY KEY, generation INTEGER NOT NULL, segment INTEGER NOT NULL);
CREATE INDEX tombstones_generation ON tombstones (generation);
"""

_BUSY_SECONDS = 30.0
_WAL_BYTES = 64 * 2**20
_ROWS_AT_ONCE = 1 << 16

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segment:
    """A token file and its code file: names, and how much of them is committed.

    ``dead`` counts the token rows that belong to no page.
    """

    number: int
    name: str
    rows: int
    dead: int
    codes: str
    code_rows: int


@dataclass(frozen=True, slots=True, eq=False)
class Extents:
    """Where the pages of a generation are stored, as arrays ordered by key.

    All are int64 but ``code_scales``, which is float64.
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

    def take(self, index: NDArray[np.intp]) -> Extents:
        """Return the pages at these positions."""
        return Extents(self.generation, self.layout, *(getattr(self, name)[index] for name in _COLUMNS))


_COLUMNS: Final = tuple(item.name for item in fields(Extents))[2:]
_SELECTED: Final = "key, segment, start, rows, crc32, code_start, code_rows, code_crc32, code_scale"


class Catalogue:
    """Connections to one catalogue: one for writing, one for each reading thread.

    SQLite keeps a table of the locks that a process has, and a forked child would take its parent's for its own: it
    would read without any. So all connections are closed before a fork, and opened again when they are needed. The
    child only reads.

    Args:
        folder: the index folder; the catalogue in it must exist.
        read_only: whether to open no connection for writing.

    Raises:
        StoreError: not a catalogue of this library, or of an unknown format version.
    """

    def __init__(self, folder: Path, *, read_only: bool) -> None:
        self._folder = folder
        self._read_only = read_only
        self._lock = ForkSafeLock()
        self._readers: list[sqlite3.Connection] = []  # not in use
        self._writers: list[sqlite3.Connection] = []  # likewise; at most one
        self._extents: Extents | None = None
        self._unusable = ""  # why it is
        self._immutable = False
        before_fork(self._close_idle)
        after_fork(self._become_reader)
        with self._mapped():
            try:
                self._readers.append(self._open_reader())
            except sqlite3.OperationalError:
                if not read_only or os.access(folder, os.W_OK) or _has_log(folder):
                    raise
                self._immutable = True  # the folder cannot be written to, by anybody, so no lock is needed
                self._readers.append(self._open_reader())
            if not read_only:
                self._writers.append(self._open_writer())

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection in a read transaction, which sees one moment.

        Raises:
            StoreError: closed, or an error of SQLite.
        """
        with self._lent(self._readers, self._open_reader) as connection:
            connection.execute("BEGIN")
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Lend the writing connection in a transaction.

        It is committed at the end, or rolled back on any error. The caller must be the only thread that writes.
        """
        with self._lent(self._writers, self._open_writer) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("UPDATE state SET generation = generation + 1")
            yield connection
            connection.execute("COMMIT")

    def extents(self, connection: sqlite3.Connection) -> Extents:
        """Return where the pages are stored, as of the transaction or later.

        The first call reads all of it, later ones what changed since.

        Args:
            connection: of :meth:`reading`, nothing read through it yet; its transaction is restarted when another
                thread has already read a later state.
        """
        with self._lock:
            previous = self._extents
        generation, layout = _read_counters(connection)
        while previous is not None and generation < previous.generation:
            connection.rollback()
            connection.execute("BEGIN")
            generation, layout = _read_counters(connection)
        if previous is not None and (generation, layout) == (previous.generation, previous.layout):
            return previous
        fresh = _read_extents(connection, previous if previous is not None and previous.layout == layout else None)
        with self._lock:
            if self._extents is None or self._extents.generation < fresh.generation:
                self._extents = fresh
        return fresh

    def vacuum(self) -> None:
        """Shrink the file when a quarter of it is free. Only between writes.

        Raises:
            StoreError: the disk has no room for a second copy.
        """
        with self._lent(self._writers, self._open_writer) as connection:
            (free,) = connection.execute("PRAGMA freelist_count").fetchone()
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            if 4 * free >= pages:
                connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")  # other modes would wait for all readers to end

    def close(self) -> None:
        """Close the connections, those lent out when they come back."""
        with no_fork:
            self._unusable = "the index is closed"
            self._close_idle()

    def _close_idle(self) -> None:
        with self._lock:
            connections = [*self._readers, *self._writers]
            self._readers.clear()
            self._writers.clear()
        for connection in connections:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def _become_reader(self) -> None:
        self._read_only = True
        if no_fork.torn and not self._unusable:
            inherited.extend([*self._readers, *self._writers])
            self._unusable = "a thread used it while this process was forked; open it after the fork"

    @contextmanager
    def _lent(
        self, idle: list[sqlite3.Connection], connect: Callable[[], sqlite3.Connection]
    ) -> Iterator[sqlite3.Connection]:
        """Lend an idle connection, or a new one; an open transaction is rolled back afterwards."""
        with self._mapped():
            with self._lock:
                if self._unusable:
                    raise StoreError(f"{self._folder}: {self._unusable}")
                connection = idle.pop() if idle else None
            connection = connection or connect()
            try:
                yield connection
            finally:
                if connection.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        connection.rollback()
                with self._lock:
                    if self._unusable:
                        connection.close()
                    else:
                        idle.append(connection)

    def _open_writer(self) -> sqlite3.Connection:
        if self._read_only:
            raise StoreError(f"{self._folder}: opened for reading only")
        connection = self._connect("mode=rw")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
        return connection

    def _open_reader(self) -> sqlite3.Connection:
        connection = self._connect("mode=ro&immutable=1" if self._immutable else "mode=ro")
        try:
            _check_format(connection, self._folder)
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect(self, mode: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{(self._folder / FILE_NAME).absolute().as_uri()}?{mode}",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,  # lent to one thread at a time
        )
        connection.text_factory = lambda raw: raw.decode("utf-8", "surrogatepass")
        register(connection)
        return connection

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            with no_fork:
                yield
        except ColQwen3Error:
            raise
        except sqlite3.OperationalError as exc:
            kind = StoreUnavailableError if "locked" in str(exc) else StoreError
            raise kind(f"{self._folder / FILE_NAME}: {exc}") from exc
        except sqlite3.Error as exc:
            raise StoreError(f"{self._folder / FILE_NAME}: {exc}") from exc


def create(folder: Path, info: str, token_type: str, names: tuple[str, str], code: tuple[int, int]) -> None:
    """Create the catalogue of a new index, which appears whole.

    Args:
        folder: where; the caller holds the writer's lock.
        info: the encoder info as JSON.
        token_type: dtype of the token files.
        names: of the first token file and the first code file.
        code: tokens for each row of a page's code, and bits of its components.

    Raises:
        StoreError: it cannot be written.
    """
    path = folder / f"{FILE_NAME}.new"
    try:
        for leftover in folder.glob(f"{FILE_NAME}.new*"):
            leftover.unlink()
        with no_fork, contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
            connection.executescript(f"BEGIN; {SCHEMA} COMMIT;")
            connection.execute("INSERT INTO state VALUES (1, ?, ?, 0, 0, ?, ?)", (info, token_type, *code))
            add_segment(connection, 1, names)
        path.replace(folder / FILE_NAME)
        sync_folder(folder)
    except (OSError, sqlite3.Error) as exc:
        raise StoreError(f"{folder}: no index can be made here: {exc}") from exc


def add_segment(connection: sqlite3.Connection, number: int, names: tuple[str, str]) -> Segment:
    """Record an empty token file and its code file, and return them as a segment."""
    connection.execute("INSERT INTO segments VALUES (?, ?, 0, 0, ?, 0)", (number, *names))
    return Segment(number, names[0], 0, 0, names[1], 0)


def select_keys(connection: sqlite3.Connection, tree: Filter | None) -> Int64:
    """Return the keys of the pages a filter holds for, ascending."""
    condition, parameters = compile_filter(tree)
    rows = connection.execute(f"SELECT p.key FROM pages AS p WHERE {condition} ORDER BY p.key", parameters)  # noqa: S608 - compile_filter binds every name and value
    return np.fromiter((row[0] for row in rows), dtype=np.int64)


def read_segments(connection: sqlite3.Connection) -> dict[int, Segment]:
    """Return the segments by number, ascending."""
    rows = connection.execute("SELECT segment, name, rows, dead, codes, code_rows FROM segments ORDER BY segment")
    return {row[0]: Segment(*row) for row in rows}


def _read_counters(connection: sqlite3.Connection) -> tuple[int, int]:
    """Return the generation, raised by writes, and the layout, by compaction."""
    generation, layout = connection.execute("SELECT generation, layout FROM state").fetchone()
    return generation, layout


def _read_extents(connection: sqlite3.Connection, previous: Extents | None) -> Extents:
    """Read where the pages are stored, only changes since a previous state."""
    generation, layout = _read_counters(connection)
    after = int(previous.keys[-1]) if previous is not None and len(previous.keys) else 0
    sql = f"SELECT {_SELECTED} FROM pages WHERE key > ? ORDER BY key"  # noqa: S608 - a constant
    cursor = connection.execute(sql, (after,))
    blocks = [np.empty((0, len(_COLUMNS)))]
    while rows := cursor.fetchmany(_ROWS_AT_ONCE):
        blocks.append(np.array(rows, dtype=np.float64))  # holds whole numbers up to 2**53
    *integers, scales = np.concatenate(blocks).T
    columns = [*(column.astype(np.int64) for column in integers), scales.copy()]
    if previous is not None:
        gone = connection.execute("SELECT key FROM tombstones WHERE generation > ?", (previous.generation,)).fetchall()
        keep = ~np.isin(previous.keys, np.array(gone, dtype=np.int64).ravel())
        columns = [
            np.concatenate([getattr(previous, name)[keep], new]) for name, new in zip(_COLUMNS, columns, strict=True)
        ]
    return Extents(generation, layout, *columns)


def _check_format(connection: sqlite3.Connection, folder: Path) -> None:
    """Check the format, the first thing read from a file that may be anything."""
    try:
        (mark,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as exc:
        raise StoreError(f"{folder / FILE_NAME}: not a catalogue of token embeddings: {exc}") from exc
    if mark != APPLICATION_ID:
        raise StoreError(f"{folder / FILE_NAME}: not a catalogue of token embeddings")
    if version != FORMAT_VERSION:
        raise StoreError(f"{folder}: format version {version}; this release reads version {FORMAT_VERSION}")


def _has_log(folder: Path) -> bool:
    log = folder / f"{FILE_NAME}-wal"
    return log.exists() and log.stat().st_size > 0
