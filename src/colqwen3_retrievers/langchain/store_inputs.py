"""Arguments of the vector store: checked, and converted to pages."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings

from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.langchain.documents import checked_documents, document_to_stored_page, errors_about
from colqwen3_retrievers.pages.images import ImageSource
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.pages.remote_images import AllowRemote, local_image


def texts_to_documents(
    texts: Iterable[str], metadatas: Sequence[Mapping[str, Any]] | None, ids: Sequence[str | None] | None
) -> list[Document]:
    """Return texts, metadatas and ids as documents.

    Raises:
        ConfigError: a single text, an item of another type, or another number of metadatas or ids.

    >>> texts_to_documents(["Revenue rose."], [{"year": 2020}], None)[0].metadata
    {'year': 2020}
    >>> texts_to_documents(["a", "b"], None, ["1"])
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: ids: 1 for 2 texts
    """
    if isinstance(texts, str | bytes):
        raise ConfigError(f"texts: expected a list of texts, got {type(texts).__name__}")
    contents = list(texts)
    for position, text in enumerate(contents):
        if not isinstance(text, str):
            raise ConfigError(f"texts: expected a text at {position}, got {type(text).__name__}")
    metadata_of = _one_each(metadatas, len(contents), "metadatas", "texts")
    return [
        Document(page_content=text, metadata=dict(metadata or {}), id=own_id)
        for text, metadata, own_id in zip(contents, metadata_of, _ids(ids, len(contents), "texts"), strict=True)
    ]


def documents_to_pages(
    documents: Iterable[Document], ids: Sequence[str | None] | None, allow_remote: AllowRemote = False
) -> list[Page]:
    """Return documents as pages to store; a document without an id gets a random one.

    Raises:
        ConfigError: not documents, another number of ids, one id for two contents, or a document that cannot be
            stored; it is named.
        PageError: an image of a repeated id cannot be read.

    >>> documents_to_pages([Document("x")], ["a"])
    [Page(id='a', source='', number=1, text)]
    """
    items = checked_documents(documents)
    pages = []
    for position, (document, own_id) in enumerate(zip(items, _ids(ids, len(items), "documents"), strict=True)):
        page_id = own_id or document.id or str(uuid.uuid4())
        pages.append(document_to_stored_page(document, page_id, f"document {position}", allow_remote))
    return _distinct(pages)


def images_to_pages(
    images: Iterable[ImageSource],
    metadatas: Sequence[Mapping[str, Any]] | None,
    ids: Sequence[str | None] | None,
    texts: Sequence[str] | None,
    allow_remote: AllowRemote = False,
) -> list[Page]:
    """Return images as pages; the source of a file or a web address is its path, unless the metadata has one.

    Raises:
        ConfigError: a single image, another number of metadatas, ids or texts, one id for two contents, or a page that
            cannot be made.
        PageError: an image of a repeated id cannot be read.

    >>> images_to_pages(["scans/a.png"], [{"year": 2020}], None, None)
    [Page(id='scans/a.png#page=1', source='scans/a.png', number=1, image)]
    """
    if isinstance(images, str | bytes | Path) or not isinstance(images, Iterable):
        raise ConfigError(f"images: expected a list of images, got {type(images).__name__}")
    items = list(images)
    metadata_of = _one_each(metadatas, len(items), "metadatas", "images")
    text_of = _one_each(texts, len(items), "texts", "images")
    pages = []
    for position, (image, own_id) in enumerate(zip(items, _ids(ids, len(items), "images"), strict=True)):
        metadata = dict(metadata_of[position] or {})
        file = os.fspath(image) if isinstance(image, str | Path) else None
        source, number = metadata.pop("source", None) or file or "", metadata.pop("page", 1)
        default_id = str(uuid.uuid4()) if file is None else f"{source}#page={number}"
        with errors_about(f"image {position}"):
            pages.append(
                Page(
                    id=own_id or default_id,
                    source=source,
                    number=number,
                    label=metadata.pop("page_label", None),
                    image=local_image(image, allow_remote),
                    text=text_of[position] or "",
                    metadata=metadata,
                )
            )
    return _distinct(pages)


def encoder_of(embedding: Embeddings | ColQwen3Encoder | None) -> ColQwen3Encoder | None:
    """Return the encoder of LangChain's ``embedding`` argument.

    Raises:
        ConfigError: another maker's embeddings: they give one vector a text, where late interaction compares many.

    >>> encoder_of(None) is None
    True
    """
    if embedding is None or isinstance(embedding, ColQwen3Encoder):
        return embedding
    encoder = getattr(embedding, "page_encoder", None)
    if isinstance(encoder, ColQwen3Encoder):
        return encoder
    raise ConfigError(
        f"embedding: {type(embedding).__name__} gives one vector a text, and this store compares many by late "
        "interaction; give a ColQwen3Encoder, a ColQwen3Embeddings, or None"
    )


def _one_each(values: Sequence[Any] | None, count: int, name: str, owners: str) -> Sequence[Any]:
    if values is None:
        return [None] * count
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise ConfigError(f"{name}: expected a list, got {type(values).__name__}")
    if len(values) != count:
        raise ConfigError(f"{name}: {len(values)} for {count} {owners}")
    return values


def _ids(ids: Sequence[str | None] | None, count: int, owners: str) -> Sequence[str | None]:
    values = _one_each(ids, count, "ids", owners)
    for position, own_id in enumerate(values):
        if own_id is not None and (not isinstance(own_id, str) or not own_id):
            raise ConfigError(f"ids: expected a non-empty text or None at {position}, got {own_id!r}")
    return values


def _distinct(pages: list[Page]) -> list[Page]:
    """Refuse one id for two contents now: the index would refuse it only after storing earlier batches."""
    first: dict[str, int] = {}
    for position, page in enumerate(pages):
        earlier = first.setdefault(page.id, position)
        if earlier != position and pages[earlier].sha256 != page.sha256:
            positions = f"given at {earlier} and, with another content, at {position}"
            raise ConfigError(f"ids: {page.id!r}: {positions}; one would be lost")
    return pages
