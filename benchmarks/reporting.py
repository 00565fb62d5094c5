"""What the benchmarks have in common: the machine in words, times in turn, Markdown."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def machine(*packages: str) -> str:
    """Name the processor, the threads, and the versions of Python, torch and more packages."""
    import torch

    flags = _cpu_field("flags").split()
    features = [name for flag, name in (("avx512f", "AVX-512"), ("amx_tile", "AMX")) if flag in flags]
    cpu = " with ".join(
        [_cpu_field("model name") or platform.machine(), *([" and ".join(features)] if features else [])]
    )
    threads = torch.get_num_threads()
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} not installed")
    return f"{cpu}, {threads} thread{'s' if threads > 1 else ''}; {', '.join(versions)}"


def _cpu_field(name: str) -> str:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return ""
    lines = (line.partition(":") for line in path.read_text(encoding="utf-8").splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")


def stopwatch(way: Callable[[], object]) -> float:
    """Time a call, in seconds."""
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def in_turn(
    ways: Mapping[Any, Callable[[], Any]], rounds: int, *, clock: Callable[[Callable[[], Any]], float] = stopwatch
) -> dict[Any, list[float]]:
    """Time ways of doing the same, one after the other in every round, in seconds.

    A first round, not counted, warms up. On a machine that others use too, what one way suffers in a round the others
    suffer as well: ratios within rounds mean more than times. A way that times itself goes with a ``clock`` that asks
    it.
    """
    times: dict[Any, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            seconds = clock(way)
            if turn:
                times[name].append(seconds)
    return times


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How many times faster ours is: the median of the ratios within rounds."""
    return statistics.median(their / our for our, their in zip(ours, theirs, strict=True))


def spread(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Give the smallest and the largest of the ratios within rounds.

    >>> spread([1.0, 2.0], [1.5, 2.5])
    '1.25 to 1.50'
    """
    ratios = sorted(their / our for our, their in zip(ours, theirs, strict=True))
    return f"{ratios[0]:.2f} to {ratios[-1]:.2f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay rows out as a Markdown table.

    >>> print(table(["a", "b"], [[1, 2]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [columns, ["---"] * len(columns), *rows]
    laid = [f"| {' | '.join(map(str, line))} |" for line in lines]
    laid[1] = laid[1].replace(" ", "")
    return "\n".join(laid)


def publish(script: str, text: str, *, write: bool) -> None:
    """Print a report, and put it beside its script when asked."""
    print(text)
    if write:
        Path(script).with_suffix(".md").write_text(text.rstrip() + "\n", encoding="utf-8")
