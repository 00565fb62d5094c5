"""A connection to Qdrant: addresses, clients, and calls with retries."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from colqwen3_retrievers.errors import ConfigError, StoreError, StoreUnavailableError, require
from colqwen3_retrievers.fork import ForkSafeLock, after_fork, finalize, inherited

API_KEY_VARIABLE: Final = "QDRANT_API_KEY"

_DEFAULT_PORT = 6333
_NUMBERS = ("grpc", "timeout")
_PAUSES = (0.2, 0.6, 1.8, 5.4)  # seconds before the second, third... try; each shortened at random by up to a half
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_REFUSED = (401, 403)
_BUSY_CODES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED")  # of gRPC
_REFUSED_CODES = ("UNAUTHENTICATED", "PERMISSION_DENIED")
_LONGEST_MESSAGE = 300


@dataclass(frozen=True, slots=True)
class Address:
    """Where a collection is.

    Attributes:
        collection: its name.
        host: name or IP address of a server; "" for a folder.
        port: of the server's REST interface.
        tls: whether the connection is encrypted.
        grpc_port: of the server's gRPC interface, when that is to carry the data.
        timeout: seconds a call may take, or None for the default.
        path: the folder of the client's local mode, or None.
    """

    collection: str
    host: str = ""
    port: int = _DEFAULT_PORT
    tls: bool = False
    grpc_port: int | None = None
    timeout: int | None = None
    path: str | None = None

    def __str__(self) -> str:
        """Return a location that opens it again and contains no secret.

        >>> str(parse_address("qdrant://[::1]/pages?grpc=6334"))
        'qdrant://[::1]:6333/pages?grpc=6334'
        """
        if self.path is not None:
            return f"qdrant+path:{self.path}/{self.collection}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        numbers = {"grpc": self.grpc_port, "timeout": self.timeout}
        query = "&".join(f"{name}={value}" for name, value in numbers.items() if value is not None)
        address = f"{'qdrants' if self.tls else 'qdrant'}://{host}:{self.port}/{quote(self.collection, safe='')}"
        return f"{address}?{query}" if query else address


def parse_address(location: str) -> Address:
    """Parse the address of a collection.

    Args:
        location: ``qdrant://host[:6333]/collection``, ``qdrants://...`` over TLS, either with ``?grpc=6334`` to send
            token embeddings by gRPC and ``timeout=seconds``; or ``qdrant+path:folder/collection`` for the local mode
            of qdrant-client, which is for trying things out.

    Raises:
        ConfigError: not an address; an API key in it is not shown.

    >>> parse_address("qdrants://search.example.com/pages").tls
    True
    >>> parse_address("qdrant://host:6333")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: 'qdrant://host:6333': expected qdrant://host:6333/collection
    """
    scheme, _, rest = location.partition(":")
    if scheme == "qdrant+path":
        folder, _, collection = rest.rstrip("/").rpartition("/")
        if not folder or not collection:
            raise ConfigError(f"{location!r}: expected qdrant+path:folder/collection")
        return Address(collection, path=os.path.abspath(os.path.expanduser(folder)))  # noqa: PTH100, PTH111 - a text
    if not rest.startswith("//"):  # a Path folds "//" into "/"
        rest = f"/{rest}"
    try:
        parts = urlsplit(f"{scheme}:{rest}")
        port = parts.port or _DEFAULT_PORT
    except ValueError as exc:
        raise ConfigError(f"{scheme}: the address of a collection cannot be read: {exc}") from exc
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"{scheme}://…@{parts.hostname}: a key has no place in an address; use api_key= or {API_KEY_VARIABLE}"
        )
    shown = f"{scheme}://{parts.netloc}{parts.path}"
    collection = unquote(parts.path.removeprefix("/"))
    if not parts.hostname or not collection or "/" in collection or parts.fragment:
        raise ConfigError(f"{shown!r}: expected {scheme}://host:6333/collection")
    numbers: dict[str, int] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in _NUMBERS or not value.isascii() or not value.isdigit() or not 0 < int(value[:20]) < 10**9:
            raise ConfigError(f"{shown!r}: ?{name}=…: known are grpc=PORT and timeout=SECONDS, whole numbers from 1")
        numbers[name] = int(value)
    return Address(
        collection, parts.hostname, port, scheme == "qdrants", numbers.get("grpc"), numbers.get("timeout")
    )  # fmt: skip


def connect(address: Address, *, api_key: str | None = None, timeout: int = 60) -> Any:
    """Return a client, which has sent nothing yet.

    Args:
        address: of the collection.
        api_key: the server's key; None reads ``QDRANT_API_KEY``.
        timeout: seconds a call may take, unless the address sets it.

    Returns:
        A ``qdrant_client.QdrantClient``.

    Raises:
        MissingExtraError: qdrant-client is not installed.
        ConfigError: a key that cannot be sent in a header; it is not shown.
        StoreUnavailableError: the folder is open already, in this process or another.
        StoreError: the folder cannot be used.
    """
    client = require("qdrant", "qdrant_client", "qdrant-client").QdrantClient
    if address.path is not None:
        try:
            return client(path=address.path, force_disable_check_same_thread=True)
        except RuntimeError as exc:
            raise StoreUnavailableError(
                f"{address}: {address.path} is open already, in this process or another; one client at a time may have "
                "the folder, whatever the collection"
            ) from exc
        except Exception as exc:  # whatever its database and its pickles raise when they are damaged
            raise StoreError(f"{address}: cannot be opened: {exc}") from exc
    return client(
        host=address.host,
        port=address.port,
        https=address.tls,
        grpc_port=address.grpc_port or _DEFAULT_PORT + 1,
        prefer_grpc=address.grpc_port is not None,
        api_key=_checked_key(api_key),
        timeout=address.timeout or timeout,
        check_compatibility=False,  # it would send a request of its own and warn where we raise
    )


def _checked_key(given: object) -> str | None:
    """Return the key, checked here because a transport's error would show it."""
    key = given or os.environ.get(API_KEY_VARIABLE) or None
    if key is not None and not (isinstance(key, str) and key.isascii() and key.isprintable() and key == key.strip()):
        name = "api_key" if given else API_KEY_VARIABLE
        raise ConfigError(f"{name}: expected printable ASCII text without spaces around it")
    return key


