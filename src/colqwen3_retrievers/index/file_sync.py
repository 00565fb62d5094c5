"""Synchronising an index with files: what changed is encoded, what is gone is removed, all else is left alone."""

from __future__ import annotations

import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.index.file_ledger import FileEntry, FileLedger, current_stamp, device_of, hash_file
from colqwen3_retrievers.index.page_adder import Encode, Failure, PageAdder
from colqwen3_retrievers.index.page_records import BATCH, PageRecords, batches
from colqwen3_retrievers.pages.files import (
    ONE_ROOT,
    PageFile,
    PagePath,
    caused_by,
    find_page_files,
    is_data,
    reason_of,
    user_path,
)
from colqwen3_retrievers.pages.loading import check_name, load_pages
from colqwen3_retrievers.pages.page import Page, json_object
from colqwen3_retrievers.progress import Bar
from colqwen3_retrievers.stores.protocol import MultiVectorStore

_MOVED: Final = "give moved=True (--moved) if it was moved and changed"

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class NotSynced:
    """A file, page or folder that could not be read or encoded; the index still has its pages.

    Attributes:
        source: of the file's pages, or a folder's path.
        page: the page's number, or None for a whole file.
        reason: why.

    >>> print(NotSynced("a.pdf", 3, "the page is missing or broken"))
    a.pdf, page 3: the page is missing or broken
    """

    source: str
    page: int | None
    reason: str

    def __str__(self) -> str:
        return f"{self.source}{'' if self.page is None else f', page {self.page}'}: {self.reason}"

    @classmethod
    def of(cls, error: PageError) -> NotSynced:
        """Return what a page error says."""
        return cls(error.source, error.page, error.message)


