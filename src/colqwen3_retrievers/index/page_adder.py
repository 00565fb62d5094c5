"""Adding pages to an index: batch by batch, each stored wholly or not at all, nothing encoded twice."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, Protocol

from colqwen3_retrievers.cache.page_cache import PageSubmitter
from colqwen3_retrievers.errors import ConfigError, EncodeError, PageError
from colqwen3_retrievers.index.page_images import KeptImage
from colqwen3_retrievers.index.page_records import BATCH, PageRecords, batches, same_content, same_description
from colqwen3_retrievers.pages.files import FILE_KEYS
from colqwen3_retrievers.pages.page import Page, Query
from colqwen3_retrievers.stores.protocol import Record
from colqwen3_retrievers.vectors.multi_vector import MultiVector

_IMAGE_THREADS = 2


class PageEncoder(PageSubmitter, Protocol):
    """An encoder as an index uses it, such as :class:`~colqwen3_retrievers.encoding.encoder.ColQwen3Encoder`."""

    def encode_pages(self, pages: Iterable[Page], /) -> list[MultiVector]:
        """Encode pages, in order."""
        ...

    def submit_queries(self, queries: Iterable[str | Query], /) -> Future[list[MultiVector]]:
        """Start encoding queries."""
        ...


@dataclass(frozen=True, slots=True)
class Added:
    """Counts of the pages of one call.

    Attributes:
        added: pages whose id was new.
        updated: pages that replaced other content, metadata or another image under the same id.
        unchanged: pages already stored as they are; they were not encoded again.
        skipped: pages that cannot be read or encoded, where ``on_error`` allows it.

    >>> Added(added=2).skipped
    0
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    skipped: int = 0


Failure = EncodeError | PageError
"""Why one page or file cannot be used."""

OnFailure = Literal["raise", "skip"] | Callable[[Failure], None]
"""How to treat a page or file that cannot be read or encoded."""

Encode = Callable[[list[Page]], list[MultiVector]]
"""A function that returns the multi-vectors of pages, in order."""


class _BadPage(Exception):  # noqa: N818 - never leaves this module; it names the page of a batch that failed
    def __init__(self, page: Page, error: Failure) -> None:
        super().__init__(page.id)
        self.page = page
        self.error = error


