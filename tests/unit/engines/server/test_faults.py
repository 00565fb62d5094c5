"""What a caller gets when a server misbehaves, over a real socket: the table, the circuit, the fleet, the key."""

from __future__ import annotations

import logging
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, Page, ServerOptions
from colqwen3_retrievers.errors import (
    ConfigError,
    DimensionError,
    EngineError,
    EngineResponseError,
    EngineTimeoutError,
)
from tests.checkpoints import make_checkpoint
from tests.fault_server import FaultServer

TIMEOUT = 3.0
RETRIES = 2
ONCE_MORE = RETRIES + 1
OPTIONS = ServerOptions(timeout=TIMEOUT, connect_timeout=1.0, retries=RETRIES, concurrency=8)
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tomoro"), "tomoro").folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[FaultServer]:
    with FaultServer(folder) as running:
        yield running


@pytest.fixture(scope="module")
def truth(folder: Path) -> np.ndarray:
    with ColQwen3Encoder(folder, engine="torch", device="cpu", max_visual_tokens=64) as encoder:
        return encoder.encode_images([IMAGE])[0].vectors


@pytest.fixture
def connect(folder: Path) -> Iterator[Callable[..., ColQwen3Encoder]]:
    opened: list[ColQwen3Encoder] = []

    def make(*urls: str, options: ServerOptions = OPTIONS, **settings: object) -> ColQwen3Encoder:
        opened.append(ColQwen3Encoder(folder, url=urls, engine=options, max_visual_tokens=64, **settings))
        return opened[-1]

    yield make
    for encoder in opened:
        encoder.close()


@pytest.fixture(scope="module")
def encoder(folder: Path, server: FaultServer) -> Iterator[ColQwen3Encoder]:
    with ColQwen3Encoder(folder, url=server.url, engine=OPTIONS, max_visual_tokens=64) as made:
        made.encode_queries(["it is checked first"])
        yield made


# fault, how many requests meet it, what the caller gets (None: the right result), its words, requests it takes
TABLE = [
    ("429", 1, None, "", 2),
    ("429", 9, EngineResponseError, "HTTP 429: fault 429", ONCE_MORE),
    ("500", 1, None, "", 2),
    ("500", 9, EngineResponseError, "HTTP 500: fault 500", ONCE_MORE),
    ("503", 2, None, "", 3),
    ("truncated", 1, None, "", 2),
    ("truncated", 9, EngineError, "peer closed connection", ONCE_MORE),
    ("close", 1, None, "", 2),
    ("close", 9, EngineError, "disconnected", ONCE_MORE),
    ("reset", 2, None, "", 3),
    ("400", 9, EngineResponseError, "HTTP 400: fault 400", 1),
    ("401", 9, EngineResponseError, "give api_key=, or set COLQWEN3_API_KEY", 1),
    ("404", 9, EngineResponseError, "--runner pooling", 1),
    ("307", 9, EngineResponseError, "it redirects, which is not followed", 1),
    ("rows short", 9, ConfigError, "74 token embeddings for the 75 tokens of a 256 x 256 image", 1),
    ("half the dim", 9, DimensionError, "expected dim 48, got 24", 1),
    ("nan", 9, EngineResponseError, "NaN or infinity", 1),
    ("garbage", 9, EngineResponseError, "not vLLM's JSON", 1),
    ("no header", 9, EngineResponseError, "no metadata header", 1),
    ("body short", 9, EngineResponseError, "should lie in bytes 0 to", 1),
    ("body long", 9, EngineResponseError, "its metadata header tells of", 1),
    ("two inputs", 9, EngineResponseError, "about 2 inputs, 1 were sent", 1),
    ("negative", 9, EngineResponseError, "rows of shape", 1),
    ("shape of words", 9, EngineResponseError, "rows of shape", 1),
    ("endless", 9, EngineResponseError, "longer than", 1),
    ("drip", 9, EngineTimeoutError, "no whole answer within 3 s", 1),
    ("header drip", 9, EngineTimeoutError, "no whole answer within 3 s", 1),
    ("hang", 9, EngineTimeoutError, "no whole answer within 3 s", 1),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "times", "error", "words", "requests"), TABLE, ids=[f"{r[0]}-{r[1]}" for r in TABLE])
