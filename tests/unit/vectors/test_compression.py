"""Normalising, Matryoshka truncation and token pooling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from colqwen3_retrievers.errors import ConfigError, DimensionError
from colqwen3_retrievers.vectors.compression import l2_normalise, pool_tokens, truncate
from colqwen3_retrievers.vectors.multi_vector import MultiVector


def unit(n: int, dim: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# -- length ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 320), (300, 16), (700, 128)])
def test_rows_get_length_one_and_keep_their_direction(shape: tuple[int, int], dtype) -> None:
    rows = (np.random.default_rng(0).standard_normal(shape) * 3).astype(dtype)
    before = rows.copy()
    normalised = l2_normalise(rows)
    assert normalised.dtype == np.float32
    expected = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(normalised, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(normalised.astype(np.float64), axis=1), 1, atol=1e-6)
    assert np.array_equal(rows, before)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-25, 1.0, 1e25, 3e38])
def test_neither_overflow_nor_underflow(scale: float) -> None:
    row = np.array([[0.5, 0.5, -0.5, 0.5]]) * scale
    np.testing.assert_allclose(l2_normalise(row.astype(np.float32)), [[0.5, 0.5, -0.5, 0.5]], atol=1e-6)


def test_a_zero_row_is_refused_by_number() -> None:
    with pytest.raises(ConfigError, match="row 1 is zero"):
        l2_normalise([[1.0, 0.0], [0.0, -0.0], [0.0, 0.0]])


@pytest.mark.parametrize("bad", [[], [1.0], [[1]], [["a"]], [[np.nan]], [[np.inf]], np.ones((1, 1, 1)), [[1.0], []]])
@pytest.mark.parametrize("function", [l2_normalise, lambda v: truncate(v, 1), lambda v: pool_tokens(v, 1)])
def test_not_a_multi_vector(function, bad) -> None:
    with pytest.raises((ConfigError, ValueError)):
        function(bad)


# -- Matryoshka --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 127, 128])
def test_truncation_keeps_the_first_components(dim: int) -> None:
    rows = unit(40, 128)
    short = truncate(MultiVector(rows), dim)
    assert short.shape == (40, dim)
    assert short.dtype == np.float32
    head = rows[:, :dim].astype(np.float64)
    np.testing.assert_allclose(short, head / np.linalg.norm(head, axis=1, keepdims=True), atol=1e-6)


def test_dim_beyond_the_width() -> None:
    with pytest.raises(DimensionError) as caught:
        truncate(unit(2, 8), 9)
    assert (caught.value.expected, caught.value.actual) == (9, 8)


@pytest.mark.parametrize("dim", [0, -1, 1.5, "8", None])
def test_bad_dim(dim) -> None:
    with pytest.raises(ConfigError, match="dim: expected"):
        truncate(unit(2, 8), dim)


def test_a_row_that_truncation_makes_zero() -> None:
    with pytest.raises(ConfigError, match="row 1 is zero in its first 2 components"):
        truncate([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], 2)


# -- pooling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 3, 6, 1000])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 100])
def test_pooled_rows_are_unit_means_of_their_tokens(n: int, factor: int) -> None:
    rows = unit(n, 16)
    pooled, clusters = pool_tokens(rows, factor)
    assert (pooled.dtype, clusters.dtype) == (np.float32, np.int32)
    assert clusters.shape == (n,)
    assert 1 <= len(pooled) <= math.ceil(n / factor)
    assert sorted(set(clusters.tolist())) == list(range(len(pooled)))
    np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), 1, atol=1e-6)
    for j, row in enumerate(pooled):
        mean = rows[clusters == j].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)
    MultiVector(pooled, clusters=clusters)  # what the encoder makes of them


def test_pooled_rows_are_in_the_order_of_their_first_tokens() -> None:
    _, clusters = pool_tokens(unit(200, 8), 4)
    first = [int(np.flatnonzero(clusters == j)[0]) for j in range(clusters.max() + 1)]
    assert first == sorted(first)


@pytest.mark.parametrize("around", [0, 7])
@pytest.mark.parametrize(("n", "factor"), [(2, 2), (9, 4), (150, 3), (300, 6), (64, 64)])
def test_clusters_are_those_of_scipy_on_cosine_distances(n: int, factor: int, around: int) -> None:
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    distance = pytest.importorskip("scipy.spatial.distance")
    rows = unit(n, 24, seed=n)
    if around:
        rows = l2_normalise(unit(around, 24)[np.random.default_rng(n).integers(around, size=n)] + 0.1 * rows)
    _, ours = pool_tokens(rows, factor)
    tree = hierarchy.linkage(distance.pdist(rows.astype(float), metric="cosine"), method="ward")
    theirs = hierarchy.fcluster(tree, math.ceil(n / factor), criterion="maxclust")
    assert len(set(ours)) == len(set(theirs)) == len(set(zip(ours.tolist(), theirs.tolist(), strict=True)))


def test_tokens_that_belong_together_are_found() -> None:
    """Four directions, shuffled, with little noise: every cluster is one of them."""
    rng = np.random.default_rng(3)
    directions = rng.permutation(np.repeat(np.arange(4), 25))
    rows = l2_normalise(np.eye(4, 32)[directions] + 0.01 * rng.standard_normal((100, 32)))
    pooled, clusters = pool_tokens(rows, 25)
    assert len(pooled) == 4
    for j in range(4):
        assert len(set(directions[clusters == j].tolist())) == 1


def test_factor_one_gives_the_input() -> None:
    rows = unit(5, 8)
    pooled, clusters = pool_tokens(rows, 1)
    assert pooled is rows
    assert clusters.tolist() == [0, 1, 2, 3, 4]


def test_the_same_input_gives_the_same_output() -> None:
    rows = np.concatenate([unit(50, 16), unit(50, 16)])  # every distance occurs at least twice
    before = rows.copy()
    one, other = pool_tokens(rows, 3), pool_tokens(rows.copy(), 3)
    assert np.array_equal(one[0], other[0])
    assert np.array_equal(one[1], other[1])
    assert np.array_equal(rows, before)


def test_tokens_that_cancel_out_become_their_first() -> None:
    row = unit(1, 16)
    pooled, clusters = pool_tokens(np.concatenate([-row, row]), 2)
    np.testing.assert_allclose(pooled, -row, atol=1e-6)
    assert clusters.tolist() == [0, 0]


def test_equal_tokens_become_one() -> None:
    pooled, clusters = pool_tokens(np.repeat(unit(1, 16), 9, axis=0), 3)
    np.testing.assert_allclose(pooled, unit(1, 16), atol=1e-6)
    assert not clusters.any()


@pytest.mark.parametrize("factor", [0, -2, 1.5, "2", None])
def test_bad_factor(factor) -> None:
    with pytest.raises(ConfigError, match="factor: expected"):
        pool_tokens(unit(4, 8), factor)


def test_zero_row_in_pooling() -> None:
    with pytest.raises(ConfigError, match="row 1 is zero"):
        pool_tokens([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], 2)
