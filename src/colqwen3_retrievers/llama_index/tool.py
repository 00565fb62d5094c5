"""LlamaIndex tool: an agent asks a question and sees page images."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Self

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ContentBlock, ImageBlock, TextBlock
from llama_index.core.bridge.pydantic import BaseModel, Field
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from llama_index.core.tools import RetrieverTool, ToolMetadata, ToolOutput

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.llama_index.nodes import image_of, plain_text
from colqwen3_retrievers.pages.remote_images import AllowRemote, checked_remote
from colqwen3_retrievers.retrieval.chat_images import MAX_BYTES, MAX_SIDE, ChatImages

_log = logging.getLogger(__name__)

DEFAULT_NAME = "search_pages"
DEFAULT_DESCRIPTION = "Searches documents and shows the pages that answer a question best, as images with their source."


class PageQuestion(BaseModel):
    """Arguments that an agent's model fills in."""

    input: str = Field(description="The question, as a full sentence.")


class PageRetrieverTool(RetrieverTool):
    """A retriever tool for agents whose output contains page images, unlike that of LlamaIndex's ``RetrieverTool``.

    Each page is a text block that names it (``[1] file_name: a.pdf, page: 3``) followed by its image, in bytes, so that
    the model can cite it and no adapter has to open a file; a text node is its text. The image is the one that was
    embedded, in a form that chat models accept; see :class:`~colqwen3_retrievers.retrieval.chat_images.ChatImages`.

    A ``FunctionAgent`` passes the blocks to its model's adapter unchanged. OpenAI's Responses API (``OpenAIResponses``
    of llama-index-llms-openai 0.8) takes images in a tool's result, as do Anthropic's models. The Chat Completions API,
    which many other servers offer, does not, and its adapter (``OpenAI``) drops them in silence: mix
    :class:`~colqwen3_retrievers.llama_index.tool_images.MoveToolImages` into the LLM's class, and they follow in a user
    message, which every model with vision accepts. A ``ReActAgent`` passes on text only, whatever a tool returns: it
    gets the names, and the text with ``include_text``.

    Args:
        retriever: a :class:`~colqwen3_retrievers.llama_index.ColQwen3Retriever`, or any other.
        metadata: name and description for the model; None takes defaults.
        node_postprocessors: rerankers and so on, in order.
        max_images: maximum number of images, from the first page on; None sends all. Other pages are named, with their
            text.
        include_text: whether a page with an image has its text, too.
        max_side: longest side of an image in pixels; larger ones are reduced.
        max_bytes: maximum number of bytes of an image, before base64.
        allow_remote: whether images given only by a web address are fetched; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`. Without its image, a node is named, with its
            text.

    Raises:
        ConfigError: an invalid argument; when called, an empty question.

    Example:
        >>> from llama_index.core.agent.workflow import FunctionAgent
        >>> tool = PageRetrieverTool.from_defaults(ColQwen3Retriever("my-index"))                   # doctest: +SKIP
        >>> agent = FunctionAgent(tools=[tool], llm=OpenAIResponses("gpt-5"))                       # doctest: +SKIP
        >>> print(await agent.run("What was the revenue in 2024?"))                                 # doctest: +SKIP
    """

    def __init__(
        self,
        retriever: BaseRetriever,
        metadata: ToolMetadata | None = None,
        node_postprocessors: Sequence[BaseNodePostprocessor] | None = None,
        *,
        max_images: int | None = None,
        include_text: bool = False,
        max_side: int = MAX_SIDE,
        max_bytes: int = MAX_BYTES,
        allow_remote: AllowRemote = False,
    ) -> None:
        if not isinstance(retriever, BaseRetriever):
            raise ConfigError(f"retriever: expected a retriever of LlamaIndex, got {type(retriever).__name__}")
        metadata = metadata or ToolMetadata(DEFAULT_DESCRIPTION, DEFAULT_NAME, PageQuestion)
        super().__init__(retriever, metadata, list(node_postprocessors or []))
        self._max_images = None if max_images is None else whole_number(max_images, "max_images")
        self._include_text = include_text
        self._chat_images = ChatImages(max_side, max_bytes)
        self._allow_remote = checked_remote(allow_remote)

    @classmethod
    def from_defaults(
        cls,
        retriever: BaseRetriever,
        node_postprocessors: Sequence[BaseNodePostprocessor] | None = None,
        name: str | None = None,
        description: str | None = None,
        max_images: int | None = None,
        include_text: bool = False,
        max_side: int = MAX_SIDE,
        max_bytes: int = MAX_BYTES,
        allow_remote: AllowRemote = False,
    ) -> Self:
        """Create a tool with the arguments of LlamaIndex's ``RetrieverTool`` and of this class."""
        metadata = ToolMetadata(description or DEFAULT_DESCRIPTION, name or DEFAULT_NAME, PageQuestion)
        return cls(
            retriever, metadata, node_postprocessors, max_images=max_images, include_text=include_text,
            max_side=max_side, max_bytes=max_bytes, allow_remote=allow_remote,
        )  # fmt: skip

    def call(self, input: str) -> ToolOutput:
        """Find pages.

        Args:
            input: the question.

        Returns:
            ``blocks``: names, images and texts; ``raw_output``: the nodes.

        Raises:
            ConfigError: an empty question.
        """
        bundle = _query_bundle(input)
        nodes = self._apply_node_postprocessors(self._retriever.retrieve(bundle), bundle)
        return self._output(input, nodes)

    async def acall(self, input: str) -> ToolOutput:
        """Find pages without blocking the event loop; see :meth:`call`."""
        bundle = _query_bundle(input)
        nodes = await self._retriever.aretrieve(bundle)
        nodes = await self._async_apply_node_postprocessors(nodes, bundle)
        return await asyncio.to_thread(self._output, input, nodes)

    def _output(self, question: str, nodes: list[NodeWithScore]) -> ToolOutput:
        n_images = 0
        blocks: list[ContentBlock] = []
        for number, node in enumerate(nodes, start=1):
            name = f"[{number}] {_label(node.node)}"
            image = self._image(node.node) if self._max_images is None or n_images < self._max_images else None
            text = plain_text(node.node) if image is None or self._include_text else ""
            blocks.append(TextBlock(text=f"{name}\n\n{text}" if text.strip() else name))
            if image is not None:
                n_images += 1
                blocks.append(image)
        return ToolOutput(
            tool_name=self.metadata.get_name(), blocks=blocks or [TextBlock(text="No page was found.")],
            raw_input={"input": question}, raw_output=nodes,
        )  # fmt: skip

    def _image(self, node: BaseNode) -> ImageBlock | None:
        """Return a node's image in bytes and a format that chat models read."""
        try:
            source = image_of(node, self._allow_remote)
            if source is None:
                return None
            data, media_type = self._chat_images.encode(source, name=node.node_id)
        except (PageError, ConfigError) as exc:
            _log.warning("node %r is shown without its image: %s", node.node_id, exc)
            return None  # its name and text are sent, so that a model can still cite it
        return ImageBlock(image=data, image_mimetype=media_type)


def _label(node: BaseNode) -> str:
    """Return a node's metadata for chat models on one line, or else its id."""
    lines = (line.strip() for line in node.get_metadata_str(MetadataMode.LLM).splitlines())
    return ", ".join(line for line in lines if line) or node.node_id


def _query_bundle(question: Any) -> QueryBundle:
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(f"input: expected a question, got {question!r}")
    return QueryBundle(question)
