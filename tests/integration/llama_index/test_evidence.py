"""LlamaIndex: where the answer lies on a page, and pictures at web addresses."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.base.llms.types import ImageBlock
from llama_index.core.base.response.schema import Response
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import (
    BaseNode,
    ImageNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeWithScore,
    QueryBundle,
    TextNode,
)

from colqwen3_retrievers import ColQwen3Encoder, Page, PageIndex, Query, similarity_map
from colqwen3_retrievers.errors import ConfigError, EncodeError
from colqwen3_retrievers.llama_index import (
    ColQwen3Embedding,
    ColQwen3Reranker,
    ColQwen3Retriever,
    PageNodes,
    PageRetrieverTool,
)
from colqwen3_retrievers.pages.images import open_image
from tests.frameworks.evidence_pages import last_token, three_pages_and_a_text
from tests.frameworks.llama_index_models import RecordingLLM
from tests.frameworks.page_folder import like, page_image
from tests.hashing import picture
from tests.image_server import HOST, image_server

HIDDEN = {"boxes", "heatmap", "pooled"}


@pytest.fixture
def index(tmp_path: Path) -> Iterator[PageIndex]:
    with three_pages_and_a_text(tmp_path) as made:
        yield made


def piece(tmp_path: Path) -> QueryBundle:
    """The last visual token of page 2: columns 16 to 24 of 24, rows 8 to 16 of 16."""
    file = tmp_path / "piece.png"
    last_token(2).save(file)
    return QueryBundle("", image_path=str(file))


def edges(node: BaseNode) -> list[list[float]]:
    return [
        [pytest.approx(box[side], abs=1e-6) for side in ("left", "top", "right", "bottom")]
        for box in node.metadata["boxes"]
    ]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_retriever_says_where_the_answer_lies(index: PageIndex, tmp_path: Path, asynchronous: bool) -> None:
    retriever = ColQwen3Retriever(index, similarity_top_k=4, boxes=1, heatmaps=tmp_path / "maps")
    asked = piece(tmp_path)
    found = asyncio.run(retriever.aretrieve(asked)) if asynchronous else retriever.retrieve(asked)
    first = found[0]
    assert first.node_id == "a.pdf#page=2"
    assert edges(first.node) == [[2 / 3, 0.5, 1.0, 1.0]]
    assert open_image(first.metadata["heatmap"]).size == picture(2).size
    plain = ColQwen3Retriever(index, similarity_top_k=4).retrieve(asked)
    for told, bare in zip(found, plain, strict=True):
        text = told.node_id == "notes.txt#page=1"
        assert told.metadata.keys() - bare.metadata.keys() == (set() if text else HIDDEN)
        assert told.node.get_content(MetadataMode.LLM) == bare.node.get_content(MetadataMode.LLM)
        assert told.node.get_content(MetadataMode.EMBED) == bare.node.get_content(MetadataMode.EMBED)
        assert told.score == bare.score
    json.dumps([node.to_dict() for node in found])


def test_the_reranker_draws_what_the_index_encoded(
    folder: Path, encoder: ColQwen3Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "scan.png"
    picture(0, 128, 96).save(file)
    with PageIndex.open(tmp_path / "index", encoder, images="reference") as index:
        index.add(Page(id="scan", image=file))
        found = ColQwen3Retriever(index).retrieve("revenue")
        reranker = ColQwen3Reranker(index=index, boxes=1, heatmaps=tmp_path / "maps")
        assert reranker.postprocess_nodes(found, query_str="revenue")[0].metadata.keys() >= HIDDEN
        picture(1, 128, 96).save(file)
        [ranked] = reranker.postprocess_nodes(found, query_str="revenue")
        assert ranked.metadata.keys() & HIDDEN == {"boxes", "pooled"}
        assert "has changed since the page was indexed" in caplog.text


def test_pages_that_are_pooled_say_so(folder: Path, tmp_path: Path) -> None:
    encoder = ColQwen3Encoder(folder / "checkpoint", device="cpu", pool_factor=3)
    with encoder, PageIndex.open(tmp_path / "pooled", encoder) as index:
        index.add(Page(id="page", image=page_image(folder, 1)))
        [found] = ColQwen3Retriever(index, boxes=1).retrieve("revenue")
        assert found.metadata["pooled"] is True
        [ranked] = ColQwen3Reranker(index=index, boxes=1).postprocess_nodes([found], query_str="revenue")
        assert ranked.metadata["pooled"] is True


def test_groups_and_neighbours_have_boxes_too(index: PageIndex, tmp_path: Path) -> None:
    retriever = ColQwen3Retriever(index, similarity_top_k=2, group_by="source", window=1, boxes=2)
    found = retriever.retrieve(piece(tmp_path))
    assert [node.node_id for node in found] == [
        "a.pdf#page=2", "a.pdf#page=1", "a.pdf#page=3", "notes.txt#page=1",
    ]  # fmt: skip
    assert ["boxes" in node.metadata for node in found] == [True, True, True, False]


def test_boxes_reach_the_caller_of_a_query_engine_and_not_its_model(index: PageIndex, tmp_path: Path) -> None:
    llm = RecordingLLM()
    engine = RetrieverQueryEngine.from_args(ColQwen3Retriever(index, boxes=1), llm=llm, multimodal=True)
    answer = engine.query(piece(tmp_path))
    assert isinstance(answer, Response)
    assert answer.source_nodes[0].metadata["boxes"]
    assert "page: 2" in llm.texts
    assert "boxes" not in llm.texts


def test_settings_go_with_copies_and_files(index: PageIndex, tmp_path: Path) -> None:
    retriever = ColQwen3Retriever(index, boxes=2, heatmaps=tmp_path / "maps")
    retriever.persist(tmp_path)
    opened = ColQwen3Retriever.from_persist_dir(tmp_path, encoder=index.encoder)  # type: ignore[arg-type]
    for again in (copy.deepcopy(retriever), opened):
        assert len(again.retrieve(piece(tmp_path))[0].metadata["boxes"]) == 1
    opened.close()
    with pytest.raises(ConfigError, match="boxes"):
        ColQwen3Retriever(index, boxes=-1)


def nodes_of(folder: Path) -> list[NodeWithScore]:
    made: list[BaseNode] = [ImageNode(id_=f"page {n}", image_path=str(page_image(folder, n))) for n in range(3)]
    return [NodeWithScore(node=node) for node in [*made, TextNode(id_="text", text="Revenue rose.")]]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_reranker_says_where_the_answer_lies(
    folder: Path, encoder: ColQwen3Encoder, tmp_path: Path, asynchronous: bool
) -> None:
    reranker = ColQwen3Reranker(encoder=encoder, top_n=None, boxes=2, heatmaps=tmp_path)
    given = nodes_of(folder)
    asked = like(folder, 1)
    ranked = (
        asyncio.run(reranker.apostprocess_nodes(given, asked)) if asynchronous
        else reranker.postprocess_nodes(given, asked)
    )  # fmt: skip
    assert ranked[0].node_id == "page 1"
    [vectors] = encoder.encode_queries([Query(image=page_image(folder, 1))])
    for found in ranked:
        if found.node_id == "text":
            assert not HIDDEN & found.metadata.keys()
            continue
        file = page_image(folder, int(found.node_id.removeprefix("page ")))
        [page] = encoder.encode_images([file])
        made = similarity_map(vectors, page)
        expected = [[box.left, box.top, box.right, box.bottom] for box in made.boxes(top=2)]
        assert edges(found.node) == expected
        overlay = np.asarray(made.overlay(open_image(file), boxes=2), dtype=int)
        assert (
            np.abs(np.asarray(open_image(found.metadata["heatmap"]), dtype=int) - overlay).mean() < 0.5
        )  # batches round
        assert set(found.node.excluded_llm_metadata_keys) >= HIDDEN
        assert set(found.node.excluded_embed_metadata_keys) >= HIDDEN
    assert all(not HIDDEN & node.metadata.keys() for node in given), "what is handed in is left as it is"


def test_boxes_of_a_reranker_are_settings(folder: Path, encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    reranker = ColQwen3Reranker(encoder=encoder, boxes=2, heatmaps=tmp_path, allow_remote=["images.intranet"])
    for again in (ColQwen3Reranker.from_dict(json.loads(reranker.to_json())), pickle.loads(pickle.dumps(reranker))):
        assert (again.boxes, again.heatmaps, again.allow_remote) == (2, str(tmp_path), ("images.intranet",))
    for wrong in ({"boxes": -1}, {"heatmaps": 3}, {"allow_remote": "example.org"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ColQwen3Reranker(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="neither boxes nor heatmaps"):
        ColQwen3Reranker(scoring="server", boxes=1)


# -- web addresses -----------------------------------------------------------------------------------------------------


@pytest.fixture
def remote(folder: Path) -> Iterator[tuple[str, list[str]]]:
    with image_server({f"{n}.png": (page_image(folder, n)).read_bytes() for n in range(3)}) as served:
        yield served


def at(url: str, n: int, kind: str = "ImageNode") -> BaseNode:
    address: Any = f"{url}/{n}.png"
    if kind == "ImageNode":
        return ImageNode(id_=f"page {n}", image_url=address)
    return Node(id_=f"page {n}", image_resource=MediaResource(url=address))


@pytest.mark.parametrize("kind", ["ImageNode", "Node"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_reranker_fetches_when_it_may(
    kind: str, asynchronous: bool, folder: Path, encoder: ColQwen3Encoder, remote: tuple[str, list[str]], tmp_path: Path
) -> None:
    url, asked = remote
    given = [NodeWithScore(node=at(url, n, kind)) for n in range(3)]
    bundle = like(folder, 2)
    with pytest.raises(EncodeError, match="not fetched"):
        ColQwen3Reranker(encoder=encoder).postprocess_nodes(given, bundle)
    with pytest.raises(EncodeError, match="no public address"):
        ColQwen3Reranker(encoder=encoder, allow_remote=True).postprocess_nodes(given, bundle)
    assert asked == []
    reranker = ColQwen3Reranker(encoder=encoder, allow_remote=[HOST], boxes=1, heatmaps=tmp_path)
    ranked = (
        asyncio.run(reranker.apostprocess_nodes(given, bundle)) if asynchronous
        else reranker.postprocess_nodes(given, bundle)
    )  # fmt: skip
    local = ColQwen3Reranker(encoder=encoder, boxes=1).postprocess_nodes(nodes_of(folder)[:3], bundle)
    assert [node.node_id for node in ranked] == [node.node_id for node in local]
    assert [node.score for node in ranked] == pytest.approx([node.score for node in local], abs=1e-3)
    assert Path(ranked[0].metadata["heatmap"]).is_file()


def test_what_cannot_be_fetched_is_a_bad_node(encoder: ColQwen3Encoder, remote: tuple[str, list[str]]) -> None:
    url, _ = remote
    given = [NodeWithScore(node=at(url, n)) for n in (7, 0)]
    reranker = ColQwen3Reranker(encoder=encoder, allow_remote=[HOST], on_error="keep")
    assert [node.node_id for node in reranker.postprocess_nodes(given, query_str="x")] == ["page 0", "page 7"]
    with pytest.raises(EncodeError, match=r"7\.png: the server answers with status 404") as caught:
        ColQwen3Reranker(encoder=encoder, allow_remote=[HOST]).postprocess_nodes(given, query_str="x")
    assert caught.value.index == 0


def test_the_index_keeps_what_was_fetched(
    encoder: ColQwen3Encoder, folder: Path, remote: tuple[str, list[str]], tmp_path: Path
) -> None:
    url, asked = remote
    with PageIndex.open(tmp_path / "index", encoder) as index:
        with pytest.raises(EncodeError, match="not fetched"):
            ColQwen3Retriever.from_nodes([at(url, 0)], index)
        retriever = ColQwen3Retriever.from_nodes([at(url, 0)], index, allow_remote=[HOST])
        asyncio.run(retriever.aadd([at(url, 1, "Node")], allow_remote=[HOST]))
        retriever.add_documents([at(url, 2)], allow_remote=[HOST])  # type: ignore[list-item]
        assert len(asked) == 3
        found = retriever.retrieve(like(folder, 1))
        assert found[0].node_id == "page 1"
        assert isinstance(found[0].node, ImageNode)
        assert found[0].node.image_url is None
        kept = open_image(str(found[0].node.image_path))
        assert np.array_equal(np.asarray(kept), np.asarray(open_image(page_image(folder, 1))))
        assert len(asked) == 3, "searching fetches nothing"


def test_page_nodes_carry_what_was_fetched(
    encoder: ColQwen3Encoder, folder: Path, remote: tuple[str, list[str]]
) -> None:
    url, asked = remote
    with pytest.raises(EncodeError, match="not fetched"):
        PageNodes()([at(url, 0)])
    (node,) = asyncio.run(PageNodes(allow_remote=[HOST]).acall([at(url, 0)]))  # type: ignore[arg-type]
    assert isinstance(node, ImageNode)
    assert node.resolve_image().read() == (page_image(folder, 0)).read_bytes()
    assert asked == ["/0.png"]
    assert PageNodes.from_dict(PageNodes(allow_remote=(HOST,)).to_dict()).allow_remote == (HOST,)


def test_the_embedding_fetches_when_it_may(
    encoder: ColQwen3Encoder, folder: Path, remote: tuple[str, list[str]]
) -> None:
    url, _ = remote
    with pytest.raises(EncodeError, match="not fetched"):
        ColQwen3Embedding(encoder=encoder, dim=256)([at(url, 0)])
    embedding = ColQwen3Embedding(encoder=encoder, dim=256, allow_remote=[HOST])
    (here,) = embedding([ImageNode(image_path=str(page_image(folder, 0)))])
    (there,) = asyncio.run(embedding.acall([at(url, 0)]))
    assert there.embedding == pytest.approx(here.embedding, abs=1e-5)


def test_the_tool_shows_what_was_fetched(index: PageIndex, folder: Path, remote: tuple[str, list[str]]) -> None:
    url, asked = remote

    class Fixed(ColQwen3Retriever):
        def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            return [NodeWithScore(node=at(url, 1))]

    shut, opened = PageRetrieverTool(Fixed(index)), PageRetrieverTool.from_defaults(Fixed(index), allow_remote=[HOST])
    assert not [block for block in shut.call("x").blocks if isinstance(block, ImageBlock)]
    assert asked == []
    [shown] = [block for block in opened.call("x").blocks if isinstance(block, ImageBlock)]
    assert shown.resolve_image().read() == (page_image(folder, 1)).read_bytes()


def test_the_encoder_fetches_when_it_may(encoder: ColQwen3Encoder, folder: Path, remote: tuple[str, list[str]]) -> None:
    url, asked = remote
    with pytest.raises(EncodeError, match="not fetched"):
        encoder.encode_images([f"{url}/0.png"])
    assert asked == []
    [there] = encoder.encode_images([f"{url}/0.png"], allow_remote=[HOST])
    [here] = encoder.encode_images([page_image(folder, 0)])
    assert np.allclose(there.vectors, here.vectors, atol=1e-5)
    with pytest.raises(EncodeError, match="status 404") as caught:
        encoder.encode_images([page_image(folder, 0), f"{url}/9.png"], allow_remote=[HOST])
    assert caught.value.index == 1


def test_what_one_question_was_told_does_not_go_into_an_index(index: PageIndex, tmp_path: Path) -> None:
    found = ColQwen3Retriever(index, similarity_top_k=3, boxes=1, heatmaps=tmp_path / "maps").retrieve(piece(tmp_path))
    assert any(set(given.node.metadata) >= HIDDEN for given in found)
    with PageIndex.open(tmp_path / "again", index.encoder) as other:
        ColQwen3Retriever.from_nodes(found, other)
        assert len(other) == 3
        for record in other.get(other.ids()):
            assert not HIDDEN & set(record.page.metadata)
        own = TextNode(text="ours", metadata={"boxes": 3, "pooled": "yes"})
        ColQwen3Retriever.from_nodes([own], other)
        assert other.get([own.node_id])[0].page.metadata["boxes"] == 3


def test_a_reranker_leaves_nothing_of_another_question(encoder: ColQwen3Encoder, folder: Path) -> None:
    old = {"boxes": [], "heatmap": "old.png", "pooled": False, "year": 2024}
    nodes: list[BaseNode] = [ImageNode(image_path=str(page_image(folder, n)), metadata=dict(old)) for n in range(2)]
    nodes.append(TextNode(text="revenue", metadata=dict(old)))
    given = [NodeWithScore(node=node) for node in nodes]
    ranked = ColQwen3Reranker(encoder=encoder, boxes=1).postprocess_nodes(given, query_str="revenue")
    assert len(ranked) == 3
    for one in ranked:
        assert one.node.metadata["year"] == 2024
        assert HIDDEN & set(one.node.metadata) == ({"boxes", "pooled"} if isinstance(one.node, ImageNode) else set())
    assert all(node.metadata == old for node in nodes)  # as they were handed in
    plain = ColQwen3Reranker(encoder=encoder).postprocess_nodes(given, query_str="revenue")
    assert all(one.node.metadata == old for one in plain)
