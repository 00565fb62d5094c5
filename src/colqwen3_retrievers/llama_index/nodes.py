"""Pages as LlamaIndex nodes, nodes as pages: the only place that knows how the one carries the other."""

from __future__ import annotations

import base64
import binascii
import logging
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeRelationship,
    NodeWithScore,
    ObjectType,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)

from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.llama_index.node_records import NODE_RECORD, PAGE_ID, recorded_fields
from colqwen3_retrievers.pages.images import open_header, read_image_bytes
from colqwen3_retrievers.pages.page import Hit, Page, Query
from colqwen3_retrievers.pages.remote_images import AllowRemote, local_image

_log = logging.getLogger(__name__)

TECHNICAL: Final = (PAGE_ID, "source", "file_type", "page_count", "sha256", "width", "height")
"""Metadata of a page that no model has to be told."""

OTHER_VIEWS: Final = ("_langchain",)
"""Metadata with which other frameworks' views of the same index keep what is theirs."""

_DOCUMENT_NODES: Final = uuid.uuid5(uuid.NAMESPACE_DNS, "nodes.colqwen3-retrievers")  # never to change

_DATA_URL: Final = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


def node_from_hit(hit: Hit, *, inline_image: bool = False) -> NodeWithScore:
    """Give a hit as the node that LlamaIndex's engines, evaluators and stores handle without loss.

    A page with a picture is an ``ImageNode``: ``id_`` is the page's id, ``image_path`` the picture's file, ``text`` the
    id and, below it, the page's text layer (so no two pages hash alike, though blank pages look alike). A text page is
    a ``TextNode`` whose ``text`` is the page's. So is a page whose picture is not at hand; then a warning is logged.

    A page that was added as a node comes back as it: metadata, relationships, templates and what is excluded are its
    own (a ``Document`` or ``Node`` becomes an ``ImageNode`` or ``TextNode``, which is what the rest of LlamaIndex can
    handle). Only ``page_id`` joins the metadata, and a picture's ``text`` begins with the id.

    Args:
        hit: of :meth:`PageIndex.search`.
        inline_image: whether the node carries the picture's bytes in base64 too, for whoever reads it elsewhere.

    Returns:
        A new node with a Python float score. Its metadata holds JSON values: the page's own and ``page_id``,
        ``source``, ``page``, ``page_label`` (when known), ``sha256``, and ``width`` and ``height`` of the picture where
        the page tells none. The technical ones are kept from the LLM, all from embedding models. SOURCE is the file.

    >>> node = node_from_hit(Hit(Page(source="a.txt", number=2, text="Revenue rose."), 3.5))
    >>> node.node_id, node.score, node.text, node.metadata["page"], node.node.ref_doc_id
    ('a.txt#page=2', 3.5, 'Revenue rose.', 2, 'a.txt')
    """
    return NodeWithScore(node=node_from_page(hit.page, inline_image=inline_image), score=float(hit.score))


def node_from_page(page: Page, *, inline_image: bool = False) -> BaseNode:
    """Give a page as a node; see :func:`node_from_hit`.

    >>> node_from_page(Page(source="a.txt", text="Revenue rose.")).node_id
    'a.txt#page=1'
    """
    picture = _picture(page)
    if NODE_RECORD in page.metadata:
        fields = recorded_fields(page)
    else:
        fields = {"text": page.text, **page_fields(page, None if picture is None else picture[1:])}
    if picture is None:
        kind = IndexNode if "index_id" in fields else TextNode
        return kind(**{**fields, "text": fields["text"] or page.id})
    text = f"{page.id}\n\n{fields['text']}" if fields["text"] else page.id
    image = base64.b64encode(read_image_bytes(picture[0])).decode("ascii") if inline_image else None
    return ImageNode(**{**fields, "text": text, "image": image, "image_path": str(picture[0])})


