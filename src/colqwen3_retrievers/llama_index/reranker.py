"""LlamaIndex reranker: any nodes in, the best of them out, by MaxSim with the question."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal, Self

from llama_index.core.bridge.pydantic import (
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_serializer,
    field_validator,
)
from llama_index.core.callbacks import CallbackManager
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle
from PIL import Image

from colqwen3_retrievers.cache.page_cache import PageEmbeddingCache, result_at
from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.encoding.server_scores import server_scores
from colqwen3_retrievers.errors import ConfigError, EncodeError, require
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.llama_index.candidates import Candidates
from colqwen3_retrievers.llama_index.nodes import page_from_node, query_from_bundle, with_technical
from colqwen3_retrievers.llama_index.reranker_tools import Tools, check_together, reported
from colqwen3_retrievers.pages.files import user_path
from colqwen3_retrievers.pages.page import Query
from colqwen3_retrievers.pages.remote_images import AllowRemote, checked_remote
from colqwen3_retrievers.retrieval.evidence import Evidence, indexed_picture, without_evidence
from colqwen3_retrievers.stores.protocol import Record
from colqwen3_retrievers.vectors.late_interaction import relevance
from colqwen3_retrievers.vectors.multi_vector import MultiVector

_log = logging.getLogger(__name__)

Reported = AbstractContextManager[Callable[[list[NodeWithScore]], list[NodeWithScore]]]


class ColQwen3Reranker(BaseNodePostprocessor):
    """Reranks nodes of any kind, page images, texts and both mixed, by late interaction.

    Nothing is loaded before the first nodes come. A picture is encoded from the picture alone (its text joins the
    prompt only with an encoder made with ``include_text=True``), a text with the metadata meant for embedding models.
    Pages seen before are not encoded again: they come from ``index``, or from a bounded cache. The async path
    awaits the encoder and never blocks the event loop. The nodes handed in are left as they are.

    Args:
        model: hub name, folder or ``"tiny"``; None reads ``COLQWEN3_MODEL``, then takes the default checkpoint.
        device: ``"cuda"``, ``"mps"``, ``"cpu"``; None takes the best there is.
        top_n: most nodes given back, at least 1; None gives all.
        encoder: a ready encoder, instead of ``model`` and ``device``.
        index: a :class:`PageIndex` or the location of one: a node whose id is there takes its stored token embeddings
            (unless its metadata tells another ``sha256``). Without ``encoder`` and ``model``, the index's encoder.
        images_dir: with a location: where the images of an index elsewhere than in a folder lie, for ``heatmaps``.
        score_mode: ``"sum"`` over query tokens; ``"mean"`` of them, -1..1; or ``"relevance"``, (1 + mean) / 2, 0..1.
            The last two compare from one question to another, as cutoffs need.
        keep_retrieval_score: whether ``metadata["retrieval_score"]`` of the nodes given back holds the score they had.
        on_error: a node that cannot be encoded (broken picture, nothing in it): ``"raise"``, ``"skip"`` it, or
            ``"keep"`` it after the others, without a score. Skipping and keeping are logged as warnings.
        cache: where token embeddings are kept between calls: a folder, which other processes may share and which is
            there the next time; or a ready :class:`~colqwen3_retrievers.cache.page_cache.PageEmbeddingCache`, whose
            encoder is then taken. None keeps them in memory.
        cache_bytes: most bytes of token embeddings kept; 0 keeps none; None takes 512 MB in memory, 8 GB in a folder.
        scoring: ``"client"`` compares token embeddings here; ``"server"`` leaves scoring to the servers of an encoder
            with a url, which encode every node anew on each call: no vectors travel, no ``index`` or ``cache`` helps.
        boxes: most regions that answered, a node: ``metadata["boxes"]``, see
            :class:`~colqwen3_retrievers.retrieval.evidence.Evidence`; pages without regions, such as texts, get none.
        heatmaps: a folder for pictures of them: ``metadata["heatmap"]`` is the file of a node's page with the map over
            it. Neither key is shown to language or embedding models.
        allow_remote: whether pictures known by a web address only are fetched; see
            :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`. Else such a node cannot be encoded.
        embed_batch_size: most nodes under way at a time, at least 1, for long lists of large pictures; None starts all
            of them. The encoder cuts its own batches in either case.
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
    score_mode: Literal["sum", "mean", "relevance"] = "sum"
    keep_retrieval_score: bool = False
    on_error: Literal["raise", "skip", "keep"] = "raise"
    cache: PageEmbeddingCache | str | None = Field(default=None, repr=False)
    cache_bytes: int | None = Field(default=None, ge=0, strict=True)
    scoring: Literal["client", "server"] = "client"
    boxes: int = Field(default=0, ge=0, strict=True)
    heatmaps: str | None = None
    allow_remote: bool | tuple[str, ...] = False
    embed_batch_size: int | None = Field(default=None, ge=1, strict=True)
    show_progress: bool = False

    _lock: Any = PrivateAttr(default_factory=threading.Lock)
    _tools: Tools | None = PrivateAttr(default=None)

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str | None = None,
        top_n: int | None = 5,
        encoder: ColQwen3Encoder | dict[str, Any] | None = None,
        index: PageIndex | str | os.PathLike[str] | None = None,
        images_dir: str | os.PathLike[str] | None = None,
        score_mode: Literal["sum", "mean", "relevance"] = "sum",
        keep_retrieval_score: bool = False,
        on_error: Literal["raise", "skip", "keep"] = "raise",
        cache: PageEmbeddingCache | str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
        scoring: Literal["client", "server"] = "client",
        boxes: int = 0,
        heatmaps: str | os.PathLike[str] | None = None,
        allow_remote: AllowRemote = False,
        embed_batch_size: int | None = None,
        show_progress: bool = False,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        check_together(
            model, device, encoder=encoder, index=index, cache=cache, cache_bytes=cache_bytes, scoring=scoring,
            evidence=bool(boxes) or heatmaps is not None, images_dir=images_dir,
        )  # fmt: skip
        fields: dict[str, Any] = {
            "model": model, "device": device, "top_n": top_n, "encoder": encoder, "index": index,
            "images_dir": images_dir, "score_mode": score_mode, "keep_retrieval_score": keep_retrieval_score,
            "on_error": on_error, "cache": cache, "cache_bytes": cache_bytes, "scoring": scoring, "boxes": boxes,
            "heatmaps": heatmaps, "allow_remote": checked_remote(allow_remote),
            "embed_batch_size": embed_batch_size, "show_progress": show_progress,
        }  # fmt: skip
        if callback_manager is not None:
            fields["callback_manager"] = callback_manager
        try:
            super().__init__(**fields)
        except ValidationError as exc:
            first = exc.errors(include_url=False)[0]
            ours = first.get("ctx", {}).get("error")  # an error of a validator of ours says it all
            said = str(ours) if ours is not None else f"{first['msg']}, got {first['input']!r}"
            raise ConfigError(f"{first['loc'][0]}: {said}") from exc

    @classmethod
    def class_name(cls) -> str:
        """Give the name it is stored under."""
        return "ColQwen3Reranker"

    def close(self) -> None:
        """Close the index if it was opened here by its location; the next use opens it again."""
        with self._lock:
            tools, self._tools = self._tools, None
        if tools is not None and tools.index is not None and tools.index is not self.index:
            tools.index.close()

    # -- as plain data -------------------------------------------------------------------------------------------------

    @field_validator("model", "index", "images_dir", "cache", "heatmaps", mode="before")
    @classmethod
    def _plain_path(cls, value: object) -> object:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("allow_remote", mode="before")
    @classmethod
    def _checked_remote(cls, value: Any) -> object:
        return checked_remote(value)

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
        query = query_from_bundle(query_bundle)
        tools = self._opened()
        with self._reported(nodes, query_bundle, tools) as done, self._candidates() as candidates:
            if self.scoring == "server":
                return done(self._scored_there(nodes, query, tools))
            candidates.start(nodes, query, tools, self.embed_batch_size)
            asked = candidates.query.result()[0]
            with self._progress(len(nodes)) as advance:
                for position in range(len(nodes)):
                    candidates.reach(position)
                    self._settle(candidates, position, nodes)
                    advance()
            return done(self._ranked(nodes, candidates, asked, tools))

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if not nodes:
            return []
        query = query_from_bundle(query_bundle)
        tools = await asyncio.to_thread(self._opened)
        with self._reported(nodes, query_bundle, tools) as done, self._candidates() as candidates:
            if self.scoring == "server":
                return done(await asyncio.to_thread(self._scored_there, nodes, query, tools))
            await asyncio.to_thread(candidates.start, nodes, query, tools, self.embed_batch_size)
            asked = (await asyncio.wrap_future(candidates.query))[0]
            with self._progress(len(nodes)) as advance:
                for position in range(len(nodes)):
                    if candidates.is_waiting(position):
                        await asyncio.to_thread(candidates.reach, position)
                    future = candidates.pages.get(position)
                    if future is not None:
                        await asyncio.gather(asyncio.wrap_future(future), return_exceptions=True)
                    self._settle(candidates, position, nodes)
                    advance()
            return done(await asyncio.to_thread(self._ranked, nodes, candidates, asked, tools))

    def _opened(self) -> Tools:
        """Make encoder, index and cache at the first use, and again when a setting they stand on was changed."""
        with self._lock:
            settings = (
                self.model, self.device, id(self.encoder), _identity(self.cache), self.cache_bytes,
                _identity(self.index), self.images_dir,
            )  # fmt: skip
            if self._tools is None or self._tools.settings != settings:
                self._tools = Tools.open(
                    settings, self.model, self.device, self.encoder, self.index, self.cache, self.cache_bytes,
                    self.images_dir,
                )  # fmt: skip
            return self._tools

    def _settle(self, candidates: Candidates, position: int, nodes: list[NodeWithScore]) -> None:
        """Take a page's multi-vector, or do as ``on_error`` says with a node that has none."""
        try:
            if (broken := candidates.broken.get(position)) is not None:
                raise EncodeError.of(broken, position) from broken
            if (future := candidates.pages.get(position)) is not None:
                candidates.vectors[position] = result_at(future, position)
        except EncodeError as exc:
            self._refuse(nodes[position], exc)

    def _refuse(self, given: NodeWithScore, exc: EncodeError) -> None:
        if self.on_error == "raise":
            raise exc
        _log.warning("node %r is %s: %s", given.node_id, "skipped" if self.on_error == "skip" else "kept last", exc)

    def _scored_there(self, nodes: list[NodeWithScore], query: Query, tools: Tools) -> list[NodeWithScore]:
        pages = [partial(page_from_node, given.node, self.allow_remote) for given in nodes]
        found = server_scores(tools.encoder, query, pages)
        for place, exc in found.broken.items():
            self._refuse(nodes[place], exc)
        return [given for _, given in self._in_order(nodes, found.sums, found.n_query_tokens)]

    def _ranked(
        self, nodes: list[NodeWithScore], candidates: Candidates, query: MultiVector, tools: Tools
    ) -> list[NodeWithScore]:
        """Score what has vectors."""
        places = sorted(candidates.vectors)
        documents = [candidates.vectors[place] for place in places]
        sums = tools.encoder.score([query], documents)[0].tolist() if places else []
        ranked = self._in_order(nodes, dict(zip(places, sums, strict=True)), len(query))
        evidence = Evidence(self.boxes, self.heatmaps)
        if not evidence.wanted:
            return [given for _, given in ranked]
        shown = []
        for place, given in ranked:
            picture = partial(self._picture, given.node, candidates.kept.get(place))
            told = evidence.of_page(query, candidates.vectors.get(place), picture, given.node_id)
            plain = without_evidence(given.node.metadata)  # what another question was told goes first
            node = with_technical(given.node.model_copy(update={"metadata": plain}), told)
            shown.append(NodeWithScore(node=node, score=given.score))
        return shown

    def _picture(self, node: BaseNode, record: Record | None) -> Image.Image | None:
        kept = None if record is None else indexed_picture(record)  # what the index's vectors were made of
        return page_from_node(node, self.allow_remote).image if kept is None else kept

    def _candidates(self) -> Candidates:
        return Candidates(allow_remote=self.allow_remote)

    def _in_order(
        self, nodes: list[NodeWithScore], sums: dict[int, float], n_tokens: int
    ) -> list[tuple[int, NodeWithScore]]:
        """Give places and nodes with a score, best first; equal scores by id, then as they came."""
        divisor = 1 if self.score_mode == "sum" else n_tokens
        scores = {place: value / divisor for place, value in sums.items()}
        if self.score_mode == "relevance":
            scores = {place: relevance(value, n_tokens) for place, value in sums.items()}
        order = sorted(scores, key=lambda i: (-scores[i], nodes[i].node_id, i))
        if self.on_error == "keep":
            order += [i for i in range(len(nodes)) if i not in scores]
        return [(i, self._scored(nodes[i], scores.get(i))) for i in order[: self.top_n]]

    def _scored(self, given: NodeWithScore, score: float | None) -> NodeWithScore:
        node = given.node
        if self.keep_retrieval_score:
            node = with_technical(node, {"retrieval_score": None if given.score is None else float(given.score)})
        return NodeWithScore(node=node, score=score)

    def _reported(self, nodes: list[NodeWithScore], bundle: QueryBundle | None, tools: Tools) -> Reported:
        name, most = str(tools.encoder.to_dict()["model"]), len(nodes) if self.top_n is None else self.top_n
        return reported(nodes, bundle, model=name, top_n=most, callback_manager=self.callback_manager)

    @contextmanager
    def _progress(self, total: int) -> Generator[Callable[[], object]]:
        if not self.show_progress:
            yield lambda: None
            return
        with require("torch", "tqdm").tqdm(total=total, unit=" nodes", disable=None) as bar:
            yield bar.update


def _identity(given: PageIndex | PageEmbeddingCache | str | None) -> object:
    return given if isinstance(given, str) else id(given)
