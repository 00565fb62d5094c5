"""Conversion of pages to LlamaIndex nodes and of nodes to pages."""

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
from colqwen3_retrievers.llama_index.node_records import NODE_RECORD, PAGE_ID, excluded_keys, recorded_fields
from colqwen3_retrievers.pages.images import open_header
from colqwen3_retrievers.pages.page import Hit, Page, Query
from colqwen3_retrievers.pages.remote_images import AllowRemote, local_image
from colqwen3_retrievers.retrieval.chat_images import ChatImages

_log = logging.getLogger(__name__)

_TECHNICAL_KEYS: Final = (PAGE_ID, "source", "file_type", "page_count", "sha256", "width", "height")
_OTHER_FRAMEWORKS: Final = ("_langchain",)  # keys in which they keep records of their own in the same index
_DOCUMENT_NODES: Final = uuid.uuid5(uuid.NAMESPACE_DNS, "nodes.colqwen3-retrievers")  # never to change
DEFAULT_CHAT_IMAGES: Final = ChatImages()
"""The limits that the APIs of chat models allow."""

_DATA_URL: Final = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


# -- pages to nodes ----------------------------------------------------------------------------------------------------


def node_from_hit(
    hit: Hit, *, inline_image: bool = False, chat_images: ChatImages = DEFAULT_CHAT_IMAGES
) -> NodeWithScore:
    """Convert a hit to a node that LlamaIndex's engines, evaluators and stores handle without loss.

    A page with an image becomes an ``ImageNode``: ``id_`` is the page's id, ``image_path`` the image's file, ``text``
    the id followed by the page's text layer (so that no two pages have the same hash, though blank pages look alike). A
    page of text becomes a ``TextNode`` with its text. So does a page whose image cannot be read, with a warning in the
    log.

    Where the file is none that every chat model can be sent, because it is too large, of another format or not upright
    RGB, ``image`` is what to send instead, in base64: the picture that was embedded, as ``chat_images`` makes it.
    LlamaIndex's content blocks prefer it to the file. Images stored by an index need none unless they are large.

    A page that was added as a node is restored: its metadata, relationships, templates and excluded keys are its own (a
    ``Document`` or ``Node`` becomes an ``ImageNode`` or ``TextNode``, which the rest of LlamaIndex can handle). Only
    ``page_id`` joins the metadata, and the ``text`` of an image begins with the id.

    Args:
        hit: result of :meth:`PageIndex.search`.
        inline_image: whether the node always carries its image in base64, for readers without the file.
        chat_images: the limits of an image for chat models.

    Returns:
        A new node with a Python float score. Its metadata holds JSON values: the page's own and ``page_id``,
        ``source``, ``page``, ``page_label`` (when known), ``sha256``, and ``width`` and ``height`` of the image where
        the page has none. Technical keys are hidden from the LLM, all keys from embedding models. SOURCE is the file.

    >>> node = node_from_hit(Hit(Page(source="a.txt", number=2, text="Revenue rose."), 3.5))
    >>> node.node_id, node.score, node.text, node.metadata["page"], node.node.ref_doc_id
    ('a.txt#page=2', 3.5, 'Revenue rose.', 2, 'a.txt')
    """
    node = node_from_page(hit.page, inline_image=inline_image, chat_images=chat_images)
    return NodeWithScore(node=node, score=float(hit.score))


def node_from_page(
    page: Page, *, inline_image: bool = False, chat_images: ChatImages = DEFAULT_CHAT_IMAGES
) -> BaseNode:
    """Convert a page to a node; see :func:`node_from_hit`.

    >>> node_from_page(Page(source="a.txt", text="Revenue rose.")).node_id
    'a.txt#page=1'
    """
    image = _image_file(page, inline_image, chat_images)
    if NODE_RECORD in page.metadata:
        fields = recorded_fields(page)
    else:
        fields = {"text": page.text, **page_fields(page, None if image is None else image[1])}
    if image is None:
        kind = IndexNode if "index_id" in fields else TextNode
        return kind(**{**fields, "text": fields["text"] or page.id})
    return ImageNode(**{**fields, "text": text_with_id(page.id, fields["text"]), **image[0]})


