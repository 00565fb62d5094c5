"""The index: pages in, hits out. It joins an encoder, a store and the pages' images."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from colqwen3_retrievers.cache.page_cache import CacheOrFolder, PageEmbeddingCache
from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, StoreError
from colqwen3_retrievers.fork import ForkSafeLock
from colqwen3_retrievers.index import row_candidates
from colqwen3_retrievers.index.file_ledger import open_ledger
from colqwen3_retrievers.index.file_sync import FileListing, FileSync, Synced, SyncOptions
from colqwen3_retrievers.index.page_adder import Added, Encode, Failure, OnFailure, PageAdder, PageEncoder
from colqwen3_retrievers.index.page_images import ImageMode, PageImages, images_folder
from colqwen3_retrievers.index.page_records import PageRecords
from colqwen3_retrievers.index.row_candidates import MAX_ROWS, CandidateRow
from colqwen3_retrievers.index.search import Question, Search, in_order, report_unknown_names, to_encode
from colqwen3_retrievers.pages.files import PagePath, error_policy, user_path
from colqwen3_retrievers.pages.loading import DEFAULT_MAX_PIXELS
from colqwen3_retrievers.pages.page import Hit, Page, Query
from colqwen3_retrievers.progress import progress_bar
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore
from colqwen3_retrievers.stores.location import open_store
from colqwen3_retrievers.stores.protocol import (
    GroupBy,
    MultiVectorStore,
    Record,
    check_addable,
    check_deletion,
    check_ids,
    check_info,
)
from colqwen3_retrievers.stores.where import Filter, Where
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo, Float32, MultiVector

if TYPE_CHECKING:
    from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder


class PageIndex:
    """Pages that can be searched.

    Made by :meth:`open`. May be used from several threads; one process at a time may write to a folder, others open it
    with ``read_only=True``; a Qdrant collection takes many writers. Opening, filtering, :meth:`get`, :meth:`delete` and
    :func:`len` never need the model.

    Example:
        >>> import tempfile
        >>> from colqwen3_retrievers import ColQwen3Encoder, Page
        >>> folder = tempfile.TemporaryDirectory()
        >>> index = PageIndex.open(f"{folder.name}/index", ColQwen3Encoder("tiny"))
        >>> index.add([Page(id="a", text="Revenue rose."), Page(id="b", text="Costs fell.", metadata={"year": 2020})])
        Added(added=2, updated=0, unchanged=0, skipped=0)
        >>> [hit.page.id for hit in index.search("Revenue rose.", k=1)], index.ids({"year": 2020})
        (['a'], ['b'])
        >>> index.rescore("Costs fell.", ["a", "b"], k=1)[0].page.id, index.row_queries("costs").shape[1]
        ('b', 128)
        >>> index.get(["a"])[0].page.text, index.delete(where={"year": 2020}), len(index)
        ('Revenue rose.', 1, 1)
        >>> index.close(); folder.cleanup()
    """

    def __init__(
        self, store: MultiVectorStore, encoder: PageEncoder | None, images: PageImages, *, owns_store: bool = False
    ) -> None:
        self._store = store
        self._encoder = encoder
        self._images = images
        self._records = PageRecords(store, images)
        self._owns_store = owns_store
        self._rebuilt: ColQwen3Encoder | None = None
        self._closed = False
        self._encoder_lock = ForkSafeLock()

    # -- opening and closing -------------------------------------------------------------------------------------------

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
            encoder: encodes pages and queries. None rebuilds it from what the index records, when it is needed.
            images: how the images of pages added now are kept: ``"store"`` keeps a lossless copy in the index,
                ``"reference"`` the path of the original (images in memory are stored), ``"none"`` nothing.
            images_dir: the folder of stored images; the index folder's ``images`` by default. A store elsewhere needs
                it before a page's image can be stored, and every reader needs it to see images.
            read_only: opens beside another writer; :meth:`add` and :meth:`delete` are errors.

        Raises:
            ConfigError: a location that names no store, or an unknown ``images``.
            StoreMismatchError: the index was made by another model, dim, pooling or rendering.
            StoreUnavailableError: another writer has it open.
            StoreError: no index there and no encoder to make one; not an index; damaged; of an unknown format.
        """
        owned = isinstance(location, str | os.PathLike)
        if isinstance(location, str | os.PathLike):
            PageImages(None, images)  # checks the mode before anything is made
            info = None if encoder is None else encoder.info
            store = open_store(location, info=info, read_only=read_only)
        else:
            store = location
            if encoder is not None:
                check_info(store.info, encoder.info, store.location)
        return cls(store, encoder, PageImages(images_folder(store, images_dir), images), owns_store=owned)

    def close(self) -> None:
        """Close the store this index opened and the encoder it rebuilt; objects passed in stay open."""
        with self._records.lock, self._encoder_lock:
            self._closed = True
            if self._owns_store:
                self._store.close()
            if self._rebuilt is not None:
                self._rebuilt.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as location and settings, without keys: a copy in another process opens the index for reading."""
        if not isinstance(self._store, EmbeddedStore) and getattr(self._store, "address", None) is None:
            raise TypeError(f"{self._store.location}: this index cannot be pickled; give its location")
        encoder = None if self._rebuilt is not None else self._encoder
        return _reopen, (self._store.location, encoder, self._images.mode, self._images.folder)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # an open index is a handle, which copies share

    def __repr__(self) -> str:
        return f"PageIndex({self.location!r})"

    @property
    def location(self) -> str:
        """The folder or address, open or closed."""
        return self._store.location

    @property
    def store(self) -> MultiVectorStore:
        """The store inside.

        Raises:
            StoreError: the index is closed.
        """
        if self._closed:
            raise StoreError(f"{self.location}: the index is closed")
        return self._store

    @property
    def encoder(self) -> PageEncoder:
        """The encoder, rebuilt from what the index records when none was given.

        Raises:
            StoreMismatchError: the rebuilt encoder is not the one that made the index.
        """
        store = self.store
        with self._encoder_lock:
            if self._encoder is None:
                from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder

                rebuilt = ColQwen3Encoder.from_info(store.info)
                check_info(store.info, rebuilt.info, store.location)
                self._encoder = self._rebuilt = rebuilt
            return self._encoder

    @property
    def info(self) -> EncoderInfo:
        """What made the multi-vectors, as the index records it; no model is needed."""
        return self.store.info

    @property
    def images_dir(self) -> Path | None:
        """The folder of stored images, absolute; None for a store elsewhere that was opened without one."""
        return self._images.folder

    # -- adding and removing pages -------------------------------------------------------------------------------------

    def add(
        self,
        pages: Iterable[Page] | Page,
        *,
        on_error: OnFailure = "raise",
        show_progress: bool = False,
        batch_size: int = 16,
        cache: CacheOrFolder | None = None,
    ) -> Added:
        """Encode and store pages, each in place of the one with its id.

        Each batch is stored wholly or not at all, and what is stored survives a crash. A page stored with the same
        content and metadata is skipped, so adding the same pages again resumes an interrupted call. A page is replaced
        whole, with its metadata. Two folders with files of one name give pages of one id, of which only the last would
        be left: load them with a ``root`` above both, or use :meth:`add_files`, which refuses that.

        Args:
            pages: any iterable; it is read as it goes.
            on_error: for pages that cannot be read or encoded: ``"raise"``; ``"skip"``, which logs a warning; or a
                function of the EncodeError or PageError that skips by returning. Errors of the iterable always raise.
            show_progress: whether to draw a progress bar (on a terminal).
            batch_size: pages encoded and committed together, at least 1.
            cache: a :class:`~colqwen3_retrievers.cache.page_cache.PageEmbeddingCache`, or the folder of one, that is
                read before encoding and written after.

        Returns:
            How many pages were new, updated, unchanged and skipped.

        Raises:
            ConfigError: two pages of one id and different content in one call: one of them would be lost.
            EncodeError: a page cannot be encoded; it is named, and the batches before its own are stored.
            PageError: a page or the iterable met a file it cannot read; the pages before it are stored.
            StoreMismatchError: the encoder has another ``max_visual_tokens`` than the index.
            StoreError: read-only, closed, the disk is full, and the like.
        """
        if isinstance(pages, str | bytes | Path) or not isinstance(pages, Page | Iterable):
            raise ConfigError(f"pages: expected pages, got {type(pages).__name__}; load_pages reads files")
        report: Callable[[Failure], None] = error_policy(on_error)
        total = len(pages) if isinstance(pages, Sequence) else None
        with self._encoding(batch_size, cache) as encode, progress_bar(show_progress, total, "pages") as bar:
            on_failure = None if on_error == "raise" else lambda _, error: report(error)
            adder = PageAdder(self._records, encode, on_failure)
            return adder.run([pages] if isinstance(pages, Page) else pages, batch_size, bar.update)

    def add_files(
        self,
        paths: PagePath | Iterable[PagePath],
        *,
        root: PagePath | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        password: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        on_error: OnFailure = "raise",
        moved: bool = False,
        show_progress: bool = False,
        batch_size: int = 16,
        cache: CacheOrFolder | None = None,
        ledger: str | os.PathLike[str] | None = None,
    ) -> Synced:
        """Read files and add their pages: a :meth:`sync` that removes nothing.

        An unchanged file is not opened, as in :meth:`sync`. A file that would replace the pages of another one that the
        index knows by the same name is an error, and no page is lost.

        The arguments are those of :meth:`sync`, except that ``paths`` may be patterns too, ``on_error`` is that of
        :meth:`add`, for files too, and a store elsewhere without ``images_dir`` needs no ``ledger``: file names are
        then not remembered from call to call.

        Returns:
            How many pages were added, updated and unchanged, and what failed and why.

        Raises:
            PageError, EncodeError: a path, file or page cannot be used; batches before it are stored.
            ConfigError: two files that would have the same source, in this call or from an earlier one; both are named.
            StoreMismatchError, StoreError: as :meth:`add`.
        """
        options = SyncOptions(root, max_pixels, password, metadata, moved, remove=False)
        return self._sync_files(paths, options, error_policy(on_error), batch_size, cache, ledger, show_progress)

    def sync(
        self,
        paths: PagePath | Iterable[PagePath],
        *,
        root: PagePath | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        password: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        allow_empty: bool = False,
        moved: bool = False,
        verify: bool = False,
        show_progress: bool = False,
        batch_size: int = 16,
        cache: CacheOrFolder | None = None,
        ledger: str | os.PathLike[str] | None = None,
    ) -> Synced:
        """Make the index agree with files: add what changed, remove what is gone under these paths only.

        Content in the index under any name is not encoded again, so a renamed file costs no encoding. A file, page or
        folder that cannot be read is not gone: it is reported and its pages stay. Run an interrupted sync again to
        resume it. Readers see each batch of pages whole.

        A file is not even opened when its size, times, inode number and change time, which only the system sets, are
        those of the last sync, and all its pages are in the index with their images. Otherwise its bytes are hashed,
        and its pages read only when the hash differs. A system that keeps no change time (Windows) always hashes. Files
        are recorded in the ledger, a file beside the index; without it, as after :meth:`add`, a sync takes over the
        pages of the files it finds and removes no other.

        Metadata keys other than those of files (``file_name``, ``file_type``, ``page_count``, ``width``, ``height``)
        are yours: a page that is read again keeps them. They belong to its id; a file of another name has none.

        Args:
            paths: files and folders, as in :func:`~colqwen3_retrievers.pages.loading.load_pages`; no patterns.
            root: what sources are relative to; by default a folder itself, and a file's folder.
            max_pixels: most pixels of a rendered page; pages read with another bound are read again.
            password: opens encrypted PDFs.
            metadata: keys of yours for every page, JSON values by name; a file whose pages lack one is read again.
            allow_empty: remove also what looks as if a disk were not mounted: everything under a path that no longer
                exists or has no page file left, and files of a folder now empty and on another disk.
            moved: take files for those that the index knows by the same name from another place: they were moved and
                changed. Unchanged ones are recognised without.
            verify: hash every file, for file systems with wrong change times.
            show_progress: whether to draw a progress bar (on a terminal), counting files.
            batch_size: as in :meth:`add`.
            cache: as in :meth:`add`.
            ledger: its file; by default ``files.sqlite`` in the index's folder, or else in ``images_dir``.

        Returns:
            How many pages were added, updated, unchanged and removed, and what failed and why.

        Raises:
            PageError: a path that does not exist or has no page file left, without ``allow_empty``; nothing changed.
            ConfigError: two files that would have the same source, in this call or from an earlier one; no place for
                the ledger; a wrong argument.
            StoreMismatchError: the encoder has another ``max_visual_tokens`` than the index.
            StoreError: read-only, closed, the disk is full, the ledger is damaged, and the like.
        """
        options = SyncOptions(root, max_pixels, password, metadata, moved, allow_empty, verify)
        return self._sync_files(paths, options, lambda _: None, batch_size, cache, ledger, show_progress)

    def _sync_files(
        self,
        paths: PagePath | Iterable[PagePath],
        options: SyncOptions,
        report: Callable[[Failure], None],
        batch_size: int,
        cache: CacheOrFolder | None,
        ledger: str | os.PathLike[str] | None,
        show_progress: bool,
    ) -> Synced:
        with (
            self._encoding(batch_size, cache) as encode,
            open_ledger(self._records, ledger, required=options.remove) as files,
        ):
            listing = FileListing(self._records, options, files.entries())
            listing.find(paths, report)
            with progress_bar(show_progress, len(listing.files), "files") as bar:
                return FileSync(listing, files, report, bar).run(encode, batch_size)

    @contextlib.contextmanager
    def _encoding(self, batch_size: object, cache: CacheOrFolder | None) -> Iterator[Encode]:
        """Check that pages can be added, and yield the function that encodes them, through a cache if there is one."""
        whole_number(batch_size, "batch_size", least=1)
        store = self._writable()
        if self._encoder is not None:
            check_addable(store.info, self._encoder.info, store.location)
        if isinstance(cache, PageEmbeddingCache):
            check_info(store.info, cache.encoder.info, store.location)
            check_addable(store.info, cache.encoder.info, store.location)
        elif cache is not None and not isinstance(cache, str | os.PathLike):
            raise ConfigError(f"cache: expected a PageEmbeddingCache or a folder, got {type(cache).__name__}")
        elif cache is None:
            yield lambda pages: self.encoder.encode_pages(pages)  # the encoder is rebuilt for the first page only
            return
        with contextlib.ExitStack() as stack:

            @functools.cache
            def page_cache() -> PageEmbeddingCache:  # a folder's needs the encoder
                if isinstance(cache, PageEmbeddingCache):
                    return cache
                return stack.enter_context(PageEmbeddingCache(self.encoder, folder=cache))

            yield lambda pages: page_cache().get_or_encode(pages)

    def delete(self, ids: Iterable[str] | None = None, *, where: Where | Filter | None = None) -> int:
        """Delete pages, and their stored images unless another page has the same.

        No search finds them any more; the bytes of their token embeddings stay until the store is compacted.

        Args:
            ids: ids of pages; unknown ids are no error.
            where: a filter; with ``ids`` too, pages that meet both.

        Returns:
            How many pages there were.

        Raises:
            ConfigError: neither is given, or a filter that holds for every page.
            StoreError: read-only or closed.
        """
        store = self._writable()
        named, tree = check_deletion(ids, where)
        report_unknown_names(self._records, tree)
        with self._records.lock:
            matching = store.ids(tree) if named is None or tree is not None else named
            return self._records.remove(matching if named is None else sorted(set(matching) & set(named)))

    def compact(self) -> int:
        """Free the space of replaced and deleted pages now; a folder does so by itself at 30 %, Qdrant always.

        Returns:
            The number of bytes freed.
        """
        store = self._writable()
        return store.compact() if isinstance(store, EmbeddedStore) else 0

    def _writable(self) -> MultiVectorStore:
        store = self.store
        if isinstance(store, EmbeddedStore):
            store.check_writable()
        elif store.read_only:
            raise StoreError(f"{store.location}: opened with read_only=True")
        return store

    # -- looking up ----------------------------------------------------------------------------------------------------

    def get(self, ids: Iterable[str], vectors: bool = False) -> list[Record]:
        """Return pages by id, in the given order; unknown ids are left out.

        Args:
            ids: ids of pages.
            vectors: whether to read the multi-vectors too, for heatmaps and the like.

        Returns:
            Records: ``.page`` (its image is opened on access) and ``.multi_vector`` (None without ``vectors``).

        Raises:
            StoreError: token embeddings are not what was written.
        """
        records = self.store.get(ids, vectors=vectors)
        return [Record(self._images.with_image(record), record.multi_vector, record.image) for record in records]

    def ids(self, where: Where | Filter | None = None) -> list[str]:
        """Return the ids of all pages, or of those that match a filter, in code point order."""
        report_unknown_names(self._records, where)
        return self.store.ids(where)

    def __len__(self) -> int:
        return len(self.store)

    def __contains__(self, id: object) -> bool:
        return id in self.store

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
                multi-vector encoded before.
            k: most hits, at least 1.
            where: only among these pages; the language is that of :mod:`~colqwen3_retrievers.stores.where`. A metadata
                name that no page has is logged as a warning, once.
            exact: whether to score every page; False lets a store score candidates only.
            group_by: ``"source"`` returns the best page of each source.
            window: pages before and after each hit, by number in its source, as ``hit.neighbours``, whatever the
                filter.

        Returns:
            Hits, best first, equal scores by id; none when the index is empty.

        Raises:
            ConfigError: ``k`` below 1, a bad filter, or an object that is no query.
            EncodeError: the query cannot be encoded.
            StoreMismatchError: the encoder rebuilt from what the index records is not the one that made it.
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
        search = Search(k, where, exact, group_by, window)
        texts, vectors = to_encode(queries)
        if not queries or self.store.is_empty():
            return [[] for _ in queries]
        return search.run(self._records, in_order(vectors, self._encode(texts)))

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
        search = Search(k, where, exact, group_by, window)
        texts, vectors = to_encode([query])
        if await asyncio.to_thread(lambda: self.store.is_empty()):
            return []
        encoded: list[MultiVector] = []
        if texts:  # submitting may load a model, so it too belongs in a thread
            future = await asyncio.to_thread(lambda: self.encoder.submit_queries(texts))
            encoded = await asyncio.wrap_future(future)
        return (await asyncio.to_thread(search.run, self._records, in_order(vectors, encoded)))[0]

    def _encode(self, queries: list[str | Query]) -> list[MultiVector]:
        return self.encoder.submit_queries(queries).result() if queries else []

    # -- candidates from a store of single vectors ---------------------------------------------------------------------

    def candidate_rows(self, rows: int = 16, *, where: Where | Filter | None = None) -> Iterator[CandidateRow]:
        """Yield pooled rows of the pages, for any vector store to hold; nothing is encoded.

        Args:
            rows: most rows a page, 1 to 1,024; with more, more of the best pages become candidates.
            where: only of these pages, as in :meth:`search`.

        Yields:
            Rows, page by page, in the order of the pages' ids. Rows with the same :attr:`CandidateRow.scheme` may share
            a store, with cosine or inner product.

        Raises:
            ConfigError: ``rows`` out of its range, or a bad filter.
        """
        rows = whole_number(rows, "rows", least=1, most=MAX_ROWS)
        return row_candidates.candidate_rows(self.store, self.ids(where), rows)

    def row_scheme(self, rows: int = 16) -> str:
        """Return a collection name for this index's rows: all that shapes them, and their number."""
        return row_candidates.row_scheme(self.info, rows)

    def row_queries(self, query: Question) -> Float32:
        """Return the vectors to query a store of rows with: one for each token of a query.

        A page that several of them find, or find near, is the better candidate. How many rows to ask for depends on the
        store; 50 for each vector were measured.

        Args:
            query: as in :meth:`search`.

        Returns:
            float32 (n_tokens, dim), unit rows.

        Raises:
            ConfigError: an object that is no query.
            EncodeError: it cannot be encoded.
        """
        texts, vectors = to_encode([query])
        return in_order(vectors, self._encode(texts))[0].vectors

    def rescore(self, query: Question, ids: Iterable[str], k: int = 5) -> list[Hit]:
        """Rank candidates from another store by exact MaxSim.

        Args:
            query: as in :meth:`search`.
            ids: of pages, not of rows; repeated ids count once, and unknown ids are no error.
            k: most hits, at least 1.

        Returns:
            Hits, best first, equal scores by id; none when there are no candidates.

        Raises:
            ConfigError, EncodeError: as :meth:`search`.
        """
        candidates = list(dict.fromkeys(check_ids(ids)))
        if not candidates:
            return []
        return self.search(query, k, where={"id": {"$in": candidates}}, exact=True)


