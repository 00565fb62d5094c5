"""Pages to LangChain documents and back: metadata stays JSON, no two pages look alike, nothing is lost on the way."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, Final

from langchain_core.documents import Document

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.pages.images import PlainImage, is_image, plain_image
from colqwen3_retrievers.pages.page import Hit, Page, json_object
from colqwen3_retrievers.pages.remote_images import AllowRemote, local_image
from colqwen3_retrievers.retrieval.evidence import BOXES, HEATMAP, POOLED, without_evidence

SCORE: Final = "score"
"""Metadata key of the retrieval score: the MaxSim sum, a Python float."""

RELEVANCE_SCORE: Final = "relevance_score"
"""Metadata key of the rerank score, as LangChain's other rerankers name it."""

NEIGHBOUR_OF: Final = "neighbour_of"
"""Metadata key of a neighbouring page: the id of the hit it is a neighbour of."""

TRANSIENT: Final = ("image_path", SCORE, RELEVANCE_SCORE, NEIGHBOUR_OF)
"""Keys that depend on one search or one machine; every document gets them anew."""

EVIDENCE: Final = (BOXES, HEATMAP, POOLED)
"""Keys of the regions that answered a search. A page may have metadata of its own under these names, which documents
show unless the search asks for regions; a document of ours that is added again loses the search's."""

OTHER_VIEWS: Final = ("_llama_index",)
"""Technical keys of pages that another framework added to the index; no document shows them."""

ORIGIN: Final = "_langchain"
"""Technical key of a page that was added as a LangChain document; no document shows it.

``"text"``: the document's content is the page's text. ``"cited"``: it is ``metadata["citation"]``, then the text. See
:func:`document_to_stored_page`.
"""

_REMOTE: Final = re.compile(r"(?:https?|ftps?|s3|gs|az)://", re.IGNORECASE)
_DATA_URL: Final = re.compile(r"data:[^,]*?;base64,", re.IGNORECASE)
_NO_CONTENT: Final = "neither a text nor an image (metadata 'image_path' or 'image')"
_FROM_PAGE: Final = {"source", "page", "page_label", "citation", "sha256", *TRANSIENT, *EVIDENCE}  # page_to_document's


def page_to_document(page: Page, score: float | None = None) -> Document:
    r"""Return a page as a LangChain document.

    Args:
        page: from an index or from files; its image is not opened.
        score: MaxSim sum, for a retrieved page.

    Returns:
        A plain ``Document``. ``page_content`` is never empty and differs for any two ids: the citation
        ("a.pdf, page 3"), followed by a blank line and the page's text if it has one. ``metadata`` is the page's own,
        updated with ``source``, ``file_name``, ``page`` (from 1), ``page_label`` (as printed), ``citation``,
        ``sha256``, and where known ``image_path`` (absolute) and ``score``. ``id`` is the page's. A page that was
        added as a document has that document's content and metadata, unchanged.

    Raises:
        PageError: the page has no digest yet and its image cannot be opened.

    >>> document = page_to_document(Page(source="a.pdf", number=3, text="Revenue rose."), score=7.5)
    >>> document.id, document.page_content, document.metadata["score"]
    ('a.pdf#page=3', 'a.pdf, page 3\n\nRevenue rose.', 7.5)
    """
    transient: dict[str, Any] = {} if score is None else {SCORE: float(score)}
    if page.image_path is not None:
        transient["image_path"] = os.path.abspath(page.image_path)  # noqa: PTH100 - Path.absolute keeps ".."
    if ORIGIN in page.metadata:
        metadata = {key: value for key, value in page.metadata.items() if key != ORIGIN}
        cited = page.metadata[ORIGIN] == "cited"
        content = _cited_content(str(metadata.get("citation")), page.text) if cited else page.text
        return Document(page_content=content, metadata=metadata | transient, id=page.id)
    hidden = {*TRANSIENT, *OTHER_VIEWS, "page_label"}
    name = citation(page)
    metadata = {
        **{key: value for key, value in page.metadata.items() if key not in hidden},
        "source": page.source or page.id,
        "file_name": page.metadata.get("file_name") or PurePath(page.source or page.id).name,
        "page": page.number,
        **({} if page.label is None else {"page_label": page.label}),  # a filter on None would find nothing
        "citation": name,
        "sha256": page.sha256,
    }
    return Document(page_content=_cited_content(name, page.text), metadata=metadata | transient, id=page.id)


