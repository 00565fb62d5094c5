"""LlamaIndex pipelines from end to end, and the traps of the framework that touch our retriever and reranker.

The encoder is real (a tiny random checkpoint): a question that is a copy of a page's picture finds that page.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    CompletionResponseGen,
    ImageBlock,
    LLMMetadata,
    MessageRole,
    TextBlock,
)
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.evaluation import RetrieverEvaluator
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.retrievers.fusion_retriever import FUSION_MODES
from llama_index.core.schema import ImageNode, MediaResource, Node, NodeWithScore, QueryBundle, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.tools import RetrieverTool
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, Page, PageIndex, load_pages
from colqwen3_retrievers.llama_index import ColQwen3Reranker, ColQwen3Retriever
from tests.checkpoints import make_checkpoint

N_PICTURES = 5


class RecordingLLM(CustomLLM):
    """A chat model that answers always the same and keeps what it was asked."""

    _asked: list[list[ChatMessage]] = PrivateAttr(default_factory=list)

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(context_window=1_000_000, num_output=256, is_chat_model=True, model_name="recording")

    @property
    def images(self) -> list[bytes]:
        """The bytes of the pictures it was shown."""
        blocks = [block for messages in self._asked for message in messages for block in message.blocks]
        return [block.resolve_image().read() for block in blocks if isinstance(block, ImageBlock)]

    @property
    def texts(self) -> str:
        blocks = [block for messages in self._asked for message in messages for block in message.blocks]
        return "\n".join(block.text for block in blocks if isinstance(block, TextBlock))

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **_: Any) -> ChatResponse:
        self._asked.append(list(messages))
        return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content="It rose."))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **_: Any) -> ChatResponse:
        self._asked.append(list(messages))
        return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content="It rose."))

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **_: Any) -> CompletionResponse:
        raise AssertionError("a chat model is not asked to complete")

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **_: Any) -> CompletionResponseGen:
        raise AssertionError("a chat model is not asked to complete")


@pytest.fixture(autouse=True)
def _no_loop_left_open() -> None:
    """LlamaIndex makes an event loop of its own where there is none, and never closes it; told so, it uses run()."""
    asyncio.set_event_loop(None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama_index")
    make_checkpoint(made / "checkpoint", "tomoro")
    (made / "pages").mkdir()
    for seed in range(N_PICTURES):
        pixels = np.random.default_rng(seed).integers(0, 256, (96, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(made / "pages" / f"{seed}.png")
    return made


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Iterator[ColQwen3Encoder]:
    with ColQwen3Encoder(folder / "checkpoint", device="cpu") as made:
        yield made


@pytest.fixture(scope="module")
def index(folder: Path, encoder: ColQwen3Encoder) -> Iterator[PageIndex]:
    with PageIndex.open(folder / "index", encoder) as made:
        made.add(load_pages(folder / "pages"))
        yield made


def like(folder: Path, seed: int, text: str = "") -> QueryBundle:
    return QueryBundle(text, image_path=str(folder / "pages" / f"{seed}.png"))


def pixels_of(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def shown(llm: RecordingLLM, folder: Path) -> list[int]:
    """Which of the original pictures the model was shown, pixel for pixel."""
    originals = [np.asarray(Image.open(folder / "pages" / f"{seed}.png")) for seed in range(N_PICTURES)]
    return [next(i for i, one in enumerate(originals) if np.array_equal(one, pixels_of(data))) for data in llm.images]


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
        picture = folder / "pages" / "0.png"
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


# -- traps ------------------------------------------------------------------------------------------------------------


def test_trap_l9_the_picture_survives_a_document_store(folder: Path, index: PageIndex, tmp_path: Path) -> None:
    found = ColQwen3Retriever(index).retrieve(like(folder, 1))[0].node
    store = SimpleDocumentStore()
    store.add_documents([found])
    store.persist(str(tmp_path / "docs.json"))
    again = SimpleDocumentStore.from_persist_path(str(tmp_path / "docs.json")).get_document(found.node_id)
    assert isinstance(again, ImageNode)
    (image,) = (block for block in again.get_content_blocks() if isinstance(block, ImageBlock))
    assert np.array_equal(pixels_of(image.resolve_image().read()), np.asarray(Image.open(folder / "pages" / "1.png")))


@pytest.mark.parametrize("mode", list(FUSION_MODES))
@pytest.mark.parametrize("use_async", [False, True])
def test_trap_l10_fusion_keeps_pages_that_look_alike_apart(
    folder: Path, encoder: ColQwen3Encoder, tmp_path: Path, mode: FUSION_MODES, use_async: bool
) -> None:
    blank = folder / "pages" / "0.png"
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


def test_trap_l16_metadata_is_json_and_nodes_persist(folder: Path, index: PageIndex, tmp_path: Path) -> None:
    store = SimpleDocumentStore()
    store.add_documents([found.node for found in ColQwen3Retriever(index, similarity_top_k=9).retrieve("revenue")])
    store.persist(str(tmp_path / "docs.json"))
    assert len(SimpleDocumentStore.from_persist_path(str(tmp_path / "docs.json")).docs) == N_PICTURES


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


def test_trap_l21_a_tool_that_can_only_speak_names_the_page(folder: Path, index: PageIndex) -> None:
    tool = RetrieverTool.from_defaults(ColQwen3Retriever(index, similarity_top_k=1), name="pages", description="pages")
    found = ColQwen3Retriever(index, similarity_top_k=1).retrieve("revenue")[0]
    assert found.node_id in tool.call("revenue").content


def test_nodes_of_others_are_reranked_beside_ours(folder: Path, index: PageIndex, encoder: ColQwen3Encoder) -> None:
    ours = ColQwen3Retriever(index, similarity_top_k=2).retrieve(like(folder, 0))
    data = (folder / "pages" / "3.png").read_bytes()
    theirs = [
        NodeWithScore(node=Node(id_="theirs", image_resource=MediaResource(data=data)), score=0.1),
        NodeWithScore(node=TextNode(id_="text", text="Revenue rose."), score=0.9),
    ]
    reranker = ColQwen3Reranker(encoder=encoder, index=index)
    ranked = reranker.postprocess_nodes([*ours, *theirs], query_bundle=like(folder, 3))
    assert ranked[0].node_id == "theirs"
    assert len(ranked) == 4
