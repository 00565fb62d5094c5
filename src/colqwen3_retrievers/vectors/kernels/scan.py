"""The candidate scan: approximate MaxSim over pages' codes.

:func:`numpy_scan` is the reference every other scan is tested against.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from colqwen3_retrievers.vectors.codes import BLOCK, Int8, QueryCodes, code_width, unpacked_code
from colqwen3_retrievers.vectors.late_interaction import chunk_bounds
from colqwen3_retrievers.vectors.multi_vector import Float32

CHUNK_BYTES: Final = 1 << 21
"""Bytes of codes a core scans at a time: they, and the products with a query, fit its cache."""

SPARE: Final = 1.5
"""Rows scanned for each row wanted, above which the wanted ones are gathered first."""


class CodeScan(Protocol):
    """Compares the codes of queries with those of pages."""

    def __call__(
        self, queries: QueryCodes, rows: Int8, starts: NDArray[np.int64], lengths: NDArray[np.int64], scales: Float32, /
    ) -> Float32:
        """Score every query against every page.

        Args:
            queries: at least one.
            rows: int8 (n, width), the codes of many pages, in memory or memory-mapped.
            starts: int64 (n_pages,), where each page's code begins: increasing multiples of
                :data:`~colqwen3_retrievers.vectors.codes.BLOCK`.
            lengths: int64 (n_pages,), its rows: multiples of the block, at least one.
            scales: float32 (n_pages,).

        Returns:
            float32 (n_queries, n_pages): sums, over query tokens, of the largest product with a row of the page.
        """
        ...


@runtime_checkable
class UnpackingScan(CodeScan, Protocol):
    """A scan that stores codes itself, and unpacks single bits there."""

    def of_bits(self, dim: int, /) -> CodeScan:
        """Return the scan of single bits, which takes the rows of ``page_code`` as stored.

        Args:
            dim: components of a token embedding.
        """
        ...


def numpy_scan(
    queries: QueryCodes, rows: Int8, starts: NDArray[np.int64], lengths: NDArray[np.int64], scales: Float32, /
) -> Float32:
    """Scan with numpy, in float32, which holds the products of up to a thousand components exactly.

    >>> from colqwen3_retrievers.vectors.codes import page_code, query_codes
    >>> from colqwen3_retrievers.vectors.multi_vector import PackedEmbeddings
    >>> code = page_code([[1.0, 0.0]], 3)
    >>> query = query_codes(PackedEmbeddings.pack([[[0.8, 0.6]]]))
    >>> one = np.asarray([0]), np.asarray([8]), np.asarray([code.scale], dtype=np.float32)
    >>> numpy_scan(query, code.rows, *one).round(2).tolist()
    [[0.800000011920929]]
    """
    tokens = queries.rows.astype(np.float32)
    scores = np.empty((len(queries.offsets) - 1, len(starts)), dtype=np.float32)
    for first, last in pieces(lengths, rows.shape[1], len(tokens)):
        chunk, cuts, stops = cut_out(rows, starts[first:last], lengths[first:last])
        products = chunk.astype(np.float32) @ tokens.T
        blocks = products.reshape(-1, BLOCK, len(tokens)).max(axis=1)
        scores[:, first:last] = sum_up(blocks, cuts, stops, queries, scales[first:last])
    return scores


def bit_scan(scan: CodeScan, dim: int) -> CodeScan:
    """Return a scan of single bits, which unpacks some megabytes at a time for a scan of int8 codes.

    Args:
        scan: of int8 codes; an :class:`UnpackingScan` unpacks by itself.
        dim: components of a token embedding.

    >>> from colqwen3_retrievers.vectors.codes import page_code, query_codes
    >>> from colqwen3_retrievers.vectors.multi_vector import PackedEmbeddings
    >>> code = page_code([[0.6, 0.8]], 1, bits=1)
    >>> query = query_codes(PackedEmbeddings.pack([[[0.8, 0.6]]]))
    >>> one = np.asarray([0]), np.asarray([8]), np.asarray([code.scale], dtype=np.float32)
    >>> bit_scan(numpy_scan, 2)(query, code.rows, *one).round(2).tolist()
    [[0.9900000095367432]]
    """
    if isinstance(scan, UnpackingScan):
        return scan.of_bits(dim)

    def unpacking_scan(
        queries: QueryCodes, rows: Int8, starts: NDArray[np.int64], lengths: NDArray[np.int64], scales: Float32, /
    ) -> Float32:
        scores = np.empty((len(queries.offsets) - 1, len(starts)), dtype=np.float32)
        for first, last in pieces(lengths, code_width(dim), 1):
            chunk, begins, ends = cut_out(rows, starts[first:last], lengths[first:last])
            wide = unpacked_code(chunk, dim)
            scores[:, first:last] = scan(queries, wide, begins * BLOCK, (ends - begins) * BLOCK, scales[first:last])
        return scores

    return unpacking_scan


def pieces(lengths: NDArray[np.int64], width: int, n_tokens: int) -> Iterator[tuple[int, int]]:
    """Return the pieces of pages a core scans at a time: first page, and one past the last.

    >>> list(pieces(np.asarray([8, 8, 16, 8]), 1 << 17, 1))
    [(0, 2), (2, 3), (3, 4)]
    """
    most = max(BLOCK, min(CHUNK_BYTES // width, CHUNK_BYTES // (4 * n_tokens)))
    return turns(lengths, most)


def turns(costs: NDArray[np.int64], most: int) -> Iterator[tuple[int, int]]:
    """Return runs of pages that cost at most ``most``, or are one page: first page, and one past the last.

    >>> list(turns(np.asarray([3, 3, 3, 9, 1]), 6))
    [(0, 2), (2, 3), (3, 4), (4, 5)]
    """
    return itertools.pairwise(chunk_bounds(np.concatenate([[0], np.cumsum(costs)]), most))


def cut_out(
    rows: Int8, starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[Int8, NDArray[np.int64], NDArray[np.int64]]:
    """Return some pages' rows, uncopied if few others are between, and the blocks where each begins and ends."""
    begin, stops = int(starts[0]), starts + lengths
    if int(stops[-1]) - begin <= SPARE * int(lengths.sum()):
        return rows[begin : int(stops[-1])], (starts - begin) // BLOCK, (stops - begin) // BLOCK
    gathered = np.concatenate([rows[a:b] for a, b in zip(starts, stops, strict=True)])
    ends = np.cumsum(lengths) // BLOCK
    return gathered, ends - lengths // BLOCK, ends


def sum_up(
    blocks: NDArray[np.float32] | NDArray[np.int32],
    begins: NDArray[np.int64],
    ends: NDArray[np.int64],
    queries: QueryCodes,
    scales: Float32,
) -> Float32:
    """Return scores of pages from maxima of blocks.

    Args:
        blocks: (n_blocks, n_tokens), the largest product of each block of rows with each query token.
        begins: first block of each page.
        ends: one past its last.
        queries: for scales and offsets.
        scales: float32 (n_pages,).

    Returns:
        float32 (n_queries, n_pages).
    """
    cuts = np.stack([begins, ends], axis=1).ravel()  # page, others between, page, ...
    if cuts[-1] == len(blocks):
        cuts = cuts[:-1]
    best = np.maximum.reduceat(blocks, cuts, axis=0)[::2] * queries.scales
    sums = np.add.reduceat(best, queries.offsets[:-1], axis=1) * scales[:, None]
    return np.ascontiguousarray(sums.T, dtype=np.float32)
