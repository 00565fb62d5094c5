"""Agents that look at pages, and a hundred questions at once: the right picture arrives, and the loop goes on."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib.util
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, Page, PageIndex
from colqwen3_retrievers.engines.torch.engine import TorchEngine
from tests.checkpoints import make_checkpoint

pytest.importorskip("langchain_core")
pytest.importorskip("langchain_classic")
from langchain_classic.retrievers import ContextualCompressionRetriever, EnsembleRetriever
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from pydantic import PrivateAttr

from colqwen3_retrievers.langchain import (
    ColQwen3Reranker,
    ColQwen3Retriever,
    ColQwen3VectorStore,
    create_page_retriever_tool,
)

PAGES = 8
QUESTION = "what was the revenue in 2024?"


def picture(seed: int) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((256, 256), Image.Resampling.NEAREST)


def digest(image: Image.Image) -> str:
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ColQwen3Encoder]:
    folder = make_checkpoint(tmp_path_factory.mktemp("models") / "tomoro", "tomoro").folder
    with ColQwen3Encoder(folder, device="cpu") as encoder:
        yield encoder


@pytest.fixture(scope="module")
def pages(encoder: ColQwen3Encoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageIndex]:
    with PageIndex.open(tmp_path_factory.mktemp("index") / "pages", encoder) as made:
        made.add(Page(source="scan.pdf", number=n, image=picture(n)) for n in range(1, PAGES + 1))
        yield made


def best_pages(encoder: ColQwen3Encoder, question: str, k: int) -> list[int]:
    """Page numbers in the order of exact MaxSim, counted here from the images themselves."""
    documents = encoder.encode_images([picture(n) for n in range(1, PAGES + 1)])
    scores = encoder.score(encoder.encode_queries([question]), documents)[0]
    return [int(place) + 1 for place in np.argsort(-scores, kind="stable")[:k]]


def expected(encoder: ColQwen3Encoder, k: int) -> dict[str, str]:
    best = best_pages(encoder, QUESTION, k)
    return {f"[{place}] scan.pdf, page {n}": digest(picture(n)) for place, n in enumerate(best, start=1)}


# -- agents ------------------------------------------------------------------------------------------------------------


class LookingChat(BaseChatModel):
    """A chat model that asks its tool once, and then answers with what it was shown: each name and its picture."""

    _tools: list[str] = PrivateAttr(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "looking"

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, Any]:
        self._tools = [tool.name for tool in tools]
        return self

    def _generate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        seen = [message for message in messages if isinstance(message, ToolMessage)]
        if not seen:
            question = next(message for message in messages if isinstance(message, HumanMessage))
            call = {"name": self._tools[0], "args": {"query": question.text}, "id": "call-1"}
            answer = AIMessage("", tool_calls=[call])
        else:
            shown: dict[str, str] = {}
            name = "no name before this picture"
            for block in seen[-1].content_blocks:
                if block["type"] == "text":
                    name = block["text"]
                else:
                    assert block["type"] == "image"
                    shown[name] = digest(Image.open(io.BytesIO(base64.b64decode(block["base64"]))))
                    name = "no name before this picture"
            answer = AIMessage(json.dumps(shown))
        return ChatResult(generations=[ChatGeneration(message=answer)])


def by_hand(tool: BaseTool) -> dict[str, str]:
    """The loop that every agent framework of LangChain runs: bind, call, hand the message back."""
    model = LookingChat().bind_tools([tool])
    messages: list[BaseMessage] = [HumanMessage(QUESTION)]
    first = model.invoke(messages)
    messages += [first, *[tool.invoke(call) for call in first.tool_calls]]
    return json.loads(model.invoke(messages).text)


def by_create_agent(tool: BaseTool) -> dict[str, str]:
    from langchain.agents import create_agent

    result = create_agent(LookingChat(), [tool]).invoke({"messages": [HumanMessage(QUESTION)]})
    return json.loads(result["messages"][-1].text)


def by_create_agent_async(tool: BaseTool) -> dict[str, str]:
    from langchain.agents import create_agent

    result = asyncio.run(create_agent(LookingChat(), [tool]).ainvoke({"messages": [HumanMessage(QUESTION)]}))
    return json.loads(result["messages"][-1].text)


without_langchain = pytest.mark.skipif(
    importlib.util.find_spec("langchain") is None, reason="create_agent is in the package langchain"
)


@pytest.mark.parametrize(
    "ask",
    [
        by_hand,
        pytest.param(by_create_agent, marks=without_langchain),
        pytest.param(by_create_agent_async, marks=without_langchain),
    ],
)
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


# -- ensembles ---------------------------------------------------------------------------------------------------------


class Words(BaseRetriever):
    """A text retriever beside ours, which knows a page of its own and one of ours."""

    documents: list[Document]

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return self.documents


def test_an_ensemble_ranks_by_reciprocal_ranks(encoder: ColQwen3Encoder, pages: PageIndex) -> None:
    ours = ColQwen3Retriever(index=pages, k=3)
    first, second, third = ours.invoke(QUESTION)
    alone = Document("a note", id="note")
    ensemble = EnsembleRetriever(retrievers=[ours, Words(documents=[third, alone])], weights=[0.5, 0.5], c=60)
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
        store.add_documents([Document("", id=f"scan {n}", metadata={"image": picture(n)}) for n in (1, 2, 3)])
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


@pytest.mark.parametrize("how", ["retriever", "vector store", "tool"])
def test_a_hundred_questions_at_once_leave_the_loop_ticking(pages: PageIndex, ticks: list[int], how: str) -> None:
    retriever: Any = ColQwen3Retriever(index=pages, k=2)
    if how == "vector store":
        retriever = ColQwen3VectorStore(pages).as_retriever(search_kwargs={"k": 2})
    questions = [f"what was the revenue in {1924 + n}?" for n in range(100)]
    one_by_one = [[document.id for document in retriever.invoke(question)] for question in questions]
    tool = create_page_retriever_tool(retriever, "search_pages", "Search.", max_images=0)

    async def ask(question: str) -> list[str | None]:
        if how == "tool":
            call = {"name": "search_pages", "args": {"query": question}, "id": question, "type": "tool_call"}
            return [document.id for document in (await tool.ainvoke(call)).artifact]
        return [document.id for document in await retriever.ainvoke(question)]

    async def tick() -> None:
        while True:
            await asyncio.sleep(0.001)
            ticks[0] += 1

    async def main() -> list[list[str | None]]:
        ticking = asyncio.create_task(tick())
        try:
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