def hits_to_documents(
    hits: Sequence[Hit], *, scores: bool = True, evidence: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Document]:
    """Return the hits of a search as documents.

    Args:
        hits: of one search, with or without neighbours.
        scores: whether ``metadata["score"]`` holds the MaxSim sum.
        evidence: more metadata by page id; see :meth:`~colqwen3_retrievers.retrieval.evidence.Evidence.of_hits`.

    Returns:
        The hits in order, each followed by those of its neighbours that are neither hits nor listed yet; neighbours
        have no score, and their hit's id under ``metadata["neighbour_of"]``.

    >>> pages = [Page(source="a.pdf", number=n, text="x") for n in (1, 2, 3)]
    >>> documents = hits_to_documents([Hit(pages[1], 7.5, (pages[0], pages[2])), Hit(pages[0], 7.0)])
    >>> [(document.metadata["page"], document.metadata.get("neighbour_of")) for document in documents]
    [(2, None), (3, 'a.pdf#page=2'), (1, None)]
    """
    documents = []
    listed = {hit.page.id for hit in hits}
    for hit in hits:
        documents.append(page_to_document(hit.page, hit.score if scores else None))
        for page in hit.neighbours:
            if page.id not in listed:
                listed.add(page.id)
                documents.append(page_to_document(page))
                documents[-1].metadata[NEIGHBOUR_OF] = hit.page.id
    for document in documents:
        document.metadata |= (evidence or {}).get(document.id or "", {})
    return documents


def citation(page: Page) -> str:
    """Return a readable name of a page, different for every id.

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
    """Return a readable name of any document: its citation, its source and page, its id, or its position.

    Args:
        document: ours, or of any other retriever.
        position: in its list, from 0.

    >>> document_citation(Document("x", metadata={"source": "a.pdf", "page_label": "7"}), 0)
    'a.pdf, page 7'
    >>> document_citation(Document("x"), 0)
    'document 1'
    """
    known = document.metadata.get("citation")
    if isinstance(known, str) and known:
        return known
    return _source_and_page(document.metadata) or document.id or f"document {position + 1}"


def document_text(document: Document) -> str:
    r"""Return a document's text without the citation that :func:`page_to_document` put in front.

    >>> document_text(page_to_document(Page(source="a.pdf", text="Revenue rose.")))
    'Revenue rose.'
    >>> document_text(page_to_document(Page(source="a.pdf")))
    ''
    """
    cited = document.metadata.get("citation")
    if not isinstance(cited, str) or not cited:
        return document.page_content
    return "" if document.page_content == cited else document.page_content.removeprefix(f"{cited}\n\n")


def document_image(document: Document, allow_remote: AllowRemote = False) -> PlainImage | None:
    """Return a document's page image, unopened; nothing is fetched unless ``allow_remote`` permits it.

    Args:
        document: with ``metadata["image_path"]``, a file; or ``metadata["image"]``, which is base64, a data URL, bytes,
            a PIL image, a binary file object, an array, a tensor, or a LangChain or OpenAI image content block. The
            path takes precedence.
        allow_remote: whether a content block's web address is fetched; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.

    Returns:
        A path, bytes or a PIL image; None when there is none. A bare web address under ``image`` counts as none,
        because loaders of web pages put previews there; a content block with one that may not be fetched is an error.

    Raises:
        ConfigError: a value of another kind.
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
    if image is None or (isinstance(image, str | bytes) and not image):
        return None
    if isinstance(image, Mapping):
        return _block_image(image, allow_remote)
    if is_image(image):
        return plain_image(image, name="metadata['image']")
    if not isinstance(image, str):
        raise ConfigError(f"metadata['image']: expected base64, bytes or an image block, got {type(image).__name__}")
    return None if _REMOTE.match(image) else _decode(image)


def checked_documents(documents: Iterable[Document]) -> list[Document]:
    """Return documents as a list.

    Raises:
        ConfigError: a single document, or an item of another type.

    >>> checked_documents(["Revenue rose."])
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: documents: 0 is a str, expected a Document
    """
    if isinstance(documents, Document | str | bytes) or not isinstance(documents, Iterable):
        raise ConfigError(f"documents: expected a list of documents, got {type(documents).__name__}")
    items = list(documents)
    for position, document in enumerate(items):
        if not isinstance(document, Document):
            raise ConfigError(f"documents: {position} is a {type(document).__name__}, expected a Document")
    return items


@contextmanager
def errors_about(name: str) -> Iterator[None]:
    """Name the input in every ConfigError of a block.

    >>> with errors_about("document 3"):
    ...     document_image(Document("x", metadata={"image_path": 7}))
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: document 3: metadata['image_path']: expected a path, got int
    """
    try:
        yield
    except ConfigError as exc:
        raise ConfigError(f"{name}: {exc}") from exc


