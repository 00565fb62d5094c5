"""LlamaIndex tool: an agent asks, and is shown page images."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Self

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ContentBlock, ImageBlock, TextBlock
from llama_index.core.bridge.pydantic import BaseModel, Field
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.tools import AsyncBaseTool, ToolMetadata, ToolOutput

from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.llama_index.nodes import image_of, label_of, plain_text
from colqwen3_retrievers.pages.images import chat_image
from colqwen3_retrievers.pages.remote_images import AllowRemote, checked_remote

_log = logging.getLogger(__name__)

DEFAULT_NAME = "search_pages"
DEFAULT_DESCRIPTION = "Searches documents and shows the pages that answer a question best, as images with their source."


class PageQuestion(BaseModel):
    """What an agent's model fills in."""

    input: str = Field(description="The question, as a full sentence.")


class PageRetrieverTool(AsyncBaseTool):
    """A retriever tool for agents whose output holds page images; LlamaIndex's own ``RetrieverTool`` holds text only.

    Each page is a text block that names it (``[1] file_name: a.pdf, page: 3``) and then its image, in bytes, so that
    the model can cite it and no adapter has to find a file; a text node is its text. A ``FunctionAgent`` hands the
    blocks to its model as they are. A ``ReActAgent`` passes on texts only, whatever a tool gives: it gets the names.

    Args:
        retriever: a :class:`~colqwen3_retrievers.llama_index.ColQwen3Retriever`, or any other.
        metadata: name and description the model reads; None takes defaults that say what this is.
        node_postprocessors: rerankers and so on, in order.
        max_images: most images, those of the first pages; None sends all. The others are named, with their text.
        allow_remote: whether pictures known by a web address are fetched; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`. A node whose picture is not is named, with its
            text.

    Raises:
        ConfigError: an argument that cannot be used; when called, an empty question.

    Example:
        >>> from llama_index.core.agent.workflow import FunctionAgent
        >>> tool = PageRetrieverTool.from_defaults(ColQwen3Retriever("my-index"))                   # doctest: +SKIP
        >>> agent = FunctionAgent(tools=[tool], llm=multimodal_llm)                                 # doctest: +SKIP
        >>> print(await agent.run("What was the revenue in 2024?"))                                 # doctest: +SKIP
    """

    def __init__(
        self,
        retriever: BaseRetriever,
        metadata: ToolMetadata | None = None,
        node_postprocessors: Sequence[BaseNodePostprocessor] | None = None,
        *,
        max_images: int | None = None,
        allow_remote: AllowRemote = False,
    ) -> None:
        if not isinstance(retriever, BaseRetriever):
            raise ConfigError(f"retriever: expected a retriever of LlamaIndex, got {type(retriever).__name__}")
        if max_images is not None and (isinstance(max_images, bool) or not isinstance(max_images, int)):
            raise ConfigError(f"max_images: expected a whole number from 0 or None, got {max_images!r}")
        if max_images is not None and max_images < 0:
            raise ConfigError(f"max_images: expected a whole number from 0 or None, got {max_images}")
        self._retriever = retriever
        self._metadata = metadata or ToolMetadata(DEFAULT_DESCRIPTION, DEFAULT_NAME, PageQuestion)
        self._node_postprocessors = list(node_postprocessors or [])
        self._max_images = max_images
        self._allow_remote = checked_remote(allow_remote)

    @classmethod
    def from_defaults(
        cls,
        retriever: BaseRetriever,
        node_postprocessors: Sequence[BaseNodePostprocessor] | None = None,
        name: str | None = None,
        description: str | None = None,
        max_images: int | None = None,
        allow_remote: AllowRemote = False,
    ) -> Self:
        """Make a tool; the arguments are those of LlamaIndex's ``RetrieverTool`` and of this class."""
        metadata = ToolMetadata(description or DEFAULT_DESCRIPTION, name or DEFAULT_NAME, PageQuestion)
        return cls(retriever, metadata, node_postprocessors, max_images=max_images, allow_remote=allow_remote)

    @property
    def retriever(self) -> BaseRetriever:
        """The retriever that is asked."""
        return self._retriever

    @property
    def metadata(self) -> ToolMetadata:
        """Name, description and schema the model reads."""
        return self._metadata

    def call(self, input: str) -> ToolOutput:
        """Find pages.

        Args:
            input: the question.

        Returns:
            ``blocks``: names, images and texts; ``raw_output``: the nodes.

        Raises:
            ConfigError: an empty question.
        """
        bundle = _asked(input)
        nodes = self._retriever.retrieve(bundle)
        for postprocessor in self._node_postprocessors:
            nodes = postprocessor.postprocess_nodes(nodes, query_bundle=bundle)
        return self._output(input, nodes)

    async def acall(self, input: str) -> ToolOutput:
        """Find pages without blocking the event loop; see :meth:`call`."""
        bundle = _asked(input)
        nodes = await self._retriever.aretrieve(bundle)
        for postprocessor in self._node_postprocessors:
            nodes = await postprocessor.apostprocess_nodes(nodes, query_bundle=bundle)
        return await asyncio.to_thread(self._output, input, nodes)

    def _output(self, asked: str, nodes: list[NodeWithScore]) -> ToolOutput:
        left = len(nodes) if self._max_images is None else self._max_images
        blocks: list[ContentBlock] = []
        for number, found in enumerate(nodes, start=1):
            name = f"[{number}] {label_of(found.node)}"
            picture = _picture(found, self._allow_remote) if left > 0 else None
            if picture is not None:
                left -= 1
                blocks += [TextBlock(text=name), picture]
                continue
            text = plain_text(found.node)
            blocks.append(TextBlock(text=f"{name}\n\n{text}" if text.strip() else name))
        if not blocks:
            blocks = [TextBlock(text="No page was found.")]
        return ToolOutput(
            tool_name=self.metadata.get_name(), blocks=blocks, raw_input={"input": asked}, raw_output=nodes
        )


def _picture(found: NodeWithScore, allow_remote: AllowRemote) -> ImageBlock | None:
    """A node's picture as chat models read it, in bytes."""
    try:
        source = image_of(found.node, allow_remote)
        if source is None:
            return None
        data, media_type = chat_image(source, name=found.node_id)
    except (PageError, ConfigError) as exc:
        _log.warning("node %r is shown without its picture: %s", found.node_id, exc)
        return None  # its name and text are sent: a model can still cite it
    return ImageBlock(image=data, image_mimetype=media_type)


def _asked(question: Any) -> QueryBundle:
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(f"input: expected a question, got {question!r}")
    return QueryBundle(question)
