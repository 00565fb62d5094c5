"""LangChain: where the answer lies on a page, and images at web addresses."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, index
from pydantic import ValidationError

from colqwen3_retrievers import ColQwen3Encoder, Page, PageIndex, Query, similarity_map
from colqwen3_retrievers.errors import ConfigError, EncodeError, PageError
from colqwen3_retrievers.langchain import (
    ColQwen3Embeddings,
    ColQwen3Reranker,
    ColQwen3Retriever,
    ColQwen3VectorStore,
    create_page_retriever_tool,
    docs_to_content_blocks,
    page_key_encoder,
)
from colqwen3_retrievers.pages.images import open_image
from tests.frameworks.evidence_pages import last_token, three_pages_and_a_text
from tests.hashing import HashingEncoder, picture
from tests.image_server import HOST, image_server
from tests.integration.langchain.corpus import FixedRetriever

KEYS = {"boxes", "heatmap", "pooled"}


BOTH_WAYS = pytest.mark.parametrize("asynchronous", [False, True])


@pytest.fixture
def pages(tmp_path: Path) -> Iterator[PageIndex]:
    with three_pages_and_a_text(tmp_path) as index:
        yield index


def call(asynchronous: bool, owner: Any, method: str, *args: Any, **options: Any) -> Any:
    """Call a method, or its async twin."""
    if asynchronous:
        return asyncio.run(getattr(owner, f"a{method}")(*args, **options))
    return getattr(owner, method)(*args, **options)


def piece(n: int) -> Query:
    """The last visual token of page n: columns 16 to 24 of 24, rows 8 to 16 of 16."""
    return Query(image=last_token(n))


def edges(document: Document) -> list[list[float]]:
    return [[box[side] for side in ("left", "top", "right", "bottom")] for box in document.metadata["boxes"]]


@pytest.mark.parametrize("how", ["invoke", "ainvoke", "batch", "abatch"])
def test_the_retriever_says_where_the_answer_lies(pages: PageIndex, tmp_path: Path, how: str) -> None:
    retriever = ColQwen3Retriever(index=pages, boxes=1, heatmaps=tmp_path / "maps")
    asked = [piece(2), piece(3)]
    answers = {
        "invoke": lambda: [retriever.invoke(query) for query in asked],
        "ainvoke": lambda: [asyncio.run(retriever.ainvoke(query)) for query in asked],
        "batch": lambda: retriever.batch(asked),
        "abatch": lambda: asyncio.run(retriever.abatch(asked)),
    }[how]()
    plain = ColQwen3Retriever(index=pages).batch(asked)
    for number, found, bare in zip((2, 3), answers, plain, strict=True):
        assert found[0].metadata["page"] == number
        assert edges(found[0]) == [pytest.approx([2 / 3, 0.5, 1.0, 1.0])]
        assert open_image(found[0].metadata["heatmap"]).size == picture(number).size
        for told, without in zip(found, bare, strict=True):
            text = told.metadata["source"] == "notes.txt"
            assert told.metadata.keys() - without.metadata.keys() == (set() if text else KEYS)
            assert told.page_content == without.page_content
        json.dumps([document.model_dump() for document in found])


SEARCHES: list[tuple[str, dict[str, Any]]] = [
    ("similarity", {}),
    ("similarity", {"window": 1}),
    ("mmr", {"fetch_k": 4}),
    ("similarity_score_threshold", {"score_threshold": 0.0}),
]


@pytest.mark.parametrize(("kind", "settings"), SEARCHES)
@BOTH_WAYS
def test_a_vector_stores_retriever_says_it_too(
    pages: PageIndex, tmp_path: Path, kind: str, settings: dict[str, Any], asynchronous: bool
) -> None:
    store, maps = ColQwen3VectorStore(pages), tmp_path / "maps"
    plain = store.as_retriever(search_type=kind, search_kwargs={"k": 4, **settings})
    told = store.as_retriever(search_type=kind, search_kwargs={"k": 4, **settings, "boxes": 1, "heatmaps": maps})
    asked: Any = piece(2)
    found = call(asynchronous, told, "invoke", asked)
    assert edges(found[0]) == [pytest.approx([2 / 3, 0.5, 1.0, 1.0])]
    assert open_image(found[0].metadata["heatmap"]).size == picture(2).size
    for document, bare in zip(found, plain.invoke(asked), strict=True):
        assert (document.id, document.page_content) == (bare.id, bare.page_content)
        text = bare.metadata["source"] == "notes.txt"
        assert document.metadata.keys() - bare.metadata.keys() == (set() if text else KEYS)


@BOTH_WAYS
def test_searches_with_scores_say_it_and_refuse_what_is_none(pages: PageIndex, asynchronous: bool) -> None:
    store, asked = ColQwen3VectorStore(pages), piece(2)
    found, bare = (
        call(asynchronous, store, "similarity_search_with_score", asked, **options) for options in ({"boxes": 1}, {})
    )
    assert edges(found[0][0]) == [pytest.approx([2 / 3, 0.5, 1.0, 1.0])]
    assert [score for _, score in found] == [score for _, score in bare]
    for wrong in ({"boxes": -1}, {"heatmaps": ""}, {"heatmap": "why"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            store.similarity_search(asked, **wrong)


def test_pages_that_are_pooled_say_so(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    encoder = ColQwen3Encoder(checkpoint, device="cpu", pool_factor=3)
    with encoder, PageIndex.open(tmp_path / "pooled", encoder) as index:
        index.add(Page(id="page", image=pictures / "1.png"))
        [found] = ColQwen3Retriever(index=index, boxes=1).invoke("revenue")
        assert found.metadata["pooled"] is True
        [ranked] = ColQwen3Reranker(index=index, boxes=1).compress_documents([found], "revenue")
        assert ranked.metadata["pooled"] is True


def test_the_reranker_draws_what_the_index_encoded(
    pictures: Path, encoder: ColQwen3Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "scan.png"
    picture(0, 128, 96).save(file)
    with PageIndex.open(tmp_path / "index", encoder, images="reference") as index:
        index.add(Page(id="scan", image=file))
        found = ColQwen3Retriever(index=index).invoke("revenue")
        reranker = ColQwen3Reranker(index=index, boxes=1, heatmaps=tmp_path / "maps")
        assert reranker.compress_documents(found, "revenue")[0].metadata.keys() >= KEYS
        picture(1, 128, 96).save(file)
        [ranked] = reranker.compress_documents(found, "revenue")
        assert ranked.metadata.keys() & KEYS == {"boxes", "pooled"}
        assert "has changed since the page was indexed" in caplog.text


def test_groups_and_neighbours_have_boxes_too(pages: PageIndex) -> None:
    retriever = ColQwen3Retriever(index=pages, k=2, group_by="source", window=1, boxes=2)
    found = retriever.invoke(piece(2))
    assert [document.id for document in found] == ["a.pdf#page=2", "a.pdf#page=1", "a.pdf#page=3", "notes.txt#page=1"]
    assert ["boxes" in document.metadata for document in found] == [True, True, True, False]


def test_what_was_found_can_be_indexed_again_without_its_boxes(pages: PageIndex, tmp_path: Path) -> None:
    found = ColQwen3Retriever(index=pages, boxes=1, heatmaps=tmp_path / "maps").invoke(piece(2))
    bare = ColQwen3Retriever(index=pages).invoke(piece(2))
    assert page_key_encoder(found[0]) == page_key_encoder(bare[0])
    assert ColQwen3VectorStore(pages).add_documents(found) == [document.id for document in found]
    assert all(not KEYS & record.page.metadata.keys() for record in pages.get(pages.ids()))
    other = Document("revenue", id="x", metadata={"boxes": [], "pooled": False, "heatmap": "a.png", "year": 2024})
    ColQwen3VectorStore(pages).add_documents([other, Document("profit", id="y", metadata={"boxes": 3})])
    other_page, own_page = (record.page.metadata.keys() for record in pages.get(["x", "y"]))
    assert other_page & {"year", *KEYS} == {"year"}
    assert "boxes" in own_page


def test_metadata_of_the_same_name_is_the_pages_own_unless_asked(pages: PageIndex) -> None:
    layout = [{"kind": "table", "x": 3}]
    pages.add(Page(source="layout.png", image=picture(9), metadata={"boxes": layout, "heatmap": "mine"}))
    own = ColQwen3Retriever(index=pages, k=1).invoke(piece(9))[0]
    assert (own.metadata["boxes"], own.metadata["heatmap"]) == (layout, "mine")
    told = ColQwen3Retriever(index=pages, k=1, boxes=1).invoke(piece(9))[0]
    assert edges(told) == [pytest.approx([2 / 3, 0.5, 1.0, 1.0])]
    assert told.metadata["heatmap"] == "mine"


def documents_of(pictures: Path) -> list[Document]:
    images = [Document("", id=f"page {n}", metadata={"image_path": str(pictures / f"{n}.png")}) for n in range(3)]
    return [*images, Document("Revenue rose.", id="text", metadata={"boxes": "own"})]


@BOTH_WAYS
def test_the_reranker_says_where_the_answer_lies(
    pictures: Path, encoder: ColQwen3Encoder, tmp_path: Path, asynchronous: bool
) -> None:
    reranker = ColQwen3Reranker(encoder=encoder, top_n=None, boxes=2, heatmaps=tmp_path)
    given, asked = documents_of(pictures), Query(image=pictures / "1.png")
    ranked = call(asynchronous, reranker, "compress_documents", given, asked)
    assert ranked[0].id == "page 1"
    assert len(ranked) == len(given)
    [vectors] = encoder.encode_queries([asked])
    for found in ranked:
        if found.id == "text":
            assert found.metadata["boxes"] == "own"
            assert "heatmap" not in found.metadata
            continue
        file = pictures / f"{str(found.id).removeprefix('page ')}.png"
        made = similarity_map(vectors, encoder.encode_images([file])[0])
        expected = [[box.left, box.top, box.right, box.bottom] for box in made.boxes(top=2)]
        assert edges(found) == [pytest.approx(box, abs=1e-6) for box in expected]
        overlay = np.asarray(made.overlay(open_image(file), boxes=2), dtype=int)
        assert (
            np.abs(np.asarray(open_image(found.metadata["heatmap"]), dtype=int) - overlay).mean() < 0.5
        )  # batches round
    assert all("heatmap" not in document.metadata for document in given), "what is handed in is left as it is"


def test_only_what_is_given_back_is_drawn(pictures: Path, encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    reranker = ColQwen3Reranker(encoder=encoder, top_n=1, heatmaps=tmp_path)
    assert len(reranker.compress_documents(documents_of(pictures), "revenue")) == 1
    assert len(list(tmp_path.iterdir())) <= 1


def test_they_are_settings(pages: PageIndex, encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    reranker = ColQwen3Reranker(encoder=encoder, boxes=2, heatmaps=tmp_path, allow_remote=["Images.Intranet"])
    again = pickle.loads(pickle.dumps(reranker))
    assert (again.boxes, again.heatmaps, again.allow_remote) == (2, tmp_path, ("images.intranet",))
    assert json.loads(reranker.model_dump_json())["boxes"] == 2
    wrong: dict[str, Any]
    for wrong in ({"boxes": -1}, {"heatmaps": 3}, {"allow_remote": "example.org"}, {"scoring": "server", "boxes": 1}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            ColQwen3Reranker(**wrong)
    with pytest.raises(ValidationError, match="boxes"):
        ColQwen3Retriever(index=pages, boxes=-1)


@pytest.fixture
def remote(pictures: Path) -> Iterator[tuple[str, list[str]]]:
    with image_server({f"{n}.png": (pictures / f"{n}.png").read_bytes() for n in range(3)}) as served:
        yield served


def at(url: str, n: int, kind: str = "langchain") -> Document:
    address = f"{url}/{n}.png"
    block = {
        "langchain": {"type": "image", "url": address},
        "openai": {"type": "image_url", "image_url": {"url": address}},
    }
    return Document("", id=f"page {n}", metadata={"image": block[kind]})


@pytest.mark.parametrize("kind", ["langchain", "openai"])
@BOTH_WAYS
def test_the_reranker_fetches_when_it_may(
    kind: str,
    asynchronous: bool,
    pictures: Path,
    encoder: ColQwen3Encoder,
    remote: tuple[str, list[str]],
    tmp_path: Path,
) -> None:
    url, asked = remote
    given, query = [at(url, n, kind) for n in range(3)], Query(image=pictures / "2.png")
    with pytest.raises(EncodeError, match="not fetched"):
        ColQwen3Reranker(encoder=encoder).compress_documents(given, query)
    with pytest.raises(EncodeError, match="no public address"):
        ColQwen3Reranker(encoder=encoder, allow_remote=True).compress_documents(given, query)
    assert asked == []
    reranker = ColQwen3Reranker(encoder=encoder, allow_remote=[HOST], heatmaps=tmp_path)
    ranked = call(asynchronous, reranker, "compress_documents", given, query)
    local = ColQwen3Reranker(encoder=encoder).compress_documents(documents_of(pictures)[:3], query)
    assert [document.id for document in ranked] == [document.id for document in local]
    for there, here in zip(ranked, local, strict=True):
        assert there.metadata["relevance_score"] == pytest.approx(here.metadata["relevance_score"], abs=1e-4)
    assert Path(ranked[0].metadata["heatmap"]).is_file()


def test_what_cannot_be_fetched_is_a_bad_document(encoder: ColQwen3Encoder, remote: tuple[str, list[str]]) -> None:
    url, _ = remote
    given = [at(url, 7), at(url, 0)]
    kept = ColQwen3Reranker(encoder=encoder, allow_remote=[HOST], on_error="keep").compress_documents(given, "x")
    assert [document.id for document in kept] == ["page 0", "page 7"]
    assert "status 404" in kept[1].metadata["rerank_error"]
    with pytest.raises(EncodeError, match="status 404") as caught:
        ColQwen3Reranker(encoder=encoder, allow_remote=[HOST]).compress_documents(given, "x")
    assert caught.value.index == 0


def test_the_store_keeps_what_was_fetched(
    pictures: Path, remote: tuple[str, list[str]], store: ColQwen3VectorStore
) -> None:
    url, asked = remote
    with pytest.raises(ConfigError, match="not fetched"):
        store.add_documents([at(url, 0)])
    with pytest.raises(ConfigError, match="not fetched"):
        store.add_images([f"{url}/0.png"])
    assert asked == []
    store.add_documents([at(url, 0)], allow_remote=[HOST])
    asyncio.run(store.aadd_documents([at(url, 1, "openai")], allow_remote=[HOST]))
    (added,) = store.add_images([f"{url}/2.png"], allow_remote=[HOST])
    assert added == f"{url}/2.png#page=1"
    with pytest.raises(PageError, match="status 404"):
        store.add_images([f"{url}/9.png"], allow_remote=[HOST])
    asked.clear()
    found = {document.id: document for document in store.similarity_search(pictures / "1.png", k=3)}
    for page_id, n in (("page 0", 0), ("page 1", 1), (added, 2)):
        stored = open_image(found[page_id].metadata["image_path"])
        assert np.array_equal(np.asarray(stored), np.asarray(open_image(pictures / f"{n}.png")))
    assert asked == [], "searching fetches nothing"


def test_an_indexing_pipeline_may_fetch(remote: tuple[str, list[str]], store: ColQwen3VectorStore) -> None:
    url, _ = remote
    records = InMemoryRecordManager("remote")
    keys = functools.partial(page_key_encoder, allow_remote=[HOST])
    for expected in (3, 0):
        done = index(
            [at(url, n) for n in range(3)], records, store, cleanup=None, key_encoder=keys,
            upsert_kwargs={"allow_remote": [HOST]},
        )  # fmt: skip
        assert done["num_added"] == expected
    assert len(store.index) == 3


def test_embeddings_fetch_when_they_may(
    encoder: ColQwen3Encoder, pictures: Path, remote: tuple[str, list[str]]
) -> None:
    url, _ = remote
    with pytest.raises(ConfigError, match="not fetched"):
        ColQwen3Embeddings(encoder=encoder, dimensions=256).embed_pages([at(url, 0)])
    embeddings = ColQwen3Embeddings(encoder=encoder, dimensions=256, allow_remote=[HOST])
    [here] = embeddings.embed_image([pictures / "0.png"])
    assert embeddings.embed_pages([at(url, 0)])[0] == pytest.approx(here, abs=1e-5)
    assert asyncio.run(embeddings.aembed_pages([at(url, 0)]))[0] == pytest.approx(here, abs=1e-5)


def test_chat_models_and_agents_are_shown_what_was_fetched(pictures: Path, remote: tuple[str, list[str]]) -> None:
    url, asked = remote
    with pytest.raises(EncodeError, match="not fetched"):
        docs_to_content_blocks([at(url, 1)])
    assert asked == []
    blocks = docs_to_content_blocks([at(url, 1)], allow_remote=[HOST])
    assert [block["type"] for block in blocks] == ["text", "image"]
    assert base64.b64decode(blocks[1]["base64"]) == (pictures / "1.png").read_bytes()  # type: ignore[typeddict-item]
    tool = create_page_retriever_tool(
        FixedRetriever(documents=[at(url, 1)]), "search", "Searches.", allow_remote=[HOST]
    )
    assert tool.invoke({"query": "x"}) == blocks
    assert asyncio.run(tool.ainvoke({"query": "x"})) == blocks
    with pytest.raises(ConfigError, match="allow_remote"):
        create_page_retriever_tool(FixedRetriever(documents=[]), "search", "Searches.", allow_remote="example.org")


def test_a_preview_of_a_web_page_is_never_its_image(remote: tuple[str, list[str]]) -> None:
    url, asked = remote
    article = Document("An article.", metadata={"image": f"{url}/0.png"})
    assert [block["type"] for block in docs_to_content_blocks([article], allow_remote=[HOST])] == ["text"]
    assert asked == []


def test_a_reranker_leaves_nothing_of_another_question(pages: PageIndex, tmp_path: Path) -> None:
    found = ColQwen3Retriever(index=pages, k=4, boxes=1, heatmaps=tmp_path / "maps").invoke(piece(2))
    ranked = ColQwen3Reranker(index=pages, top_n=None, boxes=1).compress_documents(found, "revenue")
    assert len(ranked) == 4
    assert all("heatmap" not in document.metadata for document in ranked)
    assert sum("boxes" in document.metadata for document in ranked) == 3


def test_pages_without_a_picture_are_no_fault(
    hashing: HashingEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with PageIndex.open(tmp_path / "index", hashing, images="none") as index:
        index.add(Page(source="a.pdf", number=n, image=picture(n)) for n in (1, 2))
        found = ColQwen3Retriever(index=index, k=2).invoke(piece(2))
        ranked = ColQwen3Reranker(index=index, boxes=1, heatmaps=tmp_path / "maps").compress_documents(found, "revenue")
    assert [set(document.metadata) & KEYS for document in ranked] == [{"boxes", "pooled"}] * 2
    assert not caplog.records
