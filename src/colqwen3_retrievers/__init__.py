"""ColQwen3 late interaction for LlamaIndex and LangChain: exact encoding, MaxSim retrieval, reranking.

Importing this package costs nothing: every name is loaded when it is first used, and torch, transformers and the
frameworks only when something needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from colqwen3_retrievers.lazy import lazy_names

if TYPE_CHECKING:
    from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder as ColQwen3Encoder
    from colqwen3_retrievers.engines.options import ServerOptions as ServerOptions
    from colqwen3_retrievers.engines.options import TorchOptions as TorchOptions
    from colqwen3_retrievers.engines.options import VLLMOptions as VLLMOptions
    from colqwen3_retrievers.errors import ColQwen3Error as ColQwen3Error
    from colqwen3_retrievers.index.copy import copy_index as copy_index
    from colqwen3_retrievers.index.page_index import PageIndex as PageIndex
    from colqwen3_retrievers.pages.loading import load_pages as load_pages
    from colqwen3_retrievers.pages.page import Hit as Hit
    from colqwen3_retrievers.pages.page import Page as Page
    from colqwen3_retrievers.pages.page import Query as Query
    from colqwen3_retrievers.pages.page import Video as Video
    from colqwen3_retrievers.retrieval.similarity_maps import SimilarityMap as SimilarityMap
    from colqwen3_retrievers.retrieval.similarity_maps import similarity_map as similarity_map
    from colqwen3_retrievers.stores.location import open_store as open_store
    from colqwen3_retrievers.stores.qdrant.collection import QdrantOptions as QdrantOptions
    from colqwen3_retrievers.vectors.late_interaction import maxsim as maxsim
    from colqwen3_retrievers.vectors.multi_vector import EncoderInfo as EncoderInfo
    from colqwen3_retrievers.vectors.multi_vector import MultiVector as MultiVector
    from colqwen3_retrievers.vectors.multi_vector import PackedEmbeddings as PackedEmbeddings

__version__ = "0.1.0"

_WHERE = {
    "ColQwen3Encoder": "encoding.encoder",
    "ColQwen3Error": "errors",
    "EncoderInfo": "vectors.multi_vector",
    "Hit": "pages.page",
    "MultiVector": "vectors.multi_vector",
    "PackedEmbeddings": "vectors.multi_vector",
    "Page": "pages.page",
    "PageIndex": "index.page_index",
    "QdrantOptions": "stores.qdrant.collection",
    "Query": "pages.page",
    "ServerOptions": "engines.options",
    "SimilarityMap": "retrieval.similarity_maps",
    "TorchOptions": "engines.options",
    "VLLMOptions": "engines.options",
    "Video": "pages.page",
    "copy_index": "index.copy",
    "load_pages": "pages.loading",
    "maxsim": "vectors.late_interaction",
    "open_store": "stores.location",
    "similarity_map": "retrieval.similarity_maps",
}

__all__ = sorted(_WHERE)  # noqa: PLE0605 - one table says both what is public and where it lies

__getattr__, __dir__ = lazy_names(__name__, _WHERE)
