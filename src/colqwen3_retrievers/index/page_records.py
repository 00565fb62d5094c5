"""The records of an index and the image files they refer to, changed together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from colqwen3_retrievers.fork import ForkSafeLock
from colqwen3_retrievers.index.page_images import KeptImage, PageImages
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.stores.protocol import MultiVectorStore, Record

BATCH = 256
"""Records looked up in one call when their multi-vectors are not needed."""

_Item = TypeVar("_Item")


class PageRecords:
    """Records in a store and their image files.

    Args:
        store: holds the records.
        images: holds the image files.

    Attributes:
        filter_names: metadata names in filters that have been looked up.
        lock: held while files and records change, so that no deletion removes an image another thread just wrote.
    """

    def __init__(self, store: MultiVectorStore, images: PageImages) -> None:
        self.store = store
        self.images = images
        self.filter_names: set[str] = set()
        self.lock = ForkSafeLock()

    def add(self, records: list[Record], images: Iterable[KeptImage | None], replaced: Iterable[Record]) -> None:
        """Write images, commit records, and remove the images of replaced records that no record uses any more.

        Raises:
            StoreError, EncodeError: as the store's ``add``; the images written by this call are removed.
        """
        with self.lock:
            written = self.images.write(images)
            try:
                self.store.add(records)
            except BaseException:
                self.remove_unused(written)
                raise
            self.remove_unused(record.image for record in replaced)

    def remove(self, ids: Sequence[str]) -> int:
        """Delete records by id and the images no record uses any more; return how many records there were."""
        with self.lock:
            images = {record.image for batch in batches(ids, BATCH) for record in self.store.get(batch)}
            count = self.store.delete(ids)
            self.remove_unused(images)
        return count

    def remove_unused(self, references: Iterable[str | None]) -> None:
        """Remove those of these image files that no record refers to."""
        candidates = {reference for reference in references if reference is not None}
        if candidates:
            self.images.remove(candidates - self.store.images(candidates))


def batches(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    """Yield consecutive slices of a sequence.

    >>> list(batches("abcde", 2))
    ['ab', 'cd', 'e']
    """
    for start in range(0, len(items), size):
        yield items[start : start + size]


def same_content(page: Page, other: Page) -> bool:
    """Return whether two pages have the same content, and so the same multi-vector."""
    return page.sha256 == other.sha256 and page.text == other.text


def same_description(page: Page, other: Page) -> bool:
    """Return whether two pages agree in all that can change without a new multi-vector.

    >>> same_description(Page(id="a", metadata={"year": 1}), Page(id="a", metadata={"year": True}))
    False
    """
    return _description(page) == _description(other)


def _description(page: Page) -> tuple[str, int, str | None, str]:
    metadata = json.dumps(page.metadata, sort_keys=True)  # 1 == True in Python, but not in JSON
    return page.source, page.number, page.label, metadata
