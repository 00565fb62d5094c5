"""Fewer numbers for a multi-vector: shorter token embeddings, and fewer of them.

The length of a token embedding is normalised here, for the whole library.
"""

from __future__ import annotations

import operator
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from colqwen3_retrievers.errors import ConfigError, DimensionError, require
from colqwen3_retrievers.vectors.multi_vector import Float32, MultiVector, as_token_embeddings

PoolingMethod = Literal["hierarchical", "sequential", "kmeans"]
"""How tokens are gathered into clusters."""

_ROUNDS = 10  # of k-means; on pages of 700 tokens fewer than 1 in 100 still moves after them


def l2_normalise(vectors: MultiVector | ArrayLike) -> Float32:
    """Scale every row to length 1.

    Args:
        vectors: (n_tokens, dim), floating, finite; not changed.

    Returns:
        float32 of the same shape, rows of length 1 within 1e-6; computed in float32, without overflow or underflow
        however large or small the components are.

    Raises:
        ConfigError: not a multi-vector, or a row of zeros, which has no direction. It is refused rather than kept: a
            zero row would win over every negative similarity.

    >>> l2_normalise([[3.0, 4.0], [0.0, -2.0]]).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, -1.0]]
    """
    rows = as_token_embeddings(np.asarray(vectors))
    largest = np.abs(rows).max(axis=1)
    if not largest.all():
        raise ConfigError(f"vectors: row {int(np.argmin(largest))} is zero and has no direction")
    rows = np.ldexp(rows, -np.frexp(largest)[1][:, None])  # by powers of two: exact, and squares stay in range
    unit: Float32 = rows / np.sqrt(np.einsum("td,td->t", rows, rows))[:, None]
    return unit


