"""A small SQLite file that records which files an index's pages came from; :meth:`PageIndex.sync` reads it first.

It records which page files belong to an index, so that a page is removed only when its file is known and gone, and how
each file looked when it was read, so that an unchanged file need not be opened. Losing it loses no page: the next sync
reads every file again, encodes nothing that is in the index, and removes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from colqwen3_retrievers.errors import ConfigError, PageError, StoreError
from colqwen3_retrievers.fork import no_fork
from colqwen3_retrievers.index.page_records import PageRecords
from colqwen3_retrievers.pages.files import reason_of, user_path
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore

FILE_NAME: Final = "files.sqlite"
"""The ledger in an index's folder."""

VERSION: Final = 1
"""Of the file's format; ``PRAGMA user_version``."""

_APPLICATION: Final = 0x43513346  # "CQ3F"
_TICK_NS: Final = 20_000_000  # systems stamp changes with a clock that advances every 1 to 10 ms
_COARSE_NS: Final = 2_000_000_000  # FAT counts in steps of two seconds
_COARSE_UNIT = 1_000_000_000
_KEEPS_CHANGE_TIME = os.name == "posix"  # elsewhere st_ctime is the time of creation
_TABLE: Final = """
CREATE TABLE IF NOT EXISTS files (
    place TEXT NOT NULL, source TEXT NOT NULL, path BLOB NOT NULL, device INTEGER NOT NULL,
    looks TEXT, digest TEXT, recipe TEXT NOT NULL, as_path INTEGER NOT NULL, pages TEXT NOT NULL,
    PRIMARY KEY (place, source)
) WITHOUT ROWID
"""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file as it was when its pages were last read."""

    source: str  # of its pages
    path: Path  # absolute
    device: int  # number of its file system
    stamp: str | None  # its file_stamp, or None when it proves nothing
    digest: str | None  # sha256 of its bytes, or None when its pages were not all read
    recipe: str  # the settings its pages were read with
    as_path: bool  # whether its page's image is the file itself, and not rendered from it
    pages: tuple[tuple[int, str], ...] = ()  # number and Page.sha256 of each


class FileLedger:
    """The files of one index.

    Args:
        file: the SQLite file, made when it is new; several indexes may share it. None keeps the ledger in memory.
        place: names the index in it.

    Raises:
        StoreError: it cannot be opened or made, is damaged, no ledger, or of a later format.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> with FileLedger(Path(folder.name) / "files.sqlite", "") as ledger:
    ...     ledger.put(FileEntry("a.png", Path("/scans/a.png"), 1, None, None, "", True))
    ...     ledger.entries()["a.png"].path.name
    'a.png'
    >>> folder.cleanup()
    """

    def __init__(self, file: Path | None, place: str) -> None:
        self.file = file
        self._place = place
        try:
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise StoreError(f"{file}: cannot be made: {reason_of(exc)}") from exc
        with self._errors():
            # Threads take turns: one sync writes through one ledger, though not always from one thread.
            target = file or ":memory:"
            self._connection = sqlite3.connect(target, timeout=30, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def entries(self) -> dict[str, FileEntry]:
        """Return the entries of all files, by source."""
        sql = "SELECT source, path, device, looks, digest, recipe, as_path, pages FROM files WHERE place = ?"
        with self._errors():
            return {
                source: FileEntry(
                    source, Path(os.fsdecode(path)), device, stamp, digest, recipe, bool(as_path),
                    tuple((int(number), str(page_digest)) for number, page_digest in json.loads(pages)),
                )
                for source, path, device, stamp, digest, recipe, as_path, pages in self._connection.execute(
                    sql, (self._place,)
                )
            }  # fmt: skip

    def put(self, entry: FileEntry) -> None:
        """Record a file, in place of the entry of the same source."""
        row = (
            self._place, entry.source, os.fsencode(entry.path), entry.device, entry.stamp, entry.digest,
            entry.recipe, entry.as_path, json.dumps(entry.pages),
        )  # fmt: skip
        with self._errors():
            self._connection.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def remove(self, source: str) -> None:
        """Remove the entry of a file."""
        with self._errors():
            self._connection.execute("DELETE FROM files WHERE place = ? AND source = ?", (self._place, source))

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self) -> None:
        self._connection.execute("PRAGMA synchronous = NORMAL")  # entries lost in a power cut are only read again
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        (tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and application != _APPLICATION:
            raise StoreError(f"{self.file}: another program's database, not a ledger of files")
        if version > VERSION:
            raise StoreError(f"{self.file}: format {version} of a later release; this one knows {VERSION}")
        if not tables:
            self._connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._connection.execute(f"PRAGMA user_version = {VERSION}")
            self._connection.execute(_TABLE)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with no_fork:
                yield
        except sqlite3.OperationalError as exc:
            raise StoreError(f"{self.file}: the ledger of files cannot be read or written: {exc}") from exc
        except (sqlite3.Error, ValueError) as exc:
            raise StoreError(
                f"{self.file}: the ledger of files is damaged: {exc}; delete it, and files are read anew"
            ) from exc


def file_stamp(status: os.stat_result) -> str:
    """Return a text that differs whenever the file was changed.

    Size and modification time alone prove nothing: ``cp -p``, ``rsync -t``, ``tar`` and ``touch -d`` set the time to
    any value. Only the system sets the change time of the inode, at every write and every ``utime``; with the inode
    number, which exposes a file put in another's place, they prove it.

    >>> file_stamp(os.stat(".")) == file_stamp(os.stat("."))
    True
    """
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino}"


def hash_file(path: Path, *, source: str) -> tuple[str, str | None]:
    """Hash a file's bytes.

    A file written a moment ago may be written again without its times changing, for the clock of file times ticks
    slowly: such a file is read after the next tick.

    Returns:
        The sha256 of its bytes, and its :func:`file_stamp`; None in place of this when it proves nothing: on a system
        that keeps no change time, for a change time that is in the future or in whole seconds, or a file that changed
        while it was read.

    Raises:
        PageError: it cannot be read, or is no regular file (a pipe would block for ever).
    """
    try:
        before = path.stat()
        if not stat.S_ISREG(before.st_mode):
            raise PageError("not a regular file", source=source)
        age = time.time_ns() - before.st_ctime_ns
        coarse = before.st_ctime_ns % _COARSE_UNIT == 0
        proves = _KEEPS_CHANGE_TIME and age >= (_COARSE_NS if coarse else 0)
        if 0 <= age < _TICK_NS:
            time.sleep((_TICK_NS - age) / 1e9)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        stamp = file_stamp(path.stat())
    except (OSError, ValueError) as exc:
        raise PageError(f"cannot be read: {reason_of(exc)}", source=source) from exc
    return digest, stamp if proves and stamp == file_stamp(before) else None


def current_stamp(path: Path) -> str | None:
    """Return a file's :func:`file_stamp` now, or None when it is out of reach or its times prove nothing."""
    try:
        return file_stamp(path.stat()) if _KEEPS_CHANGE_TIME else None
    except (OSError, ValueError):
        return None


