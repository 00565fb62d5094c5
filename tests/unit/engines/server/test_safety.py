"""What must not go wrong around servers whatever they do: another model in a fleet, a hang, a fork, a close, a key."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, Page, Query, ServerOptions
from colqwen3_retrievers.encoding.server_scores import server_scores
from colqwen3_retrievers.engines.server.client import ServerClient
from colqwen3_retrievers.engines.server.engine import ServerEngine
from colqwen3_retrievers.engines.server.transport import Answer, Transport, _words
from colqwen3_retrievers.errors import ConfigError, EngineError, EngineResponseError, InputTooLongError
from colqwen3_retrievers.models.checkpoint import open_checkpoint
from colqwen3_retrievers.models.rendering import EncoderInput
from tests.checkpoints import make_checkpoint
from tests.fault_server import FaultServer

OPTIONS = ServerOptions(timeout=4, connect_timeout=1, retries=2, concurrency=8, check_weights=False)
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tomoro"), "tomoro").folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("other"), "tomoro", seed=8).folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[FaultServer]:
    with FaultServer(folder) as running:
        yield running


def connect(folder: Path, *urls: str, options: ServerOptions = OPTIONS) -> ColQwen3Encoder:
    return ColQwen3Encoder(folder, url=urls, engine=options, max_visual_tokens=64)


# -- wrong results -----------------------------------------------------------------------------------------------------


def test_two_models_are_no_fleet(folder: Path, other: Path, server: FaultServer) -> None:
    """The weights of large checkpoints are not read at connecting; the servers are held against each other."""
    with FaultServer(other) as wrong, connect(folder, server.url, wrong.url) as encoder:
        with pytest.raises(ConfigError, match=r"serves another model than .* and a fleet is of one") as caught:
            encoder.encode_images([IMAGE] * 12)
        assert server.url in str(caught.value)
        assert wrong.url in str(caught.value)


@pytest.mark.parametrize("text", [True, False], ids=["a query", "a page"])
def test_a_server_exchanged_between_two_requests_is_noticed(folder: Path, other: Path, text: bool) -> None:
    """No request ever failed: a restart while nobody asked, or a balancer that shifted."""
    first, second = FaultServer(folder), FaultServer(other)

    def ask() -> None:
        if text:
            encoder.encode_queries(["revenue"])
        else:
            encoder.encode_images([IMAGE])

    with connect(folder, first.start().url) as encoder:
        ask()
        first.stop()
        second.port = first.port
        with second:
            with pytest.raises(ConfigError, match="serves another model than it did before"):
                ask()
            with pytest.raises(ConfigError, match="serves another model than it did before"):
                ask()


def test_a_server_started_anew_with_the_same_model_is_taken(folder: Path, server: FaultServer) -> None:
    with connect(folder, server.url) as encoder:
        (before,) = encoder.encode_queries(["revenue"])
        for _ in range(3):
            (after,) = encoder.encode_queries(["revenue"])
            assert np.array_equal(before.vectors, after.vectors)
        assert sum(one.path == "/v1/models" for one in server.seen[-8:]) <= 1


def test_a_server_that_contradicts_itself_is_not_asked_for_ever(
    folder: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one behind which two models answer by turns."""
    real = ServerClient.rows

    def rows(self: ServerClient, url: str, answer: Answer, n_inputs: int) -> list[np.ndarray]:
        results = real(self, url, answer, n_inputs)
        return [*results[:-1], -results[-1]] if n_inputs > 3 else results  # more than a check sends

    monkeypatch.setattr(ServerClient, "rows", rows)
    engine = ServerEngine(open_checkpoint(folder), urls=[server.url], options=OPTIONS)
    prompt = EncoderInput(True, "", np.arange(5, dtype=np.int64), slice(0, 5))
    before = len(server.seen)
    with pytest.raises(EngineResponseError, match="are several models behind it"):
        engine.embed([prompt] * 4)
    engine.close()
    assert len(server.seen) - before < 20


def test_a_text_beyond_the_server_is_too_long_and_alone(folder: Path) -> None:
    with FaultServer(folder, max_model_len=120) as small, connect(folder, small.url) as encoder:
        long = encoder.submit_queries(["revenue " * 200])
        short = encoder.submit_queries(["revenue"])
        with pytest.raises(InputTooLongError, match=r"127\.0\.0\.1:\d+ takes 120") as caught:
            long.result(20)
        assert caught.value.limit == 120
        assert len(short.result(20)) == 1


