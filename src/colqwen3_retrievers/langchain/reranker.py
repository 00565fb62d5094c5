"""The LangChain reranker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import Runnable, RunnableLambda
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from colqwen3_retrievers.cache.page_cache import PageEmbeddingCache
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.langchain.documents import RELEVANCE_SCORE, checked_documents, document_image, document_text
from colqwen3_retrievers.langchain.fields import (
    CacheField,
    EncoderField,
    OptionalIndexField,
    RemoteField,
    checked_query,
    pickled,
)
from colqwen3_retrievers.pages.page import Page, Query
from colqwen3_retrievers.pages.remote_images import AllowRemote
from colqwen3_retrievers.retrieval.reranking import (
    Candidate,
    OnError,
    Ranked,
    Reranker,
    RerankerOptions,
    ScoreMode,
    Scoring,
)


class ColQwen3Reranker(BaseDocumentCompressor):
    """Orders documents by late interaction with the query: page images, texts, and both mixed.

    A document is scored by its page image (``metadata["image_path"]`` or ``metadata["image"]``, see
    :func:`~colqwen3_retrievers.langchain.documents.document_image`), else by its text. A document whose id, and digest
    if it has one, are in ``index`` is not encoded at all; the others are encoded once and kept in ``cache``. Nothing is
    loaded before the first document is scored; retriever, reranker and index with equal settings share one model.

    ``metadata["relevance_score"]`` of the results is a Python float on the scale of ``score_mode``. The results are
    copies, best first. Equal scores are ordered by id, then documents without an id in the order given.

    Args:
        model: hub name, folder or ``"tiny"``; None takes the index's, else reads ``COLQWEN3_MODEL``, else the default.
        device: ``"cuda"``, ``"mps"``, ``"cpu"``; None takes the best available. With ``index`` and no ``model``, it is
            where the index's model runs.
        top_n: most documents returned, at least 1; None returns all.
        encoder: a ready encoder, in place of ``model`` and ``device``.
        index: where embeddings of known pages are: an open index, or its folder or address, opened for reading.
        images_dir: with a location outside a folder: where the images of the index are stored, for ``heatmaps``.
        cache: embeddings of other documents: a ready cache, to be shared; or a folder, which other processes may share
            and which persists; None keeps them in memory.
        cache_bytes: most bytes of token embeddings kept; 0 keeps none; None takes 512 MB in memory, 8 GB in a folder.
        score_mode: ``"relevance"``, 0 to 1: (1 + mean MaxSim) / 2; ``"mean"``, -1 to 1: mean MaxSim over query tokens;
            ``"sum"``: MaxSim, which grows with the query.
        score_threshold: lowest score returned, on the scale of ``score_mode``; None returns all.
        on_error: for a document that cannot be read or encoded: ``"raise"``; ``"skip"`` it, with a warning in the log;
            or ``"keep"`` it behind the scored ones, the reason in ``metadata["rerank_error"]`` and the log.
        boxes: most answering regions per document: ``metadata["boxes"]``, see
            :class:`~colqwen3_retrievers.retrieval.evidence.Evidence`; texts have none.
        heatmaps: a folder for overlays: ``metadata["heatmap"]`` is the file of a page with the map over it.
        allow_remote: whether images known by the web address of a content block are fetched; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`. Otherwise such a document cannot be encoded.
        scoring: ``"client"`` compares token embeddings here; ``"server"`` leaves scoring to the servers of an encoder
            with a url, which encode every document anew on each call: no vectors travel, no ``index`` or ``cache``
            helps.
        embed_batch_size: most documents being encoded at a time, at least 1, for long lists of large images; None
            starts all of them. The encoder cuts its own batches in either case.
        show_progress: whether to draw a progress bar (on a terminal).

    Raises:
        ValueError: an argument is wrong or unknown (pydantic's ValidationError).

    Example:
        >>> from colqwen3_retrievers.langchain import ColQwen3Reranker
        >>> reranker = ColQwen3Reranker(top_n=2)                         # nothing is loaded yet
        >>> reranker.compress_documents([], "what was the revenue?")
        []
        >>> pages = [Document("", metadata={"image_path": f"{n}.png"}) for n in range(9)]
        >>> for page in reranker.compress_documents(pages, "what was the revenue?"):           # doctest: +SKIP
        ...     print(page.metadata["image_path"], page.metadata["relevance_score"])
        4.png 0.83
        0.png 0.71
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", protected_namespaces=())

    model: str | None = None
    device: str | None = None
    top_n: int | None = Field(default=3, ge=1, strict=True)
    encoder: EncoderField = None
    index: OptionalIndexField = None
    images_dir: str | Path | None = None
    cache: CacheField = Field(default=None, repr=False)
    cache_bytes: int | None = Field(default=None, ge=0, strict=True)
    score_mode: ScoreMode = "relevance"
    score_threshold: float | None = Field(default=None, allow_inf_nan=False)
    on_error: OnError = "raise"
    boxes: int = Field(default=0, ge=0, strict=True)
    heatmaps: str | Path | None = None
    allow_remote: RemoteField = False
    scoring: Scoring = "client"
    embed_batch_size: int | None = Field(default=None, ge=1, strict=True)
    show_progress: bool = False

    _core: Reranker = PrivateAttr()

    def __init__(self, model: str | None = None, **fields: Any) -> None:
        super().__init__(**({} if model is None else {"model": model}), **fields)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        self._core = Reranker(RerankerOptions.of(self))
        return self

    # -- LangChain's -----------------------------------------------------------------------------------------------

    def compress_documents(
        self, documents: Sequence[Document], query: str | Query, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Order documents by relevance to a query.

        Args:
            documents: of any retriever; they are not changed.
            query: a text, or a Query for an image.
            callbacks: not used; :meth:`as_runnable` is traced like any step.

        Returns:
            At most ``top_n`` copies, best first, with ``metadata["relevance_score"]``.

        Raises:
            ConfigError: an empty query.
            EncodeError: the query; or, with ``on_error="raise"``, a document, whose position is ``.index``.
        """
        query, documents = checked_query(query), checked_documents(documents)
        candidates = self._candidates(documents)
        return _ranked_documents(documents, self._reranker().rerank(candidates, query))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str | Query, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Order documents without blocking the event loop; cancelling it cancels the encoding."""
        query, documents = checked_query(query), checked_documents(documents)
        candidates = self._candidates(documents)
        return _ranked_documents(documents, await self._reranker().arerank(candidates, query))

    def as_runnable(self) -> Runnable[dict[str, Any], list[Document]]:
        """Return a step of a chain, from ``{"documents": ..., "query": ...}`` to the documents in order.

        Example:
            >>> from langchain_core.runnables import RunnablePassthrough
            >>> retriever = RunnablePassthrough() | (lambda query: [])       # any retriever
            >>> chain = {"documents": retriever, "query": RunnablePassthrough()} | ColQwen3Reranker().as_runnable()
            >>> chain.invoke("what was the revenue?")
            []
        """

        def rerank(inputs: Mapping[str, Any]) -> list[Document]:
            return self.compress_documents(*_inputs(inputs))

        async def arerank(inputs: Mapping[str, Any]) -> list[Document]:
            return await self.acompress_documents(*_inputs(inputs))

        return RunnableLambda(rerank, arerank, name=type(self).__name__)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _reranker(self) -> Reranker:
        """Return the core by the fields of now, which may have changed since the last call."""
        self._core = self._core.with_options(RerankerOptions.of(self))
        return self._core

    def _candidates(self, documents: Sequence[Document]) -> list[Candidate]:
        candidates = []
        for position, document in enumerate(documents):
            name = f"document {position}"
            candidates.append(
                Candidate(
                    page=partial(_page, document, name, self.allow_remote),
                    name=f"{name} (id {document.id!r})" if document.id else name,
                    ids=(document.id,) if document.id else (),
                    sha256=document.metadata.get("sha256"),
                )
            )
        return candidates

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as settings and the index's location; a cache in memory stays behind."""
        return pickled(self, *(("cache",) if isinstance(self.cache, PageEmbeddingCache) else ()))

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy the settings; encoder, cache and index are handles, which copies share."""
        return self.model_copy()


def _page(document: Document, name: str, allow_remote: AllowRemote) -> Page:
    return Page(id=name, image=document_image(document, allow_remote), text=document_text(document))


def _ranked_documents(documents: Sequence[Document], ranking: list[Ranked]) -> list[Document]:
    """Return copies of the documents in their new order, with their scores."""
    copies = []
    for ranked in ranking:
        document = documents[ranked.position]
        metadata = ranked.plain(document.metadata)
        metadata.pop(RELEVANCE_SCORE, None)  # of another reranker
        score = {} if ranked.score is None else {RELEVANCE_SCORE: ranked.score}
        copies.append(document.model_copy(update={"metadata": {**metadata, **ranked.metadata, **score}}))
    return copies


def _inputs(inputs: Mapping[str, Any]) -> tuple[Sequence[Document], str | Query]:
    if not isinstance(inputs, Mapping) or not {"documents", "query"} <= inputs.keys():
        raise ConfigError('reranker: expected {"documents": [...], "query": "..."}')
    return inputs["documents"], inputs["query"]
