"""Models shared within a process: equal settings, one model, one thread that owns it.

A handle keeps a model alive; the last one to close, or to be garbage-collected, frees it. After a fork the child starts
with an empty table: threads and CUDA contexts do not survive a fork, so the child loads anew.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from colqwen3_retrievers.datatypes import Float32
from colqwen3_retrievers.engines import Engine
from colqwen3_retrievers.errors import EngineError
from colqwen3_retrievers.rendering import EncoderInput
from colqwen3_retrievers.worker import EncodeWorker, forget_workers

T = TypeVar("T")

IN_FLIGHT_PAGES = 64
"""Most pages that are rendered but not yet encoded: bounds memory at about 4 MB a page."""

_lock = threading.Lock()
_shared: dict[Hashable, SharedEngine] = {}
_generation = 0
_fork_hook_set = False


class SharedEngine:
    """An engine's worker, and the threads that prepare pages for it and finish what it gives.

    Args:
        key: what makes two handles equal.
        load: makes the engine.
        prepare_threads: threads that render pages.
    """

    def __init__(self, key: Hashable, load: Callable[[], Engine], *, prepare_threads: int) -> None:
        self.key = key
        self.handles = 0
        self.worker = EncodeWorker(load)
        self._slots = threading.Semaphore(IN_FLIGHT_PAGES)
        self._pages = ThreadPoolExecutor(prepare_threads, "colqwen3-render")
        # Finishing and image queries have threads of their own: page rendering may wait for a slot, and what frees the
        # slots must never queue behind it.
        self._finish = ThreadPoolExecutor(max(1, prepare_threads // 2), "colqwen3-finish")
        self._queries = ThreadPoolExecutor(1, "colqwen3-query")

    def submit_query(
        self, render: Callable[[], EncoderInput], finish: Callable[[EncoderInput, Float32], T]
    ) -> Future[T]:
        """Render a query in a thread, encode it, finish it."""
        result: Future[T] = Future()
        self._queries.submit(self._render, render, finish, result, paged=False)
        return result

    def submit_page(
        self, render: Callable[[], EncoderInput], finish: Callable[[EncoderInput, Float32], T]
    ) -> Future[T]:
        """Render a page in a thread once there is room for it, encode it, finish it."""
        result: Future[T] = Future()
        self._pages.submit(self._render, render, finish, result, paged=True)
        return result

    def close(self) -> None:
        """Fail what still waits, stop the threads and free the engine.

        The worker goes first: failing its queue frees the slots that rendering threads may be waiting for.
        """
        self.worker.close()
        for pool in (self._pages, self._queries, self._finish):
            pool.shutdown(wait=True)

    def _render(
        self,
        render: Callable[[], EncoderInput],
        finish: Callable[[EncoderInput, Float32], T],
        result: Future[T],
        *,
        paged: bool,
    ) -> None:
        if result.cancelled():
            return
        if paged:
            self._slots.acquire()
        try:
            if self.worker.closed:
                raise EngineError("the encoder was closed before this input was encoded")
            item = render()
            embedded = self.worker.submit(item)
        except BaseException as exc:  # belongs to whoever waits for the result
            if paged:
                self._slots.release()
            if result.set_running_or_notify_cancel():
                result.set_exception(exc)
            return

        def done(future: Future[Float32]) -> None:
            if paged:
                self._slots.release()
                try:
                    self._finish.submit(_settle, future, item, finish, result)
                    return
                except RuntimeError:
                    pass  # the interpreter is going down and takes no more tasks: finish it here
            _settle(future, item, finish, result)

        embedded.add_done_callback(done)


def acquire(key: Hashable, load: Callable[[], Engine], *, prepare_threads: int) -> tuple[SharedEngine, int]:
    """Get the shared engine of a key, made when it is not there, and count one handle more.

    Returns:
        The engine and the generation it belongs to; a handle of an older generation must acquire again (after a fork).
    """
    global _fork_hook_set
    with _lock:
        if not _fork_hook_set and hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_after_fork)
            _fork_hook_set = True
        if key not in _shared:
            _shared[key] = SharedEngine(key, load, prepare_threads=prepare_threads)
        _shared[key].handles += 1
        return _shared[key], _generation


def release(engine: SharedEngine, generation: int) -> None:
    """Count one handle less; the last one closes the engine."""
    with _lock:
        if generation != _generation:
            return  # the parent's, seen from a forked child
        engine.handles -= 1
        if engine.handles > 0:
            return
        _shared.pop(engine.key, None)
    engine.close()


def current_generation() -> int:
    """Give the number of forks this process is away from the first one that used the table."""
    return _generation


def _settle(
    future: Future[Float32], item: EncoderInput, finish: Callable[[EncoderInput, Float32], T], result: Future[T]
) -> None:
    if not result.set_running_or_notify_cancel():
        return
    try:
        value = finish(item, future.result())
    except BaseException as exc:  # belongs to whoever waits for the result
        result.set_exception(exc)
    else:
        result.set_result(value)


def _after_fork() -> None:
    global _lock, _generation
    _lock = threading.Lock()  # another thread may have held it at the fork
    _shared.clear()
    _generation += 1
    forget_workers()
    if "torch" in sys.modules:
        # The parent's OpenMP threads are gone, and a team of them would be waited for without end.
        sys.modules["torch"].set_num_threads(1)
