"""What goes wrong with page images in LlamaIndex, one test a trap: the framework's side is shown where it can be.

The encoder is real (a tiny random checkpoint): a question that is a copy of a page's picture finds that page.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.base.llms.types import ImageBlock
from llama_index.core.bridge.pydantic import ValidationError
from llama_index.core.evaluation import RetrieverEvaluator
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.retrievers.fusion_retriever import FUSION_MODES
from llama_index.core.schema import ImageNode, MediaResource, Node, NodeWithScore, QueryBundle, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.core.tools import RetrieverTool
from llama_index.core.vector_stores import SimpleVectorStore, VectorStoreQuery
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, MultiVector, Page, PageIndex, Query, load_pages
from colqwen3_retrievers.errors import ConfigError, EncodeError
from colqwen3_retrievers.llama_index import (
    ColQwen3Embedding,
    ColQwen3Reranker,
    ColQwen3Retriever,
    PageNodes,
    PageRetrieverTool,
)
from tests.frameworks.llama_index_models import RecordingLLM
from tests.frameworks.page_folder import base64_of, like, page_image, pixels, shown_page

N_PICTURES = 5
REMOTE = "https://example.org/a.png"


# -- one flat vector ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedding(encoder: ColQwen3Encoder) -> ColQwen3Embedding:
    return ColQwen3Embedding(encoder=encoder, dim=512)


def bare(folder: Path, seed: int) -> ImageNode:
    """A node with a picture and nothing else, as many readers make them."""
    return ImageNode(id_=f"picture {seed}", image=base64_of(page_image(folder, seed)))


def test_trap_l1_nodes_hold_one_flat_vector_and_multi_vectors_have_their_own_methods(
    folder: Path, embedding: ColQwen3Embedding
) -> None:
    node = bare(folder, 0)
    (multi_vector,) = embedding.get_node_multi_vectors([node])
    assert len(multi_vector) > 1
    with pytest.raises(ValidationError):
        node.embedding = multi_vector.vectors.tolist()
    (embedded,) = embedding([node])
    assert np.shape(embedded.embedding) == (512,)


def test_trap_l2_events_carry_flat_vectors(folder: Path, embedding: ColQwen3Embedding) -> None:
    seen: list[Any] = []

    class Listener(BaseEventHandler):
        @classmethod
        def class_name(cls) -> str:
            return "Listener"

        def handle(self, event: Any, **_: Any) -> None:
            if isinstance(event, EmbeddingEndEvent):
                seen.extend(event.embeddings)

    listener = Listener()
    get_dispatcher().add_event_handler(listener)
    try:
        embedding.get_query_embedding("x")
        embedding.get_text_embedding("x")
        embedding.get_text_embedding_batch(["x", "y"])
        embedding([bare(folder, 0)])
    finally:
        get_dispatcher().event_handlers.remove(listener)
    assert [np.shape(vector) for vector in seen] == [(512,)] * 5


def test_trap_l3_multi_vectors_live_in_the_index_and_not_in_media_resources(
    folder: Path, embedding: ColQwen3Embedding, index: PageIndex
) -> None:
    (multi_vector,) = embedding.get_image_multi_vectors([page_image(folder)])
    with pytest.raises(ValidationError):
        MediaResource(embeddings={"multi": multi_vector.vectors.tolist()})  # type: ignore[dict-item]
    (record,) = index.get(["0.png#page=1"], vectors=True)
    assert record.multi_vector is not None
    np.testing.assert_allclose(record.multi_vector.vectors, multi_vector.vectors, atol=1e-2)  # a store may round
    assert "embeddings" not in ColQwen3Retriever(index).retrieve("x")[0].to_json()


def test_trap_l5_a_picture_is_embedded_and_not_the_words_beside_it(folder: Path, embedding: ColQwen3Embedding) -> None:
    nodes = [ImageNode(text="a caption", image_path=str(page_image(folder, seed))) for seed in range(2)]
    embedding(nodes)
    for seed, node in enumerate(nodes):
        expected = embedding.get_image_embedding(str(page_image(folder, seed)))
        assert node.embedding == pytest.approx(expected, abs=1e-5)
    assert np.abs(np.subtract(nodes[0].embedding, nodes[1].embedding)).max() > 1e-3
    assert np.abs(np.subtract(nodes[0].embedding, embedding.get_text_embedding("a caption"))).max() > 1e-3


@pytest.mark.parametrize("inserted", [False, True])
def test_trap_l6_a_vector_index_keeps_pages_without_text(
    folder: Path, embedding: ColQwen3Embedding, encoder: ColQwen3Encoder, inserted: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pictures = [bare(folder, seed) for seed in range(N_PICTURES)]
    VectorStoreIndex(embedding(pictures), embed_model=embedding)
    assert "skipping" in capsys.readouterr().out, "the framework drops them, embedded or not"
    nodes = embedding(PageNodes()(pictures))
    if inserted:
        index = VectorStoreIndex([], embed_model=embedding)
        index.insert_nodes(nodes)
    else:
        index = VectorStoreIndex(nodes, embed_model=embedding)
    assert capsys.readouterr().out == ""
    found = index.as_retriever(similarity_top_k=N_PICTURES).retrieve("revenue")
    assert sorted(node.node_id for node in found) == [f"picture {seed}" for seed in range(N_PICTURES)]
    # the proven path: candidates from one vector each, order from MaxSim, pictures to the chat model
    llm = RecordingLLM()
    engine = index.as_query_engine(
        llm=llm, multimodal=True, similarity_top_k=N_PICTURES,
        node_postprocessors=[ColQwen3Reranker(encoder=encoder, top_n=1)],
    )  # fmt: skip
    engine.query(like(folder, 3, "what was the revenue?"))
    assert [shown_page(data, folder) for data in llm.images] == [3]
    assert "page_id: picture 3" in llm.texts


@pytest.mark.parametrize("asynchronous", [False, True])
def test_trap_l7_a_pipeline_stores_every_page(folder: Path, embedding: ColQwen3Embedding, asynchronous: bool) -> None:
    store = SimpleVectorStore()
    pipeline = IngestionPipeline(transformations=[PageNodes(), embedding], vector_store=store)
    nodes: list[Any] = [*(bare(folder, seed) for seed in range(3)), TextNode(id_="text", text="revenue")]
    made = asyncio.run(pipeline.arun(nodes=nodes)) if asynchronous else pipeline.run(nodes=nodes)
    assert set(store.data.embedding_dict) == {"picture 0", "picture 1", "picture 2", "text"}
    for seed in range(3):
        question = embedding.get_image_embedding(str(page_image(folder, seed)))
        answer = store.query(VectorStoreQuery(query_embedding=question, similarity_top_k=1))
        assert answer.ids == [f"picture {seed}"]
    assert len(made) == 4


def test_trap_l8_the_pipelines_cache_takes_no_page_for_another(folder: Path, embedding: ColQwen3Embedding) -> None:
    pipeline = IngestionPipeline(transformations=[PageNodes(), embedding])
    texts = [[ImageNode(id_="same", image=base64_of(page_image(folder, seed)))] for seed in (0, 1)]
    first, second = (pipeline.run(nodes=nodes)[0] for nodes in texts)
    for seed, node in ((0, first), (1, second)):
        assert isinstance(node, ImageNode)
        assert node.image == base64_of(page_image(folder, seed))
        assert node.embedding == pytest.approx(embedding.get_image_embedding(str(page_image(folder, seed))), abs=1e-5)
    encoded = embedding.encoder.stats.inputs
    again = pipeline.run(nodes=[ImageNode(id_="same", image=base64_of(page_image(folder)))])[0]
    assert again.embedding == pytest.approx(first.embedding, abs=1e-6)
    assert embedding.encoder.stats.inputs == encoded, "what was embedded before comes from the cache"


def test_trap_l14_a_cache_keyed_by_text_is_refused(embedding: ColQwen3Embedding, encoder: ColQwen3Encoder) -> None:
    question, document = embedding.get_query_embedding("revenue"), embedding.get_text_embedding("revenue")
    assert np.abs(np.subtract(question, document)).max() > 1e-3
    with pytest.raises(ConfigError, match=r"^embeddings_cache: .*question"):
        ColQwen3Embedding(encoder=encoder, embeddings_cache=SimpleKVStore())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="question"):
        embedding.embeddings_cache = SimpleKVStore()


def test_trap_l15_workers_get_settings_and_find_the_same(folder: Path, encoder: ColQwen3Encoder) -> None:
    pipeline = IngestionPipeline(transformations=[PageNodes(), ColQwen3Embedding(encoder=encoder, dim=128)])
    nodes = [bare(folder, seed) for seed in range(2)]
    alone = pipeline.run(nodes=nodes)
    pipeline = IngestionPipeline(transformations=[PageNodes(), ColQwen3Embedding(encoder=encoder, dim=128)])
    made = pipeline.run(nodes=[bare(folder, seed) for seed in range(2)], num_workers=2)
    assert [node.node_id for node in made] == [node.node_id for node in alone]
    for one, other in zip(made, alone, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-4)
    again = pickle.loads(pickle.dumps(pipeline.transformations[1]))
    again.get_text_embedding("x")
    assert again.encoder.stats.loads == 1, "in this process, copies share the model"


# -- nodes -------------------------------------------------------------------------------------------------------------


def test_trap_l9_the_picture_survives_a_document_store(folder: Path, index: PageIndex, tmp_path: Path) -> None:
    found = ColQwen3Retriever(index).retrieve(like(folder, 1))[0].node
    store = SimpleDocumentStore()
    store.add_documents([found])
    store.persist(str(tmp_path / "docs.json"))
    again = SimpleDocumentStore.from_persist_path(str(tmp_path / "docs.json")).get_document(found.node_id)
    assert isinstance(again, ImageNode)
    (image,) = (block for block in again.get_content_blocks() if isinstance(block, ImageBlock))
    assert np.array_equal(pixels(image.resolve_image().read()), pixels(page_image(folder, 1)))


@pytest.mark.parametrize("mode", list(FUSION_MODES))
@pytest.mark.parametrize("use_async", [False, True])
def test_trap_l10_fusion_keeps_pages_that_look_alike_apart(
    folder: Path, encoder: ColQwen3Encoder, tmp_path: Path, mode: FUSION_MODES, use_async: bool
) -> None:
    blank = page_image(folder)
    pages = [
        *(Page(source="a.pdf", number=number, image=blank, text="Confidential") for number in (1, 2)),
        Page(source="b.pdf", image=blank),
        *(Page(id=id_, text="Confidential") for id_ in ("one", "two")),
    ]
    with PageIndex.open(tmp_path / "index", encoder) as index:
        index.add(pages)
        retrievers = [ColQwen3Retriever(index, similarity_top_k=9) for _ in range(2)]
        assert len({found.node.hash for found in retrievers[0].retrieve("x")}) == len(pages)
        fusion = QueryFusionRetriever(
            retrievers, llm=RecordingLLM(), mode=mode, similarity_top_k=9, num_queries=1, use_async=use_async
        )
        fused = fusion.retrieve("confidential")
    assert sorted(found.node_id for found in fused) == sorted(page.id for page in pages)


@pytest.mark.parametrize("reranked", [False, True])
def test_trap_l11_and_l20_the_evaluator_takes_our_nodes_and_reranks_inside_its_loop(
    folder: Path, encoder: ColQwen3Encoder, tmp_path: Path, reranked: bool
) -> None:
    with PageIndex.open(tmp_path / "index", encoder) as index:
        index.add(load_pages(folder / "pages"))
        index.add(Page(source="notes.txt", text="what was the revenue?"))
        evaluator = RetrieverEvaluator.from_metric_names(
            ["hit_rate", "mrr", "recall"],
            retriever=ColQwen3Retriever(index, similarity_top_k=6),
            node_postprocessors=[ColQwen3Reranker(encoder=encoder, top_n=6)] if reranked else None,
        )
        expected = [found.node_id for found in ColQwen3Retriever(index, similarity_top_k=6).retrieve("revenue")]
        result = asyncio.run(evaluator.aevaluate("revenue", expected_ids=[expected[1]]))
    assert result.retrieved_ids == expected
    assert result.metric_vals_dict == {"hit_rate": 1.0, "mrr": 0.5, "recall": 1.0}


def test_trap_l12_scores_are_python_floats_through_the_whole_pipeline(
    folder: Path, index: PageIndex, encoder: ColQwen3Encoder
) -> None:
    found = ColQwen3Retriever(index, similarity_top_k=4).retrieve("revenue")
    for nodes in (found, ColQwen3Reranker(encoder=encoder, score_mode="mean").postprocess_nodes(found, query_str="x")):
        assert [type(node.score) for node in nodes] == [float] * 4
        for node in nodes:
            json.loads(node.to_json())


def test_trap_l16_what_is_not_json_is_refused_and_nodes_persist(folder: Path, index: PageIndex, tmp_path: Path) -> None:
    store = SimpleDocumentStore()
    store.add_documents([found.node for found in ColQwen3Retriever(index, similarity_top_k=9).retrieve("revenue")])
    store.persist(str(tmp_path / "docs.json"))
    assert len(SimpleDocumentStore.from_persist_path(str(tmp_path / "docs.json")).docs) == N_PICTURES
    with pytest.raises(EncodeError, match="JSON"):
        ColQwen3Retriever(index).add([TextNode(text="x", metadata={"picture": Image.new("RGB", (2, 2))})])


def test_trap_l17_mean_scores_can_be_cut_off(folder: Path, index: PageIndex, encoder: ColQwen3Encoder) -> None:
    found = ColQwen3Retriever(index, similarity_top_k=N_PICTURES).retrieve(like(folder, 4))
    assert (found[-1].score or 0) > 1, "a sum is no similarity of 0..1"
    ranked = ColQwen3Reranker(encoder=encoder, score_mode="mean").postprocess_nodes(found, query_bundle=like(folder, 4))
    left = SimilarityPostprocessor(similarity_cutoff=0.999).postprocess_nodes(ranked)
    assert [node.node_id for node in left] == ["4.png#page=1"]


def test_trap_l19_nodes_lie_where_the_notebook_display_looks(folder: Path, index: PageIndex) -> None:
    for found in ColQwen3Retriever(index, similarity_top_k=9).retrieve("revenue"):
        assert isinstance(found.node, ImageNode)
        assert found.node.image_path is not None
        path = Path(found.node.image_path)
        assert path.is_absolute()
        Image.open(path).verify()


def test_trap_l21_agents_see_page_images(folder: Path, index: PageIndex) -> None:
    retriever = ColQwen3Retriever(index, similarity_top_k=1)
    found = retriever.retrieve("revenue")[0]
    theirs = RetrieverTool.from_defaults(retriever, name="pages", description="pages").call("revenue")
    assert not any(isinstance(block, ImageBlock) for block in theirs.blocks)
    assert found.node_id in theirs.content, "a tool that can only speak names the page"
    ours = PageRetrieverTool(retriever).call("revenue")
    (image,) = (block for block in ours.blocks if isinstance(block, ImageBlock))
    assert found.node_id[0] == str(shown_page(image.resolve_image().read(), folder))


class Gated(ColQwen3Encoder):
    """The real encoder, whose queries are held back while the gate is shut."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate = threading.Event()
        self.held = 0

    def submit_queries(self, queries: Iterable[str | Query]) -> Future[list[MultiVector]]:
        real, late = super().submit_queries(queries), Future[list[MultiVector]]()
        self.held += 1

        def give() -> None:
            if self.gate.wait(20):
                late.set_result(real.result())
            else:
                late.set_exception(TimeoutError("the gate was never opened: something blocks the event loop"))

        threading.Thread(target=give, daemon=True).start()
        return late


