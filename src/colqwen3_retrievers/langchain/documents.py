"""Pages to LangChain documents and back: nothing that is not JSON, nothing two pages share, nothing lost on the way."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Final

from langchain_core.documents import Document
from PIL import Image

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.pages.images import ImageSource
from colqwen3_retrievers.pages.page import Hit, Page
from colqwen3_retrievers.pages.remote_images import AllowRemote, local_image
from colqwen3_retrievers.retrieval.evidence import BOXES, HEATMAP, POOLED

SCORE: Final = "score"
"""Metadata key of the retrieval score: the MaxSim sum, a Python float."""

RELEVANCE_SCORE: Final = "relevance_score"
"""Metadata key of the rerank score, as LangChain's other rerankers name it."""

NEIGHBOUR_OF: Final = "neighbour_of"
"""Metadata key of a neighbouring page: the id of the page that was found, and beside which it stands."""

STALE: Final = ("image_path", SCORE, RELEVANCE_SCORE, NEIGHBOUR_OF)
"""Keys that say something of one search or one machine, and are made anew with each document."""

EVIDENCE: Final = (BOXES, HEATMAP, POOLED)
"""Keys of what a search was asked to tell. A page may have its own of these names, and documents show them unless told
otherwise; a document of ours that is added again leaves them behind."""

OTHER_VIEWS: Final = ("_llama_index",)
"""Technical keys of pages that came into the index by another framework; no document shows them."""

KEPT: Final = "_langchain"
"""Technical key in a page's metadata: the page was a LangChain document, and goes back to it word for word.

``"text"``: its content is the page's text. ``"cited"``: its content is ``metadata["citation"]`` and then the text. See
:mod:`~colqwen3_retrievers.langchain.kept_documents`; no document shows this key.
"""

_REMOTE = re.compile(r"(?:https?|ftps?|s3|gs|az)://", re.IGNORECASE)
_DATA_URL = re.compile(r"data:[^,]*?;base64,", re.IGNORECASE)


def page_to_document(page: Page, score: float | None = None) -> Document:
    r"""Give a page as a LangChain document.

    Args:
        page: from an index or from files; its image is not opened.
        score: MaxSim sum, when it was retrieved.

    Returns:
        A plain ``Document``. ``page_content`` is never empty and never the same for two pages of different id: it is
        the citation ("a.pdf, page 3"), followed by a blank line and the page's text where there is one. ``metadata``
        is the page's own, and over it ``source``, ``file_name``, ``page`` (from 1), ``page_label`` (as printed),
        ``citation``, ``sha256``, and where known ``image_path`` (absolute) and ``score``. ``id`` is the page's.
        A page that was a document of another maker has that one's content and metadata, as they were.

    Raises:
        PageError: the page has no digest yet and its image cannot be opened.

    >>> document = page_to_document(Page(source="a.pdf", number=3, text="Revenue rose."), score=7.5)
    >>> document.id, document.page_content, document.metadata["score"]
    ('a.pdf#page=3', 'a.pdf, page 3\n\nRevenue rose.', 7.5)
    """
    if KEPT in page.metadata:
        return _kept_document(page, score)
    cited = citation(page)
    metadata: dict[str, Any] = {
        **page.metadata,
        "source": page.source or page.id,
        "file_name": page.metadata.get("file_name") or PurePath(page.source or page.id).name,
        "page": page.number,
        "page_label": page.label,
        "citation": cited,
        "sha256": page.sha256,
    }
    if page.label is None:
        del metadata["page_label"]  # a filter on it would find nothing
    for stale in (*STALE, *OTHER_VIEWS):
        metadata.pop(stale, None)
    metadata |= _of_this_search(page, score)
    return Document(page_content=cited_content(cited, page.text), metadata=metadata, id=page.id)


def hits_to_documents(
    hits: Sequence[Hit], *, scores: bool = True, evidence: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Document]:
    """Give what a search found as documents.

    Args:
        hits: of one search, with or without neighbours.
        scores: whether ``metadata["score"]`` tells the MaxSim sum.
        evidence: more metadata by page id; see :meth:`~colqwen3_retrievers.retrieval.evidence.Evidence.of_hits`.

    Returns:
        The hits in order, each followed by its neighbouring pages that are no hits themselves and were not listed
        before, without a score and with the id of their hit under ``metadata["neighbour_of"]``.

    >>> pages = [Page(source="a.pdf", number=n, text="x") for n in (1, 2, 3)]
    >>> found = hits_to_documents([Hit(pages[1], 7.5, (pages[0], pages[2])), Hit(pages[0], 7.0)])
    >>> [(document.metadata["page"], document.metadata.get("neighbour_of")) for document in found]
    [(2, None), (3, 'a.pdf#page=2'), (1, None)]
    """
    documents = []
    listed = {hit.page.id for hit in hits}
    for hit in hits:
        documents.append(page_to_document(hit.page, hit.score if scores else None))
        for page in hit.neighbours:
            if page.id not in listed:
                listed.add(page.id)
                beside = page_to_document(page)
                documents.append(beside.model_copy(update={"metadata": {**beside.metadata, NEIGHBOUR_OF: hit.page.id}}))
    for document in documents:
        document.metadata |= (evidence or {}).get(document.id or "", {})
    return documents


def cited_content(cited: str, text: str) -> str:
    r"""Put a citation before a text, if there is one.

    >>> cited_content("a.pdf, page 3", "Revenue rose."), cited_content("a.pdf, page 3", " ")
    ('a.pdf, page 3\n\nRevenue rose.', 'a.pdf, page 3')
    """
    return f"{cited}\n\n{text}" if text.strip() else cited


