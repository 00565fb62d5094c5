"""The embedded store's catalogue: one SQLite file that says what is committed, and nothing is committed elsewhere.

Write-ahead log, ``synchronous=FULL``: a transaction that returned is on disk, readers in other processes each see one
consistent state, and a process killed at any moment leaves the state of the last commit.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from colqwen3_retrievers.errors import ColQwen3Error, StoreError, StoreUnavailableError
from colqwen3_retrievers.stores.token_files import sync_folder
from colqwen3_retrievers.stores.where import Filter
from colqwen3_retrievers.stores.where_sql import compile_filter, register

FILE_NAME: Final = "catalogue.sqlite"
APPLICATION_ID: Final = 0x43513352  # "CQ3R", in the header of the file
FORMAT_VERSION: Final = 1

_BUSY_SECONDS = 30.0
_WAL_KEPT_BYTES = 64 * 2**20

SCHEMA: Final = """
-- one row: what made the multi-vectors, a counter of commits, and one of rearrangements (both only grow)
CREATE TABLE state (only INTEGER PRIMARY KEY CHECK (only = 1), info TEXT NOT NULL, token_type TEXT NOT NULL,
    generation INTEGER NOT NULL, layout INTEGER NOT NULL);
-- token files; rows are the committed ones, the file may be longer
CREATE TABLE segments (segment INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, rows INTEGER NOT NULL);
-- one row a page, kept narrow for it is read whole when the store is opened. Keys are never used again, and pages
-- ordered by key lie in the files in that order: (segment, start) grows with key
CREATE TABLE pages (key INTEGER PRIMARY KEY AUTOINCREMENT, segment INTEGER NOT NULL REFERENCES segments,
    start INTEGER NOT NULL, rows INTEGER NOT NULL, crc32 INTEGER NOT NULL, id TEXT NOT NULL UNIQUE,
    source TEXT NOT NULL, number INTEGER NOT NULL, label TEXT, sha256 TEXT NOT NULL, image TEXT);
CREATE INDEX pages_source ON pages (source, number);
CREATE INDEX pages_sha256 ON pages (sha256);
CREATE INDEX pages_image ON pages (image) WHERE image IS NOT NULL;
-- what is read only for the pages asked for; shape is JSON: slices, grid and token strings; clusters are int32
CREATE TABLE contents (key INTEGER PRIMARY KEY REFERENCES pages ON DELETE CASCADE, metadata TEXT NOT NULL,
    text TEXT NOT NULL, shape TEXT NOT NULL, clusters BLOB);
-- metadata laid flat for filters, see where_sql
CREATE TABLE facts (key INTEGER NOT NULL REFERENCES pages ON DELETE CASCADE, name TEXT NOT NULL, kind TEXT NOT NULL,
    value, place INTEGER NOT NULL, PRIMARY KEY (key, name, place)) WITHOUT ROWID;
CREATE INDEX facts_value ON facts (name, kind, value);
-- pages that were there once: what open readers must forget, and what a compaction may drop
CREATE TABLE tombstones (key INTEGER PRIMARY KEY, generation INTEGER NOT NULL, segment INTEGER NOT NULL,
    start INTEGER NOT NULL, rows INTEGER NOT NULL);
