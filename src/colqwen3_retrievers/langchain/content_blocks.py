"""Documents as content blocks of a chat message: each page image right after its name, so that it can be cited."""

from __future__ import annotations

import base64
import logging
import operator
from collections.abc import Sequence
from pathlib import Path

from langchain_core.documents import Document
from langchain_core.messages.content import ContentBlock, ImageContentBlock, TextContentBlock

from colqwen3_retrievers.errors import ConfigError, EncodeError, PageError
from colqwen3_retrievers.langchain.documents import document_citation, document_image, document_text
from colqwen3_retrievers.pages.images import ImageSource, chat_image
from colqwen3_retrievers.pages.remote_images import AllowRemote

_log = logging.getLogger(__name__)


def docs_to_content_blocks(
    documents: Sequence[Document], *, max_images: int | None = None, allow_remote: AllowRemote = False
) -> list[ContentBlock]:
    r"""Give documents as LangChain content blocks for a chat model that sees.

    Each document begins with a text block that names it ("[1] a.pdf, page 3"). Then comes its page image in base64, or,
    when it has none or ``max_images`` are spent, its text in the same block as its name. Upright files in PNG, JPEG,
    WebP and GIF go as they are, other images as PNG; nothing is fetched.

    Args:
        documents: of :class:`ColQwen3Retriever` or any other retriever; see
            :func:`~colqwen3_retrievers.langchain.documents.document_image` for where their images may lie.
        max_images: most images, those of the first documents; None sends all.
        allow_remote: whether images known by a web address are fetched, to be sent as bytes; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.

    Returns:
        Standard content blocks, in the order of the documents.

    Raises:
        EncodeError: an image cannot be read, and there is no text to send in its place (with a warning in the log);
            ``.index`` is the document's position.
        ConfigError: ``max_images`` below 0.

    Example:
        >>> from langchain_core.messages import HumanMessage
        >>> documents = [Document("Revenue rose.", metadata={"source": "a.pdf", "page": 3})]
        >>> blocks = docs_to_content_blocks(documents)
        >>> blocks[0]["text"]
        '[1] a.pdf, page 3\n\nRevenue rose.'
        >>> message = HumanMessage(content_blocks=[*blocks, {"type": "text", "text": "What was the revenue?"}])
    """
    left = len(documents) if max_images is None else _count(max_images)
    blocks: list[ContentBlock] = []
    for position, document in enumerate(documents):
        name = f"[{position + 1}] {document_citation(document, position)}"
        text = document_text(document)
        try:
            image = document_image(document, allow_remote) if left > 0 else None
            picture = None if image is None else _image_block(image, name)
        except (ConfigError, PageError) as exc:
            if not text.strip():
                raise EncodeError.of(exc, position, f"document {position}") from exc
            _log.warning("document %d is sent as text: %s", position, exc)
            picture = None
        if picture is not None:
            left -= 1
            blocks += [TextContentBlock(type="text", text=name), picture]
            continue
        blocks.append(TextContentBlock(type="text", text=f"{name}\n\n{text}" if text.strip() else name))
    return blocks


def _count(max_images: int) -> int:
    try:
        count = operator.index(max_images)
    except TypeError as exc:
        raise ConfigError(f"max_images: expected a whole number from 0 or None, got {max_images!r}") from exc
    if count < 0:
        raise ConfigError(f"max_images: expected a whole number from 0 or None, got {max_images!r}")
    return count


def _image_block(image: ImageSource, name: str) -> ImageContentBlock:
    data, media_type = chat_image(image, name=None if isinstance(image, str | Path) else name)
    return ImageContentBlock(type="image", base64=base64.b64encode(data).decode("ascii"), mime_type=media_type)
