"""Attention over sequences laid end to end, with as little padding and as few masks as possible.

Sequences of one length attend in one call. A trunk's short sequences of similar lengths are padded together, for
attention only: under a causal mask no token sees the padding, and a bidirectional trunk gets a mask of the true keys.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

PIECE_ROWS = 2048
"""Rows that go through layers together on a CPU: intermediate results fit its cache, and reuse memory of the heap."""

_PADDING_ALLOWED = 1.25  # area of a padded group's attention over what its members need
_SHORT = 96  # tokens below which a call costs more than any padding


class _Group(NamedTuple):
    """Adjacent sequences that attend in one call."""

    start: int  # first row
    members: int
    longest: int
    rows: Tensor | None  # (count, longest): which row stands where, an end repeating its last; None when all are equal
    kept: Tensor | None  # positions in the flattened rows that are no padding
    mask: Tensor | None  # (count, 1, 1, longest): keys that are no padding


class Packing:
    """The layout of sequences laid end to end, and which of them attend together.

    Args:
        lengths: of the sequences in order, at least one each; equal ones should be neighbours.
        device: where the rows are.
        pad: whether sequences of unequal length may be padded to attend together.
        causal: whether a row sees only rows before it and itself.

    Attributes:
        causal: as given.
        groups: which sequences attend in one call.
        longest: length of the longest sequence.
        offsets: int32 (n_sequences + 1,) on the device, where each begins and the last ends.
        pieces: slices of the rows, end to end; what concerns each row alone is best done piece by piece.

    >>> [(group.members, group.longest) for group in Packing([5, 5, 7, 300], "cpu", pad=True, causal=True).groups]
    [(3, 7), (1, 300)]
    """

    def __init__(
        self, lengths: Sequence[int], device: torch.device | str, *, pad: bool = False, causal: bool = False
    ) -> None:
        self.causal = causal
        self.longest = max(lengths)
        self.groups: list[_Group] = []
        starts = [0, *itertools.accumulate(lengths)]
        self.offsets = to_device(np.asarray(starts, dtype=np.int32), device)
        step = PIECE_ROWS if torch.device(device).type == "cpu" else starts[-1]
        self.pieces = [slice(start, min(start + step, starts[-1])) for start in range(0, starts[-1], step)]
        first = 0
        while first < len(lengths):
            last = _group_end(lengths, first, pad=pad)
            self.groups.append(_group(lengths[first:last], starts[first], device, masked=not causal))
            first = last


def to_device(array: NDArray[Any], device: torch.device | str) -> Tensor:
    """Copy an array to a device without waiting for its computations.

    torch's pinned allocator reuses a buffer only after the copy that reads it has finished.

    >>> to_device(np.arange(3), "cpu")
    tensor([0, 1, 2])
    """
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def attend(query: Tensor, key: Tensor, value: Tensor, packing: Packing, implementation: str) -> Tensor:
    """Return the attention of every sequence to itself.

    Args:
        query: (n_heads, n_rows, head_dim), sequences end to end; heads first, as a head's rows are read together.
        key: (n_key_heads, n_rows, head_dim); n_heads a multiple of n_key_heads.
        value: as the key.
        packing: layout of the sequences.
        implementation: ``"sdpa"``, ``"eager"`` (spelled out, to compare with) or ``"flash_attention_2"`` (its package
            and a GPU needed).

    Returns:
        (n_rows, n_heads x head_dim).

    >>> heads = torch.ones(2, 3, 4)
    >>> attend(heads, heads[:1], heads[:1] * 2, Packing([1, 2], "cpu"), "sdpa").shape
    torch.Size([3, 8])
    """
    if implementation == "flash_attention_2":
        return _flash(query, key, value, packing)
    call = _eager if implementation == "eager" else _sdpa
    parts = [_attend_group(query, key, value, group, packing.causal, call) for group in packing.groups]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor) -> Tensor:
    """Rotate the pairs (i, i + half) of each head by the angles of its row, in float32 whatever the dtype.

    Args:
        heads: (..., n_rows, head_dim), of any strides.
        cos: float32 (n_rows, head_dim / 2).
        sin: the same shape.
        out: where the result goes, of the shape and dtype of ``heads`` and apart from it.

    Returns:
        ``out``.

    Source: RoPE, Su et al. 2021 (arXiv 2104.09864), in the split-half form of GPT-NeoX.

    >>> rotate(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 1), torch.ones(1, 1), out=torch.empty(1, 2)).tolist()
    [[0.0, 1.0]]
    """
    wide = heads.float()
    turned = out if out.dtype == torch.float32 else torch.empty_like(wide)
    first, second = wide.chunk(2, dim=-1)
    left, right = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return out if turned is out else out.copy_(turned)


def _group_end(lengths: Sequence[int], first: int, *, pad: bool) -> int:
    """Return the end of the group that begins with sequence ``first``."""
    longest, needed, last = lengths[first], lengths[first] ** 2, first + 1
    while last < len(lengths):
        length = lengths[last]
        grown, more = max(longest, length), needed + length**2
        fits = grown <= _SHORT or grown**2 * (last + 1 - first) <= _PADDING_ALLOWED * more
        if length != longest and not (pad and fits):
            break
        if length == longest and longest**2 * (last - first) > needed and not (pad and fits):
            break
        longest, needed, last = grown, more, last + 1
    return last


def _group(lengths: Sequence[int], start: int, device: torch.device | str, *, masked: bool) -> _Group:
    count, longest = len(lengths), max(lengths)
    if min(lengths) == longest:
        return _Group(start, count, longest, None, None, None)
    ends = np.cumsum(lengths)
    column = np.arange(longest)
    true = column < np.asarray(lengths)[:, None]
    rows = np.minimum(start + (ends - lengths)[:, None] + column, start + ends[:, None] - 1)
    return _Group(
        start,
        count,
        longest,
        to_device(rows.astype(np.int64), device),
        to_device(np.flatnonzero(true), device),
        to_device(true, device)[:, None, None] if masked else None,
    )


def _attend_group(query: Tensor, key: Tensor, value: Tensor, group: _Group, causal: bool, call: Any) -> Tensor:
    heads: list[Tensor]
    if group.rows is None:
        taken = slice(group.start, group.start + group.members * group.longest)
        size = (group.members, group.longest, query.shape[-1])
        heads = [part[:, taken].view(len(part), *size) for part in (query, key, value)]
    else:
        heads = [part[:, group.rows] for part in (query, key, value)]
    attended: Tensor = call(*(part.transpose(0, 1) for part in heads), group.mask, causal)
    flat = attended.transpose(1, 2).reshape(group.members * group.longest, -1)
    return flat if group.kept is None else flat[group.kept]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1]
    )


def _eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    similar = (query @ key.transpose(2, 3)).float() * query.shape[-1] ** -0.5
    if causal:
        later = torch.ones(similar.shape[-2:], dtype=torch.bool, device=similar.device).triu(1)
        similar = similar.masked_fill(later, -torch.inf)
    if mask is not None:
        similar = similar.masked_fill(~mask, -torch.inf)
    weights: Tensor = similar.softmax(-1).to(value.dtype)
    return weights @ value


def _flash(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    flash: Any = importlib.import_module("flash_attn")
    rows = (part.transpose(0, 1) for part in (query, key, value))
    attended: Tensor = flash.flash_attn_varlen_func(
        *rows, packing.offsets, packing.offsets, packing.longest, packing.longest, causal=packing.causal
    )
    return attended.flatten(1)
