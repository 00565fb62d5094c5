"""HTTP exchanges with a vLLM server, over httpx: bounded in time and size, with our errors.

The client is asynchronous, in an event loop with its own thread, because only that bounds an exchange as a whole:
httpx's timeouts are for single reads, and a server that sends a byte now and then would never exceed them.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import threading
import time
from collections.abc import Coroutine, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, TypeVar

from colqwen3_retrievers.errors import EngineError, EngineResponseError, require

T = TypeVar("T")

KEEP_ALIVE = 3.0
"""Seconds an idle connection is kept: less than vLLM's 5, so that none is used while the server closes it."""

_MESSAGE_BYTES = 16_384
_QUOTED = 300
_HINTS = {
    401: "give api_key=, or set COLQWEN3_API_KEY",
    403: "is the api_key allowed to do this?",
    404: "is it a vLLM server, started with --runner pooling, and the url its root?",
}


class RefusalError(EngineResponseError):
    """An answer other than 200.

    Args:
        message: the request and the answer.
        status_code: the HTTP status.
        said: the server's own words.
        retry_after: seconds of its ``Retry-After``.
    """

    def __init__(self, message: str, *, status_code: int, said: str, retry_after: float | None) -> None:
        super().__init__(message, status_code=status_code, retryable=status_code == 429 or status_code >= 500)
        self.said = said
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[object, ...]:
        # across processes it becomes the public error
        return _response_error, (str(self), {"status_code": self.status_code, "retryable": self.retryable})


class UnreachableError(EngineError):
    """No answer: the connection could not be made, or broke."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of status 200.

    Attributes:
        metadata: vLLM's header of that name.
        body: all of it.
    """

    metadata: str | None
    body: bytes

    def json(self, what: str) -> dict[str, Any]:
        """Return the body as a JSON object.

        Raises:
            EngineResponseError: it is not one.

        >>> Answer(None, b'{"a": 1}').json("x")
        {'a': 1}
        """
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError) as exc:
            raise EngineResponseError(f"{what}: the answer is not JSON") from exc
        if not isinstance(value, dict):
            raise EngineResponseError(f"{what}: the answer is no JSON object")
        return value


