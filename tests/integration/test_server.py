"""The server engine against a real vLLM server over ``tiny``: killed, crowded, scoring by itself, beside the others."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from colqwen3_retrievers import ColQwen3Encoder, Page, PageIndex, Query, ServerOptions, VLLMOptions, similarity_map
from colqwen3_retrievers.encoding.server_scores import server_scores
from colqwen3_retrievers.errors import EngineError
from tests.server_process import CPU_ENVIRONMENT, ServerProcess

WORDS = [
    "revenue", "profit", "harbour", "winter", "engine", "copper", "forest", "market", "salary", "bridge", "orchid",
    "tunnel", "summer", "energy", "budget", "museum", "railway", "climate", "battery", "village",
]  # fmt: skip
TIMEOUT = 60.0

pytestmark = pytest.mark.filterwarnings("ignore")  # those of vLLM and its dependencies, in one of the tests


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess("tiny", tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def torch_encoder() -> Iterator[ColQwen3Encoder]:
    with ColQwen3Encoder("tiny", engine="torch", device="cpu", dtype="float32") as encoder:
        yield encoder


def drawn(number: int) -> Image.Image:
    """A small page with words on it, no two alike."""
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (256, 256), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(22)
    for line, word in enumerate(rng.choice(WORDS, 6, replace=False)):
        draw.text((10, 10 + 38 * line), f"{word} {rng.integers(100, 999)}", fill="black", font=font)
    return image


def pages(count: int) -> list[Page]:
    return [Page(id=f"{number:03}", image=drawn(number)) for number in range(count)]


def metrics(server: ServerProcess) -> str:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
        return answer.read().decode()


def test_concurrent_queries_reach_the_server_in_batches(server: ServerProcess) -> None:
    with ColQwen3Encoder("tiny", url=server.url) as encoder:
        encoder.encode_queries(["it is checked"])
        before = server.log_text().count("POST /pooling")
        steps, tokens = steps_and_tokens(server)
        with ThreadPoolExecutor(64) as pool:
            found = list(pool.map(lambda i: encoder.encode_queries([f"revenue of {2000 + i}"])[0], range(64)))
        more_steps, more_tokens = (b - a for a, b in zip((steps, tokens), steps_and_tokens(server), strict=True))
        assert len(found) == 64
        assert more_tokens == sum(map(len, found))
        assert more_steps <= 32, f"{more_steps} steps of the engine for 64 queries"
        assert server.log_text().count("POST /pooling") - before <= 32


def steps_and_tokens(server: ServerProcess) -> tuple[float, float]:
    """Steps of vLLM's engine so far, and tokens in them."""
    found = {}
    for line in metrics(server).splitlines():
        for name in ("count", "sum"):
            if line.startswith(f"vllm:iteration_tokens_total_{name}"):
                found[name] = float(line.rpartition(" ")[2])
    return found["count"], found["sum"]


@pytest.mark.parametrize("endpoint", ["score", "rerank"])
def test_the_servers_scores_are_ours(server: ServerProcess, torch_encoder: ColQwen3Encoder, endpoint: str) -> None:
    documents = [*pages(9), Page(id="t", text="Revenue rose in winter."), Page(id="u", text="museum")]
    for query in (Query("what was the revenue?"), Query(image=drawn(99)), Query("copper", image=drawn(98))):
        expected = torch_encoder.score(torch_encoder.encode_queries([query]), torch_encoder.encode_pages(documents))[0]
        with ColQwen3Encoder("tiny", url=server.url) as encoder:
            found = server_scores(encoder, query, [lambda page=page: page for page in documents], endpoint=endpoint)
        assert not found.broken
        np.testing.assert_allclose([found.sums[i] for i in range(len(documents))], expected, atol=1e-3)


