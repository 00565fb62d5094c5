"""How an encoder hands its inputs to the model it shares: opened when first needed, never in the caller's thread."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from colqwen3_retrievers.encoding import shared_engine as sharing
from colqwen3_retrievers.encoding.opened_model import OpenedModel
from colqwen3_retrievers.encoding.settings import EncoderSettings
from colqwen3_retrievers.errors import ColQwen3Error, EncodeError, EngineError, MissingExtraError
from colqwen3_retrievers.models.rendering import EncoderInput
from colqwen3_retrievers.vectors.multi_vector import Float32, MultiVector

Render = Callable[[OpenedModel], EncoderInput]


class _State:
    """What one process knows of an encoder."""

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.lock = threading.Lock()
        self.opening = threading.Lock()  # of its own: opening may take minutes, and close() must not wait for it
        self.opened: OpenedModel | None = None
        self.engine: sharing.SharedEngine | None = None
        self.finalizer: weakref.finalize[Any, Any] | None = None
        self.waiting: list[Callable[[ColQwen3Error | None], None]] = []


class Submitter:
    """An encoder's handle on its checkpoint and on the shared engine.

    It is held by its own work: what is under way is finished even when nobody else holds it.

    Args:
        settings: of the encoder.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        self.settings = settings
        self._state = _State(sharing.current_generation())
        self._closed = False

    def opened(self) -> OpenedModel:
        """Open the checkpoint, or give it when it is open.

        Raises:
            ColQwen3Error: as :meth:`OpenedModel.open`.
        """
        state = self._here()
        with state.opening:
            if state.opened is None:
                state.opened = OpenedModel.open(self.settings)
            return state.opened

    def engine(self) -> sharing.SharedEngine:
        """Get the shared engine, loading nothing yet.

        Raises:
            EngineError: closed.
            ColQwen3Error: as :meth:`opened`.
        """
        state = self._here()
        if state.engine is None:
            key, load = self.opened().engine()
        with state.lock:
            if self._closed:
                raise EngineError("the encoder is closed")
            if state.engine is None:
                state.engine = sharing.acquire(key, load)
                state.finalizer = weakref.finalize(self, _release_later, state.engine, state.generation)
                state.finalizer.atexit = False
            return state.engine

    def submit(self, kind: sharing.Kind, index: int, render: Render) -> Future[MultiVector]:
        """Render, encode and finish one input; returns at once.

        Args:
            kind: what is rendered.
            index: its position in the caller's list, for errors.
            render: makes the engine's input.

        Raises:
            EngineError: closed.
        """
        if self._closed:
            raise EngineError("the encoder is closed")
        self.settings = self.settings.on_current_device()
        result: Future[MultiVector] = Future()

        def start(error: ColQwen3Error | None) -> None:
            try:
                if error is not None:
                    raise error.copy()
                opened, engine = self.opened(), self.engine()
            except BaseException as exc:  # belongs to whoever waits for the result
                sharing.fail(result, exc)
                return

            def rendered() -> EncoderInput:
                with about(index):
                    return render(opened)

            def finish(item: EncoderInput, rows: Float32) -> MultiVector:
                return self._finish(opened, item, rows)

            engine.submit(kind, rendered, finish, result)

        self._when_open(start)
        return result

    def close(self) -> None:
        """Let go of the engine; further calls are errors."""
        self._closed = True
        state = self._here()
        with state.lock:
            engine, state.engine = state.engine, None
            if state.finalizer is not None:
                state.finalizer.detach()
        if engine is not None:
            sharing.release(engine, state.generation)

    def _finish(self, opened: OpenedModel, item: EncoderInput, rows: Float32) -> MultiVector:
        """Apply the tail; being a method, it keeps this handle, and so the engine, until the work is done."""
        return opened.finish(item, rows)

    def _here(self) -> _State:
        """What this process knows of it: a forked child starts with nothing, for locks and threads do not cross."""
        if self._state.generation != sharing.current_generation():
            self._state = _State(sharing.current_generation())
        return self._state

    def _when_open(self, job: Callable[[ColQwen3Error | None], None]) -> None:
        """Run a job now, or in a thread once the engine is known.

        Neither a download nor importing torch may hold up the caller, who may be an event loop.
        """
        state = self._here()
        with state.lock:
            ready = state.engine is not None and not state.waiting
            if not ready:
                state.waiting.append(job)
                if len(state.waiting) > 1:
                    return
        if ready:
            job(None)
        else:
            threading.Thread(target=self._open_and_run, args=(state,), name="colqwen3-open", daemon=True).start()

    def _open_and_run(self, state: _State) -> None:
        error: ColQwen3Error | None = None
        try:
            self.engine()
        except ColQwen3Error as exc:
            error = exc
        except BaseException as exc:  # a library that panics or exits must not leave callers waiting
            error = EngineError(f"the checkpoint cannot be opened: {exc!r}")
            error.__cause__ = exc
        jobs: list[Callable[[ColQwen3Error | None], None]] = []
        while True:
            with state.lock:
                del state.waiting[: len(jobs)]
                jobs = state.waiting.copy()
            if not jobs:
                return
            for job in jobs:
                job(error)


@contextlib.contextmanager
def about(index: int) -> Iterator[None]:
    """Whatever is wrong inside is wrong with input ``index`` of a call.

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


def _release_later(engine: sharing.SharedEngine, generation: int) -> None:
    """Release from a thread of its own: the garbage collector may run in one of the engine's."""
    threading.Thread(target=sharing.release, args=(engine, generation), daemon=True).start()
