"""Futures of many parts, and threads to run jobs in that never keep a process alive."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from colqwen3_retrievers.errors import EngineError
from colqwen3_retrievers.fork import abandon, after_fork

T = TypeVar("T")

_log = logging.getLogger(__name__)


class ListFuture(Future[list[T]]):
    """A future of a list whose items are set one by one, in any order and from any thread.

    The first item that fails fails the whole list, and cancelling it takes all of it back. After that it is ``over``,
    as it is when the list is complete: items that are set later are dropped.

    Args:
        on_drop: called once if the list fails or is cancelled, when nobody waits for the missing items any more.

    >>> future = ListFuture()
    >>> first, second = future.add_item(), future.add_item()
    >>> future.complete(); future.set_item(second, "b"); future.set_item(first, "a")
    >>> future.result(), future.over
    (['a', 'b'], True)
    """

    def __init__(self, on_drop: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.over = False
        self._on_drop = on_drop
        self._items: list[Any] = []
        self._missing = 1  # items, and one more until the list is complete
        self._lock = threading.Lock()
        after_fork(self._fail_in_child)

    def add_item(self) -> int:
        """Return the position of one more item, which is set later."""
        with self._lock:
            self._items.append(None)
            self._missing += 1
            return len(self._items) - 1

    def set_item(self, position: int, item: T) -> None:
        """Set an item; the last one sets the result."""
        with self._lock:
            if not self.over:
                self._items[position] = item
        self._count_down()

    def complete(self) -> None:
        """Declare that no item will be added."""
        self._count_down()

    def fail(self, exc: BaseException) -> None:
        """Fail the whole list, unless it is over."""
        if self._end_early() and self.set_running_or_notify_cancel():
            self.set_exception(exc)

    def cancel(self) -> bool:
        """Cancel the whole list; False if it has a result already."""
        cancelled = super().cancel()
        if cancelled and self._end_early():
            self.set_running_or_notify_cancel()  # informs those who wait by concurrent.futures.wait
        return cancelled

    def _fail_in_child(self) -> None:
        self._lock = threading.Lock()
        if not self.over:
            self.over, self._on_drop = True, lambda: None
            abandon(self, EngineError("submitted before a fork, in the parent process; submit it again in this one"))

    def _count_down(self) -> None:
        with self._lock:
            self._missing -= 1
            if self.over or self._missing > 0:
                return
            self.over = True
            items, self._items, self._on_drop = self._items, [], lambda: None
        if self.set_running_or_notify_cancel():
            self.set_result(items)

    def _end_early(self) -> bool:
        """Drop what was set; False if the list is over already. From then on nothing refers back to ``on_drop``."""
        with self._lock:
            if self.over:
                return False
            self.over = True
            on_drop, self._items, self._on_drop = self._on_drop, [], lambda: None
        on_drop()
        return True


class Lane:
    """Threads that take jobs in order.

    Unlike those of ``concurrent.futures`` they are daemons: a process that ends leaves the jobs that wait undone.

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
            except BaseException:  # a callback of the user's that exits must not end the thread
                _log.exception("a callback failed in thread %s", self._name)
            del job  # so that nothing of it is kept while the thread waits for the next one
