"""Agents that look at pages, and a hundred questions at once: the right picture arrives, and the loop goes on."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.runnables import Runnable, RunnableParallel, RunnablePassthrough
from langchain_core.tools import BaseTool
from pydantic import PrivateAttr

from colqwen3_retrievers import ColQwen3Encoder, PageIndex
from colqwen3_retrievers.engines.torch.engine import TorchEngine
from colqwen3_retrievers.langchain import (
    ColQwen3Reranker,
    ColQwen3Retriever,
    ColQwen3VectorStore,
    create_page_retriever_tool,
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
)

pytest.importorskip("langchain_classic")
from langchain_classic.retrievers import ContextualCompressionRetriever, EnsembleRetriever


def ids(documents: Sequence[Document]) -> list[str | None]:
    return [document.id for document in documents]


def expected(encoder: ColQwen3Encoder, k: int) -> dict[str, str]:
    return named_scans(best_pages(encoder, QUESTION, k))


class LookingChat(ScriptedChat):
    """A chat model that calls its tool once, and then answers with what it was shown: each name and its picture."""

    _tools: list[str] = PrivateAttr(default_factory=list)

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, Any]:
        self._tools = [tool.name for tool in tools]
        return self

    def answer(self, messages: list[BaseMessage]) -> AIMessage:
        results = [message for message in messages if isinstance(message, ToolMessage)]
        if results:
            shown = images_of(results[-1].content_blocks)
            return AIMessage(json.dumps({name: digest(image) for name, image in shown.items()}))
        question = next(message for message in messages if isinstance(message, HumanMessage))
        return AIMessage("", tool_calls=[{"name": self._tools[0], "args": {"query": question.text}, "id": "call-1"}])


def by_hand(tool: BaseTool) -> dict[str, str]:
    """The loop that every agent framework of LangChain runs: bind, call, hand the message back."""
    model = LookingChat().bind_tools([tool])
    messages: list[BaseMessage] = [HumanMessage(QUESTION)]
    first = model.invoke(messages)
    messages += [first, *[tool.invoke(call) for call in first.tool_calls]]
    return json.loads(model.invoke(messages).text)


def by_create_agent(tool: BaseTool) -> dict[str, str]:
    from langchain.agents import create_agent

    agent, question = create_agent(LookingChat(), [tool]), {"messages": [HumanMessage(QUESTION)]}
    results = [agent.invoke(question), asyncio.run(agent.ainvoke(question))]
    answers = [json.loads(result["messages"][-1].text) for result in results]
    assert answers[0] == answers[1]
    return answers[0]


@pytest.mark.parametrize("ask", [by_hand, pytest.param(by_create_agent, marks=pytest.mark.skipif(
    importlib.util.find_spec("langchain") is None, reason="create_agent is in the package langchain"
))])  # fmt: skip
def test_an_agent_sees_the_right_pages(
    encoder: ColQwen3Encoder, pages: PageIndex, ask: Callable[[BaseTool], dict[str, str]]
) -> None:
    retriever = ColQwen3Retriever(index=pages, k=3)
    assert ask(create_page_retriever_tool(retriever, "search_pages", "Search the scans.")) == expected(encoder, 3)
    reranked = ContextualCompressionRetriever(
        base_compressor=ColQwen3Reranker(encoder=encoder, index=pages, top_n=1),
        base_retriever=ColQwen3Retriever(index=pages, k=PAGES),
    )
    assert ask(create_page_retriever_tool(reranked, "search_pages", "Search the scans.")) == expected(encoder, 1)


def test_an_ensemble_ranks_by_reciprocal_ranks(encoder: ColQwen3Encoder, pages: PageIndex) -> None:
    ours = ColQwen3Retriever(index=pages, k=3)
    first, second, third = ours.invoke(QUESTION)
    alone = Document("a note", id="note")
    ensemble = EnsembleRetriever(retrievers=[ours, FixedRetriever(documents=[third, alone])], weights=[0.5, 0.5], c=60)
    scores = {
        third.id: 0.5 / 63 + 0.5 / 61, first.id: 0.5 / 61, second.id: 0.5 / 62, alone.id: 0.5 / 62,
    }  # fmt: skip
    wanted = sorted(scores, key=lambda name: -scores[name])
    for documents in (ensemble.invoke(QUESTION), asyncio.run(ensemble.ainvoke(QUESTION))):
        assert [document.id for document in documents] == wanted
        assert {document.metadata.get("page") for document in documents} == {*best_pages(encoder, QUESTION, 3), None}


def test_a_reranker_takes_what_the_vector_store_holds(encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    """Documents that were added as documents are known by their id; nothing but the question is encoded."""
    with ColQwen3VectorStore(tmp_path / "index", encoder) as store:
        store.add_documents([Document("", id=f"scan {n}", metadata={"image": scan(n)}) for n in (1, 2, 3)])
        store.add_texts(["revenue rose"], ids=["note"])
        found = store.similarity_search(QUESTION)
        before = encoder.stats.inputs
        ranked = ColQwen3Reranker(encoder=encoder, index=store.index, top_n=None).compress_documents(found, QUESTION)
        assert encoder.stats.inputs - before == 1
        assert [document.id for document in ranked] == [document.id for document in found]


# -- a hundred at once -------------------------------------------------------------------------------------------------

TICKS_A_BATCH = 3


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count of ticks on the event loop. While the loop runs, the engine does no batch before three more have come."""
    count = [0, 0]  # ticks, batches
    stood_still = threading.Event()
    embed = TorchEngine.embed
    lock = threading.Lock()

    def wait_for_ticks(self: TorchEngine, inputs: Any) -> Any:
        if running.is_set():
            with lock:
                count[1] += 1
            wanted, end = count[0] + TICKS_A_BATCH, time.monotonic() + 20
            while count[0] < wanted and not stood_still.is_set():
                if time.monotonic() > end:
                    stood_still.set()
                time.sleep(0.0005)
            assert not stood_still.is_set(), "the event loop stood still while the engine worked"
        return embed(self, inputs)

    monkeypatch.setattr(TorchEngine, "embed", wait_for_ticks)
    return count


