"""What the real adapters of chat models send: the pictures that were embedded, where the API takes them."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage

from colqwen3_retrievers import PageIndex, load_pages
from colqwen3_retrievers.langchain import (
    ColQwen3Retriever,
    create_page_retriever_tool,
    docs_to_content_blocks,
    move_tool_images,
    move_tool_images_middleware,
)
from colqwen3_retrievers.pages.images import open_image
from tests.hashing import INFO, HashingEncoder
from tests.integration.langchain.corpus import QUESTION
from tests.originals import naive_pixels, write_originals

# An adapter may need a newer langchain-core than the one that is tested.
langchain_openai = pytest.importorskip("langchain_openai", exc_type=ImportError)
langchain_anthropic = pytest.importorskip("langchain_anthropic", exc_type=ImportError)
agents = pytest.importorskip("langchain.agents", exc_type=ImportError)

CALL: Any = {"name": "search_pages", "args": {"query": QUESTION}, "id": "call-1", "type": "tool_call"}


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> ColQwen3Retriever:
    """Over an index that refers to its originals, none of which is fit for every chat model."""
    folder = tmp_path_factory.mktemp("originals")
    write_originals(folder / "pages", scan=False)
    index = PageIndex.open(folder / "index", HashingEncoder(INFO), images="reference")
    index.add(load_pages(folder / "pages"))
    return ColQwen3Retriever(index=index, k=20)


@pytest.fixture(scope="module")
def answer(retriever: ColQwen3Retriever) -> ToolMessage:
    message = create_page_retriever_tool(retriever, "search_pages", "Searches.", include_text=True).invoke(CALL)
    assert isinstance(message, ToolMessage)
    return message


def conversation(answer: ToolMessage) -> list[BaseMessage]:
    return [HumanMessage(QUESTION), AIMessage("", tool_calls=[CALL]), answer]


def expected(answer: ToolMessage) -> list[np.ndarray[Any, Any]]:
    assert len(answer.artifact) >= 15
    return [np.asarray(open_image(document.metadata["image_path"])) for document in answer.artifact]


def equal(urls: list[str], answer: ToolMessage) -> bool:
    pictures = [naive_pixels(base64.b64decode(url.partition("base64,")[2] or url)) for url in urls]
    wanted = expected(answer)
    return len(pictures) == len(wanted) and all(map(np.array_equal, pictures, wanted))


def openai(**options: Any) -> Any:
    return langchain_openai.ChatOpenAI(model="gpt-4.1", api_key="x", **options)


def anthropic() -> Any:
    return langchain_anthropic.ChatAnthropic(model="claude-sonnet-4-5", api_key="x")


def test_blocks_in_a_user_message(retriever: ColQwen3Retriever, answer: ToolMessage) -> None:
    message = HumanMessage(content_blocks=docs_to_content_blocks(retriever.invoke(QUESTION)))
    [sent] = openai()._get_request_payload([message])["messages"]
    assert equal([part["image_url"]["url"] for part in sent["content"] if part["type"] == "image_url"], answer)
    [sent] = anthropic()._get_request_payload([message])["messages"]
    images = [part["source"] for part in sent["content"] if part["type"] == "image"]
    assert equal([source["data"] for source in images], answer)
    assert {source["media_type"] for source in images} <= {"image/png", "image/jpeg", "image/webp"}


def test_anthropic_and_the_responses_api_take_images_of_tools(answer: ToolMessage) -> None:
    messages = conversation(answer)
    [result] = anthropic()._get_request_payload(messages)["messages"][-1]["content"]
    assert (result["type"], result["tool_use_id"]) == ("tool_result", "call-1")
    assert equal([part["source"]["data"] for part in result["content"] if part["type"] == "image"], answer)
    output = openai(use_responses_api=True)._get_request_payload(messages)["input"][-1]
    assert (output["type"], output["call_id"]) == ("function_call_output", "call-1")
    assert equal([part["image_url"] for part in output["output"] if part["type"] == "input_image"], answer)


def check_chat_completions(messages: list[dict[str, Any]], answer: ToolMessage) -> None:
    """The tool's message is a text, and the images follow in a user message, each after its page's name."""
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "user"]
    *_, tool, user = messages
    names = [f"[{place}] {page.metadata['citation']}" for place, page in enumerate(answer.artifact, start=1)]
    assert tool["content"].split("\n\n") == [*names, "The images of this result are in the next user message."]
    heading, *parts = user["content"]
    assert heading["text"] == "Images in the result of the tool search_pages:"
    assert [part["text"] for part in parts[::2]] == names
    assert equal([part["image_url"]["url"] for part in parts[1::2]], answer)


def test_chat_completions_need_them_in_a_user_message(answer: ToolMessage) -> None:
    messages = conversation(answer)
    refused = openai()._get_request_payload(messages)["messages"][-1]
    assert "image_url" in {part["type"] for part in refused["content"]}, "the API answers 400: no change is needed now"
    moved = move_tool_images(messages)
    check_chat_completions(openai()._get_request_payload(moved)["messages"], answer)
    assert messages == conversation(answer), "the conversation itself is unchanged"
    [*_, last] = anthropic()._get_request_payload(moved)["messages"]
    kinds = [part["type"] for part in last["content"]]
    assert kinds == ["tool_result", "text", *["text", "image"] * len(answer.artifact)], "results first, as it demands"


def test_a_run_of_tool_messages_stays_together(answer: ToolMessage) -> None:
    plain = ToolMessage("no image", tool_call_id="call-2")
    moved = move_tool_images([HumanMessage("x"), answer, plain, answer, AIMessage("y"), answer, HumanMessage("z")])
    assert [message.type for message in moved] == ["human", *["tool"] * 3, "human", "ai", "tool", "human", "human"]
    assert moved[2] is plain
    assert len(moved[4].content) == 2 * len(moved[7].content)
    assert move_tool_images([plain, HumanMessage("x")]) == [plain, HumanMessage("x")]
    assert move_tool_images([]) == []
    kept = ToolMessage(["a", {"type": "image_url", "image_url": {"url": "u"}}, {"type": "x"}], tool_call_id="1")
    tool, user = move_tool_images([kept])
    assert tool.content == ["a", {"type": "x"}, {"type": "text", "text": tool.content[-1]["text"]}]  # type: ignore[index]
    assert user.content[1:] == [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "u"}}]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_agent_over_chat_completions_sees_the_pages(
    retriever: ColQwen3Retriever, answer: ToolMessage, asynchronous: bool
) -> None:
    requests: list[dict[str, Any]] = []

    def respond(request: httpx.Request) -> httpx.Response:
        requests.append(json.loads(request.content))
        call = {"id": "call-1", "type": "function",
                "function": {"name": "search_pages", "arguments": json.dumps(CALL["args"])}}  # fmt: skip
        message = {"role": "assistant", "content": None if len(requests) == 1 else "It rose."}
        message |= {"tool_calls": [call]} if len(requests) == 1 else {}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if len(requests) == 1 else "stop"}
        return httpx.Response(200, json={"id": "1", "object": "chat.completion", "created": 0, "model": "gpt-4.1",
                                         "choices": [choice]})  # fmt: skip

    transport = httpx.MockTransport(respond)
    with httpx.Client(transport=transport) as client:
        model = openai(http_client=client, http_async_client=httpx.AsyncClient(transport=transport))
        tool = create_page_retriever_tool(retriever, "search_pages", "Searches.")
        agent = agents.create_agent(model, [tool], middleware=[move_tool_images_middleware()])
        state = {"messages": [HumanMessage(QUESTION)]}
        result = asyncio.run(agent.ainvoke(state)) if asynchronous else agent.invoke(state)
    assert result["messages"][-1].text == "It rose."
    assert [message.type for message in result["messages"]] == ["human", "ai", "tool", "ai"], "history is unchanged"
    check_chat_completions(requests[1]["messages"], answer)


def test_text_beside_the_image_where_asked(tmp_path: Path, encoder: Any) -> None:
    from langchain_core.documents import Document

    from tests.hashing import picture

    picture(1).save(tmp_path / "a.png")
    document = Document("Revenue rose.", metadata={"source": "a", "page": 1, "image_path": str(tmp_path / "a.png")})
    text, image = docs_to_content_blocks([document], include_text=True)
    assert (text["text"], image["type"]) == ("[1] a, page 1\n\nRevenue rose.", "image")  # type: ignore[typeddict-item]
    assert docs_to_content_blocks([document])[0]["text"] == "[1] a, page 1"  # type: ignore[typeddict-item]
