"""One vector an item, in a real single-vector store, with a tiny random checkpoint."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from pydantic import ValidationError

from colqwen3_retrievers import ColQwen3Encoder, Page, Query
from colqwen3_retrievers.errors import ConfigError, EncodeError
from colqwen3_retrievers.langchain import ColQwen3Embeddings, ColQwen3Reranker, ColQwen3VectorStore, PageLoader
from colqwen3_retrievers.langchain.documents import page_to_document
from colqwen3_retrievers.vectors.single_vector import SingleVectorSettings, single_vector
from tests.frameworks.scans import scan


@pytest.fixture
def embeddings(encoder: ColQwen3Encoder) -> ColQwen3Embeddings:
    return ColQwen3Embeddings(encoder=encoder, dimensions=512)


def close(first: list[list[float]], second: Any) -> bool:
    return bool(np.allclose(first, second, atol=1e-4))


def test_a_vector_is_the_bridge_of_the_multi_vector(embeddings: ColQwen3Embeddings, encoder: ColQwen3Encoder) -> None:
    settings = SingleVectorSettings(encoder.info.dim, dim=512)
    assert embeddings.settings == settings
    texts, images = ["revenue rose", "costs fell"], [scan(1), scan(2)]
    wanted = {
        "texts": [single_vector(made, settings) for made in encoder.encode_texts(texts)],
        "images": [single_vector(made, settings) for made in encoder.encode_images(images)],
        "query": [single_vector(encoder.encode_queries(["revenue?"])[0], settings, is_query=True)],
        "image query": [
            single_vector(encoder.encode_queries([Query(image=images[0])])[0], settings, is_query=True)
        ],
    }  # fmt: skip
    documents = [Document(texts[0]), Document("", metadata={"image": images[1]})]
    made: dict[str, list[list[list[float]]]] = {
        "texts": [embeddings.embed_documents(texts), asyncio.run(embeddings.aembed_documents(texts))],
        "images": [embeddings.embed_image(images), asyncio.run(embeddings.aembed_image(images))],
        "query": [[embeddings.embed_query("revenue?")], [asyncio.run(embeddings.aembed_query("revenue?"))]],
        "image query": [[embeddings.embed_query(Query(image=images[0]))]],
    }
    for name, ways in made.items():
        for rows in ways:
            assert close(rows, wanted[name]), name
            assert all(type(value) is float for row in rows for value in row)
            assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-5)
    both = [wanted["texts"][0], wanted["images"][1]]
    assert close(embeddings.embed_pages(documents), both)
    assert close(asyncio.run(embeddings.aembed_pages(documents)), both)
    assert not close(embeddings.embed_documents(["revenue?"]), wanted["query"])  # a query is no document
    assert embeddings.embed_documents([]) == asyncio.run(embeddings.aembed_image([])) == []


def test_first_stage_in_a_single_vector_store_then_maxsim(
    embeddings: ColQwen3Embeddings, encoder: ColQwen3Encoder, tmp_path: Path
) -> None:
    documents = []
    for n in range(6):
        scan(n).save(tmp_path / f"{n}.png")
        documents.append(Document(f"page {n}", id=str(n), metadata={"image_path": str(tmp_path / f"{n}.png")}))
    store = InMemoryVectorStore(embeddings)
    store.add_documents(documents)
    vectors = embeddings.embed_pages(documents)
    for document, vector in zip(documents, vectors, strict=True):
        store.store[document.id]["vector"] = vector  # this store has no add_embeddings
    asked = Query(image=scan(4))
    found = store.similarity_search_by_vector(embeddings.embed_query(asked), k=6)
    assert found[0].id == "4"
    ranked = ColQwen3Reranker(encoder=encoder, top_n=1).compress_documents(found, asked)
    assert ranked[0].id == "4"


def test_names_of_pages_handed_over_by_a_store_are_told_once(
    embeddings: ColQwen3Embeddings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(3):
        scan(n).save(tmp_path / f"{n}.png")
    documents = PageLoader(tmp_path).load()
    with caplog.at_level(logging.WARNING, logger="colqwen3_retrievers"):
        embeddings.embed_documents(["Revenue rose; see a.pdf, page 1 for more.", "page 1"])
        assert caplog.records == [], "a text that speaks of a page is a text"
        for _ in range(2):
            InMemoryVectorStore(embeddings).add_documents(documents)
        asyncio.run(embeddings.aembed_documents([documents[0].page_content]))
    (told,) = (record.getMessage() for record in caplog.records)
    assert "'0.png, page 1'" in told
    assert "embed_pages" in told
    caplog.clear()
    embeddings.embed_pages(documents)
    assert caplog.records == []


@pytest.mark.parametrize("page", [
    Page(source="a.PDF", number=3, label="iv"), Page(id="x", source="b/scan.jpeg"),
    Page(source="a.pdf", text="Revenue rose."),
], ids=repr)  # fmt: skip
def test_every_name_of_a_page_is_known(
    page: Page, embeddings: ColQwen3Embeddings, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="colqwen3_retrievers"):
        embeddings.embed_documents([page_to_document(page).page_content])
    assert len(caplog.records) == 1


def test_one_encoder_is_shared(embeddings: ColQwen3Embeddings, encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    assert embeddings.page_encoder is encoder
    store = ColQwen3VectorStore.from_texts(["revenue"], embeddings, index=tmp_path / "index")
    assert store.index.encoder is encoder
    ColQwen3VectorStore.from_texts(["costs"], ColQwen3Embeddings(encoder=encoder), index=store.index)
    assert len(store.index) == 2
    data = pickle.dumps(store)
    assert len(data) < 2_000
    again = pickle.loads(data)
    assert again.similarity_search("revenue", k=2) == store.similarity_search("revenue", k=2)
    assert again.index is not store.index
    again.index.close()
    store.close()
    by_name = ColQwen3Embeddings("tiny")
    assert by_name.page_encoder is by_name.page_encoder
    assert repr(by_name.page_encoder) == "ColQwen3Encoder(model='tiny')"
    by_name.model = "elsewhere"
    assert "elsewhere" in repr(by_name.page_encoder)


def test_fingerprints_tell_what_compares(embeddings: ColQwen3Embeddings, encoder: ColQwen3Encoder) -> None:
    seen = {embeddings.fingerprint}
    for change in ({"dimensions": 256}, {"method": "directions"}, {"seed": 1}, {"nearest": 4}):
        seen.add(ColQwen3Embeddings(encoder=encoder, **{"dimensions": 512, **change}).fingerprint)
    assert len(seen) == 5
    assert ColQwen3Embeddings(encoder=encoder, dimensions=512).fingerprint == embeddings.fingerprint


def test_copies_carry_settings_only(embeddings: ColQwen3Embeddings, encoder: ColQwen3Encoder) -> None:
    assert isinstance(embeddings, Embeddings)
    data = pickle.dumps(embeddings)
    assert len(data) < 1_000
    assert close([pickle.loads(data).embed_query("revenue?")], [embeddings.embed_query("revenue?")])
    assert copy.deepcopy(embeddings).page_encoder is encoder
    assert json.loads(embeddings.model_dump_json())["encoder"] == encoder.to_dict()


def test_what_cannot_be_embedded_is_refused(embeddings: ColQwen3Embeddings, encoder: ColQwen3Encoder) -> None:
    for call, says in (
        (lambda: embeddings.embed_query(" "), "query: give a text"),
        (lambda: embeddings.embed_query(7), "query: expected a non-empty text or a Query, got 7"),
        (lambda: asyncio.run(embeddings.aembed_query("")), "query: give a text"),
        (lambda: embeddings.embed_documents("abc"), "texts: expected a list, got str"),
        (lambda: embeddings.embed_documents(["a", 7]), "text 1.*expected text as a string, got int"),
        (lambda: embeddings.embed_image("a.png"), "uris: expected a list"),
        (lambda: embeddings.embed_image([7]), "image 0"),
        (lambda: embeddings.embed_pages([Document("a"), Document(" ")]), "document 1: neither a text nor an image"),
        (lambda: embeddings.embed_pages(["a"]), "documents: 0 is a str, expected a Document"),
        (lambda: embeddings.embed_pages([Document("", metadata={"image": {"url": "https://e.com/a.png"}})]), "fetched"),
    ):
        with pytest.raises(ConfigError, match=says):
            call()
    for ask in (
        lambda: embeddings.embed_documents(["a", " "]),
        lambda: asyncio.run(embeddings.aembed_documents(["a", " "])),
        lambda: embeddings.embed_image([scan(1), b"no picture"]),
    ):
        with pytest.raises(EncodeError) as caught:
            ask()
        assert caught.value.index == 1
    wrong: tuple[dict[str, Any], ...] = (
        {"dimensions": 0}, {"method": "mean"}, {"method": "fde", "dimensions": 100}, {"nearest": 3000}, {"size": 3},
        {"encoder": encoder, "device": "cpu"}, {"encoder": "tiny"}, {"seed": -1},
        {"dimensions": "2048"}, {"nearest": True}, {"seed": "0"},
    )  # fmt: skip
    for fields in wrong:
        with pytest.raises(ValidationError):
            ColQwen3Embeddings(**fields)
