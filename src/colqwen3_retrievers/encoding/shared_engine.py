"""The way of an input from its caller to the engine and back.

A caller makes one :class:`~colqwen3_retrievers.encoding.batching.Job` an input, and one
:class:`~colqwen3_retrievers.encoding.futures.ListFuture` a call; nothing else is created on the way. A job passes three
threads, each of which hands it to the next::

    caller      ModelHandle.submit: queues the job and returns, also on an event loop
      |         (before the first use, a thread opens the checkpoint, and jobs wait for it)
    render      SharedEngine._render: prompt tokens and pixels; text queries, image queries and pages have threads of
      |         their own; a page first takes one of 64 places in flight, which bounds memory
    engine      SharedEngine._run: loads the weights at the first job, then takes batches from a BatchQueue, queries
      |         before pages, and calls the engine
    finish      Job.finish: the tail (Matryoshka, L2, pooling); sets the item of the caller's future, which runs the
                caller's callbacks. Pages give back their place in flight; threads of their own, for rendering may wait
                for a place

Guarantees, and what keeps them:

* Results do not depend on how a batch was cut: rows are ragged, and the tail sees one input at a time. A batch that
  fails for one of its inputs is halved until that one fails alone; the torch engine halves by itself when CUDA memory
  runs out.
* An engine that computes here has one thread. One that waits for other machines
  (:class:`~colqwen3_retrievers.engines.ConcurrentEngine`) is called from several, a quarter of them for queries alone,
  so that no query ever waits behind a page.
* Cancelling a future, or a failure of one of its inputs, takes back the others: each thread drops jobs whose future is
  over, and those waiting for the engine leave at once.
* Encoders whose models are equal share an engine. The last :class:`ModelHandle` to be closed or garbage-collected frees
  it; a job's future keeps the handle until it is over, so work under way is finished. Closing finishes the batch under
  way and fails what waits.
* Threads and CUDA contexts do not survive a fork. A forked child starts with an empty table and new threads, and loads
  anew.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import traceback
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from colqwen3_retrievers.encoding.batching import BatchQueue, Job, Kind, QueueName
from colqwen3_retrievers.encoding.futures import Lane, ListFuture
from colqwen3_retrievers.encoding.opened_model import OpenedModel
from colqwen3_retrievers.encoding.settings import EncoderSettings, loaded_torch
from colqwen3_retrievers.engines import ConcurrentEngine, Engine
from colqwen3_retrievers.errors import ColQwen3Error, EncodeError, EngineError, EngineResponseError, MissingExtraError
from colqwen3_retrievers.fork import ForkSafeLock, after_fork
from colqwen3_retrievers.models.rendering import EncoderInput
from colqwen3_retrievers.vectors.multi_vector import Float32, MultiVector

IN_FLIGHT_PAGES: Final = 64
"""Most pages of a process between rendering and their multi-vector: bounds memory, at about 4 MB a page."""

QUERY_LANES: Final = 4
"""One in so many threads of a concurrent engine serves queries alone; the others serve pages."""


class ModelHandle:
    """An encoder's handle on its checkpoint and on the engine it shares.

    Args:
        settings: of the encoder.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        self.settings = settings
        self._closed = False
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._lock = ForkSafeLock()
        self._opening = ForkSafeLock()  # of its own: opening may take minutes, and close() must not wait for it
        self._forget()
        _handles.add(self)
        after_fork(self._forget)

    def _forget(self) -> None:
        """Start with nothing opened, also in a forked child: its parent's threads do not exist there."""
        if self._finalizer is not None:
            self._finalizer.detach()  # the parent's engine is not this process's to release
        self._opened: OpenedModel | None = None
        self._engine: SharedEngine | None = None
        self._ready: Future[None] | None = None  # while the engine is being opened

    def opened(self) -> OpenedModel:
        """Return the opened checkpoint; the first call opens it.

        Raises:
            ColQwen3Error: as :meth:`OpenedModel.open`.
        """
        with self._opening:
            if self._opened is None:
                self._opened = OpenedModel.open(self.settings)
            return self._opened

    def engine(self) -> SharedEngine:
        """Return the shared engine, which loads nothing before its first job.

        Raises:
            EngineError: the encoder is closed.
            ColQwen3Error: as :meth:`opened`.
        """
        if self._engine is None:
            key, load = self.opened().engine()
        with self._lock:
            if self._closed:
                raise EngineError("the encoder is closed")
            if self._engine is None:
                self._engine = _acquire(key, load)
                self._finalizer = weakref.finalize(self, _release_later, self._engine)
                self._finalizer.atexit = False
            return self._engine

    def new_future(self) -> ListFuture[MultiVector]:
        """Return the future of a call; it keeps this handle, and so the engine, until it is over."""
        return ListFuture(self._drop_unwanted)

    def submit(
        self, kind: Kind, index: int, render: Callable[[OpenedModel], EncoderInput], future: ListFuture[MultiVector]
    ) -> None:
        """Start encoding one input; returns at once.

        Args:
            kind: what is rendered.
            index: its position in the caller's list, for errors.
            render: makes the engine's input.
            future: of :meth:`new_future`; an item is added to it.

        Raises:
            EngineError: the encoder is closed.
        """
        if self._closed:
            raise EngineError("the encoder is closed")
        self.settings = self.settings.on_current_device()
        job = Job(kind, index, render, future, future.add_item())
        with self._lock:
            ready = self._ready
            if ready is None and self._engine is None:  # neither a download nor importing torch may hold up the caller
                ready = self._ready = Future()
                threading.Thread(target=self._open, args=(ready,), name="colqwen3-open", daemon=True).start()
        if ready is None:
            self._start(job)
        else:
            ready.add_done_callback(lambda done: self._start(job, done.exception()))

    def close(self) -> None:
        """Release the engine; further calls are errors."""
        self._closed = True
        with self._lock:
            engine, self._engine = self._engine, None
            if self._finalizer is not None:
                self._finalizer.detach()
        if engine is not None:
            _release(engine)

    def _open(self, ready: Future[None]) -> None:
        error: BaseException | None = None
        try:
            self.engine()
        except ColQwen3Error as exc:
            error = exc
        except BaseException as exc:  # a library that panics or exits must not leave callers waiting
            error = EngineError(f"the checkpoint cannot be opened: {exc!r}")
            error.__cause__ = exc
        with self._lock:
            self._ready = None  # after an error, the next job tries again
        if error is None:
            ready.set_result(None)
        else:
            ready.set_exception(error)

    def _start(self, job: Job, error: BaseException | None = None) -> None:
        try:
            if error is not None:
                raise error.copy() if isinstance(error, ColQwen3Error) else error
            job.opened = self.opened()
            self.engine().submit(job)
        except BaseException as exc:  # belongs to whoever waits for the result
            _lanes.finish[job.kind].submit(partial(job.fail, exc))

    def _drop_unwanted(self) -> None:
        engine = self._engine
        if engine is not None:
            engine.queue.drop_unwanted()


