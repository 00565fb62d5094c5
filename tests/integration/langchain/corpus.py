"""Scans, their exact order for a question, and stand-ins for what surrounds our classes: a chat model, a retriever."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.retrievers import BaseRetriever
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, Page
from tests.frameworks.scans import digest, scan

PAGES = 8
QUESTION = "what was the revenue in 2024?"


def scans() -> Iterator[Page]:
    """Every page has the same text layer, so that only its image tells it from the others."""
    for n in range(1, PAGES + 1):
        yield Page(source="scan.pdf", number=n, image=scan(n), text="Confidential")


def best_pages(encoder: ColQwen3Encoder, question: str, k: int) -> list[int]:
    """Page numbers in the order of exact MaxSim, counted here from the images themselves."""
    scores = encoder.score(encoder.encode_queries([question]), encoder.encode_pages(scans()))[0]
    return [int(position) + 1 for position in np.argsort(-scores, kind="stable")[:k]]


def named_scans(numbers: Sequence[int]) -> dict[str, str]:
    """What a chat model is shown of some scans: the name before each image, and a digest of its pixels."""
    return {f"[{place}] scan.pdf, page {n}": digest(scan(n)) for place, n in enumerate(numbers, start=1)}


def images_of(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Image.Image]:
    """The images among content blocks, by the text block before each of them."""
    images: dict[str, Image.Image] = {}
    name = "no name before this image"
    for block in blocks:
        if block["type"] == "text":
            name = block["text"]
        else:
            assert block["type"] == "image"
            images[name] = Image.open(io.BytesIO(base64.b64decode(block["base64"])))
            name = "no name before this image"
    return images


class ScriptedChat(BaseChatModel):
    """A chat model whose answer is a function of the messages: :meth:`answer`."""

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self.answer(messages))])

    def answer(self, messages: list[BaseMessage]) -> AIMessage:
        raise NotImplementedError


class FixedRetriever(BaseRetriever):
    """Returns the same documents whatever is asked."""

    documents: list[Document]

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return self.documents
