"""Documents as content blocks of a chat message: each page image right after its name, so that it can be cited."""

from __future__ import annotations

import base64
import contextlib
import io
import logging
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from langchain_core.documents import Document
from langchain_core.messages.content import ContentBlock, ImageContentBlock, TextContentBlock
from PIL import ExifTags, Image

from colqwen3_retrievers.errors import ConfigError, EncodeError, PageError
from colqwen3_retrievers.images import ImageSource, open_header, open_image, read_image_bytes
from colqwen3_retrievers.langchain.documents import document_citation, document_image, document_text

_log = logging.getLogger(__name__)

_AS_THEY_ARE: Final = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


def docs_to_content_blocks(documents: Sequence[Document], *, max_images: int | None = None) -> list[ContentBlock]:
    r"""Give documents as LangChain content blocks for a chat model that sees.

    Each document begins with a text block that names it ("[1] a.pdf, page 3"). Then comes its page image in base64, or,
    when it has none or ``max_images`` are spent, its text in the same block as its name. Upright files in PNG, JPEG,
    WebP and GIF go as they are, other images as PNG; nothing is fetched.

    Args:
        documents: of :class:`ColQwen3Retriever` or any other retriever; see
            :func:`~colqwen3_retrievers.langchain.documents.document_image` for where their images may lie.
        max_images: most images, those of the first documents; None sends all.

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
            image = document_image(document) if left > 0 else None
            picture = None if image is None else _image_block(image, name)
        except (ConfigError, PageError) as exc:
            if not text.strip():
                raise EncodeError(f"document {position}: {exc}", index=position) from exc
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
    """One image block; the bytes of a file stay as they are where chat models read the format."""
    if isinstance(image, str | Path | bytes):
        data = read_image_bytes(image, name=name if isinstance(image, bytes) else None)
        header = open_header(io.BytesIO(data), name=name)
        mime_type = _AS_THEY_ARE.get(header.format or "")
        if mime_type is None or not _is_upright(header):
            data, mime_type = _png(open_image(data, name=name)), "image/png"
    else:
        data, mime_type = _png(open_image(image, name=name)), "image/png"
    return ImageContentBlock(type="image", base64=base64.b64encode(data).decode("ascii"), mime_type=mime_type)


def _is_upright(header: Image.Image) -> bool:
    """Whether pixels lie as they are meant to be seen; not every chat model turns a picture as its EXIF says."""
    with contextlib.suppress(Exception):  # the EXIF parser raises whatever the bytes lead it to
        return bool(header.getexif().get(ExifTags.Base.Orientation, 1) == 1)
    return True


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
