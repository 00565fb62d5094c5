"""LlamaIndex embedding: one vector a page, text or question for single-vector stores, and their multi-vectors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeVar

from llama_index.core.bridge.pydantic import ConfigDict, Field, ValidationInfo, field_serializer, field_validator
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.constants import DEFAULT_EMBED_BATCH_SIZE
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]  # re-exported unsaid
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent, EmbeddingStartEvent
from llama_index.core.schema import BaseNode, MetadataMode
from llama_index.core.utils import get_tqdm_iterable

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError, EncodeError, PageError
from colqwen3_retrievers.llama_index.nodes import page_from_node
from colqwen3_retrievers.llama_index.pydantic_fields import RemoteHosts, config_errors
from colqwen3_retrievers.pages.images import ImageSource, is_image
from colqwen3_retrievers.pages.page import Page, Query
from colqwen3_retrievers.pages.remote_images import AllowRemote
from colqwen3_retrievers.vectors.multi_vector import MultiVector
from colqwen3_retrievers.vectors.single_vector import Method, SingleVectorSettings, single_vectors

T = TypeVar("T")


class ColQwen3Embedding(MultiModalEmbedding):
    """Embeds texts, page images and questions as one flat vector each, for single-vector stores.

    One vector holds less than a multi-vector: use it to find candidates, and a :class:`ColQwen3Reranker` to order them
    by MaxSim. Where the whole index can be ours, :class:`ColQwen3Retriever` finds more in fewer bytes.
    :class:`~colqwen3_retrievers.vectors.single_vector.SingleVectorSettings` describes how the vector is computed;
    vectors of other settings, or of another model, are not comparable.

    As a transformation it sets each node's embedding to that of its image, or else of its text. ``VectorStoreIndex`` by
    itself would embed the text beside an image, so run it before::

        nodes = IngestionPipeline(transformations=[PageNodes(), embedding]).run(documents=documents)
        index = VectorStoreIndex(nodes, embed_model=embedding)

    Multi-vectors have their own methods (:meth:`get_query_multi_vectors` and so on), because LlamaIndex's nodes, events
    and stores accept flat vectors only. The async methods await the encoder and never block the event loop.

    Args:
        model_name: hub name, folder or ``"tiny"``; None reads ``COLQWEN3_MODEL``, then takes the default checkpoint.
        device: ``"cuda"``, ``"mps"``, ``"cpu"``; None takes the best available one.
        encoder: a ready encoder, instead of ``model_name`` and ``device``.
        dim: number of components of the vectors; more find more.
        method: ``"fde"`` or ``"directions"``.
        embed_batch_size: number of inputs passed to the encoder together, 1 to 2,048; it forms its own batches.
        allow_remote: whether nodes' images given only by a web address are fetched; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.
        num_workers: LlamaIndex's: number of concurrent batches in async calls.
        callback_manager: LlamaIndex's.
        embeddings_cache: LlamaIndex's, not supported: it is keyed by the bare text, so that a question and a document
            with the same words would share a vector.

    Raises:
        ConfigError: an invalid argument.
        EncodeError: an input that cannot be encoded; ``.index`` is its position in its batch.

    Example:
        >>> embedding = ColQwen3Embedding("tiny")                            # nothing is loaded yet
        >>> embedding.model_name, embedding.embed_batch_size
        ('tiny', 10)
        >>> len(embedding.get_query_embedding("what was the revenue?"))                             # doctest: +SKIP
        2048
    """

    model_config = ConfigDict(
        protected_namespaces=("pydantic_model_",), arbitrary_types_allowed=True, validate_assignment=True,
        extra="forbid",
    )  # fmt: skip

    encoder: ColQwen3Encoder
    dim: int = Field(default=2048, strict=True)
    method: Method = "fde"
    allow_remote: RemoteHosts = False

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
            encoder = ColQwen3Encoder.from_dict(encoder)  # contains the model's name and device
        elif encoder is not None and (model_name is not None or device is not None):
            raise ConfigError("encoder: it has a model and a device; give either it or them")
        if encoder is None:
            encoder = ColQwen3Encoder(model_name, device=device)
        if not isinstance(encoder, ColQwen3Encoder):
            raise ConfigError(f"encoder: expected a ColQwen3Encoder, got {type(encoder).__name__}")
        SingleVectorSettings(1, method=method, dim=dim, nearest=1)  # checks both
        fields: dict[str, Any] = {
            "model_name": str(encoder.to_dict()["model"]), "encoder": encoder, "dim": dim, "method": method,
            "allow_remote": allow_remote, "embed_batch_size": embed_batch_size, "num_workers": num_workers,
            "callback_manager": callback_manager or CallbackManager([]), "embeddings_cache": embeddings_cache,
        }  # fmt: skip
        with config_errors():
            super().__init__(**fields)

    @classmethod
    def class_name(cls) -> str:
        """Return the name it is serialised under."""
        return "ColQwen3Embedding"

    @property
    def settings(self) -> SingleVectorSettings:
        """Settings of its vectors, whose fingerprint tells comparable stores; reads the checkpoint's headers."""
        nearest = min(self.dim, SingleVectorSettings(1).nearest)
        return SingleVectorSettings(self.encoder.info.dim, method=self.method, dim=self.dim, nearest=nearest)

    # -- serialisation -------------------------------------------------------------------------------------------------

    @field_validator("embeddings_cache", mode="before")
    @classmethod
    def _refuse_cache(cls, value: object) -> object:
        if value is not None:
            raise ValueError("it is keyed by the bare text, which a question and a document may have in common")
        return value

    @field_validator("embed_batch_size", "num_workers", mode="before")
    @classmethod
    def _whole_numbers(cls, value: object, info: ValidationInfo) -> int | None:
        name = str(info.field_name)
        return None if value is None else whole_number(value, name, least=1 if name == "embed_batch_size" else 0)

    @field_serializer("encoder")
    def _encoder_settings(self, encoder: ColQwen3Encoder) -> dict[str, Any]:
        return encoder.to_dict()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickle as settings, without weights; a copy in another process loads the model once there."""
        return type(self).from_dict, (self.to_dict(),)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy the settings; copies share the encoder."""
        return self.__copy__()

    # -- multi-vectors -------------------------------------------------------------------------------------------------

    def get_query_multi_vectors(self, queries: Sequence[str | Query]) -> list[MultiVector]:
        """Encode questions: texts, or :class:`Query` for an image.

        Returns:
            For each question, a multi-vector (n_tokens, dim of the encoder), float32. So do the methods below.

        Raises:
            EncodeError: one cannot be encoded; ``.index`` is its position.
        """
        return self.encoder.submit_queries(queries).result()

    def get_text_multi_vectors(self, texts: Sequence[str]) -> list[MultiVector]:
        """Encode texts as documents."""
        return self.encoder.submit_pages(_text_pages(texts)).result()

    def get_image_multi_vectors(self, images: Sequence[ImageSource]) -> list[MultiVector]:
        """Encode images as documents."""
        return self.encoder.submit_pages(_image_pages(images)).result()

    def get_node_multi_vectors(self, nodes: Sequence[BaseNode]) -> list[MultiVector]:
        """Encode nodes: their image, or else their text for embedding models."""
        return self.encoder.submit_pages(self._node_pages(nodes)).result()

    async def aget_query_multi_vectors(self, queries: Sequence[str | Query]) -> list[MultiVector]:
        """Encode questions without blocking the event loop."""
        return await asyncio.wrap_future(self.encoder.submit_queries(queries))

    async def aget_text_multi_vectors(self, texts: Sequence[str]) -> list[MultiVector]:
        """Encode texts as documents without blocking the event loop."""
        return await asyncio.wrap_future(self.encoder.submit_pages(_text_pages(texts)))

    async def aget_image_multi_vectors(self, images: Sequence[ImageSource]) -> list[MultiVector]:
        """Encode images as documents without blocking the event loop."""
        return await asyncio.wrap_future(self.encoder.submit_pages(_image_pages(images)))

    async def aget_node_multi_vectors(self, nodes: Sequence[BaseNode]) -> list[MultiVector]:
        """Encode nodes without blocking the event loop."""
        pages = await asyncio.to_thread(self._node_pages, nodes)
        return await asyncio.wrap_future(self.encoder.submit_pages(pages))

    # -- LlamaIndex's embeddings ---------------------------------------------------------------------------------------

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._flat(self.get_query_multi_vectors([query]), is_query=True)[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        multi_vectors = await self.aget_query_multi_vectors([query])
        return (await asyncio.to_thread(self._flat, multi_vectors, is_query=True))[0]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._aget_text_embeddings([text]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._flat(self.get_text_multi_vectors(texts))

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._flat, await self.aget_text_multi_vectors(texts))

    def _get_image_embedding(self, img_file_path: ImageSource) -> list[float]:
        return self._get_image_embeddings([img_file_path])[0]

    async def _aget_image_embedding(self, img_file_path: ImageSource) -> list[float]:
        return (await self._aget_image_embeddings([img_file_path]))[0]

    def _get_image_embeddings(self, img_file_paths: Sequence[ImageSource]) -> list[list[float]]:
        return self._flat(self.get_image_multi_vectors(img_file_paths))

    async def _aget_image_embeddings(self, img_file_paths: Sequence[ImageSource]) -> list[list[float]]:
        return await asyncio.to_thread(self._flat, await self.aget_image_multi_vectors(img_file_paths))

    def _flat(self, multi_vectors: list[MultiVector], *, is_query: bool = False) -> list[list[float]]:
        vectors: list[list[float]] = single_vectors(multi_vectors, self.settings, is_query=is_query).tolist()
        return vectors

    # -- LlamaIndex's transformation -----------------------------------------------------------------------------------

    def __call__(self, nodes: Sequence[BaseNode], show_progress: bool = False, **kwargs: Any) -> Sequence[BaseNode]:
        """Set the embedding of each node, of its image or else of its text, and return the nodes.

        Raises:
            EncodeError: a node that cannot be encoded; ``.index`` is its position. No node is changed.
        """
        embeddings: list[list[float]] = []
        for batch in self._batches(nodes, show_progress):
            with self._reported(batch, len(embeddings)) as report:
                embeddings += report(self._flat(self.get_node_multi_vectors(batch)))
        return _with_embeddings(nodes, embeddings)

    async def acall(self, nodes: Sequence[BaseNode], show_progress: bool = False, **kwargs: Any) -> Sequence[BaseNode]:
        """Set the embedding of each node without blocking the event loop; see :meth:`__call__`."""
        embeddings: list[list[float]] = []
        for batch in self._batches(nodes, show_progress):
            with self._reported(batch, len(embeddings)) as report:
                multi_vectors = await self.aget_node_multi_vectors(batch)
                embeddings += report(await asyncio.to_thread(self._flat, multi_vectors))
        return _with_embeddings(nodes, embeddings)

    def _batches(self, nodes: Sequence[BaseNode], show_progress: bool) -> Iterator[Sequence[BaseNode]]:
        starts = list(range(0, len(nodes), self.embed_batch_size))
        for start in get_tqdm_iterable(starts, show_progress, "Generating embeddings"):
            yield nodes[start : start + self.embed_batch_size]

    @contextmanager
    def _reported(
        self, nodes: Sequence[BaseNode], start: int
    ) -> Generator[Callable[[list[list[float]]], list[list[float]]]]:
        """Report a batch to LlamaIndex's instrumentation and callbacks, and place errors in the whole call."""
        dispatcher, settings = get_dispatcher(__name__), self.to_payload()
        chunks = [node.get_content(MetadataMode.EMBED) for node in nodes]
        dispatcher.event(EmbeddingStartEvent(model_dict=settings))
        with self.callback_manager.event(CBEventType.EMBEDDING, payload={EventPayload.SERIALIZED: settings}) as event:

            def report(embeddings: list[list[float]]) -> list[list[float]]:
                event.on_end(payload={EventPayload.CHUNKS: chunks, EventPayload.EMBEDDINGS: embeddings})
                dispatcher.event(EmbeddingEndEvent(chunks=chunks, embeddings=embeddings))
                return embeddings

            try:
                yield report
            except EncodeError as exc:
                if exc.index is None:
                    raise
                raise exc.at(start + exc.index) from exc

    def _node_pages(self, nodes: Sequence[BaseNode]) -> list[Page]:
        return _pages(nodes, lambda node: page_from_node(node, self.allow_remote))


def _text_pages(texts: Sequence[str]) -> list[Page]:
    if isinstance(texts, str):
        raise ConfigError("texts: expected a list of texts, got a single one")
    return _pages(texts, lambda text: Page(id="text", text=text))


def _image_pages(images: Sequence[ImageSource]) -> list[Page]:
    if isinstance(images, str) or is_image(images):
        raise ConfigError("images: expected a list of images, got a single one")
    return _pages(images, lambda image: Page(id="image", image=image))


def _pages(items: Sequence[T], convert: Callable[[T], Page]) -> list[Page]:
    pages = []
    for position, item in enumerate(items):
        try:
            pages.append(convert(item))
        except (PageError, ConfigError) as exc:
            raise EncodeError.of(exc, position) from exc
    return pages


def _with_embeddings(nodes: Sequence[BaseNode], embeddings: list[list[float]]) -> Sequence[BaseNode]:
    for node, embedding in zip(nodes, embeddings, strict=True):
        node.embedding = embedding
    return nodes
