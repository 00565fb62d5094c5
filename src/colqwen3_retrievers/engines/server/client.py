"""Asking a fleet until there is an answer: which server, how often, and for how long."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from colqwen3_retrievers.engines.options import ServerOptions
from colqwen3_retrievers.engines.server.fleet import Fleet, Server
from colqwen3_retrievers.engines.server.probe import Channel, Findings, Probe, request_template
from colqwen3_retrievers.engines.server.transport import Answer, RefusalError, Transport, UnreachableError
from colqwen3_retrievers.engines.server.wire import (
    Dialect,
    decode,
    expected_bytes,
    message_body,
    pooling_settings,
    text_body,
)
from colqwen3_retrievers.errors import ConfigError, EngineError, EngineResponseError, EngineTimeoutError
from colqwen3_retrievers.models.checkpoint import Checkpoint
from colqwen3_retrievers.vectors.multi_vector import Float32

T = TypeVar("T")

Ask = Callable[[str, Findings], Awaitable[T]]
"""What is asked of one server: given its address and what was found out about it."""

MOST_BYTES = 2**20
"""Of an answer in JSON; one of token embeddings may have four times what is expected more, so that it can be looked at
and said what is wrong with it."""

_FIRST_WAIT = 0.25
_LONGEST_WAIT = 8.0
_GONE = (502, 503, 504)  # from whatever stands before a server that is not there


class ServerClient:
    """A fleet, its connections, and the checks that each server passes before it is asked.

    Args:
        checkpoint: what the servers serve.
        urls: their addresses, at least one.
        api_key: sent as a bearer token; in no repr, log or error.
        options: see :class:`ServerOptions`.
        max_pixels: most pixels of an image that will be sent.

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
        api_key: str | None,
        options: ServerOptions,
        max_pixels: int,
    ) -> None:
        if not urls:
            raise ConfigError("url: expected the address of a server")
        self.options = options
        self.dim = checkpoint.dim
        self._probe = Probe(checkpoint, options, max_pixels)
        self._fleet: Fleet[Findings] = Fleet([url.rstrip("/") for url in urls], clock=time.monotonic)
        self._transport = Transport(
            connections=options.concurrency + len(urls), connect_timeout=options.connect_timeout, api_key=api_key
        )

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers' addresses."""
        return tuple(server.url for server in self._fleet.servers)

    def close(self) -> None:
        """Break off what is under way and close all connections; doing it again does nothing."""
        self._transport.close()

    def ask(self, ask: Ask[T]) -> T:
        """Ask the server with the least to do, and another, or again, when that fails on the way; from any thread.

        Connection errors, 429 and 5xx are followed by another attempt: at once where another server is there, else
        after a random pause whose bound doubles ("full jitter": Brooker 2015, Exponential Backoff And Jitter, AWS
        Architecture Blog), or the one the server asks for. No other answer is asked for twice.

        Raises:
            EngineTimeoutError: all attempts and pauses together came to ``options.timeout``.
            EngineResponseError: an answer that is none, or another status than 200.
            ConfigError: a server did not pass its check.
            EngineError: nobody can be reached.
        """
        return self._transport.run(self._attempts(ask))

    def ask_all(self, asks: Sequence[Ask[T]]) -> list[T]:
        """Ask several things at once, as many as ``options.concurrency``; the first failure breaks off the rest.

        Raises:
            ColQwen3Error: as :meth:`ask`.
        """
        return self._transport.run(self._all_attempts(asks))

    async def _all_attempts(self, asks: Sequence[Ask[T]]) -> list[T]:
        room = asyncio.Semaphore(self.options.concurrency)

        async def one(ask: Ask[T]) -> T:
            async with room:
                return await self._attempts(ask)

        tasks = [asyncio.ensure_future(one(ask)) for ask in asks]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _attempts(self, ask: Ask[T]) -> T:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.options.timeout
        failed: list[Server[Findings]] = []
        last: EngineError
        for attempt in range(self.options.retries + 1):
            with self._fleet.use(but=failed) as server:
                others = any(not (one is server or one in failed or one.resting) for one in self._fleet.servers)
                # half of what is left of the time, so that a server that hangs leaves some for another
                now = loop.time()
                ends = (now + deadline) / 2 if others else deadline
                try:
                    async with asyncio.timeout_at(ends):
                        result = await ask(server.url, await server.ready(self._check))
                except (TimeoutError, EngineTimeoutError) as exc:  # its own, or that of a check others began
                    seconds = ends - now if others else self.options.timeout
                    last = EngineTimeoutError(f"{server.url}: no whole answer within {seconds:.4g} s")
                    last.__cause__ = exc
                    server.failed(str(last))
                    if not others:
                        raise last from exc
                except (UnreachableError, RefusalError) as exc:
                    self._note(server, exc)
                    last = exc
                else:
                    server.succeeded()
                    return result
            failed.append(server)
            wait = self._wait(attempt, failed)
            if not last.retryable or attempt == self.options.retries or loop.time() + wait >= deadline:
                raise last
            await asyncio.sleep(wait)
        raise AssertionError  # the last attempt returns or raises

    def _note(self, server: Server[Findings], exc: UnreachableError | RefusalError) -> None:
        if isinstance(exc, UnreachableError) or exc.status_code in _GONE:
            server.failed(str(exc))
        else:
            server.succeeded()
        if isinstance(exc, RefusalError) and exc.retryable and exc.retry_after:
            server.leave_alone(exc.retry_after)

    def _wait(self, attempt: int, failed: list[Server[Findings]]) -> float:
        """Seconds before the next attempt."""
        there = [server for server in self._fleet.servers if not server.resting]
        if any(server not in failed and not server.busy for server in there):
            return 0.0
        failed.clear()
        bound = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(attempt, 10))
        return max(random.uniform(0, bound), min((server.busy for server in there), default=0.0))  # noqa: S311 - no secret

    async def _check(self, server: Server[Findings]) -> Findings:
        async def models() -> list[dict[str, Any]]:
            answer = await self._transport.send("GET", server.url, "/v1/models", most_bytes=MOST_BYTES)
            served = answer.json(f"{server.url}/v1/models").get("data")
            if not isinstance(served, list) or not all(isinstance(item, dict) for item in served):
                raise EngineResponseError(f"{server.url}/v1/models: no list of models")
            return served

        async def texts(model: str, token_ids: Sequence[NDArray[np.int64]]) -> list[Float32]:
            settings = pooling_settings(model, self.options.embed_dtype)
            answer = await self.pool(server.url, text_body(token_ids, settings), sum(map(len, token_ids)))
            return self.rows(server.url, answer, len(token_ids))

        async def message(model: str, dialect: Dialect, part: bytes, text: str) -> Float32:
            settings = {**pooling_settings(model, self.options.embed_dtype), **request_template(dialect)}
            answer = await self.pool(server.url, message_body(part, text, settings), self._probe.most_tokens)
            return self.rows(server.url, answer, 1)[0]

        try:
            async with asyncio.timeout(self.options.timeout):
                return await self._probe.run(Channel(server.url, models, texts, message))
        except TimeoutError as exc:
            raise EngineTimeoutError(f"{server.url}: not checked within {self.options.timeout:.4g} s") from exc

    def check_again(self, url: str, known: Findings) -> None:
        """Have a server checked before it is asked again, unless it has been since it was known as that."""
        for server in self._fleet.servers:
            if server.url == url and server.known is known:
                server.known = None

    async def pool(self, url: str, body: bytes, n_tokens: int) -> Answer:
        """Post one ``/pooling`` request, of so many tokens, to one server, once."""
        most = MOST_BYTES + 4 * expected_bytes(n_tokens, self.dim, self.options.embed_dtype)
        return await self._transport.send("POST", url, "/pooling", body, most_bytes=most)

    async def post(self, url: str, path: str, body: bytes) -> dict[str, Any]:
        """Post one request to one server, once, and read its answer as a JSON object."""
        answer = await self._transport.send("POST", url, path, body, most_bytes=MOST_BYTES)
        return answer.json(f"{url}{path}")

    def rows(self, url: str, answer: Answer, n_inputs: int) -> list[Float32]:
        """Read the token embeddings of an answer.

        Raises:
            EngineResponseError: they are none, or not finite; it names the server.
        """
        try:
            return decode(answer.metadata, answer.body, n_inputs=n_inputs, dtype=self.options.embed_dtype)
        except EngineResponseError as exc:
            raise EngineResponseError(f"{url}/pooling: {exc}") from exc