def page_fields(page: Page, size: tuple[int, int] | None) -> dict[str, Any]:
    """Give what nodes and documents of a page have in common, but for its text and picture.

    Args:
        page: from files or an index.
        size: width and height of its picture in pixels, where the page's metadata tells none.

    Returns:
        Arguments of a node's constructor: id, metadata, what is excluded from which text, SOURCE.

    >>> page_fields(Page(source="a.pdf", number=2, sha256="ab"), None)["metadata"]
    {'page_id': 'a.pdf#page=2', 'page': 2, 'sha256': 'ab', 'source': 'a.pdf'}
    """
    own = {key: value for key, value in page.metadata.items() if key not in OTHER_VIEWS}
    metadata: dict[str, Any] = {**own, PAGE_ID: page.id, "page": page.number, "sha256": page.sha256}
    if page.source:
        metadata["source"] = page.source
    if page.label is not None:
        metadata["page_label"] = page.label
    if size is not None:
        metadata.setdefault("width", size[0])
        metadata.setdefault("height", size[1])
    cited = "file_name" if "file_name" in metadata else "source"  # what a reader would name
    return {
        "id_": page.id,
        "metadata": metadata,
        "excluded_embed_metadata_keys": sorted(metadata),
        "excluded_llm_metadata_keys": [key for key in TECHNICAL if key in metadata and key != cited],
        "relationships": {
            NodeRelationship.SOURCE: RelatedNodeInfo(node_id=page.source or page.id, node_type=ObjectType.DOCUMENT)
        },
    }


def page_from_node(node: BaseNode, allow_remote: AllowRemote = False) -> Page:
    """Give what there is to encode of a node.

    Args:
        node: ``ImageNode``, ``ImageDocument``, ``Node`` with an image resource, ``TextNode``, ``IndexNode`` and so on.
        allow_remote: whether a picture known by a web address is fetched; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.

    Returns:
        A page with the node's id (of a document's node, the document's: :func:`page_of`), its picture (base64,
        ``data:`` URL or path) and its text as embedding models get it.

    Raises:
        PageError: base64 that is none, or a picture that could not be fetched.
        ConfigError: a picture that is only known by a URL which may not be fetched.

    >>> page_from_node(TextNode(id_="a", text="Revenue rose.", metadata={"year": 2024})).text.split()
    ['year:', '2024', 'Revenue', 'rose.']
    """
    return Page(id=page_of(node) or node.node_id or "node", image=image_of(node, allow_remote), text=_text_of(node))


