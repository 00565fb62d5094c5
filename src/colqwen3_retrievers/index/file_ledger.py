"""What an index knows of the files its pages came from: a small SQLite file that :meth:`PageIndex.sync` reads first.

It says which page files belong to an index, so that a page is forgotten only when its file is known and gone, and how
each looked when it was read, so that a file that did not change need not be opened. Losing it loses no page: the next
sync reads every file again, encodes nothing that is in the index, and forgets nothing.
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
from colqwen3_retrievers.pages.files import user_path

FILE_NAME: Final = "files.sqlite"
"""The ledger in an index's folder."""

VERSION: Final = 1
"""Of the file's format; ``PRAGMA user_version``."""

_APPLICATION: Final = 0x43513346  # "CQ3F"
_TICK_NS: Final = 20_000_000  # a system stamps changes with a clock that moves every 1 to 10 ms
_COARSE_NS: Final = 2_000_000_000  # FAT counts in steps of two seconds
_COARSE_UNIT = 1_000_000_000
_KEEPS_CHANGE_TIME = os.name == "posix"  # elsewhere st_ctime is when the file was made
_TABLE: Final = """
CREATE TABLE IF NOT EXISTS files (
    place TEXT NOT NULL, source TEXT NOT NULL, path BLOB NOT NULL, device INTEGER NOT NULL,
    looks TEXT, digest TEXT, recipe TEXT NOT NULL, as_path INTEGER NOT NULL, pages TEXT NOT NULL,
    PRIMARY KEY (place, source)
) WITHOUT ROWID
"""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file as it was when its pages were last read.

    Attributes:
        source: ``Page.source`` of its pages.
        path: absolute.
        device: number of the file system it lay on.
        looks: size, times and inode as :func:`looks_of` gives them, or None when they prove nothing.
        digest: sha256 of its bytes, or None when its pages were not all read.
        recipe: the settings its pages were read with.
        as_path: whether its page's image is the file itself, and not a picture rendered from it.
        pages: number and ``Page.sha256`` of each page.

    >>> FileEntry("a.pdf", Path("/reports/a.pdf"), 1, None, None, "", False, ((1, "ab12"),)).ids
    ('a.pdf#page=1',)
    """

    source: str
    path: Path
    device: int
    looks: str | None
    digest: str | None
    recipe: str
    as_path: bool
    pages: tuple[tuple[int, str], ...] = ()

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of its pages."""
        return tuple(f"{self.source}#page={number}" for number, _ in self.pages)


class FileLedger:
    """The files of one index.

    Args:
        file: where it is kept; made when it is new. Several indexes may share it. None keeps it in memory.
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
            raise StoreError(f"{file}: cannot be made: {exc.strerror or exc}") from exc
        with self._errors():
            # Threads take turns: one sync writes through one ledger, though not always from one thread.
            self._connection = sqlite3.connect(
                file or ":memory:", timeout=30, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def entries(self) -> dict[str, FileEntry]:
        """Give what is known of all files, by source."""
        sql = "SELECT source, path, device, looks, digest, recipe, as_path, pages FROM files WHERE place = ?"
        with self._errors():
            rows = self._connection.execute(sql, (self._place,)).fetchall()
            found: dict[str, FileEntry] = {}
            for source, path, device, looks, digest, recipe, as_path, pages in rows:
                listed = tuple((int(number), str(digest_of)) for number, digest_of in json.loads(pages))
                where = Path(os.fsdecode(path))
                found[source] = FileEntry(source, where, device, looks, digest, recipe, bool(as_path), listed)
        return found

    def put(self, entry: FileEntry) -> None:
        """Keep what is known of a file, in place of what was known under its source."""
        row = (
            self._place, entry.source, os.fsencode(entry.path), entry.device, entry.looks, entry.digest,
            entry.recipe, entry.as_path, json.dumps(entry.pages),
        )  # fmt: skip
        with self._errors():
            self._connection.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def remove(self, source: str) -> None:
        """Forget a file."""
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
        self._connection.execute("PRAGMA synchronous = NORMAL")  # what a power cut takes is only read again
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
            yield
        except (sqlite3.Error, ValueError) as exc:
            what = "cannot be read or written" if isinstance(exc, sqlite3.OperationalError) else "is damaged"
            remedy = "" if isinstance(exc, sqlite3.OperationalError) else "; delete it, and files are read anew"
            raise StoreError(f"{self.file}: the ledger of files {what}: {exc}{remedy}") from exc


def looks_of(status: os.stat_result) -> str:
    """Put what a system says of a file into one text that differs whenever the file was changed.

    Size and modification time alone do not prove it: ``cp -p``, ``rsync -t``, ``tar`` and ``touch -d`` set the time to
    any value. The change time of the inode is set by the system at every write and every ``utime``, and by nobody else;
    with the inode number, which tells a file put in another's place, they do.

    >>> looks_of(os.stat(".")) == looks_of(os.stat("."))
    True
    """
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino}"


def digest_of(path: Path, *, source: str) -> tuple[str, str | None]:
    """Read a file and say what it holds.

    A file that was written a moment ago may be written again without its times moving, for the system's clock of times
    ticks slowly: such a file is read after the next tick.

    Returns:
        The sha256 of its bytes, and its :func:`looks_of`; None in place of these when they prove nothing: a system that
        keeps no change time, one that lies ahead or counts in seconds, or a file that changed while it was read.

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
        looks = looks_of(path.stat())
    except (OSError, ValueError) as exc:
        raise PageError(f"cannot be read: {getattr(exc, 'strerror', None) or exc}", source=source) from exc
    return digest, looks if proves and looks == looks_of(before) else None


def looks_at(path: Path) -> str | None:
    """Give a file's :func:`looks_of` now, or None when it cannot be looked at or its times prove nothing."""
    try:
        return looks_of(path.stat()) if _KEEPS_CHANGE_TIME else None
    except (OSError, ValueError):
        return None


def device_of(path: Path) -> int:
    """Give the number of the file system a path lies on, as a signed 64-bit number, which is what SQLite can hold."""
    device = path.stat().st_dev
    return device - 2**64 if device >= 2**63 else device


def open_ledger(
    file: str | os.PathLike[str] | None, own: Path | None, images: Path | None, location: str, *, needed: bool = True
) -> FileLedger:
    """Open the ledger of an index.

    Args:
        file: as asked for; None takes :data:`FILE_NAME` in ``own``, or else in ``images``.
        own: the index's folder, when it is one.
        images: the folder of its page images.
        location: the index's folder or address.
        needed: whether it has to last; otherwise one without a place is forgotten when it is closed.

    Raises:
        ConfigError: there is no place for one that is needed.
        StoreError: see :class:`FileLedger`.
    """
    folder = images if own is None else own
    if file is None:
        if folder is None and not needed:
            return FileLedger(None, location)
        if folder is None:
            raise ConfigError(f"{location}: give ledger=, a file to note in what was synced, or images_dir=")
        file = folder / FILE_NAME
    path = user_path(file).absolute()
    if own is None:  # the same collection, however it is talked to
        scheme, _, rest = location.partition("://")
        location = f"qdrant://{rest.partition('?')[0]}" if scheme in ("qdrant", "qdrants") else location
    return FileLedger(path, "" if path.parent == own else location)  # an index's own ledger moves with its folder
