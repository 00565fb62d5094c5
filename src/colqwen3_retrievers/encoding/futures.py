"""Futures of many parts, and threads to run jobs in that never keep a process alive."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from colqwen3_retrievers.errors import EngineError

T = TypeVar("T")

_log = logging.getLogger(__name__)


def gather(futures: Sequence[Future[T]]) -> Future[list[T]]:
    """Make one future of many, in order; the first failure fails it and cancels the rest, as does cancelling it.

    Args:
        futures: the parts.

    Returns:
        A future of the list of their results.

    >>> one: Future[str] = Future()
    >>> both = gather([one])
    >>> one.set_result("x"); both.result()
    ['x']
    """
    whole: Future[list[T]] = Future()
    parts: list[Future[T]] = list(futures)  # emptied once settled, so that nothing refers to itself in a circle
    left = len(parts)
    lock = threading.Lock()

    def take() -> list[Future[T]]:
        with lock:
            taken = parts.copy()
            parts.clear()
        return taken

    def settle(part: Future[T]) -> None:
        nonlocal left
        failed = part.cancelled() or part.exception() is not None
        with lock:
            left -= 1
            if left > 0 and not failed:
                return
        taken = take()
        if not taken or not whole.set_running_or_notify_cancel():
            return
        if not failed:
            whole.set_result([future.result() for future in taken])
            return
        whole.set_exception(EngineError("the input was cancelled") if part.cancelled() else part.exception())
        for other in taken:
            other.cancel()

    def cancelled(_: Future[list[T]]) -> None:
        taken = take() if whole.cancelled() else []
        if taken:
            whole.set_running_or_notify_cancel()  # tells those who wait by concurrent.futures.wait
        for part in taken:
            part.cancel()

    if not parts:
        whole.set_result([])
    whole.add_done_callback(cancelled)
    for future in list(parts):
        future.add_done_callback(settle)
    return whole


class Lane:
    """Threads that take jobs in order.

    Unlike those of ``concurrent.futures`` they are daemons: a process that ends does not first do all that was asked.

    Args:
        n_threads: how many; started at the first job.
        name: of the threads.

    >>> done: Future[int] = Future()
    >>> Lane(1, "example").submit(lambda: done.set_result(3))
    >>> done.result(10)
    3
    """

    def __init__(self, n_threads: int, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._n_threads = n_threads
        self._name = name
        self._lock = threading.Lock()
        self._started = 0

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job; it must not raise."""
        self._jobs.put(job)
        with self._lock:
            missing = self._n_threads - self._started
            self._started = self._n_threads
        for _ in range(missing):
            threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except BaseException:  # a callback of the user's that exits must not take the thread along
                _log.exception("a callback failed in thread %s", self._name)
            del job  # while waiting for the next one, hold on to nothing of the last


class FutureGroup:
    """Futures that are cancelled together, those too that a thread adds after they were.

    A task that is cancelled while a thread still submits for it cannot stop that thread, and would never see its
    futures; the thread adds them here instead.

    >>> group, late = FutureGroup(), Future()
    >>> group.cancel()
    >>> group.add([late])
    >>> late.cancelled()
    True
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: list[Future[Any]] = []
        self._over = False

    def add(self, futures: Iterable[Future[Any]]) -> None:
        """Add futures; they are cancelled at once when the group is."""
        added = list(futures)
        with self._lock:
            self._futures += added
            over = self._over
        if over:
            for future in added:
                future.cancel()

    async def settled(self) -> None:
        """Wait on the event loop until all are done, well or not; cancelling the wait cancels them."""
        with self._lock:
            futures = list(self._futures)
        await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)

    def cancel(self) -> None:
        """Cancel what has not begun; what is done stays done."""
        with self._lock:
            self._over = True
            futures = list(self._futures)
        for future in futures:
            future.cancel()