def with_technical(node: BaseNode, metadata: Mapping[str, Any]) -> BaseNode:
    """Give a copy of a node with more metadata that neither language nor embedding models see.

    >>> node = with_technical(TextNode(text="x"), {"boxes": []})
    >>> node.metadata, node.get_content(MetadataMode.LLM)
    ({'boxes': []}, 'x')
    """
    if not metadata:
        return node
    hidden = {name: [*getattr(node, name), *(key for key in metadata if key not in getattr(node, name))]
              for name in ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys")}  # fmt: skip
    return node.model_copy(update={"metadata": {**node.metadata, **metadata}, **hidden})


def label_of(node: BaseNode) -> str:
    """Name a node on one line for whoever is to cite it: the metadata meant for chat models, or else its id.

    >>> label_of(TextNode(metadata={"file_name": "a.pdf", "page": 3})), label_of(TextNode(id_="n"))
    ('file_name: a.pdf, page: 3', 'n')
    """
    lines = (line.strip() for line in node.get_metadata_str(MetadataMode.LLM).splitlines())
    return ", ".join(line for line in lines if line) or node.node_id


def has_image(node: BaseNode) -> bool:
    """Whether a node carries a picture, in whatever way.

    >>> has_image(ImageNode(image_path="a.png")), has_image(TextNode(text="a.png"))
    (True, False)
    """
    if isinstance(node, ImageNode):
        return bool(node.image or node.image_path or node.image_url)
    resource = node.image_resource if isinstance(node, Node) else None
    return resource is not None and bool(resource.data or resource.path or resource.url)


def query_from_bundle(bundle: QueryBundle | None, *, text: str | None = None) -> Query:
    """Give a query bundle as a query: its text, its ``image_path``, or both.

    Args:
        bundle: as LlamaIndex hands it over.
        text: instead of ``query_str``.

    Raises:
        ConfigError: there is no bundle, or nothing in it.

    >>> query_from_bundle(QueryBundle("what was the revenue?")).text
    'what was the revenue?'
    """
    if bundle is None:
        raise ConfigError("query: none was given; pass query_bundle= or query_str=")
    asked = bundle.query_str if text is None else text
    return Query(asked if asked and asked.strip() else None, bundle.image_path or None)


def _picture(page: Page) -> tuple[Path, int, int] | None:
    """The page's picture as a file that is there, with its width and height in pixels."""
    if page.image_source is None:
        return None
    path = page.image_path
    if path is None or not path.is_file():
        _log.warning("page %r: its picture is not at hand (%s); it is given as text", page.id, path)
        return None
    try:
        with path.open("rb") as file:
            width, height = open_header(file, name=str(path)).size
    except (OSError, PageError) as exc:
        _log.warning("page %r: its picture cannot be read (%s); it is given as text", page.id, exc)
        return None
    return path.absolute(), width, height


def image_of(node: BaseNode, allow_remote: AllowRemote = False) -> Path | bytes | None:
    """Give a node's picture, unopened: the bytes of base64 and ``data:`` URLs, or a path; None when there is none.

    A file comes before a URL. A URL that may be fetched gives its bytes; see
    :func:`~colqwen3_retrievers.pages.remote_images.fetch_image`.

    Raises:
        PageError: base64 that is none, or a picture that could not be fetched.
        ConfigError: a picture that is only known by a URL which may not be fetched.

    >>> image_of(ImageNode(image="YWJj")), image_of(TextNode(text="x"))
    (b'abc', None)
    """
    if isinstance(node, ImageNode):
        data: str | bytes | None = node.image
        path, url = node.image_path, node.image_url
    else:
        resource = node.image_resource if isinstance(node, Node) else None
        resource = resource or MediaResource()
        data, path, url = resource.data, str(resource.path) if resource.path else None, str(resource.url or "")
    if data:
        return _decode(data, node.node_id)
    if path:
        return Path(path)
    if url and _DATA_URL.match(url):
        return _decode(url, node.node_id)
    if url and isinstance(fetched := local_image(url, allow_remote), bytes):
        return fetched
    if url:
        raise ConfigError(
            f"node {node.node_id!r}: its image URL is not fetched; give image_path, image (base64) or allow_remote=True"
        )
    return None


def _decode(data: str | bytes, name: str) -> bytes:
    text = data.decode("ascii", "replace") if isinstance(data, bytes) else data
    head = _DATA_URL.match(text[:200])
    packed = "".join(text[head.end() if head else 0 :].split())
    try:
        return base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise PageError("the image is not base64", source=name) from exc


def plain_text(node: BaseNode) -> str:
    r"""Give a node's text without the id that :func:`node_from_page` or ``PageNodes`` put before a picture's.

    >>> plain_text(ImageNode(id_="a", text="a\n\nRevenue rose.", metadata={"page_id": "a"}))
    'Revenue rose.'
    """
    text = node.get_content(MetadataMode.NONE)
    page_id = page_of(node)
    for id_ in (page_id, node.node_id) if page_id else ():
        if text == id_:
            return ""
        if isinstance(node, ImageNode | Document) and text.startswith(f"{id_}\n\n"):
            return text.removeprefix(f"{id_}\n\n")
    return text


def page_of(node: BaseNode) -> str | None:
    """Give the id of the page a node of ours shows: its own, or its document's where the node is all of it.

    Returns:
        None for other nodes, such as a piece that a splitter cut from a page's text.

    >>> page_of(ImageNode(id_="a", metadata={"page_id": "a"})), page_of(TextNode(metadata={"page_id": 7}))
    ('a', None)
    >>> page_of(ImageNode(id_=document_node_id("a"), metadata={"page_id": "a"}))
    'a'
    """
    page_id = node.metadata.get(PAGE_ID)
    return page_id if isinstance(page_id, str) and node.node_id in (page_id, document_node_id(page_id)) else None


def document_node_id(document_id: str) -> str:
    """Give the id of the node that is all of a document: a UUID, always the same.

    >>> document_node_id("a.pdf#page=1") == document_node_id("a.pdf#page=1") != document_node_id("a.pdf#page=2")
    True
    """
    return str(uuid.uuid5(_DOCUMENT_NODES, document_id))


def _text_of(node: BaseNode) -> str:
    text = plain_text(node)
    if not text.strip():
        return ""  # metadata alone is not something to rank by
    if text == node.get_content(MetadataMode.NONE):
        return node.get_content(MetadataMode.EMBED)
    bare = node.model_copy()
    bare.set_content(text)
    return bare.get_content(MetadataMode.EMBED)
