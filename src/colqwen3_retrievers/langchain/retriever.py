"""The LangChain retriever."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, Self

from langchain_core.callbacks import AsyncCallbackManager, CallbackManager
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever, LangSmithRetrieverParams
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.index.page_adder import PageEncoder
from colqwen3_retrievers.index.page_index import PageIndex, opened_index
from colqwen3_retrievers.langchain.documents import hits_to_documents
from colqwen3_retrievers.langchain.fields import EncoderField, FilterField, IndexField, checked_query, pickled
from colqwen3_retrievers.langchain.filters import document_filter
from colqwen3_retrievers.pages.page import Query
from colqwen3_retrievers.retrieval.evidence import Evidence
from colqwen3_retrievers.stores.protocol import check_search
from colqwen3_retrievers.vectors.multi_vector import MultiVector

_Encoding = Future[list[MultiVector]] | None
Outcome = list[Document] | Exception
"""The documents of one query, or why there are none."""


class ColQwen3Retriever(BaseRetriever):
    """Finds pages by late interaction in a :class:`~colqwen3_retrievers.index.page_index.PageIndex`.

    ``invoke(query, k=..., filter=...)`` overrides the fields for one call; ``batch`` encodes all its queries together
    and reads the index once. A query is a text, or a :class:`~colqwen3_retrievers.pages.page.Query` for an image.
    Documents are those of :func:`~colqwen3_retrievers.langchain.documents.page_to_document`: ``metadata["score"]`` is
    the MaxSim sum, comparable between pages of one query only.

    Args:
        index: an open index; or its folder or address, which is opened now, for reading. No model is loaded.
        encoder: with a folder: encodes queries; None rebuilds it from what the index stores, at the first query.
        images_dir: with an address: the folder of its pages' images, which documents name as ``image_path``.
        k: most documents, at least 1.
        filter: search among these pages only; the language is that of :mod:`colqwen3_retrievers.stores.where`, the
            names are keys of the documents' metadata: ``page`` is what they show, ``metadata.page`` a key of yours.
        group_by: ``"source"`` returns the best page of each source.
        window: neighbours on each side in the same source, which follow a page in the list, without a score, with the
            page's id under ``metadata["neighbour_of"]``. ``filter`` does not apply to them.
        boxes: most regions that answered, per page: ``metadata["boxes"]``, best first, in shares of the page; see
            :class:`~colqwen3_retrievers.retrieval.evidence.Evidence`. Neighbours have theirs too, texts have none.
        heatmaps: a folder for overlays: ``metadata["heatmap"]`` is the file of a page with its similarity map.

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
    k: int = Field(default=4, ge=1, strict=True)
    filter: FilterField = None
    group_by: Literal["source"] | None = None
    window: int = Field(default=0, ge=0, strict=True)
    boxes: int = Field(default=0, ge=0, strict=True)
    heatmaps: str | Path | None = None

    _owns_index: bool = PrivateAttr(default=False)

    @model_validator(mode="after")
    def _open(self) -> Self:
        self._owns_index = not isinstance(self.index, PageIndex)
        self.index = opened_index(self.index, self.encoder, self.images_dir)
        return self

    # -- one query -----------------------------------------------------------------------------------------------------

    def invoke(self, input: str | Query, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """Find documents for one query.

        Args:
            input: a text, or a Query; callbacks see an image as the word "image", never its pixels.
            config: LangChain's.
            **kwargs: ``k`` and ``filter`` for this call; ``filter={}`` is no filter.

        Raises:
            ConfigError: an empty query, ``k`` below 1, or a bad filter.
            EncodeError: the query cannot be encoded.
        """
        if isinstance(input, Query):
            return super().invoke(_query_text(input), config, question=input, **kwargs)
        return super().invoke(input, config, **kwargs)

    async def ainvoke(self, input: str | Query, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """Find documents for one query without blocking the event loop; see :meth:`invoke`."""
        if isinstance(input, Query):
            return await super().ainvoke(_query_text(input), config, question=input, **kwargs)
        return await super().ainvoke(input, config, **kwargs)

    def _get_relevant_documents(
        self, query: str, *, run_manager: Any, question: Query | None = None, **options: Any
    ) -> list[Document]:
        return _results(self._answer([question or query], **options))[0]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: Any, question: Query | None = None, **options: Any
    ) -> list[Document]:
        return _results(await self._aanswer([question or query], **options))[0]

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
            config: one for all, or one for each; ``max_concurrency`` is the most queries encoded together.
            return_exceptions: whether the exception of a query that fails takes its place in the list, instead of being
                raised once all are done.
            **kwargs: ``k`` and ``filter`` for all of them.

        Returns:
            The documents of each query, in order: those :meth:`invoke` returns.
        """
        if not inputs:
            return []
        configs = get_config_list(config, len(inputs))
        runs = [self._start_run(CallbackManager, query, each) for query, each in zip(inputs, configs, strict=True)]
        outcomes: list[Outcome] = []
        try:
            for part in _parts(inputs, configs[0]):
                outcomes += self._answer(part, **kwargs)
        except BaseException as exc:
            outcomes = _all_failed(exc, len(inputs))
            if not isinstance(exc, Exception):
                raise
        finally:
            for run, outcome in zip(runs, outcomes, strict=True):
                _end_run(run, outcome)
        return _results(outcomes, return_exceptions)

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
        runs = [
            await self._start_run(AsyncCallbackManager, query, each)
            for query, each in zip(inputs, configs, strict=True)
        ]
        outcomes: list[Outcome] = []
        try:
            for part in _parts(inputs, configs[0]):
                outcomes += await self._aanswer(part, **kwargs)
        except BaseException as exc:
            outcomes = _all_failed(exc, len(inputs))
            if not isinstance(exc, Exception):
                raise
        finally:
            for run, outcome in zip(runs, outcomes, strict=True):
                await _end_run(run, outcome)
        return _results(outcomes, return_exceptions)

    # -- searching -----------------------------------------------------------------------------------------------------

    def _answer(
        self, queries: Sequence[str | Query], k: int | None = None, filter: dict[str, Any] | None = None
    ) -> list[Outcome]:
        options = self._options(k, filter)
        encodings = self._submit(queries, self._query_encoder())
        try:
            return self._search(encodings, options)
        finally:
            _cancel(encodings)

    async def _aanswer(
        self, queries: Sequence[str | Query], k: int | None = None, filter: dict[str, Any] | None = None
    ) -> list[Outcome]:
        options = self._options(k, filter)
        encoder = await asyncio.to_thread(self._query_encoder)  # it may open the index
        encodings = self._submit(queries, encoder)
        try:
            pending = (asyncio.wrap_future(encoding) for encoding in encodings if encoding is not None)
            await asyncio.gather(*pending, return_exceptions=True)
            return await asyncio.to_thread(self._search, encodings, options)
        finally:
            _cancel(encodings)

    def _options(self, k: int | None, filter: dict[str, Any] | None) -> dict[str, Any]:
        k = self.k if k is None else k
        check_search(k, self.group_by)  # before anything is encoded
        where = document_filter(self.filter if filter is None else filter)
        return {"k": k, "where": where, "group_by": self.group_by, "window": self.window}

    def _query_encoder(self) -> PageEncoder | None:
        """Return the index's encoder; None if the index is empty, which needs no model."""
        return None if self._pages.store.is_empty() else self._pages.encoder

    def _submit(self, queries: Sequence[str | Query], encoder: PageEncoder | None) -> list[_Encoding]:
        """Start encoding each query by itself, so that each can fail by itself; returns at once."""
        encodings: list[_Encoding] = []
        for query in queries:
            encoding: _Encoding = None
            try:
                checked_query(query)
            except ConfigError as exc:
                encoding = Future()
                encoding.set_exception(exc)
            else:
                if encoder is not None:
                    encoding = encoder.submit_queries([query])
            encodings.append(encoding)
        return encodings

    def _search(self, encodings: Sequence[_Encoding], options: dict[str, Any]) -> list[Outcome]:
        """Search with all queries that could be encoded at once."""
        outcomes: list[Outcome] = [[] for _ in encodings]
        vectors: dict[int, MultiVector] = {}
        for position, encoding in enumerate(encodings):
            if encoding is not None:
                try:
                    [vectors[position]] = encoding.result()
                except Exception as exc:  # for the caller of this query
                    outcomes[position] = exc
        hits_of = self._pages.search_many(list(vectors.values()), **options)
        evidence = Evidence(self.boxes, self.heatmaps)
        for (position, query), hits in zip(vectors.items(), hits_of, strict=True):
            outcomes[position] = hits_to_documents(hits, evidence=evidence.of_hits(self._pages, query, hits))
        return outcomes

    @property
    def _pages(self) -> PageIndex:
        index = self.index
        if not isinstance(index, PageIndex):  # assigned after the retriever was made
            index = self.index = opened_index(index, self.encoder, self.images_dir)
        return index

    # -- callbacks -----------------------------------------------------------------------------------------------------

    def _start_run(self, manager: Any, query: object, config: RunnableConfig) -> Any:
        """Start a run with callbacks configured as ``invoke`` does; awaitable with an async manager."""
        callbacks = manager.configure(
            config.get("callbacks"),
            None,
            verbose=False,
            inheritable_tags=config.get("tags"),
            local_tags=self.tags,
            inheritable_metadata={**(config.get("metadata") or {}), **self._get_ls_params()},
            local_metadata=self.metadata,
        )
        name = config.get("run_name") or self.get_name()
        return callbacks.on_retriever_start(None, _query_text(query), name=name, run_id=config.get("run_id"))

    def _get_ls_params(self, **kwargs: Any) -> LangSmithRetrieverParams:
        model = Path(self._pages.info.model)
        return LangSmithRetrieverParams(
            **super()._get_ls_params(**kwargs),
            ls_vector_store_provider="PageIndex",
            ls_embedding_provider="colqwen3-retrievers",
            ls_embedding_model=model.name if model.is_absolute() else self._pages.info.model,  # traces show no paths
        )

    # -- closing and copying -------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the index if it was opened here by its location; an index passed in stays open."""
        if self._owns_index and isinstance(self.index, PageIndex):
            self.index.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as settings and the index's location."""
        return pickled(self)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Return a copy that shares the index and the encoder."""
        return self.model_copy()


def _query_text(query: object) -> str:
    """What callbacks and traces see of a query: never its pixels."""
    if not isinstance(query, Query):
        return query if isinstance(query, str) else repr(query)
    return " ".join(part for part in ("[image]" if query.image is not None else "", query.text or "") if part)


def _end_run(run: Any, outcome: Outcome) -> Any:
    return run.on_retriever_error(outcome) if isinstance(outcome, Exception) else run.on_retriever_end(outcome)


def _cancel(encodings: Sequence[_Encoding]) -> None:
    for encoding in encodings:
        if encoding is not None:
            encoding.cancel()


def _parts(inputs: Sequence[Any], config: RunnableConfig) -> list[Sequence[Any]]:
    size = config.get("max_concurrency") or len(inputs)
    return [inputs[first : first + size] for first in range(0, len(inputs), size)]


def _all_failed(exc: BaseException, count: int) -> list[Outcome]:
    return [exc if isinstance(exc, Exception) else RuntimeError(repr(exc))] * count  # callbacks take no interrupt


def _results(outcomes: list[Outcome], return_exceptions: bool = False) -> list[list[Document]]:
    error = next((outcome for outcome in outcomes if isinstance(outcome, Exception)), None)
    if error is not None and not return_exceptions:
        raise error
    return outcomes  # type: ignore[return-value]  # LangChain types exceptions in place of results so, too
