"""The engine's thread: what goes first, what is batched together, and that nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import pytest

from colqwen3_retrievers.encoding.batching import QUERY_BATCHES_IN_A_ROW, Job
from colqwen3_retrievers.encoding.futures import Lane, ListFuture
from colqwen3_retrievers.encoding.shared_engine import SharedEngine
from colqwen3_retrievers.errors import CheckpointError, EncodeError, EngineError, EngineResponseError
from colqwen3_retrievers.models.rendering import EncoderInput
from colqwen3_retrievers.vectors.multi_vector import Float32


class GatedEngine:
    """An engine that waits for a gate, and writes down what it was handed."""

    def __init__(self, batch_tokens: int = 30) -> None:
        self.batch_tokens = batch_tokens
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.batches: list[list[EncoderInput]] = []
        self.closed = False
        self.results_short = 0

    def embed(self, inputs: Sequence[EncoderInput]) -> list[Float32]:
        self.entered.set()
        assert self.gate.wait(30)
        self.batches.append(list(inputs))
        return [np.ones((len(item), 4), dtype=np.float32) for item in inputs][self.results_short :]

    def close(self) -> None:
        self.closed = True


def item(length: int = 10, *, query: bool = False) -> EncoderInput:
    return EncoderInput(query, "", np.zeros(length, dtype=np.int64), slice(0, length))


class Plain:
    """A model without a tail."""

    def finish(self, item: EncoderInput, rows: Float32) -> Float32:
        return rows


class Worker(SharedEngine):
    """A shared engine that takes rendered inputs, one future for each."""

    def encode(self, item: EncoderInput) -> Future[list[Float32]]:
        future: Any = ListFuture(self.queue.drop_unwanted)
        job = Job("text" if item.is_query else "page", 0, lambda _: item, future, future.add_item())
        job.opened, job.item = Plain(), item  # type: ignore[assignment]
        future.complete()
        self.submit_rendered(job)
        return future


def held(engine: GatedEngine) -> tuple[Worker, Future[list[Float32]]]:
    """A worker whose engine stands at the gate with one input, so that what follows queues up."""
    worker = Worker("key", lambda: engine)
    first = worker.encode(item())
    assert engine.entered.wait(30)
    return worker, first


def test_queries_go_before_pages_that_came_first() -> None:
    engine = GatedEngine()
    worker, _ = held(engine)
    pages = [worker.encode(item()) for _ in range(9)]
    queries = [worker.encode(item(query=True)) for _ in range(9)]
    engine.gate.set()
    wait([*pages, *queries], timeout=30)
    kinds = [batch[0].is_query for batch in engine.batches[1:]]
    assert kinds == [True] * 3 + [False] * 3
    worker.close()


def test_pages_have_a_turn_in_a_stream_of_queries() -> None:
    engine = GatedEngine(batch_tokens=10)
    worker, _ = held(engine)
    page = worker.encode(item())
    queries = [worker.encode(item(query=True)) for _ in range(3 * QUERY_BATCHES_IN_A_ROW)]
    engine.gate.set()
    wait([page, *queries], timeout=30)
    kinds = [batch[0].is_query for batch in engine.batches[1:]]
    assert kinds.index(False) == QUERY_BATCHES_IN_A_ROW
    worker.close()


def test_a_batch_is_the_oldest_and_what_is_most_like_it_within_the_budget() -> None:
    engine = GatedEngine(batch_tokens=100)
    worker, _ = held(engine)
    futures = [worker.encode(item(length)) for length in (40, 5, 39, 90, 12)]
    engine.gate.set()
    wait(futures, timeout=30)
    assert [[len(one) for one in batch] for batch in engine.batches[1:]] == [[40, 39, 12, 5], [90]]
    assert [len(future.result()[0]) for future in futures] == [40, 5, 39, 90, 12]
    assert (worker.stats.loads, worker.stats.batches, worker.stats.inputs) == (1, 3, 6)
    worker.close()


def test_an_input_above_the_budget_goes_alone() -> None:
    engine = GatedEngine(batch_tokens=10)
    engine.gate.set()
    worker = Worker("key", lambda: engine)
    assert len(worker.encode(item(99)).result(30)[0]) == 99
    worker.close()


def test_a_cancelled_input_is_never_handed_over() -> None:
    engine = GatedEngine(batch_tokens=10)
    worker, _ = held(engine)
    futures = [worker.encode(item()) for _ in range(3)]
    assert futures[1].cancel()
    engine.gate.set()
    assert wait([futures[0], futures[2]], timeout=30).not_done == set()
    assert sum(len(batch) for batch in engine.batches) == 3
    worker.close()


def test_closing_finishes_the_batch_under_way_and_fails_the_rest() -> None:
    engine = GatedEngine(batch_tokens=10)
    worker, first = held(engine)
    waiting = worker.encode(item())
    closer = threading.Thread(target=worker.close)
    closer.start()
    with pytest.raises(EngineError, match="closed before this input was encoded"):
        waiting.result(30)
    engine.gate.set()
    closer.join(30)
    assert len(first.result(30)[0]) == 10
    assert engine.closed
    with pytest.raises(EngineError, match="the encoder was closed"):
        worker.encode(item())


def test_too_few_results_are_an_error_and_the_thread_lives_on() -> None:
    engine = GatedEngine()
    engine.gate.set()
    engine.results_short = 1
    worker = Worker("key", lambda: engine)
    with pytest.raises(EngineError, match="the engine gave 0 results for 1 inputs"):
        worker.encode(item()).result(30)
    engine.results_short = 0
    assert len(worker.encode(item()).result(30)[0]) == 10
    worker.close()


def test_each_caller_gets_an_error_of_his_own() -> None:
    def load() -> GatedEngine:
        assert ready.wait(30)
        raise CheckpointError("torn", missing=["a"])

    ready = threading.Event()
    worker = Worker("key", load)
    futures = [worker.encode(item()) for _ in range(3)]
    ready.set()
    errors = [future.exception(30) for future in futures]
    assert len({id(error) for error in errors}) == 3
    assert all(isinstance(error, CheckpointError) and error.missing == ("a",) for error in errors)
    worker.close()


def test_a_callback_that_exits_does_not_take_the_thread_along(caplog: pytest.LogCaptureFixture) -> None:
    engine = GatedEngine()
    worker, first = held(engine)

    def leave(_: Future[list[Float32]]) -> None:
        raise SystemExit(3)

    first.add_done_callback(leave)
    waiting = worker.encode(item())
    engine.gate.set()
    assert len(waiting.result(30)[0]) == 10
    assert "a callback failed" in caplog.text
    worker.close()


def test_a_list_fails_with_the_first_failure_and_drops_the_rest() -> None:
    dropped: list[str] = []
    future: ListFuture[int] = ListFuture(lambda: dropped.append("once"))
    positions = [future.add_item() for _ in range(3)]
    future.complete()
    future.set_item(positions[0], 1)
    future.fail(EngineError("no"))
    future.fail(EngineError("again"))
    future.set_item(positions[1], 2)
    with pytest.raises(EngineError, match="no"):
        future.result(0)
    assert future.over
    assert dropped == ["once"]


def test_cancelling_a_list_tells_everybody() -> None:
    dropped: list[str] = []
    future: ListFuture[int] = ListFuture(lambda: dropped.append("once"))
    position = future.add_item()
    assert future.cancel()
    assert future.cancel()
    assert wait([future], timeout=5).done == {future}
    assert dropped == ["once"]
    future.set_item(position, 3)  # what was under way may still end, and nobody minds
    future.complete()
    assert future.cancelled()


def test_a_list_is_whole_once_it_is_complete() -> None:
    future: ListFuture[int] = ListFuture()
    future.set_item(future.add_item(), 1)
    future.set_item(future.add_item(), 2)
    assert not future.done(), "more may be added"
    future.complete()
    assert future.result(0) == [1, 2]
    assert not future.cancel()


def test_a_lane_survives_a_job_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    lane = Lane(1, "test")
    done = threading.Event()
    lane.submit(lambda: 1 / 0)
    lane.submit(done.set)
    assert done.wait(30)
    assert "a callback failed in thread test" in caplog.text


class PickyEngine(GatedEngine):
    """An engine that fails a whole batch for one of its inputs."""

    def __init__(self, error: EngineError | EncodeError) -> None:
        super().__init__(batch_tokens=1000)
        self.error = error

    def embed(self, inputs: Sequence[EncoderInput]) -> list[Float32]:
        rows = super().embed(inputs)
        if any(len(one) == 13 for one in inputs):
            raise self.error
        return rows


@pytest.mark.parametrize(
    "error",
    [
        EncodeError("too long"), EngineError("out of memory with a single input"),
        EngineResponseError("NaN"), EngineResponseError("no", status_code=400),
    ],
)  # fmt: skip
def test_one_bad_input_fails_alone(error: EngineError | EncodeError) -> None:
    engine = PickyEngine(error)
    worker, _ = held(engine)
    futures = [worker.encode(item(length)) for length in (10, 11, 12, 13, 14, 15, 16)]
    engine.gate.set()
    assert wait(futures, timeout=30).not_done == set()
    failed = [future.exception() for future in futures]
    assert [type(one) for one in failed if one is not None] == [type(error)]
    assert failed[3] is not None
    assert getattr(failed[3], "index", 0) == 0, "an error of the input names its place in the call"
    assert [len(future.result()[0]) for future in futures[:3] + futures[4:]] == [10, 11, 12, 14, 15, 16]
    worker.close()


@pytest.mark.parametrize(
    "error", [EngineError("nobody is there", retryable=True), EngineResponseError("who are you?", status_code=401)]
)
def test_what_is_no_inputs_fault_is_not_tried_again(error: EngineError) -> None:
    engine = PickyEngine(error)
    worker, _ = held(engine)
    futures = [worker.encode(item(length)) for length in (12, 13, 14)]
    engine.gate.set()
    assert [type(future.exception(30)) for future in futures] == [type(error)] * 3
    assert len(engine.batches) == 2
    worker.close()