def document_to_page(document: Document, name: str, allow_remote: AllowRemote = False) -> Page:
    """Return any document as a page to encode: its image and text, or its text alone.

    Args:
        document: ours, or of any other retriever.
        name: the page's id.
        allow_remote: as for :func:`document_image`.

    Raises:
        ConfigError: neither image nor text, or a bad image.
        PageError: the image cannot be fetched.

    >>> document_to_page(Document("Revenue rose."), "document 0")
    Page(id='document 0', source='', number=1, text)
    """
    image, text = document_image(document, allow_remote), document_text(document)
    if image is None and not text.strip():
        raise ConfigError(_NO_CONTENT)
    return Page(id=name, image=image, text=text)


def document_to_stored_page(document: Document, id: str, name: str, allow_remote: AllowRemote = False) -> Page:
    """Return a document as a page of an index, from which :func:`page_to_document` restores it.

    A document that was made from a page becomes that page again. Any other keeps its content and its metadata
    unchanged; ``source``, ``page`` and ``page_label`` also become the page's own, for grouping by source and for
    neighbours. LangChain's loaders count pages from 0, so the page's number is then one more. The image leaves the
    metadata and comes back as ``metadata["image_path"]``; a document with an image and no content comes back with a
    content that names it, because other tools drop or merge documents without content.

    Args:
        document: of any maker; it is not changed.
        id: the page's.
        name: of the document, in errors.
        allow_remote: as for :func:`document_image`.

    Raises:
        ConfigError: neither image nor text, a bad image, or metadata that is not JSON.
        PageError: the image cannot be fetched.

    >>> document = Document("Revenue rose.", metadata={"source": "a.pdf", "page": 0})
    >>> page = document_to_stored_page(document, "x", "document 0")
    >>> page, page.metadata
    (Page(id='x', source='a.pdf', number=1, text), {'source': 'a.pdf', 'page': 0, '_langchain': 'text'})
    """
    with errors_about(name):
        image, text = document_image(document, allow_remote), document_text(document)
        if image is None and not text.strip():
            text = document.page_content  # a citation alone is still a text
            if not text.strip():
                raise ConfigError(_NO_CONTENT)
    dropped = {ORIGIN} if image is None else {ORIGIN, "image", "image_path"}
    own = {key: value for key, value in without_evidence(document.metadata).items() if key not in dropped}
    metadata = json_object(own, name)
    original = _original_page(document, metadata, id, image, text)
    if original is not None:
        return original
    if image is not None and not document.page_content.strip():
        metadata |= {"citation": f"{_source_and_page(metadata)} [{id}]" if metadata.get("source") else id}
        cited = True
    else:
        cited = _cited_content(str(metadata.get("citation")), text) == document.page_content
    metadata[ORIGIN] = "cited" if cited else "text"
    return Page(
        id=id,
        source=_string(metadata.get("source")) or "",
        number=_number(metadata),
        label=_string(metadata.get("page_label")),
        image=image,
        text=text if cited else document.page_content,
        metadata=metadata,
    )


def _original_page(
    document: Document, metadata: dict[str, Any], id: str, image: PlainImage | None, text: str
) -> Page | None:
    """The page that this document was made from, if there is one."""
    source, number = metadata.get("source"), metadata.get("page")
    if not isinstance(source, str) or not isinstance(number, int) or isinstance(number, bool) or number < 1:
        return None
    own = {key: value for key, value in metadata.items() if key not in _FROM_PAGE}
    page = Page(
        id=id, source=source, number=number, label=_string(metadata.get("page_label")), image=image, text=text,
        metadata=own,
    )  # fmt: skip
    cited = citation(page)
    same = metadata.get("citation") == cited and _cited_content(cited, text) == document.page_content
    return page if same else None


def _cited_content(citation: str, text: str) -> str:
    return f"{citation}\n\n{text}" if text.strip() else citation


def _number(metadata: Mapping[str, Any]) -> int:
    page = metadata.get("page")
    if not isinstance(page, int) or isinstance(page, bool) or not 0 <= page < 2**62:
        return 1
    ours = isinstance(metadata.get("citation"), str)
    return max(page, 1) if ours else page + 1


def _source_and_page(metadata: Mapping[str, Any]) -> str | None:
    source = metadata.get("source")
    if not source:
        return None
    page = metadata.get("page_label", metadata.get("page"))
    return str(source) if page is None else f"{source}, page {page}"


def _string(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _block_image(block: Mapping[str, Any], allow_remote: AllowRemote) -> bytes:
    """Bytes of an image content block: LangChain's, LangChain's of version 0, or OpenAI's."""
    data = block.get("base64") or (block.get("data") if block.get("source_type") == "base64" else None)
    if data is None:
        nested = block.get("image_url")
        data = block.get("url") or (nested.get("url") if isinstance(nested, Mapping) else nested)
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
