"""Fetching images from web addresses, when allowed.

An address may come from somebody else's document, so fetching is restricted: http and https only, public hosts only
unless named, a bounded number of redirects, bytes and seconds, and only what Pillow recognises as an image.
"""

from __future__ import annotations

import io
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote, urljoin, urlsplit

from colqwen3_retrievers.checks import seconds, whole_number
from colqwen3_retrievers.errors import ColQwen3Error, ConfigError, PageError, require
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
"""Seconds for one image with all redirects; looking up a host's name is counted, and cannot be interrupted."""

_WEB = re.compile(r"https?://", re.IGNORECASE)
_HOST = re.compile(r"[\w.:%-]*[\w:][\w.:%-]*", re.ASCII)
_REDIRECTS = (301, 302, 303, 307, 308)
_PATH_SAFE = "/%:@!$&'()*+,;=~-._?[]"  # what is quoted already stays so
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")  # NAT64: the last 32 bits are an IPv4 address
_UNICAST = ipaddress.IPv6Network("2000::/3")  # all that IANA has given out for public use
# What ipaddress of some Python from 3.11 on calls global: it knows the registry of its own year.
_SPECIAL = [ipaddress.ip_network(network) for network in (
    "192.0.0.0/24",  # IETF protocols; Oracle's cloud answers questions about the machine there
    "192.88.99.0/24",  # relays of 6to4
    "168.63.129.16",  # Azure's answers about the machine
    "2001::/23",  # IETF protocols, Teredo among them
    "3fff::/20",  # documentation (RFC 9637)
)]  # fmt: skip

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
    sent, and a redirect from https to http is not followed. It requires the extra ``remote``.

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
        MissingExtraError: httpcore is not installed.

    >>> fetch_image("http://127.0.0.1/a.png?key=secret")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: http://127.0.0.1/a.png: not fetched: 127.0.0.1 is no public address; ...
    """
    allowed = checked_remote(allow_remote)
    max_bytes = whole_number(max_bytes, "max_bytes", least=1)
    timeout = seconds(timeout, "timeout")
    target = first = _Target.parse(url)
    if allowed is False:
        raise ConfigError(f"{target.shown}: an image URL is not fetched; allow_remote=True would")
    deadline = _Deadline(timeout)
    for _ in range(MAX_REDIRECTS + 1):
        answer = _request(target, allowed, max_bytes, deadline)
        if isinstance(answer, bytes):
            open_header(io.BytesIO(answer), name=target.shown)
            return answer
        target = target.following(answer)
    raise PageError(f"more than {MAX_REDIRECTS} redirects", source=first.shown)


@dataclass(frozen=True, slots=True)
class _Target:
    """A checked address."""

    url: str
    tls: bool
    host: str
    port: int
    authority: str
    path: str
    shown: str

    @classmethod
    def parse(cls, url: str) -> Self:
        try:
            parts = urlsplit(url)
            host, tls = (parts.hostname or "").encode("idna").decode("ascii"), parts.scheme == "https"
            default = 443 if tls else 80
            port = default if parts.port is None else parts.port
            path, query = quote(parts.path, _PATH_SAFE), quote(parts.query, _PATH_SAFE)
        except (ValueError, TypeError, AttributeError):  # UnicodeError of a host or a lone surrogate is a ValueError
            raise ConfigError("an image URL that cannot be read is not fetched") from None  # it may hold a secret
        authority = (f"[{host}]" if ":" in host else host) + (f":{port}" if port != default else "")
        shown = f"{parts.scheme}://{quote(authority, '[:]%')}{path}"[:200]
        if parts.scheme not in ("http", "https") or not _HOST.fullmatch(host):
            raise ConfigError(f"{shown}: an image URL of this kind is not fetched; expected http or https and a host")
        if parts.username is not None or parts.password is not None:
            raise ConfigError(f"{shown}: not fetched: a user name or password stands in the URL")
        return cls(url, tls, host, port, authority, (path or "/") + (f"?{query}" if query else ""), shown)

    def following(self, location: str) -> Self:
        """Return the address that a redirect leads to."""
        try:
            url = urljoin(self.url, location)
        except ValueError:
            raise ConfigError(f"{self.shown}: not fetched: it leads to a URL that cannot be read") from None
        following = self.parse(url)
        if self.tls and not following.tls:
            raise ConfigError(f"{self.shown}: not fetched: it leads from https to http")
        return following


class _Deadline:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._ends = time.monotonic() + seconds

    def left(self) -> float:
        if (left := self._ends - time.monotonic()) > 0:
            return left
        raise TimeoutError


class _Network:
    """A network backend of httpcore that connects to checked addresses only.

    The check is here, at the only way out: whatever a URL is taken to mean, every connection is checked.
    """

    def __init__(self, core: Any, target: _Target, allowed: bool | tuple[str, ...], deadline: _Deadline) -> None:
        self._core = core
        self._target = target
        self._allowed = allowed
        self._deadline = deadline

    def connect_tcp(self, host: str, port: int, **_: object) -> _Stream:
        failure: Exception = OSError("no address")
        for address in self._addresses(host, port):
            try:
                stream = self._core.SyncBackend().connect_tcp(address, port, timeout=self._deadline.left())
                return _Stream(stream, self._deadline)
            except (self._core.ConnectError, self._core.ConnectTimeout) as exc:
                failure = exc
        raise failure

    def _addresses(self, host: str, port: int) -> list[str]:
        """Return the addresses of a host that may be contacted."""
        refused = f"{self._target.shown}: not fetched:"
        if isinstance(self._allowed, tuple) and host.lower() not in self._allowed:
            raise ConfigError(f"{refused} allow_remote does not name {host}")
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
        for address in addresses:
            if self._allowed is True and not is_public(address):
                raise ConfigError(f"{refused} {address} is no public address; name the host in allow_remote=[...]")
        return addresses


class _Stream:
    """A network stream of httpcore, every step of which has the time left: a server may send one byte a second."""

    def __init__(self, stream: Any, deadline: _Deadline) -> None:
        self._stream = stream
        self._deadline = deadline
        self.close = stream.close
        self.get_extra_info = stream.get_extra_info

    def read(self, max_bytes: int, timeout: object = None) -> Any:
        return self._stream.read(max_bytes, self._deadline.left())

    def write(self, buffer: bytes, timeout: object = None) -> None:
        self._stream.write(buffer, self._deadline.left())

    def start_tls(self, ssl_context: ssl.SSLContext, server_hostname: str, timeout: object = None) -> _Stream:
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, self._deadline.left()), self._deadline)


def _request(target: _Target, allowed: bool | tuple[str, ...], max_bytes: int, deadline: _Deadline) -> bytes | str:
    """Return the body of an address, or the location it redirects to."""
    core: Any = require("remote", "httpcore")
    url = core.URL(scheme="https" if target.tls else "http", host=target.host, port=target.port, target=target.path)
    headers = {
        "Host": target.authority, "Accept": "image/*", "Accept-Encoding": "identity",
        "User-Agent": "colqwen3-retrievers", "Connection": "close",
    }  # fmt: skip
    try:
        context = ssl.create_default_context() if target.tls else None
        network = _Network(core, target, allowed, deadline)
        with (
            core.ConnectionPool(context, network_backend=network) as pool,
            pool.stream("GET", url, headers=headers) as response,
        ):
            answer = _answer(target, response, max_bytes)
    except ColQwen3Error:
        raise
    except (TimeoutError, core.TimeoutException) as exc:
        raise PageError(f"no complete answer within {deadline.seconds:g} s", source=target.shown) from exc
    except Exception as exc:  # whatever a server can make the libraries below raise
        cause = exc if isinstance(exc, OSError) else exc.__cause__
        reason = (isinstance(cause, OSError) and cause.strerror) or type(exc).__name__  # repeats no URL and no answer
        if isinstance(exc, core.RemoteProtocolError):
            reason = "the answer is cut short or not valid HTTP"
        raise PageError(f"cannot be fetched: {reason}", source=target.shown) from exc
    return answer


def _answer(target: _Target, response: Any, max_bytes: int) -> bytes | str:
    headers: dict[bytes, str] = {name.lower(): value.decode("utf-8", "replace") for name, value in response.headers}
    if response.status in _REDIRECTS and (location := headers.get(b"location")):
        return location
    if response.status != 200:
        raise PageError(f"the server answers with status {response.status}", source=target.shown)
    if (coding := headers.get(b"content-encoding", "identity").lower()) != "identity":
        raise PageError(f"the server packs the image ({coding[:20]!r}) though asked not to", source=target.shown)
    if (length := int(headers.get(b"content-length", 0))) > max_bytes:
        raise PageError(f"{length:,} bytes, more than {max_bytes:,}", source=target.shown)
    data = bytearray()
    for part in response.iter_stream():
        data += part
        if len(data) > max_bytes:
            raise PageError(f"more than {max_bytes:,} bytes", source=target.shown)
    if not data:
        raise PageError("the image is empty (0 bytes)", source=target.shown)
    return bytes(data)


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
        if ip not in _UNICAST:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or any(ip in network for network in _SPECIAL))
