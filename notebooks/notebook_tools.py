"""What the notebooks share: pictures small enough to keep in them, and a chat model.

The chat model is yours when one is configured (``OPENAI_MODEL``, with ``OPENAI_API_KEY``, ``OPENAI_BASE_URL`` or both:
OpenAI's, or any server that speaks its protocol). Else it is a stand-in, which is no language model: it answers with
the list of the page images it was handed, and keeps their bytes, so that what would reach a model can be checked.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
import os
import re
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any, NamedTuple

from IPython.display import display
from PIL import Image, ImageDraw, ImageFont

# -- pictures ----------------------------------------------------------------------------------------------------------


def show(*images: Image.Image, labels: Sequence[str] = (), height: int = 300, columns: int = 5, colours: int = 48) -> None:
    """Show pictures side by side, each scaled to a height, in few colours, with a label below it.

    Args:
        images: at least one.
        labels: of the first images; missing ones are empty.
        height: of each picture, in pixels.
        columns: most pictures in a row.
        colours: of the palette; fewer make the notebook smaller.
    """
    scaled = [image.convert("RGB").resize((round(image.width * height / image.height), height), Image.Resampling.LANCZOS)
              for image in images]
    font, below, gap = ImageFont.load_default(13), 22 if labels else 0, 10
    rows = [scaled[at : at + columns] for at in range(0, len(scaled), columns)]
    width = max(sum(image.width + gap for image in row) for row in rows) + gap
    sheet = Image.new("RGB", (width, len(rows) * (height + below + gap) + gap), "#d9dee4")
    draw, texts = ImageDraw.Draw(sheet), iter([*labels, *[""] * len(scaled)])
    for number, row in enumerate(rows):
        x, y = gap, gap + number * (height + below + gap)
        for image in row:
            sheet.paste(image, (x, y))
            draw.text((x, y + height + 3), next(texts), fill="#1c2430", font=font)
            x += image.width + gap
    display(sheet.quantize(colours))


# -- what a stand-in was shown -----------------------------------------------------------------------------------------


class Shown(NamedTuple):
    """A picture that reached a chat model.

    Attributes:
        label: the text that stood right before it, in one line; "" when none did.
        data: the bytes of the picture's file.
    """

    label: str
    data: bytes

    @property
    def sha256(self) -> str:
        """Hex digest of the bytes."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def image(self) -> Image.Image:
        """The picture."""
        return Image.open(io.BytesIO(self.data))


def stand_in_answer(shown: Sequence[Shown]) -> str:
    """What a stand-in says: what it is, and what it was handed."""
    lines = [f"(a stand-in, no language model) I was handed {len(shown)} page image{'s' * (len(shown) != 1)}:"]
    for one in shown:
        image = one.image
        lines.append(f"  {one.label}: {image.format} {image.width}x{image.height}, sha256 {one.sha256[:12]}")
    return "\n".join(lines)


def labelled(blocks: Iterable[str | bytes]) -> list[Shown]:
    """Pair pictures with the text right before them; two pictures never share one.

    >>> labelled(["[1] a.pdf, page 1", b"one", "[2] a.pdf,\\n page 2", b"two", b"three"])
    [Shown(label='[1] a.pdf, page 1', data=b'one'), Shown(label='[2] a.pdf, page 2', data=b'two'), Shown(label='', data=b'three')]
    """
    found, label = [], ""
    for block in blocks:
        if isinstance(block, str):
            label = " ".join(re.split("-{3,}", block)[-1].split())  # what a prompt says before its context is no label
        else:
            found.append(Shown(label, block))
            label = ""
    return found


def configured() -> tuple[str, str | None, str | None] | None:
    """Model, key and base URL of the chat model that the environment names; None when it names none.

    Raises:
        ValueError: a key or a URL without the model's name.
    """
    model, key, url = (os.environ.get(f"OPENAI_{name}") or None for name in ("MODEL", "API_KEY", "BASE_URL"))
    if key is None and url is None:
        return None
    if model is None:
        raise ValueError("OPENAI_MODEL: name the chat model (one that sees images)")
    return model, key, url


