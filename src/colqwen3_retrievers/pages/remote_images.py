"""Fetching images from web addresses, when allowed.

An address may come from somebody else's document, so fetching is restricted: http and https only, public hosts only
unless named, a bounded number of redirects, bytes and seconds, and only what Pillow recognises as an image.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self, TypeVar
from urllib.parse import quote, urljoin, urlsplit

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.pages.images import open_header

AllowRemote = bool | Sequence[str]
"""Which web addresses may be fetched: False none; True those of public hosts; names of hosts, those hosts alone.

A named host may be in a private network; it is written as in the address, ``"images.intranet"`` or ``"10.0.0.7"``, and
includes all its ports.
"""

MAX_REMOTE_BYTES: Final = 32 * 2**20
"""Most bytes of a fetched image."""

MAX_REDIRECTS: Final = 5
"""Most redirects followed; each is checked like the first address."""

TIMEOUT: Final = 30.0
"""Seconds for one image with all redirects; looking up a host's name is not counted."""

_WEB = re.compile(r"https?://", re.IGNORECASE)
_REDIRECTS = (301, 302, 303, 307, 308)
_PATH_SAFE = "/%:@!$&'()*+,;=~-._?[]"  # what is quoted already stays so
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")  # NAT64: the last 32 bits are an IPv4 address

T = TypeVar("T")


def checked_remote(allow_remote: AllowRemote) -> bool | tuple[str, ...]:
    """Validate and normalise an ``allow_remote`` argument.

    Returns:
        A bool, or the names of hosts in lower case.

    Raises:
        ConfigError: neither a bool nor a list of host names.

    >>> checked_remote(["Images.Intranet", "10.0.0.7"])
    ('images.intranet', '10.0.0.7')
    >>> checked_remote("images.intranet")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: allow_remote: expected True, False or a list of host names, got ...
    """
    if isinstance(allow_remote, bool):
        return allow_remote
    if isinstance(allow_remote, str | bytes) or not isinstance(allow_remote, Sequence):
        raise ConfigError(f"allow_remote: expected True, False or a list of host names, got {allow_remote!r}")
    for name in allow_remote:
        if not isinstance(name, str) or not name or re.search(r"[/@\s]", name):
            raise ConfigError(f"allow_remote: expected names of hosts, without scheme and path, got {name!r}")
    return tuple(name.strip("[]").lower() for name in allow_remote)


def is_remote(source: object) -> bool:
    """Return whether something is a web address.

    >>> is_remote("https://example.org/a.png"), is_remote("a.png"), is_remote(b"https://")
    (True, False, False)
    """
    return isinstance(source, str) and _WEB.match(source) is not None


def local_image(source: T, allow_remote: AllowRemote = False) -> T | bytes:
    """Fetch a web address, when allowed; return anything else unchanged.

    Args:
        source: an image of any kind, as :func:`~colqwen3_retrievers.pages.images.open_image` takes it, or a web
            address.
        allow_remote: which addresses may be fetched; with False the address is returned.

    Returns:
        The bytes of the fetched image, or ``source``.

    Raises:
        ConfigError, PageError: see :func:`fetch_image`.

    >>> local_image("a.png", True), local_image("https://example.org/a.png")
    ('a.png', 'https://example.org/a.png')
    """
    allowed = checked_remote(allow_remote)
    if allowed is False or not isinstance(source, str) or not is_remote(source):
        return source
    return fetch_image(source, allow_remote=allowed)


def fetch_image(
    url: str, *, allow_remote: AllowRemote = True, max_bytes: int = MAX_REMOTE_BYTES, timeout: float = TIMEOUT
) -> bytes:
    """Fetch an image from a web address.

    A host that is not named is refused when any of its addresses is not public (loopback, private, link-local and so
    on), and the connection uses an address that was checked, so that a name cannot resolve to another host later.
    Proxies of the environment are not used: they would look the name up themselves. Cookies and credentials are never
    sent, and a redirect from https to http is not followed.

    Args:
        url: of http or https, without user name and password.
        allow_remote: which addresses may be fetched; see :data:`AllowRemote`.
        max_bytes: most bytes of the image, at least 1.
        timeout: seconds for all of it, above 0.

    Returns:
        The bytes of an image file whose header Pillow has read; :func:`~colqwen3_retrievers.pages.images.open_image`
        opens them.

    Raises:
        ConfigError: an address that may not be fetched, or an argument that cannot be used.
        PageError: the host does not answer, or not with an image, or with too many bytes, or too late. Messages name
            the address without its query.

    >>> fetch_image("http://127.0.0.1/a.png?key=secret")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: http://127.0.0.1/a.png: not fetched: 127.0.0.1 is no public address; ...
    """
    allowed = checked_remote(allow_remote)
    max_bytes = whole_number(max_bytes, "max_bytes", least=1)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise ConfigError(f"timeout: expected seconds above 0, got {timeout!r}")
    target = _Target.parse(url)
    if allowed is False:
        raise ConfigError(f"{target.shown}: an image URL is not fetched; allow_remote=True would")
    with _Deadline(timeout) as deadline:
        for _ in range(MAX_REDIRECTS + 1):
            answer = _request(target, allowed, max_bytes, deadline)
            if isinstance(answer, bytes):
                open_header(io.BytesIO(answer), name=target.shown)
                return answer
            following = _Target.parse(urljoin(target.url, answer))
            if target.tls and not following.tls:
                raise ConfigError(f"{target.shown}: not fetched: it leads from https to http")
            target = following
    raise PageError(f"more than {MAX_REDIRECTS} redirects", source=_Target.parse(url).shown)


