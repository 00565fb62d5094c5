"""Threads that hand an engine its inputs and gather concurrent callers into batches.

While the engine computes, further inputs queue up; the next batch takes all that fit. So batches form by themselves,
without any waiting, and a lone caller is never delayed. Queries go before pages.

An engine that computes here has one thread. One that waits for other machines (:class:`ConcurrentEngine`) has as many
as it wants calls under way, a quarter of them for queries alone, so that no query ever waits behind a page.
"""

from __future__ import annotations

import atexit
import logging
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from colqwen3_retrievers.engines import ConcurrentEngine, Engine
from colqwen3_retrievers.errors import ColQwen3Error, EncodeError, EngineError, EngineResponseError
from colqwen3_retrievers.models.rendering import EncoderInput
from colqwen3_retrievers.vectors.multi_vector import Float32

QUERY_BATCHES_IN_A_ROW = 16
"""Then one batch of pages, so that a stream of queries cannot starve indexing."""

QUERY_LANES = 4
"""One in so many threads of a concurrent engine serves queries alone; the others serve pages."""

_log = logging.getLogger(__name__)
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
    """Runs an engine in a thread of its own, or in several when it is a :class:`ConcurrentEngine`.

    Args:
        load: makes the engine; called in the first of them at the first job, and again after it failed.
    """

    def __init__(self, load: Callable[[], Engine]) -> None:
        self.stats = WorkerStats()
        self._load = load
        self._queries: deque[_Job] = deque()
        self._pages: deque[_Job] = deque()
        self._query_batches = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        atexit.unregister(_close_all)
        atexit.register(_close_all)
        _live.add(self)

    def submit(self, item: EncoderInput) -> Future[Float32]:
        """Queue one rendered input.

        Returns:
            A future of its token embeddings, float32 (n_tokens, full dim), not yet normalised. Cancelling it takes the
            input off the queue. Its callbacks run in the engine's thread and must be short.

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
            self._changed.notify_all()  # lanes wait for different queues
        return future

    @property
    def closed(self) -> bool:
        """Whether it takes no more inputs."""
        return self._closed

    def close(self) -> None:
        """Finish the batch under way, fail what still waits, and drop the engine.

        A :class:`ConcurrentEngine` is closed at once: its calls under way fail, instead of waiting for other machines.
        """
        thread = self._thread
        self._fail_waiting(EngineError("the encoder was closed before this input was encoded"), closing=True)
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        _live.discard(self)

    def _run(self) -> None:
        engine: Engine | None = None
        try:
            while True:
                if not self._wait(self._queries, self._pages):
                    return
                engine = engine or self._load_engine()
                if isinstance(engine, ConcurrentEngine) and engine.concurrency > 1:
                    self._run_lanes(engine)
                    return
                if engine is not None:
                    self._serve(engine, self._gather(engine))
        finally:  # whatever ends this thread, nobody may wait for it any longer
            self._fail_waiting(EngineError("the engine's thread ended"), closing=True)
            if engine is not None:
                engine.close()

    def _wait(self, *queues: deque[_Job]) -> bool:
        """Wait until one of the queues holds something; False when the worker is closed."""
        with self._changed:
            while not self._closed and not any(queues):
                self._changed.wait()
            return not self._closed

    def _run_lanes(self, engine: ConcurrentEngine) -> None:
        """Serve from several threads until closed; then close the engine, which ends what they wait for."""
        n_queries = max(1, engine.concurrency // QUERY_LANES)
        lanes = [
            threading.Thread(target=self._run_lane, args=(engine, queue), name=f"colqwen3-engine-{number}", daemon=True)
            for number, queue in enumerate(
                [self._queries] * n_queries + [self._pages] * (engine.concurrency - n_queries)
            )
        ]
        for lane in lanes:
            lane.start()
        with self._changed:
            while not self._closed:
                self._changed.wait()
        engine.close()
        for lane in lanes:
            lane.join()

    def _run_lane(self, engine: ConcurrentEngine, queue: deque[_Job]) -> None:
        while self._wait(queue):
            self._serve(engine, self._take(queue, engine))

    def _load_engine(self) -> Engine | None:
        """Load the engine, or fail everybody who waits; the next job tries again."""
        try:
            engine = self._load()
        except BaseException as exc:  # the failure belongs to the callers, not to this thread
            self._fail_waiting(exc)
            return None
        self.stats.loads += 1
        return engine

    def _gather(self, engine: Engine) -> list[_Job]:
        """Take the next batch of a lone thread: queries, but after many of those some pages."""
        with self._changed:
            pages_turn = self._pages and self._query_batches >= QUERY_BATCHES_IN_A_ROW
            queue = self._pages if pages_turn or not self._queries else self._queries
            self._query_batches = self._query_batches + 1 if queue is self._queries else 0
            return self._take(queue, engine)

    def _take(self, queue: deque[_Job], engine: Engine) -> list[_Job]:
        """Take the next batch off a queue: the oldest input, and those most like it in length."""
        alone = engine.goes_alone if isinstance(engine, ConcurrentEngine) else lambda _: False
        with self._changed:
            if not queue:  # closed in the meantime, or another thread was faster
                return []
            oldest = queue.popleft()
            taken, used = [oldest], len(oldest.item)
            others = [] if alone(oldest.item) else [job for job in queue if not alone(job.item)]
            for job in sorted(others, key=lambda job: abs(len(job.item) - len(oldest.item))):
                used += len(job.item)
                if used > engine.batch_tokens:
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
        with self._changed:
            self.stats.batches += 1
            self.stats.inputs += len(jobs)
        self._embed(engine, jobs)

    def _embed(self, engine: Engine, jobs: list[_Job]) -> None:
        """Settle jobs; a batch that fails for one of its inputs is halved, until that one alone fails."""
        rows: list[Float32] | None
        try:
            rows = engine.embed([job.item for job in jobs])
            if len(rows) != len(jobs):
                raise EngineError(f"the engine gave {len(rows)} results for {len(jobs)} inputs")
        except BaseException as exc:  # the failure belongs to the callers, not to this thread
            if len(jobs) == 1 or self._closed or not _may_be_an_input(exc):
                _fail(jobs, exc)
                return
            rows = None
        if rows is None:  # here, for in the handler the exception would keep the batch
            half = len(jobs) // 2
            self._embed(engine, jobs[:half])
            self._embed(engine, jobs[half:])
            return
        for job, embedded in zip(jobs, rows, strict=True):
            try:
                job.future.set_result(embedded)
            except BaseException:  # a callback that exits must not take the thread along
                _log.exception("a callback failed in the engine's thread")

    def _fail_waiting(self, exc: BaseException, *, closing: bool = False) -> None:
        with self._changed:
            self._closed = self._closed or closing
            waiting = [*self._queries, *self._pages]
            self._queries.clear()
            self._pages.clear()
            self._changed.notify_all()
        _fail([job for job in waiting if job.future.set_running_or_notify_cancel()], exc)


def _may_be_an_input(exc: BaseException) -> bool:
    """Whether an error may be about one input of a batch, and the others be well without it."""
    if isinstance(exc, EngineResponseError):
        return not exc.retryable and exc.status_code in (None, 400, 413, 422)
    return isinstance(exc, EncodeError) or (isinstance(exc, EngineError) and not exc.retryable)


def _fail(jobs: Sequence[_Job], exc: BaseException) -> None:
    """Give each caller an error of its own, which holds on to nothing.

    A traceback keeps the frames it went through, and those keep the model and a batch's tensors alive for as long as
    somebody keeps the error, as a notebook does.
    """
    link: BaseException | None = exc
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    error = exc if isinstance(exc, ColQwen3Error) else EngineError(f"the engine failed: {exc!r}")
    for job in jobs:
        own = error.copy()
        own.__cause__ = exc.__cause__ if error is exc else exc
        job.future.set_exception(own)


def forget_workers() -> None:
    """Let go of every worker without touching it: in a forked child their threads do not exist."""
    _live.clear()


def _close_all() -> None:
    for worker in list(_live):
        worker.close()
