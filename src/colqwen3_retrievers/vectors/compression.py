"""Smaller multi-vectors: shorter token embeddings, and fewer of them.

Normalising to unit length and clustering by Ward's linkage are defined here, for the whole library.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, DimensionError
from colqwen3_retrievers.vectors.multi_vector import Float32, MultiVector, as_token_embeddings

Floats = TypeVar("Floats", NDArray[np.float32], NDArray[np.float64])

_CANCELLED = 1e-6  # unit float32 rows sum with an error near 1e-7: a shorter mean is rounding, not a direction


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
    """Keep the first ``dim`` components of every row, and scale rows to length 1.

    Only for checkpoints whose first components were trained to serve alone: Matryoshka representation learning,
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
    dim = whole_number(dim, "dim", least=1)
    if dim > rows.shape[1]:
        raise DimensionError("Matryoshka dim exceeds the width", expected=dim, actual=rows.shape[1])
    head = rows[:, :dim]
    empty = ~head.any(axis=1)
    if empty.any():
        raise ConfigError(f"vectors: row {int(np.argmax(empty))} is zero in its first {dim} components: raise dim")
    return l2_normalise(head)


def pool_tokens(vectors: MultiVector | ArrayLike, factor: int) -> tuple[Float32, NDArray[np.int32]]:
    """Merge similar token embeddings of a document. Queries are never pooled.

    Tokens are clustered by Ward's linkage on cosine distances, and each cluster is replaced by its mean: token pooling,
    Clavié et al. 2024 (arXiv 2409.14683), as ColPali uses it. What it costs, also beside k-means and sequential
    pooling, is measured in ``benchmarks/compression.md``.

    Args:
        vectors: (n_tokens, dim), unit rows; not changed.
        factor: original tokens for each pooled one, at least 1; 1 pools nothing.

    Returns:
        The pooled rows, float32 (n_pooled, dim), unit, with 1 <= n_pooled <= ceil(n_tokens / factor), and ``clusters``,
        int32 (n_tokens,), the pooled row of each token. Pooled rows are in the order of their first tokens; the same
        input gives the same output. With factor 1, the input as float32 and ``arange(n_tokens)``.

        Where a cluster's tokens cancel out, as antipodal ones do, its row is its first token.

    Raises:
        ConfigError: not a multi-vector, a row of zeros, or a factor that is no whole number from 1.

    >>> rows, clusters = pool_tokens([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], 2)
    >>> rows.tolist(), clusters.tolist()
    ([[1.0, 0.0], [0.0, 1.0]], [0, 1, 0, 1])
    """
    rows = as_token_embeddings(np.asarray(vectors))
    factor = whole_number(factor, "factor", least=1)
    if factor > 1:
        rows = l2_normalise(rows)
    if factor == 1 or len(rows) == 1:
        return rows, np.arange(len(rows), dtype=np.int32)
    distinct = len({row.tobytes() for row in rows})  # equal tokens are always one cluster
    wide = rows.astype(np.float64)
    unit = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    costs = unit @ unit.T
    costs -= 1
    costs *= costs
    clusters = _merge_by_ward(costs, min(-(-len(rows) // factor), distinct))
    return l2_normalise(cluster_means(wide, clusters)[0]), clusters.astype(np.int32)


def ward_clusters(vectors: ArrayLike, n_clusters: int) -> NDArray[np.int64]:
    """Cluster rows by Ward's linkage on Euclidean distances.

    Args:
        vectors: (n, dim), finite.
        n_clusters: 1..n.

    Returns:
        int64 (n,), the cluster of each row, numbered from 0 in the order of their first rows.

    >>> ward_clusters([[0.0], [10.0], [0.1], [10.1], [5.0]], 3).tolist()
    [0, 1, 0, 1, 2]
    """
    rows = np.asarray(vectors, dtype=np.float32)
    rows = rows - rows.mean(axis=0)  # distances stay, and less is lost in the difference of large squares
    squares = np.einsum("td,td->t", rows, rows)
    costs: Float32 = rows @ rows.T
    costs *= -2
    costs += squares[:, None]
    costs += squares
    return _merge_by_ward(costs, n_clusters)


def cluster_means(rows: Floats, clusters: NDArray[np.integer]) -> tuple[Floats, Floats]:
    """Return the mean of each cluster's unit rows, and the length of that mean.

    Args:
        rows: (n, dim), unit.
        clusters: (n,), the cluster of each row, numbered from 0 without gaps.

    Returns:
        (n_clusters, dim) and (n_clusters,), in the dtype of ``rows``. Where rows cancel out, the first of them stands
        in for the mean; the length stays that of the mean.

    >>> cluster_means(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), np.array([0, 1, 1]))[0].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    order = np.argsort(clusters, kind="stable")
    starts = np.flatnonzero(np.diff(clusters[order], prepend=-1))
    counts = np.diff(starts, append=len(rows)).astype(rows.dtype)
    means: Floats = np.add.reduceat(rows[order], starts, axis=0)
    means /= counts[:, None]
    lengths = np.sqrt(np.einsum("td,td->t", means, means))
    cancelled = lengths < _CANCELLED
    means[cancelled] = rows[order[starts[cancelled]]]
    return means, lengths


def _merge_by_ward(costs: Floats, n_clusters: int) -> NDArray[np.int64]:
    """Cluster by Ward's linkage, given the squared distances of all pairs; they are overwritten.

    Pairs of clusters that are each other's nearest are merged together, round by round: they are merges of Ward's tree
    in whatever order they come (reducibility), and a dozen rounds replace hundreds of steps. Distances to a merged
    cluster follow from those to its parts (Lance and Williams 1967). The tree is then cut at the height that leaves
    ``n_clusters``. On pages this takes a half to a quarter of the time of scipy's ``linkage``.
    """
    n = len(costs)
    wanted = n - n_clusters
    sizes = np.ones(n, dtype=costs.dtype)
    names = np.arange(n)  # the first row of each cluster
    owners: list[NDArray[np.int64]] = []
    members: list[NDArray[np.int64]] = []
    heights = np.empty(0, dtype=costs.dtype)
    np.fill_diagonal(costs, np.inf)
    np.minimum(costs, costs.T, out=costs)  # rounding leaves the triangles apart: then no pair need be mutual
    while len(costs) > 1:
        nearest = costs.argmin(axis=1)
        here = np.arange(len(costs))
        if len(heights) >= wanted and (
            wanted == 0 or np.partition(heights, wanted - 1)[wanted - 1] <= costs[here, nearest].min()
        ):
            break  # a tree's heights only grow: whatever is merged from here on lies above the cut
        first = np.flatnonzero((nearest[nearest] == here) & (here < nearest))
        second = nearest[first]
        owners.append(names[first])
        members.append(names[second])
        heights = np.concatenate([heights, costs[first, second]])
        costs = _merged(costs, sizes, first, second)
        sizes[first] += sizes[second]
        left = np.ones(len(names), dtype=bool)
        left[second] = False
        sizes, names = sizes[left], names[left]
    owner = np.arange(n)
    if wanted:
        lowest = np.sort(np.argsort(heights, kind="stable")[:wanted])  # followed in the order they were made
        owner[np.concatenate(members)[lowest]] = np.concatenate(owners)[lowest]
        while not np.array_equal(owner, owner[owner]):
            owner = owner[owner]
    return np.unique(owner, return_inverse=True)[1].astype(np.int64)


def _merged(costs: Floats, sizes: Floats, first: NDArray[np.intp], second: NDArray[np.intp]) -> Floats:
    """Return the costs after cluster ``second[i]`` has joined ``first[i]``, for all i."""
    one, other, gaps = sizes[first, None], sizes[second, None], costs[first, second][:, None]
    rows = costs[first] * (one + sizes)
    rows += costs[second] * (other + sizes)
    rows -= gaps * sizes
    rows /= one + other + sizes
    joint = (one + other).T
    pairs = rows[:, first] * (one.T + joint.T)
    pairs += rows[:, second] * (other.T + joint.T)
    pairs -= gaps.T * joint.T
    pairs /= joint + joint.T
    np.minimum(pairs, pairs.T, out=pairs)
    np.fill_diagonal(pairs, np.inf)
    left = np.delete(np.arange(len(costs)), second)
    place = np.searchsorted(left, first)
    costs = costs[left][:, left]
    rows = rows[:, left]
    rows[:, place] = pairs
    costs[place] = rows
    costs[:, place] = rows.T
    return costs
