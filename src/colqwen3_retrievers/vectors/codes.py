"""Compact codes of token embeddings: int8, 1 bit, and the pooled codes by which a store finds candidates.

No score that a user sees is made from a code: it selects the pages worth scoring from their stored token embeddings.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.vectors.compression import cluster_means, l2_normalise, ward_clusters
from colqwen3_retrievers.vectors.multi_vector import Float32, MultiVector, PackedEmbeddings, as_token_embeddings

Int8 = NDArray[np.int8]

BLOCK: Final = 8
"""Rows in a block: a page's code has whole blocks, so that a kernel takes maxima without knowing where pages end."""

CODE_BITS: Final = (8, 1)
"""Bits of a component that a code may have."""

_MOST_CLUSTERED = 2048  # tokens clustered together; longer pages are cut, since a matrix of all distances is held

SPREAD_WEIGHT: Final = 0.12
"""Weight of a cluster's spread in its similarity with a query token: see :func:`page_code`."""

_SPREAD_SCALE = 4.0  # spreads are stored divided by it, so that they stay below a page's largest component


class PageCode(NamedTuple):
    """A page's pooled token embeddings in int8 or single bits.

    Attributes:
        rows: int8 (n, :func:`code_width` of dim), n a multiple of :data:`BLOCK`: the pooled token embedding, the spread
            of its cluster, zeros. Of single bits int8 (n, ceil(dim / 8) + 1): the signs, the spread;
            :func:`unpacked_code` makes the wider rows of them.
        scale: ``rows * scale``, unpacked, is what they stand for, of int8 within scale / 2 a component.
    """

    rows: Int8
    scale: float


class QueryCodes(NamedTuple):
    """Queries in int8, laid end to end.

    Attributes:
        rows: int8 (n_tokens, width).
        scales: float32 (n_tokens,), one for each row.
        offsets: int64 (n_queries + 1,), as in :class:`~colqwen3_retrievers.vectors.multi_vector.PackedEmbeddings`.
    """

    rows: Int8
    scales: Float32
    offsets: NDArray[np.int64]


