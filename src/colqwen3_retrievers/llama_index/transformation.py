"""LlamaIndex transformation of documents into page nodes that pipelines, caches and stores handle without loss."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from llama_index.core.bridge.pydantic import Field
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
from colqwen3_retrievers.llama_index.node_records import PAGE_ID, excluded_keys
from colqwen3_retrievers.llama_index.nodes import (
    DEFAULT_CHAT_IMAGES,
    document_node_id,
    has_image,
    image_fields,
    page_from_node,
    page_of,
    plain_text,
    text_with_id,
)
from colqwen3_retrievers.llama_index.pydantic_fields import RemoteHosts

_log = logging.getLogger(__name__)


class PageNodes(TransformComponent):
    """Converts documents to nodes, one a page, that no cache, hash, store or evaluator of LlamaIndex confuses.

    Put it first among the transformations of an ``IngestionPipeline`` or a ``VectorStoreIndex``, in place of a
    splitter. Documents and nodes with an image become an ``ImageNode``: ``text`` is the id followed by the text; the
    metadata gain ``page_id`` and ``sha256``; an image in memory becomes base64, which survives storage. An image that
    not every chat model can be sent is put into a form that can, beside the path of a file, which is still what is
    embedded; see :func:`~colqwen3_retrievers.llama_index.nodes.node_from_hit`. Documents without an image become text
    nodes; other text nodes are unchanged. Inputs are not modified.

    A node keeps its id. A document's node gets one of its own, a UUID that is always the same for the same document
    (several vector stores accept no other), and the document, with its hash, as SOURCE; ``page_id`` is the document's
    id, under which a :class:`~colqwen3_retrievers.llama_index.ColQwen3Retriever` stores it and a reranker looks it up.
    So a pipeline's upserts and deletions, ``delete_ref_doc(document.id_)`` and ``refresh_ref_docs`` recognise changes.
    The pages of a file that no longer exists are deleted by ``metadata["source"]``::

        of_file = MetadataFilters(filters=[MetadataFilter(key="source", value="reports/a.pdf")])
        vector_store.delete_nodes(filters=of_file)

    LlamaIndex's pipeline cache considers nodes with the same text and metadata equal, whatever their images. So this
    step, which makes them differ, is never taken from the cache (its serialised form differs at every call); the steps
    after it are.

    Args:
        on_error: for an image that cannot be read: ``"raise"``, or ``"skip"`` its node and log a warning.
        allow_remote: whether images given only by a web address are fetched, and then carried in base64; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.

    Raises:
        EncodeError: with ``"raise"``, an image that cannot be read, or is given only by a URL that may not be fetched.
            ``.index`` is the node's position.

    Example:
        >>> from llama_index.core.schema import Document
        >>> (node,) = PageNodes()([Document(id_="d", text="Revenue rose.")])
        >>> type(node).__name__, node.node_id, node.ref_doc_id
        ('TextNode', '2600e808-c976-5f86-9d18-ee0eaa20bec6', 'd')
    """

    on_error: Literal["raise", "skip"] = Field(default="raise")
    allow_remote: RemoteHosts = Field(default=False)

    @classmethod
    def class_name(cls) -> str:
        """Return the name it is serialised under."""
        return "PageNodes"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Return its settings and a value that is new at every call, so that no cache recognises it."""
        return {**super().to_dict(**kwargs), "call": uuid.uuid4().hex}

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Convert documents or nodes, in order."""
        converted: list[BaseNode] = []
        for position, node in enumerate(nodes):
            try:
                converted.append(self._converted(node))
            except (PageError, ConfigError) as exc:
                if self.on_error == "raise":
                    raise EncodeError.of(exc, position) from exc
                _log.warning("node %r is skipped: %s", node.node_id, exc)
        return converted

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Convert documents or nodes in a thread, because images are opened."""
        return await asyncio.to_thread(self.__call__, nodes)

    def _converted(self, node: BaseNode) -> BaseNode:
        if isinstance(node, TextNode) and not has_image(node):
            return node
        fields: dict[str, Any] = {
            "id_": node.node_id,
            "metadata": dict(node.metadata),
            "excluded_embed_metadata_keys": list(node.excluded_embed_metadata_keys),
            "excluded_llm_metadata_keys": list(node.excluded_llm_metadata_keys),
            "relationships": dict(node.relationships),
            "embedding": node.embedding,
            "metadata_template": node.metadata_template,
            "metadata_separator": node.metadata_separator,
            "text_template": getattr(node, "text_template", TextNode.model_fields["text_template"].default),
        }
        if isinstance(node, Document):
            # As in LlamaIndex's splitters, SOURCE is the document, whatever its own source. Under the document's own
            # id, the node's hash would replace the document's in a document store, and each refresh encode it again.
            fields["id_"] = document_node_id(node.node_id)
            fields["relationships"][NodeRelationship.SOURCE] = RelatedNodeInfo(
                node_id=node.node_id, node_type=ObjectType.DOCUMENT, hash=node.hash
            )
        if not has_image(node):
            return TextNode(text=node.get_content(), **fields)
        page = page_from_node(node, self.allow_remote)
        page_id = page_of(node) or node.node_id
        metadata = {**node.metadata, PAGE_ID: page_id, "sha256": node.metadata.get("sha256") or page.sha256}
        new_keys = [key for key in (PAGE_ID, "sha256") if key not in node.metadata]
        fields |= excluded_keys(
            node.excluded_embed_metadata_keys, node.excluded_llm_metadata_keys, new_keys, labels=metadata
        )
        image = page.image_path or page.image_source
        assert isinstance(image, Path | bytes)  # noqa: S101 - page_from_node makes no others
        return ImageNode(
            text=text_with_id(page_id, plain_text(node)),
            **image_fields(image.absolute() if isinstance(image, Path) else image, DEFAULT_CHAT_IMAGES),
            **{**fields, "metadata": metadata},
        )
