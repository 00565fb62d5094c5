"""Images at web addresses: a real server, and every way it can misbehave."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.remote_images import MAX_REDIRECTS, checked_remote, fetch_image, is_public, local_image


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
     "2002:7f00:1::", "fec0::1"],
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
    [("/nothing", "status 404"), ("/text", "not an image"), ("/empty", "empty"), ("/huge", "5,000 bytes, more than 999"),
     ("/endless", "more than 999 bytes"), ("/short", "more than 999")],
)  # fmt: skip
def test_answers_that_are_no_image(url: str, path: str, says: str) -> None:
    with pytest.raises(PageError, match=says) as caught:
        fetch_image(f"{url}{path}?key=secret", allow_remote=["127.0.0.1"], max_bytes=999)
    assert "secret" not in str(caught.value)
    assert path in str(caught.value)


def test_a_body_that_breaks_off(url: str) -> None:
    with pytest.raises(PageError, match=r"50 of 5,000 bytes came|cannot be fetched"):
        fetch_image(f"{url}/short", allow_remote=["127.0.0.1"])


def test_a_server_that_drips_is_given_up(url: str) -> None:
    start = time.monotonic()
    with pytest.raises(PageError, match=r"no complete answer within 0\.5 s"):
        fetch_image(f"{url}/drip", allow_remote=["127.0.0.1"], timeout=0.5)
    assert time.monotonic() - start < 3


def test_a_host_that_does_not_answer() -> None:
    with pytest.raises(PageError, match="cannot be fetched"):
        fetch_image("http://127.0.0.1:9/page.png", allow_remote=["127.0.0.1"])


@pytest.mark.parametrize(
    "address",
    ["ftp://example.org/a.png", "file:///etc/passwd", "http://", "http://ada:secret@127.0.0.1/a.png", "http://[::1/a",
     "http://127.0.0.1:99999/a.png"],
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
    for wrong in ({"max_bytes": 0}, {"timeout": 0}, {"max_bytes": True}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            fetch_image("http://127.0.0.1/", **wrong)
