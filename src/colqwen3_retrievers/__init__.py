"""ColQwen3 late interaction for LlamaIndex and LangChain: exact encoding, MaxSim retrieval, reranking.

Importing this package costs nothing: every name is loaded when it is first used, and torch, transformers and the
frameworks only when something needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from colqwen3_retrievers.lazy import lazy_names

if TYPE_CHECKING:
    from colqwen3_retrievers.copying import copy_index as copy_index
    from colqwen3_retrievers.datatypes import EncoderInfo as EncoderInfo
    from colqwen3_retrievers.datatypes import MultiVector as MultiVector
    from colqwen3_retrievers.datatypes import PackedEmbeddings as PackedEmbeddings
    from colqwen3_retrievers.documents import Hit as Hit
    from colqwen3_retrievers.documents import Page as Page
    from colqwen3_retrievers.documents import Query as Query
    from colqwen3_retrievers.documents import Video as Video
    from colqwen3_retrievers.encoder import ColQwen3Encoder as ColQwen3Encoder
    from colqwen3_retrievers.errors import ColQwen3Error as ColQwen3Error
    from colqwen3_retrievers.index import PageIndex as PageIndex
    from colqwen3_retrievers.late_interaction import maxsim as maxsim
    from colqwen3_retrievers.options import ServerOptions as ServerOptions
    from colqwen3_retrievers.options import TorchOptions as TorchOptions
    from colqwen3_retrievers.options import VLLMOptions as VLLMOptions
    from colqwen3_retrievers.pages import load_pages as load_pages
    from colqwen3_retrievers.similarity_maps import SimilarityMap as SimilarityMap
    from colqwen3_retrievers.similarity_maps import similarity_map as similarity_map
    from colqwen3_retrievers.stores import open_store as open_store
    from colqwen3_retrievers.stores.qdrant_collection import QdrantOptions as QdrantOptions

__version__ = "0.1.0"

_WHERE = {
    "ColQwen3Encoder": "encoder",
    "ColQwen3Error": "errors",
    "EncoderInfo": "datatypes",
    "Hit": "documents",
    "MultiVector": "datatypes",
    "PackedEmbeddings": "datatypes",
    "Page": "documents",
    "PageIndex": "index",
    "QdrantOptions": "stores.qdrant_collection",
    "Query": "documents",
    "ServerOptions": "options",
    "SimilarityMap": "similarity_maps",
    "TorchOptions": "options",
    "VLLMOptions": "options",
    "Video": "documents",
    "copy_index": "copying",
    "load_pages": "pages",
    "maxsim": "late_interaction",
    "open_store": "stores",
    "similarity_map": "similarity_maps",
}

__all__ = sorted(_WHERE)  # noqa: PLE0605 - one table says both what is public and where it lies

__getattr__, __dir__ = lazy_names(__name__, _WHERE)
