"""Normalising, Matryoshka truncation and token pooling."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from colqwen3_retrievers.errors import ConfigError, DimensionError, MissingExtraError
from colqwen3_retrievers.vectors.compression import l2_normalise, pool_tokens, truncate
from colqwen3_retrievers.vectors.multi_vector import MultiVector

METHODS = ["hierarchical", "sequential", "kmeans"]


def unit(n: int, dim: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(autouse=True)
def scipy_for_hierarchical(request: pytest.FixtureRequest) -> None:
    if "hierarchical" in request.node.name:
        pytest.importorskip("scipy")


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [2, 3, 6, 1000])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 100])
def test_pooled_rows_are_unit_means_of_their_tokens(n: int, factor: int, method: str) -> None:
    rows = unit(n, 16)
    pooled, clusters = pool_tokens(rows, factor, method=method)
    assert (pooled.dtype, clusters.dtype) == (np.float32, np.int32)
    assert clusters.shape == (n,)
    assert 1 <= len(pooled) <= math.ceil(n / factor)
    assert sorted(set(clusters.tolist())) == list(range(len(pooled)))
    np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), 1, atol=1e-6)
    for j, row in enumerate(pooled):
        mean = rows[clusters == j].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)
    MultiVector(pooled, clusters=clusters)  # what the encoder makes of them


@pytest.mark.parametrize("method", METHODS)
def test_pooled_rows_are_in_the_order_of_their_first_tokens(method: str) -> None:
    _, clusters = pool_tokens(unit(200, 8), 4, method=method)
    first = [int(np.flatnonzero(clusters == j)[0]) for j in range(clusters.max() + 1)]
    assert first == sorted(first)


@pytest.mark.parametrize("n", [1, 2, 7, 100])
@pytest.mark.parametrize("factor", [2, 3, 6])
def test_sequential_pools_consecutive_tokens(n: int, factor: int) -> None:
    _, clusters = pool_tokens(unit(n, 8), factor, method="sequential")
    assert clusters.tolist() == [i // factor for i in range(n)]


def test_hierarchical_finds_what_belongs_together() -> None:
    """Four directions, shuffled, with little noise: every cluster is one of them."""
    rng = np.random.default_rng(3)
    directions = rng.permutation(np.repeat(np.arange(4), 25))
    rows = l2_normalise(np.eye(4, 32)[directions] + 0.01 * rng.standard_normal((100, 32)))
    pooled, clusters = pool_tokens(rows, 25)
    assert len(pooled) == 4
    for j in range(4):
        assert len(set(directions[clusters == j].tolist())) == 1


def test_kmeans_finds_what_belongs_together() -> None:
    rows = unit(4, 32, seed=3)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 6))
    noisy = rows[labels] + 0.05 * unit(24, 32, seed=4)
    _, clusters = pool_tokens(noisy / np.linalg.norm(noisy, axis=1, keepdims=True), 6, method="kmeans")
    assert len(set(zip(labels.tolist(), clusters.tolist(), strict=True))) == len(set(clusters.tolist())) == 4


def test_hierarchical_keeps_more_similarity_than_sequential_on_shuffled_tokens() -> None:
    rng = np.random.default_rng(4)
    rows = l2_normalise(unit(30, 32)[rng.integers(0, 30, 300)] + 0.05 * rng.standard_normal((300, 32)))
    kept = {method: float((rows @ pool_tokens(rows, 5, method=method)[0].T).max(axis=1).mean()) for method in METHODS}
    assert kept["hierarchical"] > kept["sequential"] + 0.1
    assert kept["kmeans"] > kept["sequential"] + 0.1


def test_factor_one_gives_the_input() -> None:
    rows = unit(5, 8)
    for method in METHODS:
        pooled, clusters = pool_tokens(rows, 1, method=method)
        assert pooled is rows
        assert clusters.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_input_gives_the_same_output(method: str) -> None:
    rows = np.concatenate([unit(50, 16), unit(50, 16)])  # every distance occurs at least twice
    before = rows.copy()
    one, other = pool_tokens(rows, 3, method=method), pool_tokens(rows.copy(), 3, method=method)
    assert np.array_equal(one[0], other[0])
    assert np.array_equal(one[1], other[1])
    assert np.array_equal(rows, before)


@pytest.mark.parametrize("method", METHODS)
def test_tokens_that_cancel_out_become_their_first(method: str) -> None:
    row = unit(1, 16)
    pooled, clusters = pool_tokens(np.concatenate([-row, row]), 2, method=method)
    np.testing.assert_allclose(pooled, -row, atol=1e-6)
    assert clusters.tolist() == [0, 0]


@pytest.mark.parametrize("method", METHODS)
def test_equal_tokens_become_one(method: str) -> None:
    pooled, clusters = pool_tokens(np.repeat(unit(1, 16), 9, axis=0), 3, method=method)
    np.testing.assert_allclose(pooled, np.repeat(unit(1, 16), len(pooled), axis=0), atol=1e-6)
    assert clusters.max() == len(pooled) - 1


@pytest.mark.parametrize("factor", [0, -2, 1.5, "2", None])
def test_bad_factor(factor) -> None:
    with pytest.raises(ConfigError, match="factor: expected"):
        pool_tokens(unit(4, 8), factor)


def test_unknown_method() -> None:
    for factor in (1, 2):
        with pytest.raises(ConfigError, match="method: expected"):
            pool_tokens(unit(4, 8), factor, method="spatial")


@pytest.mark.parametrize("method", METHODS)
def test_zero_row_in_pooling(method: str) -> None:
    with pytest.raises(ConfigError, match="row 1 is zero"):
        pool_tokens([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], 2, method=method)


def test_only_the_clustering_needs_scipy(monkeypatch) -> None:
    for name in ("scipy.cluster.hierarchy", "scipy.spatial.distance", "scipy"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"colqwen3-retrievers\[pooling\]"):
        pool_tokens(unit(4, 8), 2)
    assert len(pool_tokens(unit(4, 8), 2, method="sequential")[0]) == 2
