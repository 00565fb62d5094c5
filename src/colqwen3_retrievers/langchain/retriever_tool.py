"""A tool with which an agent looks at pages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import Document
from langchain_core.messages.content import ContentBlock, TextContentBlock
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import StructuredTool, ToolException
from pydantic import BaseModel, Field

from colqwen3_retrievers.errors import ConfigError, EncodeError
from colqwen3_retrievers.langchain.content_blocks import docs_to_content_blocks
from colqwen3_retrievers.pages.remote_images import AllowRemote, checked_remote
from colqwen3_retrievers.retrieval.chat_images import MAX_BYTES, MAX_SIDE


class PageQuestion(BaseModel):
    """The tool's arguments."""

    query: str = Field(description="what to look for, in words")


def create_page_retriever_tool(
    retriever: BaseRetriever,
    name: str,
    description: str,
    *,
    max_images: int | None = None,
    include_text: bool = False,
    max_side: int = MAX_SIDE,
    max_bytes: int = MAX_BYTES,
    allow_remote: AllowRemote = False,
) -> StructuredTool:
    """Return a tool that answers with page images, each after its name, for a model to see and cite.

    LangChain's own ``create_retriever_tool`` returns text only. This one's answer is a list of content blocks (see
    :func:`~colqwen3_retrievers.langchain.content_blocks.docs_to_content_blocks`), and the ToolMessage's ``artifact``
    is the documents.

    Not every chat model accepts images in a tool's answer. Anthropic's models do, and OpenAI's over the Responses API
    (``ChatOpenAI(..., use_responses_api=True)``). OpenAI's Chat Completions API, which many other servers offer,
    refuses them: give the agent :func:`~colqwen3_retrievers.langchain.tool_images.move_tool_images_middleware`, or
    apply :func:`~colqwen3_retrievers.langchain.tool_images.move_tool_images` to the messages of a loop of your own. The
    images then follow in a user message, which every model with vision accepts.

    Args:
        retriever: any retriever whose documents have images, also a reranking one.
        name: the tool's name for the model.
        description: when the model should use it.
        max_images: most images in one answer; the other documents are sent as text. None sends all.
        include_text: whether a document with an image has its text, too.
        max_side: longest side of an image in pixels; larger ones are reduced.
        max_bytes: most bytes of an image, before base64.
        allow_remote: whether images known by a web address are fetched; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.

    Returns:
        A tool for ``create_agent`` and ``bind_tools``, sync and async. An empty or too long question is returned to the
        model as an error it can correct; any other error is raised.

    Raises:
        ConfigError: ``retriever`` is not a retriever, or a number is out of its range.

    Example:
        >>> from colqwen3_retrievers.langchain import (
        ...     ColQwen3Retriever, create_page_retriever_tool, move_tool_images_middleware)
        >>> from langchain.agents import create_agent                                         # doctest: +SKIP
        >>> tool = create_page_retriever_tool(                                                # doctest: +SKIP
        ...     ColQwen3Retriever(index="my-index", k=3), "search_reports", "Search the annual reports.")
        >>> agent = create_agent("anthropic:claude-sonnet-4-5", [tool])                       # doctest: +SKIP
        >>> agent = create_agent(                                                             # doctest: +SKIP
        ...     "openai:gpt-5", [tool], middleware=[move_tool_images_middleware()])
    """
    if not isinstance(retriever, BaseRetriever):
        raise ConfigError(f"retriever: expected a LangChain retriever, got {type(retriever).__name__}")
    options: dict[str, Any] = {
        "max_images": max_images, "include_text": include_text, "max_side": max_side, "max_bytes": max_bytes,
        "allow_remote": checked_remote(allow_remote),
    }  # fmt: skip
    docs_to_content_blocks([], **options)  # an error now, not in the agent's run

    def content(documents: list[Document]) -> list[ContentBlock]:
        return docs_to_content_blocks(documents, **options) or [
            TextContentBlock(type="text", text="No page was found.")
        ]

    def search(query: str, callbacks: Callbacks = None) -> tuple[list[ContentBlock], list[Document]]:
        with _question_errors(query):
            documents = retriever.invoke(query, {"callbacks": callbacks})
        return content(documents), documents

    async def asearch(query: str, callbacks: Callbacks = None) -> tuple[list[ContentBlock], list[Document]]:
        with _question_errors(query):
            documents = await retriever.ainvoke(query, {"callbacks": callbacks})
        return await asyncio.to_thread(content, documents), documents  # it reads files

    behaviour: dict[str, Any] = {"response_format": "content_and_artifact", "handle_tool_error": True}
    return StructuredTool(
        name=name, description=description, func=search, coroutine=asearch, args_schema=PageQuestion, **behaviour
    )


@contextmanager
def _question_errors(query: str) -> Iterator[None]:
    """Turn errors of the question itself into answers to the model."""
    if not query.strip():
        raise ToolException("query: expected words to look for, got none")
    try:
        yield
    except EncodeError as exc:
        raise ToolException(str(exc)) from exc
