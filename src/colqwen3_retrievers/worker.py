"""One thread that owns an engine and gathers concurrent callers into batches.

While the engine computes, further inputs queue up; the next batch takes all that fit. So batches form by themselves,
without any waiting, and a lone caller is never delayed. Queries go before pages.
"""

from __future__ import annotations

import atexit
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from colqwen3_retrievers.datatypes import Float32
from colqwen3_retrievers.engines import Engine
from colqwen3_retrievers.errors import ColQwen3Error, EngineError
from colqwen3_retrievers.rendering import EncoderInput

_QUERY_BATCHES_IN_A_ROW = 16  # then one batch of pages, so that a stream of queries cannot starve indexing

T = TypeVar("T")

_live: weakref.WeakSet[EncodeWorker] = weakref.WeakSet()


@dataclass(slots=True)
class WorkerStats:
    """What a worker has done so far.

    Attributes:
        loads: times the engine was loaded.
        batches: batches handed to the engine.
        inputs: inputs in them.
    """

    loads: int = 0
    batches: int = 0
    inputs: int = 0


@dataclass(slots=True, eq=False)
class _Job:
    item: EncoderInput
    future: Future[Float32]


class EncodeWorker:
    """Runs an engine in a thread of its own.

    Args:
        load: makes the engine; called in that thread at the first job, and again after it failed.
    """

    def __init__(self, load: Callable[[], Engine]) -> None:
        self.stats = WorkerStats()
        self._load = load
        self._queries: deque[_Job] = deque()
        self._pages: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        if not _live:
            atexit.register(_close_all)
        _live.add(self)

    def submit(self, item: EncoderInput) -> Future[Float32]:
        """Queue one rendered input.

        Returns:
            A future of its token embeddings, float32 (n_tokens, full dim), not yet normalised.

        Raises:
            EngineError: the worker is closed.
        """
        future: Future[Float32] = Future()
        with self._changed:
            if self._closed:
                raise EngineError("the encoder is closed")
            (self._queries if item.is_query else self._pages).append(_Job(item, future))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="colqwen3-engine", daemon=True)
                self._thread.start()
            self._changed.notify()
        return future

    @property
    def closed(self) -> bool:
        """Whether it takes no more inputs."""
        return self._closed

    def close(self) -> None:
        """Finish the batch under way, fail what still waits, and drop the engine."""
        with self._changed:
            self._closed = True
            waiting = [*self._queries, *self._pages]
            self._queries.clear()
            self._pages.clear()
            thread = self._thread
            self._changed.notify_all()
        for job in waiting:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(EngineError("the encoder was closed before this input was encoded"))
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        _live.discard(self)

    def _run(self) -> None:
        engine: Engine | None = None
        try:
            for turn in itertools.count():
                with self._changed:
                    while not (self._closed or self._queries or self._pages):
                        self._changed.wait()
                    if self._closed:
                        return
                engine = engine or self._load_engine()
                if engine is not None:
                    self._serve(engine, self._gather(engine.batch_tokens, turn))
        finally:
            if engine is not None:
                engine.close()

    def _load_engine(self) -> Engine | None:
        """Load the engine, or fail everybody who waits; the next job tries again."""
        try:
            engine = self._load()
        except BaseException as exc:  # the failure belongs to the callers, not to this thread
            with self._changed:
                waiting = [*self._queries, *self._pages]
                self._queries.clear()
                self._pages.clear()
            _fail([job for job in waiting if job.future.set_running_or_notify_cancel()], exc)
            return None
        self.stats.loads += 1
        return engine

    def _gather(self, budget: int, turn: int) -> list[_Job]:
        """Take the next batch off the queues: the oldest input, and those most like it in length."""
        with self._changed:
            pages_first = self._pages and turn % (_QUERY_BATCHES_IN_A_ROW + 1) == _QUERY_BATCHES_IN_A_ROW
            queue = self._pages if pages_first or not self._queries else self._queries
            if not queue:  # closed in the meantime
                return []
            oldest = queue.popleft()
            taken, used = [oldest], len(oldest.item)
            for job in sorted(queue, key=lambda job: abs(len(job.item) - len(oldest.item))):
                used += len(job.item)
                if used > budget:
                    break
                taken.append(job)
            chosen = set(map(id, taken))
            kept = [job for job in queue if id(job) not in chosen]
            queue.clear()
            queue.extend(kept)
        return [job for job in taken if job.future.set_running_or_notify_cancel()]

    def _serve(self, engine: Engine, jobs: list[_Job]) -> None:
        if not jobs:
            return
        self.stats.batches += 1
        self.stats.inputs += len(jobs)
        try:
            rows = engine.embed([job.item for job in jobs])
        except BaseException as exc:  # the failure belongs to the callers, not to this thread
            _fail(jobs, exc)
            return
        for job, embedded in zip(jobs, rows, strict=True):
            job.future.set_result(embedded)


def _fail(jobs: Sequence[_Job], exc: BaseException) -> None:
    error = exc
    if not isinstance(exc, ColQwen3Error):
        error = EngineError(f"the engine failed: {exc!r}")
        error.__cause__ = exc
    for job in jobs:
        job.future.set_exception(error)


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
    lock = threading.Lock()
    left = len(futures)

    def settle(part: Future[T]) -> None:
        nonlocal left
        failed = part.cancelled() or part.exception() is not None
        with lock:
            left -= 1
            settled = whole.done() or (left > 0 and not failed) or not whole.set_running_or_notify_cancel()
            if settled:
                return
            if not failed:
                whole.set_result([future.result() for future in futures])
            elif part.cancelled():
                whole.set_exception(EngineError("the input was cancelled"))
            else:
                whole.set_exception(part.exception())
        for other in futures:
            other.cancel()

    def cancel_parts(_: Future[list[T]]) -> None:
        if whole.cancelled():
            for part in futures:
                part.cancel()

    if not futures:
        whole.set_result([])
    whole.add_done_callback(cancel_parts)
    for future in futures:
        future.add_done_callback(settle)
    return whole


def forget_workers() -> None:
    """Let go of every worker without touching it: in a forked child their threads do not exist."""
    _live.clear()


def _close_all() -> None:
    for worker in list(_live):
        worker.close()
