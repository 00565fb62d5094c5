"""The candidate scan on a GPU: codes are copied there once; each search sends a query and fetches scores.

With Triton (the ``gpu`` extra) one fused kernel scans int8 codes in place. Without it, and for rows too wide for it,
``torch._int_mm`` and a maximum of blocks are used, some pages at a time. Codes of single bits are stored packed on the
device, and unpacked there, some pages at a time.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
import weakref
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from colqwen3_retrievers.vectors.codes import BLOCK, Int8, QueryCodes, unpacked_code
from colqwen3_retrievers.vectors.kernels.scan import SPARE, CodeScan, turns
from colqwen3_retrievers.vectors.kernels.torch_maxsim import as_tensor, cpu_or_cuda
from colqwen3_retrievers.vectors.multi_vector import Float32

MOST_BYTES: Final = 1 << 29
"""Bytes used on the device besides the codes, unless a single page takes more: pages are scanned in turns."""

_MOST_TOKENS = 256  # query tokens compared at a time: enough that products, not reading codes, take the time


class _DeviceQueries(NamedTuple):
    """Queries on the device."""

    tokens: torch.Tensor  # int8 (n_tokens, width)
    weights: torch.Tensor  # float64 (n_tokens,)
    owners: torch.Tensor  # int64 (n_tokens,), the query of each
    n_queries: int


class DeviceScan:
    """A :class:`~colqwen3_retrievers.vectors.kernels.scan.CodeScan` that keeps codes on a device.

    Codes are copied when they are first scanned, and again when their file has grown; they are freed with the memory
    map they came from. Memory on the device is that of the codes as they are stored, and :data:`MOST_BYTES`, whatever
    the number of pages and queries.

    Args:
        device: "cuda", which is the current one, "cuda:N", or "cpu", for tests.
        fused: whether to use the Triton kernel. None uses it where the device is CUDA and Triton is installed and works
            (it needs a C compiler): the first scan tries it, and warns if it fails.

    Attributes:
        device: of the codes, with its number.
        fused: as given; False instead of None where Triton cannot be used.

    Raises:
        ConfigError: torch has no such device, or it is of another kind.
    """

    def __init__(self, device: str = "cuda", *, fused: bool | None = None) -> None:
        self.device = cpu_or_cuda(device)
        if self.device.type == "cuda" and self.device.index is None:  # the current device differs between threads
            self.device = torch.device("cuda", torch.cuda.current_device())
        possible = self.device.type == "cuda" and importlib.util.find_spec("triton") is not None
        self.fused = False if fused is None and not possible else fused
        self._resident: dict[int, tuple[weakref.ref[Int8], torch.Tensor]] = {}

    def __call__(
        self, queries: QueryCodes, rows: Int8, starts: NDArray[np.int64], lengths: NDArray[np.int64], scales: Float32, /
    ) -> Float32:
        """Scan; see :class:`~colqwen3_retrievers.vectors.kernels.scan.CodeScan`."""
        return self._scan(queries, rows, starts, lengths, scales)

    def of_bits(self, dim: int, /) -> CodeScan:
        """Return the scan of single bits; see :class:`~colqwen3_retrievers.vectors.kernels.scan.UnpackingScan`."""
        return functools.partial(self._scan, dim=dim)

    def _scan(
        self,
        queries: QueryCodes,
        rows: Int8,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        scales: Float32,
        dim: int | None = None,
    ) -> Float32:
        """Scan int8 codes, or with ``dim`` those of single bits."""
        codes = self._codes(rows)
        device_queries = _DeviceQueries(
            as_tensor(queries.rows).to(self.device),
            as_tensor(queries.scales).to(self.device).double(),
            as_tensor(np.repeat(np.arange(len(queries.offsets) - 1), np.diff(queries.offsets))).to(self.device),
            len(queries.offsets) - 1,
        )
        n_tokens, width = device_queries.tokens.shape
        fused = self._fuses(width)
        costs = np.full(len(starts), _page_bytes(n_tokens, device_queries.n_queries))
        if not fused or dim is not None:
            costs += lengths * _row_bytes(width, n_tokens, fused)
        scores = np.empty((device_queries.n_queries, len(starts)), dtype=np.float32)
        for first, last in turns(costs, MOST_BYTES):
            sums = self._sums(device_queries, codes, starts[first:last], lengths[first:last], fused, dim).cpu().numpy()
            np.multiply(sums.T, scales[first:last], out=scores[:, first:last], casting="same_kind")
        return scores

    def _sums(
        self,
        device_queries: _DeviceQueries,
        codes: torch.Tensor,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        fused: bool,
        dim: int | None,
    ) -> torch.Tensor:
        """Return float64 (n_pages, n_queries), the scores of some pages without their scales."""
        if not fused or dim is not None:
            codes, starts = self._cut_out(codes, starts, lengths)
            codes = codes if dim is None else _unpacked(codes, dim)
        at, sizes = (as_tensor(array).to(self.device) for array in (starts, lengths))
        sums = torch.zeros((len(at), device_queries.n_queries), dtype=torch.float64, device=self.device)
        for token in range(0, len(device_queries.tokens), _MOST_TOKENS):
            now = slice(token, token + _MOST_TOKENS)
            best = _maxima(codes, at, sizes, device_queries.tokens[now], fused)
            sums.index_add_(1, device_queries.owners[now], best.double().mul_(device_queries.weights[now]))
            del best  # before the next ones are made
        return sums

    def _fuses(self, width: int) -> bool:
        """Return whether rows of a width go through the fused kernel."""
        if self.fused is False:
            return False
        if self.fused is None:
            return fused_works(self.device, width)
        from colqwen3_retrievers.vectors.kernels.triton_scan import WIDEST  # needs Triton

        return width <= WIDEST

    def _cut_out(
        self, codes: torch.Tensor, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """Return some pages' rows, uncopied if few others are between, and where each page begins in them."""
        begin, end = int(starts[0]), int(starts[-1] + lengths[-1])
        if end - begin <= SPARE * int(lengths.sum()):
            return codes[begin:end], starts - begin
        sizes = lengths // BLOCK
        begins = np.cumsum(sizes) - sizes
        wanted = np.arange(int(sizes.sum())) + np.repeat(starts // BLOCK - begins, sizes)
        blocks = codes[begin:end].view(-1, BLOCK * codes.shape[1])
        gathered = blocks[torch.from_numpy(wanted - begin // BLOCK).to(self.device)]
        return gathered.view(-1, codes.shape[1]), begins * BLOCK

    def _codes(self, rows: Int8) -> torch.Tensor:
        """Return the codes on the device, by the identity of the array they come from."""
        entry = self._resident.get(id(rows))
        if entry is None or entry[0]() is not rows:
            key, resident = id(rows), self._resident
            reference = weakref.ref(rows, lambda _: resident.pop(key, None))
            entry = resident[key] = (reference, as_tensor(rows).to(self.device, copy=True))
        return entry[1]


def _page_bytes(n_tokens: int, n_queries: int) -> int:
    """Return the bytes of a page in a scan: maxima in int32, by whole blocks of tokens, and float64; sums; offsets."""
    tile = min(n_tokens, _MOST_TOKENS)
    return 4 * (-(-tile // 64) * 64) + 8 * tile + 8 * n_queries + 64


def _row_bytes(width: int, n_tokens: int, fused: bool) -> int:
    """Return the bytes of a row that is cut out first: gathered or unpacked; products; maxima of its block."""
    tile = 0 if fused else min(n_tokens, _MOST_TOKENS) + 7
    return int(SPARE * (3 * width + 5 * tile + 8))


def _maxima(
    codes: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, tokens: torch.Tensor, fused: bool
) -> torch.Tensor:
    """Return int32 (n_pages, n_tokens), the largest product of each token with each page's code."""
    if fused:
        from colqwen3_retrievers.vectors.kernels.triton_scan import page_maxima  # needs Triton

        return page_maxima(codes, starts, lengths, tokens)
    n_tokens = len(tokens)
    # cuBLAS requires more than 16 rows and a multiple of 8 columns, contiguous in memory
    columns = torch.nn.functional.pad(tokens, (0, 0, 0, -n_tokens % 8)).T
    padded = codes if len(codes) > 16 else torch.nn.functional.pad(codes, (0, 0, 0, 24 - len(codes)))
    products = torch._int_mm(padded, columns)[: len(codes), :n_tokens]
    blocks = products.view(-1, BLOCK, n_tokens).amax(1)
    del products
    number = torch.arange(len(blocks), device=codes.device)
    page = torch.searchsorted(starts // BLOCK, number, right=True) - 1
    page = torch.where(number < ((starts + lengths) // BLOCK)[page], page, len(starts))  # rows between pages
    lowest = torch.iinfo(torch.int32).min
    best = torch.full((len(starts) + 1, n_tokens), lowest, dtype=torch.int32, device=codes.device)
    return best.scatter_reduce_(0, page[:, None].expand(-1, n_tokens), blocks, "amax")[:-1]


def _unpacked(codes: torch.Tensor, dim: int) -> torch.Tensor:
    """Unpack as :func:`~colqwen3_retrievers.vectors.codes.unpacked_code` does, on the device, by a table of bytes."""
    bytes_ = np.zeros((256, codes.shape[1]), dtype=np.int8)
    bytes_[:, 0] = np.arange(256, dtype=np.uint8).view(np.int8)
    every = unpacked_code(bytes_, dim)
    signs = torch.from_numpy(every[:, :8].copy()).to(codes.device)
    wide = torch.zeros((len(codes), every.shape[1]), dtype=torch.int8, device=codes.device)
    packed = codes.view(torch.uint8)[:, :-1].int().flatten()
    wide[:, :dim] = signs.index_select(0, packed).view(len(codes), -1)[:, :dim]
    wide[:, dim] = codes[:, -1]
    return wide


@functools.cache
def fused_works(device: torch.device, width: int) -> bool:
    """Return whether the fused kernel computes the right maxima on a device, and warn if it does not.

    It is compiled when it first runs, which needs a C compiler, a GPU that Triton supports and a folder to cache in.
    The result is cached for the process.

    Args:
        device: of the codes.
        width: components of a row.
    """
    try:
        from colqwen3_retrievers.vectors.kernels.triton_scan import WIDEST, page_maxima

        if width > WIDEST:
            return False
        one = torch.tensor([0], device=device)
        codes = (torch.arange(BLOCK * width, device=device) % 255 - 127).to(torch.int8).view(BLOCK, width)
        for n_tokens in (1, 64):  # both of its forms
            tokens = (torch.arange(n_tokens * width, device=device) % 251 - 125).to(torch.int8).view(n_tokens, width)
            right = (codes.double() @ tokens.double().T).amax(0)
            if not torch.equal(page_maxima(codes, one, one + BLOCK, tokens)[0].double(), right):
                raise RuntimeError("it computes wrong products")
    except torch.OutOfMemoryError:
        raise
    except Exception as exc:
        what = str(exc).strip().partition("\n")[0] or type(exc).__name__
        warnings.warn(
            f"Triton's scan of codes does not work on {device} ({what}); torch's is used, which is slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
