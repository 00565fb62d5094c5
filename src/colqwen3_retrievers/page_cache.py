"""Multi-vectors of pages seen before, in memory: what keeps a reranker from encoding a page again for every query."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from colqwen3_retrievers.datatypes import EncoderInfo, MultiVector
from colqwen3_retrievers.documents import Page
from colqwen3_retrievers.errors import ColQwen3Error, ConfigError, EncodeError, EngineError, PageError
from colqwen3_retrievers.images import read_image_bytes

DEFAULT_MAX_BYTES = 512 * 2**20
"""Bytes of token embeddings kept by default: about 320 pages of 1,280 tokens of dim 320."""


class PageSubmitter(Protocol):
    """What the cache asks of an encoder; :class:`~colqwen3_retrievers.encoder.ColQwen3Encoder` does it."""

    @property
    def info(self) -> EncoderInfo:
        """What shapes its multi-vectors."""
        ...

    def submit_pages(self, pages: Iterable[Page], /) -> Future[list[MultiVector]]:
        """Start encoding pages."""
        ...


@dataclass(slots=True, eq=False)
class _UnderWay:
    """A page being encoded, and everybody who waits for it."""

    waiting: list[Future[MultiVector]] = field(default_factory=list)
    encoding: Future[list[MultiVector]] | None = None


class PageEmbeddingCache:
    """Encodes pages, each content once; the least recently used are forgotten beyond a number of bytes.

    Two pages are the same when an encoder would see the same: the bytes of the image file (of an image in memory, its
    pixels), and the text where it counts. Ids, sources and metadata do not matter. May be used from any number of
    threads; a page that two ask for at the same time is encoded once.

    Args:
        encoder: what encodes; the cache belongs to this encoder alone.
        max_bytes: most bytes of token embeddings kept, from 0 (none are, yet what is under way is still shared).

    Raises:
        ConfigError: ``max_bytes`` is not a whole number from 0.

    >>> from colqwen3_retrievers import ColQwen3Encoder
    >>> cache = PageEmbeddingCache(ColQwen3Encoder("tiny"), max_bytes=2**20)         # nothing is loaded yet
    >>> len(cache), cache.nbytes, cache.get_or_encode([])
    (0, 0, [])
    """

    def __init__(self, encoder: PageSubmitter, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise ConfigError(f"max_bytes: expected a whole number from 0, got {max_bytes!r}")
        self.encoder = encoder
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, MultiVector] = OrderedDict()
        self._under_way: dict[str, _UnderWay] = {}
        self._nbytes = 0
        self._pid = os.getpid()

    def get_or_encode(self, pages: Iterable[Page]) -> list[MultiVector]:
        """Give the multi-vector of each page, in order; those not known are encoded and kept.

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

        Opens image files to know them by their content, and the checkpoint at the first call: on an event loop, call
        it in a thread and wait for the futures.

        Returns:
            A future for each page, in order. Each fails or is cancelled alone; cancelling all that wait for a page
            cancels its encoding. :func:`result_at` gives its result or a clear error.
        """
        listed = list(pages)
        if not listed:
            return []
        self._after_fork()
        include_text = self.encoder.info.include_text
        return [self._submit(page, include_text) for page in listed]

    @property
    def nbytes(self) -> int:
        """Bytes of the token embeddings kept now."""
        return self._nbytes

    def __len__(self) -> int:
        """Count the pages kept now."""
        return len(self._kept)

    def clear(self) -> None:
        """Forget all that is kept; what is under way goes on."""
        with self._lock:
            self._kept.clear()
            self._nbytes = 0

    def __repr__(self) -> str:
        """Name the encoder and how much is kept."""
        return f"PageEmbeddingCache({self.encoder!r}, {len(self)} pages, {self.nbytes:,} of {self.max_bytes:,} bytes)"

    # -- inside --------------------------------------------------------------------------------------------------------

    def _after_fork(self) -> None:
        """In a forked child, drop what the parent's threads were doing: it would never end here."""
        if os.getpid() != self._pid:
            self._pid, self._lock, self._under_way = os.getpid(), threading.Lock(), {}

    def _submit(self, page: Page, include_text: bool) -> Future[MultiVector]:
        mine: Future[MultiVector] = Future()
        try:
            key = _content_key(page, include_text)
        except (PageError, ConfigError) as exc:
            error = EncodeError(str(exc))
            error.__cause__ = exc
            mine.set_exception(error)
            return mine
        with self._lock:
            known = self._kept.get(key)
            if known is not None:
                self._kept.move_to_end(key)
                mine.set_result(known)
                return mine
            work = self._under_way.get(key)
            first = work is None
            if work is None:
                work = self._under_way[key] = _UnderWay()
            work.waiting.append(mine)
        if first:
            try:
                encoding = self.encoder.submit_pages([page])
            except BaseException as exc:
                for waiter in self._take(key, work):
                    if waiter.set_running_or_notify_cancel():
                        waiter.set_exception(exc)
                raise
            with self._lock:
                work.encoding = encoding
            encoding.add_done_callback(lambda done: self._finish(key, work, done))
        mine.add_done_callback(lambda done: self._abandon(key, work, done))
        return mine

    def _take(self, key: str, work: _UnderWay) -> list[Future[MultiVector]]:
        """End the wait for a page: whoever asks from now on finds it kept, or starts anew."""
        with self._lock:
            if self._under_way.get(key) is work:
                del self._under_way[key]
            waiting, work.waiting = work.waiting, []
        return waiting

    def _finish(self, key: str, work: _UnderWay, done: Future[list[MultiVector]]) -> None:
        if done.cancelled():
            error: BaseException | None = EngineError("the encoding of the page was cancelled")
        else:
            error = done.exception()
        if error is None:
            self._keep(key, done.result()[0])  # before the wait ends, so that nobody encodes it in between
        for waiter in self._take(key, work):
            if not waiter.set_running_or_notify_cancel():
                continue
            if error is None:
                waiter.set_result(done.result()[0])
            else:
                waiter.set_exception(error)

    def _keep(self, key: str, multi_vector: MultiVector) -> None:
        size = _nbytes(multi_vector)
        with self._lock:
            if size > self.max_bytes or key in self._kept:
                return
            self._kept[key] = multi_vector
            self._nbytes += size
            while self._nbytes > self.max_bytes:
                self._nbytes -= _nbytes(self._kept.popitem(last=False)[1])

    def _abandon(self, key: str, work: _UnderWay, done: Future[MultiVector]) -> None:
        """Stop encoding a page when the last one who waited for it has gone away."""
        if not done.cancelled():
            return
        with self._lock:
            if done in work.waiting:
                work.waiting.remove(done)
            if work.waiting or work.encoding is None:
                return
            if self._under_way.get(key) is work:
                del self._under_way[key]  # the next one to ask starts anew
        work.encoding.cancel()


def result_at(future: Future[MultiVector], index: int) -> MultiVector:
    """Wait for a page's multi-vector, or say which page of the call was at fault.

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
        # Each page is submitted by itself, so the encoder calls every one of them "input 0": its cause does not.
        plain = exc.__cause__ if exc.index is not None and isinstance(exc.__cause__, ColQwen3Error) else exc
        if isinstance(plain, EncodeError):
            raise plain.at(index) from exc
        raise EncodeError(f"input {index}: {plain}", index=index) from exc


def _content_key(page: Page, include_text: bool) -> str:
    """Digest what an encoder sees of a page. A file is read, not decoded: its bytes tell as much."""
    source = page.image_source
    if page.video is not None or not isinstance(source, str | Path | bytes):
        return f"content:{page.sha256}"
    digest = hashlib.sha256(read_image_bytes(source, name=page.id if isinstance(source, bytes) else None))
    if include_text:
        digest.update(b"\0text\0" + page.text.encode("utf-8", "surrogatepass"))
    return f"file:{digest.hexdigest()}"


def _nbytes(multi_vector: MultiVector) -> int:
    parts: Sequence[object] = (multi_vector.vectors, multi_vector.clusters)
    return sum(int(getattr(part, "nbytes", 0)) for part in parts)
