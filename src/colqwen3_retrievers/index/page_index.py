"""The index: pages in, hits out. An encoder, a store and the pages' images, put together."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from colqwen3_retrievers.index.page_adder import PageEncoder
from colqwen3_retrievers.index.page_images import ImageMode, PageImages
from colqwen3_retrievers.index.row_candidates import RowCandidates
from colqwen3_retrievers.index.writing import Writing
from colqwen3_retrievers.pages.files import user_path
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore
from colqwen3_retrievers.stores.location import open_store
from colqwen3_retrievers.stores.protocol import MultiVectorStore, Record, check_info
from colqwen3_retrievers.stores.where import Filter, Where


class PageIndex(Writing, RowCandidates):
    """Pages that can be searched.

    Made by :meth:`open`. May be used from several threads; one process at a time may write to a folder, others open it
    with ``read_only=True``; a Qdrant collection takes many writers. Opening, filtering, :meth:`get`, :meth:`delete` and
    :func:`len` never need the model.

    Example:
        >>> with PageIndex.open("my-index", ColQwen3Encoder("tiny")) as index:             # doctest: +SKIP
        ...     index.add(load_pages("reports/"))
        ...     [hit.page.id for hit in index.search("what was the revenue?", k=2)]
    """

    @classmethod
    def open(
        cls,
        location: str | os.PathLike[str] | MultiVectorStore,
        encoder: PageEncoder | None = None,
        *,
        images: ImageMode = "store",
        images_dir: str | os.PathLike[str] | None = None,
        read_only: bool = False,
    ) -> Self:
        """Open an index, making it when it is new and an encoder is given.

        Args:
            location: a folder, the address of a Qdrant collection (``qdrant://host:6333/collection``, ``qdrants://``
                over TLS), or a store that is already open (which :meth:`close` then leaves open).
            encoder: what encodes pages and queries. None rebuilds it from what the index knows, when it is needed.
            images: what becomes of the images of pages added now: ``"store"`` keeps a lossless copy in the index,
                ``"reference"`` the path of the original (images in memory are stored), ``"none"`` nothing.
            images_dir: where stored images lie; the folder's ``images`` by default. For a store elsewhere it is needed
                before a page's image can be stored, and by every reader who wants to see it.
            read_only: opens beside another writer; :meth:`add` and :meth:`delete` are errors.

        Raises:
            ConfigError: a location that names no store, or an unknown ``images``.
            StoreMismatchError: the index was made by another model, dim, pooling or rendering.
            StoreUnavailableError: another writer has it open.
            StoreError: no index there and no encoder to make one; not an index; damaged; of an unknown format.
        """
        if isinstance(location, str | os.PathLike):
            PageImages(None, images)  # checks the mode before anything is made
            info = None if encoder is None else encoder.info
            store, owned = open_store(location, info=info, read_only=read_only), True
        else:
            store, owned = location, False
            if encoder is not None:
                check_info(store.info, encoder.info, store.location)
        beside = store.folder / "images" if isinstance(store, EmbeddedStore) else None
        folder = beside if images_dir is None else user_path(images_dir).absolute()
        return cls(store, encoder, PageImages(folder, images), owns_store=owned)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as location and settings, without keys: a copy in another process opens the index for reading."""
        if not isinstance(self._store, EmbeddedStore) and getattr(self._store, "address", None) is None:
            raise TypeError(f"{self._store.location}: this index cannot be pickled; give its location")
        encoder = None if self._rebuilt is not None else self._encoder
        return _reopen, (self._store.location, encoder, self._images.mode, self._images.folder)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Give itself: an open index is a handle, which copies share."""
        return self

    # -- looking -------------------------------------------------------------------------------------------------------

    def get(self, ids: Iterable[str], vectors: bool = False) -> list[Record]:
        """Give pages by id, in the order asked for; ids that are not there are left out.

        Args:
            ids: ids of pages.
            vectors: whether to read the multi-vectors too, for heatmaps and the like.

        Returns:
            Records: ``.page`` (its image is opened when asked for) and ``.multi_vector`` (None without ``vectors``).

        Raises:
            StoreError: token embeddings are not what was written.

        >>> PageIndex.open("my-index").get(["a.pdf#page=1"])[0].page.number                   # doctest: +SKIP
        1
        """
        found = self._opened().get(ids, vectors=vectors)
        return [Record(self._images.with_image(record), record.multi_vector, record.image) for record in found]

    def ids(self, where: Where | Filter | None = None) -> list[str]:
        """Give the ids of all pages, or of those a filter holds for, in code point order."""
        return self._opened().ids(where)

    def __len__(self) -> int:
        """Count the pages."""
        return len(self._opened())

    def __contains__(self, id: object) -> bool:
        """Whether there is a page with this id."""
        return id in self._opened()

    @property
    def images_dir(self) -> Path | None:
        """Where stored images lie, absolute; None for a store elsewhere that was opened without one."""
        return self._images.folder

    @property
    def store(self) -> MultiVectorStore:
        """The store inside."""
        return self._opened()

    @property
    def encoder(self) -> PageEncoder:
        """The encoder, rebuilt from what the index knows when none was given.

        Raises:
            StoreMismatchError: what was rebuilt is not what made the index.
        """
        return self._ready()

    def compact(self) -> int:
        """Give back the room of replaced and deleted pages now; a folder does it by itself at 30 %, Qdrant always.

        Returns:
            The bytes that became free.
        """
        store = self._writable()
        return store.compact() if isinstance(store, EmbeddedStore) else 0

    def __repr__(self) -> str:
        return f"PageIndex({self.location!r})"


def _reopen(location: str, encoder: PageEncoder | None, images: ImageMode, images_dir: Path | None) -> PageIndex:
    return PageIndex.open(location, encoder, images=images, images_dir=images_dir, read_only=True)
