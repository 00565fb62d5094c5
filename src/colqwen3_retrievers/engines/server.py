"""The engine that asks vLLM servers: one, or several of the same model as one fleet."""

from __future__ import annotations

from collections.abc import Sequence

from colqwen3_retrievers.checkpoint import Checkpoint
from colqwen3_retrievers.datatypes import Float32
from colqwen3_retrievers.engines.server_client import ServerClient
from colqwen3_retrievers.engines.server_probe import Findings, message_text, request_template, wrong_count
from colqwen3_retrievers.engines.server_transport import Answer, RefusalError
from colqwen3_retrievers.engines.server_wire import (
    VIDEO_MARKS,
    frame_times,
    message_body,
    needs_times,
    picture_part,
    pooling_settings,
    text_body,
)
from colqwen3_retrievers.errors import ConfigError, DimensionError
from colqwen3_retrievers.options import ServerOptions
from colqwen3_retrievers.rendering import EncoderInput

BATCH_TOKENS = 1024
"""Tokens of queries gathered into one request."""

TEXTS_A_REQUEST = 16
"""Most prompts in a request: the header that says where each one's rows lie must pass proxies, some at 4 kB."""


class ServerEngine:
    """vLLM servers, asked for token embeddings over HTTP.

    Nothing is sent before the first input. Each server is checked before it is asked for anything (see
    :mod:`colqwen3_retrievers.engines.server_probe`), and again after it was gone. Calls may come from any number of
    threads; a request ends within ``options.timeout`` whatever happens, see
    :meth:`colqwen3_retrievers.engines.server_client.ServerClient.ask`.

    Args:
        checkpoint: what the servers serve; its config and tokenizer are used here, its weights at most for a check.
        urls: the servers' addresses, at least one.
        api_key: sent as a bearer token; in no repr, log or error.
        options: see :class:`ServerOptions`.
        max_pixels: most pixels of an image that will be sent; None takes the checkpoint's bound.

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
        """Name the servers."""
        return f"ServerEngine({', '.join(self._client.urls)})"

    def goes_alone(self, item: EncoderInput) -> bool:
        """Say whether an input has a request of its own: pictures do, as vLLM takes one conversation a request."""
        return item.pixels is not None

    def embed(self, inputs: Sequence[EncoderInput]) -> list[Float32]:
        """Encode rendered inputs; see :class:`colqwen3_retrievers.engines.Engine`. Safe to call from many threads.

        Raises:
            EngineTimeoutError: a request took longer than ``options.timeout``.
            EngineResponseError: an answer that is no token embeddings, or another status than 200.
            ConfigError: a server serves something else, or sees something else than it should.
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
        """Break off what is under way and close all connections; doing it again does nothing."""
        self._client.close()

    def _embed_texts(self, items: list[EncoderInput]) -> list[Float32]:
        async def ask(url: str, known: Findings) -> tuple[str, Answer]:
            settings = pooling_settings(known.model, self.options.embed_dtype)
            return url, await self._client.pool(
                url, text_body([item.token_ids for item in items], settings), sum(map(len, items))
            )

        return self._checked(items, *self._client.ask(ask))

    def _embed_picture(self, item: EncoderInput) -> Float32:
        part = picture_part(item)  # once, here: packing takes longer than all else a client does
        template = (self._family.video if item.is_video else self._family.image) or ""
        times = {"media_io_kwargs": frame_times(item)} if item.is_video and needs_times(item) else {}

        async def ask(url: str, known: Findings) -> tuple[str, Answer]:
            settings = {
                **pooling_settings(known.model, self.options.embed_dtype),
                **request_template(known.dialect),
                **times,
            }
            text = message_text(item, known.dialect, template, bare=url in self._bare_videos)
            try:
                return url, await self._client.pool(url, message_body(part, text, settings), len(item))
            except RefusalError as exc:
                if times and "media_io_kwargs" in exc.said:
                    raise ConfigError(
                        f"{url} does not take the times of a video's frames: start it with colqwen3 serve --videos, or "
                        "--trust-request-mm-kwargs (without, at most 32 frames, one a second)"
                    ) from exc
                raise

        url, answer = self._client.ask(ask)
        if item.is_video and url not in self._bare_videos:
            # vLLM beside transformers 5.10 and later keeps the marks around what it expands: seen once, remembered
            (rows,) = self._client.rows(url, answer, 1)
            if len(rows) == len(item) + VIDEO_MARKS:
                self._bare_videos.add(url)
                return self._embed_picture(item)
        return self._checked([item], url, answer)[0]

    def _checked(self, items: Sequence[EncoderInput], url: str, answer: Answer) -> list[Float32]:
        """Read an answer, and hold each input's rows against its tokens."""
        found = self._client.rows(url, answer, len(items))
        for item, rows in zip(items, found, strict=True):
            if len(rows) != len(item):
                raise ConfigError(wrong_count(item, len(rows), url))
            if rows.shape[1] != self._client.dim:
                raise DimensionError(f"{url}: token embeddings", expected=self._client.dim, actual=rows.shape[1])
        return found
