"""LangChain's own suites of a vector store and of embeddings, all of their tests and none overridden."""

from __future__ import annotations

from typing import Any

import pytest

from colqwen3_retrievers import ColQwen3Encoder
from colqwen3_retrievers.langchain import ColQwen3Embeddings, ColQwen3VectorStore
from tests.frameworks.langchain_suites import standard_suite

pytest.importorskip("langchain_tests")


@pytest.mark.anyio  # anyio's plugin, which langchain-core brings, runs the suites' async tests
class TestVectorStore(standard_suite("integration_tests.vectorstores", "VectorStoreIntegrationTests")):
    """Its documents are words; an encoder that knows a word only by its hash ranks them as the suite expects."""

    @pytest.fixture
    def vectorstore(self, store: ColQwen3VectorStore) -> ColQwen3VectorStore:
        return store


class _Embeddings:
    """What both suites of embeddings are told."""

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
