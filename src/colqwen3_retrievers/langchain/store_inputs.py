"""What is handed to the vector store: checked, and turned into pages."""

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
from colqwen3_retrievers.index.search import Question, to_encode
from colqwen3_retrievers.langchain.kept_documents import document_to_kept_page
from colqwen3_retrievers.pages.images import ImageSource
from colqwen3_retrievers.pages.page import Page, Query
from colqwen3_retrievers.pages.remote_images import AllowRemote, local_image


def texts_to_documents(
    texts: Iterable[str], metadatas: Sequence[Mapping[str, Any]] | None, ids: Sequence[str | None] | None
) -> list[Document]:
    """Put texts, metadatas and ids together.

    Raises:
        ConfigError: a single text, something that is none, or another number of metadatas or ids.

    >>> texts_to_documents(["Revenue rose."], [{"year": 2020}], None)[0].metadata
    {'year': 2020}
    >>> texts_to_documents(["a", "b"], None, ["1"])
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: ids: 1 for 2 texts
    """
    if isinstance(texts, str | bytes):
        raise ConfigError(f"texts: expected a list of texts, got {type(texts).__name__}")
    listed = list(texts)
    for place, text in enumerate(listed):
        if not isinstance(text, str):
            raise ConfigError(f"texts: expected a text at {place}, got {type(text).__name__}")
    each = _each(metadatas, len(listed), "metadatas", "texts")
    known = _each(ids, len(listed), "ids", "texts")
    return [
        Document(page_content=text, metadata=dict(metadata or {}), id=_id(given, place))
        for place, (text, metadata, given) in enumerate(zip(listed, each, known, strict=True))
    ]


def documents_to_pages(
    documents: Iterable[Document], ids: Sequence[str | None] | None, allow_remote: AllowRemote = False
) -> list[Page]:
    """Give documents as pages to keep; a document without an id gets a random one.

    Raises:
        ConfigError: not documents, another number of ids, one id for two contents, or a document that cannot be kept;
            it is named.
        PageError: an image of a repeated id cannot be read.

    >>> documents_to_pages([Document("x")], ["a"])
    [Page(id='a', source='', number=1, text)]
    """
    if isinstance(documents, Document) or not isinstance(documents, Iterable):
        raise ConfigError(f"documents: expected a list of documents, got {type(documents).__name__}")
    listed = list(documents)
    pages = []
    for place, (document, given) in enumerate(zip(listed, _each(ids, len(listed), "ids", "documents"), strict=True)):
        if not isinstance(document, Document):
            raise ConfigError(f"documents: {place} is a {type(document).__name__}, expected a Document")
        page_id = _id(given, place) or document.id or str(uuid.uuid4())
        pages.append(document_to_kept_page(document, page_id, f"document {place}", allow_remote))
    return _one_content_an_id(pages)


def images_to_pages(
    images: Iterable[ImageSource],
    metadatas: Sequence[Mapping[str, Any]] | None,
    ids: Sequence[str | None] | None,
    texts: Sequence[str] | None,
    allow_remote: AllowRemote = False,
) -> list[Page]:
    """Give images as pages; of a file or a web address the source is just that, unless the metadata has one.

    Raises:
        ConfigError: a single image, another number of metadatas, ids or texts, one id for two contents, or a page that
            cannot be made.
        PageError: an image of a repeated id cannot be read.

    >>> images_to_pages(["scans/a.png"], [{"year": 2020}], None, None)
    [Page(id='scans/a.png#page=1', source='scans/a.png', number=1, image)]
    """
    if isinstance(images, str | bytes | Path) or not isinstance(images, Iterable):
        raise ConfigError(f"images: expected a list of images, got {type(images).__name__}")
    listed = list(images)
    each = _each(metadatas, len(listed), "metadatas", "images")
    known = _each(ids, len(listed), "ids", "images")
    beside = _each(texts, len(listed), "texts", "images")
    pages = []
    for place, image in enumerate(listed):
        metadata = dict(each[place] or {})
        file = os.fspath(image) if isinstance(image, str | Path) else None
        source, number = metadata.pop("source", None) or file or "", metadata.pop("page", 1)
        own = f"{source}#page={number}" if file is not None else str(uuid.uuid4())
        try:
            pages.append(
                Page(
                    id=_id(known[place], place) or own,
                    source=source,
                    number=number,
                    label=metadata.pop("page_label", None),
                    image=local_image(image, allow_remote),
                    text=beside[place] or "",
                    metadata=metadata,
                )
            )
        except ConfigError as exc:
            raise ConfigError(f"image {place}: {exc}") from exc
    return _one_content_an_id(pages)


def encoder_of(embedding: Embeddings | ColQwen3Encoder | None) -> ColQwen3Encoder | None:
    """Give the encoder of what stands in LangChain's ``embedding`` argument.

    Raises:
        ConfigError: another maker's embeddings: they give one vector a text, where late interaction compares many.

    >>> encoder_of(None) is None
    True
    """
    if embedding is None or isinstance(embedding, ColQwen3Encoder):
        return embedding
    own = getattr(embedding, "page_encoder", None)
    if isinstance(own, ColQwen3Encoder):
        return own
    raise ConfigError(
        f"embedding: {type(embedding).__name__} gives one vector a text, and this store compares many by late "
        "interaction; give a ColQwen3Encoder, a ColQwen3Embeddings, or None"
    )


def check_question(query: Question) -> Question:
    """Refuse what cannot be searched for, before anything is loaded.

    Raises:
        ConfigError: an empty text, or a type that is no query.

    >>> check_question(" ")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: query: give a text, an image, or both
    """
    if isinstance(query, str):
        Query(query)
    to_encode([query])
    return query


def refuse(unknown: Mapping[str, Any], *known: str) -> None:
    """Refuse arguments that mean nothing here: a misspelt filter must not find everything.

    Raises:
        ConfigError: there is one.

    >>> refuse({"filtre": 1}, "k", "filter")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: filtre: unknown argument; known: k, filter
    """
    for name in unknown:
        raise ConfigError(f"{name}: unknown argument; known: {', '.join(known)}")


def _each(values: Sequence[Any] | None, count: int, name: str, what: str) -> Sequence[Any]:
    if values is None:
        return [None] * count
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise ConfigError(f"{name}: expected a list, got {type(values).__name__}")
    if len(values) != count:
        raise ConfigError(f"{name}: {len(values)} for {count} {what}")
    return values


def _one_content_an_id(pages: list[Page]) -> list[Page]:
    """Refuse what the index would refuse, before it has kept what came before."""
    first: dict[str, int] = {}
    for place, page in enumerate(pages):
        earlier = first.setdefault(page.id, place)
        if earlier != place and pages[earlier].sha256 != page.sha256:
            places = f"given at {earlier} and, with another content, at {place}"
            raise ConfigError(f"ids: {page.id!r}: {places}; one would be lost")
    return pages


def _id(given: object, place: int) -> str | None:
    if given is not None and (not isinstance(given, str) or not given):
        raise ConfigError(f"ids: expected a non-empty text or None at {place}, got {given!r}")
    return given
