"""The forward pass of Qwen3-VL's vision tower, over images of any sizes laid end to end.

Modules, parameters and results are those of transformers, but patches go through a matrix product instead of a
three-dimensional convolution, images of one size attend together, tables of a grid are computed once, and nothing waits
for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from colqwen3_retrievers.engines.torch.attention import Packing, attend, rotate
from colqwen3_retrievers.models.families import VISUAL_TOKEN_SIDE

MERGE = 2
PATCH = VISUAL_TOKEN_SIDE // MERGE
FRAMES_A_PATCH = 2
_KEPT_GRIDS = 16  # whose tables are kept: those of a large page take 24 MB in float32


def patches(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the patches of frames that the vision tower reads, normalised to -1..1.

    Args:
        pixels: uint8 (frames, height, width, 3), sides multiples of 32; a single frame fills both halves of a patch.
        dtype: of the result; the numbers are made in float32.

    Returns:
        (frames/2 x height/16 x width/16, 3 x 2 x 16 x 16), 2 x 2 patches of one visual token side by side.
    """
    values = pixels.float().div_(255.0).sub_(0.5).div_(0.5).to(dtype)  # before a lone frame is doubled
    if values.shape[0] == 1:
        values = values.expand(FRAMES_A_PATCH, -1, -1, -1)
    frames, height, width, _ = values.shape
    cut = values.reshape(
        frames // FRAMES_A_PATCH, FRAMES_A_PATCH,
        height // VISUAL_TOKEN_SIDE, MERGE, PATCH,
        width // VISUAL_TOKEN_SIDE, MERGE, PATCH, 3,
    ).permute(0, 2, 5, 3, 6, 8, 1, 4, 7)  # fmt: skip
    return cut.reshape(-1, 3 * FRAMES_A_PATCH * PATCH * PATCH)


