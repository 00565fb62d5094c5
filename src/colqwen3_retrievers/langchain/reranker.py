"""The LangChain reranker."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import Runnable, RunnableLambda
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from colqwen3_retrievers.cache.page_cache import PageEmbeddingCache, result_at
from colqwen3_retrievers.encoding.futures import FutureGroup
from colqwen3_retrievers.encoding.server_scores import server_scores
from colqwen3_retrievers.errors import ConfigError, EncodeError
from colqwen3_retrievers.langchain.document_embeddings import DocumentEmbeddings
from colqwen3_retrievers.langchain.documents import RELEVANCE_SCORE, document_to_page
from colqwen3_retrievers.langchain.fields import CacheField, EncoderField, OptionalIndexField, RemoteField, pickled
from colqwen3_retrievers.pages.page import Query
from colqwen3_retrievers.retrieval.evidence import Evidence, without_evidence
from colqwen3_retrievers.vectors.kernels import default_kernel
from colqwen3_retrievers.vectors.late_interaction import maxsim, relevance
from colqwen3_retrievers.vectors.multi_vector import MultiVector

RERANK_ERROR = "rerank_error"
"""Metadata key under which ``on_error="keep"`` says why a document has no score."""

_logger = logging.getLogger(__name__)


class ColQwen3Reranker(BaseDocumentCompressor):
    """Orders documents by late interaction with the query: page images, texts, and both mixed.

    A document is scored by its page image (``metadata["image_path"]`` or ``metadata["image"]``, see
    :func:`~colqwen3_retrievers.langchain.documents.document_image`), else by its text. A document whose id, and digest
    if it has one, are in ``index`` is not encoded at all; the others are encoded once and kept in ``cache``. Nothing is
    loaded before the first document is scored; retriever, reranker and index with equal settings share one model.

    ``metadata["relevance_score"]`` of the results is a Python float, what ``score_mode`` says. ``score_threshold`` is
    on the same scale and inclusive. Documents come back as copies, best first, equal scores in the order they came.

    Args:
        model: hub name, folder or ``"tiny"``; None takes the index's, else reads ``COLQWEN3_MODEL``, else the default.
        device: ``"cuda"``, ``"cpu"``, ...; None takes the best there is.
        top_n: most documents given back, at least 1; None gives all.
        encoder: a ready encoder, in place of ``model`` and ``device``.
        index: where embeddings of known pages are: an open index, or its folder or address, opened for reading.
        images_dir: with an address: where the images of its pages lie, for ``heatmaps``.
        cache: embeddings of other documents: a ready cache, to be shared; or a folder, which other processes may share
            and which is there the next time; None keeps them in memory.
        cache_bytes: most bytes of token embeddings kept; 0 keeps none; None takes 512 MB in memory, 8 GB in a folder.
        score_mode: ``"relevance"``, 0 to 1: (1 + mean MaxSim) / 2; ``"mean"``, -1 to 1: mean MaxSim over query tokens;
            ``"sum"``: MaxSim, which grows with the query.
        score_threshold: documents below it are left out; None leaves out none.
        on_error: when a document cannot be read or encoded: ``"raise"``; ``"skip"``, which leaves it out with a warning
            in the log; ``"keep"``, which puts it behind the scored ones, the reason in ``metadata["rerank_error"]``.
        boxes: most regions that answered, a document: ``metadata["boxes"]``, see
            :class:`~colqwen3_retrievers.retrieval.evidence.Evidence`; texts get none.
        heatmaps: a folder for pictures of them: ``metadata["heatmap"]`` is the file of a page with the map over it.
        allow_remote: whether images known by the web address of a content block are fetched; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`. Else such a document cannot be encoded.
        scoring: ``"client"`` compares token embeddings here; ``"server"`` leaves scoring to the servers of an encoder
            with a url, which encode every document anew on each call: no vectors travel, no ``index`` or ``cache``
            helps.

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
    top_n: int | None = Field(default=3, ge=1)
    encoder: EncoderField = None
    index: OptionalIndexField = None
    images_dir: str | Path | None = None
    cache: CacheField = Field(default=None, repr=False)
    cache_bytes: int | None = Field(default=None, ge=0, strict=True)
    score_mode: Literal["relevance", "mean", "sum"] = "relevance"
    score_threshold: float | None = Field(default=None, allow_inf_nan=False)
    on_error: Literal["raise", "skip", "keep"] = "raise"
    boxes: int = Field(default=0, ge=0, strict=True)
    heatmaps: str | Path | None = None
    allow_remote: RemoteField = False
    scoring: Literal["client", "server"] = "client"

    _lock: Any = PrivateAttr(default_factory=threading.Lock)
    _tools: DocumentEmbeddings | None = PrivateAttr(default=None)

    def __init__(self, model: str | None = None, **fields: Any) -> None:
        super().__init__(**({} if model is None else {"model": model}), **fields)

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        made = self.cache if isinstance(self.cache, PageEmbeddingCache) else None
        ready = self.encoder is not None or made is not None
        if ready and (self.model is not None or self.device is not None):
            raise ConfigError("give model and device, or an encoder or cache that has them, not both")
        if self.encoder is not None and made is not None and made.encoder is not self.encoder:
            raise ConfigError("cache: it belongs to another encoder")
        if made is not None and self.cache_bytes is not None:
            raise ConfigError("cache_bytes: the cache has its own bound; give either of them")
        if self.images_dir is not None and self.index is None:
            raise ConfigError("images_dir: it belongs to an index; give index too")
        if self.scoring == "server" and not (self.index is None and self.cache is None and self.cache_bytes is None):
            raise ConfigError("scoring='server': every document is encoded anew there; give neither index nor cache")
        if self.scoring == "server" and (self.boxes or self.heatmaps is not None):
            raise ConfigError("scoring='server': no vectors travel, so there are neither boxes nor heatmaps")
        return self

    # -- LangChain's -----------------------------------------------------------------------------------------------

    def compress_documents(
        self, documents: Sequence[Document], query: str | Query, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Order documents by relevance to a query.

        Args:
            documents: of any retriever; they are left as they are.
            query: a text, or a Query for an image.
            callbacks: not used; :meth:`as_runnable` is traced like any step.

        Returns:
            At most ``top_n`` copies, best first, with ``metadata["relevance_score"]``.

        Raises:
            ConfigError: an empty query.
            EncodeError: the query; or, with ``on_error="raise"``, a document, whose position is ``.index``.
        """
        asked, listed = _checked(query), _listed(documents)
        if not listed:
            return []
        if self.scoring == "server":
            return self._scored_there(listed, asked)
        group = FutureGroup()
        try:
            question, embeddings = self._start(asked, listed, group)
            found = [self._settled(future, place, listed) for place, future in enumerate(embeddings)]
            return self._ranked(listed, found, question.result()[0])
        finally:
            group.cancel()  # after an error, nobody waits for the others

    async def acompress_documents(
        self, documents: Sequence[Document], query: str | Query, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Order documents without blocking the event loop; cancelling it cancels the encoding."""
        asked, listed = _checked(query), _listed(documents)
        if not listed:
            return []
        if self.scoring == "server":
            return await asyncio.to_thread(self._scored_there, listed, asked)
        group = FutureGroup()
        try:  # starting reads files and may load a model
            question, embeddings = await asyncio.to_thread(self._start, asked, listed, group)
            await group.settled()
            found = [self._settled(future, place, listed) for place, future in enumerate(embeddings)]
            return await asyncio.to_thread(self._ranked, listed, found, question.result()[0])
        finally:
            group.cancel()

    def as_runnable(self) -> Runnable[dict[str, Any], list[Document]]:
        """Give it as a step of a chain: from ``{"documents": ..., "query": ...}`` to the documents in order.

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

    def _opened(self) -> DocumentEmbeddings:
        """Give the encoder, the cache and the index; made anew when a field has changed since."""
        with self._lock:
            fields = (
                self.model, self.device, self.encoder, self.index, self.cache, self.cache_bytes, self.images_dir,
            )  # fmt: skip
            if self._tools is None or self._tools.made_from != fields:
                self._tools = DocumentEmbeddings(*fields)
            return self._tools

    def _start(
        self, query: str | Query, documents: list[Document], group: FutureGroup
    ) -> tuple[Future[list[MultiVector]], list[Future[MultiVector]]]:
        """Start encoding the query and the documents, so that the engine may take them in one go."""
        embeddings_of = self._opened()
        question: Future[list[MultiVector]] = embeddings_of.encoder.submit_queries([query])
        group.add([question])
        embeddings = embeddings_of.submit(documents, self.allow_remote)
        group.add(embeddings)
        return question, embeddings

    def _settled(self, future: Future[MultiVector], place: int, documents: list[Document]) -> MultiVector | Exception:
        """Wait for a document's embeddings; an error of the document itself is the caller's choice."""
        try:
            return result_at(future, place)
        except EncodeError as exc:
            return self._refused(exc, place, documents)

    def _refused(self, exc: EncodeError, place: int, documents: list[Document]) -> EncodeError:
        name = f"document {place}" + (f" (id {documents[place].id!r})" if documents[place].id else "")
        error = exc.at(place, name)
        if self.on_error == "raise":
            raise error from exc
        _logger.warning("%s: %s", "left out" if self.on_error == "skip" else "not scored", error)
        return exc

    def _ranked(
        self, documents: list[Document], found: list[MultiVector | Exception], query: MultiVector
    ) -> list[Document]:
        embedded = {place: vectors for place, vectors in enumerate(found) if isinstance(vectors, MultiVector)}
        sums = maxsim(query, list(embedded.values()), kernel=default_kernel())[0].tolist() if embedded else []
        failures = {place: failure for place, failure in enumerate(found) if isinstance(failure, Exception)}
        evidence = self._evidence(documents, embedded, query)
        return self._in_order(documents, dict(zip(embedded, sums, strict=True)), failures, len(query), evidence)

    def _evidence(
        self, documents: list[Document], embedded: Mapping[int, MultiVector], query: MultiVector
    ) -> Callable[[int], dict[str, Any]] | None:
        made = Evidence(self.boxes, self.heatmaps)
        if not made.wanted:
            return None

        def told(place: int) -> dict[str, Any]:
            name = documents[place].id or f"document {place}"
            picture = partial(self._opened().picture, documents[place], f"document {place}", self.allow_remote)
            return made.of_page(query, embedded.get(place), picture, name)

        return told

    def _scored_there(self, documents: list[Document], query: str | Query) -> list[Document]:
        """Let the encoder's servers score."""
        pages = [
            partial(document_to_page, document, f"document {i}", self.allow_remote)
            for i, document in enumerate(documents)
        ]
        asked = Query(query) if isinstance(query, str) else query
        found = server_scores(self._opened().encoder, asked, pages)
        failures = {place: self._refused(exc, place, documents) for place, exc in found.broken.items()}
        return self._in_order(documents, found.sums, failures, found.n_query_tokens)

    def _in_order(
        self,
        documents: list[Document],
        sums: dict[int, float],
        failures: Mapping[int, Exception],
        n_query_tokens: int,
        evidence: Callable[[int], dict[str, Any]] | None = None,
    ) -> list[Document]:
        ranked: list[Document] = []
        for place in sorted(sums, key=lambda place: -sums[place]):  # stable: ties as they came
            score = self._scaled(sums[place], n_query_tokens)
            if self.score_threshold is None or score >= self.score_threshold:
                if len(ranked) == self.top_n:
                    break
                document = documents[place]
                if evidence is not None:  # what another question was told goes first
                    document = document.model_copy(
                        update={"metadata": {**without_evidence(document.metadata), **evidence(place)}}
                    )
                ranked.append(_copy(document, {RELEVANCE_SCORE: score}))
        if self.on_error == "keep":
            ranked += [_copy(documents[place], {RERANK_ERROR: str(failures[place])}) for place in sorted(failures)]
        return ranked[: self.top_n]

    def _scaled(self, total: float, n_query_tokens: int) -> float:
        if self.score_mode == "sum":
            return total
        return total / n_query_tokens if self.score_mode == "mean" else relevance(total, n_query_tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as settings and the index's location; a cache in memory stays behind."""
        return pickled(self, *(("cache",) if isinstance(self.cache, PageEmbeddingCache) else ()))

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Give a copy that shares the encoder, the cache and the index."""
        return self.model_copy()


def _copy(document: Document, news: dict[str, Any]) -> Document:
    old = {key: value for key, value in document.metadata.items() if key not in (RELEVANCE_SCORE, RERANK_ERROR)}
    return document.model_copy(update={"metadata": {**old, **news}})


def _listed(documents: Sequence[Document]) -> list[Document]:
    listed = list(documents)
    for position, document in enumerate(listed):
        if not isinstance(document, Document):
            raise ConfigError(f"documents: {position} is a {type(document).__name__}, expected a Document")
    return listed


def _checked(query: str | Query) -> str | Query:
    if isinstance(query, Query):
        return query
    if not isinstance(query, str) or not query.strip():
        raise ConfigError(f"query: expected a non-empty text or a Query, got {query!r}")
    return query


def _inputs(inputs: Mapping[str, Any]) -> tuple[Sequence[Document], str | Query]:
    if not isinstance(inputs, Mapping) or not {"documents", "query"} <= inputs.keys():
        raise ConfigError('reranker: expected {"documents": [...], "query": "..."}')
    return inputs["documents"], inputs["query"]
