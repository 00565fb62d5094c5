"""Linear layers in bfloat16 with weights in oneDNN's memory order, for the CPU.

A plain layer's weights are reordered at every call, which takes as long as the product when there are few rows, as in a
query. The products are the same; the activation that follows is applied in the same pass, before the result is rounded
to 16 bits. In float32 another library multiplies, and batches gain nothing.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class PackedLinear(nn.Module):
    """A linear layer with packed weights, and the activation after it.

    Args:
        linear: in bfloat16 on a CPU for which :func:`can_pack` is true. Its weights are copied.
        activation: ``"none"``, ``"swish"`` or ``"gelu"``.
        algorithm: of the GELU, ``"none"`` or ``"tanh"``; else empty.

    Attributes:
        in_features: numbers in a row that goes in.
        out_features: numbers in a row that comes out.

    >>> layer, rows = nn.Linear(3, 2, dtype=torch.bfloat16), torch.ones(4, 3, dtype=torch.bfloat16)
    >>> not can_pack() or torch.allclose(PackedLinear(layer, "swish")(rows), functional.silu(layer(rows)), atol=0.05)
    True
    """

    def __init__(self, linear: nn.Linear, activation: str = "none", algorithm: str = "") -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._activation: tuple[str, list[float], str] = (activation, [], algorithm)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the product of (n_rows, in_features), as (n_rows, out_features)."""
        count = len(rows)
        more = rounded(count) - count
        return self._products(functional.pad(rows, (0, 0, 0, more)))[:count] if more else self._products(rows)

    def _products(self, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, *self._activation)  # type: ignore[no-any-return]  # torch leaves its operators untyped


def rounded(count: int) -> int:
    """Return the number of rows to compute for ``count``: few different ones, since a new shape takes milliseconds.

    oneDNN compiles a program for every shape and keeps a thousand of them. Single queries have few lengths, batches
    any.

    >>> [rounded(count) for count in (1, 21, 64, 65, 1024, 1025, 2048)]
    [1, 21, 64, 96, 1024, 1088, 2048]
    """
    step = 1 if count <= 64 else 32 if count <= 1024 else 64
    return -(-count // step) * step


def pack_linears(model: nn.Module) -> bool:
    """Replace a model's bfloat16 linear layers by packed ones that include their activations.

    Args:
        model: on the CPU, for inference. Where :func:`can_pack` is false it stays as it is.

    Returns:
        Whether there is a packed layer in it now.

    >>> model = nn.Sequential(nn.Linear(2, 2, dtype=torch.bfloat16), nn.Linear(2, 2))
    >>> pack_linears(model) == can_pack() == isinstance(model[0], PackedLinear), type(model[1])
    (True, <class 'torch.nn.modules.linear.Linear'>)
    """
    if not can_pack():
        return False
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and layer.weight.dtype == torch.bfloat16:
                activation = _activation(getattr(module, "act_fn", None)) if name in _BEFORE_ACTIVATION else None
                setattr(module, name, PackedLinear(layer, *(activation or ())))
                if activation:
                    module.act_fn = nn.Identity()
    return any(isinstance(layer, PackedLinear) for layer in model.modules())


@functools.cache
def can_pack() -> bool:
    """Return whether bfloat16 layers can be packed: on x86 with the instructions for it.

    The operators are those of torch's compiler; they are tried once, and their result is compared.

    >>> can_pack() in (True, False)
    True
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    numbers = torch.linspace(-1, 1, 48, dtype=torch.bfloat16)
    plain = nn.Linear(16, 3, device="meta")
    plain.weight = nn.Parameter(numbers.view(3, 16), requires_grad=False)
    plain.bias = nn.Parameter(numbers[:3].clone(), requires_grad=False)
    rows = numbers[:32].view(2, 16)
    try:
        packed = PackedLinear(plain, "gelu", "tanh")(rows)
    except (RuntimeError, AttributeError, TypeError):  # another torch, or a processor without bfloat16
        return False
    return torch.allclose(packed, functional.gelu(plain(rows), approximate="tanh"), atol=0.02, rtol=0.02)


_BEFORE_ACTIVATION = ("gate_proj", "linear_fc1")
"""Layers of Qwen3-VL whose module applies its ``act_fn`` to their result."""


def _activation(module: Any) -> tuple[str, str] | None:
    """Return oneDNN's names of an activation, or None if it has none."""
    if isinstance(module, nn.GELU):
        return "gelu", module.approximate
    return {"SiLU": ("swish", ""), "SiLUActivation": ("swish", ""), "GELUTanh": ("gelu", "tanh")}.get(
        type(module).__name__
    )
