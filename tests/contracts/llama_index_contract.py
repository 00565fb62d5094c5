"""What LlamaIndex expects of a retriever, a reranker, an embedding and a reader, as classes to subclass.

The twin of langchain-tests: a subclass gives the thing under test by fixtures, and every test here must pass. Nothing
in them knows how it works inside.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import io
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.evaluation import RetrieverEvaluator
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.readers.base import BaseReader
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import Document, IndexNode, MetadataMode, NodeWithScore, QueryBundle, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.storage.docstore.utils import doc_to_json, json_to_doc
from llama_index.core.tools import RetrieverTool

from tests.frameworks.llama_index_models import ANSWER, RecordingLLM


class Events(BaseEventHandler):
    """Keeps the names of all events."""

    names: list[str] = []  # noqa: RUF012 - pydantic copies it

    @classmethod
    def class_name(cls) -> str:
        return "Events"

    def handle(self, event: Any, **_: Any) -> None:
        self.names.append(event.class_name())


def listed(nodes: list[NodeWithScore]) -> list[tuple[str, float | None]]:
    return [(found.node_id, None if found.score is None else round(found.score, 3)) for found in nodes]


class RetrieverContract:
    """Subclasses give ``retriever`` (over at least three nodes, asked for at least two) and may change ``question``."""

    question = "what was the revenue?"

    @pytest.fixture
    def retriever(self) -> BaseRetriever:
        raise NotImplementedError

    def test_it_is_a_retriever(self, retriever: BaseRetriever) -> None:
        assert isinstance(retriever, BaseRetriever)
        assert inspect.iscoroutinefunction(type(retriever)._aretrieve)
        assert type(retriever)._aretrieve is not BaseRetriever._aretrieve, "the default blocks the event loop"

    def test_nodes_come_best_first_with_python_floats(self, retriever: BaseRetriever) -> None:
        found = retriever.retrieve(self.question)
        assert len(found) >= 2
        assert all(isinstance(node, NodeWithScore) for node in found)
        scores = [node.score for node in found]
        assert all(type(score) is float and math.isfinite(score) for score in scores)
        assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]

    def test_texts_and_bundles_ask_the_same_in_both_worlds(self, retriever: BaseRetriever) -> None:
        expected = listed(retriever.retrieve(self.question))
        assert listed(retriever.retrieve(QueryBundle(self.question))) == expected
        assert listed(asyncio.run(retriever.aretrieve(self.question))) == expected
        assert listed(asyncio.run(retriever.aretrieve(QueryBundle(self.question)))) == expected

    def test_sync_calls_work_inside_a_running_loop(self, retriever: BaseRetriever) -> None:
        async def run() -> list[NodeWithScore]:
            return retriever.retrieve(self.question)

        assert listed(asyncio.run(run())) == listed(retriever.retrieve(self.question))

    def test_many_at_once_answer_as_in_sequence(self, retriever: BaseRetriever) -> None:
        asked = [f"{self.question} {i}" for i in range(8)]

        async def run() -> list[list[NodeWithScore]]:
            return await asyncio.gather(*(retriever.aretrieve(text) for text in asked))

        together, alone = asyncio.run(run()), [retriever.retrieve(text) for text in asked]
        for one, other in zip(together, alone, strict=True):
            assert [node.node_id for node in one] == [node.node_id for node in other]
            assert [node.score for node in one] == pytest.approx([node.score for node in other], abs=1e-3)

    def test_results_belong_to_the_caller(self, retriever: BaseRetriever) -> None:
        first = retriever.retrieve(self.question)
        before = [node.to_json() for node in first]
        for node in first:
            node.node.metadata["scribble"] = 1
            node.score = -1.0
        assert [node.to_json() for node in retriever.retrieve(self.question)] == before

    def test_nodes_are_apart_and_survive_json_and_document_stores(
        self, retriever: BaseRetriever, tmp_path: Path
    ) -> None:
        found = retriever.retrieve(self.question)
        for attribute in ("node_id", "hash"):
            assert len({getattr(node.node, attribute) for node in found}) == len(found), attribute
        store = SimpleDocumentStore()
        store.add_documents([node.node for node in found])
        store.persist(str(tmp_path / "docs.json"))
        again = SimpleDocumentStore.from_persist_path(str(tmp_path / "docs.json"))
        for node in found:
            assert again.get_document(node.node_id) == node.node
            assert json_to_doc(json.loads(json.dumps(doc_to_json(node.node)))) == node.node
            json.loads(node.to_json())

    def test_events_and_callbacks_tell_of_it(self, retriever: BaseRetriever, events: Events) -> None:
        debug = LlamaDebugHandler(print_trace_on_end=False)
        retriever.callback_manager = CallbackManager([debug])
        retriever.retrieve(self.question)
        assert [name for name in events.names if name.startswith("Retrieval")] == [
            "RetrievalStartEvent", "RetrievalEndEvent",
        ]  # fmt: skip
        assert len(debug.get_event_pairs(CBEventType.RETRIEVE)) == 1

    def test_an_empty_question_is_a_value_error(self, retriever: BaseRetriever) -> None:
        with pytest.raises(ValueError, match="query"):
            retriever.retrieve("")
        with pytest.raises(ValueError, match="query"):
            asyncio.run(retriever.aretrieve(QueryBundle("")))

    def test_it_stands_in_an_engine(self, retriever: BaseRetriever) -> None:
        llm = RecordingLLM()
        answer = RetrieverQueryEngine.from_args(retriever, llm=llm).query(self.question)
        assert str(answer) == ANSWER
        assert self.question in llm.texts
        assert listed(answer.source_nodes) == listed(retriever.retrieve(self.question))

    @pytest.mark.parametrize("use_async", [False, True])
    def test_it_can_be_fused(self, retriever: BaseRetriever, use_async: bool) -> None:
        fusion = QueryFusionRetriever(
            [retriever, retriever], llm=RecordingLLM(), num_queries=1, similarity_top_k=2, use_async=use_async
        )
        assert [node.node_id for node in fusion.retrieve(self.question)] == [
            node.node_id for node in retriever.retrieve(self.question)[:2]
        ]

    def test_it_can_be_evaluated(self, retriever: BaseRetriever) -> None:
        ids = [node.node_id for node in retriever.retrieve(self.question)]
        evaluator = RetrieverEvaluator.from_metric_names(["hit_rate", "mrr"], retriever=retriever)
        result = asyncio.run(evaluator.aevaluate(self.question, expected_ids=[ids[1]]))
        assert result.retrieved_ids == ids
        assert result.metric_vals_dict == {"hit_rate": 1.0, "mrr": 0.5}

    def test_it_is_a_tool_and_an_object_behind_an_index_node(self, retriever: BaseRetriever) -> None:
        found = retriever.retrieve(self.question)
        output = RetrieverTool.from_defaults(retriever, name="n", description="d").call(self.question)
        assert all(node.node.get_content(MetadataMode.LLM) in output.content for node in output.raw_output)

        class Leading(BaseRetriever):
            def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
                return [NodeWithScore(node=IndexNode(text="x", index_id="i", obj=retriever), score=1.0)]

        assert listed(Leading().retrieve(self.question)) == listed(found)

    def test_copies_find_the_same(self, retriever: BaseRetriever) -> None:
        expected = listed(retriever.retrieve(self.question))
        for again in (copy.deepcopy(retriever), pickle.loads(pickle.dumps(retriever))):
            assert listed(again.retrieve(self.question)) == expected


class RerankerContract:
    """Subclasses give ``reranker`` (which keeps at least three) and ``nodes`` (at least three)."""

    question = "what was the revenue?"

    @pytest.fixture
    def reranker(self) -> BaseNodePostprocessor:
        raise NotImplementedError

    @pytest.fixture
    def nodes(self) -> list[NodeWithScore]:
        raise NotImplementedError

    def test_nodes_come_best_first_with_python_floats(
        self, reranker: BaseNodePostprocessor, nodes: list[NodeWithScore]
    ) -> None:
        ranked = reranker.postprocess_nodes(nodes, query_str=self.question)
        assert {node.node_id for node in ranked} <= {node.node_id for node in nodes}
        scores = [node.score for node in ranked]
        assert all(type(score) is float and math.isfinite(score) for score in scores)
        assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]
        for node in ranked:
            json.loads(node.to_json())

    def test_every_way_to_ask_gives_the_same(self, reranker: BaseNodePostprocessor, nodes: list[NodeWithScore]) -> None:
        expected = listed(reranker.postprocess_nodes(nodes, query_str=self.question))
        bundle = QueryBundle(self.question)
        assert listed(reranker.postprocess_nodes(nodes, query_bundle=bundle)) == expected
        assert listed(asyncio.run(reranker.apostprocess_nodes(nodes, query_bundle=bundle))) == expected

        async def run() -> list[NodeWithScore]:
            return reranker.postprocess_nodes(nodes, query_bundle=bundle)

        assert listed(asyncio.run(run())) == expected, "inside a running loop"

    def test_the_order_given_does_not_matter(self, reranker: BaseNodePostprocessor, nodes: list[NodeWithScore]) -> None:
        assert listed(reranker.postprocess_nodes(nodes[::-1], query_str=self.question)) == listed(
            reranker.postprocess_nodes(nodes, query_str=self.question)
        )

    def test_what_is_given_stays_as_it_is(self, reranker: BaseNodePostprocessor, nodes: list[NodeWithScore]) -> None:
        before = [node.to_json() for node in nodes]
        ranked = reranker.postprocess_nodes(nodes, query_str=self.question)
        assert [node.to_json() for node in nodes] == before
        assert not any(one is other for one in ranked for other in nodes)

    def test_no_nodes_give_none_and_no_query_is_an_error(
        self, reranker: BaseNodePostprocessor, nodes: list[NodeWithScore]
    ) -> None:
        assert reranker.postprocess_nodes([], query_str=self.question) == []
        assert asyncio.run(reranker.apostprocess_nodes([], query_bundle=QueryBundle(self.question))) == []
        with pytest.raises(ValueError, match="query"):
            reranker.postprocess_nodes(nodes)

    def test_events_and_callbacks_tell_of_it(
        self, reranker: BaseNodePostprocessor, nodes: list[NodeWithScore], events: Events
    ) -> None:
        debug = LlamaDebugHandler(print_trace_on_end=False)
        reranker.callback_manager = CallbackManager([debug])
        reranker.postprocess_nodes(nodes, query_str=self.question)
        assert [name for name in events.names if name.startswith("ReRank")] == ["ReRankStartEvent", "ReRankEndEvent"]
        assert len(debug.get_event_pairs(CBEventType.RERANKING)) == 1

    def test_settings_survive(self, reranker: BaseNodePostprocessor, nodes: list[NodeWithScore]) -> None:
        expected = listed(reranker.postprocess_nodes(nodes, query_str=self.question))
        kind = type(reranker)
        for again in (kind.from_dict(reranker.to_dict()), kind.from_json(reranker.to_json()),
                      pickle.loads(pickle.dumps(reranker)), copy.deepcopy(reranker)):  # fmt: skip
            assert listed(again.postprocess_nodes(nodes, query_str=self.question)) == expected
        assert reranker.to_dict()["class_name"] == kind.class_name() == kind.__name__


class EmbeddingContract:
    """Subclasses give ``embedding``, and ``pictures``: paths of two different images, for a multi-modal one."""

    texts = ("revenue rose", "costs fell", "the board met")

    @pytest.fixture
    def embedding(self) -> BaseEmbedding:
        raise NotImplementedError

    @pytest.fixture
    def pictures(self) -> list[Path]:
        raise NotImplementedError

    def test_vectors_are_flat_python_floats_of_one_length(
        self, embedding: MultiModalEmbedding, pictures: list[Path]
    ) -> None:
        made = [
            embedding.get_query_embedding("x"), embedding.get_text_embedding("x"),
            embedding.get_image_embedding(str(pictures[0])), embedding.get_agg_embedding_from_queries(["x", "y"]),
        ]  # fmt: skip
        assert len({len(vector) for vector in made}) == 1
        for vector in made:
            assert isinstance(vector, list)
            assert {type(value) for value in vector} == {float}
            assert all(math.isfinite(value) for value in vector)

    def test_batches_keep_order(self, embedding: MultiModalEmbedding, pictures: list[Path]) -> None:
        assert np.allclose(
            embedding.get_text_embedding_batch(list(self.texts)),
            [embedding.get_text_embedding(text) for text in self.texts], atol=1e-4,
        )  # fmt: skip
        paths: Any = [str(path) for path in pictures]
        assert np.allclose(
            embedding.get_image_embedding_batch(paths), [embedding.get_image_embedding(path) for path in paths],
            atol=1e-4,
        )  # fmt: skip

    def test_async_gives_the_same(self, embedding: MultiModalEmbedding, pictures: list[Path]) -> None:
        async def run() -> list[Any]:
            return [
                [await embedding.aget_query_embedding("x")], [await embedding.aget_text_embedding("x")],
                [await embedding.aget_image_embedding(str(pictures[0]))],
                await embedding.aget_text_embedding_batch(list(self.texts)),
                await embedding.aget_image_embedding_batch([str(path) for path in pictures]),
            ]  # fmt: skip

        expected = [
            [embedding.get_query_embedding("x")], [embedding.get_text_embedding("x")],
            [embedding.get_image_embedding(str(pictures[0]))], embedding.get_text_embedding_batch(list(self.texts)),
            embedding.get_image_embedding_batch([str(path) for path in pictures]),
        ]  # fmt: skip
        for one, other in zip(asyncio.run(run()), expected, strict=True):
            assert np.allclose(one, other, atol=1e-4)
        for name in ("_aget_query_embedding", "_aget_text_embedding", "_aget_text_embeddings"):
            assert getattr(type(embedding), name) is not getattr(BaseEmbedding, name), f"{name} blocks by default"

    def test_streams_are_pictures_too(self, embedding: MultiModalEmbedding, pictures: list[Path]) -> None:
        one, other = (embedding.get_image_embedding(io.BytesIO(path.read_bytes())) for path in pictures)
        assert np.allclose(one, embedding.get_image_embedding(str(pictures[0])), atol=1e-4)
        assert not np.allclose(one, other, atol=1e-4)

    def test_it_is_a_transformation(self, embedding: BaseEmbedding) -> None:
        nodes = [TextNode(text=text, metadata={"hidden": 1}, excluded_embed_metadata_keys=["hidden"])
                 for text in self.texts]  # fmt: skip
        expected = [embedding.get_text_embedding(text) for text in self.texts]
        for made in (embedding(nodes), asyncio.run(embedding.acall(nodes)),
                     IngestionPipeline(transformations=[embedding]).run(nodes=nodes)):  # fmt: skip
            assert np.allclose([node.embedding for node in made], expected, atol=1e-4)

    def test_it_stands_in_a_vector_index(self, embedding: BaseEmbedding) -> None:
        documents = [Document(id_=text, text=text) for text in self.texts]
        index = VectorStoreIndex.from_documents(documents, embed_model=embedding)
        found = index.as_retriever(similarity_top_k=3).retrieve("revenue")
        assert {node.node.ref_doc_id for node in found} == set(self.texts)

    def test_events_and_callbacks_tell_of_it(self, embedding: BaseEmbedding, events: Events) -> None:
        debug = LlamaDebugHandler(print_trace_on_end=False)
        embedding.callback_manager = CallbackManager([debug])
        embedding.get_query_embedding("x")
        embedding([TextNode(text="x")])
        assert events.names.count("EmbeddingEndEvent") == 2
        assert len(debug.get_event_pairs(CBEventType.EMBEDDING)) == 2

    def test_settings_survive(self, embedding: BaseEmbedding) -> None:
        expected, kind = embedding.get_text_embedding("x"), type(embedding)
        for again in (kind.from_dict(embedding.to_dict()), kind.from_json(embedding.to_json()),
                      pickle.loads(pickle.dumps(embedding)), copy.deepcopy(embedding)):  # fmt: skip
            assert np.allclose(again.get_text_embedding("x"), expected, atol=1e-4)
        assert embedding.to_dict()["class_name"] == kind.class_name() == kind.__name__


class ReaderContract:
    """Subclasses give ``reader`` and ``path``: a file or folder with at least two pages."""

    @pytest.fixture
    def reader(self) -> BaseReader:
        raise NotImplementedError

    @pytest.fixture
    def path(self) -> Path:
        raise NotImplementedError

    def test_documents_are_apart_json_and_never_empty(self, reader: BaseReader, path: Path) -> None:
        documents = reader.load_data(path)
        assert len(documents) >= 2
        assert all(isinstance(document, Document) for document in documents)
        for attribute in ("id_", "hash", "text"):
            values = [getattr(document, attribute) for document in documents]
            assert len(set(values)) == len(values), attribute
            assert all(values), attribute
        for document in documents:
            again = json_to_doc(json.loads(json.dumps(doc_to_json(document))))
            assert (again.id_, again.hash) == (document.id_, document.hash)

    def test_every_way_to_read_gives_the_same(self, reader: BaseReader, path: Path) -> None:
        expected = [document.id_ for document in reader.load_data(path)]
        assert [document.id_ for document in reader.lazy_load_data(path)] == expected
        assert [document.id_ for document in asyncio.run(reader.aload_data(path))] == expected
        assert [document.id_ for document in asyncio.run(reader.alazy_load_data(path))] == expected

    def test_metadata_given_along_is_on_every_document(self, reader: BaseReader, path: Path) -> None:
        for document in reader.load_data(path, extra_info={"author": "Ada"}):
            assert document.metadata["author"] == "Ada"

    def test_settings_survive(self, reader: Any, path: Path) -> None:
        expected = [document.id_ for document in reader.load_data(path)]
        kind = type(reader)
        for again in (kind.from_dict(reader.to_dict()), pickle.loads(pickle.dumps(reader)), copy.deepcopy(reader)):
            assert [document.id_ for document in again.load_data(path)] == expected
        assert reader.to_dict()["class_name"] == kind.class_name() == kind.__name__