def citation(page: Page) -> str:
    """Name a page for people, differently for every id.

    >>> citation(Page(source="a.pdf", number=3)), citation(Page(source="a.pdf", number=3, label="iv"))
    ('a.pdf, page 3', 'a.pdf, page 3 (iv)')
    >>> citation(Page(id="x", source="a.pdf")), citation(Page(id="x"))
    ('a.pdf, page 1 [x]', 'x')
    """
    if not page.source:
        return page.id
    printed = f" ({page.label})" if page.label and page.label != str(page.number) else ""
    own_id = f" [{page.id}]" if page.id != f"{page.source}#page={page.number}" else ""
    return f"{page.source}, page {page.number}{printed}{own_id}"


def document_citation(document: Document, position: int) -> str:
    """Name any document for people: its citation, else its source and page, else its id, else its position.

    Args:
        document: ours, or of any other retriever.
        position: where it stands in its list, from 0.

    >>> document_citation(Document("x", metadata={"source": "a.pdf", "page_label": "7"}), 0)
    'a.pdf, page 7'
    >>> document_citation(Document("x"), 0)
    'document 1'
    """
    known = document.metadata.get("citation")
    if isinstance(known, str) and known:
        return known
    source = document.metadata.get("source")
    if not source:
        return document.id or f"document {position + 1}"
    page = document.metadata.get("page_label", document.metadata.get("page"))
    return str(source) if page is None else f"{source}, page {page}"


def document_text(document: Document) -> str:
    r"""Give a document's text without the citation that :func:`page_to_document` put before it.

    >>> document_text(page_to_document(Page(source="a.pdf", text="Revenue rose.")))
    'Revenue rose.'
    >>> document_text(page_to_document(Page(source="a.pdf")))
    ''
    """
    cited = document.metadata.get("citation")
    if isinstance(cited, str) and cited:
        if document.page_content == cited:
            return ""
        return document.page_content.removeprefix(f"{cited}\n\n")
    return document.page_content


def document_image(document: Document, allow_remote: AllowRemote = False) -> ImageSource | None:
    """Find a document's page image; nothing is opened, and nothing fetched unless it may be.

    Args:
        document: with ``metadata["image_path"]``, a file; or ``metadata["image"]``, which is base64, a data URL, bytes,
            a PIL image, or a LangChain or OpenAI image content block. The path comes first.
        allow_remote: whether a content block's web address is fetched; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.

    Returns:
        A path, bytes or a PIL image; None when there is none. A bare web address under ``image`` counts as none, as
        loaders of web pages put previews there; a content block with one that may not be fetched is an error.

    Raises:
        ConfigError: something else stands there.
        PageError: the image cannot be fetched.

    >>> document_image(Document("x", metadata={"image": "data:image/png;base64,YWJj"}))
    b'abc'
    """
    path = document.metadata.get("image_path")
    if path:
        if not isinstance(path, str | Path):
            raise ConfigError(f"metadata['image_path']: expected a path, got {type(path).__name__}")
        return path
    image = document.metadata.get("image")
    if image is None or image == "" or image == b"":
        return None
    if isinstance(image, Image.Image | bytes):
        return image
    if isinstance(image, Mapping):
        return _block_image(image, allow_remote)
    if not isinstance(image, str):
        raise ConfigError(f"metadata['image']: expected base64, bytes or an image block, got {type(image).__name__}")
    return None if _REMOTE.match(image) else _decode(image)


def document_to_page(document: Document, name: str, allow_remote: AllowRemote = False) -> Page:
    """Give any document as a page to encode: its image when it has one, with its text beside it, else its text.

    Args:
        document: ours, or of any other retriever.
        name: the page's id, which errors name.
        allow_remote: as for :func:`document_image`.

    Raises:
        ConfigError: neither image nor text, or an image that is none.
        PageError: the image cannot be fetched.

    >>> document_to_page(Document("Revenue rose."), "document 0")
    Page(id='document 0', source='', number=1, text)
    """
    image, text = document_image(document, allow_remote), document_text(document)
    if image is None and not text.strip():
        raise ConfigError("neither a text nor an image (metadata 'image_path' or 'image')")
    return Page(id=name, image=image, text=text)


def _kept_document(page: Page, score: float | None) -> Document:
    metadata = {key: value for key, value in page.metadata.items() if key != KEPT}
    cited = page.metadata[KEPT] == "cited"
    content = cited_content(str(metadata.get("citation")), page.text) if cited else page.text
    return Document(page_content=content, metadata=metadata | _of_this_search(page, score), id=page.id)


def _of_this_search(page: Page, score: float | None) -> dict[str, Any]:
    known: dict[str, Any] = {} if score is None else {SCORE: float(score)}
    if page.image_path is not None:
        known["image_path"] = os.path.abspath(page.image_path)  # noqa: PTH100 - Path.absolute keeps ".."
    return known


def _block_image(block: Mapping[str, Any], allow_remote: AllowRemote) -> bytes:
    """Bytes of an image content block: LangChain's, LangChain's of version 0, or OpenAI's."""
    data = block.get("base64") or (block.get("data") if block.get("source_type") == "base64" else None)
    if data is None:
        url = block.get("url")
        nested = block.get("image_url")
        data = url or (nested.get("url") if isinstance(nested, Mapping) else nested)
    if not isinstance(data, str) or not data:
        raise ConfigError("metadata['image']: an image block without base64 data")
    if _REMOTE.match(data):
        if isinstance(fetched := local_image(data, allow_remote), bytes):
            return fetched
        raise ConfigError("metadata['image']: an image URL is not fetched; give the image itself or allow_remote=True")
    return _decode(data)


def _decode(text: str) -> bytes:
    start = _DATA_URL.match(text)
    encoded = "".join((text[start.end() :] if start else text).split())
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise ConfigError("metadata['image']: not base64; a path belongs in metadata['image_path']") from exc
