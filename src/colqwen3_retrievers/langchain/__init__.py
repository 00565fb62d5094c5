"""LangChain: a retriever, a reranker, and page images for chat models. Needs the extra ``langchain``.

Each name is loaded when it is first used; importing this package imports neither langchain_core nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from colqwen3_retrievers.errors import require

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


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used; MissingExtraError when langchain-core is not installed."""
    try:
        module = _WHERE[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    require("langchain", "langchain_core", "langchain-core")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return list(__all__)
