"""Adding pages to an index: batch by batch, each kept wholly or not at all, nothing encoded twice."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from colqwen3_retrievers.errors import ConfigError, EncodeError, InputTooLongError, PageError, require
from colqwen3_retrievers.index.page_images import KeptImage, PageImages
from colqwen3_retrievers.pages.files import FILE_KEYS
from colqwen3_retrievers.pages.page import Page, Query
from colqwen3_retrievers.stores.protocol import MultiVectorStore, Record
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo, MultiVector

_IMAGE_THREADS = 2
_AT_ONCE = 256  # records held in memory at a time while their images are looked up


class PageEncoder(Protocol):
    """What an index asks of its encoder; :class:`~colqwen3_retrievers.encoding.encoder.ColQwen3Encoder` does it."""

    @property
    def info(self) -> EncoderInfo:
        """What shapes its multi-vectors."""
        ...

    def encode_pages(self, pages: Iterable[Page], /) -> list[MultiVector]:
        """Encode pages, in order."""
        ...

    def submit_queries(self, queries: Iterable[str | Query], /) -> Future[list[MultiVector]]:
        """Start encoding queries."""
        ...


@dataclass(frozen=True, slots=True)
class Added:
    """What became of the pages of one call.

    Attributes:
        added: pages whose id was new.
        updated: pages that took the place of another content, metadata or image under the same id.
        unchanged: pages that were there just so; they were not encoded again.
        skipped: pages left out because they cannot be read or encoded and ``on_error`` said to go on.

    >>> Added(added=2).skipped
    0
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    skipped: int = 0


Failure = EncodeError | PageError
"""What is wrong with one page or file; others can be used all the same."""

Encode = Callable[[list[Page]], list[MultiVector]]
"""What a :class:`PageAdder` asks for the multi-vectors of pages."""


class _BadPage(Exception):  # noqa: N818 - never leaves this module: it tells which page of a batch was at fault
    def __init__(self, page: Page, error: Failure) -> None:
        super().__init__(page.id)
        self.page = page
        self.error = error


