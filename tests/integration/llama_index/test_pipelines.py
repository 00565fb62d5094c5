"""LlamaIndex from end to end: files to answers, through query engines, agents and pipelines.

The encoder is real (a tiny random checkpoint): a question that is a copy of a page's picture finds that page.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import SimpleDirectoryReader
from llama_index.core.agent.workflow import FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import ImageBlock, TextBlock
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.retrievers.fusion_retriever import FUSION_MODES
from llama_index.core.schema import ImageNode, MediaResource, Node, NodeWithScore, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore

from colqwen3_retrievers import ColQwen3Encoder, Page, PageIndex
from colqwen3_retrievers.llama_index import (
    ColQwen3Reranker,
    ColQwen3Retriever,
    PageNodes,
    PageReader,
    PageRetrieverTool,
)
from tests.frameworks.llama_index_models import ANSWER, CallingLLM, RecordingLLM, images_of, texts_of
from tests.frameworks.page_folder import like, page_image, shown_page

N_PICTURES = 5


def shown(llm: RecordingLLM, folder: Path) -> list[int]:
    """Which of the original pictures the model was shown, pixel for pixel."""
    return [shown_page(data, folder) for data in llm.images]


# -- pipelines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("seed", [0, 3])
def test_the_picture_of_the_right_page_reaches_the_chat_model(
    folder: Path, index: PageIndex, encoder: ColQwen3Encoder, seed: int, asynchronous: bool
) -> None:
    llm = RecordingLLM()
    engine = RetrieverQueryEngine.from_args(
        ColQwen3Retriever(index, similarity_top_k=N_PICTURES),
        llm=llm,
        multimodal=True,
        node_postprocessors=[ColQwen3Reranker(encoder=encoder, top_n=1)],
    )
    question = like(folder, seed, "what was the revenue?")
    answer = asyncio.run(engine.aquery(question)) if asynchronous else engine.query(question)
    assert str(answer) == "It rose."
    assert shown(llm, folder) == [seed]
    assert f"file_name: {seed}.png" in llm.texts
    assert "sha256" not in llm.texts
    assert "what was the revenue?" in llm.texts
    (source,) = answer.source_nodes
    assert isinstance(source.node, ImageNode)
    assert source.node.image_path is not None
    assert Path(source.node.image_path).read_bytes() == llm.images[0], "the index's file, byte for byte"


def test_all_retrieved_pages_reach_the_model_best_first(folder: Path, index: PageIndex) -> None:
    llm = RecordingLLM()
    retriever = ColQwen3Retriever(index, similarity_top_k=3)
    engine = RetrieverQueryEngine.from_args(retriever, llm=llm, multimodal=True)
    question = like(folder, 2, "revenue")
    engine.query(question)
    ranked = [int(found.node_id[0]) for found in retriever.retrieve(question)]
    assert shown(llm, folder) == ranked
    assert ranked[0] == 2


def test_an_engine_for_texts_still_gets_texts(folder: Path, encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    llm = RecordingLLM()
    with PageIndex.open(tmp_path / "index", encoder) as index:
        picture = page_image(folder)
        index.add([Page(source="a.pdf", image=picture, text="Revenue rose."), Page(source="b.txt", text="Costs fell.")])
        RetrieverQueryEngine.from_args(ColQwen3Retriever(index), llm=llm).query("revenue?")
    assert llm.images == []
    assert "Revenue rose." in llm.texts
    assert "Costs fell." in llm.texts


def test_the_engine_hands_its_callback_manager_to_the_reranker(
    folder: Path, index: PageIndex, encoder: ColQwen3Encoder
) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    engine = RetrieverQueryEngine.from_args(
        ColQwen3Retriever(index, similarity_top_k=3),
        llm=RecordingLLM(),
        multimodal=True,
        node_postprocessors=[ColQwen3Reranker(encoder=encoder)],
        callback_manager=CallbackManager([debug]),
    )
    engine.query("revenue")
    assert len(debug.get_event_pairs(CBEventType.RERANKING)) == 1


def test_many_questions_at_once_each_get_their_own_page(
    folder: Path, index: PageIndex, encoder: ColQwen3Encoder
) -> None:
    engine = RetrieverQueryEngine.from_args(
        ColQwen3Retriever(index, similarity_top_k=N_PICTURES),
        llm=RecordingLLM(),
        multimodal=True,
        node_postprocessors=[ColQwen3Reranker(encoder=encoder, index=index, top_n=2)],
    )

    async def run() -> list[Any]:
        return await asyncio.gather(*(engine.aquery(like(folder, seed, "x")) for seed in range(N_PICTURES)))

    answers = asyncio.run(run())
    assert [answer.source_nodes[0].node_id for answer in answers] == [f"{i}.png#page=1" for i in range(N_PICTURES)]


def test_nodes_of_others_are_reranked_beside_ours(folder: Path, index: PageIndex, encoder: ColQwen3Encoder) -> None:
    ours = ColQwen3Retriever(index, similarity_top_k=2).retrieve(like(folder, 0))
    data = (page_image(folder, 3)).read_bytes()
    theirs = [
        NodeWithScore(node=Node(id_="theirs", image_resource=MediaResource(data=data)), score=0.1),
        NodeWithScore(node=TextNode(id_="text", text="Revenue rose."), score=0.9),
    ]
    reranker = ColQwen3Reranker(encoder=encoder, index=index)
    ranked = reranker.postprocess_nodes([*ours, *theirs], query_bundle=like(folder, 3))
    assert ranked[0].node_id == "theirs"
    assert len(ranked) == 4


# LlamaIndex's agents trip over deprecations of pydantic and of their own workflows.
AGENTS = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# -- agents -----------------------------------------------------------------------------------------------------------


@AGENTS
@pytest.mark.parametrize("streaming", [False, True])
def test_an_agent_is_shown_the_right_page_and_its_name(folder: Path, index: PageIndex, streaming: bool) -> None:
    retriever = ColQwen3Retriever(index, similarity_top_k=2)
    llm = CallingLLM()
    agent = FunctionAgent(tools=[PageRetrieverTool(retriever)], llm=llm, streaming=streaming)

    async def ask() -> str:
        return str(await agent.run(user_msg="what was the revenue?"))

    assert asyncio.run(ask()) == ANSWER
    expected = [found.node_id for found in retriever.retrieve("what was the revenue?")]
    (message,) = llm.tool_messages
    kinds = [type(block) for block in message.blocks]
    assert kinds == [TextBlock, ImageBlock] * 2, "each picture right after its name"
    assert [f"{shown_page(data, folder)}.png#page=1" for data in images_of([message])] == expected
    for number, page_id in enumerate(expected, start=1):
        assert f"[{number}] " in texts_of([message])
        assert f"file_name: {page_id.split('#')[0]}" in texts_of([message])
    assert "sha256" not in texts_of([message])


@AGENTS
def test_an_agent_that_reads_texts_only_is_told_the_page(folder: Path, index: PageIndex) -> None:
    llm = RecordingLLM()
    llm._script.extend(
        [
            'Thought: look.\nAction: search_pages\nAction Input: {"input": "revenue"}',
            f"Thought: done.\nAnswer: {ANSWER}",
        ]
    )
    agent = ReActAgent(
        tools=[PageRetrieverTool(ColQwen3Retriever(index, similarity_top_k=1))], llm=llm, streaming=False
    )

    async def ask() -> str:
        return str(await agent.run(user_msg="what was the revenue?"))

    assert asyncio.run(ask()) == ANSWER
    (found,) = ColQwen3Retriever(index, similarity_top_k=1).retrieve("revenue")
    assert f"file_name: {found.metadata['file_name']}" in texts_of(llm._asked[-1])


# -- files to answers -------------------------------------------------------------------------------------------------


def test_from_a_directory_to_an_answer(folder: Path, encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    reader = SimpleDirectoryReader(str(folder / "pages"), file_extractor={".png": PageReader(root=folder / "pages")})
    llm = RecordingLLM()
    retriever = ColQwen3Retriever.from_documents(reader.load_data(), tmp_path / "index", encoder=encoder)
    engine = RetrieverQueryEngine.from_args(retriever, llm=llm, multimodal=True)
    assert str(engine.query(like(folder, 3, "what was the revenue?"))) == ANSWER
    assert shown(llm, folder)[0] == 3
    assert "source: 3.png" in llm.texts
    assert "page: 1" in llm.texts
    retriever.close()


def test_a_pipeline_with_cache_and_document_store_feeds_the_index(
    folder: Path, encoder: ColQwen3Encoder, tmp_path: Path
) -> None:
    documents = PageReader().load_data(folder / "pages")
    pipeline = IngestionPipeline(transformations=[PageNodes()], docstore=SimpleDocumentStore(),
                                 docstore_strategy=DocstoreStrategy.DUPLICATES_ONLY)  # fmt: skip
    with PageIndex.open(tmp_path / "index", encoder) as index:
        retriever = ColQwen3Retriever(index, similarity_top_k=1)
        assert len(retriever.add(pipeline.run(documents=documents))) == N_PICTURES
        assert pipeline.run(documents=documents) == [], "the document store knows them all"
        for seed in range(N_PICTURES):
            (found,) = retriever.retrieve(like(folder, seed))
            assert (found.node_id, found.metadata["file_name"]) == (f"{seed}.png#page=1", f"{seed}.png")


def test_retrievers_of_ours_are_fused_with_others(folder: Path, index: PageIndex) -> None:
    narrow = ColQwen3Retriever(index, similarity_top_k=3, where={"source": "4.png"})
    fusion = QueryFusionRetriever(
        [ColQwen3Retriever(index, similarity_top_k=3), narrow],
        llm=RecordingLLM(), mode=FUSION_MODES.RECIPROCAL_RANK, similarity_top_k=3, num_queries=1, use_async=False,
    )  # fmt: skip
    fused = fusion.retrieve(like(folder, 4))
    assert fused[0].node_id == "4.png#page=1"
    assert fused[0].score == pytest.approx(2 / 60, abs=1e-3)
    assert len({found.node_id for found in fused}) == 3
