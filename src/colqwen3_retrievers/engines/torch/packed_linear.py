"""Linear layers in bfloat16 whose weights lie in memory as oneDNN reads them, for the CPU.

A plain layer's weights are brought into that order anew at every call, which takes as long as the product when there
are few rows, as in a query. The order is oneDNN's own and the products are the same; in the same pass it applies the
activation that follows, before the result is rounded to 16 bits instead of after. In float32 it is another library that
multiplies, and batches gain nothing.
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
        """Multiply (n_rows, in_features) to (n_rows, out_features)."""
        count = len(rows)
        more = rounded(count) - count
        return self._products(functional.pad(rows, (0, 0, 0, more)))[:count] if more else self._products(rows)

    def _products(self, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, *self._activation)  # type: ignore[no-any-return]  # torch leaves its operators untyped


def rounded(count: int) -> int:
    """Give the number of rows to compute for ``count`` of them: few numbers, for each costs milliseconds at first.

    oneDNN makes a program for every shape it meets and keeps a thousand of them. Queries alone are of few lengths, in
    batches of any.

    >>> [rounded(count) for count in (1, 21, 64, 65, 1024, 1025, 2048)]
    [1, 21, 64, 96, 1024, 1088, 2048]
    """
    step = 1 if count <= 64 else 32 if count <= 1024 else 64
    return -(-count // step) * step


def pack_linears(model: nn.Module) -> bool:
    """Put packed layers in place of a model's bfloat16 ones, and their activations into them, one after the other.

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
    """Say whether bfloat16 layers can be packed here: on x86 with the instructions for it.

    The operators are those that torch's own compiler uses; they are tried once, and what they give is compared.

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
"""The layers of Qwen3-VL whose module applies its ``act_fn`` to what they give."""


def _activation(module: Any) -> tuple[str, str] | None:
    """Give oneDNN's names of an activation, or None for one that it has not."""
    if isinstance(module, nn.GELU):
        return "gelu", module.approximate
    return {"SiLU": ("swish", ""), "SiLUActivation": ("swish", ""), "GELUTanh": ("gelu", "tanh")}.get(
        type(module).__name__
    )
