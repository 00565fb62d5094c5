"""LlamaIndex embedding: one vector a page, text or question, for any single-vector store; multi-vectors beside them."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeVar

from llama_index.core.bridge.pydantic import (
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
)
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.constants import DEFAULT_EMBED_BATCH_SIZE
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]  # re-exported unsaid
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent, EmbeddingStartEvent
from llama_index.core.schema import BaseNode, MetadataMode
from llama_index.core.utils import get_tqdm_iterable

from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError, EncodeError, PageError
from colqwen3_retrievers.llama_index.nodes import page_from_node
from colqwen3_retrievers.pages.images import ImageSource
from colqwen3_retrievers.pages.page import Page, Query
from colqwen3_retrievers.pages.remote_images import AllowRemote, checked_remote
from colqwen3_retrievers.vectors.multi_vector import MultiVector
from colqwen3_retrievers.vectors.single_vector import Method, SingleVectorSettings, single_vectors

T = TypeVar("T")

Picture = ImageSource | io.BytesIO
"""What LlamaIndex and we take for a picture: a path, bytes, a stream or a PIL image."""


class ColQwen3Embedding(MultiModalEmbedding):
    """Embeds texts, page images and questions into one space, one flat vector each, for stores that know no other.

    One vector cannot hold what a multi-vector says: take it to find candidates, and let a :class:`ColQwen3Reranker`
    order them by MaxSim. Where a whole index may be ours, :class:`ColQwen3Retriever` finds more in fewer bytes. How the
    vector is made is described at :class:`~colqwen3_retrievers.vectors.single_vector.SingleVectorSettings`; vectors of
    other settings, or of another model, do not compare.

    As a transformation it gives each node the vector of its picture, or else of its text. ``VectorStoreIndex`` by
    itself would embed the text beside a picture, so let it come first::

        nodes = IngestionPipeline(transformations=[PageNodes(), embedding]).run(documents=documents)
        index = VectorStoreIndex(nodes, embed_model=embedding)

    Multi-vectors have methods of their own (:meth:`get_query_multi_vectors` and so on): LlamaIndex's nodes, events and
    stores take flat vectors only. The async methods await the encoder and never block the event loop.

    Args:
        model_name: hub name, folder or ``"tiny"``; None reads ``COLQWEN3_MODEL``, then takes the default checkpoint.
        device: ``"cuda"``, ``"mps"``, ``"cpu"``; None takes the best there is.
        encoder: a ready encoder, instead of ``model_name`` and ``device``.
        dim: components of the vectors; more find more.
        method: ``"fde"`` or ``"directions"``.
        embed_batch_size: inputs handed to the encoder together, 1 to 2,048; it cuts its own batches.
        allow_remote: whether nodes' pictures known by a web address only are fetched; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.
        num_workers: LlamaIndex's: batches under way at a time in async calls.
        callback_manager: LlamaIndex's.

    Raises:
        ConfigError: an argument that cannot be used. LlamaIndex's ``embeddings_cache`` is one of them: it is keyed by
            the bare text, so that a question and a document with the same words would share a vector.
        EncodeError: an input that cannot be encoded; ``.index`` is its position in its batch.

    Example:
        >>> embedding = ColQwen3Embedding("tiny")                            # nothing is loaded yet
        >>> embedding.model_name, embedding.embed_batch_size
        ('tiny', 10)
        >>> len(embedding.get_query_embedding("what was the revenue?"))                             # doctest: +SKIP
        2048
    """

    model_config = ConfigDict(
        protected_namespaces=("pydantic_model_",),
        arbitrary_types_allowed=True,
        validate_assignment=True,
        extra="forbid",
    )

    encoder: ColQwen3Encoder
    dim: int = Field(default=2048, strict=True)
    method: Method = "fde"
    allow_remote: bool | tuple[str, ...] = False

    def __init__(
        self,
        model_name: str | os.PathLike[str] | None = None,
        *,
        device: str | None = None,
        encoder: ColQwen3Encoder | dict[str, Any] | None = None,
        dim: int = 2048,
        method: Method = "fde",
        allow_remote: AllowRemote = False,
        embed_batch_size: int = DEFAULT_EMBED_BATCH_SIZE,
        num_workers: int | None = None,
        callback_manager: CallbackManager | None = None,
        embeddings_cache: None = None,
    ) -> None:
        if isinstance(encoder, dict):
            encoder = ColQwen3Encoder.from_dict(encoder)  # the model's name and device are in it
        elif encoder is not None and (model_name is not None or device is not None):
            raise ConfigError("encoder: it has a model and a device; give either it or them")
        if encoder is None:
            encoder = ColQwen3Encoder(model_name, device=device)
        if not isinstance(encoder, ColQwen3Encoder):
            raise ConfigError(f"encoder: expected a ColQwen3Encoder, got {type(encoder).__name__}")
        SingleVectorSettings(1, method=method, dim=dim, nearest=1)  # checks both
        fields: dict[str, Any] = {
            "model_name": str(encoder.to_dict()["model"]), "encoder": encoder, "dim": dim, "method": method,
            "allow_remote": checked_remote(allow_remote), "embed_batch_size": embed_batch_size,
            "num_workers": num_workers,
            "callback_manager": callback_manager or CallbackManager([]), "embeddings_cache": embeddings_cache,
        }  # fmt: skip
        try:
            super().__init__(**fields)
        except ValidationError as exc:
            first = exc.errors(include_url=False)[0]
            raise ConfigError(f"{first['loc'][0]}: {first['msg']}, got {first['input']!r}") from exc

    @classmethod
    def class_name(cls) -> str:
        """Give the name it is stored under."""
        return "ColQwen3Embedding"

    @property
    def settings(self) -> SingleVectorSettings:
        """How its vectors are made; reads the checkpoint's headers. Its fingerprint tells whether two stores agree."""
        nearest = min(self.dim, SingleVectorSettings(1).nearest)
        return SingleVectorSettings(self.encoder.info.dim, method=self.method, dim=self.dim, nearest=nearest)

    # -- as plain data -------------------------------------------------------------------------------------------------

    @field_validator("allow_remote", mode="before")
    @classmethod
    def _checked_remote(cls, value: Any) -> object:
        return checked_remote(value)

    @field_validator("embeddings_cache", mode="before")
    @classmethod
    def _no_cache_by_text(cls, value: object) -> object:
        if value is not None:
            raise ValueError("it is keyed by the bare text, which a question and a document may have in common")
        return value

    @field_serializer("encoder")
    def _dump_encoder(self, encoder: ColQwen3Encoder) -> dict[str, Any]:
        return encoder.to_dict()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickle as settings: no weights; a copy in another process loads the model once there."""
        return type(self).from_dict, (self.to_dict(),)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy the settings; the encoder is a handle, which copies share."""
        return self.__copy__()

    # -- multi-vectors -------------------------------------------------------------------------------------------------

    def get_query_multi_vectors(self, queries: Sequence[str | Query]) -> list[MultiVector]:
        """Give the multi-vectors of questions: texts, or :class:`Query` for a picture.

        Raises:
            EncodeError: one cannot be encoded; ``.index`` says which.
        """
        return self.encoder.submit_queries(queries).result()

    def get_text_multi_vectors(self, texts: Sequence[str]) -> list[MultiVector]:
        """Give the multi-vectors of texts, as documents."""
        return self._encoded(_text_pages(texts))

    def get_image_multi_vectors(self, images: Sequence[Picture]) -> list[MultiVector]:
        """Give the multi-vectors of pictures, as documents."""
        return self._encoded(_image_pages(images))

    def get_node_multi_vectors(self, nodes: Sequence[BaseNode]) -> list[MultiVector]:
        """Give the multi-vectors of nodes: of the picture, or else of the text meant for embedding models."""
        return self._encoded(_node_pages(nodes, self.allow_remote))

    async def aget_query_multi_vectors(self, queries: Sequence[str | Query]) -> list[MultiVector]:
        """Give the multi-vectors of questions without blocking the event loop."""
        return await asyncio.wrap_future(self.encoder.submit_queries(queries))

    async def aget_text_multi_vectors(self, texts: Sequence[str]) -> list[MultiVector]:
        """Give the multi-vectors of texts without blocking the event loop."""
        return await self._aencoded(_text_pages(texts))

    async def aget_image_multi_vectors(self, images: Sequence[Picture]) -> list[MultiVector]:
        """Give the multi-vectors of pictures without blocking the event loop."""
        return await self._aencoded(_image_pages(images))

    async def aget_node_multi_vectors(self, nodes: Sequence[BaseNode]) -> list[MultiVector]:
        """Give the multi-vectors of nodes without blocking the event loop."""
        return await self._aencoded(await asyncio.to_thread(_node_pages, nodes, self.allow_remote))

    # -- one vector each -----------------------------------------------------------------------------------------------

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._flat(self.get_query_multi_vectors([query]), is_query=True)[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        made = await self.aget_query_multi_vectors([query])
        return (await asyncio.to_thread(self._flat, made, is_query=True))[0]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._aget_text_embeddings([text]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._flat(self.get_text_multi_vectors(texts))

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._flat, await self.aget_text_multi_vectors(texts))

    def _get_image_embedding(self, img_file_path: Picture) -> list[float]:
        return self._get_image_embeddings([img_file_path])[0]

    async def _aget_image_embedding(self, img_file_path: Picture) -> list[float]:
        return (await self._aget_image_embeddings([img_file_path]))[0]

    def _get_image_embeddings(self, img_file_paths: Sequence[Picture]) -> list[list[float]]:
        return self._flat(self.get_image_multi_vectors(img_file_paths))

    async def _aget_image_embeddings(self, img_file_paths: Sequence[Picture]) -> list[list[float]]:
        return await asyncio.to_thread(self._flat, await self.aget_image_multi_vectors(img_file_paths))

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def __call__(self, nodes: Sequence[BaseNode], show_progress: bool = False, **kwargs: Any) -> Sequence[BaseNode]:
        """Set the embedding of each node, of its picture or else of its text, and give the nodes back.

        Raises:
            EncodeError: a node that cannot be encoded; ``.index`` is its position. No node is changed.
        """
        made: list[list[float]] = []
        for first in get_tqdm_iterable(self._firsts(nodes), show_progress, "Generating embeddings"):
            batch = nodes[first : first + self.embed_batch_size]
            with self._reported(batch) as done:
                try:
                    made += done(self._flat(self.get_node_multi_vectors(batch)))
                except EncodeError as exc:
                    raise _moved(exc, first) from exc
        return _with_embeddings(nodes, made)

    async def acall(self, nodes: Sequence[BaseNode], show_progress: bool = False, **kwargs: Any) -> Sequence[BaseNode]:
        """Set the embedding of each node without blocking the event loop; see :meth:`__call__`."""
        made: list[list[float]] = []
        for first in get_tqdm_iterable(self._firsts(nodes), show_progress, "Generating embeddings"):
            batch = nodes[first : first + self.embed_batch_size]
            with self._reported(batch) as done:
                try:
                    vectors = await self.aget_node_multi_vectors(batch)
                except EncodeError as exc:
                    raise _moved(exc, first) from exc
                made += done(await asyncio.to_thread(self._flat, vectors))
        return _with_embeddings(nodes, made)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _firsts(self, nodes: Sequence[BaseNode]) -> list[int]:
        return list(range(0, len(nodes), self.embed_batch_size))

    def _encoded(self, pages: list[Page]) -> list[MultiVector]:
        return self.encoder.submit_pages(pages).result()

    async def _aencoded(self, pages: list[Page]) -> list[MultiVector]:
        return await asyncio.wrap_future(self.encoder.submit_pages(pages))

    def _flat(self, made: list[MultiVector], *, is_query: bool = False) -> list[list[float]]:
        vectors: list[list[float]] = single_vectors(made, self.settings, is_query=is_query).tolist()
        return vectors

    @contextmanager
    def _reported(self, nodes: Sequence[BaseNode]) -> Generator[Callable[[list[list[float]]], list[list[float]]]]:
        """Tell LlamaIndex's instrumentation and callbacks that nodes are embedded, as its own batches do."""
        dispatcher, told = get_dispatcher(__name__), self.to_payload()
        chunks = [node.get_content(MetadataMode.EMBED) for node in nodes]
        dispatcher.event(EmbeddingStartEvent(model_dict=told))
        with self.callback_manager.event(CBEventType.EMBEDDING, payload={EventPayload.SERIALIZED: told}) as event:

            def done(embeddings: list[list[float]]) -> list[list[float]]:
                event.on_end(payload={EventPayload.CHUNKS: chunks, EventPayload.EMBEDDINGS: embeddings})
                dispatcher.event(EmbeddingEndEvent(chunks=chunks, embeddings=embeddings))
                return embeddings

            yield done


def _text_pages(texts: Sequence[str]) -> list[Page]:
    if isinstance(texts, str):
        raise ConfigError("texts: expected a list of texts, got a single one")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise EncodeError(f"expected a text, got {type(text).__name__}", index=position)
    return [Page(id=f"text {position}", text=text) for position, text in enumerate(texts)]


def _image_pages(images: Sequence[Picture]) -> list[Page]:
    if isinstance(images, str | bytes):
        raise ConfigError("images: expected a list of images, got a single one")
    return _pages(images, lambda position, image: Page(
        id=f"image {position}", image=image.getvalue() if isinstance(image, io.BytesIO) else image
    ))  # fmt: skip


def _node_pages(nodes: Sequence[BaseNode], allow_remote: AllowRemote) -> list[Page]:
    return _pages(nodes, lambda _, node: page_from_node(node, allow_remote))


def _pages(items: Sequence[T], make: Callable[[int, T], Page]) -> list[Page]:
    pages = []
    for position, item in enumerate(items):
        try:
            pages.append(make(position, item))
        except (PageError, ConfigError) as exc:
            raise EncodeError.of(exc, position) from exc
    return pages


def _moved(error: EncodeError, by: int) -> EncodeError:
    """The error of a batch as one of the whole call."""
    return error if error.index is None else error.at(error.index + by)


def _with_embeddings(nodes: Sequence[BaseNode], embeddings: list[list[float]]) -> Sequence[BaseNode]:
    for node, embedding in zip(nodes, embeddings, strict=True):
        node.embedding = embedding
    return nodes
