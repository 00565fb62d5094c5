"""Making an index agree with files: what changed is encoded, what is gone is forgotten, all else is left alone."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from colqwen3_retrievers.errors import PageError
from colqwen3_retrievers.index.file_ledger import FileEntry, FileLedger, device_of, digest_of, looks_at
from colqwen3_retrievers.index.page_adder import Added, Failure, PageAdder, remove_pages
from colqwen3_retrievers.index.page_images import PageImages
from colqwen3_retrievers.index.synced_files import MOVED, FoundFiles, NotSynced, page_ids
from colqwen3_retrievers.pages.files import ONE_ROOT, PageFile, caused_by, reason_of
from colqwen3_retrievers.pages.loading import check_name, load_pages
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.stores.protocol import MultiVectorStore

_AT_ONCE = 256  # records looked up at a time


@dataclass(frozen=True, slots=True)
class Synced:
    """What became of the pages of one sync.

    Attributes:
        added: pages that were new.
        updated: pages with another content, metadata or image than before.
        unchanged: pages that were there just so, whether their file was opened or not.
        removed: pages whose file is gone, has fewer pages now, or is called otherwise (by another root).
        failed: what could not be read or encoded; its pages stay as they were.

    >>> Synced(added=2).failed
    ()
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    removed: int = 0
    failed: tuple[NotSynced, ...] = ()


@dataclass(slots=True)
class _Reading:
    """A file whose pages are on their way to the store."""

    entry: FileEntry
    end: int = 0  # position after its last page, among all pages read
    read: bool = False
    pages: list[tuple[int, str]] = field(default_factory=list)
    failed: list[NotSynced] = field(default_factory=list)


