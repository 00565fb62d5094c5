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

from colqwen3_retrievers.errors import ColQwen3Error, StoreError, StoreUnavailableError
from colqwen3_retrievers.stores.embedded.extents import Extents, Int64, read_extents, read_state
from colqwen3_retrievers.stores.embedded.filters import compile_filter, register
from colqwen3_retrievers.stores.embedded.row_files import sync_folder
from colqwen3_retrievers.stores.embedded.schema import (
    APPLICATION_ID,
    FORMAT_VERSION,
    READABLE_VERSIONS,
    SCHEMA,
    migrate,
    view_as_current,
)
from colqwen3_retrievers.stores.where import Filter

FILE_NAME: Final = "catalogue.sqlite"

_BUSY_SECONDS = 30.0
_WAL_KEPT_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Segment:
    """A token file and the code file beside it: names, and how much of them is committed.

    ``dead`` counts the token rows that no page has; ``codes`` is empty where there is no code file.
    """

    number: int
    name: str
    rows: int
    dead: int
    codes: str
    code_rows: int


class Catalogue:
    """Connections to one catalogue: one for writing, and as many for reading as there are threads at once.

    Args:
        folder: the index folder; the catalogue in it must exist.
        read_only: whether nothing may be written, not even by others on its behalf.
        code_factor: what a catalogue of an older format is given when it is made current, as a writer makes it.

    Raises:
        StoreError: not a catalogue of ours, or of a format this version does not know.
    """

    def __init__(self, folder: Path, *, read_only: bool, code_factor: int = 3) -> None:
        self._folder = folder
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._extents: Extents | None = None
        self._closed = False
        self._immutable = False
        self._version = FORMAT_VERSION
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
            if version not in READABLE_VERSIONS:
                connection.close()
                known = " and ".join(map(str, READABLE_VERSIONS))
                raise StoreError(f"{folder}: format version {version}; this release reads versions {known}")
            if not read_only:
                self._writer = self._connect("mode=rw")
                self._writer.execute("PRAGMA synchronous = FULL")
                self._writer.execute("PRAGMA foreign_keys = ON")
                self._writer.execute(f"PRAGMA journal_size_limit = {_WAL_KEPT_BYTES}")
                if version != FORMAT_VERSION:
                    migrate(self._writer, version, code_factor)
            elif version != FORMAT_VERSION:
                self._version = version
                view_as_current(connection, version)
            self._idle.append(connection)

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
        generation, layout = read_state(connection)
        while known is not None and generation < known.generation:
            connection.rollback()
            connection.execute("BEGIN")
            generation, layout = read_state(connection)
        if known is not None and (generation, layout) == (known.generation, known.layout):
            return connection, known
        fresh = read_extents(connection, known if known is not None and known.layout == layout else None)
        with self._lock:
            if self._extents is None or self._extents.generation < fresh.generation:
                self._extents = fresh
        return connection, fresh

    def vacuum(self) -> None:
        """Give back the room that deleted rows left in the file, where it is a quarter or more. Only between writes.

        Raises:
            StoreError: the disk has no room for a second copy.
        """
        with self._mapped():
            self._check_open()
            assert self._writer is not None  # noqa: S101 - the caller may write
            (free,) = self._writer.execute("PRAGMA freelist_count").fetchone()
            (pages,) = self._writer.execute("PRAGMA page_count").fetchone()
            if 4 * free >= pages:
                self._writer.execute("VACUUM")
            self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)")  # others would wait for all readers to be gone

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
        if self._version != FORMAT_VERSION:
            view_as_current(connection, self._version)
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


def create(folder: Path, info: str, token_type: str, names: tuple[str, str], code: tuple[int, int]) -> None:
    """Make the catalogue of a new index: whole under another name first, so that a half-made one is never met.

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
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
            connection.executescript(f"BEGIN; {SCHEMA} COMMIT;")
            connection.execute("INSERT INTO state VALUES (1, ?, ?, 0, 0, ?, ?)", (info, token_type, *code))
            connection.execute("INSERT INTO segments (segment, name, rows, codes) VALUES (1, ?, 0, ?)", names)
        path.replace(folder / FILE_NAME)
        sync_folder(folder)
    except (OSError, sqlite3.Error) as exc:
        raise StoreError(f"{folder}: no index can be made here: {exc}") from exc


def select_keys(connection: sqlite3.Connection, tree: Filter | None) -> Int64:
    """Give the keys of the pages a filter holds for, in order."""
    condition, parameters = compile_filter(tree)
    found = connection.execute(f"SELECT p.key FROM pages AS p WHERE {condition} ORDER BY p.key", parameters)  # noqa: S608 - compile_filter binds every name and value
    return np.fromiter((row[0] for row in found), dtype=np.int64)


def read_segments(connection: sqlite3.Connection) -> dict[int, Segment]:
    """Give the segments by number, in order."""
    found = connection.execute("SELECT segment, name, rows, dead, codes, code_rows FROM segments ORDER BY segment")
    return {row[0]: Segment(*row) for row in found}


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