class PageAdder:
    """One call of :meth:`~colqwen3_retrievers.index.page_index.PageIndex.add`.

    Args:
        store: where records go.
        images: where page images go.
        encode: gives the multi-vectors of pages, in order; called when the first page has to be encoded.
        lock: held while files and records change, so that a deletion elsewhere removes no image just written.
        computed_digests: whether every page's ``sha256`` was computed from its content. Then a page whose content lies
            in the store under another id is not encoded again. A digest that a caller gave might be one for a whole
            file, and would give all its pages the same token embeddings.
        failed: told of each page that cannot be read or encoded, which is left out; None raises instead.
        from_files: whether pages come as files have them. Then metadata keys that a page in the store has beside those
            of files (``FILE_KEYS``) stay, for no file could give them again; they are the user's.
    """

    def __init__(
        self,
        store: MultiVectorStore,
        images: PageImages,
        encode: Encode,
        lock: threading.RLock,
        *,
        computed_digests: bool = False,
        failed: Callable[[Page, Failure], None] | None = None,
        from_files: bool = False,
    ) -> None:
        self._store = store
        self._images = images
        self._encode_pages = encode
        self._lock = lock
        self._computed_digests = computed_digests
        self._failed = failed
        self._from_files = from_files
        self._threads = ThreadPoolExecutor(_IMAGE_THREADS, thread_name_prefix="page-images")
        self._seen: dict[str, tuple[str, int]] = {}
        self._added = self._updated = self._unchanged = self._skipped = 0

    def run(self, pages: Iterable[Page], batch_size: int, progress: Any = None) -> Added:
        """Add all pages.

        Args:
            pages: read as they are needed.
            batch_size: pages encoded and committed together.
            progress: something with ``update(n)``, called after each batch.

        Raises:
            ConfigError, EncodeError, PageError, StoreError: see
            :meth:`~colqwen3_retrievers.index.page_index.PageIndex.add`.
        """
        batch: list[tuple[int, Page]] = []

        def commit() -> None:
            done = len(batch)
            good = batch
            while good:
                try:
                    self._commit(good)
                    break
                except _BadPage as bad:
                    self._skip(bad)
                    good = [(n, page) for n, page in good if page.id != bad.page.id]
            batch.clear()
            if progress is not None:
                progress.update(done)

        with self._threads:
            try:
                for position, page in enumerate(pages):
                    try:
                        new = self._is_new(page, position)
                    except _BadPage as bad:
                        self._skip(bad)
                        continue
                    if new:
                        batch.append((position, page))
                        if len(batch) == batch_size:
                            commit()
            except Exception:
                if batch and len(batch) < batch_size:  # the iterable failed, not a commit: what came before it is good
                    commit()
                raise
            if batch:
                commit()
        return Added(self._added, self._updated, self._unchanged, self._skipped)

    def _skip(self, bad: _BadPage) -> None:
        """Leave a page out, or raise what is wrong with it."""
        if self._failed is None:
            raise bad.error from bad.error.__cause__
        self._failed(bad.page, bad.error)
        self._skipped += 1

    def _is_new(self, page: Page, position: int) -> bool:
        """Whether this page did not come before in this call.

        Raises:
            ConfigError: not a page, or an id that another content had before.
            _BadPage: its image cannot be read.
        """
        if not isinstance(page, Page):
            raise ConfigError(f"pages: expected a Page at {position}, got {type(page).__name__}")
        try:
            before = self._seen.setdefault(page.id, (page.sha256, position))
        except PageError as exc:
            raise _BadPage(page, exc) from exc
        if before[0] != page.sha256:
            raise ConfigError(
                f"page {page.id!r}: given at {before[1]} and, with another content, at {position}; one would be lost"
            )
        self._unchanged += before[1] != position
        return before[1] == position

    def _commit(self, batch: list[tuple[int, Page]]) -> None:
        """Encode what has to be encoded and keep the batch."""
        known = {record.page.id: record for record in self._store.get([page.id for _, page in batch])}
        if self._from_files:
            batch = [(n, _with_kept_keys(page, known.get(page.id))) for n, page in batch]
        changed = [(n, page) for n, page in batch if not self._is_kept(page, known.get(page.id))]
        if changed:
            encoded = self._stored([page for _, page in changed], known)
            images = [(page, self._threads.submit(self._images.prepare, page)) for _, page in changed]
            try:
                encoded |= self._encode([(n, page) for n, page in changed if page.id not in encoded])
                kept = {page.id: _prepared(page, future) for page, future in images}
            finally:
                for _, future in images:
                    future.cancel()
            self._keep(changed, encoded, kept, known)
        self._unchanged += len(batch) - len(changed)
        self._updated += (updated := sum(page.id in known for _, page in changed))
        self._added += len(changed) - updated

    def _is_kept(self, page: Page, record: Record | None) -> bool:
        return (
            record is not None
            and _same_content(page, record)
            and _description(page) == _description(record.page)
            and self._images.satisfied(page, record.image)
        )

    def _stored(self, pages: list[Page], known: dict[str, Record]) -> dict[str, MultiVector]:
        """Multi-vectors the store has of these very contents, under the same id or, where that is safe, another."""
        lies_at = {page.id: page.id for page in pages if _same_content(page, known.get(page.id))}
        missing = [page for page in pages if page.id not in lies_at]
        if missing and self._computed_digests:
            digests = sorted({page.sha256 for page in missing})
            same = {record.page.sha256: record for record in self._found(digests)}
            lies_at |= {
                page.id: same[page.sha256].page.id for page in missing if _same_content(page, same.get(page.sha256))
            }
        wanted = {page.id: page for page in pages if page.id in lies_at}
        read = {record.page.id: record for record in self._store.get(sorted(set(lies_at.values())), vectors=True)}
        found: dict[str, MultiVector] = {}
        for page_id, page in wanted.items():
            record = read.get(lies_at[page_id])
            if record is not None and record.multi_vector is not None and _same_content(page, record):
                found[page_id] = record.multi_vector
        return found

    def _found(self, digests: list[str]) -> list[Record]:
        found: list[Record] = []
        for first in range(0, len(digests), _AT_ONCE):
            found += self._store.get(self._store.ids({"sha256": {"$in": digests[first : first + _AT_ONCE]}}))
        return found

    def _encode(self, pages: list[tuple[int, Page]]) -> dict[str, MultiVector]:
        if not pages:
            return {}
        plain = [page for _, page in pages]
        try:
            made = self._encode_pages(plain)
        except EncodeError as exc:
            if exc.index is None or not 0 <= exc.index < len(pages):
                raise
            position, page = pages[exc.index]
            raise _BadPage(page, EncodeError.of(exc, position, f"page {page.id!r}")) from exc
        return {page.id: multi_vector for page, multi_vector in zip(plain, made, strict=True)}

    def _keep(
        self,
        pages: list[tuple[int, Page]],
        encoded: dict[str, MultiVector],
        kept: dict[str, KeptImage | None],
        known: dict[str, Record],
    ) -> None:
        """Write images, commit records, and remove the images nobody holds any more."""
        records = []
        for _, page in pages:
            image, old = kept[page.id], known.get(page.id)
            reference = image.reference if image is not None else None
            if image is None and old is not None and page.image_source is not None and _same_content(page, old):
                reference = old.image  # images="none" keeps no more, but takes away none of the same picture
            records.append(Record(page, encoded[page.id], reference))
        with self._lock:
            new = self._images.write(kept.values())
            try:
                self._store.add(records)
            except BaseException as exc:
                self._images.remove(set(new) - self._store.images(new))
                if isinstance(exc, InputTooLongError) and exc.index is not None:  # more than this store can take
                    exc.index, page = pages[exc.index]
                    raise _BadPage(page, exc) from exc
                raise
            released = {record.image for record in known.values() if record.image is not None}
            self._images.remove(released - self._store.images(released))


