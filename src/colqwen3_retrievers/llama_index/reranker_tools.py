"""What a reranker works with, and how LlamaIndex hears of its work."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]  # re-exported unsaid
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.schema import NodeWithScore, QueryBundle

from colqwen3_retrievers.cache.page_cache import PageEmbeddingCache
from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.stores.protocol import check_info


@dataclass(frozen=True, slots=True, eq=False)
class Tools:
    """What a reranker works with, and the settings it was made from."""

    settings: tuple[object, ...]
    encoder: ColQwen3Encoder
    index: PageIndex | None
    cache: PageEmbeddingCache

    @classmethod
    def open(
        cls,
        settings: tuple[object, ...],
        model: str | None,
        device: str | None,
        encoder: ColQwen3Encoder | None,
        index: PageIndex | str | None,
        cache: PageEmbeddingCache | str | None,
        cache_bytes: int | None,
        images_dir: str | None = None,
    ) -> Tools:
        """Put encoder, index and cache together; the arguments are the reranker's.

        Raises:
            ConfigError: they do not go together.
            StoreError: no index there.
            StoreMismatchError: the index was made by another model.

        >>> tools = Tools.open((), "tiny", None, None, None, None, None)                   # nothing is loaded yet
        >>> tools.encoder, tools.cache.encoder is tools.encoder
        (ColQwen3Encoder(model='tiny'), True)
        """
        if isinstance(cache, PageEmbeddingCache) and encoder is None and model is None:
            if not isinstance(cache.encoder, ColQwen3Encoder):
                raise ConfigError(f"cache: its encoder is a {type(cache.encoder).__name__}, not a ColQwen3Encoder")
            encoder = cache.encoder
        if encoder is None and (model is not None or index is None):
            encoder = ColQwen3Encoder(model, device=device)
        if isinstance(index, str):
            index = PageIndex.open(index, encoder, images_dir=images_dir, read_only=True)
        elif index is not None and encoder is not None:
            check_info(index.info, encoder.info, index.location)
        if encoder is None:
            known = index.encoder if index is not None else None
            if not isinstance(known, ColQwen3Encoder):
                raise ConfigError(f"encoder: that of the index is a {type(known).__name__}; give a ColQwen3Encoder")
            encoder = known
        if not isinstance(cache, PageEmbeddingCache):
            cache = PageEmbeddingCache(encoder, cache_bytes, folder=cache)
        elif cache.encoder is not encoder:
            raise ConfigError("cache: it belongs to another encoder")
        return cls(settings, encoder, index, cache)


def check_together(
    model: object, device: object, *, encoder: object, index: object, cache: object, cache_bytes: object,
    scoring: object, evidence: bool, images_dir: object = None,
) -> None:  # fmt: skip
    """Refuse arguments of a reranker that contradict each other; ``evidence`` is whether boxes or heatmaps are wanted.

    Raises:
        ConfigError: it names them.

    >>> check_together("tiny", None, encoder=None, index=None, cache=None, cache_bytes=None, scoring="client",
    ...                evidence=True)
    """
    if encoder is not None and (model is not None or device is not None):
        raise ConfigError("encoder: it has a model and a device; give either it or them")
    if isinstance(cache, PageEmbeddingCache):
        if model is not None or device is not None or cache_bytes is not None:
            raise ConfigError("cache: it has an encoder and a bound; give either it, or model, device, cache_bytes")
        if encoder is not None and encoder is not cache.encoder:
            raise ConfigError("cache: it belongs to another encoder")
    if index is not None and device is not None and model is None:
        raise ConfigError("device: beside index= give model= too, or a ready encoder=")
    if images_dir is not None and (index is None or isinstance(index, PageIndex)):
        raise ConfigError("images_dir: for an index given by its location; an open one has its own")
    if scoring == "server" and (index is not None or cache is not None or cache_bytes is not None):
        raise ConfigError("scoring='server': every node is encoded anew there; give neither index nor cache")
    if scoring == "server" and evidence:
        raise ConfigError("scoring='server': no vectors travel, so there are neither boxes nor heatmaps")


@contextmanager
def reported(
    nodes: Sequence[NodeWithScore],
    bundle: QueryBundle | None,
    *,
    model: str,
    top_n: int,
    callback_manager: CallbackManager,
) -> Generator[Callable[[list[NodeWithScore]], list[NodeWithScore]]]:
    """Tell LlamaIndex's instrumentation and callbacks that a reranking begins, and how it ends.

    Yields:
        A function to call with the nodes in their new order; it gives them back.

    >>> with reported([], None, model="tiny", top_n=5, callback_manager=CallbackManager([])) as done:
    ...     done([])
    []
    """
    dispatcher, given = get_dispatcher(__name__), list(nodes)
    dispatcher.event(ReRankStartEvent(query=bundle, nodes=given, top_n=top_n, model_name=model))
    payload: dict[str, Any] = {
        EventPayload.NODES: given,
        EventPayload.MODEL_NAME: model,
        EventPayload.QUERY_STR: bundle.query_str if bundle is not None else "",
        EventPayload.TOP_K: top_n,
    }
    with callback_manager.event(CBEventType.RERANKING, payload=payload) as event:

        def done(ranked: list[NodeWithScore]) -> list[NodeWithScore]:
            event.on_end(payload={EventPayload.NODES: ranked})
            dispatcher.event(ReRankEndEvent(nodes=ranked))
            return ranked

        yield done
