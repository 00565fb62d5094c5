"""LangChain's own suites of a vector store and of embeddings, all of their tests and none overridden."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from colqwen3_retrievers import ColQwen3Encoder
from tests.checkpoints import make_checkpoint
from tests.hashing import HashingEncoder
from tests.langchain_suites import standard_suite

pytest.importorskip("langchain_core")
pytest.importorskip("langchain_tests")

from colqwen3_retrievers.langchain import ColQwen3Embeddings, ColQwen3VectorStore


@pytest.mark.anyio  # anyio's plugin, which langchain-core brings, runs the suites' async tests
class TestVectorStore(standard_suite("integration_tests.vectorstores", "VectorStoreIntegrationTests")):
    """Its documents are words; an encoder that knows a word only by its hash ranks them as the suite expects."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> Iterator[ColQwen3VectorStore]:
        encoder = HashingEncoder()
        with ColQwen3VectorStore(tmp_path / "index", encoder) as store:
            yield store
        encoder.threads.shutdown()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ColQwen3Encoder]:
    folder = make_checkpoint(tmp_path_factory.mktemp("models") / "tomoro", "tomoro").folder
    with ColQwen3Encoder(folder, device="cpu") as encoder:
        yield encoder


class _Embeddings:
    """What both suites of embeddings are told."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.fixture(autouse=True)
    def _encoder(self, encoder: ColQwen3Encoder) -> None:
        self.encoder = encoder

    @property
    def embeddings_class(self) -> type[ColQwen3Embeddings]:
        return ColQwen3Embeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"encoder": self.encoder, "dimensions": 256}


class TestEmbeddingsUnit(_Embeddings, standard_suite("unit_tests.embeddings", "EmbeddingsUnitTests")):
    """Made without loading anything."""


@pytest.mark.anyio
class TestEmbeddings(_Embeddings, standard_suite("integration_tests.embeddings", "EmbeddingsIntegrationTests")):
    """With a tiny random checkpoint."""
