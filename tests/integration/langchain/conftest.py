"""A tiny random model, scans indexed by it and by another one, and a vector store over an encoder without a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from colqwen3_retrievers import ColQwen3Encoder, PageIndex
from colqwen3_retrievers.langchain import ColQwen3VectorStore
from tests.checkpoints import make_checkpoint
from tests.hashing import HashingEncoder, picture
from tests.integration.langchain.corpus import scans


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tomoro", "tomoro").folder


@pytest.fixture(scope="session")
def encoder(checkpoint: Path) -> Iterator[ColQwen3Encoder]:
    with ColQwen3Encoder(checkpoint, device="cpu") as encoder:
        yield encoder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ``0.png`` to ``3.png``."""
    folder = tmp_path_factory.mktemp("pictures")
    for n in range(4):
        picture(n, 128, 96).save(folder / f"{n}.png")
    return folder


@pytest.fixture(scope="session")
def pages(encoder: ColQwen3Encoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageIndex]:
    with PageIndex.open(tmp_path_factory.mktemp("index") / "pages", encoder) as index:
        index.add(scans())
        yield index


@pytest.fixture(scope="session")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageIndex]:
    """The same pages by another model, which ranks them differently: what a reranker is for."""
    folder = make_checkpoint(tmp_path_factory.mktemp("models") / "other", "tomoro", seed=11).folder
    with (
        ColQwen3Encoder(folder, device="cpu") as other,
        PageIndex.open(tmp_path_factory.mktemp("index") / "other", other) as index,
    ):
        index.add(scans())
        yield index


@pytest.fixture
def hashing() -> Iterator[HashingEncoder]:
    encoder = HashingEncoder()
    yield encoder
    encoder.threads.shutdown()


@pytest.fixture
def store(tmp_path: Path, hashing: HashingEncoder) -> Iterator[ColQwen3VectorStore]:
    with ColQwen3VectorStore(tmp_path / "store", hashing) as store:
        yield store
