"""What the store in Qdrant does beyond the contract: one call a search, filters it cannot say, and what was written."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from colqwen3_retrievers import MultiVector, Page, open_store
from colqwen3_retrievers.errors import ConfigError, StoreError
from colqwen3_retrievers.stores.protocol import Record
from colqwen3_retrievers.stores.qdrant import store as qdrant
from colqwen3_retrievers.stores.qdrant.collection import MAX_FLOATS, QdrantOptions
from colqwen3_retrievers.stores.qdrant.filters import has_ids, point_id
from colqwen3_retrievers.stores.qdrant.points import make_point, requests
from colqwen3_retrievers.stores.qdrant.store import QdrantStore, make_request, weigh
from colqwen3_retrievers.stores.where import matches
from tests.contracts.qdrant_server import QdrantServer, serving
from tests.contracts.store_contract import INFO, by_loops, ids_of, record, tokens


@pytest.fixture
def server() -> Iterator[QdrantServer]:
    with serving() as server:
        yield server


@pytest.fixture
def store() -> Iterator[QdrantStore]:
    client = QdrantClient(":memory:")
    with QdrantStore("pages", info=INFO, client=client) as store:
        yield store
    client.close()


def queries_sent(server: QdrantServer) -> list[Any]:
    return [body["searches"] for _, path, body in server.requests if path.startswith("/collections/pages/points/query")]


def test_a_search_is_one_call(server: QdrantServer) -> None:
    store = open_store(server.address(), info=INFO)
    store.add([record(n, f"p{n}", metadata={"even": n % 2 == 0}) for n in range(20)])
    before = len(server.requests)
    store.search([tokens(1), tokens(2)], 3, where={"even": True})
    assert len(server.requests) - before == 1
    for search, query in zip(queries_sent(server)[-1], (tokens(1), tokens(2)), strict=True):
        first = search["prefetch"]
        assert (search["using"], first["using"], first["limit"]) == ("full", "pooled", 100)
        assert first["params"]["quantization"] == {"rescore": False}
        assert first["filter"] == search["filter"] is not None
        np.testing.assert_allclose(search["query"]["nearest"], query, rtol=0, atol=1e-9)
        assert "record" in search["with_payload"] and not search.get("with_vector")


def test_a_search_after_a_check_for_emptiness_is_one_call(server: QdrantServer) -> None:
    writer = open_store(server.address(), info=INFO)
    assert writer.is_empty()
    writer.add([record(n) for n in range(5)])
    store = open_store(server.address())
    calls = []
    for _ in range(3):
        before = len(server.requests)
        assert not store.is_empty()
        assert len(store.search([tokens(1)], 3)[0]) == 3
        calls.append([path.partition("?")[0].rpartition("points/")[2] for _, path, _ in server.requests[before:]])
    assert calls == [["scroll", "query/batch"], ["query/batch"], ["query/batch"]]
    scroll = [body for _, path, body in server.requests if "scroll" in path][-1]
    assert scroll["limit"] == 1 and scroll["with_payload"] is False and not scroll.get("with_vector")
    assert store.delete(where={"source": "a.pdf"}) == 5 and store.is_empty()


def test_an_exact_search_scores_every_page(server: QdrantServer) -> None:
    store = open_store(server.address(), info=INFO)
    store.add([record(n) for n in range(5)])
    store.search([tokens(1)], 3, exact=True)
    (search,) = queries_sent(server)[-1]
    assert "prefetch" not in search and search["params"]["exact"] is True


def test_candidates_grow_with_what_is_asked_for(server: QdrantServer) -> None:
    store = open_store(server.address(), info=INFO, options=QdrantOptions(candidates=7))
    store.add([record(n) for n in range(5)])
    store.search([tokens(1)], 60)
    (search,) = queries_sent(server)[-1]
    assert search["prefetch"]["limit"] == 7 * search["limit"] == 7 * 61


@pytest.mark.parametrize("version", ["1.20.0", "1.19.2", "1.9.0", "2.0.1", "master"])
def test_parts_of_texts_are_found_by_every_server(version: str) -> None:
    with serving(version=version) as server:
        store = open_store(server.address(), info=INFO)
        store.add([record(n, f"p{n}", text=f"page {n} of the report", metadata={"name": f"N{n}"}) for n in range(12)])
        assert store.ids({"text": {"$itext": "E 1"}}) == ["p1", "p10", "p11"]
        assert ids_of(store.search([tokens(3)], 9, where={"name": {"$contains": "N3"}})[0]) == ["p3"]
        sent = any("substring" in str(body) for _, _, body in server.requests)
        assert sent == (version in ("1.20.0", "2.0.1"))


def test_what_qdrant_cannot_say_is_filtered_here(store: QdrantStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdrant, "_IDS_A_FILTER", 3)
    records = [record(n, f"p{n:02}", source=f"s{n % 4}", metadata={"date": f"2024-{1 + n % 12:02}"}) for n in range(40)]
    store.add(records)
    query = tokens(100)
    for where in ({"date": {"$gte": "2024-07"}}, {"$not": {"date": {"$lt": "2024-03"}}, "number": {"$lte": 30}}):
        kept = {r.page.id: r for r in records if matches(where, r.page)}
        assert 5 < len(kept) < 40 and store.ids(where) == sorted(kept)
        expected = sorted((-by_loops(query, np.asarray(r.multi_vector)), name) for name, r in kept.items())
        for k in (1, 4, 50):
            assert ids_of(store.search([query], k, where=where)[0]) == [name for _, name in expected[:k]]
        sources = list(dict.fromkeys(kept[name].page.source for _, name in expected))
        found = store.search([query], 3, where=where, group_by="source")[0]
        assert [match.record.page.source for match in found] == sources[:3]
    assert store.search([query, query], 3, where={"date": {"$gt": "2025"}}) == [[], []]
    assert store.delete(where={"date": {"$gte": "2024-07"}}) == 18 and len(store) == 22


def test_many_equal_pages_do_not_hide_the_first_ones(store: QdrantStore) -> None:
    store.add([Record(Page(id=f"p{n:03}", sha256="0"), MultiVector(tokens(0))) for n in range(90)])
    store.add([Record(Page(id="a", source="s", sha256="0"), MultiVector(tokens(0)))])
    assert ids_of(store.search([tokens(0)], 2)[0]) == ["a", "p000"]
    assert ids_of(store.search([tokens(0)], 2, group_by="source", exact=True)[0]) == ["a", "p000"]


def test_token_embeddings_that_others_changed_are_told(store: QdrantStore) -> None:
    store.add([record(n, f"p{n}") for n in range(3)])
    other = models.PointVectors(id=point_id("p1"), vector={"full": tokens(77, 2).tolist()})
    store._call("update_vectors", collection_name="pages", points=[other])
    with pytest.raises(StoreError, match="token embeddings of 'p1' are not what was written"):
        store.get(["p0", "p1"], vectors=True)
    assert store.get(["p1"])[0].page.id == "p1"


def test_read_only(server: QdrantServer) -> None:
    open_store(server.address(), info=INFO).add([record(1, "p1")])
    reader = open_store(server.address(), read_only=True)
    assert reader.read_only and reader.ids() == ["p1"] and "read_only=True" in repr(reader)
    for change in (lambda: reader.add([record(2)]), lambda: reader.delete(["p1"])):
        with pytest.raises(StoreError, match="opened with read_only=True"):
            change()


def test_many_writers_and_many_readers(server: QdrantServer) -> None:
    stores = [open_store(server.address(), info=INFO) for _ in range(3)]
    for n, store in enumerate(stores):
        store.add([record(n * 10 + i, f"w{n}.{i}") for i in range(3)] + [record(n, "shared")])
    assert all(len(store) == 10 for store in stores)
    assert np.asarray(stores[0].get(["shared"], vectors=True)[0].multi_vector).tobytes() == tokens(2, 3).tobytes()


def test_points_are_cut_into_requests_that_a_server_takes() -> None:
    wide = Record(Page(id="x", sha256="0"), MultiVector(np.tile(tokens(0, 1), (20_000, 1))))
    _, floats = make_point(wide, pool=1)
    assert 2 * 20_000 * 16 < floats < 2 * 20_000 * 16 + 100  # and what else the point says
    batches = list(requests((n, floats) for n in range(5)))
    assert batches == [[0], [1], [2], [3], [4]]
    assert [len(batch) for batch in requests((n, 10) for n in range(600))] == [256, 256, 88]


def test_a_page_larger_than_a_request_is_sent_alone() -> None:
    assert list(requests(iter([("big", 2_000_000), ("small", 10), ("other", 10)]))) == [["big"], ["small", "other"]]


def test_the_same_page_has_the_same_point(store: QdrantStore) -> None:
    store.add([record(1, "p1")])
    store.add([record(2, "p1")])
    assert len(store) == 1 and "p1" in store
    points, _ = store._call("scroll", collection_name="pages", with_vectors=True)
    assert [point.id for point in points] == [point_id("p1")]
    assert set(points[0].vector) == {"full", "pooled"} and len(points[0].vector["pooled"]) < len(
        points[0].vector["full"]
    )


def test_without_candidates_every_search_scores_every_page() -> None:
    client = QdrantClient(":memory:")
    with QdrantStore("pages", info=INFO, client=client, options=QdrantOptions(pool=0)) as store:
        records = [record(n, f"p{n:03}") for n in range(150)]
        store.add(records)
        query = tokens(500)
        scores = sorted((-by_loops(query, np.asarray(r.multi_vector)), r.page.id) for r in records)
        assert ids_of(store.search([query], 10)[0]) == [name for _, name in scores[:10]]
    client.close()


def test_bad_arguments_are_named_before_anything_is_sent(server: QdrantServer) -> None:
    store = open_store(server.address(), info=INFO)
    before = len(server.requests)
    for call in (
        lambda: store.search([tokens(0)], 0),
        lambda: store.search([tokens(0)], 1, where={"a": {"$near": 1}}),
        lambda: store.delete(),
        lambda: store.get("p1"),
        lambda: store.add([record(1, "x"), record(2, "x")]),
    ):
        with pytest.raises(ConfigError):
            call()
    assert len(server.requests) == before


def largest(server: QdrantServer) -> int:
    return max(len(json.dumps(body)) for _, _, body in server.requests)


def test_long_texts_are_cut_into_requests_that_a_server_takes(server: QdrantServer) -> None:
    store = open_store(server.address(), info=INFO)
    store.add([record(n, f"p{n:03}", text="the words of a dense page " * 10_000) for n in range(60)])
    assert len(store) == 60 and largest(server) < 20 * 2**20


def test_long_queries_are_cut_into_requests_that_a_server_takes(server: QdrantServer) -> None:
    store = open_store(server.address(), info=INFO)
    store.add([record(n, f"p{n}") for n in range(5)])
    queries = [np.tile(tokens(n, 5), (2_500, 1)) for n in range(4)]  # as long as pictures: 200,000 floats each
    assert [len(found) for found in store.search(queries, 1)] == [1] * 4
    assert [len(body) for body in queries_sent(server)] == [2, 2]
    assert 8 * 2**20 < largest(server) < 20 * 2**20
    longest = np.tile(tokens(1, 5), (13_107, 1))
    assert 1_048_500 < longest.size < MAX_FLOATS
    assert len(make_request(longest, None, 2, prefetch=100, plain=False).model_dump_json()) < 30 * 2**20


def test_many_ids_in_filters_are_cut_into_requests_that_a_server_takes(server: QdrantServer) -> None:
    asked = [
        make_request(tokens(n), has_ids([str(uuid.uuid4())] * 20_000), 4, prefetch=100, plain=True) for n in range(32)
    ]
    sizes = [sum(len(asked[0].model_dump_json()) for _ in batch) for batch in requests((r, weigh(r)) for r in asked)]
    assert max(sizes) < 20 * 2**20 and len(sizes) < 16


def test_a_point_of_somebody_else_is_named(store: QdrantStore) -> None:
    store.add([record(1, "p1")])
    rows = tokens(1, 2).tolist()
    foreign = models.PointStruct(id=7, vector={"full": rows, "pooled": rows}, payload={"name": "theirs"})
    store._call("upsert", collection_name="pages", points=[foreign])
    for call in (lambda: store.ids(), lambda: store.search([tokens(1)], 3), lambda: store.delete(where={"a": None})):
        with pytest.raises(StoreError, match="point 7 was not written by this library"):
            call()
    assert store.get(["p1"])[0].page.id == "p1"
