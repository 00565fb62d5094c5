"""What encoders of a process share: one model for equal settings, and the threads around it.

A handle keeps a model alive; the last one to close, or to be garbage-collected, frees it. After a fork the child starts
with an empty table: threads and CUDA contexts do not survive a fork, so the child loads anew.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Literal, TypeVar

from colqwen3_retrievers.encoding.batching import EncodeWorker, forget_workers
from colqwen3_retrievers.encoding.futures import Lane
from colqwen3_retrievers.encoding.settings import loaded_torch
from colqwen3_retrievers.engines import Engine
from colqwen3_retrievers.errors import EngineError
from colqwen3_retrievers.models.rendering import EncoderInput
from colqwen3_retrievers.pages import images
from colqwen3_retrievers.vectors.multi_vector import Float32

T = TypeVar("T")

Kind = Literal["text", "image", "page"]
"""What is rendered: a text query, a query with an image, or a page. None of them waits for another kind."""

IN_FLIGHT_PAGES = 64
"""Most pages of a process that are rendered but not yet encoded: bounds memory, at about 4 MB a page."""


class SharedEngine:
    """An engine's worker, with the number of handles on it.

    Args:
        key: what makes two handles equal.
        load: makes the engine.
    """

    def __init__(self, key: Hashable, load: Callable[[], Engine]) -> None:
        self.key = key
        self.handles = 0
        self.worker = EncodeWorker(load)

    def submit(
        self,
        kind: Kind,
        render: Callable[[], EncoderInput],
        finish: Callable[[EncoderInput, Float32], T],
        result: Future[T],
    ) -> None:
        """Render, encode and finish one input, each in its own thread.

        Args:
            kind: what is rendered.
            render: makes the engine's input.
            finish: makes the result of it and its token embeddings.
            result: settled with what ``finish`` gives or what went wrong; cancelling it takes the input back.
        """
        lanes = _lanes
        lanes.render[kind].submit(lambda: self._render(lanes, kind, render, finish, result))

    def _render(
        self,
        lanes: _Lanes,
        kind: Kind,
        render: Callable[[], EncoderInput],
        finish: Callable[[EncoderInput, Float32], T],
        result: Future[T],
    ) -> None:
        slots = lanes.slots if kind == "page" else None
        if slots is not None:
            slots.acquire()
        try:
            if result.cancelled():
                raise EngineError("the input was cancelled")
            if self.worker.closed:
                raise EngineError("the encoder was closed before this input was encoded")
            item = render()
            embedded = self.worker.submit(item)
        except BaseException as exc:  # belongs to whoever waits for the result
            if slots is not None:
                slots.release()
            fail(result, exc)
            return

        def encoded(future: Future[Float32]) -> None:
            if slots is not None:
                slots.release()
            lanes.finish[kind].submit(lambda: _settle(future, item, finish, result))

        def withdraw(done: Future[T]) -> None:
            if done.cancelled():
                embedded.cancel()

        embedded.add_done_callback(encoded)
        result.add_done_callback(withdraw)


class _Lanes:
    """The threads around all engines of a process, and the slots of pages in flight.

    Finishing has threads of its own: rendering may wait for a slot, and what frees the slots never queues behind it.
    """

    def __init__(self) -> None:
        several = min(8, max(1, (os.cpu_count() or 2) - 1))  # one core is left to whoever feeds the device
        self.slots = threading.Semaphore(IN_FLIGHT_PAGES)
        self.render: dict[Kind, Lane] = {
            "text": Lane(1, "colqwen3-text"),
            "image": Lane(1, "colqwen3-image"),
            "page": Lane(several, "colqwen3-page"),
        }
        answer = Lane(1, "colqwen3-answer")
        self.finish: dict[Kind, Lane] = {
            "text": answer,
            "image": answer,
            "page": Lane(max(1, several // 2), "colqwen3-finish"),
        }


_lock = threading.Lock()
_shared: dict[Hashable, SharedEngine] = {}
_lanes = _Lanes()
_generation = 0
_fork_hook_set = False


def acquire(key: Hashable, load: Callable[[], Engine]) -> SharedEngine:
    """Get the shared engine of a key, made when it is not there, and count one handle more."""
    current_generation()
    with _lock:
        if key not in _shared:
            _shared[key] = SharedEngine(key, load)
        _shared[key].handles += 1
        return _shared[key]


def release(engine: SharedEngine, generation: int) -> None:
    """Count one handle less; the last one closes the engine.

    Args:
        engine: of :func:`acquire`.
        generation: when it was acquired; a handle of the parent, seen from a forked child, is left alone.
    """
    with _lock:
        if generation != _generation:
            return
        engine.handles -= 1
        if engine.handles > 0:
            return
        _shared.pop(engine.key, None)
    engine.worker.close()


def current_generation() -> int:
    """Give the number of forks this process is away from the first one that asked; from then on they are counted."""
    global _fork_hook_set
    if not _fork_hook_set and hasattr(os, "register_at_fork"):
        _fork_hook_set = True
        os.register_at_fork(after_in_child=_after_fork)
    return _generation


def fail(result: Future[T], exc: BaseException) -> None:
    """Settle a future with an error, unless it was cancelled."""
    if result.set_running_or_notify_cancel():
        result.set_exception(exc)


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
    """Start anew in a forked child: the parent's threads are gone, and its locks may be held for ever."""
    global _lock, _lanes, _generation
    _lock = threading.Lock()
    _lanes = _Lanes()
    _shared.clear()
    _generation += 1
    forget_workers()
    images.forget_locks()
    torch = loaded_torch()
    if torch is not None:
        torch.set_num_threads(1)  # the parent's OpenMP threads are gone, and would be waited for without end
