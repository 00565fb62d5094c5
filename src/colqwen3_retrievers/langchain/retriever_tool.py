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

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, EncodeError
from colqwen3_retrievers.langchain.content_blocks import docs_to_content_blocks
from colqwen3_retrievers.pages.remote_images import AllowRemote, checked_remote


class PageQuestion(BaseModel):
    """The tool's arguments."""

    query: str = Field(description="what to look for, in words")


def create_page_retriever_tool(
    retriever: BaseRetriever,
    name: str,
    description: str,
    *,
    max_images: int | None = None,
    allow_remote: AllowRemote = False,
) -> StructuredTool:
    """Return a tool that answers with page images, each after its name, for a model to see and cite.

    LangChain's own ``create_retriever_tool`` returns text only. This one's answer is a list of content blocks (see
    :func:`~colqwen3_retrievers.langchain.content_blocks.docs_to_content_blocks`), and the ToolMessage's ``artifact``
    is the documents.

    Args:
        retriever: any retriever whose documents have images, also a reranking one.
        name: the tool's name for the model.
        description: when the model should use it.
        max_images: most images in one answer; the other documents are sent as text. None sends all.
        allow_remote: whether images known by a web address are fetched; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.

    Returns:
        A tool for ``create_agent`` and ``bind_tools``, sync and async. An empty or too long question is returned to the
        model as an error it can correct; any other error is raised.

    Raises:
        ConfigError: ``retriever`` is not a retriever, or ``max_images`` is below 0.

    Example:
        >>> from colqwen3_retrievers.langchain import ColQwen3Retriever, create_page_retriever_tool
        >>> from langchain.agents import create_agent                                         # doctest: +SKIP
        >>> tool = create_page_retriever_tool(                                                # doctest: +SKIP
        ...     ColQwen3Retriever(index="my-index", k=3), "search_reports", "Search the annual reports.")
        >>> agent = create_agent("openai:gpt-5", [tool])                                      # doctest: +SKIP
    """
    if not isinstance(retriever, BaseRetriever):
        raise ConfigError(f"retriever: expected a LangChain retriever, got {type(retriever).__name__}")
    if max_images is not None:
        whole_number(max_images, "max_images")
    remote = checked_remote(allow_remote)

    def content(documents: list[Document]) -> list[ContentBlock]:
        blocks = docs_to_content_blocks(documents, max_images=max_images, allow_remote=remote)
        return blocks or [TextContentBlock(type="text", text="No page was found.")]

    def search(query: str, callbacks: Callbacks = None) -> tuple[list[ContentBlock], list[Document]]:
        with _question_errors(query):
            documents = retriever.invoke(query, {"callbacks": callbacks})
        return content(documents), documents

    async def asearch(query: str, callbacks: Callbacks = None) -> tuple[list[ContentBlock], list[Document]]:
        with _question_errors(query):
            documents = await retriever.ainvoke(query, {"callbacks": callbacks})
        return await asyncio.to_thread(content, documents), documents  # it reads files

    options: dict[str, Any] = {"response_format": "content_and_artifact", "handle_tool_error": True}
    return StructuredTool(
        name=name, description=description, func=search, coroutine=asearch, args_schema=PageQuestion, **options
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