class Connection:
    """Calls to a collection, retried where that may help.

    All of them may be repeated, because points are written whole and by id. The client's local mode, which takes no
    threads, gets one call at a time.

    Args:
        client: a ``qdrant_client.QdrantClient``.
        location: for messages.
        attempts: how often a call is tried at most.
        owned: whether to close the client with the connection.

    Raises:
        ConfigError: not a client.
    """

    def __init__(self, client: Any, location: str, *, attempts: int, owned: bool) -> None:
        package = require("qdrant", "qdrant_client", "qdrant-client")
        if not isinstance(client, package.QdrantClient):
            raise ConfigError(f"client: expected a qdrant_client.QdrantClient, got {type(client).__name__}")
        local = require("qdrant", "qdrant_client.local.qdrant_local", "qdrant-client").QdrantLocal
        self.local: bool = isinstance(client._client, local)
        self.location = location
        self._client: Any = client
        self._client_type, self._client_options = type(client), dict(client.init_options)
        self._attempts = attempts
        self._owned = owned
        self._closed = threading.Event()
        self._opening = ForkSafeLock()
        self._lock: Any = ForkSafeLock() if self.local else contextlib.nullcontext()
        self._finalizer = finalize(self, client.close) if owned else None
        after_fork(self._forget_client)

    def __call__(self, method: str, /, **arguments: Any) -> Any:
        """Call a method of the client.

        Raises:
            StoreUnavailableError: the server could not be reached, was too busy, or timed out, every time.
            StoreError: the server refused, with its message; or the connection is closed.
        """
        client = self._connected()
        for left in reversed(range(self._attempts)):
            try:
                with self._lock:
                    return getattr(client, method)(**arguments)
            except Exception as exc:
                error, pause = self._mapped(exc)
                if not left or not isinstance(error, StoreUnavailableError):
                    raise error from exc
                turn = self._attempts - left - 1
                usual = _PAUSES[min(turn, len(_PAUSES) - 1)] * random.uniform(0.5, 1)  # noqa: S311 - spreads load
                if self._closed.wait(usual if pause is None else min(pause, 30.0)):
                    raise error from exc
        raise AssertionError  # the last attempt returns or raises

    def check_open(self) -> None:
        """Check that it is open.

        Raises:
            StoreError: it is closed.
        """
        if self._closed.is_set():
            raise StoreError(f"{self.location}: the index is closed")

    def missing(self, exc: StoreError) -> bool:
        """Return whether an error says that the collection does not exist."""
        cause = exc.__cause__
        return getattr(cause, "status_code", None) == 404 or _grpc_code(cause) == "NOT_FOUND" or (
            self.local and isinstance(cause, ValueError) and "not found" in str(cause)
        )  # fmt: skip

    def exists_already(self, exc: StoreError) -> bool:
        """Return whether an error says that a collection exists already."""
        cause = exc.__cause__
        return "already exists" in str(exc) or getattr(cause, "status_code", None) == 409

    def close(self) -> None:
        """Close the client if it is owned; a second call does nothing."""
        self._closed.set()
        if self._finalizer is not None:
            with self._lock:
                self._finalizer()

    def _connected(self) -> Any:
        """Return the client: in a forked child a new one, since connections cannot be shared."""
        self.check_open()
        with self._opening:
            if self._client is None:
                try:
                    self._client = self._client_type(**self._client_options)
                except Exception as exc:
                    raise StoreUnavailableError(
                        f"{self.location}: opened before a fork, and not again in this process: {exc}"
                    ) from exc
                if self._owned:
                    self._finalizer = finalize(self, self._client.close)
            return self._client

    def _forget_client(self) -> None:
        """In a forked child, leave the parent's client alone; one whose data is all in memory is a copy."""
        closed, self._closed = self._closed.is_set(), threading.Event()
        if closed:
            self._closed.set()
        if self._client is None or self._client_options.get("location") == ":memory:":
            return
        inherited.append(self._client)
        self._client = self._finalizer = None

    def _mapped(self, exc: Exception) -> tuple[StoreError, float | None]:
        """Return an exception of the client as ours, and the seconds to wait."""
        status, code = getattr(exc, "status_code", None), _grpc_code(exc)
        source = getattr(exc, "source", None)  # what qdrant-client wraps
        pause = getattr(exc, "retry_after_s", None)
        unavailable = True
        if pause is not None:
            message = f"too busy: {exc}"
        elif status is not None:
            text, unavailable = _server_message(exc), status in _BUSY
            answer = f"the API key was refused ({status})" if status in _REFUSED else f"the server answered {status}"
            message = f"{answer}: {text}"
        elif code is not None:
            unavailable = code in _BUSY_CODES
            details = _short(exc.details() or "")  # type: ignore[attr-defined]  # gRPC errors with a code have details
            message = f"{'the API key was refused' if code in _REFUSED_CODES else code}: {details}"
        elif source is not None:
            httpx = require("qdrant", "httpx")
            if isinstance(source, httpx.TimeoutException):
                message = f"no answer in time ({type(source).__name__})"
            elif isinstance(source, httpx.TransportError | OSError):
                message = f"cannot be reached: {_short(str(source))}"
            else:
                message, unavailable = f"an answer that cannot be read: {_short(str(source))}", False
        elif isinstance(exc, OSError):
            message = f"cannot be reached: {exc}"
        else:
            message, unavailable = f"{type(exc).__name__}: {_short(str(exc))}", False
        kind = StoreUnavailableError if unavailable else StoreError
        return kind(f"{self.location}: {message}"), None if pause is None else float(pause)


def _grpc_code(exc: BaseException | None) -> str | None:
    code = getattr(exc, "code", None)
    return str(code().name) if callable(code) and hasattr(exc, "details") else None


def _server_message(exc: Exception) -> str:
    try:
        status = exc.structured()["status"]  # type: ignore[attr-defined]  # of UnexpectedResponse
        return _short(str(status["error"] if isinstance(status, dict) else status))
    except Exception:  # a proxy's page, or nothing
        content = getattr(exc, "content", b"")
        return _short(content.decode("utf-8", "replace") if isinstance(content, bytes) else str(content))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_MESSAGE else f"{line[: _LONGEST_MESSAGE - 1]}…"
