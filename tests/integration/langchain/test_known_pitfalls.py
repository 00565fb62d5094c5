"""One regression test for each trap of LangChain that page images fall into, in the real framework.

Each test shows the trap first, where the framework lets it be shown, so that it is known when the trap goes away.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.load import dumps
from langchain_core.messages import ToolMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import create_retriever_tool
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore

from colqwen3_retrievers import ColQwen3Encoder, Page, PageIndex
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.langchain import (
    ColQwen3Embeddings,
    ColQwen3Reranker,
    ColQwen3Retriever,
    ColQwen3VectorStore,
    PageLoader,
    create_page_retriever_tool,
    docs_to_content_blocks,
    page_key_encoder,
)
from tests.hashing import picture
from tests.integration.langchain.corpus import FixedRetriever, images_of

pytest.importorskip("langchain_classic")
from langchain_classic.retrievers import ContextualCompressionRetriever, EnsembleRetriever

SCANS = 3


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A folder of scans: a file of three pages, none of which has a text."""
    folder = tmp_path / "scans"
    folder.mkdir()
    first, *others = [picture(n) for n in range(SCANS)]
    first.save(folder / "scan.tif", save_all=True, append_images=others)
    return folder


def as_documents(scans: Path) -> list[Document]:
    """The scans as others carry them: an image, no content."""
    images = [document.metadata["image"] for document in PageLoader(scans).load()]
    return [Document("", metadata={"source": "scan.tif", "image": image}) for image in images]


def shown(documents: list[Document]) -> set[bytes]:
    """The pixels a chat model would get to see."""
    return {image.tobytes() for image in images_of(docs_to_content_blocks(documents)).values()}


PIXELS = {picture(n).tobytes() for n in range(SCANS)}


def test_c1_embeddings_give_one_flat_vector_an_item(encoder: ColQwen3Encoder) -> None:
    """A store takes 2-D results without a word; only its searches fail."""

    class ManyVectors(Embeddings):
        def embed_documents(self, texts: list[str]) -> Any:
            return [made.vectors.tolist() for made in encoder.encode_texts(texts)]

        def embed_query(self, text: str) -> Any:
            return encoder.encode_queries([text])[0].vectors.tolist()

    broken = InMemoryVectorStore(ManyVectors())
    broken.add_texts(["revenue rose", "costs fell"])
    with pytest.raises(ValueError):
        broken.similarity_search("revenue?")

    store = InMemoryVectorStore(ColQwen3Embeddings(encoder=encoder))
    store.add_texts(["revenue rose", "costs fell"])
    scored = store.similarity_search_with_score("revenue?", k=2)
    assert {document.page_content for document, _ in scored} == {"revenue rose", "costs fell"}
    assert all(-1 <= score <= 1 for _, score in scored)


def test_c2_index_keeps_every_page_without_text(scans: Path, store: ColQwen3VectorStore) -> None:
    """`index()` tells documents by text and metadata; pages without either are taken for one."""
    blank = [Document("", metadata={"source": "scan.tif"}) for _ in range(SCANS)]
    plain = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    lost = index(blank, InMemoryRecordManager("c2"), plain, key_encoder="sha256")
    assert (lost["num_added"], lost["num_skipped"]) == (1, 2)
    with pytest.raises(ValueError, match="serialized using json"):
        documents = [Document("", metadata={"image": picture(0)})]
        index(documents, InMemoryRecordManager("c2 bytes"), plain, key_encoder="sha256")

    for documents in (
        PageLoader(scans),
        as_documents(scans),
        [Document("", metadata={"image": picture(n)}) for n in range(SCANS)],
    ):
        store.index.delete(store.index.ids())
        records = InMemoryRecordManager("c2 ours")
        done = index(documents, records, store, key_encoder=page_key_encoder)
        assert (done["num_added"], done["num_skipped"]) == (SCANS, 0)
        again = index(documents, records, store, key_encoder=page_key_encoder)
        assert (again["num_added"], again["num_skipped"]) == (0, SCANS)
        assert shown(store.similarity_search("x", k=9)) == PIXELS


