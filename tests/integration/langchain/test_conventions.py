"""LangChain: what a user of it takes for granted and no other file shows."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document

from colqwen3_retrievers import ColQwen3Encoder, Page, PageIndex, Query
from colqwen3_retrievers.langchain import (
    ColQwen3Embeddings,
    ColQwen3Reranker,
    ColQwen3Retriever,
    ColQwen3VectorStore,
)
from tests.terminal import open_terminal

PAGES = 4


@pytest.fixture
def pages(pictures: Path, encoder: ColQwen3Encoder, tmp_path: Path) -> Iterator[PageIndex]:
    with PageIndex.open(tmp_path / "index", encoder) as index:
        index.add(Page(source=f"{n}.png", image=pictures / f"{n}.png") for n in range(PAGES))
        yield index


def documents(pictures: Path) -> list[Document]:
    return [Document("", metadata={"image_path": str(pictures / f"{n}.png")}) for n in range(PAGES)]


@pytest.mark.parametrize("how", ["invoke", "ainvoke", "batch"])
def test_a_picture_with_words_asks_with_both(
    pages: PageIndex, encoder: ColQwen3Encoder, pictures: Path, how: str
) -> None:
    retriever, asked = ColQwen3Retriever(index=pages), Query("what was the revenue?", pictures / "2.png")
    found = {
        "invoke": lambda: retriever.invoke(asked),
        "ainvoke": lambda: asyncio.run(retriever.ainvoke(asked)),
        "batch": lambda: retriever.batch([asked])[0],
    }[how]()
    queries = encoder.encode_queries([asked, Query(image=pictures / "2.png")])
    both, alone = encoder.score(queries, encoder.encode_images([pictures / f"{n}.png" for n in range(PAGES)]))
    order = np.argsort(-both, kind="stable")
    assert [document.metadata["source"] for document in found] == [f"{n}.png" for n in order]
    scores = [document.metadata["score"] for document in found]
    assert scores == pytest.approx(sorted(both, reverse=True), rel=5e-3)
    assert not np.allclose(both, alone, rtol=2e-2), "the words count"


def test_bars_count_every_document(
    pictures: Path, encoder: ColQwen3Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = open_terminal(monkeypatch)
    ColQwen3Embeddings(encoder=encoder, dimensions=128, show_progress=True).embed_documents(["a", "b", "c"])
    assert terminal.counted == [(3, 3)]
    terminal = open_terminal(monkeypatch)
    with ColQwen3VectorStore(tmp_path / "store", encoder) as store:
        store.add_documents(documents(pictures), show_progress=True)
        assert terminal.counted == [(PAGES, PAGES)]
        terminal = open_terminal(monkeypatch)
        store.add_texts(["Revenue rose."])
    assert terminal.getvalue() == "", "nothing is drawn unless asked for"


def test_ten_questions_encode_each_page_once(pictures: Path, encoder: ColQwen3Encoder) -> None:
    reranker = ColQwen3Reranker(encoder=encoder)
    before = encoder.stats.inputs
    for n in range(10):
        reranker.compress_documents(documents(pictures), f"question {n}")
    assert encoder.stats.inputs - before == 10 + PAGES


def test_no_key_is_written_or_shown(checkpoint: Path, pages: PageIndex) -> None:
    encoder = ColQwen3Encoder(checkpoint, url="http://127.0.0.1:9", api_key="geheim")
    made: list[Any] = [
        ColQwen3Reranker(encoder=encoder), ColQwen3Embeddings(encoder=encoder),
        ColQwen3Retriever(index=pages.location, encoder=encoder),
    ]  # fmt: skip
    for each in made:
        assert "127.0.0.1:9" in each.model_dump_json()
        assert "geheim" not in repr(each) + each.model_dump_json() + str(pickle.dumps(each)) + str(each)
    made[-1].close()


def test_the_runnable_is_the_reranker(pictures: Path, encoder: ColQwen3Encoder) -> None:
    reranker = ColQwen3Reranker(encoder=encoder, top_n=2)
    asked: dict[str, Any] = {"documents": documents(pictures), "query": "revenue"}
    expected = reranker.compress_documents(documents(pictures), "revenue")
    step = reranker.as_runnable()
    assert step.get_name() == "ColQwen3Reranker"
    answers = [step.invoke(asked), asyncio.run(step.ainvoke(asked)), *step.batch([asked, asked])]
    for found in answers:
        assert [document.metadata["image_path"] for document in found] == [
            document.metadata["image_path"] for document in expected
        ]
