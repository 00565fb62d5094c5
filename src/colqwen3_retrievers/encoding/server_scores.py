"""Scores computed by the servers of an encoder: what the rerankers' ``scoring="server"`` stands on."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from colqwen3_retrievers.encoding import shared_engine as sharing
from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.encoding.opened_model import OpenedModel
from colqwen3_retrievers.engines.options import ServerOptions
from colqwen3_retrievers.engines.server.client import ServerClient
from colqwen3_retrievers.engines.server.scoring import Endpoint, score_on_server
from colqwen3_retrievers.errors import ColQwen3Error, ConfigError, EncodeError
from colqwen3_retrievers.models.families import VISUAL_TOKEN_SIDE
from colqwen3_retrievers.models.rendering import EncoderInput
from colqwen3_retrievers.pages.page import Page, Query

_locks: dict[int, threading.Lock] = {}  # by generation: a forked child does not wait for its parent's threads
_clients: weakref.WeakKeyDictionary[ColQwen3Encoder, tuple[int, ServerClient]] = weakref.WeakKeyDictionary()


@dataclass(slots=True)
class ServerScores:
    """What came of scoring pages.

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
    """Let an encoder's servers score pages against a query; they encode all of it anew.

    Args:
        encoder: one with ``engine="server"``, at the checkpoint's full dim and without pooling.
        query: a text, an image, or both.
        pages: what gives each page, a text or an image; one that raises is among the broken.
        endpoint: ``"score"``, or ``"rerank"``, for servers where only that is let through.

    Returns:
        A score or an error for each page.

    Raises:
        ConfigError: another engine, a Matryoshka dim or pooling, neither of which a server can apply to its scores.
        EncodeError: the query cannot be encoded.
        EngineError: no server answers as it should.
    """
    opened = encoder.opened()
    _check(opened)
    asked = opened.renderer.query(query)
    scores = ServerScores(len(asked))
    items: dict[int, EncoderInput] = {}
    for place, make in enumerate(pages):
        try:
            page = make()
            if page.video is not None:
                raise EncodeError("a video is not scored by a server: its scoring takes no times of frames")
            items[place] = opened.renderer.document(page)
        except ColQwen3Error as exc:
            scores.broken[place] = EncodeError.of(exc, place)
    if items:
        found = score_on_server(_client(encoder, opened), asked, list(items.values()), endpoint=endpoint)
        scores.sums.update(zip(items, found, strict=True))
    return scores


def _check(opened: OpenedModel) -> None:
    settings = opened.settings
    if not isinstance(settings.engine, ServerOptions):
        raise ConfigError("scoring='server': the encoder's engine is no server; give url=, or set COLQWEN3_URL")
    if opened.info.dim != opened.checkpoint.dim or settings.pool_factor > 1:
        raise ConfigError(
            "scoring='server': a server scores with whole token embeddings; leave out dim and pool_factor"
        )


def _client(encoder: ColQwen3Encoder, opened: OpenedModel) -> ServerClient:
    """Give the encoder's client for scoring, made when there is none in this process; it goes with the encoder."""
    settings = opened.settings
    assert isinstance(settings.engine, ServerOptions)  # noqa: S101 - narrows the type for the checker
    here = sharing.current_generation()
    with _locks.setdefault(here, threading.Lock()):
        generation, client = _clients.get(encoder, (-1, None))
        if client is None or generation != here:
            client = ServerClient(
                opened.checkpoint,
                urls=settings.url,
                api_key=settings.api_key,
                options=settings.engine,
                max_pixels=min(opened.checkpoint.max_pixels, opened.info.max_visual_tokens * VISUAL_TOKEN_SIDE**2),
            )
            _clients[encoder] = here, client
            weakref.finalize(encoder, _close_later, client, here).atexit = False
        return client


def _close_later(client: ServerClient, generation: int) -> None:
    """Close in a thread of its own: the garbage collector may run in one that the connections need."""
    if generation != sharing.current_generation():
        return  # its parent's: a forked child has no thread that would close it
    threading.Thread(target=client.close, daemon=True).start()
