"""Inputs on their way to an engine, and the rule by which they are gathered into batches.

While the engine computes, further inputs queue up, and the next batch takes all that fit. So batches form without any
waiting, and a lone caller is never delayed. Queries go before pages.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from colqwen3_retrievers.encoding.futures import ListFuture
from colqwen3_retrievers.encoding.opened_model import OpenedModel
from colqwen3_retrievers.engines import ConcurrentEngine, Engine
from colqwen3_retrievers.errors import EngineError
from colqwen3_retrievers.models.rendering import EncoderInput
from colqwen3_retrievers.vectors.multi_vector import Float32, MultiVector

QUERY_BATCHES_IN_A_ROW: Final = 16
"""Then one batch of pages, so that a stream of queries cannot starve indexing."""

Kind = Literal["text", "image", "page"]
"""What is rendered: a text query, a query with an image, or a page. None of them waits for another kind."""

QueueName = Literal["queries", "pages"]


@dataclass(slots=True, eq=False)
class Job:
    """One input, from the caller to the engine and back.

    Attributes:
        kind: what is rendered.
        index: its position in the caller's list, for errors.
        render: makes the engine's input.
        future: receives the multi-vector.
        position: of the multi-vector in the future's list.
        opened: the model it is for, once that is open.
        item: the engine's input, once it is rendered.
        slots: where it holds a place among the pages in flight, if it does.
    """

    kind: Kind
    index: int
    render: Callable[[OpenedModel], EncoderInput]
    future: ListFuture[MultiVector]
    position: int
    opened: OpenedModel = field(init=False)
    item: EncoderInput = field(init=False)
    slots: threading.Semaphore | None = None

    def finish(self, rows: Float32) -> None:
        """Apply the tail to the engine's token embeddings, and set the caller's item."""
        if self.future.over:
            self.leave()
            return
        try:
            multi_vector = self.opened.finish(self.item, rows)
        except BaseException as exc:  # belongs to whoever waits for the result
            self.fail(exc)
            return
        self.leave()
        self.future.set_item(self.position, multi_vector)

    def fail(self, exc: BaseException) -> None:
        """Hand an error to the caller."""
        self.leave()
        self.future.fail(exc)

    def leave(self) -> None:
        """Release the job's place among the pages in flight, if it holds one."""
        slots, self.slots = self.slots, None
        if slots is not None:
            slots.release()


class BatchQueue:
    """Rendered inputs that wait for an engine: queries and pages."""

    def __init__(self) -> None:
        self.closed = False
        self._waiting: dict[QueueName, deque[Job]] = {"queries": deque(), "pages": deque()}
        self._query_batches = 0
        self._changed = threading.Condition()

    def put(self, job: Job) -> None:
        """Add a rendered input.

        Raises:
            EngineError: the queue is closed.
        """
        with self._changed:
            if self.closed:
                raise EngineError("the encoder was closed before this input was encoded")
            self._waiting["queries" if job.item.is_query else "pages"].append(job)
            self._changed.notify_all()  # threads may wait for different kinds

    def wait(self, *kinds: QueueName) -> bool:
        """Wait for an input of one of these kinds; without any, for the queue to close. False once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed or any(self._waiting[kind] for kind in kinds))
            return not self.closed

    def take(self, engine: Engine, kind: QueueName | None = None) -> list[Job]:
        """Take the next batch: the oldest input, and those most like it in length, within the engine's budget.

        Args:
            engine: for its ``batch_tokens``, and for which inputs go alone.
            kind: what to take; None takes queries, but after many batches of those some pages.

        Returns:
            The batch; empty if the queue was closed, another thread was faster, or all inputs were cancelled.
        """
        goes_alone = engine.goes_alone if isinstance(engine, ConcurrentEngine) else lambda _: False
        with self._changed:
            for queue in self._waiting.values():
                _drop_unwanted(queue)
            kind = kind or self._next_kind()
            queue = self._waiting[kind]
            if not queue:
                return []
            oldest = queue.popleft()
            batch, n_tokens = [oldest], len(oldest.item)
            others = [] if goes_alone(oldest.item) else [job for job in queue if not goes_alone(job.item)]
            for job in sorted(others, key=lambda job: abs(len(job.item) - len(oldest.item))):
                n_tokens += len(job.item)
                if n_tokens > engine.batch_tokens:
                    break
                batch.append(job)
            taken = set(map(id, batch))
            self._waiting[kind] = deque(job for job in queue if id(job) not in taken)
        return batch

    def drop_unwanted(self) -> None:
        """Drop the pages nobody waits for any more, so that others may take their places in flight."""
        with self._changed:
            _drop_unwanted(self._waiting["pages"])

    def clear(self, *, close: bool = False) -> list[Job]:
        """Remove all inputs, and return them.

        Args:
            close: whether to take no more from now on.
        """
        with self._changed:
            self.closed = self.closed or close
            jobs = [job for queue in self._waiting.values() for job in queue]
            for queue in self._waiting.values():
                queue.clear()
            self._changed.notify_all()
        return jobs

    def _next_kind(self) -> QueueName:
        pages_turn = self._waiting["pages"] and self._query_batches >= QUERY_BATCHES_IN_A_ROW
        kind: QueueName = "pages" if pages_turn or not self._waiting["queries"] else "queries"
        self._query_batches = self._query_batches + 1 if kind == "queries" else 0
        return kind


def _drop_unwanted(queue: deque[Job]) -> None:
    for _ in range(len(queue)):
        job = queue.popleft()
        if job.future.over:
            job.leave()
        else:
            queue.append(job)
