"""Chat models for tests of the LlamaIndex adapter: they answer from a script and keep what they were shown."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ImageBlock,
    LLMMetadata,
    MessageRole,
    TextBlock,
)
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools.types import BaseTool

ANSWER = "It rose."


def images_of(messages: Sequence[ChatMessage]) -> list[bytes]:
    """The bytes of the pictures in some messages."""
    blocks = [block for message in messages for block in message.blocks if isinstance(block, ImageBlock)]
    return [block.resolve_image().read() for block in blocks]


def texts_of(messages: Sequence[ChatMessage]) -> str:
    """The texts in some messages, one below the other."""
    return "\n".join(block.text for message in messages for block in message.blocks if isinstance(block, TextBlock))


def _answer(text: str, **extra: Any) -> ChatResponse:
    return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text, additional_kwargs=extra))


def _not_asked(self: Any, *_: Any, **__: Any) -> Any:
    raise AssertionError("no test completes or streams")


class RecordingLLM(CustomLLM):
    """A chat model that answers always the same and keeps what it was asked."""

    _asked: list[list[ChatMessage]] = PrivateAttr(default_factory=list)
    _script: list[str] = PrivateAttr(default_factory=list)

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(context_window=1_000_000, num_output=256, is_chat_model=True, model_name="recording")

    @property
    def images(self) -> list[bytes]:
        """The bytes of the pictures it was shown."""
        return [image for messages in self._asked for image in images_of(messages)]

    @property
    def texts(self) -> str:
        return "\n".join(texts_of(messages) for messages in self._asked)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **_: Any) -> ChatResponse:
        self._asked.append(list(messages))
        return _answer(self._script.pop(0) if self._script else ANSWER)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **_: Any) -> ChatResponse:
        self._asked.append(list(messages))
        return _answer(self._script.pop(0) if self._script else ANSWER)

    complete = stream_complete = _not_asked


class CallingLLM(FunctionCallingLLM):
    """A chat model that calls a tool with what it is asked, and answers once the tool has given something."""

    _asked: list[list[ChatMessage]] = PrivateAttr(default_factory=list)

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(
            context_window=1_000_000, num_output=256, is_chat_model=True, is_function_calling_model=True,
            model_name="calling",
        )  # fmt: skip

    @property
    def tool_messages(self) -> list[ChatMessage]:
        """What tools gave, as the model was last told."""
        return [message for message in self._asked[-1] if message.role == MessageRole.TOOL]

    def _prepare_chat_with_tools(
        self, tools: Sequence[BaseTool], user_msg: Any = None, chat_history: Any = None, **_: Any
    ) -> dict[str, Any]:
        return {"messages": list(chat_history or []), "tool": tools[0].metadata.get_name()}

    def _step(self, messages: Sequence[ChatMessage], tool: str = "") -> ChatResponse:
        self._asked.append(list(messages))
        if any(message.role == MessageRole.TOOL for message in messages):
            return _answer(ANSWER)
        return _answer("", calls=[{"name": tool, "input": messages[-1].content or ""}])

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **_: Any
    ) -> list[ToolSelection]:
        calls = response.message.additional_kwargs.get("calls", [])
        return [
            ToolSelection(tool_id="1", tool_name=call["name"], tool_kwargs={"input": call["input"]}) for call in calls
        ]

    def chat(self, messages: Sequence[ChatMessage], tool: str = "", **_: Any) -> ChatResponse:
        return self._step(messages, tool)

    async def achat(self, messages: Sequence[ChatMessage], tool: str = "", **_: Any) -> ChatResponse:
        return self._step(messages, tool)

    async def astream_chat(self, messages: Sequence[ChatMessage], tool: str = "", **_: Any) -> ChatResponseAsyncGen:
        response = self._step(messages, tool)

        async def stream() -> AsyncGenerator[ChatResponse]:
            yield response

        return stream()

    complete = acomplete = stream_complete = astream_complete = stream_chat = _not_asked
