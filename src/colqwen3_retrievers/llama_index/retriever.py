"""LlamaIndex retriever: a question in, page nodes out, best first by MaxSim."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import IndexNode, NodeWithScore, QueryBundle, QueryType
from llama_index.core.vector_stores.types import MetadataFilters

from colqwen3_retrievers.documents import Hit, Query
from colqwen3_retrievers.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.index import PageIndex
from colqwen3_retrievers.llama_index.filters import filters_to_where
from colqwen3_retrievers.llama_index.nodes import node_from_hit, query_from_bundle
from colqwen3_retrievers.stores.protocol import GroupBy
from colqwen3_retrievers.stores.where import parse


class ColQwen3Retriever(BaseRetriever):
    """Finds the pages of an index that answer a question, by late interaction.

    Nodes come as described at :func:`~colqwen3_retrievers.llama_index.nodes.node_from_hit`: page images reach a
    multimodal LLM through ``multimodal=True``, and survive evaluation, fusion and storing. A question may be an image:
    ``QueryBundle("", image_path="chart.png")``, or with a text beside it. Scores are MaxSim sums over query tokens, for
    which no cutoff holds from one question to another; ``ColQwen3Reranker(score_mode="mean")`` gives -1..1.

    Args:
        index: a :class:`PageIndex`, or the location of one, which is then opened for reading.
        similarity_top_k: most nodes, at least 1.
        encoder: what encodes the questions of an index given by location; None rebuilds it from what the index knows,
            when the first question comes.
        filters: only pages these hold for; every operator, nested too.
        where: the same in the language of :mod:`colqwen3_retrievers.stores.where`; with both, both must hold.
        exact: whether to score every page; False lets a store score candidates only.
        group_by: ``"source"`` gives the best page of each file.
        inline_images: whether nodes carry the picture in base64 too, for whoever cannot read the index's files.
        callback_manager: LlamaIndex's.
        object_map: LlamaIndex's, for index nodes.
        objects: LlamaIndex's, for index nodes.
        verbose: LlamaIndex's.

    Raises:
        ConfigError: an argument that cannot be used; a question without text and image.
        StoreError: the location holds no index that can be read.
        StoreMismatchError: the encoder is not the one that made the index.

    Example:
        >>> from llama_index.core.query_engine import RetrieverQueryEngine
        >>> from colqwen3_retrievers import ColQwen3Encoder, PageIndex, load_pages
        >>> with PageIndex.open("my-index", ColQwen3Encoder("tiny")) as index:                      # doctest: +SKIP
        ...     index.add(load_pages("reports/"))
        ...     retriever = ColQwen3Retriever(index, similarity_top_k=3)
        ...     for found in retriever.retrieve("what was the revenue?"):
        ...         print(found.score, found.metadata["file_name"], found.metadata["page"])
        ...     engine = RetrieverQueryEngine.from_args(retriever, llm=multimodal_llm, multimodal=True)
        ...     print(engine.query("what was the revenue?"))
    """

    def __init__(
        self,
        index: PageIndex | str | os.PathLike[str],
        *,
        similarity_top_k: int = 2,
        encoder: ColQwen3Encoder | None = None,
        filters: MetadataFilters | None = None,
        where: Mapping[str, Any] | None = None,
        exact: bool = False,
        group_by: GroupBy | None = None,
        inline_images: bool = False,
        callback_manager: CallbackManager | None = None,
        object_map: dict[str, Any] | None = None,
        objects: list[IndexNode] | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(callback_manager=callback_manager, object_map=object_map, objects=objects, verbose=verbose)
        self.similarity_top_k = similarity_top_k
        self._where = _both(filters_to_where(filters), where)
        if group_by not in (None, "source"):
            raise ConfigError(f"group_by: expected None or 'source', got {group_by!r}")
        self._exact = exact
        self._group_by: GroupBy | None = group_by
        self._inline_images = inline_images
        self._owns_index = not isinstance(index, PageIndex)
        if isinstance(index, PageIndex):
            if encoder is not None:
                raise ConfigError("encoder: an index that is open has one; give it to PageIndex.open")
            self._index = index
        elif isinstance(index, str | os.PathLike):
            self._index = PageIndex.open(index, encoder, read_only=True)
        else:
            raise ConfigError(f"index: expected a PageIndex or a location, got {type(index).__name__}")

    @property
    def index(self) -> PageIndex:
        """The index that is searched."""
        return self._index

    @property
    def similarity_top_k(self) -> int:
        """Most nodes a question gets; may be set."""
        return self._similarity_top_k

    @similarity_top_k.setter
    def similarity_top_k(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"similarity_top_k: expected a whole number from 1, got {value!r}")
        self._similarity_top_k = value

    def close(self) -> None:
        """Close the index if it was opened here by its location; one that was handed in stays open."""
        if self._owns_index:
            self._index.close()

    def retrieve(self, str_or_query_bundle: QueryType | Query) -> list[NodeWithScore]:
        """Retrieve nodes for a text, a QueryBundle, or a Query whose image lies in a file.

        Raises:
            ConfigError: a question without text and image, or a Query with an image in memory.
        """
        return super().retrieve(_bundle(str_or_query_bundle))

    async def aretrieve(self, str_or_query_bundle: QueryType | Query) -> list[NodeWithScore]:
        """Retrieve without blocking the event loop; see :meth:`retrieve`."""
        return await super().aretrieve(_bundle(str_or_query_bundle))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as settings and the index's location; a copy opens the index for reading."""
        return _copy, (type(self), self._index, self._settings())

    def __deepcopy__(self, memo: dict[int, Any]) -> ColQwen3Retriever:
        """Give a copy that shares the index."""
        return _copy(type(self), self._index, self._settings())

    def _settings(self) -> dict[str, Any]:
        return {
            "similarity_top_k": self._similarity_top_k,
            "where": self._where,
            "exact": self._exact,
            "group_by": self._group_by,
            "inline_images": self._inline_images,
        }

    def __repr__(self) -> str:
        """Name the index."""
        return f"ColQwen3Retriever({self._index.location!r}, similarity_top_k={self.similarity_top_k})"

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        query = _question(query_bundle)
        hits = self._index.search(
            query, self.similarity_top_k, where=self._where, exact=self._exact, group_by=self._group_by
        )
        return self._nodes(hits)

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        query = _question(query_bundle)
        hits = await self._index.asearch(
            query, self.similarity_top_k, where=self._where, exact=self._exact, group_by=self._group_by
        )
        return await asyncio.to_thread(self._nodes, hits)  # it opens the pictures' headers

    def _nodes(self, hits: list[Hit]) -> list[NodeWithScore]:
        return [node_from_hit(hit, inline_image=self._inline_images) for hit in hits]


def _bundle(asked: QueryType | Query) -> QueryType:
    """LlamaIndex's own kind of question for ours."""
    if not isinstance(asked, Query):
        return asked
    if asked.image is not None and not isinstance(asked.image, str | Path):
        raise ConfigError("query: LlamaIndex carries an image by its path; save it and give Query(image=path)")
    return QueryBundle(asked.text or "", image_path=None if asked.image is None else str(asked.image))


def _copy(kind: type[ColQwen3Retriever], index: PageIndex, settings: dict[str, Any]) -> ColQwen3Retriever:
    return kind(index, **settings)


def _question(bundle: QueryBundle) -> Query:
    # Query transforms (HyDE and the like) put what is to be embedded beside the query; MaxSim of texts laid end to end
    # is the sum of theirs.
    return query_from_bundle(bundle, text="\n".join(bundle.embedding_strs))


def _both(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if parse(other) is None:
        return one
    return other if one is None else {"$and": [one, other]}
