"""Whole LangChain pipelines with a real (tiny, random) model: pages in, page images at a chat model's door."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.output_parsers import JsonOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import Runnable, RunnableParallel, RunnablePassthrough

from colqwen3_retrievers import ColQwen3Encoder, PageIndex, Query
from colqwen3_retrievers.encoding.shared_engine import IN_FLIGHT_PAGES
from colqwen3_retrievers.engines.torch.engine import TorchEngine
from colqwen3_retrievers.errors import EncodeError
from colqwen3_retrievers.langchain import (
    ColQwen3Embeddings,
    ColQwen3Reranker,
    ColQwen3Retriever,
    ColQwen3VectorStore,
    docs_to_content_blocks,
)
from tests.frameworks.scans import digest, scan
from tests.integration.langchain.corpus import (
    PAGES,
    QUESTION,
    FixedRetriever,
    ScriptedChat,
    best_pages,
    images_of,
    named_scans,
    scans,
)
from tests.terminal import open_terminal

pytest.importorskip("langchain_classic")
from langchain_classic.retrievers import ContextualCompressionRetriever, EnsembleRetriever

NOTE = FixedRetriever(documents=[Document(QUESTION.upper(), metadata={"source": "notes.txt"})])


class SeeingChat(ScriptedChat):
    """A chat model that answers with what it was shown: the name before each image, and a digest of its pixels."""

    def answer(self, messages: list[BaseMessage]) -> AIMessage:
        blocks = [block for message in messages for block in message.content_blocks]
        shown = {name: digest(image) for name, image in images_of(blocks).items()}
        return AIMessage(json.dumps({"shown": shown, "question": messages[-1].text}))


def rag(retriever: Runnable[Any, list[Document]], reranker: ColQwen3Reranker | None) -> Runnable[Any, Any]:
    """Build retriever | reranker | prompt | chat model | parser, as one would in LCEL."""
    prompt = ChatPromptTemplate.from_messages(
        [("system", "Answer from the pages, and cite them."), MessagesPlaceholder("pages"), ("human", "{query}")]
    )
    chain = RunnableParallel(documents=retriever, query=RunnablePassthrough())
    if reranker is not None:
        chain = chain | RunnablePassthrough.assign(documents=reranker.as_runnable())
    return (
        chain
        | {"pages": lambda step: [HumanMessage(content_blocks=docs_to_content_blocks(step["documents"]))],
           "query": lambda step: step["query"]}
        | prompt
        | SeeingChat()
        | JsonOutputParser()
    )  # fmt: skip


def expected(numbers: list[int], question: str) -> dict[str, Any]:
    return {"shown": named_scans(numbers), "question": question}


def test_a_chain_brings_the_right_page_images_to_the_chat_model(
    encoder: ColQwen3Encoder, pages: PageIndex, first_stage: PageIndex
) -> None:
    alone = rag(ColQwen3Retriever(index=pages, k=2), None)
    assert alone.invoke(QUESTION) == expected(best_pages(encoder, QUESTION, 2), QUESTION)

    retriever = ColQwen3Retriever(index=first_stage, k=PAGES)
    reranked = rag(retriever, ColQwen3Reranker(encoder=encoder, top_n=2))
    assert [d.metadata["page"] for d in retriever.invoke(QUESTION)][:2] != best_pages(encoder, QUESTION, 2)
    assert reranked.invoke(QUESTION) == expected(best_pages(encoder, QUESTION, 2), QUESTION)


def test_a_batch_of_chains_answers_as_its_single_calls_do(pages: PageIndex) -> None:
    questions = [f"what was the revenue in {2000 + n}?" for n in range(20)]
    chain = rag(ColQwen3Retriever(index=pages, k=2), None)
    one_by_one = [chain.invoke(question) for question in questions]
    assert chain.batch(questions) == one_by_one
    answers = asyncio.run(chain.abatch(questions))
    assert answers == one_by_one


@pytest.fixture
def held_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The engine waits before each batch until it is let go: whoever blocks the loop that lets it go waits in vain."""
    let_go = threading.Event()
    embed = TorchEngine.embed

    def wait_first(self: TorchEngine, inputs: Any) -> Any:
        assert let_go.wait(timeout=10), "the event loop was blocked while the engine worked"
        return embed(self, inputs)

    monkeypatch.setattr(TorchEngine, "embed", wait_first)
    yield let_go
    let_go.set()