@dataclass(frozen=True, slots=True)
class _Target:
    """A checked address."""

    url: str
    host: str
    port: int
    path: str
    tls: bool
    shown: str

    @classmethod
    def parse(cls, url: str) -> Self:
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").encode("idna").decode("ascii"), parts.port
        except (ValueError, TypeError, AttributeError):  # UnicodeError of a host name is a ValueError
            raise ConfigError("an image URL that cannot be read is not fetched") from None  # it may hold a secret
        tls = parts.scheme == "https"
        named = f"[{host}]" if ":" in host else host
        shown = f"{parts.scheme}://{named}{'' if port is None else f':{port}'}{quote(parts.path, _PATH_SAFE)}"[:200]
        if parts.scheme not in ("http", "https") or not host:
            raise ConfigError(f"{shown}: an image URL of this kind is not fetched; expected http or https and a host")
        if parts.username is not None or parts.password is not None:
            raise ConfigError(f"{shown}: not fetched: a user name or password stands in the URL")
        path = quote(parts.path, _PATH_SAFE) or "/"
        query = f"?{quote(parts.query, _PATH_SAFE)}" if parts.query else ""
        return cls(url, host, (443 if tls else 80) if port is None else port, path + query, tls, shown)


class _Deadline:
    """Ends a fetch in time, whatever it waits for: a server may send one byte a second forever."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.over = False
        self._ends = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def left(self) -> float:
        return max(self._ends - time.monotonic(), 1e-3)

    def watch(self, connection: socket.socket | None) -> None:
        with self._lock:
            self._socket = connection
            if self.over:
                self._shut()

    def _end(self) -> None:
        with self._lock:
            self.over = True
            self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # closed already
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # of the plain socket: TLS has no say in it

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()


class _Connection(http.client.HTTPConnection):
    """A connection to addresses that were checked."""

    def __init__(self, target: _Target, addresses: list[str], deadline: _Deadline) -> None:
        super().__init__(target.host, target.port)
        self.default_port = 443 if target.tls else 80  # other ports go into the Host header
        self._target, self._addresses, self._deadline = target, addresses, deadline

    def connect(self) -> None:
        for address in self._addresses:
            try:
                plain = socket.create_connection((address, self.port), timeout=self._deadline.left())
                break
            except OSError as exc:
                failure = exc
        else:
            raise failure
        self.sock = plain
        if self._target.tls:
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
        self.sock.settimeout(self._deadline.left())
        self._deadline.watch(self.sock)
        if isinstance(self.sock, ssl.SSLSocket):
            self.sock.do_handshake()


def _request(target: _Target, allowed: bool | tuple[str, ...], max_bytes: int, deadline: _Deadline) -> bytes | str:
    """Return the body of an address, or the location it redirects to."""
    late = PageError(f"no complete answer within {deadline.seconds:g} s", source=target.shown)
    try:
        connection = _Connection(target, _addresses(target, allowed), deadline)
        with contextlib.closing(connection):
            connection.request("GET", target.path, headers={
                "Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "colqwen3-retrievers",
                "Connection": "close",
            })  # fmt: skip
            with contextlib.closing(connection.getresponse()) as response:  # it may own the socket by now
                answer = _answer(target, response, max_bytes)
            deadline.watch(None)
    except (OSError, http.client.HTTPException) as exc:
        if deadline.over or isinstance(exc, TimeoutError):
            raise late from exc
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else type(exc).__name__  # no part of the URL
        raise PageError(f"cannot be fetched: {reason}", source=target.shown) from exc
    except PageError as exc:
        raise (late if deadline.over else exc) from exc.__cause__
    if deadline.over:
        raise late
    return answer


def _answer(target: _Target, response: http.client.HTTPResponse, max_bytes: int) -> bytes | str:
    if response.status in _REDIRECTS and (location := response.getheader("Location")):
        return location
    if response.status != http.HTTPStatus.OK:
        raise PageError(f"the server answers with status {response.status}", source=target.shown)
    if (coding := response.getheader("Content-Encoding", "identity").lower()) != "identity":
        raise PageError(f"the server packs the image ({coding[:20]!r}) though asked not to", source=target.shown)
    length = response.length  # None when the server does not tell
    if length is not None and length > max_bytes:
        raise PageError(f"{length:,} bytes, more than {max_bytes:,}", source=target.shown)
    data = response.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise PageError(f"more than {max_bytes:,} bytes", source=target.shown)
    if length is not None and len(data) < length:
        raise PageError(f"{len(data):,} of {length:,} bytes came", source=target.shown)
    if not data:
        raise PageError("the image is empty (0 bytes)", source=target.shown)
    return data


def _addresses(target: _Target, allowed: bool | tuple[str, ...]) -> list[str]:
    """Return the addresses of a host that may be contacted."""
    named = allowed if isinstance(allowed, tuple) else ()
    if isinstance(allowed, tuple) and target.host.lower() not in named:
        raise ConfigError(f"{target.shown}: not fetched: allow_remote does not name {target.host}")
    entries = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
    for address in addresses:
        if not named and not is_public(address):
            raise ConfigError(
                f"{target.shown}: not fetched: {address} is no public address; name the host in allow_remote=[...]"
            )
    return addresses


def is_public(address: str) -> bool:
    """Return whether an IP address is public, also where it is embedded in an IPv6 address.

    >>> [is_public(a) for a in ("8.8.8.8", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "64:ff9b::a00:1")]
    [True, False, False, False, False, False]
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inside = ip.ipv4_mapped or ip.sixtofour
        if ip in _TRANSLATED:
            inside = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inside is not None:
            return is_public(str(inside))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)