def test_c2_index_notices_a_picture_that_changed(scans: Path, store: ColQwen3VectorStore) -> None:
    """The name stays, the scan is another: the old page goes, the new one comes, the others are not encoded again."""
    records = InMemoryRecordManager("c2 changed")

    def run() -> dict[str, int]:
        return dict(
            index(
                PageLoader(scans), records, store, key_encoder=page_key_encoder, cleanup="incremental",
                source_id_key="source",
            )
        )  # fmt: skip

    assert run() == {"num_added": 3, "num_updated": 0, "num_skipped": 0, "num_deleted": 0}
    picture(0).save(scans / "scan.tif", save_all=True, append_images=[picture(7), picture(2)])
    assert run() == {"num_added": 1, "num_updated": 0, "num_skipped": 2, "num_deleted": 1}
    assert shown(store.similarity_search("x", k=9)) == {picture(n).tobytes() for n in (0, 7, 2)}
    cited = sorted(document.metadata["citation"] for document in store.similarity_search("x", k=9))
    assert cited == [f"scan.tif, page {n}" for n in (1, 2, 3)]


def test_c3_index_keeps_images_because_they_are_no_field_of_a_subclass(scans: Path, store: ColQwen3VectorStore) -> None:
    """`index()` makes plain documents anew: a field that a subclass added is gone, metadata stays."""

    class Scan(Document):
        picture: str = ""

    plain = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    index([Scan("x", picture="abc")], InMemoryRecordManager("c3"), plain, key_encoder="sha256")
    assert not hasattr(plain.similarity_search("x")[0], "picture")

    index(PageLoader(scans), InMemoryRecordManager("c3 ours"), store, key_encoder=page_key_encoder)
    assert shown(store.similarity_search("x", k=9)) == PIXELS
    assert all(type(document) is Document for document in PageLoader(scans).load())


def test_c4_an_ensemble_keeps_pages_without_text_apart(scans: Path, store: ColQwen3VectorStore) -> None:
    """`EnsembleRetriever` tells documents by their content: pages without any become one."""
    merged = EnsembleRetriever(retrievers=[FixedRetriever(documents=as_documents(scans))]).invoke("x")
    assert len(merged) == 1

    store.add_documents(as_documents(scans))
    for retriever in (
        ColQwen3Retriever(index=store.index),
        store.as_retriever(),
        FixedRetriever(documents=PageLoader(scans).load()),
    ):
        documents = EnsembleRetriever(retrievers=[retriever, retriever]).invoke("x")
        assert len(documents) == SCANS
        assert shown(documents) == PIXELS


def test_c5_no_document_of_ours_holds_what_json_cannot(scans: Path, store: ColQwen3VectorStore) -> None:
    """Pictures and bytes in metadata break serialisation; ours travel as base64 or as the path of a file."""
    with pytest.raises(TypeError):
        json.dumps(Document("", metadata={"image": picture(0)}).metadata)

    store.add_documents([Document("", metadata={"image": picture(n)}) for n in range(SCANS)])
    store.add_images([picture(9)])
    for documents in (
        PageLoader(scans).load(),
        store.similarity_search("x", k=2),
        ColQwen3Retriever(index=store.index, window=1).invoke("x"),
    ):
        for document in documents:
            assert json.loads(dumps(document))["kwargs"]["metadata"] == document.metadata
            assert Document.model_validate_json(document.model_dump_json()) == document
    with pytest.raises(ConfigError, match="document 0: metadata must be JSON"):
        store.add_documents([Document("x", metadata={"thumbnail": picture(0)})])