@dataclass(slots=True)
class EngineStats:
    """Counts of an engine's work.

    Attributes:
        loads: times the engine was loaded.
        batches: batches handed to the engine.
        inputs: inputs in them.
    """

    loads: int = 0
    batches: int = 0
    inputs: int = 0


class SharedEngine:
    """An engine, the inputs that wait for it, and its threads.

    Args:
        key: equal for handles that may share it.
        load: makes the engine; called in its thread at the first job, and again after it failed.
    """

    def __init__(self, key: Hashable, load: Callable[[], Engine]) -> None:
        self.key = key
        self.handles = 0
        self.stats = EngineStats()
        self.queue = BatchQueue()
        self._load = load
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._lanes = _lanes
        atexit.unregister(_close_all)
        atexit.register(_close_all)  # again, so that it runs before what the engine's libraries registered
        _live.add(self)

    def submit(self, job: Job) -> None:
        """Render, encode and finish an input, each in its own thread; returns at once."""
        self._lanes.render[job.kind].submit(lambda: self._render(job))

    def submit_rendered(self, job: Job) -> None:
        """Encode and finish an input that is rendered.

        Raises:
            EngineError: the engine is closed.
        """
        self.queue.put(job)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="colqwen3-engine", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Finish the batch under way, fail the jobs that wait, and close the engine.

        A :class:`ConcurrentEngine` is closed at once: its calls under way fail, instead of waiting for other machines.
        """
        self._close_queue("the encoder was closed before this input was encoded")
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        _live.discard(self)

    def _render(self, job: Job) -> None:
        if job.kind == "page" and not job.future.over:
            self._lanes.slots.acquire()
            job.slots = self._lanes.slots
        if job.future.over:
            job.leave()
            return
        try:
            if self.queue.closed:
                raise EngineError("the encoder was closed before this input was encoded")
            with about(job.index):
                job.item = job.render(job.opened)
            self.submit_rendered(job)
        except BaseException as exc:  # belongs to whoever waits for the result
            job.fail(exc)

    def _run(self) -> None:
        engine: Engine | None = None
        try:
            while self.queue.wait("queries", "pages"):
                engine = engine or self._load_engine()
                if isinstance(engine, ConcurrentEngine) and engine.concurrency > 1:
                    self._run_lanes(engine)
                elif engine is not None:
                    self._embed(engine, self.queue.take(engine))
        finally:  # whatever ends this thread, nobody may wait for it any longer
            self._close_queue("the engine's thread ended")
            if engine is not None:
                engine.close()

    def _run_lanes(self, engine: ConcurrentEngine) -> None:
        """Serve from several threads until the queue is closed; then close the engine, which ends their calls."""
        n_queries = max(1, engine.concurrency // QUERY_LANES)
        kinds: list[QueueName] = ["queries" if i < n_queries else "pages" for i in range(engine.concurrency)]
        lanes = [
            threading.Thread(target=self._run_lane, args=(engine, kind), name=f"colqwen3-engine-{i}", daemon=True)
            for i, kind in enumerate(kinds)
        ]
        for lane in lanes:
            lane.start()
        self.queue.wait()
        engine.close()
        for lane in lanes:
            lane.join()

    def _run_lane(self, engine: ConcurrentEngine, kind: QueueName) -> None:
        while self.queue.wait(kind):
            self._embed(engine, self.queue.take(engine, kind))

    def _load_engine(self) -> Engine | None:
        """Load the engine, or fail everybody who waits; the next job tries again."""
        try:
            engine = self._load()
        except BaseException as exc:  # the failure belongs to the callers, not to this thread
            self._fail(self.queue.clear(), exc)
            return None
        self.stats.loads += 1
        return engine

    def _embed(self, engine: Engine, jobs: list[Job]) -> None:
        if jobs:
            with self._lock:
                self.stats.batches += 1
                self.stats.inputs += len(jobs)
            self._embed_or_halve(engine, jobs)

    def _embed_or_halve(self, engine: Engine, jobs: list[Job]) -> None:
        """Encode a batch; one that fails for one of its inputs is halved, until that one alone fails."""
        rows: list[Float32] | None
        try:
            rows = engine.embed([job.item for job in jobs])
            if len(rows) != len(jobs):
                raise EngineError(f"the engine gave {len(rows)} results for {len(jobs)} inputs")
        except BaseException as exc:  # the failure belongs to the callers, not to this thread
            if len(jobs) == 1 or self.queue.closed or not _may_be_an_input(exc):
                self._fail(jobs, exc)
                return
            rows = None
        if rows is None:  # here, for in the handler the exception would keep the batch
            half = len(jobs) // 2
            self._embed_or_halve(engine, jobs[:half])
            self._embed_or_halve(engine, jobs[half:])
            return
        for job, embeddings in zip(jobs, rows, strict=True):
            self._lanes.finish[job.kind].submit(partial(job.finish, embeddings))

    def _close_queue(self, reason: str) -> None:
        self._fail(self.queue.clear(close=True), EngineError(reason))

    def _fail(self, jobs: Sequence[Job], exc: BaseException) -> None:
        """Fail each job with an error of its own, in the threads that run callbacks."""
        error = _detached(exc)
        for job in jobs:
            copy = error.at(job.index) if isinstance(error, EncodeError) else error.copy()
            self._lanes.finish[job.kind].submit(partial(job.fail, copy))


@contextlib.contextmanager
def about(index: int) -> Iterator[None]:
    """Raise errors of the block as errors of input ``index`` of a call.

    >>> with about(3):
    ...     raise EncodeError("the text is empty")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.EncodeError: input 3: the text is empty
    """
    try:
        yield
    except MissingExtraError:
        raise  # nothing is wrong with the input
    except ColQwen3Error as exc:
        raise EncodeError.of(exc, index) from exc


def _may_be_an_input(exc: BaseException) -> bool:
    """Return whether an error may be about one input of a batch, so that the others may succeed without it."""
    if isinstance(exc, EngineResponseError):
        return not exc.retryable and exc.status_code in (None, 400, 413, 422)
    return isinstance(exc, EncodeError) or (isinstance(exc, EngineError) and not exc.retryable)


def _detached(exc: BaseException) -> ColQwen3Error:
    """Return an error of ours that refers to neither the model nor the batch.

    A traceback keeps the frames it went through, and those keep the model and a batch's tensors alive for as long as
    somebody keeps the error, as a notebook does.
    """
    link: BaseException | None = exc
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    if isinstance(exc, ColQwen3Error):
        return exc
    error = EngineError(f"the engine failed: {exc!r}")
    error.__cause__ = exc
    return error


class _Lanes:
    """The threads around all engines of a process, and the places of pages in flight."""

    def __init__(self) -> None:
        n_threads = min(8, max(1, (os.cpu_count() or 2) - 1))  # one core is left to whoever feeds the device
        self.slots = threading.Semaphore(IN_FLIGHT_PAGES)
        self.render: dict[Kind, Lane] = {
            "text": Lane(1, "colqwen3-text"),
            "image": Lane(1, "colqwen3-image"),
            "page": Lane(n_threads, "colqwen3-page"),
        }
        queries = Lane(1, "colqwen3-answer")
        pages = Lane(max(1, n_threads // 2), "colqwen3-finish")
        self.finish: dict[Kind, Lane] = {"text": queries, "image": queries, "page": pages}


_lock = ForkSafeLock()
_engines: dict[Hashable, SharedEngine] = {}
_live: weakref.WeakSet[SharedEngine] = weakref.WeakSet()  # those that are closing too
_handles: weakref.WeakSet[ModelHandle] = weakref.WeakSet()
_lanes = _Lanes()


def _acquire(key: Hashable, load: Callable[[], Engine]) -> SharedEngine:
    """Return the engine of a key, created if there is none, with one handle more."""
    with _lock:
        if key not in _engines:
            _engines[key] = SharedEngine(key, load)
        _engines[key].handles += 1
        return _engines[key]


def _release(engine: SharedEngine) -> None:
    """Release one handle; the last one closes the engine."""
    with _lock:
        engine.handles -= 1
        if engine.handles > 0:
            return
        del _engines[engine.key]
    engine.close()


def _release_later(engine: SharedEngine) -> None:
    """Release from a thread of its own: the garbage collector may run in one of the engine's."""
    threading.Thread(target=_release, args=(engine,), daemon=True).start()


@after_fork
def _forget_engines() -> None:
    """Start anew in a forked child, without touching the engines: their threads do not exist there."""
    global _lanes
    _lanes = _Lanes()
    _engines.clear()
    _live.clear()
    torch = loaded_torch()
    if torch is not None and _handles:
        torch.set_num_threads(1)  # the parent's OpenMP threads are gone, and would be waited for without end


def _close_all() -> None:
    for engine in list(_live):
        engine.close()
