"""Nodes that go into an index: what a page keeps of a node so that the node comes out whole."""

from __future__ import annotations

import json
from typing import Any, Final

from llama_index.core.schema import (
    BaseNode,
    Document,
    IndexNode,
    NodeRelationship,
    ObjectType,
    RelatedNodeInfo,
    TextNode,
)

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.retrieval.evidence import without_evidence

PAGE_ID: Final = "page_id"
"""Metadata key of the page's id, which nodes from an index carry."""

NODE_RECORD: Final = "_llama_index"
"""Metadata key of a page that was added as a node: ``ref_doc_id``, and the rest of the node as one JSON text."""

_EMBED, _LLM = "excluded_embed_metadata_keys", "excluded_llm_metadata_keys"
_KEPT = (set(TextNode.model_fields) | {"index_id"}) - {"id_", "embedding", "metadata", "text"}
SOURCE_KEYS: Final = ("source", "file_path", "file_name")
"""Metadata keys that name the file a node is from."""


def page_with_record(node: BaseNode, page: Page, text: str, position: int) -> Page:
    r"""Give the page to index for a node: what is encoded of it, and all that is needed to give the node back.

    Args:
        node: what is added.
        page: what there is to encode of it (id, picture, text).
        text: the node's own text.
        position: of the node among those of its source in this call, from 1: its page number when it tells none.

    Returns:
        The page. Its ``source`` is the metadata's ``source``, ``file_path`` or ``file_name``, or else the id of the
        node's source document; its number and label are ``page`` and ``page_label``.

    Raises:
        ConfigError: metadata that are not JSON, or that hold the key kept for ourselves.

    >>> node = TextNode(id_="n", text="Revenue rose.", metadata={"file_name": "a.txt"})
    >>> made = page_with_record(node, Page(id="n", text="file_name: a.txt\n\nRevenue rose."), node.text, 3)
    >>> made.source, made.number, recorded_fields(made)["text"]
    ('a.txt', 3, 'Revenue rose.')
    """
    if NODE_RECORD in node.metadata:
        raise ConfigError(f"node {node.node_id!r}: the metadata key {NODE_RECORD!r} is kept for the index")
    record = _settings(node)
    # The text lies at the end of what is encoded, after the metadata, and is not kept twice.
    record |= {"text_from": len(page.text) - len(text)} if page.text.endswith(text) else {"text": text}
    label = node.metadata.get("page_label")
    return Page(
        id=page.id,
        source=source_of(node),
        number=page_number(node) or position,
        label=str(label) if isinstance(label, str | int) and str(label) else None,
        image=page.image_source,
        text=page.text,
        metadata={
            **without_evidence(node.metadata),
            NODE_RECORD: {"ref_doc_id": ref_doc_id(node), "node": json.dumps(record, sort_keys=True)},
        },
    )


def recorded_fields(page: Page) -> dict[str, Any]:
    """Give the constructor's arguments of the node a page was added as, but for its picture.

    ``page_id`` joins the metadata. Chat models are told it only with a picture that nothing else names: its text stays
    behind, and a picture without a label cannot be cited.

    >>> node = TextNode(id_="n", text="Revenue rose.", metadata={"year": 2024})
    >>> fields = recorded_fields(page_with_record(node, Page(id="n", text="Revenue rose."), node.text, 1))
    >>> fields["metadata"], fields["excluded_llm_metadata_keys"]
    ({'page_id': 'n', 'year': 2024}, ['page_id'])
    """
    fields: dict[str, Any] = json.loads(page.metadata[NODE_RECORD]["node"])
    if "text_from" in fields:
        fields["text"] = page.text[fields.pop("text_from") :]
    if document := page.metadata[NODE_RECORD].get("ref_doc_id"):  # one that was added whole is its own
        source = RelatedNodeInfo(node_id=document, node_type=ObjectType.DOCUMENT)
        fields["relationships"] = {NodeRelationship.SOURCE.value: source, **fields.get("relationships", {})}
    metadata = {key: value for key, value in page.metadata.items() if key != NODE_RECORD}
    hidden = {key: fields.get(key, []) for key in (_EMBED, _LLM)}
    if PAGE_ID not in metadata:
        hidden[_EMBED] = [*hidden[_EMBED], PAGE_ID]
        named = set(SOURCE_KEYS) & set(metadata) - set(hidden[_LLM])
        if page.image_source is None or named:
            hidden[_LLM] = [*hidden[_LLM], PAGE_ID]
    return {**fields, **hidden, "id_": page.id, "metadata": {PAGE_ID: page.id, **metadata}}


def source_of(node: BaseNode) -> str:
    """Name the file or document a node is from; ``""`` where nothing tells.

    >>> source_of(TextNode(metadata={"file_name": "a.pdf"})), source_of(TextNode())
    ('a.pdf', '')
    """
    named = (node.metadata.get(key) for key in SOURCE_KEYS)
    return next((name for name in named if isinstance(name, str) and name), None) or ref_doc_id(node) or ""


def ref_doc_id(node: BaseNode) -> str | None:
    """Give the id of the document a node is from; a document that names none is its own.

    >>> ref_doc_id(Document(id_="d")), ref_doc_id(TextNode(id_="n"))
    ('d', None)
    """
    return node.ref_doc_id or (node.node_id if isinstance(node, Document) else None)


def page_number(node: BaseNode) -> int | None:
    """Give the page number a node's metadata tell, from 1.

    >>> [page_number(TextNode(metadata={"page": page})) for page in (3, "3", 0, "iii", True)]
    [3, 3, None, None, None]
    """
    page = node.metadata.get("page")
    if isinstance(page, str) and page.isdecimal():
        page = int(page)
    return page if isinstance(page, int) and not isinstance(page, bool) and page > 0 else None


def _settings(node: BaseNode) -> dict[str, Any]:
    """What a node is beyond its id, metadata, text and picture, as far as it is not the default."""
    plain = node.model_copy(update={"obj": None}) if isinstance(node, IndexNode) else node
    try:
        values = plain.model_dump(mode="json", exclude_defaults=True, exclude={"metadata", "embedding"})
    except ValueError as exc:  # pydantic's serialisation error
        raise ConfigError(f"node {node.node_id!r}: a relationship holds what is not JSON: {exc}") from exc
    kept = {key: value for key, value in values.items() if key in _KEPT}
    return kept if isinstance(node, TextNode) else {key: value for key, value in kept.items() if key != "mimetype"}
