"""The LangChain retriever."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, Self

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForRetrieverRun,
    CallbackManager,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever, LangSmithRetrieverParams
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from colqwen3_retrievers.encoding.futures import FutureGroup
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.langchain.documents import hits_to_documents
from colqwen3_retrievers.langchain.fields import EncoderField, IndexField, open_index, pickled
from colqwen3_retrievers.langchain.filters import document_filter
from colqwen3_retrievers.langchain.questions import (
    Outcome,
    checked_query,
    in_parts,
    model_name,
    results_of,
    shown_query,
    sorted_out,
)
from colqwen3_retrievers.pages.page import Query
from colqwen3_retrievers.retrieval.evidence import Evidence
from colqwen3_retrievers.vectors.multi_vector import MultiVector


class ColQwen3Retriever(BaseRetriever):
    """Finds pages by late interaction in a :class:`~colqwen3_retrievers.index.page_index.PageIndex`.

    ``invoke(query, k=..., filter=...)`` overrides the fields for one call; ``batch`` encodes all its queries together
    and reads the index once. A query is a text, or a :class:`~colqwen3_retrievers.pages.page.Query` for an image.
    Documents are those of :func:`~colqwen3_retrievers.langchain.documents.page_to_document`: ``metadata["score"]`` is
    the MaxSim sum, which orders the pages of one query and says nothing across queries.

    Args:
        index: an open index; or its folder or address, which is opened now, for reading. No model is loaded.
        encoder: with a folder: what encodes queries; None rebuilds it from what the index knows, at the first query.
        images_dir: with an address: where the images of its pages lie, which documents name as ``image_path``.
        k: most documents, at least 1.
        filter: only among these pages; the language is that of :mod:`colqwen3_retrievers.stores.where`, the names are
            keys of the documents' metadata: ``page`` is what they show, ``metadata.page`` a key of yours.
        group_by: ``"source"`` gives the best page of each source.
        window: pages before and after each of them in its source, which follow it in the list, without a score; their
            ``metadata["neighbour_of"]`` is the id of the page they stand beside. ``filter`` does not bear on them.
        boxes: most regions that answered, a page: ``metadata["boxes"]``, best first, in shares of the page; see
            :class:`~colqwen3_retrievers.retrieval.evidence.Evidence`. Neighbours have theirs too, texts have none.
        heatmaps: a folder for pictures of them: ``metadata["heatmap"]`` is the file of a page with the map over it.

    Raises:
        StoreError: no index there.
        StoreMismatchError: the index was made by another model than the encoder's.
        ValueError: an argument is wrong or unknown (pydantic's ValidationError).

    Example:
        >>> from colqwen3_retrievers import ColQwen3Encoder, PageIndex, load_pages             # doctest: +SKIP
        >>> from colqwen3_retrievers.langchain import ColQwen3Retriever
        >>> index = PageIndex.open("my-index", ColQwen3Encoder())                              # doctest: +SKIP
        >>> index.add(load_pages("reports/"))                                                  # doctest: +SKIP
        >>> retriever = ColQwen3Retriever(index=index, k=3)                                    # doctest: +SKIP
        >>> for document in retriever.invoke("what was the revenue?", filter={"year": 2020}):  # doctest: +SKIP
        ...     print(document.metadata["citation"], document.metadata["score"], document.metadata["image_path"])
        a.pdf, page 7 17.3 /home/ada/my-index/images/ab/ab12....png
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    index: IndexField
    encoder: EncoderField = None
    images_dir: str | Path | None = None
    k: int = Field(default=4, ge=1)
    filter: dict[str, Any] | None = None
    group_by: Literal["source"] | None = None
    window: int = Field(default=0, ge=0)
    boxes: int = Field(default=0, ge=0, strict=True)
    heatmaps: str | Path | None = None

    _opened_here: bool = PrivateAttr(default=False)

    @model_validator(mode="after")
    def _open(self) -> Self:
        self._opened_here = not isinstance(self.index, PageIndex)
        self.index = open_index(self.index, self.encoder, self.images_dir)
        return self

    # -- one query -----------------------------------------------------------------------------------------------------

    def invoke(self, input: str | Query, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """Find documents for one query.

        Args:
            input: a text, or a Query; of an image, callbacks see its text and the word "image", never its pixels.
            config: LangChain's.
            **kwargs: ``k`` and ``filter`` for this call; ``filter={}`` is no filter.

        Raises:
            ConfigError: an empty query, ``k`` below 1, or a bad filter.
            EncodeError: the query cannot be encoded.
        """
        if isinstance(input, Query):
            return super().invoke(shown_query(input), config, question=input, **kwargs)
        return super().invoke(input, config, **kwargs)

    async def ainvoke(self, input: str | Query, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """Find documents for one query without blocking the event loop; see :meth:`invoke`."""
        if isinstance(input, Query):
            return await super().ainvoke(shown_query(input), config, question=input, **kwargs)
        return await super().ainvoke(input, config, **kwargs)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        filter: dict[str, Any] | None = None,
        question: Query | None = None,
    ) -> list[Document]:
        asked = checked_query(question or query)
        hits, told = self._evidence.search(self._pages, asked, self._how(k, filter))
        return hits_to_documents(hits, evidence=told)

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        filter: dict[str, Any] | None = None,
        question: Query | None = None,
    ) -> list[Document]:
        asked = checked_query(question or query)
        hits, told = await self._evidence.asearch(self._pages, asked, self._how(k, filter))
        return hits_to_documents(hits, evidence=told)

    # -- many queries --------------------------------------------------------------------------------------------------

    def batch(
        self,
        inputs: list[str] | list[Query] | list[str | Query],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[list[Document]]:
        """Find documents for many queries: encoded together, and each page read once.

        A chain that begins with the retriever (``retriever | ...``) batches this way too; one that begins with a
        ``RunnableParallel`` invokes it once a query, and only the encoder gathers what comes at the same time.

        Args:
            inputs: texts or Queries.
            config: one for all, or one for each; ``max_concurrency`` is the most queries that go together.
            return_exceptions: whether a query that fails gives its exception in its place, instead of raising the
                first one once all are done.
            **kwargs: ``k`` and ``filter`` for all of them.

        Returns:
            The documents of each query, in order: those :meth:`invoke` gives.
        """
        if not inputs:
            return []
        configs = get_config_list(config, len(inputs))
        runs = [self._manager(CallbackManager, each).on_retriever_start(None, shown_query(query), **self._run(each))
                for query, each in zip(inputs, configs, strict=True)]  # fmt: skip
        outcomes: list[Outcome] = []
        try:
            for part in in_parts(inputs, configs[0]):
                outcomes += self._answer(part, **kwargs)
        except BaseException as exc:  # that of all of them; an interrupt goes on at once
            outcomes = [exc if isinstance(exc, Exception) else RuntimeError(repr(exc))] * len(inputs)
            if not isinstance(exc, Exception):
                raise
        finally:
            for run, outcome in zip(runs, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    run.on_retriever_error(outcome)
                else:
                    run.on_retriever_end(outcome)
        return results_of(outcomes, return_exceptions)

    async def abatch(
        self,
        inputs: list[str] | list[Query] | list[str | Query],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[list[Document]]:
        """Find documents for many queries without blocking the event loop; see :meth:`batch`."""
        if not inputs:
            return []
        configs = get_config_list(config, len(inputs))
        runs = [await self._manager(AsyncCallbackManager, each).on_retriever_start(
                    None, shown_query(query), **self._run(each))
                for query, each in zip(inputs, configs, strict=True)]  # fmt: skip
        outcomes: list[Outcome] = []
        try:
            for part in in_parts(inputs, configs[0]):
                outcomes += await self._aanswer(part, **kwargs)
        except BaseException as exc:  # that of all of them; a cancellation goes on at once
            outcomes = [exc if isinstance(exc, Exception) else RuntimeError(repr(exc))] * len(inputs)
            if not isinstance(exc, Exception):
                raise
        finally:
            for run, outcome in zip(runs, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    await run.on_retriever_error(outcome)
                else:
                    await run.on_retriever_end(outcome)
        return results_of(outcomes, return_exceptions)

    # -- inside --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the index, if it was opened here by its location; one that was handed in stays open."""
        if self._opened_here and isinstance(self.index, PageIndex):
            self.index.close()

    @property
    def _pages(self) -> PageIndex:
        index = self.index
        if not isinstance(index, PageIndex):  # assigned after the retriever was made
            index = self.index = open_index(index, self.encoder, self.images_dir)
        return index

    @property
    def _evidence(self) -> Evidence:
        return Evidence(self.boxes, self.heatmaps)

    def _how(self, k: int | None, filter: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "k": self.k if k is None else k,
            "where": document_filter(self.filter if filter is None else filter),
            "group_by": self.group_by,
            "window": self.window,
        }

    def _answer(
        self, queries: Sequence[str | Query], k: int | None = None, filter: dict[str, Any] | None = None
    ) -> list[Outcome]:
        how, outcomes, asked = self._how(k, filter), *sorted_out(queries)
        group = FutureGroup()
        try:
            return self._search(outcomes, self._submit(asked, group), how)
        finally:
            group.cancel()

    async def _aanswer(
        self, queries: Sequence[str | Query], k: int | None = None, filter: dict[str, Any] | None = None
    ) -> list[Outcome]:
        how, outcomes, asked = self._how(k, filter), *sorted_out(queries)
        group = FutureGroup()
        try:  # submitting may load a model
            futures = await asyncio.to_thread(self._submit, asked, group)
            await group.settled()
            return await asyncio.to_thread(self._search, outcomes, futures, how)
        finally:
            group.cancel()

    def _submit(self, asked: dict[int, str | Query], group: FutureGroup) -> dict[int, Future[list[MultiVector]]]:
        """Start encoding; each query by itself, so that each can fail by itself, and all before one is waited for."""
        if not asked or not len(self._pages):  # an empty index needs no model
            return {}
        encoder = self._pages.encoder
        futures = {place: encoder.submit_queries([query]) for place, query in asked.items()}
        group.add(futures.values())
        return futures

    def _search(
        self, outcomes: dict[int, Outcome], futures: dict[int, Future[list[MultiVector]]], how: dict[str, Any]
    ) -> list[Outcome]:
        made: dict[int, MultiVector] = {}
        for place, future in futures.items():
            try:
                made[place] = future.result()[0]
            except Exception as exc:  # handed to the caller of this query
                outcomes[place] = exc
        found = self._pages.search_many(list(made.values()), **how)
        for (place, asked), hits in zip(made.items(), found, strict=True):
            outcomes[place] = hits_to_documents(hits, evidence=self._evidence.of_hits(self._pages, asked, hits))
        return [outcomes[place] for place in sorted(outcomes)]

    def _manager(self, kind: Any, config: RunnableConfig) -> Any:
        """Configure callbacks as ``invoke`` does."""
        return kind.configure(
            config.get("callbacks"),
            None,
            verbose=False,
            inheritable_tags=config.get("tags"),
            local_tags=self.tags,
            inheritable_metadata={**(config.get("metadata") or {}), **self._get_ls_params()},
            local_metadata=self.metadata,
        )

    def _run(self, config: RunnableConfig) -> dict[str, Any]:
        return {"name": config.get("run_name") or self.get_name(), "run_id": config.get("run_id")}

    def _get_ls_params(self, **kwargs: Any) -> LangSmithRetrieverParams:
        """Name the model for tracing; of a folder its last part, as paths are nobody else's business."""
        return LangSmithRetrieverParams(
            **super()._get_ls_params(**kwargs),
            ls_vector_store_provider="PageIndex",
            ls_embedding_provider="colqwen3-retrievers",
            ls_embedding_model=model_name(self._pages.info.model),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as settings and the index's location."""
        return pickled(self)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Give a copy that shares the index and the encoder."""
        return self.model_copy()