def _needed(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as exc:
        raise ModuleNotFoundError(f"a chat model is configured; this needs: pip install {package}") from exc


# -- LlamaIndex --------------------------------------------------------------------------------------------------------


def llama_index_chat_model() -> Any:
    """The configured chat model as an LLM of LlamaIndex, or a stand-in, whose ``shown`` are the pictures it was handed.

    Raises:
        ModuleNotFoundError: one is configured, and ``llama-index-llms-openai-like`` is not installed.
    """
    if (given := configured()) is not None:
        model, key, url = given
        made = _needed("llama_index.llms.openai_like", "llama-index-llms-openai-like").OpenAILike(
            model=model, api_key=key or "none", api_base=url or "https://api.openai.com/v1",
            is_chat_model=True, is_function_calling_model=True,
        )  # fmt: skip
        return made
    return _llama_index_stand_in()


def _llama_index_stand_in() -> Any:
    from llama_index.core.base.llms.types import (
        ChatMessage,
        ChatResponse,
        ImageBlock,
        LLMMetadata,
        MessageRole,
        TextBlock,
    )
    from llama_index.core.bridge.pydantic import PrivateAttr
    from llama_index.core.llms.function_calling import FunctionCallingLLM
    from llama_index.core.llms.llm import ToolSelection

    def looked(messages: Sequence[ChatMessage]) -> list[Shown]:
        blocks: list[str | bytes] = []
        for message in messages:
            for block in message.blocks:
                if isinstance(block, TextBlock):
                    blocks.append(block.text)
                elif isinstance(block, ImageBlock):
                    blocks.append(block.resolve_image().read())
        return labelled(blocks)

    class StandIn(FunctionCallingLLM):
        """Says which page images it was handed; calls its first tool, once, with what it is asked."""

        _shown: list[Shown] = PrivateAttr(default_factory=list)

        @property
        def metadata(self) -> LLMMetadata:
            return LLMMetadata(
                context_window=128_000, is_chat_model=True, is_function_calling_model=True, model_name="stand-in"
            )

        @property
        def shown(self) -> list[Shown]:
            """The pictures of its last answer."""
            return self._shown

        def chat(self, messages: Sequence[ChatMessage], tool: str | None = None, **_: Any) -> ChatResponse:
            if tool is not None and not any(message.role == MessageRole.TOOL for message in messages):
                calls = [{"name": tool, "input": messages[-1].content or ""}]
                return ChatResponse(message=ChatMessage("", role="assistant", additional_kwargs={"calls": calls}))
            self._shown = looked(messages)
            return ChatResponse(message=ChatMessage(stand_in_answer(self._shown), role="assistant"))

        async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
            return self.chat(messages, **kwargs)

        async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Any:
            async def whole() -> AsyncGenerator[ChatResponse]:
                yield self.chat(messages, **kwargs)

            return whole()

        def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Any:
            yield self.chat(messages, **kwargs)

        def _prepare_chat_with_tools(
            self, tools: Any, user_msg: Any = None, chat_history: Any = None, **_: Any
        ) -> dict[str, Any]:
            asked = [ChatMessage(user_msg) if isinstance(user_msg, str) else user_msg] if user_msg else []
            return {"messages": [*(chat_history or []), *asked], "tool": tools[0].metadata.get_name()}

        def get_tool_calls_from_response(
            self, response: ChatResponse, error_on_no_tool_call: bool = True, **_: Any
        ) -> list[ToolSelection]:
            calls = response.message.additional_kwargs.get("calls", [])
            return [ToolSelection(tool_id="call-1", tool_name=call["name"], tool_kwargs={"input": call["input"]})
                    for call in calls]  # fmt: skip

        def _only_chats(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError("a chat model")

        complete = acomplete = stream_complete = astream_complete = _only_chats

    return StandIn()


# -- LangChain ---------------------------------------------------------------------------------------------------------


def langchain_chat_model() -> Any:
    """The configured chat model as one of LangChain, or a stand-in, whose ``shown`` are the pictures it was handed.

    Raises:
        ModuleNotFoundError: one is configured, and ``langchain-openai`` is not installed.
    """
    if (given := configured()) is not None:
        model, key, url = given
        return _needed("langchain_openai", "langchain-openai").ChatOpenAI(model=model, api_key=key or "none", base_url=url)
    return _langchain_stand_in()


def _langchain_stand_in() -> Any:
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
    from langchain_core.outputs import ChatGeneration, ChatResult
    from pydantic import PrivateAttr

    def looked(messages: Sequence[BaseMessage]) -> list[Shown]:
        blocks: list[str | bytes] = []
        for message in messages:
            for block in message.content_blocks:
                if block["type"] == "text":
                    blocks.append(block["text"])
                elif block["type"] == "image":
                    blocks.append(base64.b64decode(block["base64"]))
        return labelled(blocks)

    class StandIn(BaseChatModel):
        """Says which page images it was handed; calls its first tool, once, with what it is asked."""

        _tools: list[str] = PrivateAttr(default_factory=list)
        _shown: list[Shown] = PrivateAttr(default_factory=list)

        @property
        def _llm_type(self) -> str:
            return "stand-in"

        @property
        def shown(self) -> list[Shown]:
            """The pictures of its last answer."""
            return self._shown

        def bind_tools(self, tools: Sequence[Any], **_: Any) -> Any:
            bound = self.model_copy()  # which shares the list of what was shown
            bound._tools = [tool.name for tool in tools]
            return bound

        def _generate(
            self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **_: Any
        ) -> ChatResult:
            if self._tools and not any(isinstance(message, ToolMessage) for message in messages):
                question = next(message for message in reversed(messages) if isinstance(message, HumanMessage))
                call = {"name": self._tools[0], "args": {"query": question.text}, "id": "call-1"}
                answer = AIMessage("", tool_calls=[call])
            else:
                self._shown[:] = looked(messages)
                answer = AIMessage(stand_in_answer(self._shown))
            return ChatResult(generations=[ChatGeneration(message=answer)])

    return StandIn()