CREATE INDEX tombstones_generation ON tombstones (generation);
"""

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Extents:
    """Where the committed pages of one generation lie, in the order of their keys: int64 arrays of one length."""

    generation: int
    layout: int
    keys: Int64
    segments: Int64
    starts: Int64
    rows: Int64

    def take(self, index: Int64) -> Extents:
        """Give the pages at these positions."""
        taken = (array[index] for array in (self.keys, self.segments, self.starts, self.rows))
        return Extents(self.generation, self.layout, *taken)


class Catalogue:
    """Connections to one catalogue: one for writing, and as many for reading as there are threads at once.

    Args:
        folder: the index folder; the catalogue in it must exist.
        read_only: whether nothing may be written, not even by others on its behalf.

    Raises:
        StoreError: not a catalogue of ours, or of a format this version does not know.
    """

    def __init__(self, folder: Path, *, read_only: bool) -> None:
        self._folder = folder
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._extents: Extents | None = None
        self._closed = False
        self._immutable = False
        self._writer: sqlite3.Connection | None = None
        with self._mapped():
            connection = self._connect("mode=ro")
            try:
                version = _version(connection, folder)
            except (sqlite3.OperationalError, StoreError) as exc:
                connection.close()
                if isinstance(exc, StoreError):
                    raise
                if not read_only or os.access(folder, os.W_OK) or _has_log(folder):
                    raise
                self._immutable = True  # a folder on read-only ground: nobody writes there, so no lock is needed
                connection = self._connect("mode=ro&immutable=1")
                version = _version(connection, folder)
            self._idle.append(connection)
            if version != FORMAT_VERSION:
                self.close()
                raise StoreError(f"{folder}: format version {version}; this release reads version {FORMAT_VERSION}")
            if not read_only:
                self._writer = self._connect("mode=rw")
                self._writer.execute("PRAGMA synchronous = FULL")
                self._writer.execute("PRAGMA foreign_keys = ON")
                self._writer.execute(f"PRAGMA journal_size_limit = {_WAL_KEPT_BYTES}")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection inside a read transaction: everything read through it is of one moment.

        Raises:
            StoreError: closed, used after a fork, or SQLite's own errors.
        """
        with self._mapped():
            connection = self._borrow()
            try:
                connection.execute("BEGIN")
                yield connection
            finally:
                if connection.in_transaction:
                    connection.rollback()
                with self._lock:
                    if self._closed:
                        connection.close()
                    else:
                        self._idle.append(connection)

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Lend the writing connection inside a transaction, committed at the end or undone on any error.

        The caller makes sure that there is one at a time.
        """
        with self._mapped():
            self._check_open()
            if self._writer is None:
                raise StoreError(f"{self._folder}: opened with read_only=True")
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                self._writer.execute("UPDATE state SET generation = generation + 1")
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._writer.rollback()
                raise

    def extents(self, connection: sqlite3.Connection) -> tuple[sqlite3.Connection, Extents]:
        """Give where the pages lie, as of the connection's transaction or a later one.

        What changed since the last call is read, and all of it only the first time.

        Args:
            connection: of :meth:`reading`; its transaction is begun anew when another thread already knows a later
                state, before anything was read through it.
        """
        with self._lock:
            known = self._extents
        generation, layout = _state(connection)
        while known is not None and generation < known.generation:
            connection.rollback()
            connection.execute("BEGIN")
            generation, layout = _state(connection)
        if known is not None and (generation, layout) == (known.generation, known.layout):
            return connection, known
        fresh = _read_extents(connection, known if known is not None and known.layout == layout else None)
        with self._lock:
            if self._extents is None or self._extents.generation < fresh.generation:
                self._extents = fresh
        return connection, fresh

    def close(self) -> None:
        """Close the connections that are not lent out; those are closed when they come back."""
        if os.getpid() != self._pid:
            return  # the parent's connections, and a lock that a thread of the parent may hold for ever
        with self._lock:
            self._closed = True
            connections, self._idle = self._idle, []
        if self._writer is not None:
            connections.append(self._writer)
        for connection in connections:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def _borrow(self) -> sqlite3.Connection:
        self._check_open()
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._connect("mode=ro&immutable=1" if self._immutable else "mode=ro")

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"{self._folder}: the index is closed")
        if os.getpid() != self._pid:
            raise StoreError(f"{self._folder}: opened before a fork; open it again in the new process")

    def _connect(self, mode: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{(self._folder / FILE_NAME).absolute().as_uri()}?{mode}",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,  # lent to one thread at a time
        )
        connection.text_factory = _text
        register(connection)
        return connection

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except ColQwen3Error:
            raise
        except sqlite3.OperationalError as exc:
            kind = StoreUnavailableError if "locked" in str(exc) else StoreError
            raise kind(f"{self._folder / FILE_NAME}: {exc}") from exc
        except sqlite3.Error as exc:
            raise StoreError(f"{self._folder / FILE_NAME}: {exc}") from exc


def create(folder: Path, info: str, token_type: str, segment: str) -> None:
    """Make the catalogue of a new index: whole under another name first, so that a half-made one is never met.

    Args:
        folder: where; the caller holds the writer's lock.
        info: the encoder info as JSON.
        token_type: dtype of the token files.
        segment: name of the first token file.

    Raises:
        StoreError: it cannot be written.
    """
    path = folder / f"{FILE_NAME}.new"
    try:
        for leftover in folder.glob(f"{FILE_NAME}.new*"):
            leftover.unlink()
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
            connection.executescript(f"BEGIN; {SCHEMA} COMMIT;")
            connection.execute("INSERT INTO state VALUES (1, ?, ?, 0, 0)", (info, token_type))
            connection.execute("INSERT INTO segments VALUES (1, ?, 0)", (segment,))
        path.replace(folder / FILE_NAME)
        sync_folder(folder)
    except (OSError, sqlite3.Error) as exc:
        raise StoreError(f"{folder}: no index can be made here: {exc}") from exc


def select_keys(connection: sqlite3.Connection, tree: Filter | None) -> Int64:
    """Give the keys of the pages a filter holds for, in order."""
    condition, parameters = compile_filter(tree)
    found = connection.execute(f"SELECT p.key FROM pages AS p WHERE {condition} ORDER BY p.key", parameters)  # noqa: S608 - compile_filter binds every name and value
    return np.fromiter((row[0] for row in found), dtype=np.int64)


def _read_extents(connection: sqlite3.Connection, known: Extents | None) -> Extents:
    generation, layout = _state(connection)
    after = int(known.keys[-1]) if known is not None and len(known.keys) else 0
    new = connection.execute("SELECT key, segment, start, rows FROM pages WHERE key > ? ORDER BY key", (after,))
    columns = np.array(new.fetchall(), dtype=np.int64).reshape(-1, 4).T
    if known is None:
        extents = Extents(generation, layout, *(np.ascontiguousarray(column) for column in columns))
    else:
        gone = connection.execute("SELECT key FROM tombstones WHERE generation > ?", (known.generation,)).fetchall()
        keep = ~np.isin(known.keys, np.array(gone, dtype=np.int64).ravel())
        old = (known.keys[keep], known.segments[keep], known.starts[keep], known.rows[keep])
        joined = (np.concatenate(pair) for pair in zip(old, columns, strict=True))
        extents = Extents(generation, layout, *joined)
    return extents


def _state(connection: sqlite3.Connection) -> tuple[int, int]:
    generation, layout = connection.execute("SELECT generation, layout FROM state").fetchone()
    return generation, layout


def _version(connection: sqlite3.Connection, folder: Path) -> int:
    """Read the format version; the first thing read from a file that may be anything."""
    try:
        (mark,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as exc:
        raise StoreError(f"{folder / FILE_NAME}: not a catalogue of token embeddings: {exc}") from exc
    if mark != APPLICATION_ID:
        raise StoreError(f"{folder / FILE_NAME}: not a catalogue of token embeddings")
    return int(version)


def _has_log(folder: Path) -> bool:
    log = folder / f"{FILE_NAME}-wal"
    return log.exists() and log.stat().st_size > 0


def _text(raw: bytes) -> Any:
    return raw.decode("utf-8", "surrogatepass")
