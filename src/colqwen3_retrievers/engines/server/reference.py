"""A reference embedding to recognise a server's model: one token, computed with numpy from the checkpoint.

A single token attends to itself only, so in every layer its attention is its own value, whatever queries, keys and
rotary positions are; the rest of the trunk is a dozen products of a matrix and a vector. Comparing shows whether a
server's vectors are the checkpoint's own, lack the projection's bias, or are another model's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from colqwen3_retrievers.models.checkpoint import Checkpoint
from colqwen3_retrievers.vectors.multi_vector import Float32

_DTYPES = {"F32": ("<f4", 4), "F16": ("<f2", 2), "BF16": ("<u2", 2)}


@dataclass(frozen=True, slots=True)
class TokenReference:
    """A lone token's embedding, and what it would be with faults.

    Attributes:
        right: float32 (dim,), unit, as the family computes it.
        without_bias: the same without the projection's bias; None when there is none.
        other_norm: the same with the final norm where the family has none, and the other way round.
    """

    right: Float32
    without_bias: Float32 | None
    other_norm: Float32


def can_compute(checkpoint: Checkpoint) -> bool:
    """Return whether the weights are available, in dtypes that numpy reads, and of a known trunk."""
    text = checkpoint.config["text_config"]
    return (
        text.get("hidden_act", "silu") == "silu"
        and all(record.dtype in _DTYPES for record in checkpoint.tensors.values())
        and all(record.file.is_file() for record in checkpoint.tensors.values())
        and "language_model.embed_tokens.weight" in checkpoint.tensors
    )


def trunk_bytes(checkpoint: Checkpoint) -> int:
    """Return about the bytes that :func:`lone_token` reads: the layers of the text trunk."""
    return sum(
        record.end - record.start
        for name, record in checkpoint.tensors.items()
        if name.startswith("language_model.layers.")
    )


def lone_token(checkpoint: Checkpoint, token: int) -> TokenReference:
    """Return a lone token's embedding, computed with one matrix in memory at a time.

    Args:
        checkpoint: one of which :func:`can_compute` holds.
        token: its id.

    Returns:
        The right embedding, and the wrong ones of faults.

    Raises:
        KeyError: a layer lacks a tensor.
        ValueError: shapes do not fit.
        OSError: a file cannot be read.
    """
    text = checkpoint.config["text_config"]
    epsilon = float(text.get("rms_norm_eps", 1e-6))
    share = int(text["num_attention_heads"]) // int(text.get("num_key_value_heads") or text["num_attention_heads"])
    width = int(text.get("head_dim") or int(text["hidden_size"]) // int(text["num_attention_heads"]))

    def tensor(name: str) -> Float32:
        return _read(checkpoint, f"language_model.{name}")

    def times(name: str, vector: Float32) -> Float32:
        product = tensor(f"{name}.weight") @ vector
        has_bias = f"language_model.{name}.bias" in checkpoint.tensors
        return np.asarray(product + tensor(f"{name}.bias") if has_bias else product, dtype=np.float32)

    def norm(name: str, vector: Float32) -> Float32:
        scale = np.float32(np.sqrt(np.square(vector).mean() + epsilon))
        return np.asarray(vector / scale * tensor(f"{name}.weight"), dtype=np.float32)

    hidden = _read(checkpoint, "language_model.embed_tokens.weight", row=token)
    for number in range(int(text["num_hidden_layers"])):
        layer = f"layers.{number}"
        value = times(f"{layer}.self_attn.v_proj", norm(f"{layer}.input_layernorm", hidden))
        shared = np.repeat(value.reshape(-1, width), share, axis=0).reshape(-1)
        hidden = hidden + times(f"{layer}.self_attn.o_proj", shared)
        inner = norm(f"{layer}.post_attention_layernorm", hidden)
        gate = times(f"{layer}.mlp.gate_proj", inner)
        gate = gate / (1 + np.exp(-np.clip(gate, -80, 80)))
        hidden = hidden + times(f"{layer}.mlp.down_proj", gate * times(f"{layer}.mlp.up_proj", inner))
    normed = norm("norm", hidden)
    first, second = (normed, hidden) if checkpoint.family.final_norm else (hidden, normed)
    return TokenReference(
        right=_unit(_project(checkpoint, first, bias=True)),
        without_bias=_unit(_project(checkpoint, first, bias=False)) if checkpoint.has_bias else None,
        other_norm=_unit(_project(checkpoint, second, bias=True)),
    )


def _project(checkpoint: Checkpoint, hidden: Float32, *, bias: bool) -> Float32:
    if not checkpoint.has_projection:
        return hidden
    out = _read(checkpoint, "projection.weight") @ hidden
    return out + _read(checkpoint, "projection.bias") if bias and checkpoint.has_bias else out


def _unit(vector: Float32) -> Float32:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-30), dtype=np.float32)


def _read(checkpoint: Checkpoint, name: str, *, row: int | None = None) -> Float32:
    """Return one tensor, or one row of it, as float32."""
    record = checkpoint.tensors[name]
    code, size = _DTYPES[record.dtype]
    shape, start = record.shape, record.start
    if row is not None:
        start += row * shape[1] * size
        shape = shape[1:]
    count = int(np.prod(shape))
    with record.file.open("rb") as stream:
        stream.seek(start)
        raw = np.frombuffer(stream.read(count * size), dtype=code)
    if record.dtype == "BF16":  # the upper half of a float32
        values: NDArray[np.float32] = (raw.astype(np.uint32) << 16).view(np.float32)
    else:
        values = raw.astype(np.float32)
    return values.reshape(shape)