def test_c6_the_tool_hands_over_images(scans: Path, store: ColQwen3VectorStore) -> None:
    """`create_retriever_tool` hands over text only."""
    store.add_documents(PageLoader(scans).load())
    retriever = ColQwen3Retriever(index=store.index)
    call = {"name": "search_pages", "args": {"query": "x"}, "id": "1", "type": "tool_call"}
    text = create_retriever_tool(retriever, "search_pages", "Search.").invoke(call)
    assert [block["type"] for block in text.content_blocks] == ["text"]

    message = create_page_retriever_tool(retriever, "search_pages", "Search.").invoke(call)
    assert isinstance(message, ToolMessage)
    assert shown(message.artifact) == PIXELS
    assert {image.tobytes() for image in images_of(message.content_blocks).values()} == PIXELS


def test_c7_threshold_and_mmr_are_implemented(scans: Path, store: ColQwen3VectorStore) -> None:
    """A vector store that implements only what it must raises NotImplementedError in two of three search types."""

    class Least(VectorStore):
        def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
            return []

        @classmethod
        def from_texts(cls, *args: Any, **kwargs: Any) -> Any:
            return cls()

    ways: tuple[tuple[str, dict[str, Any]], ...] = (
        ("mmr", {"k": 2}), ("similarity_score_threshold", {"score_threshold": 0.0, "k": 2}),
    )  # fmt: skip
    store.add_documents(PageLoader(scans).load())
    for search_type, how in ways:
        with pytest.raises(NotImplementedError):
            Least().as_retriever(search_type=search_type, search_kwargs=how).invoke("x")
        documents = store.as_retriever(search_type=search_type, search_kwargs=how).invoke("x")
        assert len(documents) == 2
        assert shown(documents) < PIXELS


def test_c8_a_batch_goes_through_the_model_together(encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    """`batch` of a plain retriever is a thread for each query; ours is one call."""

    class Threads(BaseRetriever):
        seen: list[str]

        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
            self.seen.append(threading.current_thread().name)
            barrier.wait(timeout=10)
            return []

    barrier = threading.Barrier(3)
    plain = Threads(seen=[])
    plain.batch(["a", "b", "c"], {"max_concurrency": 3})
    assert len(set(plain.seen)) == 3  # as many at the model at once

    with PageIndex.open(tmp_path / "pages", encoder) as pages:
        pages.add(Page(source="a.pdf", number=n, text=f"page {n}") for n in range(1, 4))
        queries = [f"question {n}" for n in range(12)]
        before = encoder.stats.batches
        together = ColQwen3Retriever(index=pages).batch(queries)
        assert encoder.stats.batches - before <= 3  # the worker takes what is there when it is free
        assert [[d.id for d in found] for found in together] == [
            [d.id for d in ColQwen3Retriever(index=pages).invoke(query)] for query in queries
        ]


def test_c9_reranking_copies_and_thresholds_are_inclusive(encoder: ColQwen3Encoder) -> None:
    """Compressors that write into their input spoil what others hold; a score equal to the threshold passes."""
    documents = [Document(f"text {n}", id=str(n), metadata={"n": n, "score": 9.0 - n}) for n in range(4)]
    before = [document.model_copy(deep=True) for document in documents]
    reranker = ColQwen3Reranker(encoder=encoder, top_n=None)
    pipeline = ContextualCompressionRetriever(
        base_compressor=reranker, base_retriever=FixedRetriever(documents=documents)
    )
    ranked = pipeline.invoke("text 2")
    assert documents == before
    assert {document.id for document in ranked} == {"0", "1", "2", "3"}
    assert all(document not in documents for document in ranked)
    for document in ranked:
        original = documents[int(document.id or 0)]
        assert document.metadata.items() > original.metadata.items()
        assert type(document.metadata["relevance_score"]) is float
    second = ranked[1].metadata["relevance_score"]
    strict = ColQwen3Reranker(encoder=encoder, top_n=None, score_threshold=second)
    assert [document.id for document in strict.compress_documents(documents, "text 2")] == [
        document.id for document in ranked[:2]
    ]
