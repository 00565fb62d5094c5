"""Compact codes: what int8 and one bit keep, and that Ward's linkage here is Ward's linkage."""

from __future__ import annotations

import numpy as np
import pytest

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.vectors.codes import (
    BLOCK,
    SPREAD_WEIGHT,
    code_width,
    page_code,
    quantise,
    query_codes,
)
from colqwen3_retrievers.vectors.compression import ward_clusters
from colqwen3_retrievers.vectors.multi_vector import PackedEmbeddings


def unit_rows(seed: int, n: int, dim: int, around: int = 0) -> np.ndarray:
    """Random unit rows, gathered around so many centres when asked."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, dim))
    if around:
        rows = rng.standard_normal((around, dim))[rng.integers(around, size=n)] + 0.4 * rows
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("around", [0, 7])
@pytest.mark.parametrize(("n", "wanted"), [(2, 1), (9, 4), (150, 50), (300, 40), (64, 64), (64, 1)])
def test_clusters_are_those_of_scipy(n: int, wanted: int, around: int) -> None:
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    rows = unit_rows(n, n, 24, around)
    ours = ward_clusters(rows, wanted)
    theirs = hierarchy.fcluster(hierarchy.linkage(rows.astype(float), method="ward"), wanted, criterion="maxclust")
    assert len(set(ours)) == len(set(theirs)) == wanted
    assert len(set(zip(ours.tolist(), theirs.tolist(), strict=True))) == wanted  # the same sets of rows
    assert list(dict.fromkeys(ours.tolist())) == list(range(wanted))  # numbered by their first rows


def test_rows_that_are_all_alike_are_clustered_at_once() -> None:
    rows = np.repeat(unit_rows(0, 3, 8), 500, axis=0)
    code = page_code(rows, 3)
    assert len(np.unique(code.rows, axis=0)) == 3
    assert ward_clusters(np.ones((40, 3)), 5).max() == 4


@pytest.mark.parametrize(
    ("n", "factor", "rows"), [(1, 3, 8), (8, 3, 8), (9, 3, 8), (100, 3, 40), (100, 1, 104), (5000, 6, 840)]
)
def test_a_code_has_a_row_for_so_many_tokens_in_whole_blocks(n: int, factor: int, rows: int) -> None:
    code = page_code(unit_rows(n, n, 16), factor)
    assert code.rows.shape == (rows, code_width(16)) and rows % BLOCK == 0
    assert code.rows.dtype == np.int8 and code.scale > 0


def test_a_code_holds_means_and_spreads() -> None:
    a, b = np.asarray([1.0, 0, 0, 0], np.float32), np.asarray([0, 0, 0.6, 0.8], np.float32)
    turned = np.asarray([np.cos(0.2), np.sin(0.2), 0, 0], np.float32)  # 0.2 rad from a
    rows = np.stack([a, turned] * 12 + [b] * 6)
    code = page_code(rows, 10)  # eight rows for three different ones: nothing to merge
    assert len(code.rows) == 8
    for row in (a, turned, b):
        assert np.abs(code.rows[:, :4] * code.scale - row).max(axis=1).min() <= code.scale
    many = page_code(np.concatenate([unit_rows(1, 200, 4), rows]), 5)
    assert (many.rows[:, 4] >= 0).all() and many.rows[:, 4].max() > 0
    assert not many.rows[:, 5:].any()


def test_an_estimate_is_close_to_maxsim_and_rounding_is_small() -> None:
    page, query = unit_rows(3, 90, 32, around=9), unit_rows(4, 12, 32)
    exact = (query @ page.T).max(axis=1).sum()
    asked = query_codes(PackedEmbeddings.pack([query]))
    for factor, within in ((1, 0.02), (3, 0.12)):
        code = page_code(page, factor)
        products = asked.rows.astype(float) @ code.rows.astype(float).T * asked.scales[:, None] * code.scale
        assert abs(products.max(axis=1).sum() - exact) < within * len(query)
    spread = asked.rows[:, 32] * asked.scales
    np.testing.assert_allclose(spread, 4 * SPREAD_WEIGHT, atol=0.01)


def test_int8_is_within_half_a_step() -> None:
    rows = unit_rows(5, 40, 24)
    codes, scale = quantise(rows)
    assert np.abs(codes * scale - rows).max() <= scale / 2 * 1.0001 and np.abs(codes).max() == 127
    codes, scales = quantise(rows, each_row=True)
    assert (np.abs(codes * scales - rows) <= scales / 2 * 1.0001).all()
    assert (np.abs(codes).max(axis=1) == 127).all()
    for each_row in (False, True):
        assert (quantise(np.zeros((2, 3), np.float32), each_row=each_row)[1] > 0).all()


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match="factor: expected a whole number from 1"):
        page_code([[1.0]], 0)
    with pytest.raises(ConfigError, match="NaN"):
        page_code([[np.nan]], 3)
