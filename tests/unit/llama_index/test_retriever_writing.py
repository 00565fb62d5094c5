"""Adding to the LlamaIndex retriever, deleting and persisting: what goes in comes out whole."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import pickle
import shutil
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.base.llms.types import ImageBlock, TextBlock
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageDocument,
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeRelationship,
    NodeWithScore,
    ObjectType,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores.types import FilterOperator

from colqwen3_retrievers import ColQwen3Encoder, Page, PageIndex, load_pages
from colqwen3_retrievers.errors import ConfigError, EncodeError, StoreError
from colqwen3_retrievers.llama_index import ColQwen3Reranker, ColQwen3Retriever, PageReader
from tests.frameworks.page_folder import base64_of, only, page_image, pixels

N_PICTURES = 4
RICH: dict[str, Any] = {
    "metadata": {"year": 2024, "tags": ["tax"], "author": {"name": "Ada"}, "source": "web", "id": 5, "page": 7,
                 "é": None},
    "excluded_embed_metadata_keys": ["year", "id"],
    "excluded_llm_metadata_keys": ["tags"],
    "relationships": {
        NodeRelationship.SOURCE: RelatedNodeInfo(
            node_id="doc", node_type=ObjectType.DOCUMENT, metadata={"x": 1}, hash="h"
        ),
        NodeRelationship.PREVIOUS: RelatedNodeInfo(node_id="before"),
        NodeRelationship.CHILD: [RelatedNodeInfo(node_id="c1"), RelatedNodeInfo(node_id="c2")],
    },
    "metadata_template": "{key} = {value}",
    "metadata_separator": " | ",
    "text_template": "[{metadata_str}] {content}",
}  # fmt: skip
KEPT = (
    "excluded_embed_metadata_keys", "excluded_llm_metadata_keys", "relationships", "metadata_template",
    "metadata_separator", "text_template",
)  # fmt: skip


def all_of(index: PageIndex, **how: Any) -> dict[str, BaseNode]:
    found = ColQwen3Retriever(index, similarity_top_k=50, **how).retrieve("revenue")
    return {node.node_id: node.node for node in found}


# -- what goes in comes out -------------------------------------------------------------------------------------------

NODES: dict[str, Any] = {
    "ImageNode, path": lambda path: ImageNode(id_="n", text="Revenue rose.", image_path=str(path), **RICH),
    "ImageNode, base64": lambda path: ImageNode(id_="n", text="Revenue rose.", image=base64_of(path), **RICH),
    "Node": lambda path: Node(
        id_="n", text_resource=MediaResource(text="Revenue rose."), image_resource=MediaResource(path=path), **RICH
    ),
    "ImageDocument": lambda path: ImageDocument(id_="n", text="Revenue rose.", image_path=str(path), **RICH),
    "TextNode": lambda _: TextNode(id_="n", text="Revenue rose.", start_char_idx=3, end_char_idx=9, **RICH),
    "TextNode, spaces": lambda _: TextNode(id_="n", text="  Revenue rose.\n", **RICH),
    "Document": lambda _: Document(id_="n", text="Revenue rose.", **RICH),
    "IndexNode": lambda _: IndexNode(id_="n", text="Revenue rose.", index_id="other", **RICH),
}


@pytest.mark.parametrize("kind", NODES)
def test_metadata_relationships_and_templates_survive_whole(kind: str, folder: Path, index: PageIndex) -> None:
    node = NODES[kind](page_image(folder))
    ColQwen3Retriever.from_nodes([node], index)
    back = all_of(index)["n"]
    pictured = "Image" in kind or kind == "Node"
    assert type(back) is (ImageNode if pictured else IndexNode if kind == "IndexNode" else TextNode)
    assert back.metadata == {**RICH["metadata"], "page_id": "n"}
    for name in KEPT[2:]:
        assert getattr(back, name) == getattr(node, name), name
    assert set(back.excluded_embed_metadata_keys) == {"year", "id", "page_id"}
    assert back.excluded_llm_metadata_keys == ["tags", "page_id"]
    assert back.ref_doc_id == "doc"
    assert back.get_content(MetadataMode.NONE) == (f"n\n\n{node.get_content()}" if pictured else node.get_content())
    for mode in (MetadataMode.EMBED, MetadataMode.LLM):
        assert back.get_metadata_str(mode) == node.get_metadata_str(mode)
    if kind == "IndexNode":
        assert back.index_id == "other"  # type: ignore[attr-defined]
    if isinstance(node, TextNode) and isinstance(back, TextNode):
        assert (back.start_char_idx, back.end_char_idx) == (node.start_char_idx, node.end_char_idx)
    if isinstance(back, ImageNode):
        assert back.image_path is not None
        assert np.array_equal(pixels(back.image_path), pixels(page_image(folder)))


def test_nodes_survive_reopening(folder: Path, encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    nodes = [make(page_image(folder)).model_copy(update={"id_": kind}) for kind, make in NODES.items()]
    with PageIndex.open(tmp_path / "index", encoder) as index:
        ColQwen3Retriever.from_nodes(nodes, index)
        before = {key: node.to_dict() for key, node in all_of(index).items()}
    with PageIndex.open(tmp_path / "index", encoder) as index:
        assert {key: node.to_dict() for key, node in all_of(index).items()} == before


def test_what_is_given_is_never_changed(folder: Path, index: PageIndex) -> None:
    nodes = [make(page_image(folder)).model_copy(update={"id_": kind}) for kind, make in NODES.items()]
    before = [node.to_dict() for node in nodes]
    ColQwen3Retriever.from_nodes(nodes, index)
    assert [node.to_dict() for node in nodes] == before


@pytest.mark.parametrize("kind", NODES)
def test_the_reranker_scores_a_node_as_the_index_does(
    kind: str, folder: Path, index: PageIndex, encoder: ColQwen3Encoder
) -> None:
    node = NODES[kind](page_image(folder))
    (found,) = ColQwen3Retriever.from_nodes([node], index).retrieve("what was the revenue?")
    for candidate in (found.node, node):
        (ranked,) = ColQwen3Reranker(encoder=encoder).postprocess_nodes(
            [NodeWithScore(node=candidate)], query_str="what was the revenue?"
        )
        assert ranked.score == pytest.approx(found.score, abs=1e-3)


def test_dates_come_back_as_text_that_filters_compare(
    index: PageIndex, encoder: ColQwen3Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moment = datetime(2024, 5, 18, 9, 30, tzinfo=UTC)
    nodes = [
        TextNode(id_="day", text="x", metadata={"day": date(2024, 5, 17), "more": {"days": [date(2024, 5, 17)]}}),
        TextNode(id_="moment", text="y", metadata={"day": moment}),
    ]
    retriever = ColQwen3Retriever.from_nodes(nodes, index)
    assert nodes[1].metadata["day"] is moment, "what is given is never changed"
    back = all_of(index)
    assert back["day"].metadata == {"page_id": "day", "day": "2024-05-17", "more": {"days": ["2024-05-17"]}}
    assert back["moment"].metadata["day"] == "2024-05-18T09:30:00+00:00"
    assert set(all_of(index, filters=only("day", "2024-05-18", FilterOperator.GTE))) == {"moment"}
    assert set(all_of(index, filters=only("day", "2024-05-18T11:30:00+02:00"))) == {"moment"}
    since = ColQwen3Retriever(index, where={"day": {"$gte": date(2024, 5, 18)}})
    assert [node.node_id for node in since.retrieve("x")] == ["moment"]
    since.persist(tmp_path)
    assert [node.node_id for node in ColQwen3Retriever.from_persist_dir(tmp_path).retrieve("x")] == ["moment"]
    (found,) = ColQwen3Retriever(index, where={"page_id": "moment"}).retrieve("revenue")
    (ranked,) = ColQwen3Reranker(encoder=encoder).postprocess_nodes([found], query_str="revenue")
    assert ranked.score == pytest.approx(found.score, abs=1e-3)
    encoded = encoder.stats.inputs
    retriever.add(nodes)
    assert encoder.stats.inputs == encoded, "the same again costs nothing"
    with pytest.raises(EncodeError, match=r"input 0: node 'n': metadata must be JSON.*'where': a bytes"):
        retriever.add([TextNode(id_="n", text="x", metadata={"day": moment, "where": b"x"})])
    caplog.clear()
    assert retriever.delete_ref_doc("nobody") == 0
    assert caplog.messages == [], "names of ours in a filter are not misspelt"


def test_nodes_from_the_index_can_be_added_again(folder: Path, index: PageIndex) -> None:
    index.add(load_pages(folder / "pages"))
    nodes = all_of(index)
    assert ColQwen3Retriever(index).add(list(nodes.values())) == list(nodes)
    again = all_of(index)
    assert {key: node.to_dict() for key, node in again.items()} == {key: node.to_dict() for key, node in nodes.items()}


def test_a_picture_always_travels_with_a_name_to_cite(folder: Path, index: PageIndex) -> None:
    ColQwen3Retriever.from_nodes(
        [
            ImageNode(id_="bare", image_path=str(page_image(folder, 0))),
            ImageNode(id_="dated", image_path=str(page_image(folder, 1)), metadata={"year": 2024}),
            ImageNode(id_="named", image_path=str(page_image(folder, 2)), metadata={"file_name": "a.png"}),
        ],
        index,
    )
    told = {}
    for key, node in all_of(index).items():
        blocks = node.get_content_blocks(MetadataMode.LLM)
        assert [type(block) for block in blocks] == [TextBlock, ImageBlock]
        told[key] = sorted(blocks[0].text.splitlines())  # type: ignore[attr-defined]
    assert told == {"bare": ["page_id: bare"], "dated": ["page_id: dated", "year: 2024"], "named": ["file_name: a.png"]}


def test_technical_keys_stay_out_of_texts(index: PageIndex) -> None:
    ColQwen3Retriever.from_nodes([TextNode(id_="n", text="Revenue rose.", metadata={"year": 2024})], index)
    node = all_of(index)["n"]
    for mode in (MetadataMode.EMBED, MetadataMode.LLM):
        assert node.get_content(mode) == "year: 2024\n\nRevenue rose."
    assert "_llama_index" not in node.to_json()


# -- finding what was added -------------------------------------------------------------------------------------------


def test_metadata_of_nodes_can_be_filtered_by(folder: Path, index: PageIndex) -> None:
    ColQwen3Retriever.from_nodes(
        [
            ImageNode(id_="a", image_path=str(page_image(folder)), metadata={"year": 2024, "tags": ["tax"], "page": 7}),
            TextNode(id_="b", text="Revenue rose.", metadata={"year": 2020, "page": "8", "page_label": "viii"}),
            TextNode(id_="c", text="Costs fell.", metadata={"author": {"name": "Ada"}}),
        ],
        index,
    )
    assert set(all_of(index, filters=only("year", 2020, FilterOperator.GT))) == {"a"}
    assert set(all_of(index, filters=only("tags", "tax", FilterOperator.CONTAINS))) == {"a"}
    assert set(all_of(index, filters=only("author.name", "Ada"))) == {"c"}
    assert set(all_of(index, filters=only("page", 7, FilterOperator.GTE))) == {"a", "b"}
    assert set(all_of(index, filters=only("page_label", "viii"))) == {"b"}
    assert set(all_of(index, where={"page": 7})) == {"a"}, "where speaks of nodes too"


def test_nodes_of_one_document_are_grouped_and_have_neighbours(index: PageIndex) -> None:
    def relation(document: str) -> dict[NodeRelationship, RelatedNodeInfo]:
        return {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=document)}

    texts = {"a": ["one", "two", "three", "four"], "b": ["five", "six"]}
    nodes = [
        TextNode(id_=f"{document}{i}", text=text, relationships=relation(document))
        for document, parts in texts.items()
        for i, text in enumerate(parts)
    ]
    retriever = ColQwen3Retriever.from_nodes(nodes, index)
    assert sorted(node.ref_doc_id for node in all_of(index, group_by="source").values()) == ["a", "b"]
    best = retriever.retrieve("three")[0].node_id
    found = ColQwen3Retriever(index, similarity_top_k=1, window=1).retrieve("three")
    document, place = best[0], int(best[1])
    beside = [f"{document}{i}" for i in (place - 1, place + 1) if 0 <= i < len(texts[document])]
    assert [node.node_id for node in found] == [best, *beside]
    scores = {hit.page.id: hit.score for hit in index.search("three", k=len(index), exact=True)}
    assert [(type(node.score), node.score) for node in found] == [
        (float, pytest.approx(scores[node.node_id], abs=1e-4)) for node in found
    ]


def test_neighbours_stand_once_and_hits_keep_their_place(folder: Path, index: PageIndex) -> None:
    index.add(Page(source="a.pdf", number=number, text=f"page {number}") for number in range(1, 6))
    ranked = [node.node_id for node in ColQwen3Retriever(index, similarity_top_k=2).retrieve("page")]
    found = ColQwen3Retriever(index, similarity_top_k=2, window=2).retrieve("page")
    ids = [node.node_id for node in found]
    assert len(set(ids)) == len(ids)
    assert [node_id for node_id in ids if node_id in ranked] == ranked
    assert [node.node_id for node in asyncio.run(
        ColQwen3Retriever(index, similarity_top_k=2, window=2).aretrieve("page"))] == ids  # fmt: skip


@pytest.mark.parametrize("window", [-1, True, 1.0])
def test_a_bad_window_is_named(index: PageIndex, window: Any) -> None:
    with pytest.raises(ConfigError, match=r"^window: "):
        ColQwen3Retriever(index, window=window)


# -- documents --------------------------------------------------------------------------------------------------------


def test_documents_with_pictures_stay_whole_and_texts_are_split(folder: Path, index: PageIndex) -> None:
    long = " ".join(f"Sentence {i} tells of the revenue." for i in range(60))
    documents = [
        ImageDocument(id_="picture", text=long, image_path=str(page_image(folder))),
        Document(id_="text", text=long, metadata={"file_name": "a.txt"}),
    ]
    splitter = SentenceSplitter(chunk_size=64, chunk_overlap=0)
    retriever = ColQwen3Retriever.from_documents(documents, index, transformations=[splitter])
    nodes = all_of(index)
    pieces = [node for node in nodes.values() if node.ref_doc_id == "text"]
    assert len(pieces) == len(nodes) - 1 > 2
    assert isinstance(nodes["picture"], ImageNode)
    assert all(node.metadata["file_name"] == "a.txt" for node in pieces)
    linked = sorted((node for node in pieces if node.next_node is not None), key=lambda node: node.node_id)
    assert all(node.next_node is not None and node.next_node.node_id in nodes for node in linked)
    assert retriever.delete_ref_doc("text") == len(pieces)
    assert set(all_of(index)) == {"picture"}
    assert retriever.delete_ref_doc("picture") == 1


def test_documents_take_the_transformations_of_the_settings(index: PageIndex) -> None:
    ColQwen3Retriever.from_documents([Document(id_="d", text="Revenue rose.")], index)
    (node,) = all_of(index).values()
    assert (node.ref_doc_id, node.node_id == "d") == ("d", False)


def test_documents_added_again_take_their_own_place(index: PageIndex, encoder: ColQwen3Encoder) -> None:
    long = [f"Sentence {i} tells of the revenue." for i in range(40)]
    steps = [SentenceSplitter(chunk_size=64, chunk_overlap=0)]

    def text(*sentences: str) -> Document:
        return Document(id_="d", text=" ".join(sentences), metadata={"file_name": "a.txt"})

    retriever = ColQwen3Retriever.from_documents([text(*long), Document(id_="other", text="x")], index)
    added = retriever.add_documents([text(*long)], transformations=steps)
    pieces = len(added)
    assert added == [f"d#text={i}" for i in range(1, pieces + 1)]
    assert pieces > 2
    assert set(index.ids()) == {"other#text=1", *added}, "what another splitter made of it is gone"
    encoded = encoder.stats.inputs
    assert retriever.add_documents([text(*long)], transformations=steps) == added
    assert encoder.stats.inputs == encoded, "the same again costs nothing"
    changed = [*long[:-1], "Costs fell."]
    assert retriever.add_documents([text(*changed)], transformations=steps) == added
    assert encoder.stats.inputs == encoded + 1, "only the piece that changed"
    assert "Costs fell." in all_of(index)[added[-1]].get_content()
    assert retriever.add_documents([text(long[0])], transformations=steps) == ["d#text=1"]
    assert set(index.ids()) == {"other#text=1", "d#text=1"}
    assert retriever.add_documents([text(long[0])], transformations=[]) == ["d"]
    assert set(index.ids()) == {"other#text=1", "d"}


def test_a_piece_that_cannot_be_encoded_leaves_the_earlier_one(index: PageIndex) -> None:
    def whole(*texts: str) -> list[Document]:
        return [Document(id_=str(i), text=text) for i, text in enumerate(texts)]

    retriever = ColQwen3Retriever.from_documents(whole("Revenue rose.", "Costs fell."), index, transformations=[])
    too_long = whole("revenue " * 100_000, "Costs rose.")
    assert retriever.add_documents(too_long, transformations=[], on_error="skip") == ["1"]
    assert {key: node.get_content() for key, node in all_of(index).items()} == {
        "0": "Revenue rose.", "1": "Costs rose.",
    }  # fmt: skip
    with pytest.raises(EncodeError, match="tokens"):
        retriever.add_documents(too_long, transformations=[])
    assert set(index.ids()) == {"0", "1"}


def test_ids_that_someone_chose_stay(index: PageIndex) -> None:
    splitter = SentenceSplitter(chunk_size=64, chunk_overlap=0, id_func=lambda i, document: f"{document.node_id}/{i}")
    long = " ".join(f"Sentence {i} tells of the revenue." for i in range(40))
    retriever = ColQwen3Retriever(index)
    for _ in range(2):
        added = retriever.add_documents([Document(id_="d", text=long)], transformations=[splitter])
        assert added == [f"d/{i}" for i in range(len(added))]
        assert sorted(index.ids()) == sorted(added)


def test_pages_of_a_reader_go_by_document_and_by_page_image(folder: Path, index: PageIndex) -> None:
    documents = PageReader().load_data(folder / "pages")
    for _ in range(2):
        retriever = ColQwen3Retriever.from_documents(documents, index)
    assert {key: node.ref_doc_id for key, node in all_of(index).items()} == {
        document.id_: document.id_ for document in documents
    }
    assert retriever.delete_ref_doc("0.png") == 1
    assert retriever.delete_ref_doc("1.png#page=1") == 1
    assert index.ids() == ["2.png#page=1", "3.png#page=1"]


def test_documents_may_stay_whole(index: PageIndex) -> None:
    retriever = ColQwen3Retriever.from_documents([Document(id_="d", text="Revenue rose.")], index, transformations=[])
    assert set(all_of(index)) == {"d"}
    assert retriever.delete_ref_doc("d") == 1


# -- changing what is there -------------------------------------------------------------------------------------------


def test_a_node_takes_the_place_of_the_one_with_its_id(index: PageIndex, encoder: ColQwen3Encoder) -> None:
    retriever = ColQwen3Retriever.from_nodes([TextNode(id_="n", text="Revenue rose.")], index)
    encoded = encoder.stats.inputs
    assert retriever.add([TextNode(id_="n", text="Revenue rose.", metadata={})]) == ["n"]
    assert encoder.stats.inputs == encoded, "the same again costs nothing"
    retriever.add([TextNode(id_="n", text="Revenue rose.", excluded_llm_metadata_keys=["x"])])
    assert encoder.stats.inputs == encoded, "nor does what is not encoded"
    assert all_of(index)["n"].excluded_llm_metadata_keys == ["x", "page_id"]
    retriever.add([TextNode(id_="n", text="Revenue fell.")])
    assert [node.get_content() for node in all_of(index).values()] == ["Revenue fell."]


def test_deleting(folder: Path, index: PageIndex) -> None:
    index.add(load_pages(folder / "pages"))
    index.add(Page(source="b.pdf", number=number, text=f"page {number}") for number in (1, 2))
    retriever = ColQwen3Retriever.from_nodes([TextNode(id_="n", text="x"), TextNode(id_="m", text="y")], index)
    assert retriever.delete(["n", "unknown"]) == 1
    assert retriever.delete_ref_doc("b.pdf") == 2
    assert retriever.delete_ref_doc("unknown") == 0
    assert set(all_of(index)) == {"m", *(f"{seed}.png#page=1" for seed in range(N_PICTURES))}
    for wrong in ("", None):
        with pytest.raises(ConfigError, match="ref_doc_id"):
            retriever.delete_ref_doc(wrong)  # type: ignore[arg-type]


def test_a_source_named_like_a_document_is_not_deleted_with_it(index: PageIndex) -> None:
    of_doc = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="doc")}
    retriever = ColQwen3Retriever.from_nodes(
        [TextNode(id_="a", text="x", metadata={"source": "doc"}), TextNode(id_="b", text="y", relationships=of_doc)],
        index,
    )
    assert retriever.delete_ref_doc("doc") == 1
    assert set(all_of(index)) == {"a"}


def test_the_async_twins_do_the_same(folder: Path, index: PageIndex) -> None:
    async def run() -> list[Any]:
        retriever = ColQwen3Retriever(index)
        added = await retriever.aadd([TextNode(id_=name, text=name, metadata={"source": name}) for name in "abc"])
        return [added, await retriever.adelete(["a"]), await retriever.adelete_ref_doc("b"), len(index)]

    assert asyncio.run(run()) == [["a", "b", "c"], 1, 1, 1]


# -- faults -----------------------------------------------------------------------------------------------------------


def bad_nodes(folder: Path) -> list[BaseNode]:
    good = [TextNode(id_=f"good {i}", text=f"Revenue rose {i} %.") for i in range(5)]
    broken = folder / "broken.png"
    broken.write_bytes(b"no picture")
    return [
        good[0],
        ImageNode(id_="broken file", image_path=str(broken)),
        good[1],
        ImageNode(id_="remote", image_url="https://example.org/a.png"),
        TextNode(id_="empty", text=" "),
        good[2],
        ImageNode(id_="no base64", image="???"),
        good[3],
        TextNode(id_="no json", text="x", metadata={"when": object()}),
        good[4],
        TextNode(id_="too long", text="revenue " * 100_000),
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_bad_nodes_are_skipped_with_a_warning(
    folder: Path, index: PageIndex, batch_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    retriever = ColQwen3Retriever(index)
    with caplog.at_level(logging.WARNING, logger="colqwen3_retrievers"):
        done = retriever.add(bad_nodes(folder), on_error="skip", batch_size=batch_size)
    assert done == [f"good {i}" for i in range(5)]
    assert sorted(index.ids()) == done
    said = " ".join(record.getMessage() for record in caplog.records)
    for name in ("broken file", "remote", "empty", "no base64", "no json", "too long"):
        assert f"{name!r} is skipped" in said


@pytest.mark.parametrize(
    ("position", "said"),
    [(1, "not an image"), (3, "not fetched"), (4, "empty"), (6, "not base64"), (8, "JSON"), (10, "tokens")],
)
def test_a_bad_node_raises_and_is_named(folder: Path, index: PageIndex, position: int, said: str) -> None:
    bad = bad_nodes(folder)[position]
    with pytest.raises(EncodeError, match=said) as caught:
        ColQwen3Retriever(index).add([TextNode(id_="good", text="x"), bad])
    assert caught.value.index == 1
    assert bad.node_id in str(caught.value)


def test_what_came_before_a_bad_node_is_kept(folder: Path, index: PageIndex) -> None:
    good = [TextNode(id_=str(i), text=f"Revenue {i}") for i in range(3)]
    with pytest.raises(EncodeError, match=r"^node 'bad': ") as caught:
        ColQwen3Retriever(index).add([*good, ImageNode(id_="bad", image="???")], batch_size=2)
    assert caught.value.index == 3
    assert sorted(index.ids()) == ["0", "1", "2"]


@pytest.mark.parametrize("nodes", ["text", TextNode(text="x"), 3, [1], ["text"]])
def test_what_is_no_node_is_refused(index: PageIndex, nodes: Any) -> None:
    with pytest.raises(ConfigError, match=r"^nodes: expected"):
        ColQwen3Retriever(index).add(nodes)


def test_other_bad_arguments_are_named(index: PageIndex) -> None:
    retriever = ColQwen3Retriever(index)
    with pytest.raises(ConfigError, match=r"^on_error: "):
        retriever.add([], on_error="keep")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^documents: "):
        retriever.add_documents(["x"])  # type: ignore[list-item]
    with pytest.raises(EncodeError, match=r"input 0: .*_llama_index"):
        retriever.add([TextNode(text="x", metadata={"_llama_index": 1})])
    with pytest.raises(ConfigError, match="'n'"):
        retriever.add([TextNode(id_="n", text="x"), TextNode(id_="n", text="y")])
    assert retriever.add([]) == []


def test_an_index_opened_by_location_takes_nothing(index: PageIndex) -> None:
    retriever = ColQwen3Retriever(index.location)
    for write in (lambda: retriever.add([TextNode(text="x")]), lambda: retriever.delete(["x"])):
        with pytest.raises(StoreError, match="read_only"):
            write()
    retriever.close()


def test_a_failure_leaves_no_index_open(folder: Path, encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    for _ in range(2):  # a second writer would be refused, were the first one left open
        with pytest.raises(EncodeError):
            ColQwen3Retriever.from_nodes([TextNode(text=" ")], tmp_path / "index", encoder=encoder)
        with pytest.raises(ConfigError, match="similarity_top_k"):
            ColQwen3Retriever.from_nodes([], tmp_path / "index", encoder=encoder, similarity_top_k=0)


# -- persisting -------------------------------------------------------------------------------------------------------


def test_a_retriever_is_persisted_and_its_folder_may_move(
    folder: Path, encoder: ColQwen3Encoder, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    made = ColQwen3Retriever.from_nodes(
        [
            ImageNode(id_=str(seed), image_path=str(page_image(folder, seed)), metadata={"seed": seed})
            for seed in range(3)
        ],
        storage / "index", encoder=encoder, similarity_top_k=5, filters=only("seed", 2, FilterOperator.LT), window=1,
    )  # fmt: skip
    expected = [node.to_dict() for node in made.retrieve("revenue")]
    assert len(expected) == 2
    written = made.persist(storage)
    made.close()
    assert written.is_file()
    assert json.loads(written.read_text())["index"] == "index"
    moved = shutil.move(storage, tmp_path / "moved")
    again = ColQwen3Retriever.from_persist_dir(moved)
    got = [node.to_dict() for node in again.retrieve("revenue")]
    for node in (*got, *expected):
        node["node"]["image_path"] = None  # it lies where the folder now is
    assert [node["score"] for node in got] == pytest.approx([node["score"] for node in expected], abs=1e-3)
    assert [node["node"] for node in got] == [node["node"] for node in expected]
    again.close()
    writer = ColQwen3Retriever.from_persist_dir(moved, encoder=encoder, read_only=False)
    assert writer.add([TextNode(id_="more", text="x")]) == ["more"]
    writer.close()
    with pytest.raises(StoreError, match="closed"):
        writer.retrieve("x")


@pytest.mark.parametrize("written", [None, "", "[]", '{"format": 2, "index": "x"}', '{"format": 1}', "{nonsense"])
def test_what_is_no_persisted_retriever_is_told(tmp_path: Path, written: str | None) -> None:
    if written is not None:
        (tmp_path / "llama_index_retriever.json").write_text(written)
    with pytest.raises(StoreError, match=r"llama_index_retriever\.json"):
        ColQwen3Retriever.from_persist_dir(tmp_path)


def test_persisted_settings_that_are_unknown_are_told(index: PageIndex, tmp_path: Path) -> None:
    ColQwen3Retriever(index).persist(tmp_path)
    path = tmp_path / "llama_index_retriever.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "surprise": 1}))
    with pytest.raises(StoreError, match="surprise"):
        ColQwen3Retriever.from_persist_dir(tmp_path)


def test_images_of_an_index_may_lie_elsewhere(folder: Path, encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    elsewhere = tmp_path / "storage" / "pictures"
    nodes = [ImageNode(id_="n", image_path=str(page_image(folder)))]
    made = ColQwen3Retriever.from_nodes(nodes, tmp_path / "storage" / "index", encoder=encoder, images_dir=elsewhere)
    made.close()
    location = str(tmp_path / "storage" / "index")
    blind = ColQwen3Retriever(location, encoder=encoder)
    assert type(blind.retrieve("revenue")[0].node) is TextNode
    blind.close()
    seeing = ColQwen3Retriever(location, encoder=encoder, images_dir=elsewhere)
    (found,) = seeing.retrieve("revenue")
    assert isinstance(found.node, ImageNode)
    assert Path(str(found.node.image_path)).is_relative_to(elsewhere)
    for copied in (pickle.loads(pickle.dumps(seeing)), copy.deepcopy(seeing)):
        assert copied.retrieve("revenue")[0].node.image_path == found.node.image_path
        copied.persist(tmp_path / "storage")
    moved = shutil.move(tmp_path / "storage", tmp_path / "moved")
    again = ColQwen3Retriever.from_persist_dir(moved)
    assert Path(again.retrieve("revenue")[0].node.image_path).is_relative_to(tmp_path / "moved" / "pictures")  # type: ignore[attr-defined]
    other = ColQwen3Retriever.from_persist_dir(moved, images_dir=tmp_path / "nowhere")
    assert type(other.retrieve("revenue")[0].node) is TextNode
    for retriever in (seeing, again, other):
        retriever.close()
    reranker = ColQwen3Reranker(
        index=tmp_path / "moved" / "index", images_dir=tmp_path / "moved" / "pictures", encoder=encoder,
        heatmaps=tmp_path / "heat",
    )  # fmt: skip
    for made_again in (reranker, pickle.loads(pickle.dumps(reranker))):
        given = NodeWithScore(node=found.node.model_copy(update={"image_path": None, "text": "n"}))
        (ranked,) = made_again.postprocess_nodes([given], query_str="revenue")
        assert Path(ranked.node.metadata["heatmap"]).is_file(), "the picture is the index's"
        made_again.close()


def test_where_images_lie_belongs_to_an_index_that_is_opened(index: PageIndex, tmp_path: Path) -> None:
    for wrong in (
        lambda: ColQwen3Retriever(index, images_dir=tmp_path),
        lambda: ColQwen3Retriever.from_nodes([], index, images_dir=tmp_path),
        lambda: ColQwen3Reranker(index=index, images_dir=tmp_path),
        lambda: ColQwen3Reranker(images_dir=tmp_path),
    ):
        with pytest.raises(ConfigError, match=r"^images_dir: "):
            wrong()


def test_the_address_of_an_index_survives_serialisation() -> None:
    reranker = ColQwen3Reranker("tiny", index="qdrant://host:6333/pages", images_dir="pictures")
    again = ColQwen3Reranker.from_dict(reranker.to_dict())
    assert (again.index, again.images_dir) == ("qdrant://host:6333/pages", "pictures")


def test_an_index_node_leads_on_to_what_it_refers_to(index: PageIndex) -> None:
    behind = TextNode(id_="behind", text="The answer.")
    retriever = ColQwen3Retriever.from_nodes([IndexNode(id_="i", text="Ask there.", index_id="x", obj=behind)], index)
    assert [node.node_id for node in retriever.retrieve(QueryBundle("answer"))] == ["behind"]
    assert [node.node_id for node in ColQwen3Retriever(index).retrieve("answer")] == ["i"]
