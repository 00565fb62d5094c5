"""Process-wide settings of torch, held while they are needed and then restored.

Other models in this process may need other values, so nothing is set permanently.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from colqwen3_retrievers.fork import HeldSetting, Hook


def _forbid_reduced_precision() -> tuple[Hook, Hook]:
    """Return functions that set IEEE float32 products and restore the setting.

    torch has two interfaces to this setting, and the older one refuses values set by the newer one: each value is
    restored through the interface that set it.
    """
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the newer interface
        precision = "highest"
    if precision != "highest":
        return (
            lambda: torch.set_float32_matmul_precision("highest"),
            lambda: torch.set_float32_matmul_precision(precision),
        )
    settings = [(backend, backend.fp32_precision) for backend in _newer_interface()]
    changed = [(backend, value) for backend, value in settings if value not in ("ieee", "none")]

    def hold() -> None:
        for backend, _ in changed:
            backend.fp32_precision = "ieee"

    def restore() -> None:
        for backend, value in changed:
            backend.fp32_precision = value

    return hold, restore


def _newer_interface() -> Iterator[Any]:
    for module in (torch.backends.cuda, torch.backends.mkldnn):
        with contextlib.suppress(AttributeError):  # torch 2.8 has the older interface only
            matmul: Any = module.matmul
            _ = matmul.fp32_precision
            yield matmul


def _forbid_cudnn_attention() -> tuple[Hook, Hook]:
    enabled: bool = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]  # torch's
    return lambda: torch.backends.cuda.enable_cudnn_sdp(False), lambda: torch.backends.cuda.enable_cudnn_sdp(enabled)


exact_matmul = HeldSetting(_forbid_reduced_precision)
"""Float32 matrix products are IEEE float32 inside, not TF32 or bfloat16.

>>> with exact_matmul:
...     torch.get_float32_matmul_precision()
'highest'
"""

no_cudnn_attention = HeldSetting(_forbid_cudnn_attention)
"""Attention does not use cuDNN inside: it builds a plan for every new size and stride, which pages of mixed sizes in
batches of mixed lengths always have, and a plan takes longer than the batch."""
