"""LangChain's own suites of a retriever, a vector store and embeddings, all of their tests and none overridden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from colqwen3_retrievers import ColQwen3Encoder, PageIndex
from colqwen3_retrievers.langchain import ColQwen3Embeddings, ColQwen3Retriever, ColQwen3VectorStore
from tests.frameworks.langchain_suites import standard_suite
from tests.integration.langchain.corpus import QUESTION

pytest.importorskip("langchain_tests")


@pytest.mark.anyio  # anyio's plugin, which langchain-core brings, runs the suites' async tests
class TestVectorStore(standard_suite("integration_tests.vectorstores", "VectorStoreIntegrationTests")):
    """Its documents are words; an encoder that knows a word only by its hash ranks them as the suite expects."""

    @pytest.fixture
    def vectorstore(self, store: ColQwen3VectorStore) -> ColQwen3VectorStore:
        return store


@pytest.mark.anyio
class TestRetriever(standard_suite("integration_tests.retrievers", "RetrieversIntegrationTests")):
    """An index by its folder."""

    @pytest.fixture(autouse=True)
    def _location(self, pages: PageIndex) -> None:
        self.folder = Path(pages.location)

    @property
    def retriever_constructor(self) -> type[ColQwen3Retriever]:
        return ColQwen3Retriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"index": self.folder}

    @property
    def retriever_query_example(self) -> str:
        return QUESTION


class _Embeddings:
    """What both suites of embeddings need."""

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
