"""The LangChain embeddings: one vector an item, for stores of single vectors."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final, Self

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.fork import ForkSafeLock
from colqwen3_retrievers.langchain.documents import checked_documents, document_to_page, errors_about
from colqwen3_retrievers.langchain.fields import EncoderField, RemoteField, checked_query, pickled
from colqwen3_retrievers.pages.files import IMAGE_SUFFIXES
from colqwen3_retrievers.pages.images import ImageSource
from colqwen3_retrievers.pages.page import Page, Query
from colqwen3_retrievers.vectors.multi_vector import MultiVector
from colqwen3_retrievers.vectors.single_vector import Method, SingleVectorSettings, single_vectors

_logger = logging.getLogger(__name__)

_PAGE_NAME: Final = re.compile(
    rf"[^\n]*(?:{'|'.join(map(re.escape, sorted({*IMAGE_SUFFIXES, '.pdf'})))}), page \d+"
    r"(?: \([^\n]*\))?(?: \[[^\n]*\])?(?:\n\n|\Z)",
    re.IGNORECASE,
)
"""What :func:`~colqwen3_retrievers.langchain.documents.page_to_document` puts at the start of a page's content."""


class ColQwen3Embeddings(BaseModel, Embeddings):
    """Makes one vector of each text, page image or query, for a single-vector store as the first stage.

    Token embeddings are reduced to one vector by :mod:`~colqwen3_retrievers.vectors.single_vector`, which costs
    quality: rerank what the store returns with :class:`~colqwen3_retrievers.langchain.reranker.ColQwen3Reranker`, or
    use :class:`~colqwen3_retrievers.langchain.vector_store.ColQwen3VectorStore`, which needs no reduction. Vectors have
    length 1, so cosine and inner product rank alike. Nothing is loaded before the first item.

    Vectors of other settings or of another model are not comparable with these; name a collection or a cache by
    :attr:`fingerprint`.

    **Vector stores pass on texts only.** ``store.add_documents(PageLoader("reports/").load())`` embeds the
    ``page_content`` ("scan.pdf, page 1"), never the image, and logs a warning. Give the store the vectors of
    :meth:`embed_pages` instead: ``FAISS.from_embeddings``, ``PGVector.add_embeddings`` and the like take them together
    with the texts; the example shows it for LangChain's in-memory store, which has no such method.

    Args:
        model: hub name, folder or ``"tiny"``; None reads ``COLQWEN3_MODEL``, then takes the default.
        device: ``"cuda"``, ``"cpu"``, ...; None takes the best available.
        encoder: a ready encoder, in place of ``model`` and ``device``.
        method: ``"fde"`` or ``"directions"``.
        dimensions: components of a vector.
        nearest: see :class:`~colqwen3_retrievers.vectors.single_vector.SingleVectorSettings`.
        seed: the same.
        allow_remote: whether images known by the web address of a content block are fetched; see
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
    dimensions: int = Field(default=2048, ge=1, strict=True)
    nearest: int = Field(default=16, ge=1, strict=True)
    seed: int = Field(default=0, ge=0, strict=True)
    allow_remote: RemoteField = False
    show_progress: bool = False

    _lock: Any = PrivateAttr(default_factory=ForkSafeLock)
    _warned: bool = PrivateAttr(default=False)
    _default: tuple[tuple[str | None, str | None], ColQwen3Encoder] | None = PrivateAttr(default=None)

    def __init__(self, model: str | None = None, **fields: Any) -> None:
        super().__init__(**({} if model is None else {"model": model}), **fields)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.encoder is not None and (self.model is not None or self.device is not None):
            raise ConfigError("give model and device, or an encoder that has them, not both")
        self._settings_for(1)  # raises for settings that contradict each other, before anything is loaded
        return self

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed texts as documents; names of pages, passed on by a vector store, log a warning once.

        Returns:
            A list of ``dimensions`` floats for each text, in order.

        Raises:
            ConfigError: not a list of texts.
            EncodeError: one is empty or too long; ``.index`` is its position.
        """
        return self._embed(self._text_pages(texts))

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed texts without blocking the event loop; cancelling it cancels the encoding."""
        return await self._aembed(self._text_pages(texts))

    def embed_query(self, text: str | Query) -> list[float]:
        """Embed a query: a text, or a Query for an image. Queries and documents are embedded differently.

        Raises:
            ConfigError: an empty query.
            EncodeError: it cannot be encoded.
        """
        return self._reduced(self.page_encoder.encode_queries([checked_query(text)]), is_query=True)[0]

    async def aembed_query(self, text: str | Query) -> list[float]:
        """Embed a query without blocking the event loop."""
        query = checked_query(text)
        return (await self._areduced(lambda: self.page_encoder.submit_queries([query]), is_query=True))[0]

    def embed_image(self, uris: Sequence[ImageSource]) -> list[list[float]]:
        """Embed images as documents, under the method name that other vector stores look for.

        Args:
            uris: paths, bytes or PIL images; nothing is fetched.

        Raises:
            ConfigError: a single image, or one of another type.
            EncodeError: one cannot be read; ``.index`` is its position.
        """
        return self._embed(_image_pages(uris))

    async def aembed_image(self, uris: Sequence[ImageSource]) -> list[list[float]]:
        """Embed images without blocking the event loop."""
        return await self._aembed(_image_pages(uris))

    def embed_pages(self, documents: Sequence[Document]) -> list[list[float]]:
        """Embed LangChain documents: those with an image by their image, the others by their text.

        ``embed_documents``, which vector stores call, never receives an image, so it would embed the names of pages
        without text. Fill a store with these vectors directly (``add_embeddings``, ``upsert``, ...).

        Raises:
            ConfigError: a document with neither image nor text; it is named.
            EncodeError: one cannot be read; ``.index`` is its position.
        """
        return self._embed(self._document_pages(documents))

    async def aembed_pages(self, documents: Sequence[Document]) -> list[list[float]]:
        """Embed documents without blocking the event loop."""
        return await self._aembed(await asyncio.to_thread(self._document_pages, documents))

    @property
    def page_encoder(self) -> ColQwen3Encoder:
        """The encoder in use: the one given, or one of ``model`` and ``device``."""
        if self.encoder is not None:
            return self.encoder
        with self._lock:
            settings = (self.model, self.device)
            if self._default is None or self._default[0] != settings:
                self._default = (settings, ColQwen3Encoder(self.model, device=self.device))
            return self._default[1]

    @property
    def settings(self) -> SingleVectorSettings:
        """How token embeddings become one vector; reads the checkpoint's headers for its dim."""
        return self._settings_for(self.page_encoder.info.dim)

    @property
    def fingerprint(self) -> str:
        """Digests of the model and of the settings: vectors of two fingerprints may not share a store."""
        return f"{self.page_encoder.info.fingerprint[:16]}-{self.settings.fingerprint}"

    def _settings_for(self, token_dim: int) -> SingleVectorSettings:
        return SingleVectorSettings(
            token_dim, method=self.method, dim=self.dimensions, nearest=self.nearest, seed=self.seed
        )

    def _text_pages(self, texts: Sequence[str]) -> list[Page]:
        pages = [Page(id=f"text {position}", text=text) for position, text in enumerate(_items(texts, "texts"))]
        name = next((page.text for page in pages if _PAGE_NAME.match(page.text)), None)
        if name is not None and not self._warned:
            self._warned = True
            _logger.warning(
                "embed_documents: %r is the name of a page whose image is not embedded: vector stores pass on texts "
                "only. Give the store the vectors of embed_pages(documents), or use ColQwen3VectorStore",
                name.partition("\n")[0],
            )
        return pages

    def _document_pages(self, documents: Sequence[Document]) -> list[Page]:
        pages = []
        for position, document in enumerate(checked_documents(documents)):
            with errors_about(f"document {position}"):
                pages.append(document_to_page(document, f"document {position}", self.allow_remote))
        return pages

    def _embed(self, pages: list[Page]) -> list[list[float]]:
        if not pages:
            return []
        return self._reduced(self.page_encoder.encode_pages(pages, show_progress=self.show_progress))

    async def _aembed(self, pages: list[Page]) -> list[list[float]]:
        return await self._areduced(lambda: self.page_encoder.submit_pages(pages)) if pages else []

    def _reduced(self, embeddings: list[MultiVector], *, is_query: bool = False) -> list[list[float]]:
        rows: list[list[float]] = single_vectors(embeddings, self.settings, is_query=is_query).tolist()
        return rows

    async def _areduced(
        self, submit: Callable[[], Future[list[MultiVector]]], *, is_query: bool = False
    ) -> list[list[float]]:
        future = await asyncio.to_thread(submit)  # it may load a model
        embeddings = await asyncio.wrap_future(future)
        return await asyncio.to_thread(self._reduced, embeddings, is_query=is_query)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as settings."""
        return pickled(self)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Return a copy that shares the encoder."""
        return self.model_copy()


def _image_pages(images: Sequence[ImageSource]) -> list[Page]:
    return [Page(id=f"image {position}", image=image) for position, image in enumerate(_items(images, "uris"))]


def _items(items: Sequence[Any], name: str) -> list[Any]:
    if isinstance(items, str | bytes) or not isinstance(items, Sequence):
        raise ConfigError(f"{name}: expected a list, got {type(items).__name__}")
    return list(items)
