"""The index: pages in, hits out. An encoder, a store and the pages' images, put together."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from colqwen3_retrievers.adding import Added, PageAdder, PageEncoder
from colqwen3_retrievers.datatypes import EncoderInfo, MultiVector
from colqwen3_retrievers.documents import Hit, Page, Query
from colqwen3_retrievers.errors import ConfigError, StoreError, require
from colqwen3_retrievers.page_images import ImageMode, PageImages
from colqwen3_retrievers.searching import Question, Search, in_order, to_encode
from colqwen3_retrievers.stores import MultiVectorStore, Record, open_store
from colqwen3_retrievers.stores.embedded import EmbeddedStore
from colqwen3_retrievers.stores.protocol import GroupBy, check_addable, check_ids, check_info
from colqwen3_retrievers.stores.where import Filter, Where, parse

if TYPE_CHECKING:
    from colqwen3_retrievers.encoder import ColQwen3Encoder

_AT_ONCE = 256  # records held in memory at a time while their images are looked up


class PageIndex:
    """Pages that can be searched.

    Made by :meth:`open`. May be used from several threads; one process at a time may write, others open it with
    ``read_only=True``. Opening, filtering, :meth:`get`, :meth:`delete` and :func:`len` never need the model.

    Example:
        >>> with PageIndex.open("my-index", ColQwen3Encoder("tiny")) as index:             # doctest: +SKIP
        ...     index.add(load_pages("reports/"))
        ...     [hit.page.id for hit in index.search("what was the revenue?", k=2)]
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
            location: a folder, or a store that is already open (which :meth:`close` then leaves open).
            encoder: what encodes pages and queries. None rebuilds it from what the index knows, when it is needed.
            images: what becomes of the images of pages added now: ``"store"`` keeps a lossless copy in the index,
                ``"reference"`` the path of the original (images in memory are stored), ``"none"`` nothing.
            images_dir: where stored images lie; the folder's ``images`` by default, needed for a store elsewhere.
            read_only: opens beside another writer; :meth:`add` and :meth:`delete` are errors.

        Raises:
            ConfigError: a location that names no store, an unknown ``images``, or no place to store images.
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
        folder = beside if images_dir is None else Path(images_dir).expanduser().absolute()
        if folder is None and images == "store" and not (read_only or store.read_only):
            raise ConfigError(f"{store.location}: give images_dir= to store page images, or another images=")
        return cls(store, encoder, PageImages(folder, images), owns_store=owned)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as location and settings: a copy in another process opens the index for reading."""
        if not isinstance(self._store, EmbeddedStore):
            raise TypeError(f"{self._store.location}: this index cannot be pickled; give its location")
        encoder = None if self._rebuilt is not None else self._encoder
        return _reopen, (self._store.location, encoder, self._images.mode, self._images.folder)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Give itself: an open index is a handle, which copies share."""
        return self

    # -- writing -------------------------------------------------------------------------------------------------------

    def add(self, pages: Iterable[Page] | Page, *, show_progress: bool = False, batch_size: int = 16) -> Added:
        """Encode pages and keep them, each in place of the one with its id.

        Pages are taken ``batch_size`` at a time; each such batch is kept wholly or not at all, and what is kept
        survives a crash. A page that is there with the same content and metadata is passed over, so that adding the
        same pages again goes on where an interrupted call stopped.

        Args:
            pages: any iterable; it is read as it goes.
            show_progress: whether to draw a progress bar (on a terminal).
            batch_size: pages encoded and committed together, at least 1.

        Returns:
            How many pages were new, updated and unchanged.

        Raises:
            ConfigError: two pages of one id and different content in one call: one of them would be lost.
            EncodeError: a page cannot be encoded; it is named, and the batches before its own are kept.
            PageError: the iterable met a file it cannot read; all pages before it are kept.
            StoreMismatchError: the encoder has another ``max_visual_tokens`` than the index.
            StoreError: read-only, closed, the disk is full, and the like.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size: expected a whole number from 1, got {batch_size!r}")
        if isinstance(pages, str | bytes | Path) or not isinstance(pages, Page | Iterable):
            raise ConfigError(f"pages: expected pages, got {type(pages).__name__}; load_pages reads files")
        store = self._writable()
        if self._encoder is not None:
            check_addable(store.info, self._encoder.info, store.location)
        adder = PageAdder(store, self._images, self._ready, self._write_lock)
        bar: Any = None
        if show_progress:
            total = len(pages) if isinstance(pages, Sequence) else None
            bar = require("torch", "tqdm").tqdm(total=total, unit=" pages", disable=None)
        try:
            return adder.run([pages] if isinstance(pages, Page) else pages, batch_size, bar)
        finally:
            if bar is not None:
                bar.close()

    def delete(self, ids: Iterable[str] | None = None, *, where: Where | Filter | None = None) -> int:
        """Forget pages, and their stored images where no other page has the same.

        Their token embeddings are out of every search at once; their bytes stay in the token file until it is
        compacted.

        Args:
            ids: ids of pages; ones that are not there are no error.
            where: a filter; with ``ids`` too, pages that meet both.

        Returns:
            How many pages there were.

        Raises:
            ConfigError: neither is given, or a filter that holds for every page.
            StoreError: read-only or closed.

        >>> PageIndex.open("my-index").delete(where={"source": "old.pdf"})                    # doctest: +SKIP
        12
        """
        store, tree = self._writable(), parse(where)
        if ids is None and tree is None:
            raise ConfigError("delete: give ids, or a where that says which pages; an empty one would mean all of them")
        with self._write_lock:
            meant = check_ids(ids) if ids is not None else store.ids(tree)
            if ids is not None and tree is not None:
                among = set(store.ids(tree))
                meant = [page_id for page_id in meant if page_id in among]
            held: set[str | None] = set()
            for first in range(0, len(meant), _AT_ONCE):
                held.update(record.image for record in store.get(meant[first : first + _AT_ONCE]))
            deleted = store.delete(meant)
            released = {image for image in held if image is not None}
            self._images.remove(released - store.images(released))
        return deleted

    # -- searching -----------------------------------------------------------------------------------------------------

    def search(
        self,
        query: Question,
        k: int = 5,
        *,
        where: Where | Filter | None = None,
        exact: bool = False,
        group_by: GroupBy | None = None,
        window: int = 0,
    ) -> list[Hit]:
        """Find the pages that answer a query best.

        Args:
            query: a text (a string is always one), a :class:`Query`, an image (PIL, `pathlib.Path` or bytes), or a
                multi-vector made before.
            k: most hits, at least 1.
            where: only among these pages; the language is that of :mod:`~colqwen3_retrievers.stores.where`.
            exact: whether to score every page; False lets a store score candidates only.
            group_by: ``"source"`` gives the best page of each source.
            window: pages before and after each hit, by number in its source, as ``hit.neighbours``; the filter does
                not bear on them.

        Returns:
            Hits, best first, equal scores by id; none when the index is empty.

        Raises:
            ConfigError: ``k`` below 1, a bad filter, or something that is no query.
            EncodeError: the query cannot be encoded.
            StoreMismatchError: the encoder rebuilt from what the index knows is not the one that made it.

        >>> PageIndex.open("my-index").search("revenue in 2020", k=3, where={"year": 2020})   # doctest: +SKIP
        [Hit(page=Page(id='a.pdf#page=7', ...), score=17.3, neighbours=()), ...]
        """
        return self.search_many([query], k, where=where, exact=exact, group_by=group_by, window=window)[0]

    def search_many(
        self,
        queries: Sequence[Question],
        k: int = 5,
        *,
        where: Where | Filter | None = None,
        exact: bool = False,
        group_by: GroupBy | None = None,
        window: int = 0,
    ) -> list[list[Hit]]:
        """Search for several queries at once: encoded together, and each page read once. See :meth:`search`.

        Returns:
            The hits of each query, in order.
        """
        if isinstance(queries, str | bytes | Path | Query | MultiVector) or not isinstance(queries, Sequence):
            raise ConfigError(f"queries: expected a list, got {type(queries).__name__}; search takes a single one")
        asked = Search(k, where, exact, group_by, window)
        texts, ready = to_encode(queries)
        if not queries or not len(self._opened()):
            return [[] for _ in queries]
        made = self._ready().submit_queries(texts).result() if texts else []
        return asked.run(self._opened(), self._images, in_order(ready, made))

    async def asearch(
        self,
        query: Question,
        k: int = 5,
        *,
        where: Where | Filter | None = None,
        exact: bool = False,
        group_by: GroupBy | None = None,
        window: int = 0,
    ) -> list[Hit]:
        """Search without blocking the event loop; cancelling it cancels the encoding. See :meth:`search`."""
        asked = Search(k, where, exact, group_by, window)
        texts, ready = to_encode([query])
        if not await asyncio.to_thread(lambda: len(self._opened())):
            return []
        made: list[MultiVector] = []
        if texts:  # submitting may load a model, so it too belongs in a thread
            future = await asyncio.to_thread(lambda: self._ready().submit_queries(texts))
            made = await asyncio.wrap_future(future)
        return (await asyncio.to_thread(asked.run, self._opened(), self._images, in_order(ready, made)))[0]

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
    def info(self) -> EncoderInfo:
        """What made the multi-vectors, as the index knows it; no model is needed."""
        return self._opened().info

    @property
    def location(self) -> str:
        """The folder or address, open or closed."""
        return self._store.location

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

    def __repr__(self) -> str:
        return f"PageIndex({self.location!r})"

    # -- inside --------------------------------------------------------------------------------------------------------

    def _opened(self) -> MultiVectorStore:
        if self._closed:
            raise StoreError(f"{self.location}: the index is closed")
        return self._store

    def _writable(self) -> MultiVectorStore:
        store = self._opened()
        if store.read_only:
            raise StoreError(f"{store.location}: opened with read_only=True")
        return store

    def _ready(self) -> PageEncoder:
        """Give an encoder known to be the one that made the index."""
        store = self._opened()
        with self._encoder_lock:
            if self._encoder is None:
                from colqwen3_retrievers.encoder import ColQwen3Encoder

                rebuilt = ColQwen3Encoder.from_info(store.info)
                check_info(store.info, rebuilt.info, store.location)
                self._encoder = self._rebuilt = rebuilt
            return self._encoder


def _reopen(location: str, encoder: PageEncoder | None, images: ImageMode, images_dir: Path | None) -> PageIndex:
    return PageIndex.open(location, encoder, images=images, images_dir=images_dir, read_only=True)
