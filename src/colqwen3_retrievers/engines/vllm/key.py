"""Middleware that requires the API key on every path of a vLLM server that encodes.

vLLM compares ``VLLM_API_KEY`` only below ``/v1`` and a few other prefixes; ``/pooling``, ``/score`` and ``/rerank``,
the paths used here, stay open. The command line of :mod:`colqwen3_retrievers.engines.vllm.serving` names this as a
``--middleware``.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN_PATHS = ("/health", "/ping", "/metrics", "/version")
"""Paths that need no key: health and metrics."""

VARIABLE = "VLLM_API_KEY"


class RequireKey:
    """ASGI middleware: 401 without ``Authorization: Bearer KEY``, where ``VLLM_API_KEY`` is set.

    Args:
        app: the wrapped application.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        key = os.environ.get(VARIABLE)
        self._digest = hashlib.sha256(key.encode()).digest() if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if self._digest is None or scope["type"] not in ("http", "websocket") or self._admits(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        body = b'{"error": "Unauthorized"}'
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _admits(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope.get("method") == "OPTIONS" or path in OPEN_PATHS:
            return True
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = header.partition(b" ")
        # digests of one length, so that the time this takes tells nothing of the key
        return scheme.lower() == b"bearer" and secrets.compare_digest(hashlib.sha256(key).digest(), self._digest or b"")
