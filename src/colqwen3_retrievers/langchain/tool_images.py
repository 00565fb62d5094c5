"""Images of tool answers moved into a user message, for chat APIs whose tool messages carry only text."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.messages import BaseMessage, HumanMessage, ToolMessage

if TYPE_CHECKING:
    from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse

_IMAGES = ("image", "image_url", "input_image")  # content blocks of LangChain, and of OpenAI's two APIs
_NOTE = "The images of this result are in the next user message."


def move_tool_images(messages: Sequence[BaseMessage]) -> list[BaseMessage]:
    r"""Return messages in which the images of tool messages follow in a user message.

    Every chat model with vision accepts images in a user message; OpenAI's Chat Completions API accepts them nowhere
    else. A tool message keeps its text. After each run of tool messages (the answers to one message of the model)
    comes one user message with their images, each after the first paragraph of the text before it: its name, for the
    answers of :func:`~colqwen3_retrievers.langchain.retriever_tool.create_page_retriever_tool`.

    Args:
        messages: a conversation; it is not changed.

    Example:
        >>> image = {"type": "image", "base64": "iVBORw0KGgo=", "mime_type": "image/png"}
        >>> answer = [{"type": "text", "text": "[1] a.pdf, page 3"}, image]
        >>> tool, user = move_tool_images([ToolMessage(answer, tool_call_id="call-1")])
        >>> tool.content, [block["type"] for block in user.content]
        ('[1] a.pdf, page 3\n\nThe images of this result are in the next user message.', ['text', 'text', 'image'])
    """
    moved: list[BaseMessage] = []
    images: list[str | dict[str, Any]] = []
    for message in messages:
        if isinstance(message, ToolMessage):
            text_only, blocks = _without_images(message)
            moved.append(text_only)
            images += blocks
            continue
        if images:
            moved.append(HumanMessage(images))
            images = []
        moved.append(message)
    return [*moved, HumanMessage(images)] if images else moved


def move_tool_images_middleware() -> AgentMiddleware[Any, Any]:
    """Return middleware for ``create_agent`` that shows a model tool images in user messages.

    The agent's own messages are not changed, only what each call of the model gets; see :func:`move_tool_images`.

    Example:
        >>> from langchain.agents import create_agent                                            # doctest: +SKIP
        >>> agent = create_agent(                                                                # doctest: +SKIP
        ...     "openai:gpt-5", [tool], middleware=[move_tool_images_middleware()])
    """
    from langchain.agents.middleware import AgentMiddleware  # whoever has an agent to extend has the package langchain

    class MoveToolImages(AgentMiddleware[Any, Any]):
        def wrap_model_call(
            self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
        ) -> ModelResponse[Any]:
            return handler(_moved(request))

        async def awrap_model_call(
            self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
        ) -> ModelResponse[Any]:
            return await handler(_moved(request))

    return MoveToolImages()


def _moved(request: ModelRequest[Any]) -> ModelRequest[Any]:
    messages: list[Any] = list(move_tool_images(request.messages))
    return request.override(messages=messages)


def _without_images(message: ToolMessage) -> tuple[ToolMessage, list[str | dict[str, Any]]]:
    """Return a tool message without its images, and the images with their names."""
    images: list[str | dict[str, Any]] = []
    others: list[str | dict[str, Any]] = []
    for block in message.content if isinstance(message.content, list) else []:
        if not isinstance(block, dict) or block.get("type") not in _IMAGES:
            others.append(block)
            continue
        if others and (name := _text(others[-1])):
            images.append({"type": "text", "text": name.partition("\n\n")[0]})
        images.append(block)
    if not images:
        return message, []
    others.append({"type": "text", "text": _NOTE})
    texts = [_text(block) for block in others]
    # A plain text where possible, for servers whose tool messages take no list.
    content = others if None in texts else "\n\n".join(text for text in texts if text)
    heading = f"Images in the result of the tool {message.name}:" if message.name else "Images in the tool's result:"
    return message.model_copy(update={"content": content}), [{"type": "text", "text": heading}, *images]


def _text(block: str | dict[str, Any]) -> str | None:
    if isinstance(block, str):
        return block
    text = block.get("text") if block.get("type") == "text" else None
    return text if isinstance(text, str) else None
