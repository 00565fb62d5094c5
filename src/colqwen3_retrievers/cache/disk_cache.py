"""Multi-vectors on disk by key: one SQLite file, bounded in bytes, for any number of threads and processes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from colqwen3_retrievers.errors import StoreError
from colqwen3_retrievers.vectors.multi_vector import MultiVector

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
    crc32 INTEGER NOT NULL, shape TEXT NOT NULL, vectors BLOB NOT NULL, clusters BLOB
);
CREATE TABLE names (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, content TEXT NOT NULL);
"""
_log = logging.getLogger("colqwen3_retrievers.cache")
_left_behind: list[sqlite3.Connection] = []  # of a parent process: neither to be used nor closed in a forked child


class DiskCache:
    """Multi-vectors by key, the least recently used forgotten beyond a number of bytes.

    Token embeddings are kept as float32, so that what comes out is what went in, bit by bit. Each entry has a checksum;
    a damaged one is forgotten and counts as unknown. A fault of the disk while it is used (full, gone, locked for half
    a minute by another) is logged, and the entry counts as unknown or is not kept: work goes on without the cache.

    Args:
        folder: made when it is new; on a local disk, for SQLite's locks.
        max_bytes: most bytes of token embeddings. Each process keeps to its own bound.

    Raises:
        StoreError: the folder cannot be used, or its file is damaged, none of ours, or of a later format.

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
        self._lock = threading.RLock()
        self._pid = os.getpid()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise StoreError(f"{folder}: no cache can be made there: {exc.strerror or exc}") from exc
        self._open()
        self._shrink()  # a smaller bound than the last one's counts from now on

    def get(self, key: str) -> MultiVector | None:
        """Give what is kept under a key, or None."""
        with self._use("read", transaction=False) as connection:
            sql = (
                "SELECT number, crc32, shape, vectors, clusters FROM entries JOIN contents USING (number) WHERE key = ?"
            )
            row = connection.execute(sql, (key,)).fetchone()
            if row is None:
                return None
            try:
                made = _restored(*row[1:])
            except (ValueError, KeyError, TypeError) as exc:
                _log.warning("%s: an entry is damaged and forgotten: %s", self.file, exc)
                connection.execute("DELETE FROM entries WHERE number = ?", row[:1])
                return None
            newest = "(SELECT max(used) FROM entries)"
            sql = f"UPDATE entries SET used = {newest} + 1 WHERE number = ? AND used < {newest}"  # noqa: S608 - a constant
            try:
                connection.execute(sql, row[:1])
            except sqlite3.Error as exc:  # a full disk can be read
                _log.warning("%s: an entry could not be marked as used: %s", self.file, exc)
            return made
        return None

    def put(self, key: str, multi_vector: MultiVector) -> None:
        """Keep a multi-vector, unless it is larger than the bound by itself; what is there stays."""
        size = nbytes_of(multi_vector)
        if size > self.max_bytes:
            return
        row = _parts(multi_vector)
        with self._use("written") as connection:
            sql = "INSERT OR IGNORE INTO entries (key, used, size) SELECT ?, ifnull(max(used), 0) + 1, ? FROM entries"
            done = connection.execute(sql, (key, size))
            if done.rowcount:
                connection.execute("INSERT INTO contents VALUES (?, ?, ?, ?, ?)", (done.lastrowid, *row))
                self._shrink(connection)

    def content_of(self, name: str) -> str | None:
        """Give the content a name stands for, as :meth:`put_name` was told, or None."""
        with self._use("read", transaction=False) as connection:
            row = connection.execute("SELECT content FROM names WHERE name = ?", (name,)).fetchone()
            return None if row is None else str(row[0])
        return None

    def put_name(self, name: str, content: str) -> None:
        """Keep the content a name stands for; the oldest of 100,000 names are forgotten."""
        with self._use("written") as connection:
            connection.execute("INSERT OR REPLACE INTO names (name, content) VALUES (?, ?)", (name, content))
            oldest = "(SELECT max(number) FROM names) - ?"
            connection.execute(f"DELETE FROM names WHERE number <= {oldest}", (_MOST_NAMES,))  # noqa: S608 - a constant

    @property
    def nbytes(self) -> int:
        """Bytes of the token embeddings kept now, by all processes."""
        return self._number("SELECT ifnull(sum(size), 0) FROM entries")

    def __len__(self) -> int:
        """Count the entries."""
        return self._number("SELECT count(*) FROM entries")

    def clear(self) -> None:
        """Forget all, and give the space back to the disk."""
        with self._use("written") as connection:
            connection.execute("DELETE FROM entries")
            connection.execute("DELETE FROM names")
        with self._use("written", transaction=False) as connection:
            connection.execute("VACUUM")

    def close(self) -> None:
        """Close the file; a second call does nothing, and further calls find nothing."""
        with self._lock:
            if self._pid == os.getpid():
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
            remedy = "" if isinstance(exc, sqlite3.OperationalError) else "; delete it to begin anew"
            raise StoreError(f"{self.file}: the cache cannot be used: {exc}{remedy}") from exc
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._finalizer = weakref.finalize(self, _closer(connection))

    def _prepare(self, connection: sqlite3.Connection) -> None:
        self._check(connection)  # before anything of a file that is not ours is changed
        connection.execute("PRAGMA page_size = 16384")  # of a new file: a page's embeddings are a megabyte
        _keep_write_ahead_log(connection)
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = NORMAL")  # a power cut takes the last entries, never the file
        connection.execute("PRAGMA journal_size_limit = 16777216")
        connection.execute("BEGIN IMMEDIATE")
        try:
            if not self._check(connection):  # two processes may come to a new folder at once
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # half a schema would pass for another program's
                connection.execute("ROLLBACK")
            raise

    def _check(self, connection: sqlite3.Connection) -> bool:
        """Whether there is a cache; False for a new file."""
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if tables and application != _APPLICATION:
            raise StoreError(f"{self.file}: another program's database, not a cache of embeddings")
        if version > VERSION:
            raise StoreError(f"{self.file}: format {version} of a later release; this one knows {VERSION}")
        return bool(tables)

    @contextlib.contextmanager
    def _use(self, done: str, *, transaction: bool = True) -> Iterator[sqlite3.Connection]:
        """Give the connection, in a transaction; an error of the disk is logged and goes no further."""
        with self._lock:
            if self._pid != os.getpid():  # forked: SQLite forbids a child to touch the parent's connection
                left, finalizer = self._connection, self._finalizer
                self._open()  # when it fails, the next call tries again, and the parent's is never used
                finalizer.detach()
                _left_behind.append(left)
                self._pid = os.getpid()
            try:
                if transaction:
                    self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                if transaction:
                    self._connection.execute("COMMIT")
            except sqlite3.Error as exc:
                if self._finalizer.alive:
                    _log.warning("%s: the cache could not be %s: %s", self.file, done, exc)
            finally:
                with contextlib.suppress(sqlite3.Error):
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")

    def _shrink(self, connection: sqlite3.Connection | None = None) -> None:
        if connection is None:
            with self._use("written") as own:
                self._shrink(own)
            return
        (excess,) = connection.execute("SELECT ifnull(sum(size), 0) - ? FROM entries", (self.max_bytes,)).fetchone()
        if excess <= 0:
            return
        doomed = []
        for number, size in connection.execute("SELECT number, size FROM entries ORDER BY used"):
            doomed.append((number,))
            excess -= size
            if excess <= 0:
                break
        connection.executemany("DELETE FROM entries WHERE number = ?", doomed)

    def _number(self, sql: str) -> int:
        with self._use("read", transaction=False) as connection:
            return int(connection.execute(sql).fetchone()[0])
        return 0


def nbytes_of(multi_vector: MultiVector) -> int:
    """Bytes of a multi-vector's token embeddings and of what says how they were pooled.

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


