"""The tool that shows pages to an agent."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import ToolMessage
from langchain_core.retrievers import BaseRetriever
from PIL import Image

from colqwen3_retrievers.errors import ConfigError, EncodeError
from colqwen3_retrievers.langchain import ColQwen3Retriever, ColQwen3VectorStore, create_page_retriever_tool
from colqwen3_retrievers.langchain.documents import document_image, page_to_document
from tests.hashing import picture


@pytest.fixture
def retriever(store: ColQwen3VectorStore) -> ColQwen3Retriever:
    store.add_images([picture(1), picture(2)], [{"source": "a.pdf", "page": n} for n in (1, 2)], texts=["tax", ""])
    return ColQwen3Retriever(index=store.index, k=2)


def call(query: Any) -> dict[str, Any]:
    return {"name": "search_pages", "args": {"query": query}, "id": "call-1", "type": "tool_call"}


def test_a_tool_message_shows_each_page_after_its_name(retriever: ColQwen3Retriever) -> None:
    tool = create_page_retriever_tool(retriever, "search_pages", "Search.")
    assert (tool.name, tool.description, list(tool.args)) == ("search_pages", "Search.", ["query"])
    for message in (tool.invoke(call("tax")), asyncio.run(tool.ainvoke(call("tax")))):
        assert isinstance(message, ToolMessage)
        blocks = message.content_blocks
        assert [block["type"] for block in blocks] == ["text", "image", "text", "image"]
        assert [blocks[0]["text"], blocks[2]["text"]] == [
            f"[{n}] {document.metadata['citation']}" for n, document in enumerate(message.artifact, start=1)
        ]
        shown = [Image.open(io.BytesIO(base64.b64decode(block["base64"]))) for block in (blocks[1], blocks[3])]
        wanted = [picture(document.metadata["page"]) for document in message.artifact]
        assert [image.tobytes() for image in shown] == [image.tobytes() for image in wanted]
        assert message.artifact == retriever.invoke("tax")


def test_max_images_and_no_page(retriever: ColQwen3Retriever) -> None:
    one = create_page_retriever_tool(retriever, "search_pages", "Search.", max_images=1).invoke(call("tax"))
    assert [block["type"] for block in one.content_blocks] == ["text", "image", "text"]
    none = ColQwen3Retriever(index=retriever.index, filter={"source": "nobody"})
    message = create_page_retriever_tool(none, "search_pages", "Search.").invoke(call("tax"))
    assert message.content_blocks == [{"type": "text", "text": "No page was found."}]
    assert message.artifact == []


def test_a_bad_question_goes_back_to_the_model_and_a_broken_retriever_does_not(retriever: ColQwen3Retriever) -> None:
    tool = create_page_retriever_tool(retriever, "search_pages", "Search.")
    for message in (tool.invoke(call(" ")), asyncio.run(tool.ainvoke(call("")))):
        assert message.status == "error"
        assert "expected words to look for" in str(message.content)

    class Failing(BaseRetriever):
        error: Any

        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
            raise self.error

    too_long = create_page_retriever_tool(Failing(error=EncodeError("too long")), "search_pages", "Search.")
    assert too_long.invoke(call("x")).content == asyncio.run(too_long.ainvoke(call("x"))).content == "too long"
    broken = create_page_retriever_tool(Failing(error=ConfigError("where: ...")), "search_pages", "Search.")
    for ask in (lambda: broken.invoke(call("x")), lambda: asyncio.run(broken.ainvoke(call("x")))):
        with pytest.raises(ConfigError, match="where"):
            ask()


def test_what_makes_no_tool_is_refused(retriever: ColQwen3Retriever) -> None:
    with pytest.raises(ConfigError, match="retriever: expected a LangChain retriever, got str"):
        create_page_retriever_tool("x", "a", "b")
    with pytest.raises(ConfigError, match="max_images"):
        create_page_retriever_tool(retriever, "a", "b", max_images=-1)


def test_nothing_technical_stands_in_what_models_read(retriever: ColQwen3Retriever) -> None:
    for document in retriever.invoke("tax"):
        assert document_image(document) == document.metadata["image_path"]
        for key in ("sha256", "image_path", "score"):
            assert str(document.metadata[key]) not in document.page_content
        assert not any(key.startswith("_") for key in document.metadata)
    kept = Document("wine", metadata={"page": 1})
    store = ColQwen3VectorStore(retriever.index)
    store.add_documents([kept], ids=["k"])
    assert retriever.index.get(["k"])[0].page.text == "wine"  # what is encoded has no metadata in it
    assert store.get_by_ids(["k"])[0].metadata == {"page": 1}
    assert page_to_document(retriever.index.get(["k"])[0].page, 2.0).metadata == {"page": 1, "score": 2.0}
