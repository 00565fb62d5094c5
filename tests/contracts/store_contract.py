"""What every store promises, as a class to subclass in a module that gives the fixture ``reopen``."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from colqwen3_retrievers import EncoderInfo, MultiVector, Page
from colqwen3_retrievers.errors import ConfigError, DimensionError, StoreError, StoreMismatchError
from colqwen3_retrievers.stores.protocol import MultiVectorStore, Record

DIM = 16
INFO = EncoderInfo("ab12", "test", "tomoro", DIM, 1, 1280, False, 1)


def tokens(seed: int, n_tokens: int = 5) -> np.ndarray:
    """Unit rows that float16 can hold, so that what comes back can be compared bit by bit."""
    rows = np.random.default_rng(seed).standard_normal((n_tokens, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def record(seed: int, id: str | None = None, **page: Any) -> Record:
    source, number = page.pop("source", "a.pdf"), page.pop("number", seed + 1)
    made = Page(id=id, source=source, number=number, sha256=f"{seed:064x}", **page)
    return Record(made, MultiVector(tokens(seed, 1 + seed % 7)))


def by_loops(query: np.ndarray, document: np.ndarray) -> float:
    """MaxSim as its definition reads."""
    return sum(max(float(np.dot(q, d)) for d in document.astype(np.float64)) for q in query.astype(np.float64))


def ids_of(found: list[Any]) -> list[str]:
    return [match.record.page.id for match in found]


class StoreContract:
    """Subclass it with a fixture ``reopen``: a function that opens the one store of the test, always the same."""

    score_tolerance = 1e-5
    """How far a score may be from the sum of maxima in float64."""
    whole_batches = True
    """Whether a search sees all of an ``add`` or nothing of it."""

    @pytest.fixture
    def store(self, reopen: Callable[..., MultiVectorStore]) -> MultiVectorStore:
        return reopen()

    def test_it_is_a_store(self, store: MultiVectorStore) -> None:
        assert isinstance(store, MultiVectorStore)
        assert (len(store), store.ids(), store.info, store.read_only) == (0, [], INFO, False)
        assert store.is_empty()
        assert store.search([tokens(0)], 3) == [[]]
        assert store.search([], 3) == []

    def test_scores_are_maxsim_of_what_it_holds(self, store: MultiVectorStore) -> None:
        records = [record(n) for n in range(40)]
        store.add(records)
        queries = [tokens(100 + n, 1 + n) for n in range(6)]
        for query, matches in zip(queries, store.search(queries, 40), strict=True):
            expected = {r.page.id: by_loops(query, np.asarray(r.multi_vector)) for r in records}
            assert {m.record.page.id: m.score for m in matches} == pytest.approx(expected, abs=self.score_tolerance)
            assert [m.score for m in matches] == sorted((m.score for m in matches), reverse=True)
            assert all(isinstance(m.score, float) and m.record.multi_vector is None for m in matches)

    def test_negative_similarities_rank_as_they_are(self, store: MultiVectorStore) -> None:
        query = tokens(1, 1)
        away = -query
        side = -0.8 * query + 0.6 * np.linalg.svd(query)[2][-1:]
        store.add([Record(Page(id=n, source=n), MultiVector(v)) for n, v in (("away", away), ("side", side))])
        best, worst = store.search([query], 2)[0]
        assert (best.record.page.id, worst.record.page.id) == ("side", "away")
        assert (best.score, worst.score) == pytest.approx((-0.8, -1.0), abs=2e-3)

    def test_equal_scores_are_ordered_by_id(self, store: MultiVectorStore) -> None:
        for name in ("b", "a", "ä", "Z", "\U0001f600", "\uffff", "a1"):
            store.add([Record(Page(id=name), MultiVector(tokens(0)))])
        in_order = sorted(["b", "a", "ä", "Z", "\U0001f600", "\uffff", "a1"])
        for k in range(1, 9):
            assert ids_of(store.search([tokens(9)], k)[0]) == in_order[:k]

    def test_everything_about_a_record_comes_back(self, store: MultiVectorStore) -> None:
        pooled = MultiVector(
            tokens(3, 4),
            content=slice(2, -1),
            visual=slice(1, 7),
            tokens=("<s>", "a", "b", "c", "d", "e", "f", "</s>"),
            grid=(2, 3),
            clusters=np.asarray([0, 0, 1, 1, 2, 2, 3, 3]),
        )
        page = Page(
            "i'd\n\"?", "d/ü.pdf", 7, "iv", None, "text\0日本", {"a": {"b": [1, None, 2.5]}, "big": 2**70}, "ff"
        )
        store.add([Record(page, pooled, "image reference"), record(1)])
        (back,) = store.get([page.id], vectors=True)
        for name in ("id", "source", "number", "label", "text", "metadata", "sha256"):
            assert getattr(back.page, name) == getattr(page, name)
        assert back.image == "image reference" and back.multi_vector is not None
        assert np.asarray(back.multi_vector).tobytes() == np.asarray(pooled).tobytes()
        assert back.multi_vector.vectors.dtype == np.float32
        for name in ("content", "visual", "tokens", "grid"):
            assert getattr(back.multi_vector, name) == getattr(pooled, name)
        np.testing.assert_array_equal(back.multi_vector.clusters, pooled.clusters)
        assert store.get([page.id])[0].multi_vector is None

    def test_get_keeps_order_and_leaves_out_what_is_not_there(self, store: MultiVectorStore) -> None:
        store.add([record(n, f"p{n}") for n in range(3)])
        asked = ["p2", "nobody", "p0", "p2", "\ud800"]
        assert [r.page.id for r in store.get(asked)] == ["p2", "p0", "p2"]
        assert "p1" in store and "nobody" not in store and 3 not in store
        with pytest.raises(ConfigError, match="got the text 'p1'"):
            store.get("p1")

    def test_adding_an_id_again_replaces_it(self, store: MultiVectorStore) -> None:
        store.add([record(n, f"p{n}", metadata={"v": 1}) for n in range(3)])
        store.add([record(50, "p1", metadata={"w": 2}), record(51, "p9")])
        assert len(store) == 4 and store.ids({"v": 1}) == ["p0", "p2"] and store.ids({"w": 2}) == ["p1"]
        assert np.asarray(store.get(["p1"], vectors=True)[0].multi_vector).tobytes() == tokens(50, 2).tobytes()
        found = store.search([tokens(50, 2)], 9)[0]
        assert sorted(ids_of(found)) == ["p0", "p1", "p2", "p9"]
        assert found[0].record.page.id == "p1" and found[0].score == pytest.approx(2, abs=1e-2)

    def test_delete(self, store: MultiVectorStore) -> None:
        store.add([record(n, f"p{n}", metadata={"even": n % 2 == 0}) for n in range(10)])
        assert store.delete(["p1", "nobody", "p1"]) == 1
        assert store.delete(where={"even": True, "number": {"$gt": 5}}) == 2
        assert store.delete(["p0", "p3"], where={"even": True}) == 1
        assert store.ids() == ["p2", "p3", "p4", "p5", "p7", "p9"] == sorted(ids_of(store.search([tokens(0)], 99)[0]))
        assert store.delete([]) == 0 and len(store) == 6
        for nothing in ({}, {"where": {}}):
            with pytest.raises(ConfigError, match="would mean all of them"):
                store.delete(**nothing)
        with pytest.raises(ConfigError, match="got the text 'p2'"):
            store.delete("p2")
        assert store.delete(where={"id": {"$exists": True}}) == 6
        assert (len(store), store.search([tokens(0)], 1)) == (0, [[]])

    def test_it_is_empty_until_something_is_added_and_after_all_is_deleted(
        self, reopen: Callable[..., MultiVectorStore]
    ) -> None:
        store = reopen()
        assert store.is_empty()
        store.add([record(n, f"p{n}") for n in range(3)])
        assert not store.is_empty() and not store.is_empty()
        store.delete(["p0", "p1"])
        assert not store.is_empty()
        store.delete(["p2"])
        assert store.is_empty()
        store.add([record(4, "p4")])
        store.close()
        again = reopen()
        assert not again.is_empty()
        again.close()
        with pytest.raises(StoreError, match="closed"):
            again.is_empty()

    def test_it_knows_the_names_in_its_metadata(self, store: MultiVectorStore) -> None:
        store.add([record(1, "p1", metadata={"year": 1, "author": {"name": "Ada"}, "tags": ["x"], "none": None})])
        names = ("year", "author", "author.name", "tags", "yeer", "none", "number", "x")
        assert [name for name in names if store.has_name(name)] == ["year", "author", "author.name", "tags"]
        store.delete(["p1"])
        assert not store.has_name("year")

    def test_search_within_a_filter(self, store: MultiVectorStore) -> None:
        store.add([record(n, f"p{n:02d}", metadata={"third": n % 3}) for n in range(30)])
        query = tokens(200)
        everything = store.search([query], 30)[0]
        for where in ({"third": 1}, {"id": {"$in": ["p03", "p28"]}}, {"number": {"$gt": 7, "$lte": 12}}, {"third": 9}):
            allowed = set(store.ids(where))
            found = store.search([query], 5, where=where)[0]
            assert [(m.record.page.id, m.score) for m in found] == [
                (m.record.page.id, pytest.approx(m.score, abs=self.score_tolerance))
                for m in everything
                if m.record.page.id in allowed
            ][:5]
        with pytest.raises(ConfigError, match="unknown operator"):
            store.search([query], 5, where={"third": {"$near": 1}})

    def test_the_best_record_of_each_source(self, store: MultiVectorStore) -> None:
        store.add([record(n, f"p{n:03d}", source=f"s{n % 4}") for n in range(60)])
        store.add([Record(Page(id=f"alone{n}"), MultiVector(tokens(300 + n))) for n in range(2)])
        query = tokens(400)
        best: dict[str, tuple[str, float]] = {}
        for match in store.search([query], 99)[0]:
            page = match.record.page
            best.setdefault(page.source or page.id, (page.id, match.score))
        for k in (1, 3, 6, 50):
            found = store.search([query], k, group_by="source")[0]
            assert ids_of(found) == [name for name, _ in best.values()][:k]
            assert [m.score for m in found] == pytest.approx([score for _, score in best.values()][:k], abs=1e-6)
        assert len(best) == 6
        with pytest.raises(ConfigError, match="group_by: expected None or 'source', got 'number'"):
            store.search([query], 1, group_by="number")

    def test_bad_arguments_are_named(self, store: MultiVectorStore) -> None:
        for k in (0, -1, 1.5, True, None):
            with pytest.raises(ConfigError, match="k: expected a whole number from 1"):
                store.search([tokens(0)], k)
        with pytest.raises(DimensionError, match="expected dim 16, got 2"):
            store.search([[[1.0, 0.0]]], 1)
        with pytest.raises(DimensionError, match="page 'x': expected dim 16, got 2"):
            store.add([Record(Page(id="x"), MultiVector(np.eye(2, dtype=np.float32)))])
        for bad, says in (
            ([record(1, "x"), record(2, "x")], "two records with the id 'x'"),
            ([Record(Page(id="x"))], "page 'x': no multi-vector"),
            ([record(1, "\ud800")], "id: not valid Unicode"),
            ([record(1, "x", number=2**63)], "does not fit in 64 bits"),
        ):
            with pytest.raises(ConfigError, match=says):
                store.add([record(7, "good"), *bad])
        assert len(store) == 0

    def test_images_are_those_records_hold(self, store: MultiVectorStore) -> None:
        store.add([dataclasses.replace(record(n, f"p{n}"), image=f"i{n // 2}") for n in range(4)])
        store.add([record(9)])
        assert store.images() == {"i0", "i1"} and store.images(["i1", "i7"]) == {"i1"}
        store.delete(["p2", "p3"])
        assert store.images() == {"i0"}

    def test_reopening_finds_all_of_it(self, reopen: Callable[..., MultiVectorStore]) -> None:
        store = reopen()
        store.add([record(n, f"p{n}") for n in range(5)])
        store.delete(["p0"])
        store.add([record(77, "p1")])
        before = [(m.record.page.id, m.score) for m in store.search([tokens(5)], 9)[0]]
        store.close()
        for info in (INFO, None):
            again = reopen(info=info)
            assert again.info == INFO
            after = again.search([tokens(5)], 9)[0]
            assert ids_of(after) == [name for name, _ in before]
            assert [m.score for m in after] == pytest.approx([score for _, score in before], abs=1e-6)
            again.close()

    def test_a_closed_store_says_so(self, store: MultiVectorStore) -> None:
        store.close()
        store.close()
        for call in (
            lambda: len(store),
            lambda: store.search([tokens(0)], 1),
            lambda: store.add([record(1)]),
            lambda: store.delete(["x"]),
            lambda: store.get(["x"]),
        ):
            with pytest.raises(StoreError, match="closed"):
                call()

    @pytest.mark.parametrize(
        ("field", "value"),
        [("fingerprint", "cd34"), ("family", "ops"), ("dim", 8), ("pool_factor", 3), ("include_text", True),
         ("rendering_version", 2)],
    )  # fmt: skip
    def test_what_cannot_be_compared_is_refused(
        self, reopen: Callable[..., MultiVectorStore], field: str, value: Any
    ) -> None:
        reopen().close()
        other = dataclasses.replace(INFO, model="renamed", **{field: value})
        says = (
            f"{field} is {getattr(INFO, field)!r} in the index, {value!r} in the encoder .model 'test' wrote it, 'rena"
        )
        with pytest.raises(StoreMismatchError, match=says):
            reopen(info=other)
        reopen(info=dataclasses.replace(INFO, model="renamed", verified=False)).close()

    def test_another_resolution_may_search_but_not_add(self, reopen: Callable[..., MultiVectorStore]) -> None:
        store = reopen()
        store.add([record(1)])
        store.close()
        store = reopen(info=dataclasses.replace(INFO, max_visual_tokens=512))
        assert len(store.search([tokens(0)], 1)[0]) == 1
        with pytest.raises(StoreMismatchError, match="max_visual_tokens is 1280 in the index, 512 in the encoder"):
            store.add([record(2)])
        assert len(store) == 1 and store.info.max_visual_tokens == 1280

    def test_threads_search_while_one_adds_and_deletes(self, store: MultiVectorStore) -> None:
        store.add([record(n, f"keep{n}") for n in range(20)])
        wrong: list[str] = []
        stop = threading.Event()

        def search() -> None:
            while not stop.is_set():
                found = store.search([tokens(5)], 99)[0]
                kept = sum(m.record.page.id.startswith("keep") for m in found)
                batch = [m.record.page.id for m in found if m.record.page.id.startswith("new")]
                torn = self.whole_batches and len(batch) not in (0, 8)
                if kept != 20 or torn or any(m.record.page.sha256 == "" for m in found):
                    wrong.append(f"{kept} kept, {len(batch)} of a batch of 8")

        searchers = [threading.Thread(target=search) for _ in range(3)]
        for thread in searchers:
            thread.start()
        for turn in range(30):
            store.add([record(turn * 8 + n, f"new{n}") for n in range(8)])
            if turn % 3 == 2:
                assert store.delete(where={"id": {"$text": "new"}}) == 8
        stop.set()
        for thread in searchers:
            thread.join()
        assert wrong == []