class FileSync:
    """One call of :meth:`~colqwen3_retrievers.index.page_index.PageIndex.sync`, whose arguments are described there.

    Args:
        store: where records are.
        images: where page images are.
        lock: held while pages are removed.
        ledger: what is known of the files.
        found: the files of the call.
        metadata: a user's keys for every page read.
        tell: told of each file and page that cannot be used; by raising, it ends the call.
    """

    def __init__(
        self,
        store: MultiVectorStore,
        images: PageImages,
        lock: threading.RLock,
        ledger: FileLedger,
        found: FoundFiles,
        *,
        metadata: Mapping[str, Any],
        tell: Callable[[Failure], None],
    ) -> None:
        self._store = store
        self._images = images
        self._lock = lock
        self._ledger = ledger
        self._found = found
        self._known = found.known
        self._metadata = metadata
        self._tell = tell
        self._reading: dict[str, _Reading] = {}
        self._waiting: deque[_Reading] = deque()
        self._positions = self._committed = self._unopened = self._removed = 0
        self._failed = list(found.failed)
        self._whole: set[str] = set()  # sources whose every page is in the index
        self._bar: Any = None

    def run(
        self, adder: PageAdder, *, max_pixels: int, password: str | None, verify: bool, batch_size: int, bar: Any
    ) -> Synced:
        """Read what changed, keep it, and forget what is gone."""
        self._bar = bar
        recipe = f"max_pixels={max_pixels}"
        intact = self._intact(recipe)
        to_read = []
        for file in self._found.files:
            known = self._known.get(file.source)
            looks = None if verify or known is None or file.source not in intact else looks_at(file.path)
            if known is not None and looks is not None and looks == known.looks:
                self._unopened += len(known.pages)
                self._whole.add(file.source)
                self._advance()
            else:
                to_read.append(file)
        made: Added = adder.run(self._pages(to_read, recipe, intact, max_pixels, password), batch_size, self)
        self._finish()
        renamed = (old for name, entries in self._found.renamed.items() if name in self._whole for old in entries)
        for entry in (*self._found.gone, *renamed):
            self._removed += self._forget(entry.source)
            self._ledger.remove(entry.source)
        return Synced(made.added, made.updated, made.unchanged + self._unopened, self._removed, tuple(self._failed))

    def update(self, count: int) -> None:
        """Note that ``count`` more pages are kept: the adder's ``progress``."""
        self._committed += count
        if self._bar is not None:  # the bar counts files, and one may have thousands of pages
            self._bar.set_postfix_str(f"{self._committed} pages")
        self._finish()

    def page_failed(self, page: Page, error: Failure) -> None:
        """Note a page that cannot be encoded: the adder's ``failed``."""
        self._tell(error)
        reading = self._reading[page.source]
        reading.failed.append(NotSynced(page.source, page.number, reason_of(error)))

    def _intact(self, recipe: str) -> set[str]:
        """Sources of the listed files whose pages are all in the index, as read from the known bytes and described."""
        asked: list[tuple[FileEntry, str, str]] = []
        for file in self._found.files:
            known = self._known.get(file.source)
            if known is not None and known.digest is not None and known.recipe == recipe and known.path == file.path:
                asked += [(known, page_id, digest) for page_id, (_, digest) in zip(known.ids, known.pages, strict=True)]
        intact = {entry.source for entry, _, _ in asked}
        for first in range(0, len(asked), _AT_ONCE):
            part = asked[first : first + _AT_ONCE]
            records = {record.page.id: record for record in self._store.get([page_id for _, page_id, _ in part])}
            for entry, page_id, digest in part:
                record = records.get(page_id)
                stand_in = Page(id=page_id, image=entry.path if entry.as_path else b"-")
                same = record is not None and record.page.sha256 == digest and self._is_described(record.page)
                if not same or not self._images.satisfied(stand_in, record.image):  # type: ignore[union-attr]
                    intact.discard(entry.source)
        return intact

    def _is_described(self, page: Page) -> bool:
        missing = object()
        return all(page.metadata.get(name, missing) == value for name, value in self._metadata.items())

    def _pages(
        self, files: list[PageFile], recipe: str, intact: set[str], max_pixels: int, password: str | None
    ) -> Iterator[Page]:
        """Read the pages of all files that are not what they were."""
        for file in files:
            try:
                check_name(file)
                digest, looks = digest_of(file.path, source=file.source)
                device = device_of(file.path)
            except (PageError, OSError) as exc:
                self._file_failed(file, reason_of(exc), exc)
                continue
            known = self._known.get(file.source)
            if known is not None and digest != known.digest and self._found.belongs_elsewhere(known, file):
                reason = f"its name belongs to {known.path}, which is not there now: {MOVED}, or {ONE_ROOT}"
                self._file_failed(file, reason)
                continue
            if known is not None and file.source in intact and known.digest == digest:
                self._unopened += len(known.pages)
                self._whole.add(file.source)
                self._ledger.put(replace(known, looks=looks, device=device))
                self._advance()
                continue
            # Told before any page is kept: a run that is killed leaves no page whose file nobody knows.
            entry = FileEntry(file.source, file.path, device, looks, digest, recipe, as_path=False)
            self._ledger.put(replace(entry, looks=None, digest=None, pages=() if known is None else known.pages))
            yield from self._read(_Reading(entry), file, max_pixels, password)

    def _file_failed(self, file: PageFile, reason: str, cause: Exception | None = None) -> None:
        error = PageError(reason, source=file.source)
        self._tell(error if cause is None else caused_by(error, cause))
        self._failed.append(NotSynced(file.source, None, reason))
        self._advance()

    def _read(self, reading: _Reading, file: PageFile, max_pixels: int, password: str | None) -> Iterator[Page]:
        self._reading[file.source] = reading
        self._waiting.append(reading)

        def failed(error: PageError) -> None:
            self._tell(error)
            reading.failed.append(NotSynced(file.source, error.page, reason_of(error)))

        root = file.path.parents[file.source.count("/")]
        for page in load_pages(file.path, root=root, max_pixels=max_pixels, password=password, on_error=failed):
            try:
                reading.pages.append((page.number, page.sha256))
            except PageError as exc:
                self._tell(exc)
                reading.failed.append(NotSynced(file.source, page.number, reason_of(exc)))
                continue
            if self._metadata:
                page = page.replace(metadata={**page.metadata, **self._metadata})
            reading.entry = replace(reading.entry, as_path=page.image_path is not None)
            self._positions += 1
            yield page
        reading.end, reading.read = self._positions, True
        self._finish()

    def _finish(self) -> None:
        """Write down the files whose pages are all kept, and forget the pages they no longer have."""
        while self._waiting and self._waiting[0].read and self._waiting[0].end <= self._committed:
            reading = self._waiting.popleft()
            entry = replace(reading.entry, pages=tuple(reading.pages))
            # Pages that a failure kept from being reached are not gone.
            if self._found.forgets and all(item.page is not None for item in reading.failed):
                there = {number for number, _ in reading.pages} | {item.page for item in reading.failed}
                self._removed += self._forget(entry.source, {f"{entry.source}#page={number}" for number in there})
            if not reading.failed:
                self._whole.add(entry.source)
            if reading.failed:
                self._failed += reading.failed
                entry = replace(entry, looks=None, digest=None)  # tried again by the next sync
            elif entry.looks is None:  # times that prove nothing: the bytes must be the same still
                entry = replace(entry, digest=entry.digest if _digest(entry) == entry.digest else None)
            elif looks_at(entry.path) != entry.looks:  # written to since, if only to put the old bytes back
                entry = replace(entry, looks=None, digest=None)
            self._ledger.put(entry)
            del self._reading[entry.source]
            self._advance()

    def _forget(self, source: str, kept: Iterable[str] = ()) -> int:
        """Remove a file's pages except those ``kept``; ids that a caller made up are not touched."""
        gone = sorted(set(page_ids(self._store, source)) - set(kept))
        return remove_pages(self._store, self._images, self._lock, gone) if gone else 0

    def _advance(self) -> None:
        if self._bar is not None:
            self._bar.update(1)


def _digest(entry: FileEntry) -> str | None:
    try:
        return digest_of(entry.path, source=entry.source)[0]
    except PageError:
        return None
