"""Images at web addresses: a real server, and every way it can misbehave."""

from __future__ import annotations

import io
import random
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from colqwen3_retrievers.errors import ColQwen3Error, ConfigError, MissingExtraError, PageError
from colqwen3_retrievers.pages.remote_images import MAX_REDIRECTS, checked_remote, fetch_image, is_public, local_image
from tests.raw_server import raw_server


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, "PNG")
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    asked: list[tuple[str, dict[str, str]]]

    def do_GET(self) -> None:
        self.asked.append((self.path, dict(self.headers)))
        path = self.path.partition("?")[0]
        if path == "/page.png":
            self.answer(png())
        elif path == "/away":
            self.redirect("/page.png")
        elif path == "/loop":
            self.redirect("/loop")
        elif path == "/inside":
            self.redirect("http://127.0.0.2:9/page.png")
        elif path == "/file":
            self.redirect("file:///etc/passwd")
        elif path == "/text":
            self.answer(b"<html>no image</html>", "image/png")
        elif path == "/empty":
            self.answer(b"")
        elif path == "/huge":
            self.answer(bytes(5000))
        elif path == "/endless":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(bytes(5000))
        elif path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(bytes(50))
        elif path == "/packed":
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(png())
        elif path == "/no-headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            for _ in range(40):
                self.wfile.write(b"X-Drip: x\r\n")
                self.wfile.flush()
                time.sleep(0.1)
        elif path == "/drip":
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            for _ in range(40):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
        else:
            self.send_error(404)

    def answer(self, body: bytes, kind: str = "image/png") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def redirect(self, where: str) -> None:
        self.send_response(302)
        self.send_header("Location", where)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def asked() -> list[tuple[str, dict[str, str]]]:
    return []


@pytest.fixture
def url(asked: list[tuple[str, dict[str, str]]]) -> Iterator[str]:
    handler = type("Asked", (Handler,), {"asked": asked})

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that has heard enough goes away

    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_nothing_is_fetched_unless_asked_to(url: str, asked: list[object]) -> None:
    assert local_image(f"{url}/page.png") == f"{url}/page.png"
    with pytest.raises(ConfigError, match="allow_remote=True would"):
        fetch_image(f"{url}/page.png", allow_remote=False)
    assert asked == []


def test_a_named_host_is_fetched_without_cookies_or_keys(url: str, asked: list[tuple[str, dict[str, str]]]) -> None:
    assert fetch_image(f"{url}/page.png?size=2", allow_remote=["127.0.0.1"]) == png()
    assert local_image(f"{url}/page.png", ["127.0.0.1"]) == png()
    path, headers = asked[0]
    assert path == "/page.png?size=2"
    assert headers.keys() == {"Host", "Accept", "Accept-Encoding", "User-Agent", "Connection"}


def test_hosts_of_private_networks_must_be_named(url: str, asked: list[object]) -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1 is no public address; name the host"):
        fetch_image(f"{url}/page.png")
    with pytest.raises(ConfigError, match="does not name 127"):
        fetch_image(f"{url}/page.png", allow_remote=["images.intranet"])
    with pytest.raises(ConfigError, match="no public address"):
        fetch_image(f"{url.replace('127.0.0.1', 'localhost')}/page.png")
    assert asked == []


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "255.255.255.255", "::", "::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
     "2002:7f00:1::", "fec0::1", "3fff::1", "5f00::1", "100:0:0:1::1", "64:ff9b:1::1", "2001::1", "2001:20::1",
     "::ffff:0:7f00:1", "::7f00:1", "4000::1", "192.0.0.192", "192.0.0.9", "192.88.99.1", "168.63.129.16"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


def test_redirects_are_followed_a_few_times_and_checked_each_time(url: str, asked: list[object]) -> None:
    named = ["127.0.0.1"]
    assert fetch_image(f"{url}/away", allow_remote=named) == png()
    asked.clear()
    with pytest.raises(PageError, match=f"more than {MAX_REDIRECTS} redirects"):
        fetch_image(f"{url}/loop", allow_remote=named)
    assert len(asked) == MAX_REDIRECTS + 1
    with pytest.raises(ConfigError, match=r"does not name 127\.0\.0\.2"):
        fetch_image(f"{url}/inside", allow_remote=named)
    with pytest.raises(ConfigError, match="of this kind is not fetched"):
        fetch_image(f"{url}/file", allow_remote=named)


@pytest.mark.parametrize(
    ("path", "says"),
    [("/nothing", "status 404"), ("/text", "not an image"), ("/empty", "empty"), ("/huge", "5,000 bytes, more than"),
     ("/endless", "more than 999 bytes"), ("/short", "more than 999"), ("/packed", "packs the image")],
)  # fmt: skip
def test_answers_that_are_no_image(url: str, path: str, says: str) -> None:
    with pytest.raises(PageError, match=says) as caught:
        fetch_image(f"{url}{path}?key=secret", allow_remote=["127.0.0.1"], max_bytes=999)
    assert "secret" not in str(caught.value)
    assert path in str(caught.value)


