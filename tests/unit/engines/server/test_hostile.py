"""Answers made to hurt: whatever a server sends, the error is ours, the bytes are counted and the key is not shown."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import traceback
from collections.abc import Iterator

import numpy as np
import pytest

from colqwen3_retrievers.engines.server.probe import _cosines
from colqwen3_retrievers.engines.server.scoring import _scores
from colqwen3_retrievers.engines.server.transport import Answer, Transport, _seconds, _words
from colqwen3_retrievers.engines.server.wire import decode
from colqwen3_retrievers.errors import EngineError, EngineResponseError
from tests.raw_server import raw_server

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
KEY = "sk-very-secret"


@pytest.fixture
def transport() -> Iterator[Transport]:
    transport = Transport(connections=2, connect_timeout=5, api_key=KEY)
    yield transport
    transport.close()


def get(transport: Transport, url: str, path: str = "", most_bytes: int = 10_000) -> Answer:
    return transport.run(transport.send("GET", url, path, most_bytes=most_bytes))


@pytest.mark.parametrize("size", ["-1", "-5", "zz", "f" * 20, "9" * 5000])
@pytest.mark.parametrize("status", ["200 OK", "500 Sorry"])
def test_sizes_of_chunks_do_not_lift_the_bound(transport: Transport, size: str, status: str) -> None:
    head = CHUNKED.replace(b"200 OK", status.encode()) + size.encode() + b"\r\n"
    with raw_server(head, bytes(65_536)) as (url, taken), pytest.raises(EngineError, match=r"127\.0\.0\.1") as caught:
        get(transport, url)
    assert sum(taken) < 20 * 2**20
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("coding", ["gzip", "gzip, gzip", "br", "zstd", "made-up"])
def test_nothing_is_unpacked(transport: Transport, coding: str) -> None:
    bomb = gzip.compress(gzip.compress(bytes(2**24)))
    head = (
        b"Content-Encoding: " + coding.encode() + b"\r\nContent-Length: " + str(len(bomb)).encode() + b"\r\n\r\n" + bomb
    )
    with raw_server(OK + head) as (url, _), pytest.raises(EngineResponseError, match="is compressed, though"):
        get(transport, url)
    with (
        raw_server(b"HTTP/1.1 500 Sorry\r\n" + head) as (url, _),
        pytest.raises(EngineResponseError, match=r"HTTP 500$"),
    ):
        get(transport, url)


def test_whatever_bytes_come_the_error_is_ours(transport: Transport) -> None:
    rng = random.Random(0)
    whole = CHUNKED[:-2] + b"Retry-After: 1\r\nmetadata: {}\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    for _ in range(150):
        answer = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            answer[rng.randrange(len(answer))] = rng.choice([rng.randrange(256), 0, 10, 13, 45, 51, 58, 255])
        sent = bytes(answer[: rng.randint(0, 2 * len(answer))])
        with raw_server(sent) as (url, _), contextlib.suppress(EngineError):
            get(transport, url)


@pytest.mark.parametrize(
    "url", ["http://\ud800", "http://a/\ud800", "http://\u2024", "http://a..b", "http://a\0b", "http://" + "a" * 70]
)
def test_addresses_that_name_no_server(transport: Transport, url: str) -> None:
    with pytest.raises(EngineError, match="GET http://"):
        get(transport, url)


def test_a_key_in_a_broken_answer_is_not_shown(transport: Transport) -> None:
    answer = f"Bearer {KEY} is no status\r\n\r\n".encode()
    with raw_server(answer) as (url, _), pytest.raises(EngineError, match=r"Bearer \*\*\*") as caught:
        get(transport, url)
    assert KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("depth", [900, 990, 1000, 8000])
def test_errors_nested_deeply_are_quoted_as_they_are(depth: int) -> None:
    assert _words(b"[" * depth + b"]" * depth, None).startswith("[[[")


def test_what_is_quoted_can_be_printed() -> None:
    assert _words(b'{"error": "\\ud800 \\u001b[31m"}', None) == "? ?[31m"


def test_any_retry_after_is_read_or_ignored() -> None:
    rng = random.Random(0)
    for _ in range(5000):
        text = list("Mon, 01 Jan 2024 00:00:00 +0000")
        for _ in range(rng.randint(0, 6)):
            text[rng.randrange(len(text))] = rng.choice(["", ":", "-", "9", "999999999999", "Jan", "\u0663", "(", "."])
        assert (_seconds("".join(text)) or 0) >= 0


WORTHLESS: list[object] = [None, True, -1, 10**400, 1e308, float("nan"), "", "a", [], {}, [[]], {"index": 0}, "\ud800"]


@pytest.mark.parametrize("value", WORTHLESS, ids=range(len(WORTHLESS)))
def test_json_of_any_shape(value: object) -> None:
    good = {"index": 0, "embed_dtype": "float16", "endianness": "little", "start": 0, "end": 4, "shape": [1, 2]}
    for changed in [value, {"data": value}, {"data": [value]}, *({"data": [{**good, name: value}]} for name in good)]:
        with contextlib.suppress(EngineResponseError):
            decode(json.dumps(changed), bytes(4), n_inputs=1, dtype="float16")
    for changed in ({}, {"data": value}, {"data": [value]}, *({"data": [{"index": 0, "score": 1, name: value}]}
                    for name in ("index", "score"))):  # fmt: skip
        with contextlib.suppress(EngineResponseError):
            assert np.isfinite(_scores(changed, "score", 1, "x")).all()


def test_embeddings_too_large_for_their_squares_are_like_nothing() -> None:
    large = np.full((1, 4), 3e38, dtype=np.float32)
    other = np.array([[1, -1, 1, -1]], dtype=np.float32)
    assert _cosines(large, other)[0] == pytest.approx(0)
    assert _cosines(large, large)[0] == pytest.approx(1)
