"""A tiny random model, and vector stores over the encoder without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from colqwen3_retrievers.langchain import ColQwen3VectorStore
from tests.hashing import HashingEncoder, picture

if TYPE_CHECKING:
    from colqwen3_retrievers import ColQwen3Encoder


@pytest.fixture(scope="session")
def model_encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ColQwen3Encoder]:
    from colqwen3_retrievers import ColQwen3Encoder
    from tests.checkpoints import make_checkpoint  # imports torch

    folder = make_checkpoint(tmp_path_factory.mktemp("models") / "tomoro", "tomoro").folder
    with ColQwen3Encoder(folder, device="cpu") as encoder:
        yield encoder


@pytest.fixture
def store(tmp_path: Path, encoder: HashingEncoder) -> Iterator[ColQwen3VectorStore]:
    with ColQwen3VectorStore(tmp_path / "index", encoder) as store:
        yield store


@pytest.fixture
def words(store: ColQwen3VectorStore) -> ColQwen3VectorStore:
    """Four short texts of two sources, with their first word as id."""
    texts = ["tax and rent", "rent and wine", "wine and cheese", "bread and cheese"]
    metadatas = [{"source": "a.pdf" if n < 2 else "b.pdf", "page": n, "year": 2020 + n} for n in range(4)]
    store.add_texts(texts, metadatas, ids=[text.split()[0] for text in texts])
    return store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pages in two files, without a text."""
    folder = tmp_path / "reports"
    folder.mkdir()
    picture(1).save(folder / "a.png")
    picture(2).save(folder / "b.tif", save_all=True, append_images=[picture(3)])
    return folder
