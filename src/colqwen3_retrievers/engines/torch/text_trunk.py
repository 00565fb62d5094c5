"""The forward pass of Qwen3-VL's text trunk, over prompts of any lengths laid end to end.

Modules, parameters and results are those of transformers, but no padding is computed, a causal trunk has no mask, and
no cache is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from colqwen3_retrievers.engines.torch.attention import Packing, attend, rotate


def run_trunk(
    trunk: Any,
    hidden: Tensor,
    positions: Tensor,
    packing: Packing,
    *,
    implementation: str,
    visual_rows: Tensor | None = None,
    stacked: list[Tensor] | None = None,
) -> Tensor:
    """Return the hidden states of a text trunk for embedded tokens.

    Args:
        trunk: transformers' ``Qwen3VLTextModel``, whose parameters are used and whose ``forward`` is not.
        hidden: (n_tokens, hidden_size), prompts end to end, visual tokens in place. It is overwritten.
        positions: int64 (3, n_tokens): time, row, column.
        packing: layout of the prompts, and whether the trunk is causal.
        implementation: of attention; see :func:`~colqwen3_retrievers.engines.torch.attention.attend`.
        visual_rows: int64 (n_visual_tokens,), where the visual tokens lie.
        stacked: what the first layers add to the visual tokens, (n_visual_tokens, hidden_size) each.

    Returns:
        (n_tokens, hidden_size), after the final norm (which a family may have taken out).
    """
    cos, sin = rotary_tables(trunk.rotary_emb, positions)
    for number, layer in enumerate(trunk.layers):
        seen = _attention(layer.self_attn, layer.input_layernorm, hidden, cos, sin, packing, implementation)
        for piece in packing.pieces:
            rows = hidden[piece]
            rows += layer.self_attn.o_proj(seen[piece])
            rows += _mlp(layer.mlp, _normalised(layer.post_attention_layernorm, rows))
        if stacked and number < len(stacked) and visual_rows is not None:
            hidden.index_add_(0, visual_rows, stacked[number])
    return trunk.norm(hidden)  # type: ignore[no-any-return]


def rotary_tables(rotary: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of every token's angles.

    Args:
        rotary: transformers' ``Qwen3VLTextRotaryEmbedding``, which knows the kind of scaling.
        positions: int64 (3, n_tokens).

    Returns:
        Two float32 (n_tokens, head_dim / 2).
    """
    like = torch.empty(0, dtype=torch.float32, device=positions.device)
    cos, sin = rotary(like, positions[:, None])
    half = cos.shape[-1] // 2  # the second half repeats the first
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def _attention(
    attention: Any, norm: Any, hidden: Tensor, cos: Tensor, sin: Tensor, packing: Packing, implementation: str
) -> Tensor:
    keys = attention.k_proj.out_features // attention.head_dim
    count = attention.q_proj.out_features // attention.head_dim
    query = hidden.new_empty(count, len(hidden), attention.head_dim)
    key, value = (hidden.new_empty(keys, len(hidden), attention.head_dim) for _ in range(2))
    for piece in packing.pieces:
        rows = _normalised(norm, hidden[piece])
        size = (len(rows), -1, attention.head_dim)
        queries = _normalised(attention.q_norm, attention.q_proj(rows).view(size))
        rotate(queries.transpose(0, 1), cos[piece], sin[piece], out=query[:, piece])
        new_keys = _normalised(attention.k_norm, attention.k_proj(rows).view(size))
        rotate(new_keys.transpose(0, 1), cos[piece], sin[piece], out=key[:, piece])
        value[:, piece] = attention.v_proj(rows).view(size).transpose(0, 1)
    return attend(query, key, value, packing, implementation)


def _mlp(mlp: Any, hidden: Tensor) -> Tensor:
    gate = mlp.act_fn(mlp.gate_proj(hidden))
    return mlp.down_proj(gate.mul_(mlp.up_proj(hidden)))  # type: ignore[no-any-return]


def _normalised(norm: Any, rows: Tensor) -> Tensor:
    """Divide rows by their root mean square, in float32 inside whatever the dtype."""
    if rows.device.type != "cpu":
        return functional.rms_norm(rows, (rows.shape[-1],), norm.weight, norm.variance_epsilon)
    wide = rows.float()  # torch has no fused kernel for this on a CPU, and reads the rows five times
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    scale = scale.div_(rows.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    scaled = wide * scale if wide is rows else wide.mul_(scale)
    return scaled.mul_(norm.weight).to(rows.dtype)