def test_a_body_that_breaks_off(url: str) -> None:
    with pytest.raises(PageError, match="cannot be fetched: the answer is cut short"):
        fetch_image(f"{url}/short", allow_remote=["127.0.0.1"])


@pytest.mark.parametrize("path", ["/drip", "/no-headers"])
def test_a_server_that_drips_is_given_up(url: str, path: str) -> None:
    start = time.monotonic()
    with pytest.raises(PageError, match=r"no complete answer within 0\.5 s"):
        fetch_image(f"{url}{path}", allow_remote=["127.0.0.1"], timeout=0.5)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("size", ["-1", "-5", "zz", "", "f" * 20, "f" * 21, "+5", "1_0", "0x5", "9" * 5000])
def test_sizes_of_chunks_do_not_lift_the_bound(size: str) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + size.encode() + b"\r\n"
    says = r"a\.png: (cannot be fetched|more than 100,000 bytes)"
    with raw_server(head, bytes(65_536)) as (url, taken), pytest.raises(PageError, match=says):
        fetch_image(url, allow_remote=["127.0.0.1"], max_bytes=100_000)
    assert sum(taken) < 20 * 2**20  # what the kernel takes is not bounded more closely


@pytest.mark.parametrize(
    ("head", "flood", "says"),
    [(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", "more than 999 bytes"),
     (b"HTTP/1.1 200 OK\r\n\r\n", b"x", "more than 999 bytes"),
     (b"HTTP/1.1 200 OK\r\n", b"X-More: " + b"x" * 9000 + b"\r\n", "cannot be fetched"),
     (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", b"x", "cannot be fetched"),
     (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nContent-Length: 9\r\n\r\n", b"x", "cannot be fetched"),
     (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n", b"x", "more than 999"),
     (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", b"x", "not valid HTTP"),
     (b"", b"HTTP/1.1 100 Continue\r\n\r\n", "no complete answer within 1 s"),
     (b"\x16\x03\x01", b"", "cannot be fetched"),
     (b"", b"", "cannot be fetched")],
)  # fmt: skip
def test_answers_without_end_or_sense(head: bytes, flood: bytes, says: str) -> None:
    with raw_server(head, flood) as (url, _), pytest.raises(PageError, match=says):
        fetch_image(url, allow_remote=["127.0.0.1"], max_bytes=999, timeout=1)


def test_whatever_a_server_answers_the_error_is_ours() -> None:
    rng = random.Random(0)
    whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nLocation: /a\r\nServer: x\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    for _ in range(150):
        answer = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            answer[rng.randrange(len(answer))] = rng.choice([rng.randrange(256), 0, 10, 13, 45, 51, 58, 255])
        with raw_server(bytes(answer[: rng.randint(0, 2 * len(answer))])) as (url, _), pytest.raises(ColQwen3Error):
            fetch_image(url, allow_remote=["127.0.0.1"], timeout=5)


@pytest.mark.parametrize(
    "location",
    [b"http://[", b"http://[::1", b"//[", b"http://a:b/", b"http://a:99999/", b"http://\xff/", b"http://\xe2\x80\xa4/",
     b"http://a..b/", b"http://" + b"a" * 70 + b"/", b"ftp://a/", b"javascript:x", b"\xed\xa0\x80", b"http://a b/"],
)  # fmt: skip
def test_redirects_that_lead_nowhere(location: bytes) -> None:
    head = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location + b"\r\n\r\n"
    with raw_server(head) as (url, _), pytest.raises((ConfigError, PageError)):
        fetch_image(url, allow_remote=["127.0.0.1"], timeout=5)


def test_without_httpcore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpcore", None)
    with pytest.raises(MissingExtraError, match=r"colqwen3-retrievers\[remote\]"):
        fetch_image("http://127.0.0.1/a.png", allow_remote=["127.0.0.1"])


def resolving(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[list[str]]]) -> None:
    """Let names stand for addresses, others each time they are looked up."""
    real = socket.getaddrinfo

    def lookup(host: str, *args: Any, **kwargs: Any) -> Any:
        if host not in names:
            return real(host, *args, **kwargs)
        answers = names[host]
        return [entry for address in (answers.pop(0) if len(answers) > 1 else answers[0])
                for entry in real(address, *args, **kwargs)]  # fmt: skip

    monkeypatch.setattr(socket, "getaddrinfo", lookup)


def test_a_name_is_looked_up_once_and_its_host_is_told_the_name(
    url: str, asked: list[tuple[str, dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolving(monkeypatch, {"images.test": [["127.0.0.1"], ["127.0.0.9"]]})
    port = url.rpartition(":")[2]
    assert fetch_image(f"http://images.test:{port}/page.png", allow_remote=["Images.TEST"]) == png()
    assert asked[0][1]["Host"] == f"images.test:{port}"


def test_a_public_name_that_leads_inside_is_refused(
    url: str, asked: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = url.rpartition(":")[2]
    for addresses in (["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::ffff:127.0.0.1"]):
        resolving(monkeypatch, {"images.test": [addresses]})
        with pytest.raises(ConfigError, match="no public address"):
            fetch_image(f"http://images.test:{port}/page.png")
    assert asked == []


def test_a_redirect_from_a_public_host_leads_nowhere_inside(
    url: str, asked: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colqwen3_retrievers.pages.remote_images.is_public", lambda address: address == "127.0.0.1")
    with pytest.raises(ConfigError, match=r"127\.0\.0\.2 is no public address"):
        fetch_image(f"{url}/inside")
    assert len(asked) == 1


def test_numbers_in_disguise_are_told_by_the_address_they_mean() -> None:
    for host in ("2130706433", "0x7f000001", "127.1", "[::ffff:127.0.0.1]", "0"):
        with pytest.raises(ConfigError, match="no public address"):
            fetch_image(f"http://{host}/a.png")


@pytest.fixture
def tls(tmp_path: Path, asked: list[object]) -> Iterator[tuple[str, Path]]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", key, "-out", certificate, "-subj", "/CN=images.test", "-addext", "subjectAltName=DNS:images.test"],
        check=True, capture_output=True,
    )  # fmt: skip

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with Server(("127.0.0.1", 0), type("Asked", (Handler,), {"asked": asked})) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"https://images.test:{server.server_address[1]}", certificate
        server.shutdown()
        thread.join()


def test_certificates_are_checked_for_the_name(
    tls: tuple[str, Path], asked: list[object], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, certificate = tls
    resolving(monkeypatch, {"images.test": [["127.0.0.1"]], "other.test": [["127.0.0.1"]]})
    with pytest.raises(PageError, match="cannot be fetched"):
        fetch_image(f"{address}/page.png", allow_remote=["images.test"])  # nobody vouches for it
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert fetch_image(f"{address}/page.png", allow_remote=["images.test"]) == png()
    assert fetch_image(f"{address}/away", allow_remote=["images.test"]) == png()
    asked.clear()
    with pytest.raises(PageError, match="cannot be fetched"):
        fetch_image(f"{address.replace('images.test', 'other.test')}/page.png", allow_remote=["other.test"])
    assert asked == []
    monkeypatch.setattr(Handler, "redirect", lambda self, where: redirect_to(self, f"{url}/page.png"))
    with pytest.raises(ConfigError, match="from https to http"):
        fetch_image(f"{address}/away", allow_remote=["images.test", "127.0.0.1"])


def redirect_to(handler: Handler, where: str) -> None:
    handler.send_response(302)
    handler.send_header("Location", where)
    handler.end_headers()


def test_a_server_that_never_shakes_hands_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(PageError, match=r"no complete answer within 0\.3 s"):
            fetch_image(f"https://127.0.0.1:{silent.getsockname()[1]}/", allow_remote=["127.0.0.1"], timeout=0.3)
        assert time.monotonic() - start < 3


def test_proxies_of_the_environment_are_not_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert fetch_image(f"{url}/page.png", allow_remote=["127.0.0.1"]) == png()


def test_a_host_that_does_not_answer() -> None:
    with pytest.raises(PageError, match="cannot be fetched"):
        fetch_image("http://127.0.0.1:9/page.png", allow_remote=["127.0.0.1"])


@pytest.mark.parametrize(
    "address",
    ["ftp://example.org/a.png", "file:///etc/passwd", "http://", "http://ada:secret@127.0.0.1/a.png", "http://[::1/a",
     "http://127.0.0.1:99999/a.png", "http://127.0.0.1:-1/", "http://[", "http://\ud800/", "http://127.0.0.1/\ud800",
     "http://127.0.0.1/?\ud800", "http://\u2024/", "http://./", "http://a\0b/", "http://a b/"],
)  # fmt: skip
def test_addresses_that_cannot_be_fetched(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fetch_image(address, allow_remote=["127.0.0.1"])
    assert "secret" not in str(caught.value)


def test_allow_remote_is_checked() -> None:
    assert checked_remote(True) is True
    assert checked_remote(["[::1]"]) == ("::1",)
    for wrong in ("example.org", 1, ["http://example.org"], ["a b"], [""], [3]):
        with pytest.raises(ConfigError, match="allow_remote"):
            checked_remote(wrong)  # type: ignore[arg-type]
    for wrong in ({"max_bytes": 0}, {"timeout": 0}, {"max_bytes": True}, {"timeout": float("inf")},
                  {"timeout": float("nan")}, {"timeout": 1e300}, {"timeout": "3"}, {"timeout": True}):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            fetch_image("http://127.0.0.1/", **wrong)
