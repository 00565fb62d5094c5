"""A tool with which an agent looks at pages."""

from __future__ import annotations

import asyncio
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


class PageQuestion(BaseModel):
    """What the agent fills in."""

    query: str = Field(description="what to look for, in words")


def create_page_retriever_tool(
    retriever: BaseRetriever,
    name: str,
    description: str,
    *,
    max_images: int | None = None,
    allow_remote: AllowRemote = False,
) -> StructuredTool:
    """Make a tool that answers with page images, each right after its name, so that the model can see and cite them.

    LangChain's own ``create_retriever_tool`` hands over text only. This one's answer is a list of content blocks (see
    :func:`~colqwen3_retrievers.langchain.content_blocks.docs_to_content_blocks`), and the ToolMessage's ``artifact``
    the documents.

    Args:
        retriever: any retriever whose documents have images; a reranking one too.
        name: the tool's name for the model.
        description: when the model should use it.
        max_images: most images in one answer; the text of the others is handed over. None sends all.
        allow_remote: whether images known by a web address are fetched; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.

    Returns:
        A tool for ``create_agent`` and ``bind_tools``, with a native async half. A question that is empty or too long
        comes back to the model as an error it can mend; any other error is raised.

    Raises:
        ConfigError: ``retriever`` is none, or ``max_images`` below 0.

    Example:
        >>> from colqwen3_retrievers.langchain import ColQwen3Retriever, create_page_retriever_tool
        >>> from langchain.agents import create_agent                                         # doctest: +SKIP
        >>> tool = create_page_retriever_tool(                                                # doctest: +SKIP
        ...     ColQwen3Retriever(index="my-index", k=3), "search_reports", "Search the annual reports.")
        >>> agent = create_agent("openai:gpt-5", [tool])                                      # doctest: +SKIP
    """
    if not isinstance(retriever, BaseRetriever):
        raise ConfigError(f"retriever: expected a LangChain retriever, got {type(retriever).__name__}")
    docs_to_content_blocks([], max_images=max_images)  # refuses a wrong number now
    remote = checked_remote(allow_remote)

    def search(query: str, callbacks: Callbacks = None) -> tuple[list[ContentBlock], list[Document]]:
        try:
            documents = retriever.invoke(_asked(query), {"callbacks": callbacks})
        except EncodeError as exc:
            raise ToolException(str(exc)) from exc
        return _blocks(documents, max_images, remote), documents

    async def asearch(query: str, callbacks: Callbacks = None) -> tuple[list[ContentBlock], list[Document]]:
        try:
            documents = await retriever.ainvoke(_asked(query), {"callbacks": callbacks})
        except EncodeError as exc:
            raise ToolException(str(exc)) from exc
        return await asyncio.to_thread(_blocks, documents, max_images, remote), documents  # it reads files

    handled: dict[str, Any] = {"response_format": "content_and_artifact", "handle_tool_error": True}
    return StructuredTool(
        name=name, description=description, func=search, coroutine=asearch, args_schema=PageQuestion, **handled
    )


def _asked(query: str) -> str:
    if not query.strip():
        raise ToolException("query: expected words to look for, got none")
    return query


def _blocks(documents: list[Document], max_images: int | None, allow_remote: AllowRemote) -> list[ContentBlock]:
    found = docs_to_content_blocks(documents, max_images=max_images, allow_remote=allow_remote)
    return found or [TextContentBlock(type="text", text="No page was found.")]
