"""The candidate scan on a GPU: codes are copied there once and stay; each search sends a query and fetches scores.

With Triton (the ``gpu`` extra) one fused kernel scans them; without it, ``torch._int_mm`` and a maximum of blocks do.
"""

from __future__ import annotations

import importlib.util
import weakref

import numpy as np
import torch
from numpy.typing import NDArray

from colqwen3_retrievers.codes import BLOCK, Int8, QueryCodes
from colqwen3_retrievers.datatypes import Float32
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.kernels.torch import as_tensor

_TILE_ROWS = 1 << 17  # codes whose products with the query tokens are held at once, without Triton
_MOST_MAXIMA = 1 << 28  # maxima of pages held at once, 1 GB: more pages are scanned in turns


class DeviceScan:
    """A :class:`~colqwen3_retrievers.kernels.scan.CodeScan` that keeps codes on a device.

    Made by :func:`colqwen3_retrievers.kernels.device_scan`. Codes are copied when they are first scanned, and again
    when their file has grown; they are let go with the memory map they came from. Memory on the device is that of
    the codes and some hundred megabytes.

    Args:
        device: "cuda", "cuda:N", or "cpu", which serves to test it.
        fused: whether to use the Triton kernel; None means where Triton is installed and the device is CUDA.

    Raises:
        ConfigError: torch has no such device, or it is of another kind.
    """

    def __init__(self, device: str = "cuda", *, fused: bool | None = None) -> None:
        try:
            self.device = torch.device(device)
        except (RuntimeError, TypeError) as exc:
            raise ConfigError(f"device: torch knows no {device!r}") from exc
        if self.device.type not in ("cpu", "cuda"):
            raise ConfigError(f'device: expected "cuda" or "cpu", got {device!r}')
        if self.device.type == "cuda" and (self.device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device: {device!r} asked for, torch sees {torch.cuda.device_count()} CUDA devices")
        installed = importlib.util.find_spec("triton") is not None
        self.fused = (installed and self.device.type == "cuda") if fused is None else fused
        self._resident: dict[int, tuple[weakref.ref[Int8], torch.Tensor]] = {}

    def __call__(
        self, queries: QueryCodes, rows: Int8, starts: NDArray[np.int64], lengths: NDArray[np.int64], scales: Float32, /
    ) -> Float32:
        """Scan; see :class:`~colqwen3_retrievers.kernels.scan.CodeScan`."""
        codes = self._codes(rows)
        starts, lengths = (
            np.ascontiguousarray(starts),
            np.ascontiguousarray(lengths),
        )  # the fused kernel reads plain memory
        tokens = as_tensor(queries.rows).to(self.device)
        weights = as_tensor(queries.scales).to(self.device)
        counts = torch.from_numpy(np.diff(queries.offsets)).to(self.device)
        owners = torch.repeat_interleave(torch.arange(len(counts), device=self.device), counts)
        found = np.empty((len(counts), len(starts)), dtype=np.float32)
        turn = max(1, _MOST_MAXIMA // len(tokens))
        for first in range(0, len(starts), turn):
            last = min(first + turn, len(starts))
            at = torch.from_numpy(starts[first:last]).to(self.device)
            sizes = torch.from_numpy(lengths[first:last]).to(self.device)
            best = self._maxima(codes, at, sizes, tokens)
            sums = torch.zeros((len(at), len(counts)), dtype=torch.float32, device=self.device)
            sums.index_add_(1, owners, best.float() * weights)
            sums *= torch.from_numpy(scales[first:last]).to(self.device)[:, None]
            found[:, first:last] = sums.cpu().numpy().T
        return found

    def _maxima(
        self, codes: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Give int32 (n_pages, n_tokens), the largest product of each token with each page's code."""
        if self.fused:
            from colqwen3_retrievers.kernels.triton_scan import page_maxima  # needs Triton

            return page_maxima(codes, starts, lengths, tokens)
        if 2 * int(lengths.sum()) < len(codes):  # few of them are asked for: gather those
            ends = torch.cumsum(lengths, 0)
            inside = torch.arange(int(ends[-1]), device=self.device)
            codes = codes[inside + torch.repeat_interleave(starts - (ends - lengths), lengths)]
            starts = ends - lengths
        blocks = self._block_maxima(codes, tokens)
        sizes = lengths // BLOCK
        page = torch.repeat_interleave(torch.arange(len(starts), device=self.device), sizes)
        ends = torch.cumsum(sizes, 0)
        taken = torch.arange(len(page), device=self.device) + torch.repeat_interleave(
            starts // BLOCK - (ends - sizes), sizes
        )
        lowest = torch.iinfo(torch.int32).min
        best = torch.full((len(starts), len(tokens)), lowest, dtype=torch.int32, device=self.device)
        return best.scatter_reduce_(0, page[:, None].expand(-1, len(tokens)), blocks[taken], "amax")

    def _block_maxima(self, codes: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Give int32 (n_blocks, n_tokens), a tile of rows at a time."""
        missing = -len(tokens) % 8  # what CUDA's int8 products want; more than 16 rows is the other thing
        columns = torch.nn.functional.pad(tokens, (0, 0, 0, missing)).T.contiguous()
        blocks = []
        for first in range(0, len(codes), _TILE_ROWS):
            tile = codes[first : first + _TILE_ROWS]
            padded = torch.nn.functional.pad(tile, (0, 0, 0, max(0, 24 - len(tile))))
            products = torch._int_mm(padded, columns)[: len(tile), : len(tokens)]
            blocks.append(products.reshape(-1, BLOCK, len(tokens)).amax(1))
        return torch.cat(blocks)

    def _codes(self, rows: Int8) -> torch.Tensor:
        """Give the codes on the device; the array they come from is known by itself, not by its content."""
        kept = self._resident.get(id(rows))
        if kept is None or kept[0]() is not rows:
            key, resident = id(rows), self._resident
            reference = weakref.ref(rows, lambda _: resident.pop(key, None))
            kept = resident[key] = (reference, as_tensor(rows).to(self.device, copy=True))
        return kept[1]