def test_trap_l13_a_hundred_concurrent_retrievals_never_block_the_loop(folder: Path, index: PageIndex) -> None:
    asked = [f"question {i % 20}" for i in range(100)]
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    async def run(retriever: ColQwen3Retriever, encoder: Gated) -> list[list[NodeWithScore]]:
        ticking = asyncio.create_task(tick())
        calls = [asyncio.create_task(retriever.aretrieve(text)) for text in asked]
        while encoder.held < len(asked):  # until all are under way
            assert not any(call.done() for call in calls)
            await asyncio.sleep(0.001)
        before = ticks
        while ticks < before + 1000:
            await asyncio.sleep(0.001)
        assert not any(call.done() for call in calls)
        encoder.gate.set()
        answers = await asyncio.gather(*calls)
        ticking.cancel()
        return answers

    with Gated(folder / "checkpoint", device="cpu") as encoder:
        retriever = ColQwen3Retriever(index.location, encoder=encoder, similarity_top_k=3)
        answers = asyncio.run(run(retriever, encoder))
        alone = [retriever.retrieve(text) for text in asked[:20]]
        retriever.close()
    for i, answer in enumerate(answers):
        assert [found.node_id for found in answer] == [found.node_id for found in alone[i % 20]]
        assert [found.score for found in answer] == pytest.approx([found.score for found in alone[i % 20]], abs=1e-3)


