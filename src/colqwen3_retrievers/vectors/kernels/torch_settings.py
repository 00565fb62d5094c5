"""Process-wide settings of torch, held while they are needed and then restored.

Other models in this process may need other values, so nothing is set permanently.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch


class HeldSetting:
    """A setting held while at least one thread is inside the ``with`` block.

    Args:
        hold: sets it, and returns the function that restores it.

    >>> with exact_matmul:
    ...     torch.get_float32_matmul_precision()
    'highest'
    """

    def __init__(self, hold: Callable[[], Callable[[], None]]) -> None:
        self._hold = hold
        self._lock = threading.Lock()
        self._inside = 0
        self._restore: Callable[[], None] = _nothing

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._restore = self._hold()
            self._inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._restore()


def _nothing() -> None:
    """Restore nothing."""


def _forbid_reduced_precision() -> Callable[[], None]:
    """Set IEEE float32 products, and return the function that restores the setting.

    torch has two interfaces to this setting, and the older one refuses values set by the newer one: each value is
    restored through the interface that set it.
    """
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the newer interface
        precision = "highest"
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
        return lambda: torch.set_float32_matmul_precision(precision)
    settings = [(backend, backend.fp32_precision) for backend in _newer_interface()]
    changed = [(backend, value) for backend, value in settings if value not in ("ieee", "none")]
    for backend, _ in changed:
        backend.fp32_precision = "ieee"

    def restore() -> None:
        for backend, value in changed:
            backend.fp32_precision = value

    return restore


def _newer_interface() -> Iterator[Any]:
    for module in (torch.backends.cuda, torch.backends.mkldnn):
        with contextlib.suppress(AttributeError):  # torch 2.8 has the older interface only
            matmul: Any = module.matmul
            _ = matmul.fp32_precision
            yield matmul


def _forbid_cudnn_attention() -> Callable[[], None]:
    if not torch.backends.cuda.cudnn_sdp_enabled():  # type: ignore[no-untyped-call]  # torch's
        return _nothing
    torch.backends.cuda.enable_cudnn_sdp(False)
    return lambda: torch.backends.cuda.enable_cudnn_sdp(True)


exact_matmul = HeldSetting(_forbid_reduced_precision)
"""Float32 matrix products are IEEE float32 inside, not TF32 or bfloat16."""

no_cudnn_attention = HeldSetting(_forbid_cudnn_attention)
"""Attention does not use cuDNN inside: it builds a plan for every new size and stride, which pages of mixed sizes in
batches of mixed lengths always have, and a plan takes longer than the batch."""