def settled(encoder: ColQwen3Encoder) -> int:
    """Count the inputs the engine has encoded once it encodes no more."""
    seen = -1
    while seen != encoder.stats.inputs:
        seen = encoder.stats.inputs
        time.sleep(0.2)
    return seen


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.5])  # while it opens files and submits, and while it waits
def test_cancelling_a_chain_cancels_its_encoding(
    encoder: ColQwen3Encoder, held_engine: threading.Event, after_s: float
) -> None:
    # Pages that are rendered already are encoded all the same; there is room for so many, and these are more.
    documents = [Document(f"text number {n}") for n in range(IN_FLIGHT_PAGES + 40)]
    reranker = ColQwen3Reranker(encoder=encoder)

    async def main() -> None:
        task = asyncio.create_task(reranker.acompress_documents(documents, QUESTION))
        await asyncio.sleep(after_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = encoder.stats.inputs
    asyncio.run(main())
    held_engine.set()
    assert settled(encoder) - before < IN_FLIGHT_PAGES + 10


def test_after_a_bad_document_the_others_are_not_encoded(
    encoder: ColQwen3Encoder, held_engine: threading.Event
) -> None:
    documents = [Document(" "), *(Document(f"other text {n}") for n in range(IN_FLIGHT_PAGES + 40))]
    before = encoder.stats.inputs
    with pytest.raises(EncodeError, match="document 0"):
        ColQwen3Reranker(encoder=encoder).compress_documents(documents, QUESTION)
    held_engine.set()
    assert settled(encoder) - before < IN_FLIGHT_PAGES + 10


def test_contextual_compression_reranks_what_another_model_found(
    encoder: ColQwen3Encoder, first_stage: PageIndex
) -> None:
    pipeline = ContextualCompressionRetriever(
        base_compressor=ColQwen3Reranker(encoder=encoder, top_n=3),
        base_retriever=ColQwen3Retriever(index=first_stage, k=PAGES),
    )
    wanted = best_pages(encoder, QUESTION, 3)
    for documents in (pipeline.invoke(QUESTION), asyncio.run(pipeline.ainvoke(QUESTION))):
        assert [document.metadata["page"] for document in documents] == wanted
        scores = [document.metadata["relevance_score"] for document in documents]
        assert scores == sorted(scores, reverse=True)
        assert all("score" in document.metadata for document in documents)
    three = pipeline.invoke(QUESTION, k=1)
    assert len(three) == 1


def test_c4_an_ensemble_merges_no_two_pages(pages: PageIndex, first_stage: PageIndex) -> None:
    ensemble = EnsembleRetriever(
        retrievers=[ColQwen3Retriever(index=pages, k=PAGES), ColQwen3Retriever(index=first_stage, k=PAGES), NOTE]
    )
    for documents in (ensemble.invoke(QUESTION), asyncio.run(ensemble.ainvoke(QUESTION))):
        assert sorted(d.metadata["page"] for d in documents if "page" in d.metadata) == list(range(1, PAGES + 1))
        assert len(documents) == PAGES + 1


def test_an_ensemble_is_reranked_pages_and_texts_together(encoder: ColQwen3Encoder, pages: PageIndex) -> None:
    pipeline = ContextualCompressionRetriever(
        base_compressor=ColQwen3Reranker(encoder=encoder, index=pages, top_n=None),
        base_retriever=EnsembleRetriever(retrievers=[ColQwen3Retriever(index=pages, k=3), NOTE]),
    )
    before = encoder.stats.inputs
    documents = pipeline.invoke(QUESTION)
    assert len(documents) == 4
    assert encoder.stats.inputs - before == 3  # the query twice and the text; the pages are the index's
    assert all(0 <= document.metadata["relevance_score"] <= 1 for document in documents)


def test_threads_share_one_reranker(encoder: ColQwen3Encoder, first_stage: PageIndex) -> None:
    retriever = ColQwen3Retriever(index=first_stage, k=PAGES)
    reranker = ColQwen3Reranker(encoder=encoder, top_n=2)
    questions = [f"what was the revenue in {2000 + n}?" for n in range(12)]

    def ask(question: str) -> list[int]:
        found = retriever.invoke(question)
        return [document.metadata["page"] for document in reranker.compress_documents(found, question)]

    before = encoder.stats.inputs
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, questions))
    assert encoder.stats.inputs - before == PAGES + len(questions)  # every page once, every question once
    assert answers == [best_pages(encoder, question, 2) for question in questions]


