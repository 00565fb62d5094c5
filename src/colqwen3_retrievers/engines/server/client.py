"""Requests to a fleet: which server, how many attempts, and for how long."""

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
from colqwen3_retrievers.engines.server.probe import Findings, Probe, request_template
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
"""A request to one server, given its address and the findings of its check."""

MOST_BYTES = 2**20
"""Most bytes of an answer in JSON; one of token embeddings may have four times the expected bytes more, so that the
error can say what is wrong with it."""

_FIRST_WAIT = 0.25
_LONGEST_WAIT = 8.0
_GONE = (502, 503, 504)  # of a proxy in front of a server that is down


class ServerClient:
    """A fleet, its connections, and the checks of each server before first use.

    Arguments and errors are those of :class:`~colqwen3_retrievers.engines.server.engine.ServerEngine`.
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
        """Cancel pending requests and close all connections; idempotent."""
        self._transport.close()

    def ask(self, ask: Ask[T]) -> T:
        """Send a request to the least busy server, with further attempts when it fails; from any thread.

        Connection errors, 429 and 5xx are retried: at once when another server is available, else after a random pause
        whose bound doubles ("full jitter": Brooker 2015, Exponential Backoff And Jitter, AWS Architecture Blog), or the
        one the server requests. No other answer is retried.

        Raises:
            EngineTimeoutError: all attempts and pauses together took ``options.timeout``.
            EngineResponseError: an invalid answer, or another status than 200.
            ConfigError: a server failed its check.
            EngineError: no server can be reached.
        """
        return self._transport.run(self._attempts(ask))

    def ask_all(self, asks: Sequence[Ask[T]]) -> list[T]:
        """Send several requests, up to ``options.concurrency`` at once; the first failure cancels the rest.

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
                # half of the time left, so that a server that hangs leaves some for another
                now = loop.time()
                ends = (now + deadline) / 2 if others else deadline
                try:
                    async with asyncio.timeout_at(ends):
                        result = await ask(server.url, await server.ready(self._check))
                except (TimeoutError, EngineTimeoutError) as exc:  # its own, or that of a check started by others
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
        """Return the seconds before the next attempt."""
        there = [server for server in self._fleet.servers if not server.resting]
        if any(server not in failed and not server.busy for server in there):
            return 0.0
        failed.clear()
        bound = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(attempt, 10))
        return max(random.uniform(0, bound), min((server.busy for server in there), default=0.0))  # noqa: S311 - no secret

    async def _check(self, server: Server[Findings]) -> Findings:
        try:
            async with asyncio.timeout(self.options.timeout):
                return await self._probe.run(server.url, self)
        except TimeoutError as exc:
            raise EngineTimeoutError(f"{server.url}: not checked within {self.options.timeout:.4g} s") from exc

    async def models(self, url: str) -> list[dict[str, Any]]:
        """Return the items of one server's ``/v1/models``."""
        answer = await self._transport.send("GET", url, "/v1/models", most_bytes=MOST_BYTES)
        served = answer.json(f"{url}/v1/models").get("data")
        if not isinstance(served, list) or not all(isinstance(item, dict) for item in served):
            raise EngineResponseError(f"{url}/v1/models: no list of models")
        return served

    async def texts(self, url: str, model: str, token_ids: Sequence[NDArray[np.int64]]) -> list[Float32]:
        """Return one server's token embeddings of prompts given as token ids, in one request."""
        settings = pooling_settings(model, self.options.embed_dtype)
        answer = await self.pool(url, text_body(token_ids, settings), sum(map(len, token_ids)))
        return self.rows(url, answer, len(token_ids))

    async def message(self, url: str, model: str, dialect: Dialect, part: bytes, text: str) -> Float32:
        """Return one server's token embeddings of a message of a picture part (or nothing) and a text."""
        settings = {**pooling_settings(model, self.options.embed_dtype), **request_template(dialect)}
        answer = await self.pool(url, message_body(part, text, settings), self._probe.most_tokens)
        return self.rows(url, answer, 1)[0]

    def check_again(self, url: str, known: Findings) -> None:
        """Check a server again before its next request, unless that was done since these findings."""
        for server in self._fleet.servers:
            if server.url == url and server.known is known:
                server.known = None

    async def pool(self, url: str, body: bytes, n_tokens: int) -> Answer:
        """Post one ``/pooling`` request of ``n_tokens`` to one server, once."""
        most = MOST_BYTES + 4 * expected_bytes(n_tokens, self.dim, self.options.embed_dtype)
        return await self._transport.send("POST", url, "/pooling", body, most_bytes=most)

    async def post(self, url: str, path: str, body: bytes) -> dict[str, Any]:
        """Post one request to one server, once, and return its answer as a JSON object."""
        answer = await self._transport.send("POST", url, path, body, most_bytes=MOST_BYTES)
        return answer.json(f"{url}{path}")

    def rows(self, url: str, answer: Answer, n_inputs: int) -> list[Float32]:
        """Return the token embeddings of an answer.

        Raises:
            EngineResponseError: invalid or not finite; it names the server.
        """
        try:
            return decode(answer.metadata, answer.body, n_inputs=n_inputs, dtype=self.options.embed_dtype)
        except EngineResponseError as exc:
            raise EngineResponseError(f"{url}/pooling: {exc}") from exc
