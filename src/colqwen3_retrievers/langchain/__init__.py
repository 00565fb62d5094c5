"""LangChain: a retriever, a reranker, and page images for chat models. Needs the extra ``langchain``.

Each name is loaded when it is first used; importing this package imports neither langchain_core nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from colqwen3_retrievers.errors import require
from colqwen3_retrievers.lazy import lazy_names

if TYPE_CHECKING:
    from colqwen3_retrievers.langchain.content_blocks import docs_to_content_blocks as docs_to_content_blocks
    from colqwen3_retrievers.langchain.reranker import ColQwen3Reranker as ColQwen3Reranker
    from colqwen3_retrievers.langchain.retriever import ColQwen3Retriever as ColQwen3Retriever

_WHERE = {
    "ColQwen3Reranker": "reranker",
    "ColQwen3Retriever": "retriever",
    "docs_to_content_blocks": "content_blocks",
}

__all__ = sorted(_WHERE)  # noqa: PLE0605 - one table says both what is public and where it lies

__getattr__, __dir__ = lazy_names(__name__, _WHERE, lambda: require("langchain", "langchain_core", "langchain-core"))