def _closer(connection: sqlite3.Connection) -> Callable[[], None]:
    pid = os.getpid()

    def close() -> None:
        if os.getpid() == pid:
            connection.close()
        else:
            _left_behind.append(connection)

    return close


def _parts(made: MultiVector) -> tuple[int, str, bytes, bytes | None]:
    """Lay a multi-vector out as plain data: checksum, shape, token embeddings, clusters."""
    shape = json.dumps(
        {
            "rows": list(made.vectors.shape),
            "content": _cut(made.content),
            "visual": None if made.visual is None else _cut(made.visual),
            "grid": None if made.grid is None else [int(side) for side in made.grid],
            "tokens": made.tokens,
        }
    )
    vectors = np.ascontiguousarray(made.vectors, dtype="<f4").tobytes()
    clusters = None if made.clusters is None else made.clusters.astype("<i4").tobytes()
    return _checksum(shape, vectors, clusters), shape, vectors, clusters


def _restored(crc32: int, shape: str, vectors: bytes, clusters: bytes | None) -> MultiVector:
    if _checksum(shape, vectors, clusters) != crc32:
        raise ValueError("its checksum differs")
    told: dict[str, Any] = json.loads(shape)
    rows = np.frombuffer(vectors, dtype="<f4").reshape(told["rows"]).astype(np.float32, copy=False)
    return MultiVector(
        rows,
        content=slice(*told["content"]),
        visual=None if told["visual"] is None else slice(*told["visual"]),
        tokens=None if told["tokens"] is None else tuple(told["tokens"]),
        grid=None if told["grid"] is None else (told["grid"][0], told["grid"][1]),
        clusters=None if clusters is None else np.frombuffer(clusters, dtype="<i4").astype(np.int32),
    )


def _checksum(shape: str, vectors: bytes, clusters: bytes | None) -> int:
    return zlib.crc32(clusters or b"", zlib.crc32(vectors, zlib.crc32(shape.encode())))


def _cut(part: slice) -> list[int | None]:
    return [None if bound is None else int(bound) for bound in (part.start, part.stop, part.step)]
