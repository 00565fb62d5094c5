"""What a device can do, measured: the ceilings that benchmarks set their figures against."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch


def wait(device: str) -> None:
    """Wait until the device has nothing left to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def fastest(work: Callable[[], object], device: str, seconds: float = 1.0) -> float:
    """Time of the fastest of several calls, after one that warms up."""
    work()
    wait(device)
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 50):
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


class Ceilings(NamedTuple):
    """What a device was seen to reach.

    Attributes:
        compute: operations a second of a matrix product.
        read: bytes a second of its memory, in a sum or, read and written, in a copy.
        upload: bytes a second from the machine's memory, pinned, to the device.
    """

    compute: float
    read: float
    upload: float


def ceilings(device: str, dtype: torch.dtype, *, quick: bool) -> Ceilings:
    """Measure them."""
    side, count = (512, 1 << 22) if quick else (8192, 1 << 30)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    compute = 2 * side**3 / fastest(lambda: left @ right, device)
    source, target = (torch.zeros(count, device=device, dtype=torch.uint8) for _ in range(2))
    copy = 2 * count / fastest(lambda: target.copy_(source), device)
    read = count / fastest(source.view(torch.float32).sum, device)
    host = torch.empty(min(count, 1 << 28), dtype=torch.uint8)
    host = host.pin_memory() if device.startswith("cuda") else host
    upload = len(host) / fastest(lambda: target[: len(host)].copy_(host, non_blocking=True), device)
    return Ceilings(compute, max(read, copy), upload)