@pytest.mark.parametrize("kind", ["ImageNode", "Node"])
def test_trap_l18_a_picture_known_by_a_url_is_never_fetched(
    kind: str, folder: Path, encoder: ColQwen3Encoder, tmp_path: Path
) -> None:
    url: Any = REMOTE
    remote = (
        ImageNode(id_="n", image_url=REMOTE, text="x") if kind == "ImageNode"
        else Node(id_="n", image_resource=MediaResource(url=url), text_resource=MediaResource(text="x"))
    )  # fmt: skip
    given = [NodeWithScore(node=remote, score=1.0)]
    with pytest.raises(EncodeError, match="not fetched"):
        ColQwen3Reranker(encoder=encoder).postprocess_nodes(given, query_str="x")
    with pytest.raises(EncodeError, match="not fetched"):
        PageNodes()([remote])
    with PageIndex.open(tmp_path / "index", encoder) as index, pytest.raises(EncodeError, match="not fetched"):
        ColQwen3Retriever.from_nodes([remote], index)
    with pytest.raises(EncodeError, match="not fetched"), PageIndex.open(tmp_path / "index", encoder) as index:
        index.add(Page(id="p", text="x"))
        ColQwen3Retriever(index).retrieve(QueryBundle("x", image_path=REMOTE))
