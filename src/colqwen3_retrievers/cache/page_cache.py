"""Multi-vectors of pages seen before, in memory or on disk, so that a known page is not encoded again."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, Self, runtime_checkable

from colqwen3_retrievers.cache.disk_cache import DiskCache, nbytes_of
from colqwen3_retrievers.cache.keys import content_key, pixel_key, settings_key
from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, EncodeError, EngineError, PageError
from colqwen3_retrievers.fork import ForkSafeLock, abandon, after_fork
from colqwen3_retrievers.pages.files import user_path
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo, MultiVector

DEFAULT_MAX_BYTES = 512 * 2**20
"""Bytes of token embeddings kept in memory by default: about 320 pages of 1,280 tokens of dim 320."""

DEFAULT_MAX_DISK_BYTES = 8 * 2**30
"""The same on disk: about 5,000 such pages."""

_MOST_UNWRITTEN = 512 * 2**20  # bytes that wait for a slow disk; what comes beyond is returned, and not kept
_log = logging.getLogger("colqwen3_retrievers.cache")


@runtime_checkable
class PageSubmitter(Protocol):
    """What the cache needs of an encoder, such as a :class:`~colqwen3_retrievers.encoding.encoder.ColQwen3Encoder`."""

    @property
    def info(self) -> EncoderInfo:
        """What shapes its multi-vectors."""
        ...

    def submit_pages(self, pages: Iterable[Page], /) -> Future[list[MultiVector]]:
        """Start encoding pages."""
        ...


@dataclass(slots=True, eq=False)
class _Encoding:
    """A page being encoded, and the futures of everybody who waits for it."""

    waiters: list[Future[MultiVector]] = field(default_factory=list)
    source: Future[list[MultiVector]] | None = None


class PageEmbeddingCache:
    """Encodes pages, each content once, and evicts the least recently used beyond a number of bytes.

    Two pages are the same when an encoder would see the same: the image, and the text where it counts. Ids, sources
    and metadata do not matter. May be used from any number of threads; a page requested twice at the same time is
    encoded once.

    In memory, image files are compared by their bytes. On disk, they are compared by their pixels, so that a page of a
    PDF matches the image an index keeps of it; and an entry belongs to the settings that shaped it (fingerprint and
    revision of the model, dim, pooling, bound of visual tokens, rendering version), so that any number of encoders and
    processes may share a folder.

    Args:
        encoder: the encoder; the cache belongs to it alone, the folder does not.
        max_bytes: most bytes of token embeddings kept, from 0 (none are kept, but requests at the same time still
            share an encoding); None takes 512 MB in memory, 8 GB on disk.
        folder: where they are kept, created if it does not exist; None keeps them in memory.

    Raises:
        ConfigError: ``max_bytes`` is not a whole number from 0, or ``folder`` is no path.
        StoreError: the folder cannot be used, or its content is damaged or no cache.

    >>> from colqwen3_retrievers import ColQwen3Encoder
    >>> cache = PageEmbeddingCache(ColQwen3Encoder("tiny"), max_bytes=2**20)         # nothing is loaded yet
    >>> len(cache), cache.nbytes, cache.get_or_encode([])
    (0, 0, [])
    """

    def __init__(
        self,
        encoder: PageSubmitter,
        max_bytes: int | None = None,
        *,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if folder is not None and (not isinstance(folder, str | os.PathLike) or not os.fspath(folder)):
            raise ConfigError(f"folder: expected a path, got {folder!r}")
        self.encoder = encoder
        self.folder = None if folder is None else user_path(folder).absolute()
        default = DEFAULT_MAX_BYTES if self.folder is None else DEFAULT_MAX_DISK_BYTES
        self.max_bytes = default if max_bytes is None else whole_number(max_bytes, "max_bytes")
        self._lock = ForkSafeLock()
        self._kept: OrderedDict[str, MultiVector] = OrderedDict()  # on disk: what is yet to be written
        self._encodings: dict[str, _Encoding] = {}
        self._nbytes = 0
        self._disk: DiskCache | None = None
        self._writer: ThreadPoolExecutor | None = None
        if self.folder is not None:
            self._disk = DiskCache(self.folder, self.max_bytes)
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="page-cache")
        after_fork(self._forget_threads)

    def get_or_encode(self, pages: Iterable[Page]) -> list[MultiVector]:
        """Return the multi-vector of each page, in order; unknown pages are encoded and kept.

        Raises:
            EncodeError: a page cannot be read or encoded; ``.index`` says which.
            ColQwen3Error: the fault is not a page's: the model cannot be loaded, the engine cannot compute.
        """
        futures = self.submit(pages)
        try:
            return [result_at(future, index) for index, future in enumerate(futures)]
        finally:
            for future in futures:  # after an error, nobody waits for the others
                future.cancel()

    def submit(self, pages: Iterable[Page]) -> list[Future[MultiVector]]:
        """Start encoding the pages that are not known.

        Reads image files to compare their content, and opens the checkpoint at the first call: on an event loop, call
        it in a thread and wait for the futures.

        Returns:
            A future for each page, in order. Each fails or is cancelled alone; cancelling all futures of a page cancels
            its encoding. :func:`result_at` returns a future's result or raises a clear error.
        """
        listed = list(pages)
        if not listed:
            return []
        info = self.encoder.info
        settings = "" if self._disk is None else settings_key(info)
        return [self._submit(page, info.include_text, settings) for page in listed]

    @property
    def nbytes(self) -> int:
        """Bytes of the token embeddings kept now; on disk, those of all who share the folder."""
        self.flush()
        return self._nbytes if self._disk is None else self._disk.nbytes

    def __len__(self) -> int:
        """Return the number of pages kept now; on disk, those of all who share the folder."""
        self.flush()
        return len(self._kept) if self._disk is None else len(self._disk)

    def clear(self) -> None:
        """Forget all that is kept, on disk for all who share the folder; encodings under way go on."""
        self.flush()
        if self._disk is not None:
            self._disk.clear()
        with self._lock:
            self._kept.clear()
            self._nbytes = 0

    def flush(self) -> None:
        """Wait until everything encoded so far is on disk; in memory there is nothing to do."""
        if self._writer is not None:
            self._writer.submit(lambda: None).result()

    def close(self) -> None:
        """Write what is not yet on disk and close the file; a cache in memory has nothing to close."""
        if self._writer is not None and self._disk is not None:
            self._writer.shutdown()
            self._disk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.folder is not None:
            return f"PageEmbeddingCache({self.encoder!r}, {self.max_bytes:,} bytes in {str(self.folder)!r})"
        return f"PageEmbeddingCache({self.encoder!r}, {len(self)} pages, {self.nbytes:,} of {self.max_bytes:,} bytes)"

    # -- inside --------------------------------------------------------------------------------------------------------

    def _forget_threads(self) -> None:
        """In a forked child, drop the work of the parent's threads: it would never end here."""
        for waiter in [waiter for encoding in self._encodings.values() for waiter in encoding.waiters]:
            abandon(waiter, EngineError("submitted before a fork, in the parent process; submit it again in this one"))
        self._encodings.clear()
        if self._writer is not None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="page-cache")
            self._kept.clear()  # the parent writes it
        self._nbytes = sum(map(nbytes_of, self._kept.values()))

    def _submit(self, page: Page, include_text: bool, settings: str) -> Future[MultiVector]:
        waiter: Future[MultiVector] = Future()
        try:
            if self._disk is None:
                key = content_key(page, include_text)
            else:
                key = f"{settings}:{pixel_key(page, include_text, self._disk)}"
        except (PageError, ConfigError) as exc:
            error = EncodeError(str(exc))
            error.__cause__ = exc
            waiter.set_exception(error)
            return waiter
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                waiter.set_result(self._kept[key])
                return waiter
            first = key not in self._encodings
            encoding = self._encodings.setdefault(key, _Encoding())
            encoding.waiters.append(waiter)
        if first:
            self._start(page, key, encoding)
        waiter.add_done_callback(lambda done: self._leave(key, encoding, done))
        return waiter

    def _start(self, page: Page, key: str, encoding: _Encoding) -> None:
        known = None if self._disk is None else self._disk.get(key)
        if known is not None:
            self._settle(key, encoding, known)
            return
        try:
            encoding.source = self.encoder.submit_pages([page])
        except BaseException as exc:
            self._settle(key, encoding, exc)
            raise
        encoding.source.add_done_callback(lambda source: self._finish(key, encoding, source))

    def _finish(self, key: str, encoding: _Encoding, source: Future[list[MultiVector]]) -> None:
        if source.cancelled():
            self._settle(key, encoding, EngineError("the encoding of the page was cancelled"))
        elif (error := source.exception()) is not None:
            self._settle(key, encoding, error)
        else:
            multi_vector = source.result()[0]
            self._keep(key, multi_vector)  # before the wait ends, so that nobody encodes it in between
            self._settle(key, encoding, multi_vector)

    def _settle(self, key: str, encoding: _Encoding, outcome: MultiVector | BaseException) -> None:
        """Settle all futures of a page; later calls find it kept, or start anew."""
        with self._lock:
            if self._encodings.get(key) is encoding:
                del self._encodings[key]
            waiters, encoding.waiters = encoding.waiters, []
        for waiter in waiters:
            if not waiter.set_running_or_notify_cancel():
                continue
            if isinstance(outcome, MultiVector):
                waiter.set_result(outcome)
            else:
                waiter.set_exception(outcome)

    def _leave(self, key: str, encoding: _Encoding, waiter: Future[MultiVector]) -> None:
        """Cancel the encoding of a page when the last future that waits for it is cancelled."""
        with self._lock:
            if not waiter.cancelled() or waiter not in encoding.waiters:
                return
            encoding.waiters.remove(waiter)
            if encoding.waiters:
                return
            if self._encodings.get(key) is encoding:
                del self._encodings[key]
        if encoding.source is not None:
            encoding.source.cancel()

    def _keep(self, key: str, multi_vector: MultiVector) -> None:
        size = nbytes_of(multi_vector)
        with self._lock:
            if size > self.max_bytes or key in self._kept:
                return
            if self._writer is not None and self._nbytes + size > _MOST_UNWRITTEN:
                _log.warning("%s: the disk is too slow, a page is not kept", self.folder)
                return
            self._kept[key] = multi_vector
            self._nbytes += size
            if self._writer is not None:
                # Not here: this thread belongs to the encoder, which other pages wait for.
                with contextlib.suppress(RuntimeError):  # closed, or the interpreter is going down
                    self._writer.submit(self._write, key, multi_vector)
                return
            while self._nbytes > self.max_bytes:
                self._nbytes -= nbytes_of(self._kept.popitem(last=False)[1])

    def _write(self, key: str, multi_vector: MultiVector) -> None:
        if self._disk is not None:
            self._disk.put(key, multi_vector)
        with self._lock:
            if self._kept.pop(key, None) is not None:
                self._nbytes -= nbytes_of(multi_vector)


def result_at(future: Future[MultiVector], index: int) -> MultiVector:
    """Return a page's multi-vector, or raise an error with the page's position in the call.

    Args:
        future: of :meth:`PageEmbeddingCache.submit`.
        index: the page's position in the call, from 0.

    Raises:
        EncodeError: the page cannot be read or encoded; ``.index`` is ``index``.
        ColQwen3Error: the fault is not the page's: the model cannot be loaded, the engine cannot compute.

    >>> failed: Future[MultiVector] = Future()
    >>> failed.set_exception(EncodeError("the text is empty"))
    >>> result_at(failed, 3)
    Traceback (most recent call last):
    colqwen3_retrievers.errors.EncodeError: input 3: the text is empty
    """
    try:
        return future.result()
    except EncodeError as exc:
        raise exc.at(index) from exc  # each page is submitted by itself: the encoder calls every one of them input 0


CacheOrFolder = PageEmbeddingCache | str | os.PathLike[str]
"""A cache, or the folder of one."""
