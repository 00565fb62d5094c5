"""How a collection is made, what of it is checked, and what cannot be kept in it."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from colqwen3_retrievers import EncoderInfo, MultiVector, Page, open_store
from colqwen3_retrievers.errors import ConfigError, InputTooLongError, StoreError, StoreMismatchError
from colqwen3_retrievers.stores.protocol import Record
from colqwen3_retrievers.stores.qdrant.collection import QdrantOptions, check_width, pool_of, vectors_config
from colqwen3_retrievers.stores.qdrant.store import QdrantStore
from tests.contracts.qdrant_server import QdrantServer, serving
from tests.contracts.store_contract import DIM, INFO, record, tokens


@pytest.fixture
def server() -> Iterator[QdrantServer]:
    with serving() as server:
        yield server


@pytest.fixture
def client() -> Iterator[QdrantClient]:
    client = QdrantClient(":memory:")
    yield client
    client.close()


def make(client: QdrantClient, vectors: Any = None, **changes: Any) -> None:
    """A collection as ours are, but for some changes."""
    own = {"format": 1, "info": INFO.to_dict(), "pool": 3, "graph": 0} | changes
    vectors = vectors if vectors is not None else vectors_config(DIM, pool=3, graph=0)
    client.create_collection("pages", vectors_config=vectors, metadata={"colqwen3_retrievers": own})


def test_what_a_server_is_asked_for(server: QdrantServer) -> None:
    options = QdrantOptions(shards=6, replicas=2, write_consistency=2, graph=16, metadata=["year"])
    open_store(server.address(), info=INFO, options=options).close()
    asked = server.created
    assert (asked["shard_number"], asked["replication_factor"], asked["write_consistency_factor"]) == (6, 2, 2)
    assert asked["on_disk_payload"] is True
    # where= takes any name; where filters on unindexed names are refused by default, they are not here
    assert asked["strict_mode_config"] == {"unindexed_filtering_retrieve": True, "unindexed_filtering_update": True}
    common = {
        "size": DIM, "distance": "Dot", "datatype": "float16", "on_disk": True,
        "multivector_config": {"comparator": "max_sim"},
    }  # fmt: skip
    int8 = {"scalar": {"type": "int8", "always_ram": True}}
    assert asked["vectors"] == {
        "full": common | {"hnsw_config": {"m": 0}},
        "pooled": common | {"hnsw_config": {"m": 16}, "quantization_config": int8},
    }
    own = {"format": 1, "info": INFO.to_dict(), "pool": 3, "graph": 16}
    assert asked["metadata"] == {"colqwen3_retrievers": own}
    assert server.indexes["pages"] == {
        "names": "keyword", "full": "keyword", "image": "keyword", "equal.f_source": "keyword",
        "equal.f_sha256": "keyword", "number.f_number": "integer", "equal.m_year": "keyword",
        "items.m_year": "keyword", "number.m_year": "integer",
    }  # fmt: skip


def test_indexes_that_are_missing_are_made_the_next_time_and_no_other(server: QdrantServer) -> None:
    open_store(server.address(), info=INFO).close()
    del server.indexes["pages"]["image"]
    open_store(server.address(), read_only=True).close()
    assert "image" not in server.indexes["pages"]
    before = len(server.requests)
    open_store(server.address()).close()
    assert [path for method, path, _ in server.requests[before:] if method == "PUT"] == [
        "/collections/pages/index?wait=true"
    ]
    assert server.indexes["pages"]["image"] == "keyword"


def test_nothing_is_made_without_need(server: QdrantServer) -> None:
    for settings in ({}, {"read_only": True}, {"read_only": True, "info": INFO}):
        with pytest.raises(StoreError, match="no index there"):
            open_store(server.address(), **settings)
    assert not server.client.collection_exists("pages")


def test_two_who_make_it_at_once_have_the_same_one(server: QdrantServer) -> None:
    stores: list[Any] = []
    threads = [
        threading.Thread(target=lambda: stores.append(open_store(server.address(), info=INFO))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 4
    stores[0].add([record(1, "p1")])
    assert all(store.ids() == ["p1"] for store in stores)


def without(name: str) -> dict[str, Any]:
    return {vector: params for vector, params in vectors_config(DIM, pool=3, graph=0).items() if vector != name}


def changed(name: str, **changes: Any) -> dict[str, Any]:
    made = vectors_config(DIM, pool=3, graph=0)
    return made | {name: made[name].model_copy(update=changes)}


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        (without("pooled"), "vector 'pooled' is missing"),
        (
            models.VectorParams(size=DIM, distance="Dot"),
            "vectors: expected named ones .full, pooled., found one without",
        ),
        (changed("full", size=8), "vector 'full': size is 8 in the collection, expected 16"),
        (changed("full", distance="Cosine"), "vector 'full': distance is 'Cosine' in the collection, expected 'Dot'"),
        (changed("full", datatype=None), "vector 'full': datatype is None in the collection, expected 'float16'"),
        (changed("full", multivector_config=None), "vector 'full': multivector_config is missing"),
        (changed("full", hnsw_config=models.HnswConfigDiff(m=16)), "vector 'full': hnsw_config: m is 16"),
        (changed("pooled", quantization_config=None), "vector 'pooled': quantization_config is missing"),
    ],
)
def test_a_collection_that_is_otherwise_is_refused_by_the_field(client: QdrantClient, vectors: Any, says: str) -> None:
    make(client, vectors)
    with pytest.raises(StoreMismatchError, match=says):
        QdrantStore("pages", info=INFO, client=client)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (QdrantOptions(pool=6), "pool is 3 in the collection, 6 in the options"),
        (QdrantOptions(pool=0), "pool is 3 in the collection, 0 in the options"),
        (QdrantOptions(graph=16), "graph is 0 in the collection, 16 in the options"),
    ],
)
def test_options_that_are_otherwise_are_refused(client: QdrantClient, options: QdrantOptions, says: str) -> None:
    make(client)
    with pytest.raises(StoreMismatchError, match=says):
        QdrantStore("pages", client=client, options=options)
    QdrantStore("pages", client=client, options=QdrantOptions(pool=3, graph=0)).close()


def test_shards_of_a_server_are_compared_too(server: QdrantServer) -> None:
    open_store(server.address(), info=INFO).close()
    with pytest.raises(StoreMismatchError, match="shards is 1 in the collection, 6 in the options"):
        open_store(server.address(), options=QdrantOptions(shards=6))


def test_collections_of_others_and_of_other_releases(client: QdrantClient) -> None:
    client.create_collection("pages", vectors_config=vectors_config(DIM, pool=3, graph=0))
    with pytest.raises(StoreError, match="not made by this library, or by a server before"):
        QdrantStore("pages", info=INFO, client=client)
    client.delete_collection("pages")
    make(client, format=2)
    with pytest.raises(StoreError, match="format version 2; this release reads version 1"):
        QdrantStore("pages", info=INFO, client=client)


@pytest.mark.parametrize("own", [{}, {"info": None}, {"info": INFO.to_dict(), "pool": "many", "graph": 0}])
def test_what_made_it_is_damaged(client: QdrantClient, own: dict[str, Any]) -> None:
    vectors = vectors_config(DIM, pool=3, graph=0)
    client.create_collection("pages", vectors_config=vectors, metadata={"colqwen3_retrievers": {"format": 1} | own})
    with pytest.raises(StoreError, match="what made it cannot be read"):
        QdrantStore("pages", info=INFO, client=client)


def test_a_server_too_old_to_remember_what_made_it(server: QdrantServer) -> None:
    server.forgets_metadata = True
    with pytest.raises(StoreError, match=r"before Qdrant 1\.16"):
        open_store(server.address(), info=INFO)


@pytest.mark.parametrize("name", ["shards", "replicas", "write_consistency", "pool", "graph", "timeout", "attempts"])
def test_options_are_checked(name: str) -> None:
    for wrong in (-1, 1.5, True, "3"):
        with pytest.raises(ConfigError, match=f"{name}: expected a whole number from"):
            QdrantOptions(**{name: wrong})
    with pytest.raises(ConfigError, match="metadata: expected a list of metadata names"):
        QdrantOptions(metadata="year")


def wide(dim: int, max_visual_tokens: int = 1280, pool_factor: int = 1) -> EncoderInfo:
    return dataclasses.replace(INFO, dim=dim, max_visual_tokens=max_visual_tokens, pool_factor=pool_factor)


def test_pages_that_would_not_fit_are_refused_when_opening(client: QdrantClient) -> None:
    for fits in (wide(128), wide(320), wide(128, 8127), wide(780), wide(2560, pool_factor=4), wide(2560, 345)):
        check_width(fits, "here")
    for too_wide in (wide(2560), wide(781), wide(128, 8128), wide(2560, pool_factor=3), wide(4096, 192)):
        with pytest.raises(ConfigError, match="takes fewer than 1,048,576"):
            QdrantStore("pages", info=too_wide, client=client)
    assert not client.collection_exists("pages")


@pytest.mark.parametrize("info", [wide(2560), wide(4096), wide(320, 16384), wide(2560, 5000, pool_factor=2)])
def test_the_remedies_it_names_are_remedies(info: EncoderInfo) -> None:
    with pytest.raises(ConfigError) as caught:
        check_width(info, "here")
    named = {}
    for name in ("dim", "pool_factor", "max_visual_tokens"):
        named[name] = int(str(caught.value).partition(f"{name}=")[2].split()[0].strip(","))
        check_width(dataclasses.replace(info, **{name: named[name]}), "here")
    for name, step in (("dim", 1), ("pool_factor", -1)):  # and no more is asked for than is needed
        with pytest.raises(ConfigError):
            check_width(dataclasses.replace(info, **{name: named[name] + step}), "here")


def test_a_page_or_query_that_does_not_fit_is_refused_before_anything_is_sent(client: QdrantClient) -> None:
    store = QdrantStore("pages", info=INFO, client=client, options=QdrantOptions(pool=0))
    rows = np.tile(tokens(0, 1), (65_536, 1))
    good, bad = record(1, "good"), Record(Page(id="long"), MultiVector(rows))
    long = r"page 'long': 65,536 tokens of dim 16 .* at most 65,535 tokens of that dim"
    with pytest.raises(InputTooLongError, match=long) as caught:
        store.add([good, bad])
    assert len(store) == 0 and (caught.value.index, caught.value.limit, caught.value.actual) == (1, 65_535, 65_536)
    with pytest.raises(InputTooLongError, match="query: 65,536 tokens"):
        store.search([rows], 1)


def test_pages_that_are_pooled_are_pooled_less() -> None:
    assert [pool_of(wide(128, pool_factor=n), QdrantOptions()) for n in (1, 2, 3, 6)] == [3, 2, 1, 1]
