"""Checkpoint, page images and indexes of the LlamaIndex adapter's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, PageIndex
from tests.frameworks.page_folder import make_folder
from tests.hashing import picture


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints ``checkpoint`` and ``other``, and ``pages/0.png`` to ``pages/3.png``."""
    return make_folder(tmp_path_factory.mktemp("llama_index"), 4, other=True)


@pytest.fixture(scope="session")
def encoder(folder: Path) -> Iterator[ColQwen3Encoder]:
    with ColQwen3Encoder(folder / "checkpoint", device="cpu") as encoder:
        yield encoder


@pytest.fixture
def index(encoder: ColQwen3Encoder, tmp_path: Path) -> Iterator[PageIndex]:
    """An empty index."""
    with PageIndex.open(tmp_path / "index", encoder) as index:
        yield index


@pytest.fixture
def image() -> Image.Image:
    return picture(0, 64, 48)


@pytest.fixture
def file(image: Image.Image, tmp_path: Path) -> Path:
    """The image in a file, for tests that need no checkpoint."""
    image.save(tmp_path / "page.png")
    return tmp_path / "page.png"
