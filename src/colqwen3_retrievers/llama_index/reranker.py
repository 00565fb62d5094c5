"""LlamaIndex reranker: any nodes in, the best of them out, by MaxSim with the question."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

from llama_index.core.bridge.pydantic import (
    ConfigDict,
    Field,
    PrivateAttr,
    field_serializer,
    field_validator,
)
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]  # re-exported unsaid
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from colqwen3_retrievers.cache.page_cache import PageEmbeddingCache
from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.llama_index.nodes import page_from_node, page_of, query_from_bundle, with_technical
from colqwen3_retrievers.llama_index.pydantic_fields import RemoteHosts, config_errors
from colqwen3_retrievers.pages.files import user_path
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


class ColQwen3Reranker(BaseNodePostprocessor):
    """Reranks nodes of any kind, page images, texts and both mixed, by late interaction.

    Nothing is loaded before the first nodes come. An image is encoded from the image alone (its text joins the prompt
    only with an encoder made with ``include_text=True``), a text with the metadata meant for embedding models. Pages
    seen before are not encoded again: they come from ``index``, or from a bounded cache. The async path awaits the
    encoder and never blocks the event loop. The input nodes are not changed. Equal scores are ordered by node id.

    Args:
        model: hub name, folder or ``"tiny"``; None takes the index's, else reads ``COLQWEN3_MODEL``, else the default.
        device: ``"cuda"``, ``"mps"``, ``"cpu"``; None takes the best available. With ``index`` and no ``model``, it is
            where the index's model runs.
        top_n: most nodes returned, at least 1; None returns all.
        encoder: a ready encoder, instead of ``model`` and ``device``.
        index: a :class:`PageIndex` or the location of one: a node whose id is there takes its stored token embeddings
            (unless its metadata holds another ``sha256``).
        images_dir: with a location outside a folder: where the images of the index are stored, for ``heatmaps``.
        score_mode: ``"sum"`` over query tokens, as a retriever's scores; ``"mean"`` of them, -1..1; or
            ``"relevance"``, (1 + mean) / 2, 0..1. The last two compare from one query to another, as cutoffs need.
        keep_retrieval_score: whether ``metadata["retrieval_score"]`` of the returned nodes is the score they had.
        on_error: for a node that cannot be encoded (a broken image, no content): ``"raise"``; ``"skip"`` it; or
            ``"keep"`` it after the others, the reason in ``metadata["rerank_error"]``; its score is 0.0, or the lowest
            of the others' if that is below, because fusion and sorting in LlamaIndex need a number. Skipping and
            keeping are logged as warnings.
        cache: where token embeddings are kept between calls: a folder, which other processes may share and which
            persists; or a ready :class:`~colqwen3_retrievers.cache.page_cache.PageEmbeddingCache`, whose encoder is
            then used. None keeps them in memory.
        cache_bytes: most bytes of token embeddings kept; 0 keeps none; None takes 512 MB in memory, 8 GB in a folder.
        scoring: ``"client"`` compares token embeddings here; ``"server"`` leaves scoring to the servers of an encoder
            with a url, which encode every node anew on each call: no vectors travel, no ``index`` or ``cache`` helps.
        boxes: most answering regions per node: ``metadata["boxes"]``, see
            :class:`~colqwen3_retrievers.retrieval.evidence.Evidence`; pages without regions, such as texts, have none.
        heatmaps: a folder for overlays: ``metadata["heatmap"]`` is the file of a node's page with the map over it.
            Neither key is shown to language or embedding models.
        allow_remote: whether images known only by a web address are fetched; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`. Otherwise such a node cannot be encoded.
        embed_batch_size: most nodes being encoded at a time, at least 1, for long lists of large images; None starts
            all of them. The encoder cuts its own batches in either case.
        show_progress: whether to draw a progress bar (on a terminal).
        callback_manager: LlamaIndex's; query engines set theirs.

    Raises:
        ConfigError: an argument that cannot be used; nodes without a query.
        EncodeError: with ``on_error="raise"``, a node that cannot be encoded; ``.index`` is its position. Always, the
            query.

    Example:
        >>> from llama_index.core import Settings, VectorStoreIndex
        >>> reranker = ColQwen3Reranker(model="tiny", top_n=3)           # nothing is loaded yet
        >>> reranker.to_dict()["model"], reranker.postprocess_nodes([], query_str="revenue")
        ('tiny', [])
        >>> nodes = ColQwen3Retriever("my-index", similarity_top_k=20).retrieve("revenue")          # doctest: +SKIP
        >>> best = reranker.postprocess_nodes(nodes, query_str="what was the revenue?")             # doctest: +SKIP
        >>> engine = VectorStoreIndex(nodes).as_query_engine(                                       # doctest: +SKIP
        ...     similarity_top_k=20, node_postprocessors=[reranker], multimodal=True)
        >>> print(engine.query("what was the revenue?"))                                            # doctest: +SKIP
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, validate_assignment=True, extra="forbid")

    model: str | None = None
    device: str | None = None
    top_n: int | None = Field(default=5, ge=1, strict=True)
    encoder: ColQwen3Encoder | None = None
    index: PageIndex | str | None = None
    images_dir: str | None = None
    score_mode: ScoreMode = "sum"
    keep_retrieval_score: bool = False
    on_error: OnError = "raise"
    cache: PageEmbeddingCache | str | None = Field(default=None, repr=False)
    cache_bytes: int | None = Field(default=None, ge=0, strict=True)
    scoring: Scoring = "client"
    boxes: int = Field(default=0, ge=0, strict=True)
    heatmaps: str | None = None
    allow_remote: RemoteHosts = False
    embed_batch_size: int | None = Field(default=None, ge=1, strict=True)
    show_progress: bool = False

    _core: Reranker = PrivateAttr()

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str | None = None,
        top_n: int | None = 5,
        encoder: ColQwen3Encoder | dict[str, Any] | None = None,
        index: PageIndex | str | os.PathLike[str] | None = None,
        images_dir: str | os.PathLike[str] | None = None,
        score_mode: ScoreMode = "sum",
        keep_retrieval_score: bool = False,
        on_error: OnError = "raise",
        cache: PageEmbeddingCache | str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
        scoring: Scoring = "client",
        boxes: int = 0,
        heatmaps: str | os.PathLike[str] | None = None,
        allow_remote: AllowRemote = False,
        embed_batch_size: int | None = None,
        show_progress: bool = False,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        fields: dict[str, Any] = {
            "model": model, "device": device, "top_n": top_n, "encoder": encoder, "index": index,
            "images_dir": images_dir, "score_mode": score_mode, "keep_retrieval_score": keep_retrieval_score,
            "on_error": on_error, "cache": cache, "cache_bytes": cache_bytes, "scoring": scoring, "boxes": boxes,
            "heatmaps": heatmaps, "allow_remote": allow_remote,
            "embed_batch_size": embed_batch_size, "show_progress": show_progress,
        }  # fmt: skip
        if callback_manager is not None:
            fields["callback_manager"] = callback_manager
        with config_errors():
            super().__init__(**fields)
        self._core = Reranker(RerankerOptions.of(self))

    @classmethod
    def class_name(cls) -> str:
        """Return the name it is stored under."""
        return "ColQwen3Reranker"

    def close(self) -> None:
        """Close the index and the cache if they were opened here by their location; the next use opens them again."""
        self._core.resources.close()

    # -- as plain data -------------------------------------------------------------------------------------------------

    @field_validator("model", "index", "images_dir", "cache", "heatmaps", mode="before")
    @classmethod
    def _plain_path(cls, value: object) -> object:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("encoder", mode="before")
    @classmethod
    def _encoder_settings(cls, value: object) -> object:
        return ColQwen3Encoder.from_dict(value) if isinstance(value, dict) else value

    @field_serializer("encoder")
    def _dump_encoder(self, encoder: ColQwen3Encoder | None) -> dict[str, Any] | None:
        return None if encoder is None else encoder.to_dict()

    @field_serializer("index")
    def _dump_index(self, index: PageIndex | str | None) -> str | None:
        location = index.location if isinstance(index, PageIndex) else index
        return location if location is None or "://" in location else str(user_path(location).absolute())

    @field_serializer("cache")
    def _dump_cache(self, cache: PageEmbeddingCache | str | None) -> str | None:
        folder = cache.folder if isinstance(cache, PageEmbeddingCache) else cache
        return None if folder is None else str(user_path(folder).absolute())

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickle as settings: no weights, no embeddings; a copy in another process loads the model once there."""
        return type(self).from_dict, (self.to_dict(),)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy the settings; encoder, index and cache are handles, which copies share."""
        return self.__copy__()

    # -- reranking -----------------------------------------------------------------------------------------------------

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if not nodes:
            return []
        query, core = query_from_bundle(query_bundle), self._reranker()
        with self._events(nodes, query_bundle, core.resources.model_name) as finish:
            return finish(self._ranked_nodes(nodes, core.rerank(self._candidates(nodes), query)))

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if not nodes:
            return []
        query, core = query_from_bundle(query_bundle), self._reranker()
        model = await asyncio.to_thread(lambda: core.resources.model_name)
        with self._events(nodes, query_bundle, model) as finish:
            return finish(self._ranked_nodes(nodes, await core.arerank(self._candidates(nodes), query)))

    def _reranker(self) -> Reranker:
        """Return the core by the settings of now, which may have changed since the last call."""
        self._core = self._core.with_options(RerankerOptions.of(self))
        return self._core

    def _candidates(self, nodes: list[NodeWithScore]) -> list[Candidate]:
        return [
            Candidate(
                page=partial(page_from_node, given.node, self.allow_remote),
                name=f"node {position} (id {given.node_id!r})",
                ids=tuple(name for name in (given.node_id, page_of(given.node)) if name),
                sha256=given.node.metadata.get("sha256"),
            )
            for position, given in enumerate(nodes)
        ]

    def _ranked_nodes(self, nodes: list[NodeWithScore], ranking: list[Ranked]) -> list[NodeWithScore]:
        without_score = min([0.0, *(ranked.score for ranked in ranking if ranked.score is not None)])
        return [self._ranked_node(nodes[ranked.position], ranked, without_score) for ranked in ranking]

    def _ranked_node(self, given: NodeWithScore, ranked: Ranked, without_score: float) -> NodeWithScore:
        node, technical = given.node, dict(ranked.metadata)
        plain = ranked.plain(node.metadata)
        if plain != node.metadata:
            node = node.model_copy(update={"metadata": plain})
        if self.keep_retrieval_score:
            technical["retrieval_score"] = None if given.score is None else float(given.score)
        score = without_score if ranked.score is None else ranked.score
        return NodeWithScore(node=with_technical(node, technical), score=score)

    @contextmanager
    def _events(
        self, nodes: list[NodeWithScore], bundle: QueryBundle | None, model: str
    ) -> Generator[Callable[[list[NodeWithScore]], list[NodeWithScore]]]:
        """Report the start to LlamaIndex's instrumentation and callbacks, and its end by the function yielded."""
        dispatcher, candidates = get_dispatcher(__name__), list(nodes)
        top_n = len(nodes) if self.top_n is None else self.top_n
        dispatcher.event(ReRankStartEvent(query=bundle, nodes=candidates, top_n=top_n, model_name=model))
        payload: dict[str, Any] = {
            EventPayload.NODES: candidates,
            EventPayload.MODEL_NAME: model,
            EventPayload.QUERY_STR: bundle.query_str if bundle is not None else "",
            EventPayload.TOP_K: top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:

            def finish(ranked: list[NodeWithScore]) -> list[NodeWithScore]:
                event.on_end(payload={EventPayload.NODES: ranked})
                dispatcher.event(ReRankEndEvent(nodes=ranked))
                return ranked

            yield finish
