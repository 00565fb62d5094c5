"""Page documents in LlamaIndex's own bookkeeping: pipelines that upsert and delete, and indexes that refresh.

The encoder is real (a tiny random checkpoint), and counts what it encodes.
"""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.schema import Document, ImageNode, NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import MetadataFilter, MetadataFilters, SimpleVectorStore
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, PageIndex, load_pages
from colqwen3_retrievers.llama_index import (
    ColQwen3Embedding,
    ColQwen3Reranker,
    ColQwen3Retriever,
    PageNodes,
    PageReader,
    page_from_node,
)
from tests.frameworks.page_folder import page_image

N_PICTURES = 4


@pytest.fixture
def copy(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the images that tests may change."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "pages").mkdir()
    for seed in range(N_PICTURES):
        shutil.copy(page_image(folder, seed), page_image(tmp_path, seed))
    return tmp_path


@pytest.fixture
def embedding(encoder: ColQwen3Encoder) -> ColQwen3Embedding:
    return ColQwen3Embedding(encoder=encoder, dim=128)


def read(copy: Path) -> list[Document]:
    return [*PageReader().load_data(copy / "pages"), Document(id_="text", text="Revenue rose.")]


def changed(copy: Path, seed: int) -> None:
    """Put another picture into a file."""
    path = page_image(copy, seed)
    with Image.open(path) as image:
        other = image.rotate(180)
    other.save(path)


def pages_of(store: SimpleVectorStore) -> list[str]:
    """Which documents have a vector, each as often as it has."""
    return sorted(store.data.text_id_to_ref_doc_id.values())


def all_ids(*without: int) -> list[str]:
    return [*(f"{seed}.png#page=1" for seed in range(N_PICTURES) if seed not in without), "text"]


def pipeline(strategy: DocstoreStrategy, embedding: ColQwen3Embedding, store: SimpleVectorStore) -> IngestionPipeline:
    return IngestionPipeline(
        transformations=[PageNodes(), embedding], docstore=SimpleDocumentStore(), vector_store=store,
        docstore_strategy=strategy,
    )  # fmt: skip


# -- pipelines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", list(DocstoreStrategy))
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_pipeline_runs_only_what_is_new_or_changed(
    copy: Path, embedding: ColQwen3Embedding, strategy: DocstoreStrategy, asynchronous: bool
) -> None:
    store = SimpleVectorStore()
    made = pipeline(strategy, embedding, store)

    def run(documents: Sequence[Document]) -> int:
        given = list(documents)
        return len(asyncio.run(made.arun(documents=given)) if asynchronous else made.run(documents=given))

    assert [run(read(copy)), run(read(copy))] == [N_PICTURES + 1, 0]
    encoded = embedding.encoder.stats.inputs
    changed(copy, 1)
    assert [run(read(copy)), run(read(copy))] == [1, 0]
    assert embedding.encoder.stats.inputs == encoded + 1
    assert pages_of(store) == all_ids(), "the new page took the place of the old one"
    left = read(copy)[2:]
    assert run(left) == 0
    assert pages_of(store) == (all_ids(0, 1) if strategy == DocstoreStrategy.UPSERTS_AND_DELETE else all_ids())
    assert run(read(copy)) == (2 if strategy == DocstoreStrategy.UPSERTS_AND_DELETE else 0)
    assert pages_of(store) == all_ids()


def test_a_pipeline_that_was_persisted_goes_on(copy: Path, embedding: ColQwen3Embedding, tmp_path: Path) -> None:
    store = SimpleVectorStore()
    made = pipeline(DocstoreStrategy.UPSERTS, embedding, store)
    made.run(documents=read(copy))
    made.persist(str(tmp_path / "pipeline"))
    again = pipeline(DocstoreStrategy.UPSERTS, embedding, store)
    again.load(str(tmp_path / "pipeline"))
    assert list(again.run(documents=read(copy))) == []
    changed(copy, 2)
    assert [node.metadata["page_id"] for node in again.run(documents=read(copy))] == ["2.png#page=1"]
    assert pages_of(store) == all_ids()


def test_a_whole_file_is_deleted_by_its_source(copy: Path, embedding: ColQwen3Embedding) -> None:
    store = SimpleVectorStore()
    pipeline(DocstoreStrategy.UPSERTS, embedding, store).run(documents=read(copy)[:-1])
    store.delete_nodes(filters=MetadataFilters(filters=[MetadataFilter(key="source", value="1.png")]))
    assert pages_of(store) == all_ids(1)[:-1]


# -- vector indexes ---------------------------------------------------------------------------------------------------


def vector_index(documents: list[Document], embedding: ColQwen3Embedding) -> VectorStoreIndex:
    return VectorStoreIndex.from_documents(documents, transformations=[PageNodes()], embed_model=embedding)


def found(index: VectorStoreIndex) -> list[str]:
    nodes = index.as_retriever(similarity_top_k=20).retrieve("revenue")
    return sorted(str(node.metadata.get("page_id", node.node.ref_doc_id)) for node in nodes)


def test_an_index_refreshes_what_changed(copy: Path, embedding: ColQwen3Embedding, tmp_path: Path) -> None:
    index = vector_index(read(copy)[1:], embedding)
    assert index.refresh_ref_docs(read(copy)[1:]) == [False] * N_PICTURES
    assert index.refresh_ref_docs(read(copy)) == [True, *([False] * N_PICTURES)]
    changed(copy, 3)
    assert index.refresh_ref_docs(read(copy)) == [False, False, False, True, False]
    assert found(index) == all_ids()
    index.storage_context.persist(str(tmp_path / "storage"))
    again: Any = load_index_from_storage(
        StorageContext.from_defaults(persist_dir=str(tmp_path / "storage")),
        embed_model=embedding, transformations=[PageNodes()],
    )  # fmt: skip
    assert again.refresh_ref_docs(read(copy)) == [False] * (N_PICTURES + 1)
    assert found(again) == all_ids()


@pytest.mark.parametrize("from_docstore", [False, True])
def test_an_index_deletes_a_document_by_its_id(copy: Path, embedding: ColQwen3Embedding, from_docstore: bool) -> None:
    documents = read(copy)
    index = vector_index(documents, embedding)
    index.delete_ref_doc(documents[0].id_, delete_from_docstore=from_docstore)
    index.delete_ref_doc("text", delete_from_docstore=from_docstore)
    assert found(index) == all_ids(0)[:-1]


# -- nodes ------------------------------------------------------------------------------------------------------------


def test_a_documents_node_has_an_id_of_its_own_and_knows_the_document(copy: Path) -> None:
    for documents in (read(copy), read(copy)):
        nodes = PageNodes()(documents)
        for node, document in zip(nodes, documents, strict=True):
            assert uuid.UUID(node.node_id).version == 5, "what any vector store takes for an id"
            assert node.source_node is not None
            assert (node.source_node.node_id, node.source_node.hash) == (document.id_, document.hash)
    assert len({node.node_id for node in nodes}) == len(nodes)
    assert [node.node_id for node in PageNodes()(read(copy))] == [node.node_id for node in nodes]


def test_a_document_stands_for_itself_whatever_it_is_from() -> None:
    of_book = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="book")}
    (node,) = PageNodes()([Document(id_="chapter", text="x", relationships=of_book)])
    assert node.ref_doc_id == "chapter", "as splitters have it"