def test_bytes_on_the_wire(server: ServerProcess) -> None:
    """Token embeddings as float16 bytes, against the same as JSON floats."""
    with ColQwen3Encoder("tiny", url=server.url) as encoder:
        mv = encoder.encode_queries(["what was the revenue?"])[0]
        ids = encoder.opened().renderer.query(Query("what was the revenue?")).token_ids.tolist()
    sizes = {}
    for name, asked in {"bytes": {"encoding_format": "bytes", "embed_dtype": "float16"}, "json": {}}.items():
        body = json.dumps({"model": "tiny", "input": [ids], **asked}).encode()
        request = urllib.request.Request(f"{server.url}/pooling", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            sizes[name] = len(answer.read())
    assert sizes["bytes"] == 2 * mv.vectors.size
    assert sizes["json"] > 8 * sizes["bytes"]


def test_three_engines_find_the_same(
    server: ServerProcess, torch_encoder: ColQwen3Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**CPU_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
        monkeypatch.setitem(os.environ, name, value)
    with PageIndex.open(tmp_path / "index", torch_encoder) as index:
        index.add(pages(60))
    questions = [f"{a} {b}" for a, b in zip(WORDS * 3, WORDS[7:] * 4, strict=False)][:50]
    assert len(questions) == 50
    found = {}
    settings = {
        "torch": {"engine": "torch", "device": "cpu", "dtype": "float32"},
        "server": {"url": server.url},
        "vllm": {"engine": VLLMOptions(enforce_eager=True), "dtype": "float32"},
    }
    for name, setting in settings.items():
        with (
            ColQwen3Encoder("tiny", **setting) as encoder,
            PageIndex.open(tmp_path / "index", encoder, read_only=True) as index,
        ):
            found[name] = index.search_many(questions, k=10)
    for name in ("server", "vllm"):
        for want, got in zip(found["torch"], found[name], strict=True):
            expected, scores = [hit.score for hit in want], {hit.page.id: hit.score for hit in got}
            np.testing.assert_allclose([hit.score for hit in got], expected, atol=1e-3)
            for hit in want:  # only pages within a hair of the tenth may change places
                assert hit.page.id in scores or hit.score < expected[-1] + 1e-3, f"{name}: {hit.page.id} is missing"


def test_a_similarity_map_does_not_depend_on_the_engine(server: ServerProcess, torch_encoder: ColQwen3Encoder) -> None:
    with ColQwen3Encoder("tiny", url=server.url) as encoder:
        for number in range(5):
            shown = drawn(number)
            word = np.random.default_rng(number).choice(WORDS, 6, replace=False)[number]  # printed on line `number`
            one, other = (
                similarity_map(made.encode_queries([word])[0], made.encode_images([shown])[0])
                for made in (encoder, torch_encoder)
            )
            assert one.tokens == other.tokens
            np.testing.assert_allclose(one.values, other.values, atol=5e-3)
            np.testing.assert_allclose(one.per_token, other.per_token, atol=5e-3)
            [box], [expected] = one.boxes(shown.size, top=1), other.boxes(shown.size, top=1)
            assert (box.left, box.top, box.right, box.bottom) == (
                expected.left, expected.top, expected.right, expected.bottom,
            )  # fmt: skip


# last, since it kills the server
@pytest.mark.timeout(900)  # 400 pages and two starts of a server, on a machine that may be busy
def test_killed_in_the_middle_of_200_pages_and_started_again(
    server: ServerProcess, torch_encoder: ColQwen3Encoder
) -> None:
    asked = pages(200)
    truth = torch_encoder.encode_pages(asked)
    options = ServerOptions(timeout=TIMEOUT, connect_timeout=2.0, concurrency=8, retries=4)
    with ColQwen3Encoder("tiny", url=server.url, engine=options) as encoder:
        encoder.encode_queries(["it is checked"])
        before = encoder.stats.inputs
        outcome: list[object] = []

        def encode() -> None:
            try:
                outcome.append(encoder.encode_pages(asked))
            except EngineError as exc:
                outcome.append(exc)

        caller = threading.Thread(target=encode)
        caller.start()
        while encoder.stats.inputs - before < 40:
            time.sleep(0.005)
        start = time.monotonic()
        server.kill()
        restart = threading.Thread(target=server.start)
        restart.start()
        caller.join(TIMEOUT + 5)
        assert not caller.is_alive(), "it hangs longer than its time-out"
        (first,) = outcome
        assert isinstance(first, list | EngineError)
        seconds = time.monotonic() - start
        restart.join()
        time.sleep(2 if isinstance(first, EngineError) else 0)
        results = [first] if isinstance(first, list) else []
        results.append(encoder.encode_pages(asked))
        for found in results:
            assert len(found) == 200
            for want, got in zip(truth, found, strict=True):
                assert (want.vectors * got.vectors).sum(axis=1).min() >= 0.9999
    print(f"the first call ended after {seconds:.1f} s: {type(first).__name__}")  # noqa: T201 - what happened, for -s
