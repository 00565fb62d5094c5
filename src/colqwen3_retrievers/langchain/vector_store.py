"""The LangChain vector store."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.fork import finalize
from colqwen3_retrievers.index.page_index import PageIndex, opened_index
from colqwen3_retrievers.index.search import Question, to_encode
from colqwen3_retrievers.langchain.diversity import check_lambda, diverse_hits
from colqwen3_retrievers.langchain.documents import (
    checked_documents,
    document_to_stored_page,
    errors_about,
    hits_to_documents,
    page_to_document,
)
from colqwen3_retrievers.langchain.filters import document_filter
from colqwen3_retrievers.pages.images import ImageSource, is_image
from colqwen3_retrievers.pages.page import Page, Query
from colqwen3_retrievers.pages.remote_images import AllowRemote, local_image
from colqwen3_retrievers.retrieval.evidence import Evidence
from colqwen3_retrievers.stores.protocol import GroupBy, check_info, check_search
from colqwen3_retrievers.stores.where import Filter, Where
from colqwen3_retrievers.vectors.late_interaction import relevance
from colqwen3_retrievers.vectors.multi_vector import MultiVector, as_token_embeddings

_SIMILARITY: Final = ("k", "filter", "group_by", "window")
_SCORED: Final = ("k", "filter", "group_by")
_RELEVANT: Final = (*_SCORED, "score_threshold")
_DIVERSE: Final = ("k", "fetch_k", "lambda_mult", "filter")
_EVIDENCE: Final = ("boxes", "heatmaps")


class ColQwen3VectorStore(VectorStore):
    """A vector store over a ``PageIndex``: texts and page images by late interaction.

    Scores of ``similarity_search_with_score`` are MaxSim sums: higher is better, and they are comparable for one query
    only; relevance scores are (1 + mean MaxSim) / 2, within 0..1. Documents come back with the content, metadata and id
    they were added with, and with ``metadata["image_path"]`` if they have an image. Pages that were added to the index
    without LangChain come as :class:`~colqwen3_retrievers.langchain.retriever.ColQwen3Retriever` returns them.

    In every search ``query`` is a text, a :class:`~colqwen3_retrievers.pages.page.Query`, an image (PIL, ``Path`` or
    bytes) or a multi-vector; ``filter`` is in the language of :mod:`~colqwen3_retrievers.stores.where`, over the keys
    of the documents' metadata; ``group_by="source"`` returns the best document of each source. Among ``kwargs``, and so
    in ``as_retriever(search_kwargs=...)``, ``boxes`` and ``heatmaps`` ask for the regions that answered, as in
    :class:`~colqwen3_retrievers.langchain.retriever.ColQwen3Retriever`. All searches raise ConfigError for a bad or
    unknown argument, and EncodeError for a query that cannot be encoded. The async methods take the same arguments and
    never block the event loop; cancelling a search cancels its encoding. Those not defined here are LangChain's own,
    which run the sync method in a thread.

    Args:
        index: an open index; or its folder, which is opened for writing, and created if it is new and there is an
            encoder.
        encoder: with a folder: the encoder; None rebuilds it from what the index stores, when it is needed.
        images_dir: with an address (Qdrant): the folder for images; see :meth:`PageIndex.open`.
        read_only: with a folder: opens it beside another writer.

    Raises:
        ConfigError: an open index together with an encoder, a wrong ``index``.
        StoreMismatchError: the index was made by another model than the encoder's.
        StoreUnavailableError: another writer has the index open.
        StoreError: no index there and no encoder to make one.

    Example:
        >>> from colqwen3_retrievers.langchain import ColQwen3VectorStore, PageLoader           # doctest: +SKIP
        >>> store = ColQwen3VectorStore("my-index", ColQwen3Encoder())                          # doctest: +SKIP
        >>> ids = store.add_documents(PageLoader("reports/").load())                            # doctest: +SKIP
        >>> for document, score in store.similarity_search_with_relevance_scores("revenue?"):   # doctest: +SKIP
        ...     print(document.metadata["citation"], score)
        a.pdf, page 7 0.81
    """

    def __init__(
        self,
        index: PageIndex | str | Path,
        encoder: ColQwen3Encoder | None = None,
        *,
        images_dir: str | Path | None = None,
        read_only: bool = False,
    ) -> None:
        self._owns_index = not isinstance(index, PageIndex)
        self.index = opened_index(index, encoder, images_dir, read_only=read_only)

    @property
    def embeddings(self) -> None:
        """None: a page has many vectors here, which no ``Embeddings`` can make."""
        return None

    # -- making a store ------------------------------------------------------------------------------------------------

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings | ColQwen3Encoder | None = None,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        index: PageIndex | str | Path | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make a store and add texts.

        Args:
            texts: at least one character each.
            embedding: a ColQwen3Encoder, a ColQwen3Embeddings (its encoder is used, not its single vectors), or None
                for the index's or the default model.
            metadatas: one for each text.
            ids: one for each text; random where there is none.
            index: an open index or a folder; None makes one in a temporary folder that is removed with the store.
            **kwargs: ``images_dir`` as for the constructor, the others as for :meth:`add_documents`.

        Raises:
            ConfigError: another maker's embeddings, or as for :meth:`add_documents`.
        """
        return cls.from_documents(_texts_to_documents(texts, metadatas, ids), embedding, index=index, **kwargs)

    @classmethod
    async def afrom_texts(
        cls,
        texts: list[str],
        embedding: Embeddings | ColQwen3Encoder | None = None,
        metadatas: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make a store and add texts without blocking the event loop; see :meth:`from_texts`."""
        return await asyncio.to_thread(cls.from_texts, texts, embedding, metadatas, **kwargs)

    @classmethod
    def from_documents(
        cls,
        documents: list[Document],
        embedding: Embeddings | ColQwen3Encoder | None = None,
        *,
        index: PageIndex | str | Path | None = None,
        images_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make a store and add documents; see :meth:`from_texts` and :meth:`add_documents`."""
        encoder = _encoder_of(embedding)
        if isinstance(index, PageIndex):
            if encoder is not None:
                check_info(index.info, encoder.info, index.location)
            store = cls(index, images_dir=images_dir)
        elif index is not None:
            store = cls(index, encoder, images_dir=images_dir)
        else:
            folder = tempfile.mkdtemp(prefix="colqwen3-")
            store = cls(Path(folder) / "index", encoder or ColQwen3Encoder(), images_dir=images_dir)
            finalize(store, _discard, store.index, folder)
        try:
            store.add_documents(documents, **kwargs)
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    async def afrom_documents(
        cls, documents: list[Document], embedding: Embeddings | ColQwen3Encoder | None = None, **kwargs: Any
    ) -> Self:
        """Make a store and add documents without blocking the event loop; see :meth:`from_documents`."""
        return await asyncio.to_thread(cls.from_documents, documents, embedding, **kwargs)

    # -- writing and reading: LangChain's async methods call these in a thread -----------------------------------------

    def add_documents(
        self,
        documents: list[Document],
        *,
        ids: Sequence[str | None] | None = None,
        allow_remote: AllowRemote = False,
        batch_size: int = 16,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Add documents, each replacing the one with its id; a document stored unchanged is not encoded again.

        Args:
            documents: with a text, or with an image under ``metadata["image_path"]`` or ``metadata["image"]`` (see
                :func:`~colqwen3_retrievers.langchain.documents.document_image`); they are not changed. Dates in the
                metadata are stored as ISO text.
            ids: one for each document, in preference to the documents' own; random where there is none.
            allow_remote: whether an image block's web address is fetched, and the image stored; see
                :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.
            batch_size: documents encoded and committed together; each such batch is stored wholly or not at all.
            show_progress: whether to draw a progress bar (on a terminal).
            **kwargs: none.

        Returns:
            Their ids.

        Raises:
            ConfigError: a document without text and image, metadata that is not JSON, another number of ids, one id
                for two contents, an unknown argument.
            EncodeError: a document cannot be encoded; it is named, and the batches before its own stay stored.
            PageError: an image cannot be read.
            StoreError: the index is read-only or closed, the disk is full, and the like.
        """
        _refuse(kwargs, "ids", "allow_remote", "batch_size", "show_progress")
        items = checked_documents(documents)
        pages = []
        for position, (document, own_id) in enumerate(zip(items, _ids(ids, len(items), "documents"), strict=True)):
            page_id = own_id or document.id or str(uuid.uuid4())
            pages.append(document_to_stored_page(document, page_id, f"document {position}", allow_remote))
        return self._add(pages, batch_size, show_progress)

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Add texts; see :meth:`add_documents`."""
        return self.add_documents(_texts_to_documents(texts, metadatas, ids), **kwargs)

    def add_images(
        self,
        images: Iterable[ImageSource],
        metadatas: Sequence[Mapping[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        texts: Sequence[str] | None = None,
        allow_remote: AllowRemote = False,
        batch_size: int = 16,
        show_progress: bool = False,
    ) -> list[str]:
        """Add images as pages.

        Args:
            images: paths, bytes, PIL images, binary file objects, arrays or tensors; web addresses if they may be
                fetched.
            metadatas: one for each image; ``source``, ``page`` (from 1) and ``page_label`` name it. The default source
                of a file is its path.
            ids: one for each image; the default of a file is ``f"{source}#page={page}"``, so that it replaces itself,
                that of an image in memory is random.
            texts: one for each image: the text on it, for chat models; ``""`` where there is none.
            allow_remote: whether web addresses are fetched; as for :meth:`add_documents`.
            batch_size: as for :meth:`add_documents`.
            show_progress: as for :meth:`add_documents`.

        Returns:
            Their ids.

        Raises:
            ConfigError: another number of metadatas, ids or texts; an image of another type, or a URL that
                may not be fetched.
            EncodeError, PageError, StoreError: as for :meth:`add_documents`.
        """
        if isinstance(images, str) or is_image(images) or not isinstance(images, Iterable):
            raise ConfigError(f"images: expected a list of images, got {type(images).__name__}")
        items = list(images)
        metadata_of = _one_each(metadatas, len(items), "metadatas", "images")
        text_of = _one_each(texts, len(items), "texts", "images")
        pages = []
        for position, (image, own_id) in enumerate(zip(items, _ids(ids, len(items), "images"), strict=True)):
            metadata = dict(metadata_of[position] or {})
            file = os.fspath(image) if isinstance(image, str | Path) else None
            source, number = metadata.pop("source", None) or file or "", metadata.pop("page", 1)
            default_id = str(uuid.uuid4()) if file is None else f"{source}#page={number}"
            with errors_about(f"image {position}"):
                pages.append(Page(
                    id=own_id or default_id, source=source, number=number, label=metadata.pop("page_label", None),
                    image=local_image(image, allow_remote), text=text_of[position] or "", metadata=metadata,
                ))  # fmt: skip
        return self._add(pages, batch_size, show_progress)

    async def aadd_images(self, images: Iterable[ImageSource], **kwargs: Any) -> list[str]:
        """Add images without blocking the event loop; see :meth:`add_images`."""
        return await asyncio.to_thread(self.add_images, images, **kwargs)

    def _add(self, pages: Sequence[Page], batch_size: int, show_progress: bool) -> list[str]:
        first: dict[str, int] = {}
        for position, page in enumerate(pages):  # the index would refuse one only after storing earlier batches
            earlier = first.setdefault(page.id, position)
            if earlier != position and pages[earlier].sha256 != page.sha256:
                positions = f"given at {earlier} and, with another content, at {position}"
                raise ConfigError(f"ids: {page.id!r}: {positions}; one would be lost")
        self.index.add(pages, batch_size=batch_size, show_progress=show_progress)
        return [page.id for page in pages]

    def delete(self, ids: list[str] | None = None, *, filter: Where | None = None, **kwargs: Any) -> bool:
        """Delete documents by id or filter; with both, those that match both. Unknown ids are ignored.

        Returns:
            True.

        Raises:
            ConfigError: neither is given: that would mean all of them.
        """
        _refuse(kwargs, "ids", "filter")
        self.index.delete(ids, where=document_filter(filter))
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Return documents by id, in the order of the ids; unknown ids are left out."""
        return [page_to_document(record.page) for record in self.index.get(ids)]

    # -- searching -----------------------------------------------------------------------------------------------------

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
            query: as for all searches.
            k: most documents, at least 1.
            filter: search among these only.
            group_by: ``"source"`` or None.
            window: neighbours on each side in the same source, which follow a document in the list, with its id under
                ``metadata["neighbour_of"]``; the filter does not apply to them.
            **kwargs: ``boxes`` and ``heatmaps``.

        Returns:
            Documents, best first, equal scores by id.
        """
        search = _Search.of(_SIMILARITY, k=k, filter=filter, group_by=group_by, window=window, **kwargs)
        return self._run(query, search).documents

    async def asimilarity_search(self, query: Question, k: int = 4, **kwargs: Any) -> list[Document]:
        """Find documents without blocking the event loop; see :meth:`similarity_search`."""
        return (await self._arun(query, _Search.of(_SIMILARITY, k=k, **kwargs))).documents

    def similarity_search_by_vector(
        self, embedding: MultiVector | Sequence[Any], k: int = 4, **kwargs: Any
    ) -> list[Document]:
        """Find documents for a multi-vector: (n_tokens, dim) with unit rows, never one flat vector.

        Raises:
            ConfigError: a flat vector, or rows that are no unit vectors.
            DimensionError: another dim than the index's.
        """
        return self.similarity_search(_multi_vector(embedding), k, **kwargs)

    def similarity_search_with_score(self, query: Question, k: int = 4, **kwargs: Any) -> list[tuple[Document, float]]:
        """Find documents and their MaxSim sums: higher is better, and comparable for one query only.

        ``kwargs`` are those of :meth:`similarity_search` without ``window``.
        """
        return self._run(query, _Search.of(_SCORED, k=k, **kwargs)).scored()

    async def asimilarity_search_with_score(
        self, query: Question, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """Find documents and scores without blocking; see :meth:`similarity_search_with_score`."""
        return (await self._arun(query, _Search.of(_SCORED, k=k, **kwargs))).scored()

    def _similarity_search_with_relevance_scores(
        self, query: Question, k: int = 4, *, score_threshold: float | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """Find documents and (1 + mean MaxSim) / 2, which is comparable across queries and with a threshold."""
        return self._run(
            query, _Search.of(_RELEVANT, k=k, **kwargs)
        ).with_relevance()  # LangChain cuts at the threshold

    async def _asimilarity_search_with_relevance_scores(
        self, query: Question, k: int = 4, *, score_threshold: float | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        return (await self._arun(query, _Search.of(_RELEVANT, k=k, **kwargs))).with_relevance()

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
            query: as for all searches.
            k: most documents, at least 1.
            fetch_k: the most relevant ones to choose from; their multi-vectors are read.
            lambda_mult: from 0, diversity alone, to 1, relevance alone.
            filter: search among these only.
            **kwargs: ``boxes`` and ``heatmaps``.

        Returns:
            Documents in the order chosen.
        """
        search = _Search.of(_DIVERSE, k=k, fetch_k=fetch_k, lambda_mult=lambda_mult, filter=filter, **kwargs)
        return self._run(query, search).documents

    async def amax_marginal_relevance_search(
        self, query: Question, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """Find diverse documents without blocking; see :meth:`max_marginal_relevance_search`."""
        search = _Search.of(_DIVERSE, k=k, fetch_k=fetch_k, lambda_mult=lambda_mult, **kwargs)
        return (await self._arun(query, search)).documents

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

    def _run(self, query: Question, search: _Search) -> _Results:
        encoding = self._submit(query)
        return search.run(self.index, None if encoding is None else encoding.result()[0])

    async def _arun(self, query: Question, search: _Search) -> _Results:
        encoding = await asyncio.to_thread(self._submit, query)  # it may load a model
        vectors = None if encoding is None else (await asyncio.wrap_future(encoding))[0]
        return await asyncio.to_thread(search.run, self.index, vectors)

    def _submit(self, query: Question) -> Future[list[MultiVector]] | None:
        """Start encoding a query; None for an empty index, which needs no model."""
        queries, [vectors] = to_encode([Query(query) if isinstance(query, str) else query])  # no empty text
        if self.index.store.is_empty():
            return None
        if vectors is None:
            return self.index.encoder.submit_queries(queries)
        encoding: Future[list[MultiVector]] = Future()
        encoding.set_result([vectors])
        return encoding

    # -- closing and copying -------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the index if it was opened here by its location; an index passed in stays open."""
        if self._owns_index:
            self.index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the index's location and the encoder's settings; a copy opens it for reading."""
        return type(self), (self.index,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the same object: an open store is a handle, which copies share."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.index!r})"


class _Results(NamedTuple):
    """What one search found."""

    documents: list[Document]
    scores: list[float]
    n_query_tokens: int

    def scored(self) -> list[tuple[Document, float]]:
        return list(zip(self.documents, self.scores, strict=True))

    def with_relevance(self) -> list[tuple[Document, float]]:
        return [(document, relevance(score, self.n_query_tokens)) for document, score in self.scored()]


@dataclass(frozen=True, slots=True)
class _Search:
    """The arguments of one search, checked before anything is encoded."""

    k: int
    where: Filter | None
    evidence: Evidence
    group_by: GroupBy | None = None
    window: int = 0
    fetch_k: int | None = None
    lambda_mult: float = 1.0

    def __post_init__(self) -> None:
        check_search(self.k, self.group_by)
        check_lambda(self.lambda_mult)
        if self.fetch_k is not None:
            whole_number(self.fetch_k, "fetch_k", least=1)

    @classmethod
    def of(cls, known: Sequence[str], **arguments: Any) -> Self:
        """Return a search from a method's arguments, of which it knows some and the evidence's."""
        _refuse(arguments, *known, *_EVIDENCE)
        where = document_filter(arguments.pop("filter", None))
        evidence = Evidence(**{name: arguments.pop(name) for name in _EVIDENCE if name in arguments})
        return cls(where=where, evidence=evidence, **arguments)

    def run(self, index: PageIndex, query: MultiVector | None) -> _Results:
        if query is None:
            return _Results([], [], 0)
        n_hits = self.k if self.fetch_k is None else max(self.k, self.fetch_k)
        hits = index.search(query, n_hits, where=self.where, group_by=self.group_by, window=self.window)
        if self.fetch_k is not None:
            hits = diverse_hits(index, query, hits, self.k, self.lambda_mult)
        evidence = self.evidence.of_hits(index, query, hits)
        documents = hits_to_documents(hits, scores=False, evidence=evidence)
        return _Results(documents, [hit.score for hit in hits], len(query))


def _refuse(arguments: Mapping[str, Any], *known: str) -> None:
    """Raise for an unknown argument: a misspelt filter must not match everything."""
    for name in arguments:
        if name not in known:
            raise ConfigError(f"{name}: unknown argument; known: {', '.join(known)}")


def _multi_vector(embedding: MultiVector | Sequence[Any]) -> MultiVector:
    if isinstance(embedding, MultiVector):
        return embedding
    try:
        array = np.asarray(embedding, dtype=np.float32)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"embedding: expected numbers of shape (n_tokens, dim): {exc}") from exc
    return MultiVector(as_token_embeddings(array, name="embedding"))


def _discard(index: PageIndex, folder: str) -> None:
    index.close()
    shutil.rmtree(folder, ignore_errors=True)


def _texts_to_documents(
    texts: Iterable[str], metadatas: Sequence[Mapping[str, Any]] | None, ids: Sequence[str | None] | None
) -> list[Document]:
    if isinstance(texts, str | bytes):
        raise ConfigError(f"texts: expected a list of texts, got {type(texts).__name__}")
    contents = list(texts)
    for position, text in enumerate(contents):
        if not isinstance(text, str):
            raise ConfigError(f"texts: expected a text at {position}, got {type(text).__name__}")
    metadata_of = _one_each(metadatas, len(contents), "metadatas", "texts")
    return [
        Document(page_content=text, metadata=dict(metadata or {}), id=own_id)
        for text, metadata, own_id in zip(contents, metadata_of, _ids(ids, len(contents), "texts"), strict=True)
    ]


def _encoder_of(embedding: Embeddings | ColQwen3Encoder | None) -> ColQwen3Encoder | None:
    if embedding is None or isinstance(embedding, ColQwen3Encoder):
        return embedding
    encoder = getattr(embedding, "page_encoder", None)
    if isinstance(encoder, ColQwen3Encoder):
        return encoder
    raise ConfigError(
        f"embedding: {type(embedding).__name__} gives one vector a text, and this store compares many by late "
        "interaction; give a ColQwen3Encoder, a ColQwen3Embeddings, or None"
    )


def _one_each(values: Sequence[Any] | None, count: int, name: str, owners: str) -> Sequence[Any]:
    if values is None:
        return [None] * count
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise ConfigError(f"{name}: expected a list, got {type(values).__name__}")
    if len(values) != count:
        raise ConfigError(f"{name}: {len(values)} for {count} {owners}")
    return values


def _ids(ids: Sequence[str | None] | None, count: int, owners: str) -> Sequence[str | None]:
    values = _one_each(ids, count, "ids", owners)
    for position, own_id in enumerate(values):
        if own_id is not None and (not isinstance(own_id, str) or not own_id):
            raise ConfigError(f"ids: expected a non-empty text or None at {position}, got {own_id!r}")
    return values
