"""Nodes added to an index: stable ids, and the record in a page from which the node is restored."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, Final

from llama_index.core.schema import (
    BaseNode,
    Document,
    IndexNode,
    NodeRelationship,
    ObjectType,
    RelatedNodeInfo,
    RelatedNodeType,
    TextNode,
)

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.retrieval.evidence import without_evidence

PAGE_ID: Final = "page_id"
"""Metadata key of the page's id in nodes from an index."""

NODE_RECORD: Final = "_llama_index"
"""Metadata key of a page that was added as a node: ``ref_doc_id``, and the node's other fields as one JSON text."""

_RECORDED_FIELDS = (set(TextNode.model_fields) | {"index_id"}) - {"id_", "embedding", "metadata", "text"}
_SOURCE_KEYS: Final = ("source", "file_path", "file_name")


def page_with_record(node: BaseNode, content: Page, text: str, position: int) -> Page:
    r"""Return the page to index for a node, with a record that restores the node.

    Args:
        node: the node.
        content: id, image and text to encode.
        text: the node's own text.
        position: position among the nodes of its source, from 1; the page number of a node without one.

    Returns:
        The page. Its ``source`` is the metadata's ``source``, ``file_path`` or ``file_name``, or else the id of the
        node's source document; its number and label are ``page`` and ``page_label``.

    Raises:
        ConfigError: metadata or relationships that are not JSON, or metadata with the reserved key.

    >>> node = TextNode(id_="n", text="Revenue rose.", metadata={"file_name": "a.txt"})
    >>> page = page_with_record(node, Page(id="n", text="file_name: a.txt\n\nRevenue rose."), node.text, 3)
    >>> page.source, page.number, recorded_fields(page)["text"]
    ('a.txt', 3, 'Revenue rose.')
    """
    if NODE_RECORD in node.metadata:
        raise ConfigError(f"node {node.node_id!r}: the metadata key {NODE_RECORD!r} is reserved for the index")
    record = _changed_fields(node)
    # The text is the end of what is encoded, after the metadata, and is not stored twice.
    record |= {"text_from": len(content.text) - len(text)} if content.text.endswith(text) else {"text": text}
    label = node.metadata.get("page_label")
    return Page(
        id=content.id,
        source=source_of(node),
        number=_page_number(node) or position,
        label=str(label) if isinstance(label, str | int) and str(label) else None,
        image=content.image_source,
        text=content.text,
        metadata={
            **without_evidence(node.metadata),
            NODE_RECORD: {"ref_doc_id": _document_of(node), "node": json.dumps(record, sort_keys=True)},
        },
    )


