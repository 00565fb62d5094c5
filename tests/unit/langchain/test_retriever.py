from __future__ import annotations

import asyncio
import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.load import dumps
from langchain_core.runnables import ConfigurableField
from langchain_core.vectorstores import InMemoryVectorStore
from PIL import Image
from pydantic import ValidationError

from colqwen3_retrievers import ColQwen3Encoder, Page, PageIndex, Query
from colqwen3_retrievers.errors import ConfigError, EncodeError, StoreError, StoreMismatchError
from colqwen3_retrievers.langchain import ColQwen3Reranker, ColQwen3Retriever, ColQwen3VectorStore
from tests.checkpoints import make_checkpoint
from tests.frameworks.scans import scan

PAGES = 6


@pytest.fixture(scope="module")
def pages(model_encoder: ColQwen3Encoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageIndex]:
    with PageIndex.open(tmp_path_factory.mktemp("index") / "pages", model_encoder) as made:
        made.add(
            Page(source="a.pdf" if n <= 4 else "b.pdf", number=n, image=scan(n), metadata={"year": 2018 + n})
            for n in range(1, PAGES + 1)
        )
        yield made


@pytest.fixture
def retriever(pages: PageIndex) -> ColQwen3Retriever:
    return ColQwen3Retriever(index=pages)


