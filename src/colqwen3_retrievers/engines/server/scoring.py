"""A vLLM server's own late-interaction scores, over ``/score`` and ``/rerank``.

The server encodes query and documents on every call and sums, over the query's tokens, the greatest similarity to a
document's token, as :func:`colqwen3_retrievers.maxsim` does. Prompts are sent whole, images as for encoding; the number
of tokens in the server's usage must be that of the rendered ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

from colqwen3_retrievers.engines.server.client import Ask, ServerClient
from colqwen3_retrievers.engines.server.probe import Findings
from colqwen3_retrievers.engines.server.wire import picture_part
from colqwen3_retrievers.errors import ConfigError, EngineResponseError
from colqwen3_retrievers.models.rendering import EncoderInput

Endpoint = Literal["score", "rerank"]
"""One of the server's two paths; the scores are the same, ``/rerank`` also returns the images."""

DOCUMENTS_A_REQUEST: Final = 8
"""Documents in a request, so that no body exceeds some 20 MB, and several servers share the work."""


def score_on_server(
    client: ServerClient, query: EncoderInput, documents: Sequence[EncoderInput], *, endpoint: Endpoint = "score"
) -> list[float]:
    """Return the scores of documents against a query, computed by the server.

    Args:
        client: of the servers.
        query: rendered; a text, an image, or both.
        documents: rendered texts or images.
        endpoint: see :data:`Endpoint`.

    Returns:
        For each document in order its MaxSim with the query: the sum over query tokens.

    Raises:
        ConfigError: the server saw other tokens than were rendered.
        EngineError: as :meth:`ServerClient.ask`.
    """
    item = _item(query)
    chunks = [documents[i : i + DOCUMENTS_A_REQUEST] for i in range(0, len(documents), DOCUMENTS_A_REQUEST)]
    scores = client.ask_all([_request(client, endpoint, item, len(query), chunk) for chunk in chunks])
    return [score for chunk in scores for score in chunk]


def _request(
    client: ServerClient, endpoint: Endpoint, query: bytes, n_query: int, documents: Sequence[EncoderInput]
) -> Ask[list[float]]:
    key = b'"queries":' if endpoint == "score" else b'"query":'
    inside = key + query + b',"documents":[' + b",".join(_item(item) for item in documents) + b"]}"
    n_tokens = n_query + sum(len(item) for item in documents)

    async def ask(url: str, known: Findings) -> list[float]:
        body = json.dumps({"model": known.model})[:-1].encode() + b"," + inside
        answer = await client.post(url, f"/{endpoint}", body)
        what = f"{url}/{endpoint}"
        scores = _scores(answer, endpoint, len(documents), what)
        try:
            seen = answer["usage"]["prompt_tokens"]
        except (KeyError, TypeError) as exc:
            raise EngineResponseError(f"{what}: the answer does not tell how many tokens were seen") from exc
        if seen != n_tokens:
            raise ConfigError(
                f"{what}: the server saw {seen} tokens where {n_tokens} were rendered: it resizes pictures or adds "
                "tokens; start it with the command that `colqwen3 serve MODEL` prints"
            )
        return scores

    return ask


def _item(item: EncoderInput) -> bytes:
    """Return a query or document as JSON: its whole prompt, and its image beside it."""
    if item.pixels is None:
        return json.dumps(item.prompt).encode()
    text = json.dumps({"type": "text", "text": item.prompt}).encode()
    return b'{"content":[' + picture_part(item) + b"," + text + b"]}"


def _scores(answer: dict[str, Any], endpoint: Endpoint, count: int, what: str) -> list[float]:
    listed, key = ("data", "score") if endpoint == "score" else ("results", "relevance_score")
    try:
        scores = dict(_pairs(answer[listed], key))
    except (KeyError, TypeError, ValueError, OverflowError) as exc:
        raise EngineResponseError(f"{what}: the answer is no list of scores") from exc
    if len(answer[listed]) != count or set(scores) != set(range(count)):
        raise EngineResponseError(f"{what}: scores of {len(answer[listed])} documents, {count} were sent")
    if not all(math.isfinite(score) for score in scores.values()):
        raise EngineResponseError(f"{what}: a score is NaN or infinite")
    return [scores[index] for index in range(count)]


def _pairs(items: Any, key: str) -> Iterator[tuple[int, float]]:
    for item in items:
        yield item["index"], float(item[key])
