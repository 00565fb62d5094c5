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
from colqwen3_retrievers.pages.images import ImageSource
from colqwen3_retrievers.pages.remote_images import AllowRemote
from colqwen3_retrievers.retrieval.chat_images import MAX_BYTES, MAX_SIDE, ChatImages

_log = logging.getLogger(__name__)


def docs_to_content_blocks(
    documents: Sequence[Document],
    *,
    max_images: int | None = None,
    include_text: bool = False,
    max_side: int = MAX_SIDE,
    max_bytes: int = MAX_BYTES,
    allow_remote: AllowRemote = False,
) -> list[ContentBlock]:
    r"""Return documents as LangChain content blocks for a multimodal chat model.

    Each document begins with a text block that names it ("[1] a.pdf, page 3"). Its page image in base64 follows; a
    document without one, or beyond ``max_images``, has its text in the same block as its name. The image is the one
    that was embedded, upright RGB, as a PNG, JPEG or WebP file within the limits of common APIs; see
    :class:`~colqwen3_retrievers.retrieval.chat_images.ChatImages`. Nothing is fetched unless ``allow_remote`` permits
    it.

    Args:
        documents: of :class:`ColQwen3Retriever` or any other retriever; see
            :func:`~colqwen3_retrievers.langchain.documents.document_image` for where their images may be.
        max_images: most images, those of the first documents; None sends all.
        include_text: whether a document with an image has its text, too, before the image.
        max_side: longest side of an image in pixels; larger ones are reduced.
        max_bytes: most bytes of an image, before base64.
        allow_remote: whether images known by a web address are fetched, to be sent as bytes; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.

    Returns:
        Standard content blocks, in the order of the documents.

    Raises:
        EncodeError: an image cannot be read, and the document has no text to send instead (which logs a warning);
            ``.index`` is the document's position.
        ConfigError: ``max_images`` below 0, ``max_side`` below 1, or ``max_bytes`` below 1,024.

    Example:
        >>> from langchain_core.messages import HumanMessage
        >>> documents = [Document("Revenue rose.", metadata={"source": "a.pdf", "page": 3})]
        >>> blocks = docs_to_content_blocks(documents)
        >>> blocks[0]["text"]
        '[1] a.pdf, page 3\n\nRevenue rose.'
        >>> message = HumanMessage(content_blocks=[*blocks, {"type": "text", "text": "What was the revenue?"}])
    """
    chat_images = ChatImages(max_side, max_bytes)
    images_left = len(documents) if max_images is None else whole_number(max_images, "max_images")
    blocks: list[ContentBlock] = []
    for position, document in enumerate(documents):
        name = f"[{position + 1}] {document_citation(document, position)}"
        text = document_text(document)
        try:
            image = document_image(document, allow_remote) if images_left > 0 else None
            image_block = None if image is None else _image_block(image, name, chat_images)
        except (ConfigError, PageError) as exc:
            if not text.strip():
                raise EncodeError.of(exc, position, f"document {position}") from exc
            _log.warning("document %d is sent as text: %s", position, exc)
            image_block = None
        shown_text = text if include_text or image_block is None else ""
        blocks.append(TextContentBlock(type="text", text=f"{name}\n\n{shown_text}" if shown_text.strip() else name))
        if image_block is not None:
            images_left -= 1
            blocks.append(image_block)
    return blocks


def _image_block(image: ImageSource, name: str, chat_images: ChatImages) -> ImageContentBlock:
    data, media_type = chat_images.encode(image, name=None if isinstance(image, str | Path) else name)
    return ImageContentBlock(type="image", base64=base64.b64encode(data).decode("ascii"), mime_type=media_type)