class Witness(BaseCallbackHandler):
    """Writes down what a retriever tells its callbacks."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.ended: list[tuple[Any, list[Document]]] = []
        self.failed: list[tuple[Any, BaseException]] = []

    def on_retriever_start(self, serialized: Any, query: str, **kwargs: Any) -> None:
        self.started.append({"query": query, **kwargs})

    def on_retriever_end(self, documents: Any, *, run_id: Any, **kwargs: Any) -> None:
        self.ended.append((run_id, documents))

    def on_retriever_error(self, error: BaseException, *, run_id: Any, **kwargs: Any) -> None:
        self.failed.append((run_id, error))


class AsyncWitness(AsyncCallbackHandler):
    def __init__(self) -> None:
        self.inside = Witness()

    async def on_retriever_start(self, *args: Any, **kwargs: Any) -> None:
        self.inside.on_retriever_start(*args, **kwargs)

    async def on_retriever_end(self, *args: Any, **kwargs: Any) -> None:
        self.inside.on_retriever_end(*args, **kwargs)

    async def on_retriever_error(self, *args: Any, **kwargs: Any) -> None:
        self.inside.on_retriever_error(*args, **kwargs)


def same(first: list[Document], second: list[Document]) -> bool:
    """The same documents in the same order, scores equal up to how batches were cut."""
    scores = [[document.metadata["score"] for document in documents] for documents in (first, second)]
    plain = [
        [(d.id, d.page_content, {k: v for k, v in d.metadata.items() if k != "score"}) for d in documents]
        for documents in (first, second)
    ]
    return plain[0] == plain[1] and bool(np.allclose(*scores, atol=1e-4))


@pytest.mark.parametrize("n", [2, 5])
def test_an_image_finds_its_page_by_every_way_in(retriever: ColQwen3Retriever, n: int) -> None:
    asked = Query(image=scan(n))
    results = [
        retriever.invoke(asked),
        asyncio.run(retriever.ainvoke(asked)),
        retriever.batch([asked])[0],
        asyncio.run(retriever.abatch([asked]))[0],
        next(iter(retriever.stream(asked))),
    ]
    for documents in results:
        assert documents[0].metadata["page"] == n
        assert len(documents) == 4
        assert same(documents, results[0])


def test_documents_carry_what_the_index_knows(retriever: ColQwen3Retriever, pages: PageIndex) -> None:
    for document, hit in zip(
        retriever.invoke("what was the revenue?"), pages.search("what was the revenue?", 4), strict=True
    ):
        assert document.id == hit.page.id
        assert type(document.metadata["score"]) is float
        assert document.metadata["score"] == pytest.approx(hit.score, abs=1e-4)
        assert document.metadata["sha256"] == hit.page.sha256
        path = Path(document.metadata["image_path"])
        assert path.is_absolute()
        assert Image.open(path).tobytes() == scan(hit.page.number).tobytes()


def test_k_and_filter_of_a_call_beat_the_fields(pages: PageIndex) -> None:
    retriever = ColQwen3Retriever(index=pages, k=2, filter={"source": "b.pdf"})
    question = "what was the revenue?"
    assert {d.metadata["page"] for d in retriever.invoke(question)} == {5, 6}
    assert len(retriever.invoke(question, k=1)) == 1
    assert {d.metadata["page"] for d in retriever.invoke(question, k=9, filter={"year": {"$lt": 2021}})} == {1, 2}
    assert len(retriever.invoke(question, k=9, filter={})) == PAGES
    assert len(asyncio.run(retriever.ainvoke(question, k=9, filter={}))) == PAGES
    assert [len(documents) for documents in retriever.batch([question] * 2, k=9, filter={})] == [PAGES] * 2
    assert len(retriever.bind(k=1).invoke(question)) == 1


def test_group_by_gives_the_best_page_of_each_source(pages: PageIndex) -> None:
    documents = ColQwen3Retriever(index=pages, group_by="source").invoke("what was the revenue?")
    assert sorted(document.metadata["source"] for document in documents) == ["a.pdf", "b.pdf"]


@pytest.mark.parametrize("query", ["", "  ", None, 7, ["what"]])
def test_what_is_no_query_is_refused(retriever: ColQwen3Retriever, query: Any) -> None:
    with pytest.raises(ConfigError, match="query"):
        retriever.invoke(query)
    with pytest.raises(ConfigError, match="query"):
        asyncio.run(retriever.ainvoke(query))
    with pytest.raises(ConfigError, match="query"):
        retriever.batch(["what was the revenue?", query])


def test_a_wrong_k_or_filter_is_refused_by_name(retriever: ColQwen3Retriever, pages: PageIndex) -> None:
    with pytest.raises(ConfigError, match="k: expected a whole number from 1, got 0"):
        retriever.invoke("x", k=0)
    with pytest.raises(ConfigError, match=r"\$near"):
        retriever.invoke("x", filter={"year": {"$near": 2020}})
    with pytest.raises(TypeError, match="top_k"):
        retriever.invoke("x", top_k=3)
    for wrong in ({"k": 0}, {"top_k": 3}, {"filter": "a.pdf"}, {"encoder": "tiny"}, {"group_by": "year"},
                  {"k": True}, {"k": "2"}, {"window": True}, {"window": "1"}, {"boxes": True}):  # fmt: skip
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            ColQwen3Retriever(index=pages, **wrong)
    with pytest.raises(ValidationError, match="index"):
        ColQwen3Retriever(index=None)


def test_a_folder_is_opened_for_reading_beside_its_writer(pages: PageIndex, model_encoder: ColQwen3Encoder) -> None:
    for given in (pages.location, Path(pages.location)):
        retriever = ColQwen3Retriever(index=given, encoder=model_encoder)
        assert retriever.invoke(Query(image=scan(3)))[0].metadata["page"] == 3
        with pytest.raises(StoreError, match="read_only"):
            retriever.index.add(Page(source="c.pdf", text="x"))
        retriever.index.close()


def test_a_folder_knows_its_model(pages: PageIndex) -> None:
    retriever = ColQwen3Retriever(index=pages.location)
    assert retriever.invoke(Query(image=scan(3)))[0].metadata["page"] == 3
    retriever.index.close()


def test_a_missing_index_and_a_foreign_encoder_are_told_at_once(
    pages: PageIndex, model_encoder: ColQwen3Encoder, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match="nothing-here"):
        ColQwen3Retriever(index=str(tmp_path / "nothing-here"))
    assert not (tmp_path / "nothing-here").exists()
    other = ColQwen3Encoder(make_checkpoint(tmp_path / "other", "tomoro", seed=8).folder, device="cpu")
    with pytest.raises(StoreMismatchError, match="fingerprint"):
        ColQwen3Retriever(index=pages.location, encoder=other)
    with pytest.raises(ValidationError, match="has its own"):
        ColQwen3Retriever(index=pages, encoder=other)
    assert ColQwen3Retriever(index=pages, encoder=model_encoder).encoder is model_encoder


def test_c8_a_batch_is_one_batch(retriever: ColQwen3Retriever, model_encoder: ColQwen3Encoder) -> None:
    queries = [f"what was the revenue in {2000 + n}?" for n in range(20)]
    before = model_encoder.stats.batches
    one_by_one = [retriever.invoke(query) for query in queries]
    assert model_encoder.stats.batches - before == 20
    for together in (retriever.batch, lambda asked: asyncio.run(retriever.abatch(asked))):
        before = model_encoder.stats.batches
        results = together(queries)
        assert model_encoder.stats.batches - before <= 4
        assert all(same(first, second) for first, second in zip(results, one_by_one, strict=True))


def test_a_batch_tells_callbacks_of_every_query(pages: PageIndex) -> None:
    retriever = ColQwen3Retriever(index=pages, tags=["mine"], metadata={"team": "a"}, k=1)
    ids = [uuid4(), uuid4()]
    for runs in ("sync", "async"):
        witness = Witness() if runs == "sync" else AsyncWitness()
        configs = [
            {
                "callbacks": [witness],
                "tags": [f"tag {n}"],
                "metadata": {"n": n},
                "run_id": ids[n],
                "run_name": f"run {n}",
            }
            for n in range(2)
        ]
        asked = ["one", Query("two", image=scan(1))]
        results = retriever.batch(asked, configs) if runs == "sync" else asyncio.run(retriever.abatch(asked, configs))
        seen = witness if isinstance(witness, Witness) else witness.inside
        assert [start["query"] for start in seen.started] == ["one", "[image] two"]
        assert [start["run_id"] for start in seen.started] == ids
        assert [start["name"] for start in seen.started] == ["run 0", "run 1"]
        assert [set(start["tags"]) for start in seen.started] == [{"mine", "tag 0"}, {"mine", "tag 1"}]
        for n, start in enumerate(seen.started):
            assert start["metadata"].items() >= {"team": "a", "n": n, "ls_retriever_name": "colqwen3"}.items()
        assert seen.ended == list(zip(ids, results, strict=True))
        assert seen.failed == []


def test_a_batch_keeps_the_good_queries_of_bad_company(retriever: ColQwen3Retriever, tmp_path: Path) -> None:
    gone = Query(image=tmp_path / "gone.png")
    asked = ["one", "", gone, "two"]
    for runs in ("sync", "async"):
        witness = Witness()
        config = {"callbacks": [witness]}
        if runs == "sync":
            results = retriever.batch(asked, config, return_exceptions=True)
        else:
            results = asyncio.run(retriever.abatch(asked, config, return_exceptions=True))
        assert same(results[0], retriever.invoke("one"))
        assert isinstance(results[1], ConfigError)
        assert isinstance(results[2], EncodeError)
        assert "gone.png" in str(results[2])
        assert same(results[3], retriever.invoke("two"))
        assert [error for _, error in witness.failed] == results[1:3]
        assert [documents for _, documents in witness.ended] == [results[0], results[3]]
    with pytest.raises(ConfigError, match="query"):
        retriever.batch(asked)


def test_what_concerns_all_queries_fails_all_of_them(retriever: ColQwen3Retriever) -> None:
    witness = Witness()
    results = retriever.batch(["one", "two"], {"callbacks": [witness]}, return_exceptions=True, k=0)
    assert [type(result) for result in results] == [ConfigError, ConfigError]
    assert len(witness.failed) == 2
    with pytest.raises(ConfigError, match="k: expected"):
        asyncio.run(retriever.abatch(["one", "two"], k=0))


def test_max_concurrency_bounds_what_goes_together(
    retriever: ColQwen3Retriever, model_encoder: ColQwen3Encoder
) -> None:
    queries = [f"question {n}" for n in range(6)]
    before = model_encoder.stats.batches
    results = retriever.batch(queries, {"max_concurrency": 2})
    assert model_encoder.stats.batches - before >= 3
    assert all(same(first, second) for first, second in zip(results, retriever.batch(queries), strict=True))
    assert len(asyncio.run(retriever.abatch(queries, {"max_concurrency": 4}))) == 6


def test_no_queries_and_no_pages(retriever: ColQwen3Retriever, model_encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    assert retriever.batch([]) == asyncio.run(retriever.abatch([])) == []
    with PageIndex.open(tmp_path / "empty", model_encoder) as made:
        empty = ColQwen3Retriever(index=made)
        assert empty.invoke("x") == []
        assert empty.batch(["x", "y"]) == asyncio.run(empty.abatch(["x", "y"])) == [[], []]


def test_callbacks_see_the_model_and_never_pixels_or_paths(retriever: ColQwen3Retriever) -> None:
    witness = Witness()
    retriever.invoke(Query(image=scan(1)), {"callbacks": [witness]})
    start = witness.started[0]
    assert start["query"] == "[image]"
    assert start["metadata"]["ls_embedding_model"] == "tomoro"
    assert start["metadata"]["ls_embedding_provider"] == "colqwen3-retrievers"
    with pytest.raises(ConfigError):
        retriever.invoke("", {"callbacks": [witness]})
    assert len(witness.failed) == 1


def test_pickle_json_and_copies_carry_settings_only(pages: PageIndex, model_encoder: ColQwen3Encoder) -> None:
    retriever = ColQwen3Retriever(index=pages, k=2, filter={"year": {"$gte": 2020}}, tags=["mine"])
    wanted = retriever.invoke(Query(image=scan(4)))
    data = pickle.dumps(retriever)
    assert len(data) < 2_000
    again = pickle.loads(data)
    assert same(again.invoke(Query(image=scan(4))), wanted)
    assert (again.k, again.filter, again.tags) == (2, {"year": {"$gte": 2020}}, ["mine"])
    again.index.close()
    assert copy.deepcopy(retriever).index is retriever.index
    values = json.loads(ColQwen3Retriever(index=pages, encoder=model_encoder).model_dump_json())
    assert values["index"] == pages.location
    assert values["encoder"] == model_encoder.to_dict()
    assert json.loads(dumps(retriever))["type"] == "not_implemented"
    assert repr(pages) in repr(retriever)


def test_images_of_an_index_may_lie_elsewhere(model_encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    location, elsewhere = tmp_path / "index", tmp_path / "pictures"
    made = ColQwen3VectorStore.from_documents(
        [Document("", metadata={"image": scan(1)}, id="n")], model_encoder, index=location, images_dir=elsewhere
    )
    made.close()
    blind = ColQwen3Retriever(index=location, encoder=model_encoder)
    assert not Path(blind.invoke("revenue")[0].metadata["image_path"]).exists()
    seeing = ColQwen3Retriever(index=location, encoder=model_encoder, images_dir=elsewhere)
    configurable = seeing.configurable_fields(k=ConfigurableField(id="k"))
    store = ColQwen3VectorStore(location, model_encoder, images_dir=elsewhere, read_only=True)
    for documents in (
        seeing.invoke("revenue"),
        pickle.loads(pickle.dumps(seeing)).invoke("revenue"),
        configurable.with_config(configurable={"k": 1}).invoke("revenue"),
        store.similarity_search("revenue"),
    ):
        path = Path(documents[0].metadata["image_path"])
        assert path.is_file()
        assert path.is_relative_to(elsewhere)
    reranker = ColQwen3Reranker(index=location, images_dir=elsewhere, encoder=model_encoder, heatmaps=tmp_path / "heat")
    (ranked,) = reranker.compress_documents([Document("n", id="n")], "revenue")
    assert Path(ranked.metadata["heatmap"]).is_file(), "the picture is the index's"
    for wrong in (
        lambda: ColQwen3Retriever(index=store.index, images_dir=tmp_path / "others"),
        lambda: ColQwen3VectorStore(store.index, images_dir=tmp_path / "others"),
        lambda: ColQwen3Reranker(images_dir=elsewhere),
    ):
        with pytest.raises(ValueError, match="images_dir: "):
            wrong()
    for opened in (blind, seeing, store):
        opened.close()


def test_configurable_fields_share_the_index(pages: PageIndex, model_encoder: ColQwen3Encoder) -> None:
    retriever = ColQwen3Retriever(index=pages.location, encoder=model_encoder)
    chain = retriever.configurable_fields(k=ConfigurableField(id="k"))
    assert len(chain.with_config(configurable={"k": 1}).invoke("x")) == 1
    assert [len(documents) for documents in chain.batch(["x", "y"], {"configurable": {"k": 3}})] == [3, 3]
    retriever.index.close()
    with pytest.raises(StoreError, match="closed"):
        chain.with_config(configurable={"k": 1}).invoke("x")


def test_c2_index_skips_no_page_and_c3_nothing_is_lost(retriever: ColQwen3Retriever) -> None:
    documents = retriever.invoke("what was the revenue?", k=PAGES)
    records = InMemoryRecordManager("pages")
    records.create_schema()
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    added = index(documents, records, store, cleanup="incremental", source_id_key="source", key_encoder="sha256")
    assert (added["num_added"], added["num_skipped"]) == (PAGES, 0)
    kept = {document.metadata["citation"]: document for document in store.similarity_search("x", k=PAGES)}
    for document in documents:
        assert kept[document.metadata["citation"]].metadata == document.metadata
