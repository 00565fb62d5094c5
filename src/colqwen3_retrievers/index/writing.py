"""Writing to an index: pages or files in, pages out again, each call checked before anything is encoded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from colqwen3_retrievers.cache.page_cache import CacheOrFolder, PageEmbeddingCache, opened_cache
from colqwen3_retrievers.errors import ConfigError, StoreError
from colqwen3_retrievers.index.file_ledger import open_ledger
from colqwen3_retrievers.index.file_sync import FileSync, Synced
from colqwen3_retrievers.index.opened_index import OpenedIndex
from colqwen3_retrievers.index.page_adder import (
    Added,
    Encode,
    Failure,
    PageAdder,
    PageEncoder,
    progress_bar,
    remove_pages,
)
from colqwen3_retrievers.index.synced_files import FoundFiles
from colqwen3_retrievers.pages.files import PagePath, error_policy
from colqwen3_retrievers.pages.loading import DEFAULT_MAX_PIXELS
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore
from colqwen3_retrievers.stores.protocol import MultiVectorStore, check_addable, check_ids, check_info
from colqwen3_retrievers.stores.where import Filter, Where, parse
from colqwen3_retrievers.vectors.multi_vector import MultiVector

OnFailure = Literal["raise", "skip"] | Callable[[Failure], None]
"""What becomes of a page or file that cannot be read or encoded."""


class Writing(OpenedIndex):
    """The writing half of :class:`~colqwen3_retrievers.index.page_index.PageIndex`."""

    def add(
        self,
        pages: Iterable[Page] | Page,
        *,
        on_error: OnFailure = "raise",
        show_progress: bool = False,
        batch_size: int = 16,
        cache: CacheOrFolder | None = None,
    ) -> Added:
        """Encode pages and keep them, each in place of the one with its id.

        Pages are taken ``batch_size`` at a time; each such batch is kept wholly or not at all, and what is kept
        survives a crash. A page that is there with the same content and metadata is passed over, so that adding the
        same pages again goes on where an interrupted call stopped.

        A page is replaced whole, its metadata too. Two folders that hold files of one name give pages of one id, of
        which only the last would be left: load them with a ``root`` above both, or use :meth:`add_files`, which sees
        it.

        Args:
            pages: any iterable; it is read as it goes.
            on_error: as for :func:`~colqwen3_retrievers.pages.loading.load_pages`, for pages that cannot be read or
                encoded: ``"raise"``; ``"skip"``, which logs a warning and goes on; or a function that is called with
                the EncodeError or PageError and, by returning, skips. What the iterable itself raises is not skipped.
            show_progress: whether to draw a progress bar (on a terminal).
            batch_size: pages encoded and committed together, at least 1.
            cache: a :class:`~colqwen3_retrievers.cache.page_cache.PageEmbeddingCache`, or the folder of one: contents
                it knows are not encoded, and what is encoded is kept in it.

        Returns:
            How many pages were new, updated, unchanged and skipped.

        Raises:
            ConfigError: two pages of one id and different content in one call: one of them would be lost.
            EncodeError: a page cannot be encoded; it is named, and the batches before its own are kept.
            PageError: a page or the iterable met a file it cannot read; what came before is kept.
            StoreMismatchError: the encoder has another ``max_visual_tokens`` than the index.
            StoreError: read-only, closed, the disk is full, and the like.

        >>> with PageIndex.open("my-index", ColQwen3Encoder("tiny")) as index:             # doctest: +SKIP
        ...     index.add(load_pages("reports/"), on_error="skip")
        Added(added=12, updated=0, unchanged=0, skipped=1)
        """
        if isinstance(pages, str | bytes | Path) or not isinstance(pages, Page | Iterable):
            raise ConfigError(f"pages: expected pages, got {type(pages).__name__}; load_pages reads files")
        tell: Callable[[Failure], None] = error_policy(on_error)
        total = len(pages) if isinstance(pages, Sequence) else None
        with self._adding(batch_size, cache) as encode, progress_bar(show_progress, total, " pages") as bar:
            adder = PageAdder(
                self._store, self._images, encode, self._write_lock,
                failed=None if on_error == "raise" else lambda _, error: tell(error),
            )  # fmt: skip
            return adder.run([pages] if isinstance(pages, Page) else pages, batch_size, bar)

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
        """Read files and add their pages: a :meth:`sync` that forgets nothing.

        A file that did not change is not opened, as in :meth:`sync`. Where a file would take the pages of another one
        that the index knows by the same name, that is an error and no page is lost.

        Args:
            paths: as in :func:`~colqwen3_retrievers.pages.loading.load_pages`, patterns too.
            root: what sources are relative to; by default a folder itself, and a file's folder.
            max_pixels: most pixels of a rendered page; pages read with another bound are read again.
            password: opens encrypted PDFs.
            metadata: keys of yours for every page, as in :meth:`sync`.
            on_error: as for :meth:`add`, for files too.
            moved: as in :meth:`sync`.
            show_progress: whether to draw a progress bar (on a terminal), counting files.
            batch_size: pages encoded and committed together, at least 1.
            cache: as for :meth:`add`.
            ledger: as for :meth:`sync`; a store elsewhere without ``images_dir`` has none, and then the names of files
                are not remembered from call to call.

        Returns:
            How many pages were added, updated and unchanged, and what failed and why.

        Raises:
            PageError, EncodeError: a path, file or page cannot be used; batches before it are kept.
            ConfigError: two files that would have the same source, in this call or from an earlier one; both are named.
            StoreMismatchError, StoreError: as for :meth:`add`.

        >>> with PageIndex.open("my-index", ColQwen3Encoder("tiny")) as index:             # doctest: +SKIP
        ...     index.add_files(["2023/", "2024/"], root=".", metadata={"archive": True})
        Synced(added=12, updated=0, unchanged=0, removed=0, failed=())
        """
        tell: Callable[[Failure], None] = error_policy(on_error)
        return self._read_files(
            lambda found: found.find_added(paths, root, tell), tell, needed=False, metadata=metadata, moved=moved,
            max_pixels=max_pixels, password=password, verify=False, show_progress=show_progress,
            batch_size=batch_size, cache=cache, ledger=ledger,
        )  # fmt: skip

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
        """Make the index agree with files: read what is new or changed, forget what is gone under these paths only.

        A page whose content is in the index already, under whatever name, is not encoded again, so that a renamed file
        costs no encoding. A file, page or folder that cannot be read is not gone: it is reported and its pages stay. A
        run that was interrupted is gone on with by running it again. Readers see each batch of pages whole.

        A file is not even opened when its size, its times, the change time of its inode, which only the system sets,
        and its inode number are those of the last time, and every page it had is still in the index with its image.
        Else its bytes are hashed, and its pages read only when they differ. A system that keeps no change time
        (Windows) always hashes. What was seen is noted in the ledger, a file beside the index; without it, as after
        :meth:`add`, a sync takes over the pages of the files it finds and forgets no other.

        Metadata keys that no file gives (all but ``file_name``, ``file_type``, ``page_count``, ``width`` and
        ``height``) are a user's own: a page that is read again keeps them, whatever the reason. They belong to its id,
        so a file of another name starts without.

        Args:
            paths: files and folders, as in :func:`~colqwen3_retrievers.pages.loading.load_pages`; no patterns.
            root: what sources are relative to; by default a folder itself, and a file's folder.
            max_pixels: most pixels of a rendered page; pages read with another bound are read again.
            password: opens encrypted PDFs.
            metadata: keys of yours for every page of these files, JSON values by name; a file whose pages lack one is
                read again.
            allow_empty: forgets also what looks as if a disk were not mounted: everything under a path that is not
                there any more or has no page file left, and files of a folder now empty and on another disk.
            moved: whether files that the index knows by the same name from another place are the ones found now. They
                were moved and changed; unchanged ones are told without.
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
        return self._read_files(
            lambda found: found.find(paths, root, allow_empty), _go_on, needed=True, metadata=metadata, moved=moved,
            max_pixels=max_pixels, password=password, verify=verify, show_progress=show_progress,
            batch_size=batch_size, cache=cache, ledger=ledger,
        )  # fmt: skip

    def _read_files(
        self, find: Callable[[FoundFiles], None], tell: Callable[[Failure], None], *, needed: bool,
        metadata: Mapping[str, Any] | None, moved: bool, max_pixels: int, password: str | None, verify: bool,
        show_progress: bool, batch_size: int, cache: CacheOrFolder | None, ledger: str | os.PathLike[str] | None,
    ) -> Synced:  # fmt: skip
        """Find files, read what the index has not, and keep it."""
        own = self._store.folder if isinstance(self._store, EmbeddedStore) else None
        keys = Page(id="metadata", metadata=metadata).metadata  # as pages will have it, or a ConfigError
        with (
            self._adding(batch_size, cache) as encode,
            open_ledger(ledger, own, self._images.folder, self._store.location, needed=needed) as noted,
        ):
            found = FoundFiles(self._store, self._images, noted.entries(), moved=moved)
            find(found)
            sync = FileSync(self._store, self._images, self._write_lock, noted, found, metadata=keys, tell=tell)
            adder = PageAdder(
                self._store, self._images, encode, self._write_lock,
                computed_digests=True, failed=sync.page_failed, from_files=True,
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
        return _encoding(store, self._ready, cache)


def _go_on(_: Failure) -> None:
    """Leave it to the result to say what failed."""


@contextlib.contextmanager
def _encoding(
    store: MultiVectorStore, encoder: Callable[[], PageEncoder], cache: CacheOrFolder | None
) -> Iterator[Encode]:
    """Give what encodes pages for a store, by way of a cache when there is one.

    Args:
        store: where the multi-vectors will go.
        encoder: gives the encoder; called when the first page has to be encoded.
        cache: a cache, or the folder of one; None encodes every page.

    Raises:
        ConfigError: what is no cache.
        StoreMismatchError: the cache has an encoder whose multi-vectors do not belong in this store.
    """
    if isinstance(cache, PageEmbeddingCache):
        check_info(store.info, cache.encoder.info, store.location)
        check_addable(store.info, cache.encoder.info, store.location)
    elif cache is not None and not isinstance(cache, str | os.PathLike):
        raise ConfigError(f"cache: expected a PageEmbeddingCache or a folder, got {type(cache).__name__}")
    with contextlib.ExitStack() as opened:
        made: list[PageEmbeddingCache] = []

        def encode(pages: list[Page]) -> list[MultiVector]:
            if cache is None:
                return encoder().encode_pages(pages)
            if not made:
                own = None if isinstance(cache, PageEmbeddingCache) else encoder()
                made.append(opened.enter_context(opened_cache(cache, own)))
            return made[0].get_or_encode(pages)

        yield encode
