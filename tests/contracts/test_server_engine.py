"""The server engine under the engine contract, against a real vLLM server for each family in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from colqwen3_retrievers import ColQwen3Encoder, ServerOptions
from tests.checkpoints import FAMILY_NAMES, TinyCheckpoint, make_checkpoint
from tests.contracts.engine_contract import EngineContract, assert_exact, pictures
from tests.reference import image_prompt, reference_embeddings
from tests.server_process import ServerProcess


class Servers:
    """One server at a time: the checkpoints come one after another, and each server wants a gigabyte."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.folder: Path | None = None
        self.running: ServerProcess | None = None
        self.encoders: list[ColQwen3Encoder] = []

    def url(self, folder: Path) -> str:
        if self.running is None or folder != self.folder:
            self.stop()
            # a video's times are none of a server's defaults
            self.running = ServerProcess(folder, self.work / folder.name, extra=["--trust-request-mm-kwargs"]).start()
            self.folder = folder
        return self.running.url

    def stop(self) -> None:
        for encoder in self.encoders:
            encoder.close()
        self.encoders.clear()
        if self.running is not None:
            self.running.terminate()
            self.running = None


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """A tiny random checkpoint of each family in turn, with heads as wide as vLLM on CPU wants them."""
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, head_dim=32)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    made = Servers(tmp_path_factory.mktemp("servers"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def open_encoder(servers: Servers) -> Callable[..., ColQwen3Encoder]:
    def make(
        folder: Path, *, dtype: str = "float32", embed_dtype: str = "float32", **settings: object
    ) -> ColQwen3Encoder:
        assert dtype == "float32", "the servers run in float32"
        url = servers.url(folder)
        options = ServerOptions(embed_dtype=embed_dtype)
        servers.encoders.append(ColQwen3Encoder(folder, engine=options, url=url, **settings))
        return servers.encoders[-1]

    return make


class TestServerEngine(EngineContract):
    def test_float16_on_the_wire_is_as_exact_as_the_contract_asks(
        self, checkpoint: TinyCheckpoint, open_encoder: Callable[..., ColQwen3Encoder]
    ) -> None:
        images = pictures()
        expected = reference_embeddings(checkpoint, [image_prompt(checkpoint.family)] * 3, images)
        with open_encoder(checkpoint.folder, embed_dtype="float16") as encoder:
            assert_exact(expected, encoder.encode_images(images))
