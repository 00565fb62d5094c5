"""Multi-vectors on disk by key: one SQLite file, bounded in bytes, for any number of threads and processes."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from colqwen3_retrievers.errors import StoreError
from colqwen3_retrievers.fork import ForkSafeLock, after_fork, before_fork, inherited, no_fork
from colqwen3_retrievers.vectors.multi_vector import MultiVector

T = TypeVar("T")

FILE_NAME: Final = "embeddings.sqlite"
"""The file in a cache's folder."""

VERSION: Final = 1
"""Of the file's format; ``PRAGMA user_version``."""

_APPLICATION: Final = 0x43513343  # "CQ3C"
_MOST_NAMES: Final = 100_000  # file digests remembered, 150 bytes each
_SCHEMA: Final = """
CREATE TABLE entries (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, used INTEGER NOT NULL, size INTEGER NOT NULL
);
CREATE INDEX entries_used ON entries (used, size);
CREATE TABLE contents (
    number INTEGER PRIMARY KEY REFERENCES entries (number) ON DELETE CASCADE,
    crc32 INTEGER NOT NULL, layout TEXT NOT NULL, vectors BLOB NOT NULL
);
CREATE TABLE names (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, content TEXT NOT NULL);
"""
_log = logging.getLogger("colqwen3_retrievers.cache")


