"""LlamaIndex adapter: read, index, retrieve and rerank pages by late interaction.

::

    from colqwen3_retrievers.llama_index import ColQwen3Reranker, ColQwen3Retriever

Nothing is imported before a name is used; without llama-index-core, the error is the pip line that installs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from colqwen3_retrievers.errors import require
from colqwen3_retrievers.lazy import lazy_names

if TYPE_CHECKING:
    from colqwen3_retrievers.llama_index.embedding import ColQwen3Embedding as ColQwen3Embedding
    from colqwen3_retrievers.llama_index.filters import filters_to_where as filters_to_where
    from colqwen3_retrievers.llama_index.nodes import node_from_hit as node_from_hit
    from colqwen3_retrievers.llama_index.nodes import page_from_node as page_from_node
    from colqwen3_retrievers.llama_index.reader import PageReader as PageReader
    from colqwen3_retrievers.llama_index.reranker import ColQwen3Reranker as ColQwen3Reranker
    from colqwen3_retrievers.llama_index.retriever import ColQwen3Retriever as ColQwen3Retriever
    from colqwen3_retrievers.llama_index.tool import PageRetrieverTool as PageRetrieverTool
    from colqwen3_retrievers.llama_index.tool_images import MoveToolImages as MoveToolImages
    from colqwen3_retrievers.llama_index.tool_images import move_tool_images as move_tool_images
    from colqwen3_retrievers.llama_index.transformation import PageNodes as PageNodes

_MODULES = {
    "ColQwen3Embedding": "embedding",
    "ColQwen3Reranker": "reranker",
    "ColQwen3Retriever": "retriever",
    "MoveToolImages": "tool_images",
    "PageNodes": "transformation",
    "PageReader": "reader",
    "PageRetrieverTool": "tool",
    "filters_to_where": "filters",
    "move_tool_images": "tool_images",
    "node_from_hit": "nodes",
    "page_from_node": "nodes",
}

__all__ = sorted(_MODULES)  # noqa: PLE0605 - the public names and their modules are one table

__getattr__, __dir__ = lazy_names(
    __name__, _MODULES, lambda: require("llama-index", "llama_index.core", "llama-index-core")
)