running = threading.Event()


@pytest.mark.parametrize("how", ["retriever", "vector store", "tool", "chain", "retriever.abatch", "chain.abatch"])
def test_a_hundred_questions_at_once_leave_the_loop_ticking(
    encoder: ColQwen3Encoder, pages: PageIndex, ticks: list[int], how: str
) -> None:
    retriever: Any = ColQwen3Retriever(index=pages, k=2)
    if how == "vector store":
        retriever = ColQwen3VectorStore(pages).as_retriever(search_kwargs={"k": 2})
    if how.startswith("chain"):
        reranker = ColQwen3Reranker(encoder=encoder, index=pages)
        retriever = RunnableParallel(documents=retriever, query=RunnablePassthrough()) | reranker.as_runnable()
    questions = [f"what was the revenue in {1924 + n}?" for n in range(100)]
    one_by_one = [ids(retriever.invoke(question)) for question in questions]

    async def ask(question: str) -> list[str | None]:
        if how == "tool":
            tool = create_page_retriever_tool(retriever, "search_pages", "Search.", max_images=0)
            call = {"name": "search_pages", "args": {"query": question}, "id": question, "type": "tool_call"}
            return ids((await tool.ainvoke(call)).artifact)
        return ids(await retriever.ainvoke(question))

    async def tick() -> None:
        while True:
            await asyncio.sleep(0.001)
            ticks[0] += 1

    async def main() -> list[list[str | None]]:
        ticking = asyncio.create_task(tick())
        try:
            if how.endswith("abatch"):
                return [ids(documents) for documents in await retriever.abatch(questions)]
            return list(await asyncio.gather(*map(ask, questions)))
        finally:
            ticking.cancel()

    running.set()
    try:
        together = asyncio.run(main())
    finally:
        running.clear()
    assert together == one_by_one
    assert ticks[1] >= 1
    assert ticks[0] >= TICKS_A_BATCH * ticks[1]
    assert ticks[1] <= 50  # questions that come together are encoded together