# -- time --------------------------------------------------------------------------------------------------------------


def test_a_server_that_hangs_leaves_time_for_another(folder: Path, server: FaultServer) -> None:
    with FaultServer(folder) as hangs, connect(folder, hangs.url, server.url) as encoder:
        encoder.encode_images([IMAGE] * 8)  # both are checked
        hangs.fault("hang", 99)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: encoder.encode_images([IMAGE])[0], range(4)))
        assert len(found) == 4
        assert any(one.path == "/pooling" for one in hangs.seen[-4:])


def test_a_transport_asked_after_its_close_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes between the last look and the end of the loop is not handed to a loop that has ended."""
    transport = Transport(connections=1, connect_timeout=1, api_key=None)
    real = asyncio.run_coroutine_threadsafe

    def late(job, loop):  # type: ignore[no-untyped-def]
        if threading.current_thread().name == "late":
            time.sleep(0.3)
        return real(job, loop)

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", late)
    ended: list[str] = []

    def ask() -> None:
        try:
            transport.run(asyncio.sleep(0, "x"))
            ended.append("answered")
        except EngineError:
            ended.append("closed")

    thread = threading.Thread(target=ask, name="late", daemon=True)
    thread.start()
    time.sleep(0.1)
    transport.close()
    thread.join(5)
    assert len(ended) == 1


def test_breaking_off_takes_the_request_along() -> None:
    transport = Transport(connections=1, connect_timeout=1, api_key=None)
    ended = threading.Event()

    async def long() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        transport.run(long())
    assert ended.wait(5)
    transport.close()


# -- processes ---------------------------------------------------------------------------------------------------------


def _score_in_child(encoder: ColQwen3Encoder, queue: multiprocessing.Queue[float]) -> None:
    queue.put(server_scores(encoder, Query("revenue"), [lambda: Page(id="p", text="of 2024")]).sums[0])


def test_scoring_in_a_forked_child_has_connections_of_its_own(folder: Path, server: FaultServer) -> None:
    """Also where nothing was ever encoded in this process, so that no engine counted the fork."""
    code = (
        "import sys, multiprocessing\n"
        "from tests.unit.engines.server.test_safety import connect, _score_in_child\n"
        "context = multiprocessing.get_context('fork')\n"
        "encoder, queue = connect(sys.argv[1], sys.argv[2]), context.Queue()\n"
        "_score_in_child(encoder, queue); here = queue.get(timeout=20)\n"
        "child = context.Process(target=_score_in_child, args=(encoder, queue), daemon=True)\n"
        "child.start()\n"
        "assert abs(queue.get(timeout=20) - here) < 1e-3\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), server.url], capture_output=True, text=True, timeout=90, check=False,
        cwd=Path(__file__).parents[4], env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_library_that_exits_while_opening_leaves_nobody_waiting(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a Rust extension's panic does, which is no Exception."""

    def exits(*_: object, **__: object) -> object:
        raise SystemExit(3)

    monkeypatch.setattr("colqwen3_retrievers.encoding.opened_model.open_checkpoint", exits)
    with ColQwen3Encoder(folder, engine="torch", device="cpu") as encoder:
        for _ in range(2):
            with pytest.raises(EngineError, match=r"cannot be opened: SystemExit\(3\)"):
                encoder.submit_queries(["revenue"]).result(5)


def test_errors_of_servers_survive_a_pickle(folder: Path, server: FaultServer) -> None:
    with connect(folder, server.url) as encoder:
        encoder.encode_queries(["it is checked"])
        server.fault("400", 1)
        with pytest.raises(EngineResponseError) as caught:
            encoder.encode_queries(["revenue"])
    again = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(again, EngineResponseError)
    assert (str(again), again.status_code, again.retryable) == (str(caught.value), 400, False)


# -- the key -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["sk-very-secret", 'sk-"very\\secret', "sk-very  secret"])
@pytest.mark.parametrize("before", [0, 280, 290, 296])
def test_no_part_of_the_key_is_quoted(key: str, before: int) -> None:
    for words in (f"{'x' * before} {key} refused", {"code": f"{'x' * before}{key}"}):
        body = json.dumps({"error": words}).encode()
        assert "sk-" not in _words(body, key)
