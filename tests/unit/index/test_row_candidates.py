"""Several rows a page in somebody's store of single vectors, and exact MaxSim over what it finds."""

from __future__ import annotations

import numpy as np
import pytest

from colqwen3_retrievers import Page, PageIndex
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.index.row_candidates import pooled_rows
from colqwen3_retrievers.vectors.multi_vector import MultiVector

TEXTS = [f"page {n} of {('cats', 'dogs', 'fish')[n % 3]} number{n} word{n % 7}" for n in range(40)]


@pytest.fixture
def index(index: PageIndex) -> PageIndex:
    index.add(Page(id=f"p{n}", source=f"{n % 4}.txt", number=n + 1, text=text) for n, text in enumerate(TEXTS))
    return index


def test_rows_are_unit_means_of_clusters() -> None:
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.standard_normal((16, 16)))[0].astype(np.float32)[:5]
    tokens = np.repeat(centres, 20, axis=0) + 0.01 * rng.standard_normal((100, 16)).astype(np.float32)
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    rows = pooled_rows(tokens, 5)
    assert rows.shape == (5, 16)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert sorted(np.argmax(rows @ centres.T, axis=1).tolist()) == list(range(5))
    assert (rows @ centres.T).max(axis=1).min() > 0.999
    few = tokens[:3]
    assert np.allclose(np.sort(pooled_rows(few, 9) @ few[0]), np.sort(few @ few[0]), atol=1e-6), "no more than tokens"
    assert len(pooled_rows(np.float32([[1, 0], [-1, 0]]), 1)) == 1, "tokens that cancel out leave one row"


def test_a_store_of_single_vectors_finds_candidates_and_rescore_orders_them(index: PageIndex) -> None:
    kept = list(index.candidate_rows(4))
    assert len({row.id for row in kept}) == len(kept)
    assert {row.page_id for row in kept} == set(index.ids())
    assert max(sum(row.page_id == page_id for row in kept) for page_id in index.ids()) <= 4
    assert {row.scheme for row in kept} == {index.row_scheme(4)}
    vectors = np.stack([row.vector for row in kept])  # somebody's store
    for n in (3, 17, 38):
        question = TEXTS[n]
        asked = index.row_queries(question)
        nearest = np.argsort(-(asked @ vectors.T), axis=1)[:, :6]
        candidates = [kept[place].page_id for place in nearest.ravel()]
        assert len(candidates) > len(set(candidates)), "several rows find the same page"
        hits = index.rescore(question, candidates, k=3)
        exact = [hit for hit in index.search(question, k=40, exact=True) if hit.page.id in candidates][:3]
        assert [(hit.page.id, hit.score) for hit in hits] == [(hit.page.id, hit.score) for hit in exact]
        assert hits[0].page.id == f"p{n}"


def test_rescoring_what_is_not_there(index: PageIndex) -> None:
    assert index.rescore("cats", []) == []
    assert index.rescore("cats", ["gone"]) == []
    assert [hit.page.id for hit in index.rescore("cats", ["gone", "p3", "p3"])] == ["p3"]
    with pytest.raises(ConfigError, match="ids"):
        index.rescore("cats", "p3")


def test_rows_of_some_pages_and_wrong_arguments(index: PageIndex) -> None:
    some = {row.page_id for row in index.candidate_rows(2, where={"source": "1.txt"})}
    assert some == {f"p{n}" for n in range(40) if n % 4 == 1}
    for wrong in (0, 2000, True, "16"):
        with pytest.raises(ConfigError, match="rows"):
            index.candidate_rows(wrong)  # type: ignore[arg-type]
    assert index.row_scheme(4) != index.row_scheme(8)


def test_a_multi_vector_asks_for_itself(index: PageIndex) -> None:
    [record] = index.get(["p5"], vectors=True)
    assert record.multi_vector is not None
    asked = index.row_queries(MultiVector(record.multi_vector.vectors))
    assert np.array_equal(asked, record.multi_vector.vectors)
    assert index.rescore(record.multi_vector, index.ids(), k=1)[0].page.id == "p5"
