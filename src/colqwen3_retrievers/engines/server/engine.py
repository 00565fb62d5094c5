"""The engine that uses vLLM servers: one, or several of the same model as a fleet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from colqwen3_retrievers.engines import check_length
from colqwen3_retrievers.engines.options import ServerOptions
from colqwen3_retrievers.engines.server.client import ServerClient
from colqwen3_retrievers.engines.server.probe import OWN_MODEL, Findings, message_text, request_template, wrong_count
from colqwen3_retrievers.engines.server.transport import Answer, RefusalError
from colqwen3_retrievers.engines.server.wire import (
    VIDEO_MARKS,
    frame_times,
    message_body,
    needs_times,
    picture_part,
    pooling_settings,
    text_body,
)
from colqwen3_retrievers.errors import ConfigError, DimensionError, EngineResponseError
from colqwen3_retrievers.models.checkpoint import Checkpoint
from colqwen3_retrievers.models.rendering import EncoderInput
from colqwen3_retrievers.vectors.multi_vector import Float32

BATCH_TOKENS = 1024
"""Tokens of queries gathered into one request."""

TEXTS_A_REQUEST = 16
"""Most prompts in a request: the header with the offsets of their rows must pass proxies, some at 4 kB."""

FIRST_ROWS = 1000
"""Most rows of first tokens remembered of a server, to detect that it serves another model."""


class ServerEngine:
    """Token embeddings of vLLM servers, over HTTP.

    Nothing is sent before the first input. Each server is checked before first use (see
    :mod:`colqwen3_retrievers.engines.server.probe`), and again after it was unavailable. Calls may come from any number
    of threads; a request ends within ``options.timeout``, see
    :meth:`colqwen3_retrievers.engines.server.client.ServerClient.ask`.

    Args:
        checkpoint: the served one; its config and tokenizer are used here, its weights at most for a check.
        urls: the servers' addresses, at least one.
        api_key: sent as a bearer token; in no repr, log or error.
        options: see :class:`ServerOptions`.
        max_pixels: most pixels of an image; None takes the checkpoint's bound.

    Raises:
        ConfigError: no url.
        CheckpointError: the tokenizer cannot be read.
        MissingExtraError: httpx or tokenizers is not installed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        urls: Sequence[str],
        api_key: str | None = None,
        options: ServerOptions | None = None,
        max_pixels: int | None = None,
    ) -> None:
        self.options = options or ServerOptions()
        self.concurrency = self.options.concurrency
        self.batch_tokens = BATCH_TOKENS
        self._family = checkpoint.family
        self._bare_videos: set[str] = set()
        self._client = ServerClient(
            checkpoint,
            urls=urls,
            api_key=api_key,
            options=self.options,
            max_pixels=max_pixels or checkpoint.max_pixels,
        )

    def __repr__(self) -> str:
        return f"ServerEngine({', '.join(self._client.urls)})"

    def goes_alone(self, item: EncoderInput) -> bool:
        """Return whether an input has its own request: images do, since vLLM takes one conversation a request."""
        return item.pixels is not None

    def embed(self, inputs: Sequence[EncoderInput]) -> list[Float32]:
        """Encode rendered inputs; see :class:`colqwen3_retrievers.engines.Engine`. Safe to call from many threads.

        Raises:
            InputTooLongError: a text is longer than the server takes.
            EngineTimeoutError: a request took longer than ``options.timeout``.
            EngineResponseError: a response without token embeddings, or another status than 200.
            ConfigError: a server serves another model, or another prompt or image reaches the model.
            EngineError: no server can be reached.
        """
        results: dict[int, Float32] = {}
        texts = [index for index, item in enumerate(inputs) if item.pixels is None]
        for start in range(0, len(texts), TEXTS_A_REQUEST):
            some = texts[start : start + TEXTS_A_REQUEST]
            results.update(zip(some, self._embed_texts([inputs[index] for index in some]), strict=True))
        for index, item in enumerate(inputs):
            if item.pixels is not None:
                results[index] = self._embed_picture(item)
        return [results[index] for index in range(len(inputs))]

    def close(self) -> None:
        """Cancel pending requests and close all connections; idempotent."""
        self._client.close()

    def _embed_texts(self, items: list[EncoderInput], *, checked: bool = False) -> list[Float32]:
        async def ask(url: str, known: Findings) -> tuple[str, Findings, Answer]:
            if known.context_length is not None:
                for item in items:
                    check_length(item, known.context_length, f"{url} takes {known.context_length:,} (--max-model-len)")
            settings = pooling_settings(known.model, self.options.embed_dtype)
            body = text_body([item.token_ids for item in items], settings)
            return url, known, await self._client.pool(url, body, sum(map(len, items)))

        url, known, answer = self._client.ask(ask)
        results = self._checked(items, url, answer)
        if self._is_another(url, known, items, results, checked):
            return self._embed_texts(items, checked=True)
        return results

    def _embed_picture(self, item: EncoderInput, *, checked: bool = False) -> Float32:
        part = picture_part(item)  # once for all attempts: packing takes most of a client's time
        template = (self._family.video if item.is_video else self._family.image) or ""
        times = {"media_io_kwargs": frame_times(item)} if item.is_video and needs_times(item) else {}

        async def ask(url: str, known: Findings) -> tuple[str, Findings, Answer]:
            settings = {
                **pooling_settings(known.model, self.options.embed_dtype),
                **request_template(known.dialect),
                **times,
            }
            text = message_text(item, known.dialect, template, bare=url in self._bare_videos)
            try:
                return url, known, await self._client.pool(url, message_body(part, text, settings), len(item))
            except RefusalError as exc:
                if times and "media_io_kwargs" in exc.said:
                    raise ConfigError(
                        f"{url} does not take the times of a video's frames: start it with colqwen3 serve --videos, or "
                        "--trust-request-mm-kwargs (without, at most 32 frames, one a second)"
                    ) from exc
                raise

        url, known, answer = self._client.ask(ask)
        if item.is_video and url not in self._bare_videos:
            # with transformers 5.10 and later, vLLM keeps the marks around the expanded placeholder
            (rows,) = self._client.rows(url, answer, 1)
            if len(rows) == len(item) + VIDEO_MARKS:
                self._bare_videos.add(url)
                return self._embed_picture(item, checked=checked)
        results = self._checked([item], url, answer)
        if self._is_another(url, known, [item], results, checked):
            return self._embed_picture(item, checked=True)
        return results[0]

    def _is_another(
        self, url: str, known: Findings, items: Sequence[EncoderInput], results: Sequence[Float32], checked: bool
    ) -> bool:
        """Return whether another model answered than the one checked; the server is then checked again before use.

        A restart between two requests makes none fail. Under a causal mask the row of a prompt's first token depends on
        nothing else, so every response allows the comparison.

        Raises:
            EngineResponseError: another one although it was ``checked`` because of these very items.
        """
        for item, rows in zip(items, results, strict=True) if self._family.causal else ():
            norm = float(np.linalg.norm(rows[0].astype(np.float64)))  # float32 overflows where a server sends 1e30
            token, row = int(item.token_ids[0]), rows[0] / max(norm, 1e-30)
            seen = known.first_rows.get(token)
            if seen is None and len(known.first_rows) < FIRST_ROWS:
                known.first_rows[token] = row
            elif seen is not None and float(seen @ row) < OWN_MODEL:
                if checked:
                    raise EngineResponseError(
                        f"{url}: its token embeddings of one token differ; are several models behind it?"
                    )
                self._client.check_again(url, known)
                return True
        return False

    def _checked(self, items: Sequence[EncoderInput], url: str, answer: Answer) -> list[Float32]:
        """Return the rows of an answer, checked to be one a token."""
        results = self._client.rows(url, answer, len(items))
        for item, rows in zip(items, results, strict=True):
            if len(rows) != len(item):
                raise ConfigError(wrong_count(item, len(rows), url))
            if rows.shape[1] != self._client.dim:
                raise DimensionError(f"{url}: token embeddings", expected=self._client.dim, actual=rows.shape[1])
        return results