def code_width(dim: int) -> int:
    """Return the components of a code's row for a dim.

    One more than the dim, for the spread, rounded up to a multiple of 8, which int8 kernels require.

    >>> code_width(128), code_width(320)
    (136, 328)
    """
    return -(-(dim + 1) // 8) * 8


def code_row_bytes(dim: int, bits: int) -> int:
    """Return the bytes of a code's row for 8 bits or 1 bit a component.

    >>> code_row_bytes(128, 8), code_row_bytes(128, 1)
    (136, 17)
    """
    return code_width(dim) if bits == 8 else -(-dim // 8) + 1


def page_code(vectors: MultiVector | ArrayLike, factor: int, bits: int = 8) -> PageCode:
    """Return the code by which a page is found.

    Token embeddings are clustered by Ward's linkage (as token pooling does, Clavié et al. 2024, arXiv 2409.14683) into
    one cluster for ``factor`` tokens, rounded up to whole blocks. A cluster is kept as its mean, of length 1, and its
    spread sqrt(1 - r * r), r the length its mean had: the best token of a cluster is nearer to a query token than the
    mean is, and the more so the wider the cluster. MaxSim over ``mean + SPREAD_WEIGHT * spread`` misses fewer pages
    than MaxSim over means. Where a page has fewer tokens than a block has rows, rows are repeated, which changes no
    maximum.

    Args:
        vectors: (n_tokens, dim), unit rows; not changed.
        factor: tokens for each row of the code, at least 1; 1 pools nothing.
        bits: of a component: 8, or 1, which keeps signs only, in an eighth of the bytes.

    Raises:
        ConfigError: not a multi-vector, a factor below 1, or another number of bits.

    >>> code = page_code([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]], 3)
    >>> code.rows.shape, sorted(set(map(tuple, (code.rows[:, :2] * code.scale).round(2).tolist())))
    ((8, 8), [(0.0, 1.0), (0.8, 0.6), (1.0, 0.0)])
    """
    rows = as_token_embeddings(np.asarray(vectors))
    factor = whole_number(factor, "factor", least=1)
    if bits not in CODE_BITS:
        raise ConfigError(f"bits: expected 8 or 1, got {bits!r}")
    spreads = np.zeros(len(rows), dtype=np.float32)
    if factor > 1:
        parts = np.array_split(rows, -(-len(rows) // _MOST_CLUSTERED))
        pooled = [_pooled(part, factor) for part in parts]
        rows, spreads = np.concatenate([p[0] for p in pooled]), np.concatenate([p[1] for p in pooled])
    table = np.zeros((-(-len(rows) // BLOCK) * BLOCK, code_width(rows.shape[1])), dtype=np.float32)
    sources = np.arange(len(table)) % len(rows)
    table[:, : rows.shape[1]] = rows[sources]
    table[:, rows.shape[1]] = spreads[sources] / _SPREAD_SCALE
    if bits == 1:
        return _bit_code(table, rows.shape[1])
    codes, scale = quantise(table)
    return PageCode(codes, float(scale[0, 0]))


def unpacked_code(rows: Int8, dim: int) -> Int8:
    """Return the int8 rows that a scan compares, from rows of single bits.

    Args:
        rows: int8 (n, ceil(dim / 8) + 1), of :func:`page_code` with ``bits=1``.
        dim: components of a token embedding.

    Returns:
        int8 (n, :func:`code_width` of dim); with the code's scale, components are plus or minus 1 / sqrt(dim).

    >>> code = page_code([[0.6, -0.8]], 1, bits=1)
    >>> (unpacked_code(code.rows, 2)[0, :2] * code.scale).round(3).tolist()
    [0.707, -0.707]
    """
    level = _bit_level(dim)
    table = np.zeros((len(rows), code_width(dim)), dtype=np.int8)
    signs = np.unpackbits(np.ascontiguousarray(rows[:, :-1]).view(np.uint8), axis=1, count=dim).view(np.int8)
    np.multiply(signs, 2 * level, out=table[:, :dim])
    table[:, :dim] -= level
    table[:, dim] = rows[:, -1]
    return table


def _bit_code(table: Float32, dim: int) -> PageCode:
    scale = 1 / (_bit_level(dim) * dim**0.5)
    spread = np.rint(table[:, dim] / np.float32(scale)).astype(np.int8)
    signs = np.packbits(table[:, :dim] > 0, axis=1).view(np.int8)
    return PageCode(np.concatenate([signs, spread[:, None]], axis=1), scale)


def _bit_level(dim: int) -> int:
    """Return the int8 value of a set bit: as large as leaves room for the largest spread beside it."""
    return max(1, min(63, int(127 * _SPREAD_SCALE / dim**0.5)))


def query_codes(queries: PackedEmbeddings) -> QueryCodes:
    """Return the codes of queries, to be compared with those of pages: see :func:`page_code`.

    Args:
        queries: float32 or float16.

    >>> codes = query_codes(PackedEmbeddings.pack([[[0.6, 0.8]]]))
    >>> [f"{component:.2f}" for component in codes.rows[0] * codes.scales[0]]
    ['0.60', '0.80', '0.48', '0.00', '0.00', '0.00', '0.00', '0.00']
    """
    table = np.zeros((len(queries.vectors), code_width(queries.dim)), dtype=np.float32)
    table[:, : queries.dim] = queries.vectors
    table[:, queries.dim] = SPREAD_WEIGHT * _SPREAD_SCALE
    rows, scales = quantise(table, each_row=True)
    return QueryCodes(rows, scales[:, 0], queries.offsets)


def quantise(vectors: MultiVector | ArrayLike, *, each_row: bool = False) -> tuple[Int8, Float32]:
    """Round token embeddings to int8 under one scale, or as for queries under one for each row.

    Args:
        vectors: (n_tokens, dim), floating, finite; not changed.
        each_row: whether each row has its own scale.

    Returns:
        int8 of the same shape, -127..127, and float32 (1, 1) or (n_tokens, 1) scales s > 0: ``codes * s`` is within
        s / 2 of every component.

    >>> codes, scale = quantise([[0.6, -0.8]])
    >>> codes.tolist(), (codes * scale).round(2).tolist()
    ([[95, -127]], [[0.6000000238418579, -0.800000011920929]])
    >>> quantise([[0.6, -0.8], [0.0, 0.001]], each_row=True)[0].tolist()
    [[95, -127], [0, 127]]
    """
    rows = as_token_embeddings(np.asarray(vectors))
    largest = np.abs(rows).max(axis=1 if each_row else None, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(rows / scales).astype(np.int8), scales


def _pooled(rows: Float32, factor: int) -> tuple[Float32, Float32]:
    """Return unit means of Ward's clusters, one for ``factor`` rows in whole blocks, and the clusters' spreads."""
    n_clusters = min(len(rows), -(-len(rows) // (factor * BLOCK)) * BLOCK)
    unique, inverse = np.unique(rows, axis=0, return_inverse=True)
    if len(unique) <= n_clusters:
        return unique, np.zeros(len(unique), dtype=np.float32)
    means, lengths = cluster_means(rows, ward_clusters(unique, n_clusters)[inverse.ravel()])
    return l2_normalise(means), np.sqrt(np.maximum(1 - lengths * lengths, 0))
