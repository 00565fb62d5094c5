"""The LangChain embeddings: one vector an item, for vector stores that know no other."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Final, Self

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.langchain.documents import document_to_page
from colqwen3_retrievers.langchain.fields import EncoderField, RemoteField, pickled
from colqwen3_retrievers.pages.files import IMAGE_SUFFIXES
from colqwen3_retrievers.pages.images import ImageSource
from colqwen3_retrievers.pages.page import Page, Query
from colqwen3_retrievers.pages.remote_images import AllowRemote
from colqwen3_retrievers.vectors.multi_vector import MultiVector
from colqwen3_retrievers.vectors.single_vector import Method, SingleVectorSettings, single_vectors

_logger = logging.getLogger(__name__)

_PAGE_NAME: Final = re.compile(
    rf"[^\n]*(?:{'|'.join(map(re.escape, sorted({*IMAGE_SUFFIXES, '.pdf'})))}), page \d+"
    r"(?: \([^\n]*\))?(?: \[[^\n]*\])?(?:\n\n|\Z)",
    re.IGNORECASE,
)
"""What :func:`~colqwen3_retrievers.langchain.documents.page_to_document` puts first in a page's content."""


class ColQwen3Embeddings(BaseModel, Embeddings):
    """Makes one vector of each text, page image or query, for any single-vector store as first stage.

    Token embeddings are cut down to one vector by :mod:`~colqwen3_retrievers.vectors.single_vector`, which costs
    quality: let :class:`~colqwen3_retrievers.langchain.reranker.ColQwen3Reranker` put what the store finds in the order
        of MaxSim,
    or use :class:`~colqwen3_retrievers.langchain.vector_store.ColQwen3VectorStore`, which needs no bridge. Vectors have
    length 1: cosine and inner product rank alike. Nothing is loaded before the first item.

    Vectors of other settings or of another model do not compare with these; :attr:`fingerprint` tells, and is what to
    name a collection or a cache by.

    **Vector stores hand over texts only.** ``store.add_documents(PageLoader("reports/").load())`` embeds what stands in
    ``page_content`` ("scan.pdf, page 1"), never the picture; a warning in the log says so. Give the store the vectors
    of :meth:`embed_pages` instead: ``FAISS.from_embeddings``, ``PGVector.add_embeddings`` and the like take them beside
    the texts, and the example shows it for LangChain's store in memory, which has no such method.

    Args:
        model: hub name, folder or ``"tiny"``; None reads ``COLQWEN3_MODEL``, then takes the default.
        device: ``"cuda"``, ``"cpu"``, ...; None takes the best there is.
        encoder: a ready encoder, in place of ``model`` and ``device``.
        method: ``"fde"`` or ``"directions"``.
        dimensions: components of a vector.
        nearest: see :class:`~colqwen3_retrievers.vectors.single_vector.SingleVectorSettings`.
        seed: the same.
        allow_remote: whether images of documents known by the web address of a content block are fetched; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.
        show_progress: whether to draw a progress bar (on a terminal); not in async calls.

    Raises:
        ValueError: an argument is wrong or unknown (pydantic's ValidationError).

    Example:
        >>> from langchain_core.vectorstores import InMemoryVectorStore
        >>> from colqwen3_retrievers.langchain import ColQwen3Embeddings, PageLoader
        >>> embeddings = ColQwen3Embeddings("tiny")                          # nothing is loaded yet
        >>> store = InMemoryVectorStore(embeddings)
        >>> documents = PageLoader("reports/").load()                                         # doctest: +SKIP
        >>> for document, vector in zip(documents, embeddings.embed_pages(documents)):        # doctest: +SKIP
        ...     store.store[document.id] = {"id": document.id, "vector": vector, "text": document.page_content,
        ...                                 "metadata": document.metadata}
        >>> for document in store.similarity_search("what was the revenue?"):                 # doctest: +SKIP
        ...     print(document.metadata["citation"])
        a.pdf, page 7
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", protected_namespaces=())

    model: str | None = None
    device: str | None = None
    encoder: EncoderField = None
    method: Method = "fde"
    dimensions: int = Field(default=2048, ge=1)
    nearest: int = Field(default=16, ge=1)
    seed: int = Field(default=0, ge=0)
    allow_remote: RemoteField = False
    show_progress: bool = False

    _lock: Any = PrivateAttr(default_factory=threading.Lock)
    _told: bool = PrivateAttr(default=False)
    _made: tuple[tuple[str | None, str | None], ColQwen3Encoder] | None = PrivateAttr(default=None)

    def __init__(self, model: str | None = None, **fields: Any) -> None:
        super().__init__(**({} if model is None else {"model": model}), **fields)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.encoder is not None and (self.model is not None or self.device is not None):
            raise ConfigError("give model and device, or an encoder that has them, not both")
        self._settings(1)  # refuses settings that do not go together, before anything is loaded
        return self

    # -- LangChain's ---------------------------------------------------------------------------------------------------

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed texts as documents; names of pages, which vector stores hand over, are told in the log, once.

        Returns:
            A list of ``dimensions`` floats for each, in order.

        Raises:
            ConfigError: not a list of texts.
            EncodeError: one is empty or too long; ``.index`` says which.
        """
        return self._of_pages(self._texts(texts))

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed texts without blocking the event loop; cancelling it cancels the encoding."""
        return await self._aof_pages(self._texts(texts))

    def embed_query(self, text: str | Query) -> list[float]:
        """Embed a query: a text, or a Query for an image. Queries are embedded otherwise than documents.

        Raises:
            ConfigError: an empty query.
            EncodeError: it cannot be encoded.
        """
        return self._flat(self.page_encoder.encode_queries([_query(text)]), is_query=True)[0]

    async def aembed_query(self, text: str | Query) -> list[float]:
        """Embed a query without blocking the event loop."""
        asked = _query(text)
        future = await asyncio.to_thread(lambda: self.page_encoder.submit_queries([asked]))
        return (await self._awaited(future, is_query=True))[0]

    # -- images --------------------------------------------------------------------------------------------------------

    def embed_image(self, uris: Sequence[ImageSource]) -> list[list[float]]:
        """Embed images as documents; the name is the one by which other vector stores look for it.

        Args:
            uris: paths, bytes or PIL images; nothing is fetched.

        Raises:
            ConfigError: a single image, or one of another type.
            EncodeError: one cannot be read; ``.index`` says which.
        """
        return self._of_pages(_images(uris))

    async def aembed_image(self, uris: Sequence[ImageSource]) -> list[list[float]]:
        """Embed images without blocking the event loop."""
        return await self._aof_pages(_images(uris))

    def embed_pages(self, documents: Sequence[Document]) -> list[list[float]]:
        """Embed LangChain documents: those with an image by their image, the others by their text.

        ``embed_documents``, which vector stores call, is never given an image: of pages without text it would embed
        their names. With these vectors a store is filled by hand (``add_embeddings``, ``upsert``, ...).

        Raises:
            ConfigError: a document with neither image nor text; it is named.
            EncodeError: one cannot be read; ``.index`` says which.
        """
        return self._of_pages(_pages(documents, self.allow_remote))

    async def aembed_pages(self, documents: Sequence[Document]) -> list[list[float]]:
        """Embed documents without blocking the event loop."""
        return await self._aof_pages(await asyncio.to_thread(_pages, documents, self.allow_remote))

    # -- what makes the vectors ----------------------------------------------------------------------------------------

    @property
    def page_encoder(self) -> ColQwen3Encoder:
        """The encoder behind: the one given, or one of ``model`` and ``device``."""
        if self.encoder is not None:
            return self.encoder
        with self._lock:
            asked = (self.model, self.device)
            if self._made is None or self._made[0] != asked:
                self._made = (asked, ColQwen3Encoder(self.model, device=self.device))
            return self._made[1]

    @property
    def settings(self) -> SingleVectorSettings:
        """How one vector is made of many; reads the checkpoint's headers for its dim."""
        return self._settings(self.page_encoder.info.dim)

    @property
    def fingerprint(self) -> str:
        """Digests of the model and of the settings: vectors of two fingerprints may not share a store."""
        info = self.page_encoder.info
        return f"{info.fingerprint[:16]}-{self.settings.fingerprint}"

    # -- inside --------------------------------------------------------------------------------------------------------

    def _settings(self, token_dim: int) -> SingleVectorSettings:
        return SingleVectorSettings(
            token_dim, method=self.method, dim=self.dimensions, nearest=self.nearest, seed=self.seed
        )

    def _texts(self, texts: Sequence[str]) -> list[Page]:
        pages = [Page(id=f"text {place}", text=text) for place, text in enumerate(_listed(texts, "texts"))]
        named = next((page.text for page in pages if _PAGE_NAME.match(page.text)), None)
        if named is not None and not self._told:
            self._told = True
            _logger.warning(
                "embed_documents: %r names a page whose picture is not embedded: vector stores hand over texts only. "
                "Give the store the vectors of embed_pages(documents), or take ColQwen3VectorStore",
                named.partition("\n")[0],
            )
        return pages

    def _of_pages(self, pages: list[Page]) -> list[list[float]]:
        if not pages:
            return []
        return self._flat(self.page_encoder.encode_pages(pages, show_progress=self.show_progress))

    async def _aof_pages(self, pages: list[Page]) -> list[list[float]]:
        if not pages:
            return []
        future = await asyncio.to_thread(lambda: self.page_encoder.submit_pages(pages))  # it may load a model
        return await self._awaited(future)

    async def _awaited(self, future: Future[list[MultiVector]], *, is_query: bool = False) -> list[list[float]]:
        made = await asyncio.wrap_future(future)
        return await asyncio.to_thread(self._flat, made, is_query=is_query)

    def _flat(self, made: list[MultiVector], *, is_query: bool = False) -> list[list[float]]:
        rows: list[list[float]] = single_vectors(made, self.settings, is_query=is_query).tolist()
        return rows

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as settings."""
        return pickled(self)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Give a copy that shares the encoder."""
        return self.model_copy()


def _query(text: str | Query) -> str | Query:
    if isinstance(text, Query):
        return text
    if not isinstance(text, str):
        raise ConfigError(f"query: expected a text or a Query, got {type(text).__name__}")
    Query(text)  # refuses an empty one before anything is loaded
    return text


def _images(images: Sequence[ImageSource]) -> list[Page]:
    return [Page(id=f"image {place}", image=image) for place, image in enumerate(_listed(images, "uris"))]


def _pages(documents: Sequence[Document], allow_remote: AllowRemote) -> list[Page]:
    pages = []
    for place, document in enumerate(_listed(documents, "documents")):
        if not isinstance(document, Document):
            raise ConfigError(f"documents: {place} is a {type(document).__name__}, expected a Document")
        try:
            pages.append(document_to_page(document, f"document {place}", allow_remote))
        except ConfigError as exc:
            raise ConfigError(f"document {place}: {exc}") from exc
    return pages


def _listed(items: Sequence[Any], name: str) -> list[Any]:
    if isinstance(items, str | bytes) or not isinstance(items, Sequence):
        raise ConfigError(f"{name}: expected a list, got {type(items).__name__}")
    return list(items)