def test_an_image_is_asked_through_a_chain(encoder: ColQwen3Encoder, pages: PageIndex, first_stage: PageIndex) -> None:
    chain = (
        RunnableParallel(documents=ColQwen3Retriever(index=first_stage, k=PAGES), query=RunnablePassthrough())
        | ColQwen3Reranker(encoder=encoder, top_n=1).as_runnable()
    )
    assert [document.metadata["page"] for document in chain.invoke(Query(image=scan(6)))] == [6]
    answers = chain.batch([Query(image=scan(n)) for n in (2, 7)])
    assert [documents[0].metadata["page"] for documents in answers] == [2, 7]


@pytest.mark.parametrize("how", ["invoke", "ainvoke", "batch"])
def test_a_picture_with_words_asks_with_both(pages: PageIndex, encoder: ColQwen3Encoder, how: str) -> None:
    retriever, asked = ColQwen3Retriever(index=pages, k=PAGES), Query("what was the revenue?", scan(2))
    found = {
        "invoke": lambda: retriever.invoke(asked),
        "ainvoke": lambda: asyncio.run(retriever.ainvoke(asked)),
        "batch": lambda: retriever.batch([asked])[0],
    }[how]()
    queries = encoder.encode_queries([asked, Query(image=scan(2))])
    both, alone = encoder.score(queries, encoder.encode_pages(scans()))
    assert [document.metadata["page"] for document in found] == [n + 1 for n in np.argsort(-both, kind="stable")]
    assert [document.metadata["score"] for document in found] == pytest.approx(sorted(both, reverse=True), rel=5e-3)
    assert not np.allclose(both, alone, rtol=2e-2), "the words count"


def test_bars_count_every_document(encoder: ColQwen3Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    ColQwen3Embeddings(encoder=encoder, dimensions=128, show_progress=True).embed_documents(["a", "b", "c"])
    assert terminal.counted == [(3, 3)]
    terminal = open_terminal(monkeypatch)
    with ColQwen3VectorStore(tmp_path / "store", encoder) as store:
        store.add_documents([Document("", metadata={"image": scan(n)}) for n in range(4)], show_progress=True)
        assert terminal.counted == [(4, 4)]
        terminal = open_terminal(monkeypatch)
        store.add_texts(["Revenue rose."])
    assert terminal.getvalue() == "", "nothing is drawn unless requested"


def test_no_key_is_written_or_shown(checkpoint: Path, pages: PageIndex) -> None:
    encoder = ColQwen3Encoder(checkpoint, url="http://127.0.0.1:9", api_key="geheim")
    retriever = ColQwen3Retriever(index=pages.location, encoder=encoder)
    for each in (retriever, ColQwen3Reranker(encoder=encoder), ColQwen3Embeddings(encoder=encoder)):
        assert "127.0.0.1:9" in each.model_dump_json()
        assert "geheim" not in repr(each) + each.model_dump_json() + str(pickle.dumps(each)) + str(each)
    retriever.close()


def test_the_runnable_is_the_reranker(encoder: ColQwen3Encoder, pages: PageIndex) -> None:
    reranker = ColQwen3Reranker(encoder=encoder, top_n=2)
    inputs: Any = {"documents": ColQwen3Retriever(index=pages).invoke(QUESTION), "query": QUESTION}
    step = reranker.as_runnable()
    assert step.get_name() == "ColQwen3Reranker"
    for ranked in (step.invoke(inputs), asyncio.run(step.ainvoke(inputs)), *step.batch([inputs, inputs])):
        assert [document.id for document in ranked] == [
            document.id for document in reranker.compress_documents(**inputs)
        ]