@dataclass(frozen=True, slots=True)
class Synced:
    """Counts of the pages of one sync, and its failures.

    Attributes:
        added: pages that were new.
        updated: pages with other content, metadata or another image than before.
        unchanged: pages already stored as they are, whether their file was opened or not.
        removed: pages whose file is gone, has fewer pages now, or has another name (by another root).
        failed: what could not be read or encoded; its pages stay as they were.

    >>> Synced(added=2).failed
    ()
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    removed: int = 0
    failed: tuple[NotSynced, ...] = ()


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """How the files of one call are found and read: arguments of :meth:`PageIndex.sync`, described there.

    Attributes:
        remove: whether pages of files that are gone, and pages that a file no longer has, are removed.

    Raises:
        ConfigError: metadata that is not JSON.
    """

    root: PagePath | None
    max_pixels: int
    password: str | None
    metadata: Mapping[str, Any] | None
    moved: bool
    allow_empty: bool = False
    verify: bool = False
    remove: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", json_object(self.metadata or {}, "files"))  # as pages will have it


class _Root(NamedTuple):
    """A file or folder of a sync, as given and as an absolute path."""

    given: PagePath
    path: Path
    exists: bool


@dataclass
class FileListing:
    """The page files of one call and what became of known ones; nothing is changed and no file is opened.

    Attributes:
        known: the entries of the ledger, by source.
        files: the files to read, in order.
        gone: known files under the paths that are certainly gone.
        renamed: known files by the new name they have; a file reached by two roots has the name of the last call.
        failed: folders that cannot be listed, and known files of which it is unclear whether they are gone.
    """

    records: PageRecords
    options: SyncOptions
    known: Mapping[str, FileEntry]
    files: list[PageFile] = field(default_factory=list)
    gone: list[FileEntry] = field(default_factory=list)
    renamed: dict[str, list[FileEntry]] = field(default_factory=dict)
    failed: list[NotSynced] = field(default_factory=list)
    _unlisted: list[Path] = field(default_factory=list)
    _followed: set[str] = field(default_factory=set)

    def find(self, paths: PagePath | Iterable[PagePath], report: Callable[[PageError], None]) -> None:
        """Find the files, and refuse those that would cost another file its pages.

        Where nothing is removed, paths may be patterns, and those that cannot be used are reported and skipped.
        """

        def failed(error: PageError) -> None:
            report(error)
            self.failed.append(NotSynced.of(error))

        if self.options.remove:
            self._find_with_changes(paths)
        else:  # known files elsewhere may be gone or not
            self._list(paths, failed)
        for file in self.files:
            known = self.known.get(file.source)
            if known is not None and os.path.lexists(known.path) and self.belongs_elsewhere(known, file):
                raise ConfigError(
                    f"{known.path}, which is in the index, and {file.path} would both be {file.source!r}: {ONE_ROOT}"
                )

    def belongs_elsewhere(self, known: FileEntry, file: PageFile) -> bool:
        """Return whether a file has the name of another one, which exists or may be on a disk not mounted now."""
        if self.options.moved or known.path == file.path or file.source in self._followed:
            return False
        return not _same_file(known.path, file.path) and bool(page_ids(self.records.store, file.source))

    def _list(self, paths: PagePath | Iterable[PagePath], failed: Callable[[PageError], None]) -> None:
        # An index inside the folder that it indexes would take its own page images for pages, more at every call.
        files = find_page_files(paths, root=self.options.root, on_error=failed)
        self.files = [file for file in files if self.records.images.path(file.path.name) != file.path]

    def _find_with_changes(self, paths: Any) -> None:
        """List files, refuse paths whose disk seems not mounted, and find known files that are gone or renamed."""
        single = isinstance(paths, str | os.PathLike) or is_data(paths) or not isinstance(paths, Iterable)
        roots = [_root(item) for item in ([paths] if single else paths)]
        self._list([root.given for root in roots if root.exists], self._folder_failed)
        listed = {file.path for file in self.files}
        folders = {root.path for root in roots}
        entries = _under(folders, self.known.values(), lambda entry: entry.path)
        if not self.options.allow_empty:
            left = _under(folders, listed, lambda path: path)
            for root in roots:
                self._check_root(root, entries[root.path], listed, bool(left[root.path]))
        missing = {entry.source: entry for beneath in entries.values() for entry in beneath}.values()
        gone = [entry for entry in missing if entry.path not in listed and self._is_gone(entry)]
        names = {file.path: file.source for file in self.files}
        sources = set(names.values())
        for entry in self.known.values():
            if entry.path in names and entry.source not in sources:
                self.renamed.setdefault(names[entry.path], []).append(entry)
        self.gone = [entry for entry in gone if entry.source not in sources]
        self._followed = sources & {entry.source for entry in gone}

    def _folder_failed(self, error: PageError) -> None:
        if not Path(error.source).is_dir():
            raise error
        self._unlisted.append(Path(error.source))
        self.failed.append(NotSynced.of(error))

    def _check_root(self, root: _Root, known: list[FileEntry], listed: set[Path], any_left: bool) -> None:
        """Refuse a path whose disk seems not mounted."""
        if root.exists and self._is_unlisted(root.path):
            return  # reported; nothing under it counts as gone
        if not root.exists and any(character in str(root.given) for character in "*?["):
            raise ConfigError(f"{root.given}: no such file or folder; sync takes files and folders, not patterns")
        if not known and root.exists:
            return  # an empty folder that never held anything
        count = sum(len(entry.pages) for entry in known)
        remedy = f"; allow_empty=True forgets the {count} pages known from there" if known else ""
        if not root.exists:
            raise PageError(f"no such file or folder{remedy}", source=str(root.given))
        if any(entry.path in listed for entry in known):
            return
        if not any_left:
            raise PageError(f"no page file is left; is its disk mounted?{remedy}", source=str(root.given))
        if device_of(root.path) not in {entry.device for entry in known}:
            message = f"another disk is mounted there, without any of the known files{remedy}"
            raise PageError(message, source=str(root.given))

    def _is_unlisted(self, path: Path) -> bool:
        return any(path.is_relative_to(folder) for folder in self._unlisted)

    def _is_gone(self, entry: FileEntry) -> bool:
        """Return whether a known file that was not listed is certainly gone, and not merely out of sight."""
        if self._is_unlisted(entry.path):
            return False
        try:
            if not stat.S_ISDIR(entry.path.lstat().st_mode):
                return False  # it exists, though it is not listed: behind a link to a folder, perhaps
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as exc:
            self.failed.append(NotSynced(entry.source, None, f"cannot be looked at: {reason_of(exc)}"))
            return False
        if self.options.allow_empty:
            return True
        folder = next(parent for parent in entry.path.parents if os.path.lexists(parent))
        try:
            unmounted = device_of(folder) != entry.device and not any(folder.iterdir())
        except OSError:
            unmounted = True
        if unmounted:
            reason = f"{folder} is empty; is its disk mounted? allow_empty=True forgets its pages"
            self.failed.append(NotSynced(entry.source, None, reason))
        return not unmounted


@dataclass(slots=True)
class _Reading:
    """A file whose pages are on their way to the store."""

    entry: FileEntry
    end: int = 0  # position after its last page, among all pages read
    complete: bool = False
    pages: list[tuple[int, str]] = field(default_factory=list)
    failed: list[NotSynced] = field(default_factory=list)


class FileSync:
    """One call of :meth:`PageIndex.sync` or :meth:`PageIndex.add_files`.

    Args:
        listing: the files of the call.
        ledger: of the index's files.
        report: called with each file and page that cannot be used; by raising, it ends the call.
        bar: counts files.
    """

    def __init__(self, listing: FileListing, ledger: FileLedger, report: Callable[[Failure], None], bar: Bar) -> None:
        self._listing = listing
        self._records = listing.records
        self._options = listing.options
        self._ledger = ledger
        self._report = report
        self._bar = bar
        self._recipe = f"max_pixels={self._options.max_pixels}"
        self._reading: dict[str, _Reading] = {}
        self._pending: deque[_Reading] = deque()
        self._positions = self._committed = self._unchanged = self._removed = 0
        self._failed = [*listing.failed]
        self._complete: set[str] = set()  # sources whose every page is in the index

    def run(self, encode: Encode, batch_size: int) -> Synced:
        """Read what changed, store it, and remove what is gone."""
        adder = PageAdder(self._records, encode, self._page_failed, from_files=True)
        counts = adder.run(self._changed_pages(), batch_size, self._note_stored)
        self._finish()
        renamed = (entry for name, old in self._listing.renamed.items() if name in self._complete for entry in old)
        for entry in (*self._listing.gone, *renamed):
            self._remove(entry.source)
            self._ledger.remove(entry.source)
        unchanged = counts.unchanged + self._unchanged
        return Synced(counts.added, counts.updated, unchanged, self._removed, tuple(self._failed))

    def _note_stored(self, count: int) -> None:
        self._committed += count
        self._bar.note(f"{self._committed} pages")  # the bar counts files, and one may have thousands of pages
        self._finish()

    def _intact(self) -> dict[str, FileEntry]:
        """Return the known entries, by source, of listed files whose pages are all stored as read from them."""
        intact = {}
        for file in self._listing.files:
            entry = self._listing.known.get(file.source)
            if entry is not None and entry.recipe == self._recipe and entry.path == file.path and entry.digest:
                intact[file.source] = entry
        expected = [(entry, number, digest) for entry in intact.values() for number, digest in entry.pages]
        for batch in batches(expected, BATCH):
            ids = [f"{entry.source}#page={number}" for entry, number, _ in batch]
            records = {record.page.id: record for record in self._records.store.get(ids)}
            for page_id, (entry, _, digest) in zip(ids, batch, strict=True):
                record = records.get(page_id)
                # A page with an image of the same kind: whether it is kept depends on nothing else of it.
                page = Page(id=page_id, image=entry.path if entry.as_path else b"-")
                if not (
                    record is not None
                    and record.page.sha256 == digest
                    and self._has_metadata(record.page)
                    and self._records.images.satisfied(page, record.image)
                ):
                    intact.pop(entry.source, None)
        return {source: entry for source, entry in intact.items() if entry.pages}

    def _has_metadata(self, page: Page) -> bool:
        wanted = self._options.metadata or {}
        return all(name in page.metadata and page.metadata[name] == value for name, value in wanted.items())

    def _changed_pages(self) -> Iterator[Page]:
        """Read the pages of all files that changed."""
        intact = self._intact()
        changed = []
        for file in self._listing.files:  # first, for files that changed may take hours
            entry = None if self._options.verify else intact.get(file.source)
            if entry is not None and entry.stamp is not None and entry.stamp == current_stamp(file.path):
                self._file_unchanged(entry)
            else:
                changed.append(file)
        for file in changed:
            known = self._listing.known.get(file.source)
            try:
                check_name(file)
                digest, stamp = hash_file(file.path, source=file.source)
                device = device_of(file.path)
            except (PageError, OSError) as exc:
                self._file_failed(file, reason_of(exc), exc)
                continue
            if known is not None and digest != known.digest and self._listing.belongs_elsewhere(known, file):
                reason = f"its name belongs to {known.path}, which is not there now: {_MOVED}, or {ONE_ROOT}"
                self._file_failed(file, reason)
            elif known is not None and known.digest == digest and file.source in intact:
                self._ledger.put(replace(known, stamp=stamp, device=device))
                self._file_unchanged(known)
            else:
                # Recorded before any page is stored: a run that is killed leaves no page of an unknown file.
                entry = FileEntry(file.source, file.path, device, stamp, digest, self._recipe, as_path=False)
                self._ledger.put(replace(entry, stamp=None, digest=None, pages=() if known is None else known.pages))
                yield from self._pages(file, entry)

    def _pages(self, file: PageFile, entry: FileEntry) -> Iterator[Page]:
        reading = self._reading[file.source] = _Reading(entry)
        self._pending.append(reading)

        def failed(error: PageError) -> None:
            self._report(error)
            reading.failed.append(NotSynced(file.source, error.page, error.message))

        root = file.path.parents[file.source.count("/")]
        for page in load_pages(
            file.path, root=root, max_pixels=self._options.max_pixels, password=self._options.password, on_error=failed
        ):
            try:
                reading.pages.append((page.number, page.sha256))
            except PageError as exc:
                self._report(exc)
                reading.failed.append(NotSynced(file.source, page.number, exc.message))
                continue
            if self._options.metadata:
                page = page.replace(metadata={**page.metadata, **self._options.metadata})
            reading.entry = replace(reading.entry, as_path=page.image_path is not None)
            self._positions += 1
            yield page
        reading.end, reading.complete = self._positions, True
        self._finish()

    def _page_failed(self, page: Page, error: Failure) -> None:
        self._report(error)
        self._reading[page.source].failed.append(NotSynced(page.source, page.number, error.message))

    def _file_failed(self, file: PageFile, reason: str, cause: Exception | None = None) -> None:
        error = PageError(reason, source=file.source)
        self._report(error if cause is None else caused_by(error, cause))
        self._failed.append(NotSynced(file.source, None, reason))
        self._bar.update(1)

    def _file_unchanged(self, entry: FileEntry) -> None:
        self._unchanged += len(entry.pages)
        self._complete.add(entry.source)
        self._bar.update(1)

    def _finish(self) -> None:
        """Record the files whose pages are all stored, and remove the pages they no longer have."""
        while self._pending and self._pending[0].complete and self._pending[0].end <= self._committed:
            reading = self._pending.popleft()
            entry = replace(reading.entry, pages=tuple(reading.pages))
            # Pages after a failure of the whole file were not reached, which does not mean that they are gone.
            if self._options.remove and all(failure.page is not None for failure in reading.failed):
                numbers = {number for number, _ in reading.pages} | {failure.page for failure in reading.failed}
                self._remove(entry.source, {f"{entry.source}#page={number}" for number in numbers})
            if not reading.failed:
                self._complete.add(entry.source)
            self._failed += reading.failed
            if reading.failed or not _is_current(entry):
                entry = replace(entry, stamp=None, digest=None)  # read again by the next sync
            self._ledger.put(entry)
            del self._reading[entry.source]
            self._bar.update(1)

    def _remove(self, source: str, present: Iterable[str] = ()) -> None:
        """Remove the pages of a file that are not ``present``."""
        gone = sorted(set(page_ids(self._records.store, source)) - set(present))
        if gone:
            self._removed += self._records.remove(gone)


def page_ids(store: MultiVectorStore, source: str) -> list[str]:
    """Return the ids a store has of a file's pages; ids that a caller made up are not among them."""
    pattern = re.compile(re.escape(source) + r"#page=[1-9][0-9]*")
    return [page_id for page_id in store.ids({"source": source}) if pattern.fullmatch(page_id)]


def _is_current(entry: FileEntry) -> bool:
    """Return whether a file is still as it was when it was hashed, before its pages were read."""
    if entry.stamp is not None:
        return current_stamp(entry.path) == entry.stamp  # a write that puts the old bytes back changes it too
    try:
        return hash_file(entry.path, source=entry.source)[0] == entry.digest
    except PageError:
        return False


def _root(item: Any) -> _Root:
    if not isinstance(item, str | os.PathLike) or "://" in str(item) or not os.fspath(item):
        find_page_files([item])  # refuses it
    path = Path(os.path.abspath(user_path(item)))  # noqa: PTH100 - resolve() would follow links
    try:
        return _Root(item, path, path.exists())
    except OSError as exc:
        raise PageError(f"cannot be read: {reason_of(exc)}", source=str(item)) from exc


def _under(roots: set[Path], items: Iterable[_Item], path_of: Callable[[_Item], Path]) -> dict[Path, list[_Item]]:
    """Return what is at or under each root; each path is split once, however many roots there are."""
    beneath: dict[Path, list[_Item]] = {root: [] for root in roots}
    for item in items:
        path = path_of(item)
        for place in (path, *path.parents):
            if place in beneath:
                beneath[place].append(item)
    return beneath


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False