class DiskCache:
    """Multi-vectors by key; the least recently used are evicted beyond a number of bytes.

    Token embeddings are kept as float32, so that they come back bit by bit. Each entry has a checksum; a damaged one is
    deleted and counts as unknown. A fault of the disk during use (full, gone, locked for half a minute by another) is
    logged, and the entry counts as unknown or is not kept: work goes on without the cache.

    Args:
        folder: created if it does not exist; on a local disk, for SQLite's locks.
        max_bytes: most bytes of token embeddings. Each process keeps to its own bound.

    Raises:
        StoreError: the folder cannot be used, or its file is damaged, another program's, or of a later format.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> cache = DiskCache(Path(folder.name), max_bytes=2**20)
    >>> cache.put("a", MultiVector(np.eye(2, dtype=np.float32)))
    >>> cache.get("a").vectors.tolist(), cache.get("b"), len(cache), cache.nbytes
    ([[1.0, 0.0], [0.0, 1.0]], None, 1, 16)
    >>> cache.close(); folder.cleanup()
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.file = folder / FILE_NAME
        self.max_bytes = max_bytes
        self._lock = ForkSafeLock(delays_fork=True)
        self._connections: list[sqlite3.Connection] = []  # one at most; none before its first use after a fork
        self._finalizer = weakref.finalize(self, _close, self._connections)
        before_fork(self._close_before_fork)
        after_fork(self._forget_parent)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise StoreError(f"{folder}: no cache can be created there: {exc.strerror or exc}") from exc
        with self._lock:
            self._open()
        self._write(self._evict)  # the bound may be smaller than that of the process before

    def get(self, key: str) -> MultiVector | None:
        """Return the multi-vector of a key, or None."""

        def read(connection: sqlite3.Connection) -> MultiVector | None:
            sql = "SELECT number, crc32, layout, vectors FROM entries JOIN contents USING (number) WHERE key = ?"
            row = connection.execute(sql, (key,)).fetchone()
            if row is None:
                return None
            try:
                multi_vector = _restored(*row[1:])
            except (ValueError, KeyError, TypeError) as exc:
                _log.warning("%s: an entry is damaged and deleted: %s", self.file, exc)
                connection.execute("DELETE FROM entries WHERE number = ?", row[:1])
                return None
            newest = "(SELECT max(used) FROM entries)"
            sql = f"UPDATE entries SET used = {newest} + 1 WHERE number = ? AND used < {newest}"  # noqa: S608 - a constant
            try:
                connection.execute(sql, row[:1])
            except sqlite3.Error as exc:  # a full disk can be read
                _log.warning("%s: an entry could not be marked as used: %s", self.file, exc)
            return multi_vector

        return self._attempt("read", read, None)

    def put(self, key: str, multi_vector: MultiVector) -> None:
        """Keep a multi-vector, unless the key has one already or it is larger than the bound by itself."""
        size = nbytes_of(multi_vector)
        if size > self.max_bytes:
            return
        row = _parts(multi_vector)

        def insert(connection: sqlite3.Connection) -> None:
            sql = "INSERT OR IGNORE INTO entries (key, used, size) SELECT ?, ifnull(max(used), 0) + 1, ? FROM entries"
            entry = connection.execute(sql, (key, size))
            if entry.rowcount:
                connection.execute("INSERT INTO contents VALUES (?, ?, ?, ?)", (entry.lastrowid, *row))
                self._evict(connection)

        self._write(insert)

    def content_of(self, name: str) -> str | None:
        """Return the content that :meth:`put_name` stored for a name, or None."""
        content: str | None = self._value("SELECT content FROM names WHERE name = ?", name)
        return content

    def put_name(self, name: str, content: str) -> None:
        """Keep the content a name stands for; of more than 100,000 names the oldest are deleted."""

        def insert(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO names (name, content) VALUES (?, ?)", (name, content))
            oldest = "(SELECT max(number) FROM names) - ?"
            connection.execute(f"DELETE FROM names WHERE number <= {oldest}", (_MOST_NAMES,))  # noqa: S608 - a constant

        self._write(insert)

    @property
    def nbytes(self) -> int:
        """Bytes of the token embeddings kept now, by all processes."""
        return self._value("SELECT ifnull(sum(size), 0) FROM entries") or 0

    def __len__(self) -> int:
        """Return the number of entries."""
        return self._value("SELECT count(*) FROM entries") or 0

    def clear(self) -> None:
        """Delete all entries, and free their space on the disk."""

        def delete(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM entries")
            connection.execute("DELETE FROM names")

        self._write(delete)
        self._attempt("written", lambda connection: connection.execute("VACUUM"), None)

    def close(self) -> None:
        """Close the file. A second call does nothing, and :meth:`get` returns None from then on."""
        with self._lock:
            self._finalizer()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            connection = sqlite3.connect(self.file, timeout=30, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as exc:
            raise StoreError(f"{self.file}: the cache cannot be opened: {exc}") from exc
        try:
            self._prepare(connection)
        except sqlite3.Error as exc:
            connection.close()
            remedy = "" if isinstance(exc, sqlite3.OperationalError) else "; delete it to start with an empty cache"
            raise StoreError(f"{self.file}: the cache cannot be used: {exc}{remedy}") from exc
        except BaseException:
            connection.close()
            raise
        self._connections.append(connection)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        self._check(connection)  # before anything of a file that is not ours is changed
        connection.execute("PRAGMA page_size = 16384")  # of a new file: a page's embeddings are a megabyte
        _keep_write_ahead_log(connection)
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = NORMAL")  # a power cut takes the last entries, never the file
        connection.execute("PRAGMA journal_size_limit = 16777216")
        with _transaction(connection):  # half a schema would look like another program's
            if not self._check(connection):  # two processes may come to a new folder at once
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(f"PRAGMA user_version = {VERSION}")

    def _check(self, connection: sqlite3.Connection) -> bool:
        """Return whether the file holds a cache; False for a new one."""
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if tables and application != _APPLICATION:
            raise StoreError(f"{self.file}: another program's database, not a cache of embeddings")
        if version > VERSION:
            raise StoreError(f"{self.file}: format {version} of a later release; this one knows {VERSION}")
        return bool(tables)

    def _attempt(self, action: str, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """Return what ``work`` returns; after an error of the disk, which is logged, ``otherwise``."""
        with self._lock:
            if not self._finalizer.alive:
                return otherwise
            if not self._connections:
                self._open()
            try:
                return work(self._connections[0])
            except sqlite3.Error as exc:
                _log.warning("%s: the cache could not be %s: %s", self.file, action, exc)
                return otherwise

    def _close_before_fork(self) -> None:
        _close(self._connections)

    def _forget_parent(self) -> None:
        if no_fork.torn:  # SQLite may be in the middle of a call: the child goes without the cache
            inherited.extend(self._connections)
            self._finalizer.detach()

    def _write(self, work: Callable[[sqlite3.Connection], None]) -> None:
        def whole(connection: sqlite3.Connection) -> None:
            with _transaction(connection):
                work(connection)

        self._attempt("written", whole, None)

    def _value(self, sql: str, *values: str) -> Any:
        row = self._attempt("read", lambda connection: connection.execute(sql, values).fetchone(), None)
        return None if row is None else row[0]

    def _evict(self, connection: sqlite3.Connection) -> None:
        """Delete the least recently used entries beyond the bound."""
        (excess,) = connection.execute("SELECT ifnull(sum(size), 0) - ? FROM entries", (self.max_bytes,)).fetchone()
        if excess <= 0:
            return
        numbers = []
        for number, size in connection.execute("SELECT number, size FROM entries ORDER BY used"):
            numbers.append((number,))
            excess -= size
            if excess <= 0:
                break
        connection.executemany("DELETE FROM entries WHERE number = ?", numbers)


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    with connection:  # commits, or rolls back after an error
        yield


def nbytes_of(multi_vector: MultiVector) -> int:
    """Return the bytes of a multi-vector's token embeddings and clusters.

    >>> nbytes_of(MultiVector(np.eye(2, dtype=np.float32)))
    16
    """
    clusters = multi_vector.clusters
    return int(multi_vector.vectors.nbytes) + (0 if clusters is None else int(clusters.nbytes))


def _keep_write_ahead_log(connection: sqlite3.Connection, patience: float = 30.0) -> None:
    """Set the journal's mode; SQLite does not wait for its turn here, whatever its timeout: several open a new file."""
    deadline = time.monotonic() + patience
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as exc:
            if "locked" not in str(exc) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _close(connections: list[sqlite3.Connection]) -> None:
    while connections:
        connections.pop().close()


def _parts(multi_vector: MultiVector) -> tuple[int, str, bytes]:
    """Return a multi-vector as plain data: checksum, layout, token embeddings."""
    layout = json.dumps({"rows": multi_vector.vectors.shape, **multi_vector.layout()})
    vectors = np.ascontiguousarray(multi_vector.vectors, dtype="<f4").tobytes()
    return _checksum(layout, vectors), layout, vectors


def _restored(crc32: int, text: str, vectors: bytes) -> MultiVector:
    if _checksum(text, vectors) != crc32:
        raise ValueError("its checksum differs")
    layout: dict[str, Any] = json.loads(text)
    rows = np.frombuffer(vectors, dtype="<f4").reshape(layout["rows"])
    return MultiVector.from_layout(rows, layout)


def _checksum(layout: str, vectors: bytes) -> int:
    return zlib.crc32(vectors, zlib.crc32(layout.encode()))
