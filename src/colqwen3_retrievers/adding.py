"""Adding pages to an index: batch by batch, each kept wholly or not at all, nothing encoded twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from colqwen3_retrievers.datatypes import EncoderInfo, MultiVector
from colqwen3_retrievers.documents import Page, Query
from colqwen3_retrievers.errors import ConfigError, EncodeError, InputTooLongError
from colqwen3_retrievers.page_images import KeptImage, PageImages
from colqwen3_retrievers.stores import MultiVectorStore, Record

_IMAGE_THREADS = 2


class PageEncoder(Protocol):
    """What an index asks of its encoder; :class:`~colqwen3_retrievers.encoder.ColQwen3Encoder` does it."""

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
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0


class PageAdder:
    """One call of :meth:`~colqwen3_retrievers.index.PageIndex.add`.

    Args:
        store: where records go.
        images: where page images go.
        encoder: gives the encoder; called when the first page has to be encoded.
        lock: held while files and records change, so that a deletion elsewhere removes no image just written.
    """

    def __init__(
        self,
        store: MultiVectorStore,
        images: PageImages,
        encoder: Callable[[], PageEncoder],
        lock: threading.RLock,
    ) -> None:
        self._store = store
        self._images = images
        self._encoder = encoder
        self._lock = lock
        self._threads = ThreadPoolExecutor(_IMAGE_THREADS, thread_name_prefix="page-images")
        self._seen: dict[str, tuple[str, int]] = {}
        self._added = self._updated = self._unchanged = 0

    def run(self, pages: Iterable[Page], batch_size: int, progress: Any = None) -> Added:
        """Add all pages.

        Args:
            pages: read as they are needed.
            batch_size: pages encoded and committed together.
            progress: something with ``update(n)``, called after each batch.

        Raises:
            ConfigError, EncodeError, PageError, StoreError: see :meth:`~colqwen3_retrievers.index.PageIndex.add`.
        """
        batch: list[tuple[int, Page]] = []

        def commit() -> None:
            done = len(batch)
            self._commit(batch)
            batch.clear()
            if progress is not None:
                progress.update(done)

        with self._threads:
            try:
                for position, page in enumerate(pages):
                    if self._is_new(page, position):
                        batch.append((position, page))
                        if len(batch) == batch_size:
                            commit()
            except Exception:
                if batch and len(batch) < batch_size:  # the iterable failed, not a commit: what came before it is good
                    commit()
                raise
            if batch:
                commit()
        return Added(self._added, self._updated, self._unchanged)

    def _is_new(self, page: Page, position: int) -> bool:
        """Whether this page did not come before in this call.

        Raises:
            ConfigError: not a page, or an id that another content had before.
            PageError: its image cannot be read.
        """
        if not isinstance(page, Page):
            raise ConfigError(f"pages: expected a Page at {position}, got {type(page).__name__}")
        before = self._seen.setdefault(page.id, (page.sha256, position))
        if before[0] != page.sha256:
            raise ConfigError(
                f"page {page.id!r}: given at {before[1]} and, with another content, at {position}; one would be lost"
            )
        self._unchanged += before[1] != position
        return before[1] == position

    def _commit(self, batch: list[tuple[int, Page]]) -> None:
        """Encode what has to be encoded and keep the batch."""
        known = {record.page.id: record for record in self._store.get([page.id for _, page in batch])}
        changed = [(n, page) for n, page in batch if not self._is_kept(page, known.get(page.id))]
        if changed:
            encoded = self._stored([page for _, page in changed if _same_content(page, known.get(page.id))])
            images = {page.id: self._threads.submit(self._images.prepare, page) for _, page in changed}
            try:
                encoded |= self._encode([(n, page) for n, page in changed if page.id not in encoded])
                kept = {page_id: future.result() for page_id, future in images.items()}
            finally:
                for future in images.values():
                    future.cancel()
            self._keep([page for _, page in changed], encoded, kept, known)
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

    def _stored(self, pages: list[Page]) -> dict[str, MultiVector]:
        """Multi-vectors the store has of these very contents."""
        asked = {page.id: page for page in pages}
        return {
            record.page.id: record.multi_vector
            for record in self._store.get(asked, vectors=True)
            if record.multi_vector is not None and _same_content(asked[record.page.id], record)
        }

    def _encode(self, pages: list[tuple[int, Page]]) -> dict[str, MultiVector]:
        if not pages:
            return {}
        try:
            made = self._encoder().encode_pages([page for _, page in pages])
        except EncodeError as exc:
            if exc.index is None or not 0 <= exc.index < len(pages):
                raise
            position, page = pages[exc.index]
            message = f"page {page.id!r}: {str(exc).removeprefix(f'input {exc.index}: ')}"
            if isinstance(exc, InputTooLongError):
                raise InputTooLongError(message, limit=exc.limit, actual=exc.actual, index=position) from exc
            raise EncodeError(message, index=position) from exc
        return {page.id: multi_vector for (_, page), multi_vector in zip(pages, made, strict=True)}

    def _keep(
        self,
        pages: list[Page],
        encoded: dict[str, MultiVector],
        kept: dict[str, KeptImage | None],
        known: dict[str, Record],
    ) -> None:
        """Write images, commit records, and remove the images nobody holds any more."""
        records = []
        for page in pages:
            image, old = kept[page.id], known.get(page.id)
            reference = image.reference if image is not None else None
            if image is None and old is not None and page.image_source is not None and _same_content(page, old):
                reference = old.image  # images="none" keeps no more, but takes away none of the same picture
            records.append(Record(page, encoded[page.id], reference))
        with self._lock:
            new = self._images.write(kept.values())
            try:
                self._store.add(records)
            except BaseException:
                self._images.remove(set(new) - self._store.images(new))
                raise
            released = {record.image for record in known.values() if record.image is not None}
            self._images.remove(released - self._store.images(released))


def _same_content(page: Page, record: Record | None) -> bool:
    """Whether a page's stored multi-vector is what encoding it again would give."""
    return record is not None and page.sha256 == record.page.sha256 and page.text == record.page.text


def _description(page: Page) -> tuple[str, int, str | None, str]:
    """What can change without a new multi-vector; metadata as JSON, for ``True == 1`` in Python."""
    return page.source, page.number, page.label, json.dumps(page.metadata, sort_keys=True)
