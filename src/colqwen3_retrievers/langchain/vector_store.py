"""The LangChain vector store."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings

from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.langchain.documents import page_to_document
from colqwen3_retrievers.langchain.filters import document_filter
from colqwen3_retrievers.langchain.store_inputs import (
    documents_to_pages,
    encoder_of,
    images_to_pages,
    refuse,
    texts_to_documents,
)
from colqwen3_retrievers.langchain.vector_search import PageVectorSearch
from colqwen3_retrievers.pages.images import ImageSource
from colqwen3_retrievers.pages.remote_images import AllowRemote
from colqwen3_retrievers.stores.protocol import check_info


class ColQwen3VectorStore(PageVectorSearch):
    """A vector store over a ``PageIndex``: texts and page images by late interaction.

    Scores of ``similarity_search_with_score`` are MaxSim sums, higher is better, and are comparable for one query only;
    relevance scores are (1 + mean MaxSim) / 2, within 0..1. Documents come back with the content and metadata they were
    added with, with their id, and those with an image with ``metadata["image_path"]``. Pages that were added to the
    index without LangChain come as :class:`~colqwen3_retrievers.langchain.retriever.ColQwen3Retriever` gives them.

    Args:
        index: an open index; or its folder, which is opened for writing, and made when it is new and there is an
            encoder.
        encoder: with a folder: what encodes; None rebuilds it from what the index knows, when it is needed.
        images_dir: with an address (Qdrant): where images are kept; see :meth:`PageIndex.open`.
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
        self._opened_here = not isinstance(index, PageIndex)
        if isinstance(index, PageIndex):
            for name, given in (("encoder", encoder), ("images_dir", images_dir)):
                if given is not None:
                    raise ConfigError(f"{name}: the index is open and has its own; give its location, or no {name}")
            self.index = index
        elif isinstance(index, str | Path):
            self.index = PageIndex.open(os.fspath(index), encoder, images_dir=images_dir, read_only=read_only)
        else:
            raise ConfigError(f"index: expected a PageIndex or its folder, got {type(index).__name__}")

    @property
    def embeddings(self) -> None:
        """None: a page is many vectors here, and no ``Embeddings`` could make them."""
        return None

    # -- making --------------------------------------------------------------------------------------------------------

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
            embedding: a ColQwen3Encoder, a ColQwen3Embeddings (its encoder counts, not its single vectors), or None
                for the index's or the default model.
            metadatas: one for each text.
            ids: one for each text; random where there is none.
            index: an open index or a folder; None makes one in a temporary folder that goes when the store goes.
            **kwargs: ``images_dir`` as for the constructor, the others as for :meth:`add_documents`.

        Raises:
            ConfigError: another maker's embeddings, or as for :meth:`add_documents`.
        """
        return cls.from_documents(texts_to_documents(texts, metadatas, ids), embedding, index=index, **kwargs)

    @classmethod
    async def afrom_texts(
        cls,
        texts: list[str],
        embedding: Embeddings | ColQwen3Encoder | None = None,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        index: PageIndex | str | Path | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make a store and add texts without blocking the event loop; see :meth:`from_texts`."""
        documents = texts_to_documents(texts, metadatas, ids)
        return await cls.afrom_documents(documents, embedding, index=index, **kwargs)

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
        encoder = encoder_of(embedding)
        if isinstance(index, PageIndex):
            if encoder is not None:
                check_info(index.info, encoder.info, index.location)
            store = cls(index, images_dir=images_dir)
        elif index is not None:
            store = cls(index, encoder, images_dir=images_dir)
        else:
            folder = tempfile.mkdtemp(prefix="colqwen3-")
            store = cls(Path(folder) / "index", encoder or ColQwen3Encoder(), images_dir=images_dir)
            weakref.finalize(store, _discard, store.index, folder)
        try:
            store.add_documents(documents, **kwargs)
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    async def afrom_documents(
        cls,
        documents: list[Document],
        embedding: Embeddings | ColQwen3Encoder | None = None,
        *,
        index: PageIndex | str | Path | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make a store and add documents without blocking the event loop."""
        return await asyncio.to_thread(cls.from_documents, documents, embedding, index=index, **kwargs)

    # -- writing -------------------------------------------------------------------------------------------------------

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
        """Add documents, each in place of the one with its id; those that are there just so are not encoded again.

        Args:
            documents: with a text, or with an image under ``metadata["image_path"]`` or ``metadata["image"]`` (see
                :func:`~colqwen3_retrievers.langchain.documents.document_image`); they are left as they are. Dates in
                the metadata are kept as ISO text.
            ids: one for each document, before the documents' own; random where there is none.
            allow_remote: whether an image block's web address is fetched, and the image kept; see
                :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.
            batch_size: documents encoded and committed together; each such batch is kept wholly or not at all.
            show_progress: whether to draw a progress bar (on a terminal).
            **kwargs: none.

        Returns:
            Their ids.

        Raises:
            ConfigError: a document without text and image, metadata that is not JSON, another number of ids, one id
                for two contents, an unknown argument.
            EncodeError: a document cannot be encoded; it is named, and the batches before its own are kept.
            PageError: an image cannot be read.
            StoreError: read-only, closed, the disk is full, and the like.
        """
        refuse(kwargs, "ids", "allow_remote", "batch_size", "show_progress")
        pages = documents_to_pages(documents, ids, allow_remote)
        self.index.add(pages, batch_size=batch_size, show_progress=show_progress)
        return [page.id for page in pages]

    async def aadd_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Add documents without blocking the event loop; see :meth:`add_documents`."""
        return await asyncio.to_thread(self.add_documents, documents, **kwargs)

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Add texts; see :meth:`add_documents`."""
        return self.add_documents(texts_to_documents(texts, metadatas, ids), **kwargs)

    async def aadd_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Add texts without blocking the event loop; see :meth:`add_documents`."""
        return await self.aadd_documents(texts_to_documents(texts, metadatas, ids), **kwargs)

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
            images: paths, bytes or PIL images; web addresses when they may be fetched.
            metadatas: one for each image; ``source``, ``page`` (from 1) and ``page_label`` name it. The source of a
                file is its path, unless given.
            ids: one for each image; a file's default is ``f"{source}#page={page}"``, so that it overwrites itself, that
                of an image in memory is random.
            texts: one for each image: the text that stands on it, for chat models; ``""`` where there is none.
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
        pages = images_to_pages(images, metadatas, ids, texts, allow_remote)
        self.index.add(pages, batch_size=batch_size, show_progress=show_progress)
        return [page.id for page in pages]

    async def aadd_images(self, images: Iterable[ImageSource], **kwargs: Any) -> list[str]:
        """Add images without blocking the event loop; see :meth:`add_images`."""
        return await asyncio.to_thread(self.add_images, images, **kwargs)

    def delete(self, ids: list[str] | None = None, *, filter: Mapping[str, Any] | None = None, **kwargs: Any) -> bool:
        """Delete documents by id or filter; with both, those that meet both. Ids that are not there are no error.

        Returns:
            True.

        Raises:
            ConfigError: neither is given: that would mean all of them.
        """
        refuse(kwargs, "ids", "filter")
        self.index.delete(ids, where=document_filter(filter))
        return True

    async def adelete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Delete documents without blocking the event loop; see :meth:`delete`."""
        return await asyncio.to_thread(self.delete, ids, **kwargs)

    # -- looking -------------------------------------------------------------------------------------------------------

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Give documents by id, in the order asked for; ids that are not there are left out."""
        return [page_to_document(record.page) for record in self.index.get(ids)]

    async def aget_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Give documents by id without blocking the event loop."""
        return await asyncio.to_thread(self.get_by_ids, ids)

    # -- letting go ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the index, if it was opened here by its location; one that was handed in stays open."""
        if self._opened_here:
            self.index.close()

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the index's location and the encoder's settings; a copy opens it for reading."""
        return type(self), (self.index,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Give itself: an open store is a handle, which copies share."""
        return self

    def __repr__(self) -> str:
        """Name the index."""
        return f"{type(self).__name__}({self.index!r})"


def _discard(index: PageIndex, folder: str) -> None:
    index.close()
    shutil.rmtree(folder, ignore_errors=True)