def page_fields(page: Page, size: tuple[int, int] | None) -> dict[str, Any]:
    """Return the constructor's arguments of a page's node or document, without text and image.

    Args:
        page: from files or an index.
        size: width and height of its image in pixels, used where the page's metadata has none.

    Returns:
        Id, metadata, excluded metadata keys, and SOURCE.

    >>> page_fields(Page(source="a.pdf", number=2, sha256="ab"), None)["metadata"]
    {'page_id': 'a.pdf#page=2', 'page': 2, 'sha256': 'ab', 'source': 'a.pdf'}
    """
    own = {key: value for key, value in page.metadata.items() if key not in _OTHER_FRAMEWORKS}
    metadata: dict[str, Any] = {**own, PAGE_ID: page.id, "page": page.number, "sha256": page.sha256}
    if page.source:
        metadata["source"] = page.source
    if page.label is not None:
        metadata["page_label"] = page.label
    if size is not None:
        metadata.setdefault("width", size[0])
        metadata.setdefault("height", size[1])
    label = "file_name" if "file_name" in metadata else "source"  # the one a reader would cite
    source = RelatedNodeInfo(node_id=page.source or page.id, node_type=ObjectType.DOCUMENT)
    return {
        "id_": page.id,
        "metadata": metadata,
        "excluded_embed_metadata_keys": sorted(metadata),
        "excluded_llm_metadata_keys": [key for key in _TECHNICAL_KEYS if key in metadata and key != label],
        "relationships": {NodeRelationship.SOURCE: source},
    }


def text_with_id(id_: str, text: str) -> str:
    r"""Return the text of an image's node: its id, followed by its text if there is one.

    >>> text_with_id("a.pdf#page=1", "Revenue rose.")
    'a.pdf#page=1\n\nRevenue rose.'
    """
    return f"{id_}\n\n{text}" if text else id_


def with_technical(node: BaseNode, metadata: Mapping[str, Any]) -> BaseNode:
    """Return a copy of a node with more metadata, hidden from language and embedding models.

    >>> node = with_technical(TextNode(text="x"), {"boxes": []})
    >>> node.metadata, node.get_content(MetadataMode.LLM)
    ({'boxes': []}, 'x')
    """
    if not metadata:
        return node
    exclusions = excluded_keys(node.excluded_embed_metadata_keys, node.excluded_llm_metadata_keys, list(metadata))
    return node.model_copy(update={"metadata": {**node.metadata, **metadata}, **exclusions})


def image_fields(image: Path | bytes, chat_images: ChatImages, *, inline: bool = False) -> dict[str, str]:
    """Return the arguments of an ``ImageNode`` whose content blocks hold the picture for a chat model.

    Args:
        image: a file, or the bytes of one.
        chat_images: the limits of an image for chat models.
        inline: whether ``image`` is given though the file could be sent as it is.

    Returns:
        ``image_path`` of a file; ``image`` (base64), if it is to be sent instead of the file; ``image_mimetype``.

    Raises:
        PageError: the image cannot be read.

    >>> image_fields(Path("missing.png"), DEFAULT_CHAT_IMAGES)
    Traceback (most recent call last):
    colqwen3_retrievers.errors.PageError: missing.png: cannot be read: No such file or directory
    """
    if inline or isinstance(image, bytes):
        data: bytes | None
        data, media_type = chat_images.encode(image)
    else:
        data, media_type = chat_images.replacement(image)
    fields = {"image_mimetype": media_type}  # LlamaIndex's guess is the ending of the file's name
    if isinstance(image, Path):
        fields["image_path"] = str(image)
    if data is not None:
        fields["image"] = base64.b64encode(data).decode("ascii")
    return fields


def _image_file(page: Page, inline: bool, chat_images: ChatImages) -> tuple[dict[str, str], tuple[int, int]] | None:
    """Return the node's fields for a page's image, and its size in pixels, if it can be read."""
    if page.image_source is None:
        return None
    path = page.image_path
    try:
        if path is None:
            raise PageError("the image is in memory, not in a file", source=page.id)
        with path.open("rb") as file:
            size = open_header(file, name=str(path)).size
        return image_fields(path.absolute(), chat_images, inline=inline), size
    except (OSError, PageError) as exc:
        _log.warning("page %r is returned as text, because its image cannot be read: %s", page.id, exc)
        return None


# -- nodes to pages ----------------------------------------------------------------------------------------------------


