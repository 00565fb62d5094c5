"""Scores computed by the servers of an encoder, for the rerankers' ``scoring="server"``."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.encoding.opened_model import OpenedModel
from colqwen3_retrievers.engines.options import ServerOptions
from colqwen3_retrievers.engines.server.client import ServerClient
from colqwen3_retrievers.engines.server.scoring import Endpoint, score_on_server
from colqwen3_retrievers.errors import ColQwen3Error, ConfigError, EncodeError
from colqwen3_retrievers.fork import ForkSafeLock, after_fork, finalize, inherited
from colqwen3_retrievers.models.rendering import EncoderInput
from colqwen3_retrievers.pages.page import Page, Query

_lock = ForkSafeLock()
_clients: weakref.WeakKeyDictionary[ColQwen3Encoder, ServerClient] = weakref.WeakKeyDictionary()


@after_fork
def _forget_clients() -> None:
    """In a forked child, leave the parent's clients alone: the threads that would close them are missing."""
    inherited.extend(_clients.values())
    _clients.clear()


@dataclass(slots=True)
class ServerScores:
    """Scores of pages, and errors of those that have none.

    Attributes:
        n_query_tokens: tokens of the query, for means.
        sums: MaxSim, summed over query tokens, by the pages' places.
        broken: what is wrong with the pages that have no score, by their places.
    """

    n_query_tokens: int
    sums: dict[int, float] = field(default_factory=dict)
    broken: dict[int, EncodeError] = field(default_factory=dict)


def server_scores(
    encoder: ColQwen3Encoder, query: Query, pages: Sequence[Callable[[], Page]], *, endpoint: Endpoint = "score"
) -> ServerScores:
    """Score pages against a query on an encoder's servers, which encode all of it anew.

    Args:
        encoder: one with ``engine="server"``, at the checkpoint's full dim and without pooling.
        query: a text, an image, or both.
        pages: functions that load each page, a text or an image; one that raises is among the broken.
        endpoint: ``"score"``, or ``"rerank"``, for servers where only that is allowed.

    Returns:
        A score or an error for each page.

    Raises:
        ConfigError: another engine, a Matryoshka dim or pooling, neither of which a server can apply to its scores.
        EncodeError: the query cannot be encoded.
        EngineError: no server answers as it should.
    """
    opened = encoder.opened()
    settings = opened.settings
    if not isinstance(settings.engine, ServerOptions):
        raise ConfigError("scoring='server': the encoder's engine is no server; give url=, or set COLQWEN3_URL")
    if opened.info.dim != opened.checkpoint.dim or settings.pool_factor > 1:
        raise ConfigError(
            "scoring='server': a server scores with whole token embeddings; leave out dim and pool_factor"
        )
    query_input = opened.renderer.query(query)
    scores = ServerScores(len(query_input))
    page_inputs: dict[int, EncoderInput] = {}
    for place, load in enumerate(pages):
        try:
            page = load()
            if page.video is not None:
                raise EncodeError("a video is not scored by a server: its scoring takes no times of frames")
            page_inputs[place] = opened.renderer.document(page)
        except ColQwen3Error as exc:
            scores.broken[place] = EncodeError.of(exc, place)
    if page_inputs:
        client = _client(encoder, opened, settings.engine)
        sums = score_on_server(client, query_input, list(page_inputs.values()), endpoint=endpoint)
        scores.sums.update(zip(page_inputs, sums, strict=True))
    return scores


def _client(encoder: ColQwen3Encoder, opened: OpenedModel, options: ServerOptions) -> ServerClient:
    """Return the encoder's client for scoring, closed when the encoder is garbage-collected."""
    with _lock:
        if encoder not in _clients:
            _clients[encoder] = ServerClient(
                opened.checkpoint,
                urls=opened.settings.url,
                api_key=opened.settings.api_key,
                options=options,
                max_pixels=opened.max_pixels,
            )
            finalize(encoder, _close_later, _clients[encoder]).atexit = False
        return _clients[encoder]


def _close_later(client: ServerClient) -> None:
    """Close in a thread of its own: the garbage collector may run in one that the connections need."""
    threading.Thread(target=client.close, daemon=True).start()
