"""LlamaIndex transformation: whatever carries a picture becomes a node that pipelines handle without loss."""

from __future__ import annotations

import asyncio
import base64
import logging
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from llama_index.core.bridge.pydantic import Field, field_validator
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageNode,
    NodeRelationship,
    ObjectType,
    RelatedNodeInfo,
    TextNode,
    TransformComponent,
)

from colqwen3_retrievers.errors import ConfigError, EncodeError, PageError
from colqwen3_retrievers.llama_index.node_records import PAGE_ID, SOURCE_KEYS
from colqwen3_retrievers.llama_index.nodes import document_node_id, has_image, page_from_node, page_of, plain_text
from colqwen3_retrievers.pages.remote_images import AllowRemote, checked_remote

_log = logging.getLogger(__name__)


class PageNodes(TransformComponent):
    """Makes nodes of documents, one a page, that no cache, hash, store or evaluator of LlamaIndex takes for another.

    Put it first among the transformations of an ``IngestionPipeline`` or a ``VectorStoreIndex``, where a splitter would
    stand. Whatever carries a picture becomes an ``ImageNode``: ``text`` is its id and, below it, its text; the metadata
    gain ``page_id`` and ``sha256``; a picture in memory becomes base64, which survives storing. Documents without a
    picture become text nodes; other text nodes are left alone. Inputs are never changed.

    A node keeps its id. A document's node gets one of its own, a UUID that is always the same for the same document
    (several vector stores take no other), and the document, with its hash, as SOURCE; ``page_id`` is the document's id,
    under which a :class:`~colqwen3_retrievers.llama_index.ColQwen3Retriever` keeps it and a reranker finds it there.
    So a pipeline's upserts and deletions, ``delete_ref_doc(document.id_)`` and ``refresh_ref_docs`` see what changed.
    What is left of a file that is gone is deleted by ``metadata["source"]``::

        of_file = MetadataFilters(filters=[MetadataFilter(key="source", value="reports/a.pdf")])
        vector_store.delete_nodes(filters=of_file)

    LlamaIndex's pipeline cache takes nodes of equal text and metadata for the same, whatever their pictures. So this
    step, which makes them differ, is never taken from the cache (its serialised form differs at every call); what
    follows it is.

    Args:
        on_error: a picture that cannot be read: ``"raise"``, or ``"skip"`` its node with a warning in the log.
        allow_remote: whether a picture known by a web address only is fetched, and then carried in base64; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.

    Raises:
        EncodeError: with ``"raise"``, a picture that cannot be read, or that is only known by a URL which may not
            be fetched. ``.index`` is the node's position.

    Example:
        >>> from llama_index.core.schema import Document
        >>> (node,) = PageNodes()([Document(id_="d", text="Revenue rose.")])
        >>> type(node).__name__, node.node_id, node.ref_doc_id
        ('TextNode', '2600e808-c976-5f86-9d18-ee0eaa20bec6', 'd')
    """

    on_error: Literal["raise", "skip"] = Field(default="raise")
    allow_remote: bool | tuple[str, ...] = Field(default=False)

    @field_validator("allow_remote", mode="before")
    @classmethod
    def _checked_remote(cls, value: Any) -> object:
        return checked_remote(value)

    @classmethod
    def class_name(cls) -> str:
        """Give the name it is stored under."""
        return "PageNodes"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Give its settings and, so that no cache knows it again, a value that is new at every call."""
        return {**super().to_dict(**kwargs), "call": uuid.uuid4().hex}

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Give the nodes of documents or nodes, in order."""
        made: list[BaseNode] = []
        for position, node in enumerate(nodes):
            try:
                made.append(_page_node(node, self.allow_remote) if has_image(node) else _text_node(node))
            except (PageError, ConfigError) as exc:
                if self.on_error == "raise":
                    raise EncodeError.of(exc, position) from exc
                _log.warning("node %r is skipped: %s", node.node_id, exc)
        return made

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Give the nodes without blocking the event loop: pictures are opened in a thread."""
        return await asyncio.to_thread(self.__call__, nodes)


def _page_node(node: BaseNode, allow_remote: AllowRemote) -> ImageNode:
    page = page_from_node(node, allow_remote)
    name, text, source = page_of(node) or node.node_id, plain_text(node), page.image_source
    metadata = {**node.metadata, PAGE_ID: name, "sha256": node.metadata.get("sha256") or page.sha256}
    fresh = [key for key in (PAGE_ID, "sha256") if key not in node.metadata]
    named = set(SOURCE_KEYS) & set(metadata) - set(node.excluded_llm_metadata_keys)
    path = page.image_path
    image = base64.b64encode(source).decode("ascii") if isinstance(source, bytes) else None
    return ImageNode(
        text=f"{name}\n\n{text}" if text else name,
        image=image,
        image_path=None if path is None else str(path.absolute()),
        metadata=metadata,
        excluded_embed_metadata_keys=[*node.excluded_embed_metadata_keys, *fresh],
        excluded_llm_metadata_keys=[
            *node.excluded_llm_metadata_keys, *(key for key in fresh if key != PAGE_ID or named)
        ],
        **_common(node),
    )  # fmt: skip


def _text_node(node: BaseNode) -> BaseNode:
    if isinstance(node, TextNode):
        return node
    return TextNode(
        text=node.get_content(),
        metadata=dict(node.metadata),
        excluded_embed_metadata_keys=list(node.excluded_embed_metadata_keys),
        excluded_llm_metadata_keys=list(node.excluded_llm_metadata_keys),
        **_common(node),
    )


def _common(node: BaseNode) -> dict[str, Any]:
    id_, relationships = node.node_id, dict(node.relationships)
    if isinstance(node, Document):
        # As splitters do it: SOURCE is the document, whatever it is from itself. Under the document's own id, the
        # node's hash would take the place of the document's in a document store, and each refresh encode it anew.
        relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(
            node_id=id_, node_type=ObjectType.DOCUMENT, hash=node.hash
        )
        id_ = document_node_id(id_)
    return {
        "id_": id_,
        "relationships": relationships,
        "embedding": node.embedding,
        "metadata_template": node.metadata_template,
        "metadata_separator": node.metadata_separator,
        "text_template": getattr(node, "text_template", TextNode.model_fields["text_template"].default),
    }