def test_what_the_caller_gets(
    server: FaultServer, encoder: ColQwen3Encoder, truth: np.ndarray,
    fault: str, times: int, error: type[EngineError] | None, words: str, requests: int,
) -> None:  # fmt: skip
    server.fault(fault, times)
    before, start = len(server.seen), time.monotonic()
    try:
        if error is None:
            rows = encoder.encode_images([IMAGE])[0].vectors
            assert (rows * truth).sum(axis=1).min() >= 0.9999
        else:
            with pytest.raises(error) as caught:
                encoder.encode_images([IMAGE])
            assert words in str(caught.value)
            assert server.url in str(caught.value)
            if isinstance(caught.value, EngineError):
                assert caught.value.retryable == (fault in ("429", "500", "truncated", "close") or "within" in words)
    finally:
        server.clear()
    assert time.monotonic() - start < TIMEOUT + 1.0
    assert len(server.seen) - before == requests
    assert encoder.encode_images([IMAGE])[0].vectors.shape == truth.shape  # and the next call is well


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colqwen3_retrievers.engines.server.fleet.FIRST_PAUSE", 0.6)
    monkeypatch.setattr("colqwen3_retrievers.engines.server.fleet.LONGEST_PAUSE", 0.6)


def until_given_up(encoder: ColQwen3Encoder) -> str:
    """Ask a server that is gone until nobody waits for it any more."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with pytest.raises(EngineError) as caught:
            encoder.encode_queries(["nobody is there"])
        if "not asked again" in str(caught.value):
            return str(caught.value)
    raise AssertionError("it is asked for ever")


def models_asked(server: FaultServer) -> int:
    return sum(one.path == "/v1/models" for one in server.seen)


def images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 255, (256, 256, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.usefixtures("short_pauses")
def test_a_server_that_is_gone_fails_fast_and_is_found_again(
    folder: Path, connect: Callable[..., ColQwen3Encoder]
) -> None:
    server = FaultServer(folder).start()
    encoder = connect(server.url)
    encoder.encode_queries(["it works"])
    checks = models_asked(server)
    server.stop()
    words = until_given_up(encoder)
    assert "not asked again for" in words
    start = time.monotonic()
    with pytest.raises(EngineError, match="not asked again for") as caught:
        encoder.encode_queries(["nobody is there"])
    assert caught.value.retryable
    assert time.monotonic() - start < 0.2
    server.start()
    time.sleep(0.8)
    with ThreadPoolExecutor(16) as pool:  # all of them wait for one check
        found = list(pool.map(lambda i: encoder.encode_queries([f"question {i}"]), range(16)))
    assert len(found) == 16
    assert models_asked(server) == checks + 1
    server.stop()


def test_a_server_that_is_back_at_once_is_not_missed(folder: Path, connect: Callable[..., ColQwen3Encoder]) -> None:
    with FaultServer(folder, delay=0.05) as server:
        encoder = connect(server.url, options=ServerOptions(timeout=30, concurrency=8))
        pages = encoder.submit_pages([Page(id=str(i), image=image) for i, image in enumerate(images(40))])
        while len(server.pooled()) < 15:
            time.sleep(0.01)
        server.stop()
        server.start()
        assert len(pages.result(30)) == 40


@pytest.mark.usefixtures("short_pauses")
def test_a_server_that_comes_back_with_another_model_is_refused(
    folder: Path, tmp_path: Path, connect: Callable[..., ColQwen3Encoder]
) -> None:
    server = FaultServer(folder).start()
    encoder = connect(server.url)
    encoder.encode_queries(["it works"])
    server.stop()
    until_given_up(encoder)
    other = FaultServer(make_checkpoint(tmp_path / "other", "tomoro", seed=8).folder)
    other.port = server.port
    with other:
        time.sleep(0.8)
        with pytest.raises(ConfigError, match="does not serve"):
            encoder.encode_queries(["who is there?"])


def test_a_fleet_goes_on_when_one_server_is_killed(folder: Path, connect: Callable[..., ColQwen3Encoder]) -> None:
    pages = images(60)
    with ColQwen3Encoder(folder, engine="torch", device="cpu", max_visual_tokens=64) as torch_encoder:
        truth = torch_encoder.encode_images(pages)
    with FaultServer(folder, delay=0.05) as stays, FaultServer(folder, delay=0.05) as goes:
        encoder = connect(stays.url, goes.url, options=ServerOptions(timeout=20, retries=4, concurrency=8))
        future = encoder.submit_pages([Page(id=str(i), image=page) for i, page in enumerate(pages)])
        while len(goes.pooled()) < 12:
            time.sleep(0.01)
        goes.stop()
        found = future.result(20)
        for want, got in zip(truth, found, strict=True):
            assert (want.vectors * got.vectors).sum(axis=1).min() >= 0.9999
        assert len(stays.pooled()) > 30


def test_the_server_with_least_to_do_is_asked(folder: Path, connect: Callable[..., ColQwen3Encoder]) -> None:
    with FaultServer(folder) as slow, FaultServer(folder) as fast:
        encoder = connect(slow.url, fast.url, options=ServerOptions(concurrency=8))
        encoder.encode_images(images(8))  # both are checked
        slow.delay = 1.0
        before = len(slow.pooled()), len(fast.pooled())
        encoder.encode_images(images(40))
        assert len(fast.pooled()) - before[1] > 1.5 * (len(slow.pooled()) - before[0]) > 0


def test_retry_after_is_kept(server: FaultServer, encoder: ColQwen3Encoder) -> None:
    server.fault("429", 1, retry_after=0.8)
    start = time.monotonic()
    encoder.encode_images([IMAGE])
    assert time.monotonic() - start > 0.8
    server.fault("429", 1, retry_after=60)
    start = time.monotonic()
    with pytest.raises(EngineResponseError, match="429"):  # longer than there is time: told now
        encoder.encode_images([IMAGE])
    assert time.monotonic() - start < 0.5


def test_the_key_is_sent_and_never_shown(
    folder: Path, connect: Callable[..., ColQwen3Encoder], caplog: pytest.LogCaptureFixture
) -> None:
    key = "sk-very-secret"
    caplog.set_level(logging.DEBUG)
    with FaultServer(folder, api_key=key) as server:
        with pytest.raises(EngineResponseError, match="COLQWEN3_API_KEY") as caught:
            connect(server.url).encode_queries(["without a key"])
        assert caught.value.status_code == 401
        encoder = connect(server.url, api_key=key)
        encoder.encode_queries(["with it"])
        server.fault("403", 9)  # this one quotes what it was sent
        with pytest.raises(EngineResponseError, match=r"fault 403 for Bearer \*\*\*") as caught:
            encoder.encode_queries(["with it"])
        server.clear()
        server.stop()
        with pytest.raises(EngineError) as gone:
            encoder.encode_queries(["with it"])
    shown = [repr(encoder), str(encoder.to_dict()), caplog.text, repr(vars(encoder))]
    for error in (caught.value, gone.value):
        shown += ["".join(traceback.format_exception(error)), repr(error.__dict__)]
        link = error.__cause__
        while link is not None:
            shown += [repr(link), repr(vars(link))]
            link = link.__cause__ or link.__context__
    assert not [text for text in shown if key in text]
    assert key.encode() not in pickle.dumps(encoder)


def test_closing_does_not_wait_for_a_server_that_hangs(folder: Path, connect: Callable[..., ColQwen3Encoder]) -> None:
    with FaultServer(folder) as server:
        others = set(threading.enumerate())
        encoder = connect(server.url, options=ServerOptions(timeout=60))
        encoder.encode_queries(["it works"])
        server.fault("hang", 1)
        before = len(server.seen)
        future = encoder.submit_queries(["for ever"])
        while len(server.seen) == before:
            time.sleep(0.01)
        start = time.monotonic()
        encoder.close()
        with pytest.raises(EngineError, match="closed"):
            future.result(5)
        assert time.monotonic() - start < 2
        left = set(threading.enumerate()) - others
        assert not [thread for thread in left if thread.name.startswith(("colqwen3-http", "colqwen3-engine"))]


def test_concurrent_queries_share_requests(folder: Path, connect: Callable[..., ColQwen3Encoder]) -> None:
    with FaultServer(folder, delay=0.1) as server:
        encoder = connect(server.url)
        encoder.encode_queries(["it is checked"])
        before = len(server.pooled())
        with ThreadPoolExecutor(64) as pool:
            found = list(pool.map(lambda i: encoder.encode_queries([f"question {i}"])[0], range(64)))
        requests = server.pooled()[before:]
        assert len(found) == 64
        assert sum(one.n_inputs for one in requests) == 64
        assert len(requests) <= 16
        assert max(one.n_inputs for one in requests) == 16


def test_a_query_does_not_wait_for_pages(folder: Path, connect: Callable[..., ColQwen3Encoder]) -> None:
    with FaultServer(folder, delay=0.3) as server:
        encoder = connect(server.url, options=ServerOptions(concurrency=4, timeout=30))
        encoder.encode_queries(["it is checked"])
        pages = encoder.submit_pages([Page(id=str(i), image=image) for i, image in enumerate(images(16))])
        while server.active < 3:
            time.sleep(0.01)
        before = len(server.pooled())
        encoder.encode_queries(["now"])
        assert len(server.pooled()) - before <= 7  # itself, and what the three page lanes did meanwhile
        assert not pages.done()
        assert len(pages.result(30)) == 16
        assert server.most_active <= 4
