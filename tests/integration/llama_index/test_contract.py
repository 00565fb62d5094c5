"""Our LlamaIndex classes keep the contracts of the framework."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_index.core.schema import MediaResource, Node, NodeWithScore, TextNode

from colqwen3_retrievers import ColQwen3Encoder, Page, PageIndex, load_pages
from colqwen3_retrievers.llama_index import ColQwen3Embedding, ColQwen3Reranker, ColQwen3Retriever, PageReader
from tests.contracts import llama_index_contract as contract
from tests.frameworks.page_folder import page_image


@pytest.fixture(scope="module")
def index(folder: Path, encoder: ColQwen3Encoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageIndex]:
    with PageIndex.open(tmp_path_factory.mktemp("contract") / "index", encoder) as made:
        made.add(load_pages(folder / "pages"))
        made.add(Page(source="notes.txt", text="Revenue rose."))
        ColQwen3Retriever(made).add([TextNode(id_="node", text="Costs fell.", metadata={"year": 2024})])
        yield made


class TestRetriever(contract.RetrieverContract):
    @pytest.fixture
    def retriever(self, index: PageIndex) -> ColQwen3Retriever:
        return ColQwen3Retriever(index, similarity_top_k=5)


class TestGroupedRetriever(contract.RetrieverContract):
    @pytest.fixture
    def retriever(self, index: PageIndex) -> ColQwen3Retriever:
        return ColQwen3Retriever(index, similarity_top_k=3, group_by="source", where={"page": 1})


class TestReranker(contract.RerankerContract):
    @pytest.fixture
    def reranker(self, encoder: ColQwen3Encoder) -> ColQwen3Reranker:
        return ColQwen3Reranker(encoder=encoder)

    @pytest.fixture
    def nodes(self, folder: Path, index: PageIndex) -> list[NodeWithScore]:
        theirs = Node(id_="theirs", image_resource=MediaResource(path=page_image(folder)))
        ours = ColQwen3Retriever(index, similarity_top_k=3).retrieve("x")
        return [*ours, NodeWithScore(node=theirs), NodeWithScore(node=TextNode(id_="text", text="Revenue."), score=0.5)]


class TestRerankerOfAnIndex(TestReranker):
    @pytest.fixture
    def reranker(self, encoder: ColQwen3Encoder, index: PageIndex) -> ColQwen3Reranker:
        return ColQwen3Reranker(encoder=encoder, index=index, score_mode="relevance", top_n=3)


class TestEmbedding(contract.EmbeddingContract):
    @pytest.fixture
    def embedding(self, encoder: ColQwen3Encoder) -> ColQwen3Embedding:
        return ColQwen3Embedding(encoder=encoder, dim=128, embed_batch_size=2)

    @pytest.fixture
    def pictures(self, folder: Path) -> list[Path]:
        return [page_image(folder), page_image(folder, 1)]


class TestReader(contract.ReaderContract):
    @pytest.fixture
    def reader(self, tmp_path: Path) -> PageReader:
        return PageReader(image_dir=tmp_path / "pictures")

    @pytest.fixture
    def path(self, folder: Path) -> Path:
        return folder / "pages"
