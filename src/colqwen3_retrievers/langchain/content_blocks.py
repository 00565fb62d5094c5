"""Documents as content blocks of a chat message: each page image follows its name, so that it can be cited."""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from pathlib import Path

from langchain_core.documents import Document
from langchain_core.messages.content import ContentBlock, ImageContentBlock, TextContentBlock

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, EncodeError, PageError
from colqwen3_retrievers.langchain.documents import document_citation, document_image, document_text
from colqwen3_retrievers.pages.images import ImageSource, chat_image
from colqwen3_retrievers.pages.remote_images import AllowRemote

_log = logging.getLogger(__name__)


def docs_to_content_blocks(
    documents: Sequence[Document], *, max_images: int | None = None, allow_remote: AllowRemote = False
) -> list[ContentBlock]:
    r"""Return documents as LangChain content blocks for a multimodal chat model.

    Each document begins with a text block that names it ("[1] a.pdf, page 3"). Its page image in base64 follows; a
    document without one, or beyond ``max_images``, has its text in the same block as its name. Upright files in PNG,
    JPEG, WebP and GIF are sent unchanged, other images as PNG; nothing is fetched unless ``allow_remote`` permits it.

    Args:
        documents: of :class:`ColQwen3Retriever` or any other retriever; see
            :func:`~colqwen3_retrievers.langchain.documents.document_image` for where their images may be.
        max_images: most images, those of the first documents; None sends all.
        allow_remote: whether images known by a web address are fetched, to be sent as bytes; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.

    Returns:
        Standard content blocks, in the order of the documents.

    Raises:
        EncodeError: an image cannot be read, and the document has no text to send instead (which logs a warning);
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
    images_left = len(documents) if max_images is None else whole_number(max_images, "max_images")
    blocks: list[ContentBlock] = []
    for position, document in enumerate(documents):
        name = f"[{position + 1}] {document_citation(document, position)}"
        text = document_text(document)
        try:
            image = document_image(document, allow_remote) if images_left > 0 else None
            image_block = None if image is None else _image_block(image, name)
        except (ConfigError, PageError) as exc:
            if not text.strip():
                raise EncodeError.of(exc, position, f"document {position}") from exc
            _log.warning("document %d is sent as text: %s", position, exc)
            image_block = None
        if image_block is not None:
            images_left -= 1
            blocks += [TextContentBlock(type="text", text=name), image_block]
        else:
            blocks.append(TextContentBlock(type="text", text=f"{name}\n\n{text}" if text.strip() else name))
    return blocks


def _image_block(image: ImageSource, name: str) -> ImageContentBlock:
    data, media_type = chat_image(image, name=None if isinstance(image, str | Path) else name)
    return ImageContentBlock(type="image", base64=base64.b64encode(data).decode("ascii"), mime_type=media_type)