class Transport:
    """A pool of connections, and the thread of its event loop.

    Args:
        connections: most at once.
        connect_timeout: seconds to make one.
        api_key: sent as a bearer token; in no repr, log or error.

    Raises:
        MissingExtraError: httpx is not installed.
    """

    def __init__(self, *, connections: int, connect_timeout: float, api_key: str | None) -> None:
        self._httpx: Any = require("server", "httpx")
        self._loop = asyncio.new_event_loop()
        self._closed = False
        self._lock = threading.Lock()  # so that no job is passed to a stopped loop, which would never end
        self._key = api_key
        self._client: Any = self._httpx.AsyncClient(
            headers={
                "Accept-Encoding": "identity",  # what unpacks to gigabytes cannot be counted in time
                **({"Authorization": f"Bearer {api_key}"} if api_key is not None else {}),
            },
            limits=self._httpx.Limits(
                max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=KEEP_ALIVE
            ),
            timeout=self._httpx.Timeout(None, connect=connect_timeout),
            follow_redirects=False,  # a redirect would carry pages, and on some hosts the key, to another server
        )
        self._thread = threading.Thread(target=self._loop.run_forever, name="colqwen3-http", daemon=True)
        self._thread.start()

    def run(self, job: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop, and return its result.

        Raises:
            EngineError: the transport is closed.
        """
        with self._lock:
            if self._closed:
                job.close()
                raise EngineError("the engine is closed")
            future = asyncio.run_coroutine_threadsafe(job, self._loop)
        try:
            return future.result()
        except (CancelledError, asyncio.CancelledError) as exc:
            raise EngineError("the engine was closed before the server answered") from exc
        finally:
            future.cancel()  # has an effect only when waiting was interrupted, as by Ctrl-C

    def close(self) -> None:
        """Cancel pending jobs and close all connections; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            shut = asyncio.run_coroutine_threadsafe(self._shut(), self._loop)
        shut.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _shut(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()

    async def send(self, method: str, server: str, path: str, body: bytes | None = None, *, most_bytes: int) -> Answer:
        """Send one request, once; cancelling it, as ``asyncio.timeout`` does, ends the exchange at once.

        Args:
            method: GET or POST.
            server: its address.
            path: from there.
            body: JSON.
            most_bytes: of the body of an answer of status 200; a longer one is an error.

        Raises:
            UnreachableError: no connection, or it broke before the answer was whole; retryable.
            RefusalError: another status than 200; retryable for 429 and 5xx.
            EngineResponseError: a body too long or compressed, or an address that cannot be used.
        """
        what = f"{method} {server}{path}"
        try:
            return await self._exchange(what, method, server + path, body, most_bytes)
        except EngineError:
            raise
        except self._httpx.ConnectTimeout as exc:
            raise UnreachableError(f"{what}: no connection in time", retryable=True) from self._bare(exc)
        except self._httpx.TransportError as exc:
            raise UnreachableError(f"{what}: {self._reason(exc)}", retryable=True) from self._bare(exc)
        except Exception as exc:  # whatever an address or an answer can make the libraries below raise
            raise EngineResponseError(f"{what}: {self._reason(exc)}") from self._bare(exc)

    async def _exchange(self, what: str, method: str, url: str, body: bytes | None, most_bytes: int) -> Answer:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        async with self._client.stream(method, url, content=body, headers=headers) as response:
            good = response.status_code == 200
            limit = most_bytes if good else _MESSAGE_BYTES
            packed = response.headers.get("content-encoding", "identity").lower() != "identity"
            if good and packed:
                raise EngineResponseError(f"{what}: the answer is compressed, though asked not to be")
            content = bytearray()
            async for part in response.aiter_raw():
                content += part
                if len(content) > limit:
                    break
            if good and len(content) > limit:
                raise EngineResponseError(f"{what}: the answer is longer than the {limit:,} bytes it can have")
            if good:
                return Answer(response.headers.get("metadata"), bytes(content))
            said = "" if packed else _words(content, self._key)
            raise _refusal(what, response.status_code, response.headers, said)

    def _reason(self, exc: Exception) -> str:
        return shown(str(exc), self._key) or type(exc).__name__

    def _bare(self, exc: Any) -> Exception | None:
        """Return an exception without the request of httpx, whose headers hold the key; None if its text does."""
        exc._request = None
        return exc if self._key is None or self._key not in str(exc) else None


def _refusal(what: str, status: int, headers: Mapping[str, str], said: str) -> RefusalError:
    text = f"{what}: HTTP {status}"
    if 300 <= status < 400:
        text += ": it redirects, which is not followed; give the final address as url"
    else:
        text += f": {said}" if said else ""
        text += f" ({_HINTS[status]})" if status in _HINTS else ""
    return RefusalError(text, status_code=status, said=said, retry_after=_seconds(headers.get("retry-after")))


def _response_error(message: str, fields: dict[str, Any]) -> EngineResponseError:
    return EngineResponseError(message, **fields)


def _words(body: bytes | bytearray, key: str | None) -> str:
    """Return the message in an error's body, vLLM's JSON or any text; shortened, and without the key.

    >>> _words(b'{"error": {"message": "no: Bearer sk-1"}}', "sk-1")
    'no: Bearer ***'
    """
    text = body.decode("utf-8", "replace")
    try:
        value: Any = json.loads(text)
        for name in ("error", "message", "detail"):
            if isinstance(value, dict) and name in value:
                value = value[name]
        words = value if isinstance(value, str) else json.dumps(value)
    except (ValueError, RecursionError):
        words = text
    return shown(words, key)


def shown(words: str, key: str | None = None) -> str:
    r"""Return a server's words fit to be shown: shortened, without the key, and of printable characters.

    Some gateways quote the request. The key is removed before shortening, which might leave half of it.

    >>> shown("no: \x1b[31mBearer sk-1", "sk-1")
    'no: ?[31mBearer ***'
    """
    for secret in (json.dumps(key)[1:-1], key) if key else ():
        words = words.replace(secret, "***")
    words = "".join(char if char.isprintable() else "?" for char in " ".join(words.split()))
    return words if len(words) <= _QUOTED else words[:_QUOTED] + " ..."


def _seconds(retry_after: str | None) -> float | None:
    """Return the seconds of a Retry-After header, also of a date (RFC 9110, section 10.2.3).

    >>> _seconds("7"), _seconds("soon"), _seconds(None), _seconds("-1"), _seconds("nan")
    (7.0, None, None, None, None)
    """
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
        except Exception:  # the parser's own list of them has grown with the years
            return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
