"""The LlamaIndex retriever: what it finds, its arguments, filters, handles, and its async path."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.schema import ImageNode, QueryBundle, TextNode
from llama_index.core.vector_stores.types import MetadataFilters

from colqwen3_retrievers import ColQwen3Encoder, Page, PageIndex, load_pages, maxsim
from colqwen3_retrievers.errors import ConfigError, StoreError, StoreMismatchError
from colqwen3_retrievers.llama_index import ColQwen3Retriever
from tests.frameworks.page_folder import like, only, page_image, pixels

N_PICTURES = 4


@pytest.fixture(scope="module")
def index(folder: Path, encoder: ColQwen3Encoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageIndex]:
    """The images and a text; tests leave it as it is."""
    with PageIndex.open(tmp_path_factory.mktemp("retriever") / "index", encoder) as index:
        index.add(load_pages(folder / "pages"))
        index.add(Page(source="notes.txt", text="Revenue rose in 2024.", metadata={"year": 2024}))
        yield index


@pytest.mark.parametrize("seed", range(N_PICTURES))
def test_a_picture_finds_the_page_it_was_taken_of(folder: Path, index: PageIndex, seed: int) -> None:
    found = ColQwen3Retriever(index).retrieve(like(folder, seed))
    assert len(found) == 2
    assert found[0].node_id == f"{seed}.png#page=1"
    assert isinstance(found[0].node, ImageNode)
    assert found[0].node.image_path is not None
    assert np.array_equal(pixels(found[0].node.image_path), pixels(page_image(folder, seed)))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_text_ranks_every_page_by_maxsim(index: PageIndex, encoder: ColQwen3Encoder, asynchronous: bool) -> None:
    retriever = ColQwen3Retriever(index, similarity_top_k=50)
    found = asyncio.run(retriever.aretrieve("revenue")) if asynchronous else retriever.retrieve("revenue")
    records = index.get(index.ids(), vectors=True)
    scores = maxsim(encoder.encode_queries(["revenue"]), [record.multi_vector for record in records])[0]  # type: ignore[misc]
    order = np.argsort(-scores)
    assert [node.node_id for node in found] == [records[i].page.id for i in order]
    np.testing.assert_allclose([node.score for node in found], scores[order], atol=1e-3)
    assert {type(node.node) for node in found} == {ImageNode, TextNode}


def test_a_text_page_is_found_by_its_text(index: PageIndex) -> None:
    (found,) = ColQwen3Retriever(index, filters=only("source", "notes.txt")).retrieve("revenue")
    assert (type(found.node), found.text, found.metadata["year"]) == (TextNode, "Revenue rose in 2024.", 2024)


def test_what_a_node_tells_of_its_page_can_be_filtered_by(folder: Path, index: PageIndex) -> None:
    (first, _) = ColQwen3Retriever(index).retrieve(like(folder, 2))
    assert first.node_id == "2.png#page=1"
    for key, value in first.metadata.items():
        found = ColQwen3Retriever(index, similarity_top_k=9, filters=only(key, value)).retrieve("revenue")
        assert first.node_id in [node.node_id for node in found], key


def test_filters_and_where_both_hold(folder: Path, index: PageIndex) -> None:
    def sources(**arguments: Any) -> list[str]:
        found = ColQwen3Retriever(index, similarity_top_k=9, **arguments).retrieve("revenue")
        return sorted(node.metadata["source"] for node in found)

    pictures = only("file_type", "png")
    assert sources(filters=pictures) == ["0.png", "1.png", "2.png", "3.png"]
    assert sources(where={"source": {"$gte": "2"}}) == ["2.png", "3.png", "notes.txt"]
    assert sources(filters=pictures, where={"source": {"$gte": "2"}}) == ["2.png", "3.png"]
    assert sources(filters=MetadataFilters(filters=[]), where={}) == [
        "0.png", "1.png", "2.png", "3.png", "notes.txt",
    ]  # fmt: skip
    assert sources(filters=only("source", "gone.png")) == []


def test_query_transforms_are_heard(index: PageIndex) -> None:
    retriever = ColQwen3Retriever(index, similarity_top_k=9)
    plain = retriever.retrieve("an answer made up\nrevenue")
    transformed = retriever.retrieve(QueryBundle("revenue", custom_embedding_strs=["an answer made up", "revenue"]))
    assert [node.score for node in transformed] == pytest.approx([node.score for node in plain], abs=1e-3)


def test_pages_of_one_file_are_grouped(folder: Path, encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    with PageIndex.open(tmp_path / "index", encoder) as index:
        pages = [(source, number) for source in ("a", "b") for number in (1, 2, 3)]
        index.add(Page(source=source, number=number, text=f"{source} {number}") for source, number in pages)
        found = ColQwen3Retriever(index, similarity_top_k=9, group_by="source").retrieve("revenue")
        assert sorted(node.metadata["source"] for node in found) == ["a", "b"]


def test_an_empty_index_gives_nothing(encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    with PageIndex.open(tmp_path / "index", encoder) as index:
        assert ColQwen3Retriever(index).retrieve("revenue") == []
        assert asyncio.run(ColQwen3Retriever(index).aretrieve("revenue")) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"similarity_top_k": 0}, "similarity_top_k"),
        ({"similarity_top_k": True}, "similarity_top_k"),
        ({"filters": {"year": 2020}}, "filters"),
        ({"where": {"year": {"$above": 2020}}}, "where"),
        ({"group_by": "year"}, "group_by"),
        ({"encoder": ColQwen3Encoder("tiny")}, "encoder"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(index: PageIndex, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}: "):
        ColQwen3Retriever(index, **arguments)


def test_what_is_no_index_is_refused(folder: Path, index: PageIndex, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="index: expected a PageIndex or a location, got int"):
        ColQwen3Retriever(3)  # type: ignore[arg-type]
    with pytest.raises(StoreError):
        ColQwen3Retriever(tmp_path / "nothing here")
    with pytest.raises(StoreMismatchError):
        ColQwen3Retriever(index.location, encoder=ColQwen3Encoder(folder / "other", device="cpu"))


def test_top_k_may_change(index: PageIndex) -> None:
    retriever = ColQwen3Retriever(index)
    retriever.similarity_top_k = 3
    assert len(retriever.retrieve("revenue")) == 3
    with pytest.raises(ConfigError):
        retriever.similarity_top_k = 0


@pytest.mark.parametrize("with_encoder", [False, True])
def test_a_location_is_opened_beside_the_writer_and_closed(
    folder: Path, index: PageIndex, encoder: ColQwen3Encoder, with_encoder: bool
) -> None:
    by_location = ColQwen3Retriever(index.location, encoder=encoder if with_encoder else None)
    expected = [node.node_id for node in ColQwen3Retriever(index).retrieve(like(folder, 2))]
    assert [node.node_id for node in by_location.retrieve(like(folder, 2))] == expected
    assert by_location.index.store.read_only
    by_location.close()
    with pytest.raises(StoreError, match="closed"):
        by_location.retrieve("revenue")


def test_closing_leaves_an_index_that_was_handed_in_open(index: PageIndex) -> None:
    retriever = ColQwen3Retriever(index)
    retriever.close()
    assert retriever.retrieve("revenue")
    assert repr(retriever) == f"ColQwen3Retriever({index.location!r}, similarity_top_k=2)"


def test_inline_images_need_no_file(folder: Path, index: PageIndex) -> None:
    node = ColQwen3Retriever(index, inline_images=True).retrieve(like(folder, 1))[0].node
    assert isinstance(node, ImageNode)
    blocks = node.get_content_blocks()
    assert node.image is not None
    assert blocks