def test_a_documents_node_means_its_page_to_an_index_and_a_reranker(
    copy: Path, encoder: ColQwen3Encoder, tmp_path: Path
) -> None:
    (node, *_) = PageNodes()(read(copy))
    assert isinstance(node, ImageNode)
    assert node.text == "0.png#page=1"
    assert page_from_node(node).text == "", "the name before a picture is no text of it"
    with PageIndex.open(tmp_path / "index", encoder) as index:
        index.add(load_pages(copy / "pages"))
        encoded = encoder.stats.inputs
        (ranked,) = ColQwen3Reranker(index=index).postprocess_nodes([NodeWithScore(node=node)], query_str="revenue")
        assert encoder.stats.inputs == encoded + 1, "the question; the page is the index's"
        (best, *_) = ColQwen3Retriever(index, where={"page_id": "0.png#page=1"}).retrieve("revenue")
        assert ranked.score == pytest.approx(best.score, abs=1e-3)
        other = node.model_copy(update={"metadata": {**node.metadata, "sha256": "another"}})
        ColQwen3Reranker(index=index).postprocess_nodes([NodeWithScore(node=other)], query_str="revenue")
        assert encoder.stats.inputs == encoded + 4, "two questions more, and another picture"


def test_a_piece_of_a_page_is_not_the_page(copy: Path, encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    document = read(copy)[0]
    pieces = [
        TextNode(
            id_=name, text=text, metadata=document.metadata,
            excluded_embed_metadata_keys=document.excluded_embed_metadata_keys,
            relationships={NodeRelationship.SOURCE: document.as_related_node_info()},
        )
        for name, text in (("one", "Revenue rose."), ("two", "Costs fell."))
    ]  # fmt: skip
    with PageIndex.open(tmp_path / "index", encoder) as index:
        index.add(load_pages(copy / "pages"))
        ranked = ColQwen3Reranker(index=index).postprocess_nodes(
            [NodeWithScore(node=piece) for piece in pieces], query_str="revenue"
        )
        assert ranked[0].score != pytest.approx(ranked[1].score, abs=1e-3), "each is ranked by its own words"
        assert ColQwen3Retriever(index).add(pieces) == ["one", "two"]


def test_a_documents_node_comes_back_from_an_index_as_it_was(
    copy: Path, encoder: ColQwen3Encoder, tmp_path: Path
) -> None:
    nodes = PageNodes()(read(copy))
    with PageIndex.open(tmp_path / "index", encoder) as index:
        retriever = ColQwen3Retriever.from_nodes(nodes, index, similarity_top_k=20)
        encoded = encoder.stats.inputs
        back = [given.node for given in retriever.retrieve("revenue")]
        assert sorted(node.node_id for node in back) == sorted([*all_ids()[:-1], nodes[-1].node_id]), "by page"
        assert sorted(str(node.ref_doc_id) for node in back) == all_ids()
        retriever.add(back)
        again = {given.node_id: given.node.to_dict() for given in retriever.retrieve("revenue")}
        assert again == {node.node_id: node.to_dict() for node in back}
        assert encoder.stats.inputs == encoded + 2, "two questions"
