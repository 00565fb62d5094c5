"""The index: pages in, hits out. An encoder, a store and the pages' images, put together."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from colqwen3_retrievers.adding import Added, Encode, PageAdder, PageEncoder, encoding, progress_bar, remove_pages
from colqwen3_retrievers.documents import Page
from colqwen3_retrievers.errors import ConfigError, StoreError
from colqwen3_retrievers.file_ledger import open_ledger
from colqwen3_retrievers.page_cache import CacheOrFolder
from colqwen3_retrievers.page_files import PagePath
from colqwen3_retrievers.page_images import ImageMode, PageImages
from colqwen3_retrievers.pages import DEFAULT_MAX_PIXELS
from colqwen3_retrievers.row_candidates import RowCandidates
from colqwen3_retrievers.stores import MultiVectorStore, Record, open_store
from colqwen3_retrievers.stores.embedded import EmbeddedStore
from colqwen3_retrievers.stores.protocol import check_addable, check_ids, check_info
from colqwen3_retrievers.stores.where import Filter, Where, parse
from colqwen3_retrievers.synced_files import FoundFiles
from colqwen3_retrievers.syncing import FileSync, Synced

if TYPE_CHECKING:
    from colqwen3_retrievers.encoder import ColQwen3Encoder


class PageIndex(RowCandidates):
    """Pages that can be searched.

    Made by :meth:`open`. May be used from several threads; one process at a time may write to a folder, others open it
    with ``read_only=True``; a Qdrant collection takes many writers. Opening, filtering, :meth:`get`, :meth:`delete` and
    :func:`len` never need the model.

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
        folder = beside if images_dir is None else Path(images_dir).expanduser().absolute()
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

    # -- writing -------------------------------------------------------------------------------------------------------

    def add(
        self,
        pages: Iterable[Page] | Page,
        *,
        show_progress: bool = False,
        batch_size: int = 16,
        cache: CacheOrFolder | None = None,
    ) -> Added:
        """Encode pages and keep them, each in place of the one with its id.

        Pages are taken ``batch_size`` at a time; each such batch is kept wholly or not at all, and what is kept
        survives a crash. A page that is there with the same content and metadata is passed over, so that adding the
        same pages again goes on where an interrupted call stopped.

        Args:
            pages: any iterable; it is read as it goes.
            show_progress: whether to draw a progress bar (on a terminal).
            batch_size: pages encoded and committed together, at least 1.
            cache: a :class:`~colqwen3_retrievers.page_cache.PageEmbeddingCache`, or the folder of one: contents it
                knows are not encoded, and what is encoded is kept in it.

        Returns:
            How many pages were new, updated and unchanged.

        Raises:
            ConfigError: two pages of one id and different content in one call: one of them would be lost.
            EncodeError: a page cannot be encoded; it is named, and the batches before its own are kept.
            PageError: the iterable met a file it cannot read; all pages before it are kept.
            StoreMismatchError: the encoder has another ``max_visual_tokens`` than the index.
            StoreError: read-only, closed, the disk is full, and the like.
        """
        if isinstance(pages, str | bytes | Path) or not isinstance(pages, Page | Iterable):
            raise ConfigError(f"pages: expected pages, got {type(pages).__name__}; load_pages reads files")
        total = len(pages) if isinstance(pages, Sequence) else None
        with self._adding(batch_size, cache) as encode, progress_bar(show_progress, total, " pages") as bar:
            adder = PageAdder(self._store, self._images, encode, self._write_lock)
            return adder.run([pages] if isinstance(pages, Page) else pages, batch_size, bar)

    def sync(
        self,
        paths: PagePath | Iterable[PagePath],
        *,
        root: PagePath | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        password: str | None = None,
        allow_empty: bool = False,
        verify: bool = False,
        show_progress: bool = False,
        batch_size: int = 16,
        cache: CacheOrFolder | None = None,
        ledger: str | os.PathLike[str] | None = None,
    ) -> Synced:
        """Make the index agree with files: read what is new or changed, forget what is gone under these paths only.

        A page whose content is in the index already, under whatever name, is not encoded again, so that a renamed file
        costs no encoding. A file, page or folder that cannot be read is not gone: it is reported and its pages stay. A
        run that was interrupted is gone on with by running it again. Readers see each batch of pages whole.

        A file is not even opened when its size, its times, the change time of its inode, which only the system sets,
        and its inode number are those of the last time, and every page it had is still in the index with its image.
        Else its bytes are hashed, and its pages read only when they differ. A system that keeps no change time
        (Windows) always hashes. What was seen is noted in the ledger, a file beside the index; without it, as after
        :meth:`add`, a sync takes over the pages of the files it finds and forgets no other.

        Args:
            paths: files and folders, as in :func:`~colqwen3_retrievers.pages.load_pages`; no patterns.
            root: what sources are relative to; by default a folder itself, and a file's folder.
            max_pixels: most pixels of a rendered page; pages read with another bound are read again.
            password: opens encrypted PDFs.
            allow_empty: forgets also what looks as if a disk were not mounted: everything under a path that is not
                there any more or has no page file left, and files of a folder now empty and on another disk.
            verify: hash every file, whatever its times say: for file systems whose change times lie.
            show_progress: whether to draw a progress bar (on a terminal), counting files.
            batch_size: pages encoded and committed together, at least 1.
            cache: as for :meth:`add`.
            ledger: a file to note in; by default ``files.sqlite`` in the index's folder, or else in ``images_dir``.

        Returns:
            How many pages were added, updated, unchanged and removed, and what failed and why.

        Raises:
            PageError: a path that is not there or has no page file left, without ``allow_empty``; nothing was changed.
            ConfigError: two files that would have the same source, in this call or from an earlier one; no place for
                the ledger; a wrong argument.
            StoreMismatchError: the encoder has another ``max_visual_tokens`` than the index.
            StoreError: read-only, closed, the disk is full, the ledger is damaged, and the like.

        >>> with PageIndex.open("my-index", ColQwen3Encoder("tiny")) as index:             # doctest: +SKIP
        ...     index.sync(["reports/"])
        Synced(added=12, updated=1, unchanged=340, removed=2, failed=())
        """
        own = self._store.folder if isinstance(self._store, EmbeddedStore) else None
        with (
            self._adding(batch_size, cache) as encode,
            open_ledger(ledger, own, self._images.folder, self.location) as noted,
        ):
            found = FoundFiles(self._store, self._images, noted.entries())
            found.find(paths, root, allow_empty)
            sync = FileSync(self._store, self._images, self._write_lock, noted, found)
            adder = PageAdder(
                self._store, self._images, encode, self._write_lock, computed_digests=True, failed=sync.page_failed
            )  # fmt: skip
            with progress_bar(show_progress, len(found.files), " files") as bar:
                return sync.run(
                    adder, max_pixels=max_pixels, password=password, verify=verify, batch_size=batch_size, bar=bar
                )

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
            return remove_pages(store, self._images, self._write_lock, meant)

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

    def compact(self) -> int:
        """Give back the room of replaced and deleted pages now; a folder does it by itself at 30 %, Qdrant always.

        Returns:
            The bytes that became free.
        """
        store = self._writable()
        return store.compact() if isinstance(store, EmbeddedStore) else 0

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

    def _adding(self, batch_size: object, cache: CacheOrFolder | None) -> AbstractContextManager[Encode]:
        """Check that pages can be added, and give what encodes them."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size: expected a whole number from 1, got {batch_size!r}")
        store = self._writable()
        if self._encoder is not None:
            check_addable(store.info, self._encoder.info, store.location)
        return encoding(store, self._ready, cache)

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