@dataclass
class PageAdder:
    """The pages of one call on their way into an index.

    Args:
        records: of the index.
        encode: called only for pages that have to be encoded.
        on_failure: called with each page that cannot be read or encoded, which is then skipped; None raises.
        from_files: whether pages are as files have them. Their digests were then computed from their content, so
            content stored under another id is not encoded again; a digest given by a caller may be that of a whole
            file. Metadata keys other than those of files (``FILE_KEYS``) are the user's, and stay.
    """

    records: PageRecords
    encode: Encode
    on_failure: Callable[[Page, Failure], None] | None = None
    from_files: bool = False
    _seen: dict[str, tuple[str, int]] = field(default_factory=dict)  # digest and position of pages by id
    _counts: Counter[str] = field(default_factory=Counter)

    def run(self, pages: Iterable[Page], batch_size: int, stored: Callable[[int], object]) -> Added:
        """Add all pages, and call ``stored(n)`` after each batch of n."""
        with ThreadPoolExecutor(_IMAGE_THREADS, thread_name_prefix="page-images") as threads:
            for batch in self._batches(pages, batch_size):
                self._commit(batch, threads)
                stored(len(batch))
        return Added(**self._counts)

    def _batches(self, pages: Iterable[Page], size: int) -> Iterator[list[Page]]:
        batch: list[Page] = []
        try:
            for position, page in enumerate(pages):
                if self._is_new(page, position):
                    batch.append(page)
                if len(batch) == size:
                    yield batch
                    batch = []
        except Exception:
            if batch:  # the pages before the failure are good
                yield batch
            raise
        if batch:
            yield batch

    def _is_new(self, page: Page, position: int) -> bool:
        """Return whether a page can be read and did not occur before in this call."""
        if not isinstance(page, Page):
            raise ConfigError(f"pages: expected a Page at {position}, got {type(page).__name__}")
        try:
            digest, first = self._seen.setdefault(page.id, (page.sha256, position))
        except PageError as exc:
            self._skip(page, exc)
            return False
        if digest != page.sha256:
            raise ConfigError(
                f"page {page.id!r}: given at {first} and, with another content, at {position}; one would be lost"
            )
        self._counts["unchanged"] += first != position
        return first == position

    def _skip(self, page: Page, error: Failure) -> None:
        if self.on_failure is None:
            raise error from error.__cause__
        self.on_failure(page, error)
        self._counts["skipped"] += 1

    def _commit(self, batch: list[Page], threads: ThreadPoolExecutor) -> None:
        while batch:
            try:
                self._add(batch, threads)
                return
            except _BadPage as bad:
                self._skip(bad.page, bad.error)
                batch = [page for page in batch if page.id != bad.page.id]

    def _add(self, batch: list[Page], threads: ThreadPoolExecutor) -> None:
        """Encode and store the pages of a batch that are not stored as they are."""
        stored = {record.page.id: record for record in self.records.store.get(page.id for page in batch)}
        if self.from_files:
            batch = [_with_user_metadata(page, stored.get(page.id)) for page in batch]
        changed = [page for page in batch if not self._is_stored(page, stored.get(page.id))]
        if changed:
            vectors = self._stored_vectors(changed, stored)
            futures = [threads.submit(self.records.images.prepare, page) for page in changed]
            try:
                unknown = [page for page in changed if page.id not in vectors]
                if unknown:
                    with self._naming(unknown):
                        encoded = self.encode(unknown)
                    vectors |= {page.id: vector for page, vector in zip(unknown, encoded, strict=True)}
                images = [_prepared(page, future) for page, future in zip(changed, futures, strict=True)]
            finally:
                for future in futures:
                    future.cancel()
            records = [
                Record(page, vectors[page.id], _reference(page, image, stored.get(page.id)))
                for page, image in zip(changed, images, strict=True)
            ]
            with self._naming(changed):  # a store may refuse a page that has too many tokens
                self.records.add(records, images, stored.values())
        updated = sum(page.id in stored for page in changed)
        self._counts.update(added=len(changed) - updated, updated=updated, unchanged=len(batch) - len(changed))

    @contextlib.contextmanager
    def _naming(self, pages: list[Page]) -> Iterator[None]:
        """Name the page that an error's index points to."""
        try:
            yield
        except EncodeError as exc:
            if exc.index is None or not 0 <= exc.index < len(pages):
                raise
            page = pages[exc.index]
            _, position = self._seen[page.id]
            raise _BadPage(page, EncodeError.of(exc, position, f"page {page.id!r}")) from exc

    def _is_stored(self, page: Page, record: Record | None) -> bool:
        return (
            record is not None
            and same_content(page, record.page)
            and same_description(page, record.page)
            and self.records.images.satisfied(page, record.image)
        )

    def _stored_vectors(self, pages: list[Page], stored: dict[str, Record]) -> dict[str, MultiVector]:
        """Return multi-vectors stored for the same content, under the same id or, for files, another."""
        store = self.records.store
        ids = {page.id: page.id for page in pages if page.id in stored and same_content(page, stored[page.id].page)}
        if self.from_files:
            digests = sorted({page.sha256 for page in pages if page.id not in ids})
            twins = {
                record.page.sha256: record.page
                for batch in batches(digests, BATCH)
                for record in store.get(store.ids({"sha256": {"$in": list(batch)}}))
            }
            for page in pages:
                twin = twins.get(page.sha256)
                if page.id not in ids and twin is not None and same_content(page, twin):
                    ids[page.id] = twin.id
        records = {record.page.id: record for record in store.get(sorted(set(ids.values())), vectors=True)}
        vectors = {}
        for page in pages:
            record = records.get(ids.get(page.id, ""))
            if record is not None and record.multi_vector is not None and same_content(page, record.page):
                vectors[page.id] = record.multi_vector  # else another writer replaced it meanwhile
        return vectors


def _prepared(page: Page, future: Future[KeptImage | None]) -> KeptImage | None:
    try:
        return future.result()
    except PageError as exc:
        raise _BadPage(page, exc) from exc


def _reference(page: Page, image: KeptImage | None, stored: Record | None) -> str | None:
    if image is not None:
        return image.reference
    if stored is not None and page.image_source is not None and same_content(page, stored.page):
        return stored.image  # images="none" stores no image, and removes none of the same content
    return None


def _with_user_metadata(page: Page, record: Record | None) -> Page:
    """Return a page read from a file with the metadata that a user gave the stored one."""
    stored = {} if record is None else record.page.metadata
    users = {name: value for name, value in stored.items() if name not in FILE_KEYS and name not in page.metadata}
    return page.replace(metadata={**page.metadata, **users}) if users else page
