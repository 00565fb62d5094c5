"""What the halves of an index work on: an open store, the pages' images, and an encoder made when it is needed."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

from colqwen3_retrievers.errors import StoreError
from colqwen3_retrievers.index.page_adder import PageEncoder
from colqwen3_retrievers.index.page_images import PageImages
from colqwen3_retrievers.stores.protocol import MultiVectorStore, check_info

if TYPE_CHECKING:
    from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder


class OpenedIndex:
    """The common part of :class:`~colqwen3_retrievers.index.page_index.PageIndex`, which opens and closes.

    Args:
        store: open.
        encoder: what encodes; None rebuilds it from what the store knows.
        images: where images are kept.
        owns_store: whether :meth:`close` closes the store.
    """

    def __init__(
        self, store: MultiVectorStore, encoder: PageEncoder | None, images: PageImages, *, owns_store: bool = False
    ) -> None:
        self._store = store
        self._encoder = encoder
        self._images = images
        self._owns_store = owns_store
        self._rebuilt: ColQwen3Encoder | None = None
        self._closed = False
        self._encoder_lock = threading.Lock()
        self._write_lock = threading.RLock()

    @property
    def location(self) -> str:
        """The folder or address, open or closed."""
        return self._store.location

    def close(self) -> None:
        """Close the store this index opened and the encoder it rebuilt; what was handed in stays open."""
        with self._write_lock, self._encoder_lock:
            self._closed = True
            if self._owns_store:
                self._store.close()
            if self._rebuilt is not None:
                self._rebuilt.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self) -> MultiVectorStore:
        if self._closed:
            raise StoreError(f"{self.location}: the index is closed")
        return self._store

    def _ready(self) -> PageEncoder:
        """Give an encoder known to be the one that made the index."""
        store = self._opened()
        with self._encoder_lock:
            if self._encoder is None:
                from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder

                rebuilt = ColQwen3Encoder.from_info(store.info)
                check_info(store.info, rebuilt.info, store.location)
                self._encoder = self._rebuilt = rebuilt
            return self._encoder