def remove_pages(store: MultiVectorStore, images: PageImages, lock: threading.RLock, ids: Sequence[str]) -> int:
    """Forget pages by id, and their stored images where no other page has the same.

    Returns:
        How many pages there were.

    Raises:
        StoreError: read-only, closed, and the like.
    """
    with lock:
        held: set[str] = set()
        for first in range(0, len(ids), _AT_ONCE):
            held.update(record.image for record in store.get(ids[first : first + _AT_ONCE]) if record.image is not None)
        deleted = store.delete(ids)
        images.remove(held - store.images(held))
    return deleted


@contextlib.contextmanager
def progress_bar(shown: bool, total: int | None, unit: str) -> Iterator[Any]:
    """Give a progress bar that is drawn on a terminal only, or None when none is asked for.

    >>> with progress_bar(False, 3, " pages") as bar:
    ...     print(bar)
    None
    """
    if not shown:
        yield None
        return
    with require("torch", "tqdm").tqdm(total=total, unit=unit, disable=None) as bar:
        yield bar


def _prepared(page: Page, future: Future[KeptImage | None]) -> KeptImage | None:
    try:
        return future.result()
    except PageError as exc:
        raise _BadPage(page, exc) from exc


def _with_kept_keys(page: Page, record: Record | None) -> Page:
    """Give a page read from a file the metadata that a user gave the one in the store."""
    stored = {} if record is None else record.page.metadata
    kept = {name: value for name, value in stored.items() if name not in FILE_KEYS and name not in page.metadata}
    return page.replace(metadata={**page.metadata, **kept}) if kept else page


def _same_content(page: Page, record: Record | None) -> bool:
    """Whether a page's stored multi-vector is what encoding it again would give."""
    return record is not None and page.sha256 == record.page.sha256 and page.text == record.page.text


def _description(page: Page) -> tuple[str, int, str | None, str]:
    """What can change without a new multi-vector; metadata as JSON, for ``True == 1`` in Python."""
    return page.source, page.number, page.label, json.dumps(page.metadata, sort_keys=True)