class Grid(NamedTuple):
    """Size of one image or video in patches.

    Attributes:
        steps: of time, 1 for an image.
        rows: of patches, even.
        cols: of patches, even.
    """

    steps: int
    rows: int
    cols: int

    @property
    def patches(self) -> int:
        """Patches of one time step."""
        return self.rows * self.cols

    @classmethod
    def of(cls, pixels: Tensor) -> Grid:
        """Return the grid of uint8 (frames, height, width, 3).

        >>> Grid.of(torch.empty(1, 64, 96, 3))
        Grid(steps=1, rows=4, cols=6)
        """
        frames, height, width, _ = pixels.shape
        return cls(max(1, frames // FRAMES_A_PATCH), height // PATCH, width // PATCH)


class _Tables(NamedTuple):
    """Tables that depend on a grid only.

    Attributes:
        positions: (rows x cols, hidden), of the tower's dtype, added to the patches.
        cos: float32 (rows x cols, head_dim / 2), of rotary angles.
        sin: the same.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor


class VisionTower:
    """Runs a Qwen3-VL vision tower.

    Not thread-safe: it keeps tables of the grids it has seen.

    Args:
        tower: transformers' ``Qwen3VLVisionModel``, whose parameters are used and whose ``forward`` is not.
        implementation: of attention; see :func:`~colqwen3_retrievers.engines.torch.attention.attend`.
    """

    def __init__(self, tower: Any, implementation: str) -> None:
        self._tower = tower
        self._implementation = implementation
        self._tables = functools.lru_cache(_KEPT_GRIDS)(functools.partial(_make_tables, tower))

    def __call__(self, shown: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Encode images and videos.

        Args:
            shown: uint8 (frames, height, width, 3) each, on the tower's device; those of one size side by side attend
                together.

        Returns:
            Visual tokens end to end, (n_tokens, hidden size of the trunk), and for each of the trunk's first layers
            what is added to them there (DeepStack, Meng et al. 2024, arXiv 2406.04334).
        """
        tower = self._tower
        grids = [Grid.of(pixels) for pixels in shown]
        tables = [self._tables(grid.rows, grid.cols) for grid in grids]
        hidden = torch.cat(
            [self._embed(pixels, grid, table) for pixels, grid, table in zip(shown, grids, tables, strict=True)]
        )
        cos = torch.cat([table.cos for grid, table in zip(grids, tables, strict=True) for _ in range(grid.steps)])
        sin = torch.cat([table.sin for grid, table in zip(grids, tables, strict=True) for _ in range(grid.steps)])
        packing = Packing([grid.patches for grid in grids for _ in range(grid.steps)], hidden.device)
        stacked: list[Tensor] = []
        for number, block in enumerate(tower.blocks):
            self._block(block, hidden, cos, sin, packing)
            if number in tower.deepstack_visual_indexes:
                merger = tower.deepstack_merger_list[len(stacked)]
                stacked.append(_merge(merger, hidden))
        return _merge(tower.merger, hidden), stacked

    def _embed(self, pixels: Tensor, grid: Grid, table: _Tables) -> Tensor:
        """Project the patches of one image or video and add their positions."""
        projection = self._tower.patch_embed.proj
        rows = patches(pixels, projection.weight.dtype)
        embedded = functional.linear(rows, projection.weight.flatten(1), projection.bias)
        embedded.view(grid.steps, grid.patches, -1).add_(table.positions)
        return embedded

    def _block(self, block: Any, hidden: Tensor, cos: Tensor, sin: Tensor, packing: Packing) -> None:
        """Run one layer, in place."""
        attention = block.attn
        heads = hidden.new_empty(3, attention.num_heads, len(hidden), hidden.shape[-1] // attention.num_heads)
        for piece in packing.pieces:
            mixed = attention.qkv(block.norm1(hidden[piece])).view(-1, *heads.shape[:2], heads.shape[-1])
            mixed = mixed.permute(1, 2, 0, 3)
            rotate(mixed[:2], cos[piece], sin[piece], out=heads[:2, :, piece])
            heads[2, :, piece] = mixed[2]
        seen = attend(heads[0], heads[1], heads[2], packing, self._implementation)
        for piece in packing.pieces:
            rows = hidden[piece]
            rows += attention.proj(seen[piece])
            rows += block.mlp.linear_fc2(block.mlp.act_fn(block.mlp.linear_fc1(block.norm2(rows))))


def _make_tables(tower: Any, n_rows: int, n_cols: int) -> _Tables:
    """Return the learned positions, resampled bilinearly to a grid with aligned corners, and rotary angles."""
    weight = tower.pos_embed.weight
    side = tower.num_grid_per_side
    square = weight.float().view(side, side, -1)
    left, right, share = _taps(n_cols, side, weight.device)
    wide = torch.lerp(square[:, left], square[:, right], share[:, None])
    above, below, share = _taps(n_rows, side, weight.device)
    sampled = torch.lerp(wide[above], wide[below], share[:, None, None])
    frequencies = tower.rotary_pos_emb.inv_freq.float()
    rows = torch.arange(n_rows, device=weight.device)[:, None] * frequencies
    cols = torch.arange(n_cols, device=weight.device)[:, None] * frequencies
    both = [rows[:, None].expand(-1, n_cols, -1), cols[None].expand(n_rows, -1, -1)]
    angles = _in_merge_order(torch.cat(both, dim=-1))
    return _Tables(_in_merge_order(sampled).to(weight.dtype), angles.cos(), angles.sin())


def _taps(count: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``count`` even points on a line of ``side``: both neighbours, and the share of the second."""
    places = torch.arange(count, device=device, dtype=torch.float32) * (side - 1) / max(1, count - 1)
    before = places.floor().long().clamp_(max=side - 1)
    return before, (before + 1).clamp_(max=side - 1), places - before


def _in_merge_order(table: Tensor) -> Tensor:
    """Return (rows, cols, n) as (rows x cols, n), the 2 x 2 patches of one visual token side by side."""
    rows, cols, _ = table.shape
    blocks = table.view(rows // MERGE, MERGE, cols // MERGE, MERGE, -1)
    return blocks.transpose(1, 2).reshape(rows * cols, -1)


def _merge(merger: Any, hidden: Tensor) -> Tensor:
    """Merge patches into visual tokens, four to one."""
    norm: nn.LayerNorm = merger.norm
    if merger.use_postshuffle_norm:
        four = norm(hidden.view(-1, merger.hidden_size))
    else:
        four = norm(hidden).view(-1, merger.hidden_size)
    return merger.linear_fc2(merger.act_fn(merger.linear_fc1(four)))  # type: ignore[no-any-return]
