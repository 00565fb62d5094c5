"""The reranking core: the ``ColQwen3Reranker`` of each framework only translates to and from it.

A candidate takes one of three ways. Its token embeddings are read from the index, if they are stored there. Otherwise
its page is made and submitted to the cache, which gives a future: already done for a known page, else completed by the
encoder's worker. With ``scoring="server"`` its page is sent to a server, and only a score comes back. The work of a
call is a generator of blocking steps, which yields one future at a time to wait for. The sync path runs the steps in
the caller's thread; the async path runs each in a thread and awaits the futures on the event loop.

Rules, the same in every framework:

- Equal scores are ordered by id; candidates without an id come after them, in the order given.
- ``device`` with ``index`` and no ``model`` is the device of the index's own model.
- ``score_mode`` is ``"sum"`` unless the framework wants a relevance from 0 to 1 (LangChain's ``relevance_score``).
- A bad candidate raises, is skipped, or is kept last without a score, as ``on_error`` says. A bad query, a model that
  cannot be loaded and an engine that cannot compute always raise.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, Protocol, Self, TypeAlias, cast

from PIL import Image

from colqwen3_retrievers.cache.page_cache import PageEmbeddingCache, PageSubmitter
from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.encoding.server_scores import server_scores
from colqwen3_retrievers.errors import ColQwen3Error, ConfigError, EncodeError, PageError
from colqwen3_retrievers.fork import ForkSafeLock
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.pages.page import Page, Query
from colqwen3_retrievers.progress import progress_bar
from colqwen3_retrievers.retrieval.evidence import Evidence, indexed_picture, without_evidence
from colqwen3_retrievers.stores.protocol import Record, check_info
from colqwen3_retrievers.vectors.kernels import default_kernel
from colqwen3_retrievers.vectors.late_interaction import maxsim, relevance
from colqwen3_retrievers.vectors.multi_vector import MultiVector

ScoreMode: TypeAlias = Literal["sum", "mean", "relevance"]
OnError: TypeAlias = Literal["raise", "skip", "keep"]
Scoring: TypeAlias = Literal["client", "server"]

RERANK_ERROR: Final = "rerank_error"
"""Metadata key under which ``on_error="keep"`` gives the reason why a candidate has no score."""

_log = logging.getLogger(__name__)


class RerankEncoder(PageSubmitter, Protocol):
    """What reranking needs of an encoder, such as a :class:`~colqwen3_retrievers.encoding.encoder.ColQwen3Encoder`."""

    def submit_queries(self, queries: Iterable[str | Query], /) -> Future[list[MultiVector]]:
        """Start encoding queries."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankerOptions:
    """Arguments of a reranker, checked together; the ``ColQwen3Reranker`` of each framework describes them.

    Raises:
        ConfigError: arguments that contradict each other; the message names them.

    >>> RerankerOptions(index="my-index", device="cpu").score_mode
    'sum'
    >>> RerankerOptions(scoring="server", boxes=1)
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: scoring='server': no vectors travel, so there are neither boxes nor heatmaps
    """

    model: str | os.PathLike[str] | None = None
    device: str | None = None
    encoder: ColQwen3Encoder | None = None
    index: PageIndex | str | os.PathLike[str] | None = None
    images_dir: str | os.PathLike[str] | None = None
    cache: PageEmbeddingCache | str | os.PathLike[str] | None = None
    cache_bytes: int | None = None
    top_n: int | None = None
    score_mode: ScoreMode = "sum"
    score_threshold: float | None = None
    on_error: OnError = "raise"
    scoring: Scoring = "client"
    boxes: int = 0
    heatmaps: str | os.PathLike[str] | None = None
    embed_batch_size: int | None = None
    show_progress: bool = False

    def __post_init__(self) -> None:
        for name, least in (("top_n", 1), ("cache_bytes", 0), ("embed_batch_size", 1)):
            if (value := getattr(self, name)) is not None:
                whole_number(value, name, least=least)
        named = self.model is not None or self.device is not None
        if self.encoder is not None and named:
            raise ConfigError("encoder: give it, or model and device, not both")
        if isinstance(self.cache, PageEmbeddingCache):
            if named:
                raise ConfigError("cache: it has an encoder; give it, or model and device, not both")
            if self.cache_bytes is not None:
                raise ConfigError("cache_bytes: the cache has its own bound; give either of them")
            if self.encoder is not None and self.encoder is not self.cache.encoder:
                raise ConfigError("cache: it belongs to another encoder")
        if self.images_dir is not None and (self.index is None or isinstance(self.index, PageIndex)):
            raise ConfigError("images_dir: requires index= as a location; an open index has its own")
        evidence = Evidence(self.boxes, self.heatmaps)
        if self.scoring == "server" and not (self.index is None and self.cache is None and self.cache_bytes is None):
            raise ConfigError("scoring='server': every candidate is encoded anew; give neither index nor cache")
        if self.scoring == "server" and evidence.wanted:
            raise ConfigError("scoring='server': no vectors travel, so there are neither boxes nor heatmaps")

    @classmethod
    def of(cls, reranker: object) -> Self:
        """Return the options that are attributes of a framework's reranker."""
        names = [option.name for option in dataclasses.fields(cls) if hasattr(reranker, option.name)]
        return cls(**{name: getattr(reranker, name) for name in names})


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node or document to rank.

    Attributes:
        page: makes the page to encode, when it is needed; may raise PageError or ConfigError.
        name: what errors and warnings call it.
        ids: its id, if it has one, and other ids under which an index may hold it.
        sha256: digest of its content; an indexed page of another digest is not the same.
    """

    page: Callable[[], Page]
    name: str
    ids: tuple[str, ...] = ()
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate in its new order.

    Attributes:
        position: in the candidates given, from 0.
        score: on the scale of ``score_mode``; None for a bad candidate that was kept.
        metadata: what to add to its metadata: evidence, or the reason why it has no score.
        without_evidence: whether evidence of an earlier query must go from its metadata first.
    """

    position: int
    score: float | None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    without_evidence: bool = False

    def plain(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return metadata without what an earlier reranking added.

        >>> Ranked(0, 1.5).plain({"year": 2024, "rerank_error": "no such file"})
        {'year': 2024}
        """
        rest = without_evidence(metadata) if self.without_evidence else metadata
        return {key: value for key, value in rest.items() if key != RERANK_ERROR}


class Reranker:
    """Ranks candidates by MaxSim with a query, by :class:`RerankerOptions`.

    Nothing is opened before the first candidates come. May be used from several threads and event loops.

    Args:
        options: arguments of the framework's reranker.
        resources: an encoder, index and cache to share with another reranker.

    >>> reranker = Reranker(RerankerOptions(model="tiny", top_n=1))                    # nothing is loaded yet
    >>> texts = ["the cat sat", "revenue rose by 7 %"]
    >>> candidates = [Candidate(partial(Page, id=text, text=text), text, (text,)) for text in texts]
    >>> [(ranked.position, type(ranked.score)) for ranked in reranker.rerank(candidates, Query("revenue"))]
    [(1, <class 'float'>)]
    """

    def __init__(self, options: RerankerOptions, resources: Resources | None = None) -> None:
        self.options = options
        self.resources = Resources(options) if resources is None else resources

    def with_options(self, options: RerankerOptions) -> Reranker:
        """Return a reranker by other options; it shares the encoder, index and cache if they are to be the same."""
        if options == self.options:
            return self
        return Reranker(options, self.resources if self.resources.serve(options) else None)

    def rerank(self, candidates: Sequence[Candidate], query: Query) -> list[Ranked]:
        """Return the best candidates, best first.

        Args:
            candidates: in any order; none need no model.
            query: a text, an image, or both.

        Raises:
            ConfigError: the encoder, index and cache do not go together.
            StoreError: no index at the location; StoreMismatchError, it was made by another model.
            EncodeError: the query; or with ``on_error="raise"`` a candidate, whose position is ``.index``.
            ColQwen3Error: the model cannot be loaded, or the engine cannot compute.
        """
        if not candidates:
            return []
        with _Call(self, candidates, query) as call:
            for pending in call.steps():
                pending.result()
            return call.ranking

    async def arerank(self, candidates: Sequence[Candidate], query: Query) -> list[Ranked]:
        """Rerank without blocking the event loop; cancelling it cancels the encoding. See :meth:`rerank`."""
        if not candidates:
            return []
        with _Call(self, candidates, query) as call:
            steps = call.steps()
            while (pending := await asyncio.to_thread(next, steps, None)) is not None:
                await asyncio.wrap_future(pending)
            return call.ranking


class Resources:
    """The encoder, index and cache of a reranker and its copies, opened at the first use.

    Attributes:
        encoder, index, cache: once :meth:`open` was called.

    >>> resources = Resources(RerankerOptions(model="tiny"))
    >>> resources.open().encoder, resources.model_name                                    # nothing is loaded yet
    (ColQwen3Encoder(model='tiny'), 'tiny')
    """

    encoder: RerankEncoder
    index: PageIndex | None
    cache: PageEmbeddingCache

    def __init__(self, options: RerankerOptions) -> None:
        self._options = options
        self._lock = ForkSafeLock()
        self._handles: contextlib.ExitStack | None = None

    def serve(self, options: RerankerOptions) -> bool:
        """Return whether other options mean the same encoder, index and cache."""
        names = ("model", "device", "encoder", "index", "images_dir", "cache", "cache_bytes")
        return all(getattr(options, name) == getattr(self._options, name) for name in names)

    def open(self) -> Self:
        """Open what is not open yet; it reads files, so on an event loop call it in a thread.

        Raises:
            ConfigError: the encoder, index and cache do not go together.
            StoreError: no index at the location; StoreMismatchError, it was made by another model.
        """
        with self._lock, contextlib.ExitStack() as handles:
            if self._handles is not None:
                return self
            index, cache = self._options.index, self._options.cache
            if index is not None and not isinstance(index, PageIndex):
                images_dir = self._options.images_dir
                index = handles.enter_context(PageIndex.open(index, images_dir=images_dir, read_only=True))
            encoder = self._encoder(index)
            if index is not None:
                check_info(index.info, encoder.info, index.location)
            if not isinstance(cache, PageEmbeddingCache):
                cache = PageEmbeddingCache(encoder, self._options.cache_bytes, folder=cache)
                handles.enter_context(cache)
            self.encoder, self.index, self.cache = encoder, index, cache
            self._handles = handles.pop_all()
            return self

    @property
    def model_name(self) -> str:
        """Name of the model, for events and traces; like :meth:`open`, it may read files."""
        encoder = self.open().encoder
        return str(encoder.to_dict()["model"] if isinstance(encoder, ColQwen3Encoder) else encoder.info.model)

    def close(self) -> None:
        """Close the index and the cache that were opened here; the next use opens them again."""
        with self._lock:
            handles, self._handles = self._handles, None
        if handles is not None:
            handles.close()

    def _encoder(self, index: PageIndex | None) -> RerankEncoder:
        options = self._options
        if options.encoder is not None:
            return options.encoder
        if isinstance(options.cache, PageEmbeddingCache):
            return cast(RerankEncoder, options.cache.encoder)
        if index is None or options.model is not None:
            return ColQwen3Encoder(options.model, device=options.device)
        encoder = index.encoder
        if options.device is None:
            return cast(RerankEncoder, encoder)
        if not isinstance(encoder, ColQwen3Encoder):
            raise ConfigError(f"device: the encoder of the index is a {type(encoder).__name__}, which has none")
        return ColQwen3Encoder.from_dict({**encoder.to_dict(), "device": options.device})


class _Call:
    """One call of a reranker.

    After the last of its :meth:`steps`, ``ranking`` is the result. Leaving the block cancels what was submitted, and
    what a step that still runs in another thread will submit.
    """

    def __init__(self, reranker: Reranker, candidates: Sequence[Candidate], query: Query) -> None:
        self.ranking: list[Ranked] = []
        self._options = reranker.options
        self._resources = reranker.resources
        self._candidates = candidates
        self._query = query
        self._vectors: dict[int, MultiVector] = {}
        self._records: dict[int, Record] = {}
        self._errors: dict[int, EncodeError] = {}
        self._submitted: list[Future[Any]] = []
        self._left = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        self._cancel()

    def steps(self) -> Iterator[Future[None]]:
        """Do the blocking work in steps, and yield a future to wait for between them."""
        resources, candidates = self._resources.open(), self._candidates
        if self._options.scoring == "server":
            makers = [partial(self._page, position) for position in range(len(candidates))]
            scores = server_scores(cast(ColQwen3Encoder, resources.encoder), self._query, makers)
            for position, error in scores.broken.items():
                self._refuse(position, error)
            self.ranking = self._ranked(scores.sums, scores.n_query_tokens)
            return
        query = resources.encoder.submit_queries([self._query])
        self._watch([query])
        if resources.index is not None:
            self._look_up(resources.index)
        positions = [position for position in range(len(candidates)) if position not in self._vectors]
        size = self._options.embed_batch_size or max(1, len(positions))
        with progress_bar(self._options.show_progress, len(candidates), "pages") as bar:
            bar.update(len(self._vectors))
            for first in range(0, max(1, len(positions)), size):
                pending = self._submit(positions[first : first + size], resources.cache, bar.update)
                while pending or not query.done():
                    yield _settled([query, *pending.values()])
                    if query.done():
                        query.result()  # an error of the query needs no page
                    for position in [position for position, page in pending.items() if page.done()]:
                        self._settle(position, pending.pop(position))
        [vectors] = query.result()
        pages = list(self._vectors.values())
        sums = maxsim(vectors, pages, kernel=default_kernel())[0].tolist() if pages else []
        ranking = self._ranked(dict(zip(self._vectors, sums, strict=True)), len(vectors))
        self.ranking = [self._with_evidence(ranked, vectors) for ranked in ranking]

    def _watch(self, futures: Iterable[Future[Any]]) -> None:
        self._submitted.extend(futures)
        if self._left:  # the task was cancelled while this thread was submitting
            self._cancel()

    def _cancel(self) -> None:
        for future in self._submitted:
            future.cancel()

    def _look_up(self, index: PageIndex) -> None:
        """Read the token embeddings of candidates that the index holds."""
        ids = dict.fromkeys(itertools.chain.from_iterable(candidate.ids for candidate in self._candidates))
        records = {record.page.id: record for record in index.get(ids, vectors=True)}
        for position, candidate in enumerate(self._candidates):
            record = next((records[name] for name in candidate.ids if name in records), None)
            if record is None or record.multi_vector is None:
                continue
            if candidate.sha256 in (None, record.page.sha256):
                self._records[position], self._vectors[position] = record, record.multi_vector

    def _submit(
        self, positions: Sequence[int], cache: PageEmbeddingCache, advance: Callable[[int], object]
    ) -> dict[int, Future[MultiVector]]:
        pages: dict[int, Page] = {}
        for position in positions:
            try:
                pages[position] = self._page(position)
            except (PageError, ConfigError) as exc:
                self._refuse(position, exc)
                advance(1)
        pending = dict(zip(pages, cache.submit(pages.values()), strict=True))
        self._watch(pending.values())
        for future in pending.values():
            future.add_done_callback(lambda _: advance(1))
        return pending

    def _page(self, position: int) -> Page:
        page = self._candidates[position].page()
        if page.image_source is None and page.video is None and not page.text.strip():
            raise ConfigError("neither a text nor an image")
        return page

    def _settle(self, position: int, future: Future[MultiVector]) -> None:
        try:
            self._vectors[position] = future.result()
        except EncodeError as exc:
            self._refuse(position, exc)

    def _refuse(self, position: int, cause: ColQwen3Error) -> None:
        """Do as ``on_error`` says with a candidate that cannot be encoded."""
        error = EncodeError.of(cause, position, self._candidates[position].name)
        if self._options.on_error == "raise":
            raise error
        self._errors[position] = error
        _log.warning("%s: %s", "left out" if self._options.on_error == "skip" else "not scored, kept last", error)

    def _ranked(self, sums: Mapping[int, float], n_query_tokens: int) -> list[Ranked]:
        """Order candidates by the sums of those that have one."""

        def place(position: int) -> tuple[float, bool, str, int]:
            ids = self._candidates[position].ids
            return -sums[position], not ids, ids[0] if ids else "", position

        def score(position: int) -> float:
            if options.score_mode == "relevance":
                return relevance(sums[position], n_query_tokens)
            return sums[position] / (n_query_tokens if options.score_mode == "mean" else 1)

        options = self._options
        ranking = [Ranked(position, score(position)) for position in sorted(sums, key=place)]
        if (lowest := options.score_threshold) is not None:
            ranking = [ranked for ranked in ranking if ranked.score is not None and ranked.score >= lowest]
        if options.on_error == "keep":
            ranking += [
                Ranked(position, None, {RERANK_ERROR: self._errors[position].message})
                for position in sorted(self._errors)
            ]
        return ranking[: options.top_n]

    def _with_evidence(self, ranked: Ranked, query: MultiVector) -> Ranked:
        evidence = Evidence(self._options.boxes, self._options.heatmaps)
        if not evidence.wanted:
            return ranked
        candidate = self._candidates[ranked.position]
        metadata = evidence.of_page(
            query,
            self._vectors.get(ranked.position),
            partial(self._picture, ranked.position),
            candidate.ids[0] if candidate.ids else candidate.name,
        )
        return Ranked(ranked.position, ranked.score, {**ranked.metadata, **metadata}, without_evidence=True)

    def _picture(self, position: int) -> Image.Image | None:
        record = self._records.get(position)
        picture = None if record is None else indexed_picture(record)  # what the index's vectors were made of
        return self._candidates[position].page().image if picture is None else picture


def _settled(futures: Sequence[Future[Any]]) -> Future[None]:
    """Return a future that is done when all of some futures are, or one has failed; it never fails itself."""
    settled: Future[None] = Future()
    left = itertools.count(len(futures) - 1, -1)

    def settle(future: Future[Any]) -> None:
        last = next(left) == 0
        if last or future.cancelled() or future.exception() is not None:
            with contextlib.suppress(InvalidStateError):  # done before, or nobody waits any more
                settled.set_result(None)

    for future in futures:
        future.add_done_callback(settle)
    return settled