def opened_index(
    index: PageIndex | str | os.PathLike[str],
    encoder: PageEncoder | None = None,
    images_dir: str | os.PathLike[str] | None = None,
    *,
    read_only: bool = True,
) -> PageIndex:
    """Return an index that may be given open or by its location.

    Args:
        index: the index, or its location; read-only, that can be opened beside another writer.
        encoder: with a location: encodes the queries, and with ``read_only=False`` creates a new index.
        images_dir: with a location that is not a folder: the folder of its images.
        read_only: for a location, as in :meth:`PageIndex.open`.

    Raises:
        ConfigError: neither, or an open index together with another encoder or ``images_dir`` than its own.
        StoreError: no index there.
        StoreMismatchError: the index was made by another model than the encoder's.
    """
    if isinstance(index, str | os.PathLike):
        return PageIndex.open(index, encoder, images_dir=images_dir, read_only=read_only)
    if not isinstance(index, PageIndex):
        raise ConfigError(f"index: expected a PageIndex or a location, got {type(index).__name__}")
    # An adapter's copy is constructed from the index opened here and the arguments it was opened with.
    if images_dir is not None and user_path(images_dir).absolute() != index.images_dir:
        raise ConfigError("images_dir: the index is open and has its own; give its location, or no images_dir")
    if encoder is not None and encoder is not index.encoder:
        raise ConfigError("encoder: the index is open and has its own; give its location, or no encoder")
    return index


def _reopen(location: str, encoder: PageEncoder | None, images: ImageMode, images_dir: Path | None) -> PageIndex:
    return PageIndex.open(location, encoder, images=images, images_dir=images_dir, read_only=True)