def device_of(path: Path) -> int:
    """Return the number of a path's file system as a signed 64-bit number, the widest that SQLite holds."""
    device = path.stat().st_dev
    return device - 2**64 if device >= 2**63 else device


def open_ledger(records: PageRecords, file: str | os.PathLike[str] | None, *, required: bool) -> FileLedger:
    """Open the ledger of an index.

    Args:
        records: of the index.
        file: the file to use; None takes :data:`FILE_NAME` in the index's folder, or else in that of its images.
        required: whether it has to last; otherwise one without a file is lost when it is closed.

    Raises:
        ConfigError: a required one has no file.
        StoreError: as :class:`FileLedger`.
    """
    store, location = records.store, records.store.location
    folder = store.folder if isinstance(store, EmbeddedStore) else None
    if file is None:
        parent = records.images.folder if folder is None else folder
        if parent is None and not required:
            return FileLedger(None, location)
        if parent is None:
            raise ConfigError(f"{location}: give ledger=, a file that records what was synced, or images_dir=")
        file = parent / FILE_NAME
    path = user_path(file).absolute()
    if path.parent == folder:
        return FileLedger(path, "")  # an index's own ledger moves with its folder
    scheme, _, rest = location.partition("://")
    if folder is None and scheme in ("qdrant", "qdrants"):  # one name for a collection, however it is reached
        location = f"qdrant://{rest.partition('?')[0]}"
    return FileLedger(path, location)
