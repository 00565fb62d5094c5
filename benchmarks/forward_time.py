"""Where the time of a forward pass goes, as the device tells it."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from colqwen3_retrievers.engines.torch import model, vision_tower
from colqwen3_retrievers.engines.torch.engine import TorchEngine
from colqwen3_retrievers.models.rendering import EncoderInput

UPLOAD, VISION, TEXT, PROJECTION, HOST, REST = PARTS = (
    "upload and patches", "vision", "text", "projection", "copy to the host", "rest",
)  # fmt: skip
"""Parts of a forward pass: the upload of all inputs and the cutting of pixels into patches; the vision tower; the
trunk; the projection; the copy of what was found, with the wait for it; prompts' embeddings, positions, bookkeeping."""


class Clock:
    """Gives the time between two marks to the part that was under way.

    On CUDA a mark is an event in the stream of the work: nothing waits for it, so the device is as busy as without.

    Args:
        device: "cuda:N" or another, whose work is over when a call returns.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._under_way = [REST]
        self._marks: list[tuple[str, Any]] = []
        self._mark()

    def _mark(self) -> None:
        moment: Any = time.perf_counter()
        if self._device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record(torch.cuda.current_stream(self._device))
        self._marks.append((self._under_way[-1], moment))

    def goes_on_with(self, part: str) -> None:
        """Give to ``part`` what is spent outside any function that is watched."""
        self._under_way[0] = part
        self._mark()

    def around(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Give a function whose time is ``part``'s, but for that of other watched functions inside."""

        @functools.wraps(call)
        def watched(*given: Any, **named: Any) -> Any:
            self._under_way.append(part)
            self._mark()
            try:
                return call(*given, **named)
            finally:
                self._under_way.pop()
                self._mark()

        return watched

    def seconds(self) -> dict[str, float]:
        """Give the time of each part up to now."""
        self._mark()
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self._device)
        spent = dict.fromkeys(PARTS, 0.0)
        for (part, start), (_, stop) in zip(self._marks, self._marks[1:], strict=False):
            spent[part] += start.elapsed_time(stop) / 1000 if cuda else stop - start
        return spent


@contextlib.contextmanager
def watched(engine: TorchEngine, clock: Clock) -> Iterator[None]:
    """Let a clock watch an engine's forward pass."""
    network = engine._model
    assert network is not None, "the engine is open"
    forward = network.forward

    def run(*given: Any, **named: Any) -> torch.Tensor:
        clock.goes_on_with(REST)
        found = forward(*given, **named)
        clock.goes_on_with(HOST)
        return found

    seams: list[tuple[Any, str, str]] = [
        (model, "to_device", UPLOAD), (vision_tower, "patches", UPLOAD), (vision_tower.VisionTower, "__call__", VISION),
        (model, "run_trunk", TEXT),
    ]  # fmt: skip
    if network.projection is not None:
        seams.append((network.projection, "forward", PROJECTION))
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(network, "forward", run))
        for owner, name, part in seams:
            stack.enter_context(mock.patch.object(owner, name, clock.around(part, getattr(owner, name))))
        yield


def split(engine: TorchEngine, inputs: Sequence[EncoderInput], device: str, runs: int) -> dict[str, float]:
    """Give the seconds of each part of encoding some inputs, medians of several runs after one that warms up."""
    engine.embed(inputs)
    found = []
    for _ in range(runs):
        clock = Clock(device)
        with watched(engine, clock):
            engine.embed(inputs)
        found.append(clock.seconds())
    return {part: statistics.median(spent[part] for spent in found) for part in PARTS}