def truncate(vectors: MultiVector | ArrayLike, dim: int) -> Float32:
    """Keep the first ``dim`` components of every row, and make rows of length 1 again.

    Only for checkpoints trained so that the first components serve alone: Matryoshka representation learning,
    Kusupati et al. 2022 (arXiv 2205.13147).

    Args:
        vectors: (n_tokens, width), floating, finite; not changed.
        dim: Matryoshka dim, 1..width.

    Returns:
        float32 (n_tokens, dim), unit rows.

    Raises:
        DimensionError: dim exceeds the width.
        ConfigError: dim is no whole number from 1, or a row is zero in its first ``dim`` components.

    >>> truncate([[3.0, 4.0, 12.0]], 2).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    rows = as_token_embeddings(np.asarray(vectors))
    dim = _whole(dim, "dim")
    if dim > rows.shape[1]:
        raise DimensionError("Matryoshka dim exceeds the width", expected=dim, actual=rows.shape[1])
    kept = rows[:, :dim]
    empty = ~kept.any(axis=1)
    if empty.any():
        raise ConfigError(f"vectors: row {int(np.argmax(empty))} is zero in its first {dim} components: raise dim")
    return l2_normalise(kept)


def pool_tokens(
    vectors: MultiVector | ArrayLike, factor: int, *, method: PoolingMethod = "hierarchical"
) -> tuple[Float32, NDArray[np.int32]]:
    """Merge similar token embeddings of a document. Queries are never pooled.

    "hierarchical" clusters by Ward's linkage on cosine distances and replaces each cluster by its mean: token pooling,
    Clavié et al. 2024 (arXiv 2409.14683), as ColPali uses it. The others are there to compare with, and need no scipy:
    "kmeans" clusters by spherical k-means from the token farthest from all before it; "sequential" averages ``factor``
    consecutive tokens. What they lose is measured in ``benchmarks/compression.md``. An encoder pools hierarchically;
    an index knows how its multi-vectors were pooled (``EncoderInfo.pool_method``) and takes no others.

    Args:
        vectors: (n_tokens, dim), unit rows; not changed.
        factor: original tokens for each kept one, at least 1; 1 pools nothing.
        method: "hierarchical", "kmeans" or "sequential".

    Returns:
        The pooled rows, float32 (n_pooled, dim), unit, with 1 <= n_pooled <= ceil(n_tokens / factor), and ``clusters``,
        int32 (n_tokens,), the pooled row of each token. Pooled rows are in the order of their first tokens; the same
        input gives the same output. With factor 1, the input as float32 and ``arange(n_tokens)``.

        Where a cluster's tokens cancel out, as antipodal ones do, its row is its first token.

    Raises:
        ConfigError: not a multi-vector, a row of zeros, a factor that is no whole number from 1, or an unknown method.
        MissingExtraError: "hierarchical" without scipy.

    >>> rows, clusters = pool_tokens([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], 2)
    >>> rows.tolist(), clusters.tolist()
    ([[1.0, 0.0], [0.0, 1.0]], [0, 1, 0, 1])
    """
    rows = as_token_embeddings(np.asarray(vectors))
    factor = _whole(factor, "factor")
    if method not in ("hierarchical", "sequential", "kmeans"):
        raise ConfigError(f'method: expected "hierarchical", "kmeans" or "sequential", got {method!r}')
    identity = np.arange(len(rows), dtype=np.int32)
    if factor == 1:
        return rows, identity
    rows = l2_normalise(rows)
    if len(rows) == 1:
        return rows, identity
    n_clusters = -(-len(rows) // factor)
    if method == "sequential":
        clusters = identity // factor
    else:
        clusters = _ward_clusters(rows, n_clusters) if method == "hierarchical" else _kmeans_clusters(rows, n_clusters)
    order = np.argsort(clusters, kind="stable")
    starts = np.flatnonzero(np.diff(clusters[order], prepend=-1))
    counts = np.diff(starts, append=len(rows))
    means = np.add.reduceat(rows[order].astype(np.float64), starts, axis=0) / counts[:, None]
    # Unit float32 rows sum with an error near 1e-7: below 1e-6 the mean is rounding, not a direction.
    cancelled = np.sqrt(np.einsum("td,td->t", means, means)) < 1e-6
    means[cancelled] = rows[order[starts]][cancelled]
    return l2_normalise(means), clusters


def _ward_clusters(rows: Float32, n_clusters: int) -> NDArray[np.int32]:
    """Cluster unit rows into at most ``n_clusters`` by Ward's linkage."""
    hierarchy = require("pooling", "scipy.cluster.hierarchy")
    distance = require("pooling", "scipy.spatial.distance")
    # pdist rather than a matrix product: its rounding does not depend on the number of threads, nor do the clusters.
    tree = hierarchy.linkage(distance.pdist(rows, metric="cosine"), method="ward")
    return _numbered(hierarchy.fcluster(tree, n_clusters, criterion="maxclust"))


def _kmeans_clusters(rows: Float32, n_clusters: int) -> NDArray[np.int32]:
    """Cluster unit rows by spherical k-means, from seeds each the farthest from those before it.

    No chance is involved: the first seed is the token farthest from the mean direction.
    """
    nearest = rows @ rows.mean(axis=0)
    seeds = [int(nearest.argmin())]
    nearest = rows @ rows[seeds[0]]
    while len(seeds) < n_clusters:
        seeds.append(int(nearest.argmin()))
        np.maximum(nearest, rows @ rows[seeds[-1]], out=nearest)
    centres = rows[seeds]
    labels = np.full(len(rows), -1)
    for _ in range(_ROUNDS):
        before, labels = labels, (rows @ centres.T).argmax(axis=1)
        if np.array_equal(before, labels):
            break
        sums = np.zeros_like(centres)
        np.add.at(sums, labels, rows)
        lengths = np.sqrt(np.einsum("td,td->t", sums, sums))
        moved = lengths > 1e-6  # an empty cluster, or one whose tokens cancel out, stays where it is
        centres = np.where(moved[:, None], sums / np.where(moved, lengths, 1)[:, None], centres)
    return _numbered(labels)


def _numbered(labels: NDArray[Any]) -> NDArray[np.int32]:
    """Number clusters from 0 in the order of their first rows."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int32)


def _whole(value: int, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError as exc:
        raise ConfigError(f"{name}: expected a whole number, got {value!r}") from exc
    if number < 1:
        raise ConfigError(f"{name}: expected at least 1, got {number}")
    return number
