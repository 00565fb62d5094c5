"""What LlamaIndex and the real adapter for OpenAI send: the pictures that were embedded, where the API takes them."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.generic_utils import image_node_to_image_block
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.llms import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.retrievers.fusion_retriever import FUSION_MODES
from llama_index.core.schema import BaseNode, ImageNode, NodeWithScore

from colqwen3_retrievers import PageIndex, load_pages
from colqwen3_retrievers.llama_index import (
    ColQwen3Retriever,
    MoveToolImages,
    PageNodes,
    PageReader,
    PageRetrieverTool,
    move_tool_images,
    node_from_hit,
    page_from_node,
)
from colqwen3_retrievers.pages.images import open_image
from colqwen3_retrievers.pages.page import Hit, Page
from colqwen3_retrievers.retrieval.chat_images import ChatImages
from tests.frameworks.llama_index_models import RecordingLLM
from tests.hashing import INFO, HashingEncoder, picture
from tests.originals import naive_pixels, write_originals

QUESTION = "what was the revenue?"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    assert len(write_originals(folder, scan=False)) == 15
    return folder


@pytest.fixture(scope="module")
def retriever(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> ColQwen3Retriever:
    """Over an index that refers to its originals, none of which is fit for every chat model."""
    folder = tmp_path_factory.mktemp("index")
    index = PageIndex.open(folder / "index", HashingEncoder(INFO), images="reference")
    index.add(load_pages(originals))
    return ColQwen3Retriever(index, similarity_top_k=20)


def equal(images: Sequence[bytes], nodes: Sequence[NodeWithScore | BaseNode]) -> bool:
    wanted = [np.asarray(open_image(path_of(node))) for node in nodes]
    assert len(wanted) == 15
    return len(images) == 15 and all(map(np.array_equal, map(naive_pixels, images), wanted))


def path_of(node: Any) -> str:
    node = node.node if isinstance(node, NodeWithScore) else node
    return str(node.image_path if isinstance(node, ImageNode) else node.image_resource.path)


def sent(blocks: Sequence[Any]) -> list[bytes]:
    images = [block for block in blocks if isinstance(block, ImageBlock)]
    assert {block.image_mimetype for block in images} <= {"image/png", "image/jpeg", "image/webp"}
    return [block.resolve_image().read() for block in images]


def test_the_content_blocks_of_nodes_hold_what_was_embedded(retriever: ColQwen3Retriever, originals: Path) -> None:
    nodes = retriever.retrieve(QUESTION)
    assert {Path(path_of(node)).parent for node in nodes} == {originals}
    assert equal([data for node in nodes for data in sent(node.node.get_content_blocks())], nodes)  # type: ignore[attr-defined]
    assert equal(sent([image_node_to_image_block(node.node) for node in nodes]), nodes)  # type: ignore[arg-type]
    again = [ImageNode.from_json(node.node.to_json()) for node in nodes]
    assert equal([data for node in again for data in sent(node.get_content_blocks())], again)
    assert [page_from_node(node).image_path for node in again] == [Path(path_of(node)) for node in again], "not reduced"
    documents = PageReader().load_data(originals)
    assert equal([data for document in documents for data in sent(document.get_content_blocks())], documents)
    converted = PageNodes()(documents)
    assert equal([data for node in converted for data in sent(node.get_content_blocks())], converted)
    assert all(page_from_node(node).image_path is not None for node in [*documents, *converted])


def test_a_query_engine_shows_them(retriever: ColQwen3Retriever) -> None:
    llm = RecordingLLM()
    response = RetrieverQueryEngine.from_args(retriever, llm=llm, multimodal=True).query(QUESTION)
    assert equal(llm.images, response.source_nodes)


def test_a_context_chat_engine_shows_text_only(retriever: ColQwen3Retriever) -> None:
    """As documented: a newer LlamaIndex that passes images on changes our docs."""
    llm = RecordingLLM()
    memory = ChatMemoryBuffer.from_defaults(token_limit=100_000)
    ContextChatEngine.from_defaults(retriever=retriever, llm=llm, memory=memory).chat(QUESTION)
    assert llm._asked
    assert llm.images == []


def test_only_what_needs_it_is_carried_and_within_the_given_limits(tmp_path: Path) -> None:
    picture(1, 60, 40).save(tmp_path / "a.png")
    hit = Hit(Page(id="a", image=tmp_path / "a.png"), 1.0)
    node = node_from_hit(hit).node
    assert isinstance(node, ImageNode)
    assert (node.image, node.image_mimetype) == (None, "image/png")
    inline = node_from_hit(hit, inline_image=True).node
    assert base64.b64decode(str(inline.image)) == (tmp_path / "a.png").read_bytes()  # type: ignore[attr-defined]
    small = node_from_hit(hit, chat_images=ChatImages(max_side=30)).node
    assert naive_pixels(base64.b64decode(str(small.image))).shape == (20, 30, 3)  # type: ignore[attr-defined]
    index = PageIndex.open(tmp_path / "index", HashingEncoder(INFO))
    index.add([hit.page])
    retriever = ColQwen3Retriever(index, max_side=30, max_bytes=2000)
    retriever.persist(tmp_path)
    for each in (retriever, ColQwen3Retriever.from_persist_dir(tmp_path, encoder=HashingEncoder(INFO))):  # type: ignore[arg-type]
        [found] = each.retrieve(QUESTION)
        data = base64.b64decode(str(found.node.image))  # type: ignore[attr-defined]
        assert (max(naive_pixels(data).shape), len(data) <= 2000) == (30, True)
        if each is retriever:
            index.close()
    tool = PageRetrieverTool(Fixed(hit), max_side=30, max_bytes=2000, include_text=True)
    assert naive_pixels(sent(tool.call("x").blocks)[0]).shape == (20, 30, 3)


class Fixed(ColQwen3Retriever):
    def __init__(self, *hits: Hit) -> None:
        super(ColQwen3Retriever, self).__init__()
        self.hits = hits

    def _retrieve(self, query_bundle: Any) -> list[NodeWithScore]:
        return [node_from_hit(hit) for hit in self.hits]


def test_text_beside_the_image_where_asked(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    retriever = Fixed(Hit(Page(source="a.pdf", image=tmp_path / "a.png", text="Revenue rose."), 1.0))
    name, image = PageRetrieverTool(retriever).call("x").blocks
    text, same = PageRetrieverTool.from_defaults(retriever, include_text=True).call("x").blocks
    assert text.text == f"{name.text}\n\nRevenue rose."  # type: ignore[union-attr]
    assert image == same


@pytest.mark.parametrize("mode", list(FUSION_MODES))
def test_fusion_takes_neighbours_in_every_mode(tmp_path: Path, mode: FUSION_MODES) -> None:
    with PageIndex.open(tmp_path / "index", HashingEncoder(INFO)) as index:
        texts = ["tax", "tax and revenue", "revenue rose", "wine"]
        index.add(Page(source="a.pdf", number=number, text=text) for number, text in enumerate(texts, start=1))
        retrievers: list[Any] = [ColQwen3Retriever(index, similarity_top_k=1, window=window) for window in (1, 2)]
        fusion = QueryFusionRetriever(
            retrievers, llm=MockLLM(), mode=mode, num_queries=1, similarity_top_k=9, use_async=False
        )
        nodes = fusion.retrieve("revenue rose")
    assert [node.node_id for node in nodes][:2] == ["a.pdf#page=3", "a.pdf#page=2"]
    assert {type(node.score) for node in nodes} == {float}
    assert len(nodes) == 4


# -- the adapter for OpenAI, which may need a newer LlamaIndex than the one that is tested -----------------------------

openai = pytest.importorskip("llama_index.llms.openai", exc_type=ImportError)
converters = pytest.importorskip("llama_index.llms.openai.utils", exc_type=ImportError)


def data_of(url: str) -> bytes:
    return base64.b64decode(url.partition("base64,")[2])


@pytest.fixture(scope="module")
def tool_messages(retriever: ColQwen3Retriever) -> list[ChatMessage]:
    blocks = PageRetrieverTool(retriever).call(QUESTION).blocks
    return [ChatMessage(role="tool", blocks=blocks, additional_kwargs={"tool_call_id": "call-1"})]


def test_the_responses_api_takes_images_of_tools(
    retriever: ColQwen3Retriever, tool_messages: list[ChatMessage]
) -> None:
    [output] = converters.to_openai_message_dicts(tool_messages, is_responses_api=True)
    assert (output["type"], output["call_id"]) == ("function_call_output", "call-1")
    images = [data_of(part["image_url"]) for part in output["output"] if part["type"] == "input_image"]
    assert equal(images, retriever.retrieve(QUESTION))


def check_chat_completions(tool: dict[str, Any], user: dict[str, Any], nodes: Sequence[NodeWithScore]) -> None:
    """The tool's message is a text, and the images follow in a user message, each after its page's name."""
    assert (tool["role"], tool["tool_call_id"], user["role"]) == ("tool", "call-1", "user")
    *names, note = tool["content"].split("\n\n")
    assert note == "The images of this result are in the next user message."
    heading, *parts = user["content"]
    assert heading == {"type": "text", "text": "Images in the tool's result:"}
    assert [part["text"] for part in parts[::2]] == names
    assert equal([data_of(part["image_url"]["url"]) for part in parts[1::2]], nodes)


def test_chat_completions_need_them_in_a_user_message(
    retriever: ColQwen3Retriever, tool_messages: list[ChatMessage]
) -> None:
    [dropped] = converters.to_openai_message_dicts(tool_messages)
    assert isinstance(dropped["content"], str), "the adapter drops images: no change is needed now"
    messages = [ChatMessage("x"), *tool_messages, ChatMessage("y", role=MessageRole.ASSISTANT)]
    before = [message.model_copy(deep=True) for message in messages]
    first, *moved, last = move_tool_images(messages)
    assert (first, last, messages) == (messages[0], messages[-1], before)
    check_chat_completions(*converters.to_openai_message_dicts(moved), retriever.retrieve(QUESTION))


def test_a_run_of_tool_messages_stays_together(tool_messages: list[ChatMessage]) -> None:
    [answer], plain = tool_messages, ChatMessage("no image", role=MessageRole.TOOL)
    moved = move_tool_images([ChatMessage("x"), answer, plain, answer, ChatMessage("y")])
    assert [message.role.value for message in moved] == ["user", "tool", "tool", "tool", "user", "user"]
    assert moved[2] is plain
    assert len(sent(moved[4].blocks)) == 30
    assert not any(sent(message.blocks) for message in moved[:4])
    assert move_tool_images([plain]) == [plain]
    assert move_tool_images([]) == []


class PageOpenAI(MoveToolImages, openai.OpenAI):  # type: ignore[misc,name-defined]  # as in the docs
    pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of workflows, where pydantic is new
@pytest.mark.parametrize("streaming", [False, True])
def test_an_agent_over_chat_completions_sees_the_pages(retriever: ColQwen3Retriever, streaming: bool) -> None:
    requests: list[dict[str, Any]] = []

    def respond(request: httpx.Request) -> httpx.Response:
        requests.append(json.loads(request.content))
        first = len(requests) == 1
        call = {"index": 0, "id": "call-1", "type": "function",
                "function": {"name": "search_pages", "arguments": json.dumps({"input": QUESTION})}}  # fmt: skip
        message: dict[str, Any] = {"role": "assistant", "content": None if first else "It rose."}
        message |= {"tool_calls": [call]} if first else {}
        body: dict[str, Any] = {"id": "1", "created": 0, "model": "gpt-4.1"}
        choice = {"index": 0, "finish_reason": "tool_calls" if first else "stop"}
        if streaming:
            chunk = {**body, "object": "chat.completion.chunk", "choices": [{**choice, "delta": message}]}
            text = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
            return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})
        return httpx.Response(
            200, json={**body, "object": "chat.completion", "choices": [{**choice, "message": message}]}
        )

    async def run() -> str:
        async with httpx.AsyncClient(transport=httpx.MockTransport(respond)) as client:
            llm = PageOpenAI(model="gpt-4.1", api_key="x", async_http_client=client)
            agent = FunctionAgent(tools=[PageRetrieverTool(retriever)], llm=llm, streaming=streaming)
            return str(await agent.run("What was the revenue?"))

    assert asyncio.run(run()) == "It rose."
    assert [message["role"] for message in requests[1]["messages"]] == ["user", "assistant", "tool", "user"]
    check_chat_completions(*requests[1]["messages"][2:], retriever.retrieve(QUESTION))


def test_the_mixin_moves_images_on_every_path(
    tool_messages: list[ChatMessage], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, roles = PageOpenAI(model="gpt-4.1", api_key="x"), []

    def record(self: Any, messages: Sequence[ChatMessage], **_: Any) -> Any:
        roles.append([message.role.value for message in messages])

    async def arecord(self: Any, messages: Sequence[ChatMessage], **_: Any) -> Any:
        record(self, messages)

    for name, function in (("chat", record), ("stream_chat", record), ("achat", arecord), ("astream_chat", arecord)):
        monkeypatch.setattr(openai.OpenAI, name, function)
    llm.chat(tool_messages)
    llm.stream_chat(tool_messages)
    asyncio.run(llm.achat(tool_messages))
    asyncio.run(llm.astream_chat(tool_messages))
    assert roles == [["tool", "user"]] * 4
    assert isinstance(llm, openai.OpenAI)
    assert llm.class_name() == openai.OpenAI.class_name()
