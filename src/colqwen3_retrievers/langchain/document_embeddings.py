"""Embeddings of documents to be reranked: known ones looked up, others encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from PIL import Image

from colqwen3_retrievers.cache.page_cache import PageEmbeddingCache
from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError, EncodeError, PageError
from colqwen3_retrievers.langchain.documents import document_image, document_to_page
from colqwen3_retrievers.langchain.fields import CacheField, OptionalIndexField, open_index
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.pages.remote_images import AllowRemote
from colqwen3_retrievers.retrieval.evidence import indexed_picture
from colqwen3_retrievers.stores.protocol import Record, check_info
from colqwen3_retrievers.vectors.multi_vector import MultiVector


class DocumentEmbeddings:
    """Where a reranker's embeddings come from: the index, the cache, the encoder; put together at the first use.

    The arguments are the fields of :class:`~colqwen3_retrievers.langchain.reranker.ColQwen3Reranker`.

    Raises:
        StoreError: no index there.
        StoreMismatchError: the index was made by another model.

    >>> DocumentEmbeddings("tiny", None, None, None, None).encoder                       # nothing is loaded yet
    ColQwen3Encoder(model='tiny')
    """

    def __init__(
        self,
        model: str | None,
        device: str | None,
        encoder: ColQwen3Encoder | None,
        index: OptionalIndexField,
        cache: CacheField,
        cache_bytes: int | None = None,
        images_dir: str | Path | None = None,
    ) -> None:
        self.made_from = (model, device, encoder, index, cache, cache_bytes, images_dir)
        self.index = None if index is None else open_index(index, None, images_dir)
        if isinstance(cache, PageEmbeddingCache):
            self.encoder: Any = cache.encoder
        elif encoder is not None:
            self.encoder = encoder
        elif self.index is not None and model is None:
            self.encoder = self.index.encoder
            if device is not None and isinstance(self.encoder, ColQwen3Encoder):
                self.encoder = ColQwen3Encoder.from_dict({**self.encoder.to_dict(), "device": device})
        else:
            self.encoder = ColQwen3Encoder(model, device=device)
        if self.index is not None:
            check_info(self.index.info, self.encoder.info, self.index.location)
        if not isinstance(cache, PageEmbeddingCache):
            cache = PageEmbeddingCache(self.encoder, cache_bytes, folder=cache)
        self.cache = cache

    def submit(self, documents: Sequence[Document], allow_remote: AllowRemote = False) -> list[Future[MultiVector]]:
        """Look documents up in the index, and start encoding the others; one future each."""
        futures: dict[int, Future[MultiVector]] = {}
        pages: dict[int, Page] = {}
        known = self._known(documents)
        for place, document in enumerate(documents):
            if place in known:
                futures[place] = _done(known[place])
                continue
            try:
                pages[place] = document_to_page(document, f"document {place}", allow_remote)
            except (ConfigError, PageError) as exc:
                futures[place] = _failed(exc)
        futures |= dict(zip(pages, self.cache.submit(pages.values()), strict=True))
        return [futures[place] for place in range(len(documents))]

    def picture(self, document: Document, name: str, allow_remote: AllowRemote = False) -> Image.Image | None:
        """Open the picture that a document's embeddings were made of: the index's, where they are the index's.

        Returns:
            None for a page of the index of which neither it nor the document has a picture.

        Raises:
            ConfigError: it is at a web address that may not be fetched.
            PageError: it cannot be read, or has changed since it was indexed.
        """
        known = self._records([document], vectors=False)
        kept = indexed_picture(known[0]) if known else None
        if kept is not None or (known and document_image(document, allow_remote) is None):
            return kept
        return document_to_page(document, name, allow_remote).image

    def _known(self, documents: Sequence[Document]) -> dict[int, MultiVector]:
        """Embeddings the index has, by place."""
        records = self._records(documents, vectors=True)
        return {place: made for place, record in records.items() if (made := record.multi_vector) is not None}

    def _records(self, documents: Sequence[Document], *, vectors: bool) -> dict[int, Record]:
        """Pages the index has, by place: of the same id, and the same content where the document tells."""
        if self.index is None:
            return {}
        ids = {document.id: None for document in documents if document.id}
        records = {record.page.id: record for record in self.index.get(ids, vectors=vectors)}
        found: dict[int, Record] = {}
        for place, document in enumerate(documents):
            record = records.get(document.id or "")
            if record is not None and document.metadata.get("sha256") in (None, record.page.sha256):
                found[place] = record
        return found


def _done(embeddings: MultiVector) -> Future[MultiVector]:
    future: Future[MultiVector] = Future()
    future.set_result(embeddings)
    return future


def _failed(exc: Exception) -> Future[MultiVector]:
    error = EncodeError(str(exc))
    error.__cause__ = exc
    future: Future[MultiVector] = Future()
    future.set_exception(error)
    return future