def page_from_node(node: BaseNode, allow_remote: AllowRemote = False) -> Page:
    """Convert a node to the page to encode.

    Args:
        node: ``ImageNode``, ``ImageDocument``, ``Node`` with an image resource, ``TextNode``, ``IndexNode`` and so on.
        allow_remote: whether an image given only by a web address is fetched; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.

    Returns:
        A page with the node's id (:func:`page_of`, or else the node's own), its image (base64, ``data:`` URL or path)
        and its text for embedding models.

    Raises:
        PageError: invalid base64, or an image that could not be fetched.
        ConfigError: an image given only by a URL that may not be fetched.

    >>> page_from_node(TextNode(id_="a", text="Revenue rose.", metadata={"year": 2024})).text.split()
    ['year:', '2024', 'Revenue', 'rose.']
    """
    text = plain_text(node)
    if not text.strip():
        content = ""  # nothing can be ranked by metadata alone
    elif text == node.get_content(MetadataMode.NONE):
        content = node.get_content(MetadataMode.EMBED)
    else:
        copy = node.model_copy()
        copy.set_content(text)
        content = copy.get_content(MetadataMode.EMBED)
    return Page(id=page_of(node) or node.node_id or "node", image=image_of(node, allow_remote), text=content)


def query_from_bundle(bundle: QueryBundle | None, *, text: str | None = None) -> Query:
    """Convert a query bundle to a query: its text, its ``image_path``, or both.

    Args:
        bundle: LlamaIndex's query.
        text: replaces ``query_str``.

    Raises:
        ConfigError: no bundle, or an empty one.

    >>> query_from_bundle(QueryBundle("what was the revenue?")).text
    'what was the revenue?'
    """
    if bundle is None:
        raise ConfigError("query: none was given; pass query_bundle= or query_str=")
    query = bundle.query_str if text is None else text
    return Query(query if query and query.strip() else None, bundle.image_path or None)


def has_image(node: BaseNode) -> bool:
    """Return whether a node carries an image, in any form.

    >>> has_image(ImageNode(image_path="a.png")), has_image(TextNode(text="a.png"))
    (True, False)
    """
    return any(_image_fields(node))


def image_of(node: BaseNode, allow_remote: AllowRemote = False) -> Path | bytes | None:
    """Return a node's image, unopened: the bytes of base64 and ``data:`` URLs, or a path; None without an image.

    A file is preferred to a URL, and in a page's node also to ``image``, which may be reduced for chat models. A URL
    that may be fetched is; see :func:`~colqwen3_retrievers.pages.remote_images.fetch_image`.

    Raises:
        PageError: invalid base64, or an image that could not be fetched.
        ConfigError: an image given only by a URL that may not be fetched.

    >>> image_of(ImageNode(image="YWJj")), image_of(TextNode(text="x"))
    (b'abc', None)
    """
    data, path, url = _image_fields(node)
    if data and path and page_of(node) and Path(path).is_file():
        data = None
    if not data and not path and url and _DATA_URL.match(url):
        data = url
    if data:
        text = data.decode("ascii", "replace") if isinstance(data, bytes) else data
        prefix = _DATA_URL.match(text[:200])
        try:
            return base64.b64decode("".join(text[prefix.end() if prefix else 0 :].split()), validate=True)
        except (binascii.Error, ValueError) as exc:
            raise PageError("the image is not base64", source=node.node_id) from exc
    if path:
        return Path(path)
    if not url:
        return None
    image = local_image(url, allow_remote)
    if not isinstance(image, bytes):
        raise ConfigError(
            f"node {node.node_id!r}: its image URL is not fetched; give image_path, image (base64) or allow_remote=True"
        )
    return image


def plain_text(node: BaseNode) -> str:
    r"""Return a node's text without the id that precedes an image's; see :func:`text_with_id`.

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
    """Return the id of the page that a node of ours shows: its own, or its document's where it is all of that.

    Returns:
        None for other nodes, such as a part of a page's text from a splitter.

    >>> page_of(ImageNode(id_="a", metadata={"page_id": "a"})), page_of(TextNode(metadata={"page_id": 7}))
    ('a', None)
    >>> page_of(ImageNode(id_=document_node_id("a"), metadata={"page_id": "a"}))
    'a'
    """
    page_id = node.metadata.get(PAGE_ID)
    return page_id if isinstance(page_id, str) and node.node_id in (page_id, document_node_id(page_id)) else None


def document_node_id(document_id: str) -> str:
    """Return the id of the node that is all of a document: a UUID, always the same.

    >>> document_node_id("a.pdf#page=1") == document_node_id("a.pdf#page=1") != document_node_id("a.pdf#page=2")
    True
    """
    return str(uuid.uuid5(_DOCUMENT_NODES, document_id))


def _image_fields(node: BaseNode) -> tuple[str | bytes | None, str | None, str | None]:
    """Return a node's image as data, path and URL, each None or empty where it has none."""
    if isinstance(node, ImageNode):
        return node.image, node.image_path, node.image_url
    resource = (node.image_resource if isinstance(node, Node) else None) or MediaResource()
    return resource.data, str(resource.path or ""), str(resource.url or "")