def recorded_fields(page: Page) -> dict[str, Any]:
    """Return the constructor's arguments of the node that a page was added as, without its image.

    ``page_id`` joins the metadata. Chat models see it only beside an image that no other metadata names: the text of an
    image node is not sent to them, and an image without a label cannot be cited.

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
    exclusions = excluded_keys(
        fields.get("excluded_embed_metadata_keys", ()), fields.get("excluded_llm_metadata_keys", ()),
        [] if PAGE_ID in metadata else [PAGE_ID],
        labels=None if page.image_source is None else metadata,
    )  # fmt: skip
    return {**fields, **exclusions, "id_": page.id, "metadata": {PAGE_ID: page.id, **metadata}}


def excluded_keys(
    embed: Collection[str], llm: Collection[str], keys: Sequence[str], *, labels: Collection[str] | None = None
) -> dict[str, list[str]]:
    """Return a node's two lists of excluded metadata keys with more keys in them.

    Args:
        embed: keys that embedding models do not see.
        llm: keys that language models do not see.
        keys: keys to exclude from both.
        labels: metadata keys of an image node: unless one names its source, ``page_id`` stays visible to language
            models. None excludes it too.

    >>> excluded_keys([], [], ["page_id", "sha256"], labels=["year"])
    {'excluded_embed_metadata_keys': ['page_id', 'sha256'], 'excluded_llm_metadata_keys': ['sha256']}
    """
    unlabelled = labels is not None and not set(_SOURCE_KEYS) & set(labels) - set(llm)
    hidden = [key for key in keys if key not in llm and not (unlabelled and key == PAGE_ID)]
    return {
        "excluded_embed_metadata_keys": [*embed, *(key for key in keys if key not in embed)],
        "excluded_llm_metadata_keys": [*llm, *hidden],
    }


def source_of(node: BaseNode) -> str:
    """Return the file or document a node is from, or ``""``.

    >>> source_of(TextNode(metadata={"file_name": "a.pdf"})), source_of(TextNode())
    ('a.pdf', '')
    """
    names = (node.metadata.get(key) for key in _SOURCE_KEYS)
    return next((name for name in names if isinstance(name, str) and name), None) or _document_of(node) or ""


def with_stable_ids(nodes: Sequence[BaseNode], documents: Collection[str]) -> list[BaseNode]:
    """Name nodes by document and position where they have random ids.

    Splitters draw a new UUID for every node, so that a document that is split again would share no node with its
    earlier version. References between the nodes (previous, next, parent) follow. Other ids stay.

    Args:
        nodes: output of the transformations; not modified.
        documents: ids of the documents that were transformed; nodes of others keep their ids.

    Returns:
        Copies, in order, with ids such as ``d#text=2``.

    >>> from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
    >>> of_d = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="d")}
    >>> nodes = [TextNode(text="a", relationships=of_d), TextNode(id_="mine", text="b", relationships=of_d)]
    >>> [node.node_id for node in with_stable_ids(nodes, ["d"])]
    ['d#text=1', 'mine']
    """
    counts: Counter[str] = Counter()
    new_ids: dict[str, str] = {}
    for node in nodes:
        document = node.ref_doc_id
        if document is None or document not in documents:
            continue
        counts[document] += 1
        if _is_random(node.node_id) and node.node_id != document:
            new_ids[node.node_id] = f"{document}#text={counts[document]}"

    def renamed(related: RelatedNodeType) -> RelatedNodeType:
        if isinstance(related, list):
            return [info.model_copy(update={"node_id": new_ids.get(info.node_id, info.node_id)}) for info in related]
        return related.model_copy(update={"node_id": new_ids.get(related.node_id, related.node_id)})

    return [
        node.model_copy(
            update={
                "id_": new_ids.get(node.node_id, node.node_id),
                "relationships": {kind: renamed(related) for kind, related in node.relationships.items()},
            }
        )
        for node in nodes
    ]


def _page_number(node: BaseNode) -> int | None:
    page = node.metadata.get("page")
    if isinstance(page, str) and page.isdecimal():
        page = int(page)
    return page if isinstance(page, int) and not isinstance(page, bool) and page > 0 else None


def _is_random(id_: str) -> bool:
    try:
        return uuid.UUID(id_).version == 4
    except ValueError:
        return False


def _document_of(node: BaseNode) -> str | None:
    """Return the id of a node's document; a document without one is its own."""
    return node.ref_doc_id or (node.node_id if isinstance(node, Document) else None)


def _changed_fields(node: BaseNode) -> dict[str, Any]:
    """Return a node's fields that differ from the defaults, without id, metadata, text and image."""
    plain = node.model_copy(update={"obj": None}) if isinstance(node, IndexNode) else node
    try:
        values = plain.model_dump(mode="json", exclude_defaults=True, exclude={"metadata", "embedding"})
    except ValueError as exc:  # pydantic's serialisation error
        raise ConfigError(f"node {node.node_id!r}: a relationship is not JSON: {exc}") from exc
    unrecorded = set() if isinstance(node, TextNode) else {"mimetype"}
    return {key: value for key, value in values.items() if key in _RECORDED_FIELDS - unrecorded}
