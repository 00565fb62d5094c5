"""The searching half of the vector store."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from langchain_core.documents import Document
from langchain_core.vectorstores import VectorStore

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.index.search import Question, in_order, to_encode
from colqwen3_retrievers.langchain.diversity import check_lambda, most_diverse
from colqwen3_retrievers.langchain.documents import hits_to_documents
from colqwen3_retrievers.langchain.filters import document_filter
from colqwen3_retrievers.langchain.store_inputs import check_question, refuse
from colqwen3_retrievers.pages.page import Hit
from colqwen3_retrievers.retrieval.evidence import Evidence
from colqwen3_retrievers.stores.protocol import check_search
from colqwen3_retrievers.vectors.kernels import default_kernel
from colqwen3_retrievers.vectors.late_interaction import relevance
from colqwen3_retrievers.vectors.multi_vector import MultiVector, as_token_embeddings

GroupBy = Literal["source"]
Where = Mapping[str, Any]
_KNOWN = ("k", "filter", "group_by")
_EVIDENCE = ("boxes", "heatmaps")


class PageVectorSearch(VectorStore):
    """What a vector store over a page index can be asked.

    In every method ``query`` is a text, a :class:`~colqwen3_retrievers.pages.page.Query`, an image (PIL, ``Path`` or
    bytes) or a multi-vector; ``filter`` is in the language of :mod:`~colqwen3_retrievers.stores.where`, over the keys
    of the documents' metadata; ``group_by="source"`` gives the best document of each source. Among ``kwargs``, and so
    in ``as_retriever(search_kwargs=...)``, ``boxes`` and ``heatmaps`` ask for the regions that answered, as in
    :class:`~colqwen3_retrievers.langchain.retriever.ColQwen3Retriever`. All raise ConfigError for an argument that
    cannot be used, an unknown one too, and EncodeError for a query that cannot be encoded. The async twins wait for the
    encoder without blocking the event loop, and cancelling them cancels the encoding.
    """

    index: PageIndex

    # -- documents -----------------------------------------------------------------------------------------------------

    def similarity_search(
        self,
        query: Question,
        k: int = 4,
        *,
        filter: Where | None = None,
        group_by: GroupBy | None = None,
        window: int = 0,
        **kwargs: Any,
    ) -> list[Document]:
        """Find the documents that answer a query best.

        Args:
            query: as for all methods.
            k: most documents found, at least 1.
            filter: only among these.
            group_by: ``"source"`` or None.
            window: neighbours on each side in the same source, which follow it in the list, with the id of the document
                they stand beside under ``metadata["neighbour_of"]``; the filter does not bear on them.
            **kwargs: ``boxes`` and ``heatmaps``.

        Returns:
            Documents, best first, equal scores by id.
        """
        wanted = _wanted(kwargs, *_KNOWN, "window")
        return self._documents(*self._search(query, k, filter, group_by, window), wanted)

    async def asimilarity_search(
        self,
        query: Question,
        k: int = 4,
        *,
        filter: Where | None = None,
        group_by: GroupBy | None = None,
        window: int = 0,
        **kwargs: Any,
    ) -> list[Document]:
        """Find documents without blocking the event loop; see :meth:`similarity_search`."""
        wanted = _wanted(kwargs, *_KNOWN, "window")
        return await self._adocuments(*await self._asearch(query, k, filter, group_by, window), wanted)

    def similarity_search_by_vector(
        self, embedding: MultiVector | Sequence[Any], k: int = 4, **kwargs: Any
    ) -> list[Document]:
        """Find documents for a multi-vector: (n_tokens, dim) with unit rows, never one flat vector.

        Raises:
            ConfigError: a flat vector, or rows that are no unit vectors.
            DimensionError: another dim than the index's.
        """
        return self.similarity_search(_multi_vector(embedding), k, **kwargs)

    async def asimilarity_search_by_vector(
        self, embedding: MultiVector | Sequence[Any], k: int = 4, **kwargs: Any
    ) -> list[Document]:
        """Find documents for a multi-vector without blocking; see :meth:`similarity_search_by_vector`."""
        return await self.asimilarity_search(_multi_vector(embedding), k, **kwargs)

    # -- documents with scores -----------------------------------------------------------------------------------------

    def similarity_search_with_score(
        self,
        query: Question,
        k: int = 4,
        *,
        filter: Where | None = None,
        group_by: GroupBy | None = None,
        **kwargs: Any,
    ) -> list[tuple[Document, float]]:
        """Find documents and their MaxSim sums: higher is better, and comparable for one query only."""
        wanted = _wanted(kwargs, *_KNOWN)
        asked, hits = self._search(query, k, filter, group_by)
        return list(zip(self._documents(asked, hits, wanted), (hit.score for hit in hits), strict=True))

    async def asimilarity_search_with_score(
        self,
        query: Question,
        k: int = 4,
        *,
        filter: Where | None = None,
        group_by: GroupBy | None = None,
        **kwargs: Any,
    ) -> list[tuple[Document, float]]:
        """Find documents and scores without blocking; see :meth:`similarity_search_with_score`."""
        wanted = _wanted(kwargs, *_KNOWN)
        asked, hits = await self._asearch(query, k, filter, group_by)
        return list(zip(await self._adocuments(asked, hits, wanted), (hit.score for hit in hits), strict=True))

    def _similarity_search_with_relevance_scores(
        self,
        query: Question,
        k: int = 4,
        *,
        filter: Where | None = None,
        group_by: GroupBy | None = None,
        **kwargs: Any,
    ) -> list[tuple[Document, float]]:
        """Find documents and (1 + mean MaxSim) / 2, which can be compared between queries and with a threshold."""
        wanted = _wanted(kwargs, *_KNOWN, "score_threshold")
        asked, hits = self._search(query, k, filter, group_by)
        return list(zip(self._documents(asked, hits, wanted), _relevances(asked, hits), strict=True))

    async def _asimilarity_search_with_relevance_scores(
        self,
        query: Question,
        k: int = 4,
        *,
        filter: Where | None = None,
        group_by: GroupBy | None = None,
        **kwargs: Any,
    ) -> list[tuple[Document, float]]:
        wanted = _wanted(kwargs, *_KNOWN, "score_threshold")
        asked, hits = await self._asearch(query, k, filter, group_by)
        return list(zip(await self._adocuments(asked, hits, wanted), _relevances(asked, hits), strict=True))

    # -- documents that do not repeat each other -----------------------------------------------------------------------

    def max_marginal_relevance_search(
        self,
        query: Question,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Where | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Find documents that answer a query and do not repeat each other.

        See :func:`~colqwen3_retrievers.langchain.diversity.most_diverse` for the rule.

        Args:
            query: as for all methods.
            k: most documents, at least 1.
            fetch_k: the most relevant ones to choose from; their multi-vectors are read.
            lambda_mult: from 0, diversity alone, to 1, relevance alone.
            filter: only among these.
            **kwargs: ``boxes`` and ``heatmaps``.

        Returns:
            Documents in the order chosen.
        """
        wanted = _wanted(kwargs, "k", "fetch_k", "lambda_mult", "filter")
        asked, hits = self._search(query, _fetched(k, fetch_k, lambda_mult), filter)
        return self._documents(asked, self._diverse(asked, hits, k, lambda_mult), wanted)

    async def amax_marginal_relevance_search(
        self,
        query: Question,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Where | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Find diverse documents without blocking; see :meth:`max_marginal_relevance_search`."""
        wanted = _wanted(kwargs, "k", "fetch_k", "lambda_mult", "filter")
        asked, hits = await self._asearch(query, _fetched(k, fetch_k, lambda_mult), filter)
        chosen = await asyncio.to_thread(self._diverse, asked, hits, k, lambda_mult)
        return await self._adocuments(asked, chosen, wanted)

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: MultiVector | Sequence[Any],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        **kwargs: Any,
    ) -> list[Document]:
        """Find diverse documents for a multi-vector (n_tokens, dim) with unit rows."""
        return self.max_marginal_relevance_search(_multi_vector(embedding), k, fetch_k, lambda_mult, **kwargs)

    async def amax_marginal_relevance_search_by_vector(
        self,
        embedding: MultiVector | Sequence[Any],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        **kwargs: Any,
    ) -> list[Document]:
        """Find diverse documents for a multi-vector without blocking."""
        return await self.amax_marginal_relevance_search(_multi_vector(embedding), k, fetch_k, lambda_mult, **kwargs)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _search(
        self, query: Question, k: int, filter: Where | None, group_by: GroupBy | None = None, window: int = 0
    ) -> tuple[MultiVector | None, list[Hit]]:
        """Give the query's multi-vector and its hits; an empty index needs no model."""
        check_search(k, group_by)
        question, where = check_question(query), document_filter(filter)
        if not len(self.index):
            return None, []
        texts, ready = to_encode([question])
        made = self.index.encoder.submit_queries(texts).result() if texts else []
        vectors = in_order(ready, made)[0]
        return vectors, self.index.search(vectors, k, where=where, group_by=group_by, window=window)

    async def _asearch(
        self, query: Question, k: int, filter: Where | None, group_by: GroupBy | None = None, window: int = 0
    ) -> tuple[MultiVector | None, list[Hit]]:
        check_search(k, group_by)
        question, where = check_question(query), document_filter(filter)
        if not await asyncio.to_thread(len, self.index):
            return None, []
        texts, ready = to_encode([question])
        made: list[MultiVector] = []
        if texts:  # submitting may load a model, so it belongs in a thread
            future = await asyncio.to_thread(lambda: self.index.encoder.submit_queries(texts))
            made = await asyncio.wrap_future(future)
        vectors = in_order(ready, made)[0]
        return vectors, await self.index.asearch(vectors, k, where=where, group_by=group_by, window=window)

    def _documents(self, query: MultiVector | None, hits: list[Hit], wanted: Evidence) -> list[Document]:
        told = {} if query is None else wanted.of_hits(self.index, query, hits)
        return hits_to_documents(hits, scores=False, evidence=told)

    async def _adocuments(self, query: MultiVector | None, hits: list[Hit], wanted: Evidence) -> list[Document]:
        if not wanted.wanted:
            return self._documents(query, hits, wanted)
        return await asyncio.to_thread(self._documents, query, hits, wanted)

    def _diverse(self, query: MultiVector | None, hits: list[Hit], k: int, lambda_mult: float) -> list[Hit]:
        if query is None or lambda_mult == 1 or len(hits) < 2:
            return hits[:k]
        records = self.index.get([hit.page.id for hit in hits], vectors=True)
        vectors = {record.page.id: record.multi_vector for record in records}
        kept = [hit for hit in hits if vectors.get(hit.page.id) is not None]  # one may have been deleted meanwhile
        relevances = [hit.score / len(query) for hit in kept]
        documents = [vectors[hit.page.id] for hit in kept]
        chosen = most_diverse(relevances, documents, k, lambda_mult, kernel=default_kernel())  # type: ignore[arg-type]  # None is out
        return [kept[place] for place in chosen]


def _wanted(given: Mapping[str, Any], *known: str) -> Evidence:
    """Take what is to be told of regions out of a call's other arguments, and refuse the rest."""
    evidence = {name: given[name] for name in _EVIDENCE if name in given}
    refuse({name: value for name, value in given.items() if name not in evidence}, *known, *_EVIDENCE)
    return Evidence(**evidence)


def _relevances(query: MultiVector | None, hits: list[Hit]) -> list[float]:
    return [] if query is None else [relevance(hit.score, len(query)) for hit in hits]


def _fetched(k: int, fetch_k: int, lambda_mult: float) -> int:
    check_lambda(lambda_mult)
    check_search(k, None)
    try:
        fetched = operator.index(fetch_k)
    except TypeError:
        fetched = 0
    if fetched < 1:
        raise ConfigError(f"fetch_k: expected a whole number from 1, got {fetch_k!r}")
    return max(k, fetched)


def _multi_vector(embedding: MultiVector | Sequence[Any]) -> MultiVector:
    if isinstance(embedding, MultiVector):
        return embedding
    try:
        array = np.asarray(embedding, dtype=np.float32)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"embedding: expected numbers of shape (n_tokens, dim): {exc}") from exc
    return MultiVector(as_token_embeddings(array, name="embedding"))
