"""Images of tool results moved into a user message, for chat APIs whose tool messages carry only text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    ContentBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
)
from llama_index.core.llms.llm import LLM

_NOTE = "The images of this result are in the next user message."


def move_tool_images(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return messages in which the images of tool messages follow in a user message.

    Every chat model with vision accepts images in a user message; OpenAI's Chat Completions API accepts them nowhere
    else. A tool message keeps its text, as one block. After each run of tool messages (the results for one message of
    the model) comes one user message with their images, each after the first paragraph of the text before it: its name,
    for the results of :class:`~colqwen3_retrievers.llama_index.tool.PageRetrieverTool`.

    Args:
        messages: a conversation; it is not changed.

    Example:
        >>> image = ImageBlock(image=b"iVBORw0KGgo=", image_mimetype="image/png")
        >>> blocks = [TextBlock(text="[1] a.pdf, page 3"), image]
        >>> tool, user = move_tool_images([ChatMessage(role="tool", blocks=blocks)])
        >>> [type(block).__name__ for block in tool.blocks], [type(block).__name__ for block in user.blocks]
        (['TextBlock'], ['TextBlock', 'TextBlock', 'ImageBlock'])
    """
    moved: list[ChatMessage] = []
    images: list[ContentBlock] = []
    for message in messages:
        if message.role in (MessageRole.TOOL, MessageRole.FUNCTION):
            text_only, blocks = _without_images(message)
            moved.append(text_only)
            images += blocks
            continue
        if images:
            moved.append(ChatMessage(role=MessageRole.USER, blocks=images))
            images = []
        moved.append(message)
    return [*moved, ChatMessage(role=MessageRole.USER, blocks=images)] if images else moved


class MoveToolImages(LLM):
    """Mixin for an LLM class that sends the images of tool messages in user messages; see :func:`move_tool_images`.

    Only what is sent changes, so that agents, memories and chat engines work as before.

    Example:
        >>> from llama_index.llms.openai import OpenAI                                              # doctest: +SKIP
        >>> class PageOpenAI(MoveToolImages, OpenAI):                                               # doctest: +SKIP
        ...     pass
        >>> agent = FunctionAgent(tools=[tool], llm=PageOpenAI("gpt-4.1"))                          # doctest: +SKIP
    """

    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Chat, with images moved."""
        return super().chat(move_tool_images(messages), **kwargs)  # type: ignore[safe-super]  # of the other base

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Chat as a stream, with images moved."""
        return super().stream_chat(move_tool_images(messages), **kwargs)  # type: ignore[safe-super]

    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Chat without blocking the event loop, with images moved."""
        return await super().achat(move_tool_images(messages), **kwargs)  # type: ignore[safe-super]

    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Chat as a stream without blocking the event loop, with images moved."""
        return await super().astream_chat(move_tool_images(messages), **kwargs)  # type: ignore[safe-super]


def _without_images(message: ChatMessage) -> tuple[ChatMessage, list[ContentBlock]]:
    """Return a tool message without its images, and the images with their names."""
    images: list[ContentBlock] = []
    others: list[ContentBlock] = []
    for block in message.blocks:
        if not isinstance(block, ImageBlock):
            others.append(block)
            continue
        if others and isinstance(others[-1], TextBlock):
            images.append(TextBlock(text=others[-1].text.partition("\n\n")[0]))
        images.append(block)
    if not images:
        return message, []
    # One block, because OpenAI's adapter joins the blocks of a tool message without a space.
    text = TextBlock(text="\n\n".join([*(block.text for block in others if isinstance(block, TextBlock)), _NOTE]))
    rest = [block for block in others if not isinstance(block, TextBlock)]
    heading = TextBlock(text="Images in the tool's result:")
    return message.model_copy(update={"blocks": [text, *rest]}), [heading, *images]
