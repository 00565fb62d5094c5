"""Documents to pages that an index keeps, so that they come back as they went in."""

from __future__ import annotations

from typing import Any, Final

from langchain_core.documents import Document

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.langchain.documents import (
    EVIDENCE,
    KEPT,
    STALE,
    citation,
    cited_content,
    document_image,
    document_text,
)
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.pages.remote_images import AllowRemote
from colqwen3_retrievers.retrieval.evidence import without_evidence

_OWN: Final = {"source", "page", "page_label", "citation", "sha256", *STALE, *EVIDENCE}
"""Keys that :func:`~colqwen3_retrievers.langchain.documents.page_to_document` makes from the page itself."""


def document_to_kept_page(document: Document, id: str, name: str, allow_remote: AllowRemote = False) -> Page:
    """Give a document as a page to be kept in an index.

    A document that a page of ours gave becomes that page again. Any other keeps its content and its metadata word for
    word; ``source``, ``page`` and ``page_label`` also become the page's own, so that results can be grouped by source
    and neighbours be found. LangChain's loaders count pages from 0, so the page's number is then one more. Its image is
    taken out of the metadata, and comes back as ``metadata["image_path"]``; a document with an image and no content
    comes back with a content that names it, for others drop or merge documents without any.

    Args:
        document: of any maker; left as it is.
        id: the page's.
        name: what to call the document in an error.
        allow_remote: as for :func:`~colqwen3_retrievers.langchain.documents.document_image`.

    Raises:
        ConfigError: neither image nor text, an image that is none, or metadata that is not JSON.

    >>> document = Document("Revenue rose.", metadata={"source": "a.pdf", "page": 0})
    >>> page = document_to_kept_page(document, "x", "document 0")
    >>> page, page.metadata
    (Page(id='x', source='a.pdf', number=1, text), {'source': 'a.pdf', 'page': 0, '_langchain': 'text'})
    """
    try:
        image, text = document_image(document, allow_remote), document_text(document)
        if image is None and not text.strip():
            text = document.page_content  # nothing but its name is still a text
        if image is None and not text.strip():
            raise ConfigError("neither a text nor an image (metadata 'image_path' or 'image')")
        metadata = {key: value for key, value in without_evidence(document.metadata).items() if key != KEPT}
        if image is not None:
            metadata = {key: value for key, value in metadata.items() if key not in ("image", "image_path")}
        same = _same_page(document, metadata, id, image, text)
        if same is not None:
            return same
        metadata[KEPT] = "text"
        if image is not None and not document.page_content.strip():
            metadata |= {"citation": _name(metadata, id), KEPT: "cited"}
        elif cited_content(str(metadata.get("citation")), text) == document.page_content:
            metadata[KEPT] = "cited"
        return Page(
            id=id,
            source=_text(metadata.get("source")) or "",
            number=_number(metadata),
            label=_text(metadata.get("page_label")),
            image=image,
            text=document.page_content if metadata[KEPT] == "text" else text,
            metadata=metadata,
        )
    except ConfigError as exc:
        raise ConfigError(f"{name}: {str(exc).removeprefix(f'page {id!r}: ')}") from exc


def _same_page(document: Document, metadata: dict[str, Any], id: str, image: Any, text: str) -> Page | None:
    """The page that gave this document, if one did."""
    source, number = metadata.get("source"), metadata.get("page")
    if not isinstance(source, str) or not isinstance(number, int) or isinstance(number, bool) or number < 1:
        return None
    own = {key: value for key, value in metadata.items() if key not in _OWN}
    page = Page(
        id=id, source=source, number=number, label=_text(metadata.get("page_label")), image=image, text=text,
        metadata=own,
    )  # fmt: skip
    cited = citation(page)
    if metadata.get("citation") != cited or cited_content(cited, text) != document.page_content:
        return None
    return page


def _number(metadata: dict[str, Any]) -> int:
    page = metadata.get("page")
    if not isinstance(page, int) or isinstance(page, bool) or not 0 <= page < 2**62:
        return 1
    ours = isinstance(metadata.get("citation"), str)
    return max(page, 1) if ours else page + 1


def _name(metadata: dict[str, Any], id: str) -> str:
    """Name a document that has no content, differently for every id."""
    source = metadata.get("source")
    if not source:
        return id
    page = metadata.get("page_label", metadata.get("page"))
    return f"{source} [{id}]" if page is None else f"{source}, page {page} [{id}]"


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
