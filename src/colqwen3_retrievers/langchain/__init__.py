"""LangChain: retriever, reranker, vector store, loader, tool, and images for chat models. Extra ``langchain``.

Each name is loaded on first use; importing this package imports neither langchain_core nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from colqwen3_retrievers.errors import require
from colqwen3_retrievers.lazy import lazy_names

if TYPE_CHECKING:
    from colqwen3_retrievers.langchain.content_blocks import docs_to_content_blocks as docs_to_content_blocks
    from colqwen3_retrievers.langchain.embeddings import ColQwen3Embeddings as ColQwen3Embeddings
    from colqwen3_retrievers.langchain.index_keys import page_key_encoder as page_key_encoder
    from colqwen3_retrievers.langchain.page_loader import PageLoader as PageLoader
    from colqwen3_retrievers.langchain.query_translator import ColQwen3Translator as ColQwen3Translator
    from colqwen3_retrievers.langchain.reranker import ColQwen3Reranker as ColQwen3Reranker
    from colqwen3_retrievers.langchain.retriever import ColQwen3Retriever as ColQwen3Retriever
    from colqwen3_retrievers.langchain.retriever_tool import create_page_retriever_tool as create_page_retriever_tool
    from colqwen3_retrievers.langchain.tool_images import move_tool_images as move_tool_images
    from colqwen3_retrievers.langchain.tool_images import move_tool_images_middleware as move_tool_images_middleware
    from colqwen3_retrievers.langchain.vector_store import ColQwen3VectorStore as ColQwen3VectorStore

_WHERE = {
    "ColQwen3Embeddings": "embeddings",
    "ColQwen3Reranker": "reranker",
    "ColQwen3Retriever": "retriever",
    "ColQwen3Translator": "query_translator",
    "ColQwen3VectorStore": "vector_store",
    "PageLoader": "page_loader",
    "create_page_retriever_tool": "retriever_tool",
    "docs_to_content_blocks": "content_blocks",
    "move_tool_images": "tool_images",
    "move_tool_images_middleware": "tool_images",
    "page_key_encoder": "index_keys",
}

__all__ = sorted(_WHERE)  # noqa: PLE0605 - one table holds the public names and their modules

__getattr__, __dir__ = lazy_names(__name__, _WHERE, lambda: require("langchain", "langchain_core", "langchain-core"))
