from __future__ import annotations

import asyncio
import base64
import copy
import io
import json
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, Page, PageIndex, Query
from colqwen3_retrievers.cache.page_cache import PageEmbeddingCache
from colqwen3_retrievers.errors import CheckpointError, ConfigError, EncodeError, StoreMismatchError
from colqwen3_retrievers.vectors.late_interaction import relevance
from tests.checkpoints import make_checkpoint

pytest.importorskip("langchain_core")
from langchain_core.documents import Document
from pydantic import ValidationError

from colqwen3_retrievers.langchain import ColQwen3Reranker, ColQwen3Retriever
from colqwen3_retrievers.langchain.documents import page_to_document

QUESTION = "what was the revenue in 2024?"


def picture(seed: int) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((256, 256), Image.Resampling.NEAREST)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ColQwen3Encoder]:
    folder = make_checkpoint(tmp_path_factory.mktemp("models") / "tomoro", "tomoro").folder
    with ColQwen3Encoder(folder, device="cpu") as encoder:
        yield encoder


@pytest.fixture(scope="module")
def pages(encoder: ColQwen3Encoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageIndex]:
    with PageIndex.open(tmp_path_factory.mktemp("index") / "pages", encoder) as made:
        made.add(Page(source="a.pdf", number=n, image=picture(n), text=f"Text {n}.") for n in range(1, 6))
        yield made


@pytest.fixture
def files(tmp_path: Path) -> list[Document]:
    """Five foreign documents with image files, out of order."""
    for n in range(1, 6):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    return [
        Document("", id=str(n), metadata={"image_path": str(tmp_path / f"{n}.png"), "n": n}) for n in (3, 1, 5, 2, 4)
    ]


def reranker(encoder: ColQwen3Encoder, **options: Any) -> ColQwen3Reranker:
    return ColQwen3Reranker(encoder=encoder, **{"top_n": None, **options})


def ways(tool: ColQwen3Reranker, documents: list[Document], query: Any) -> list[list[Document]]:
    """The same question by every way in."""
    step = tool.as_runnable()
    inputs = {"documents": documents, "query": query}
    return [
        tool.compress_documents(documents, query),
        asyncio.run(tool.acompress_documents(documents, query)),
        step.invoke(inputs),
        asyncio.run(step.ainvoke(inputs)),
        step.batch([inputs, inputs])[1],
    ]


# -- order and scores --------------------------------------------------------------------------------------------------


def test_every_way_in_gives_the_order_of_maxsim(encoder: ColQwen3Encoder, files: list[Document]) -> None:
    query = encoder.encode_queries([QUESTION])
    sums = encoder.score(query, encoder.encode_images([document.metadata["image_path"] for document in files]))[0]
    wanted = [files[place] for place in np.argsort(-sums, kind="stable")]
    scores = [relevance(total, len(query[0])) for total in sorted(sums.tolist(), reverse=True)]
    assert len(set(scores)) == 5
    for ranked in ways(reranker(encoder), files, QUESTION):
        assert [document.id for document in ranked] == [document.id for document in wanted]
        found = [document.metadata["relevance_score"] for document in ranked]
        assert found == pytest.approx(scores, abs=1e-5)
        assert all(type(score) is float and 0 <= score <= 1 for score in found)


def test_an_image_finds_its_own_page(encoder: ColQwen3Encoder, files: list[Document]) -> None:
    for ranked in ways(reranker(encoder, top_n=1), files, Query(image=picture(2))):
        assert [document.id for document in ranked] == ["2"]
        assert ranked[0].metadata["relevance_score"] == pytest.approx(1.0, abs=1e-5)


def test_top_n_is_three_unless_said(encoder: ColQwen3Encoder, files: list[Document]) -> None:
    assert len(ColQwen3Reranker(encoder=encoder).compress_documents(files, QUESTION)) == 3
    assert len(reranker(encoder, top_n=9).compress_documents(files, QUESTION)) == 5


def test_images_and_texts_are_scored_together(encoder: ColQwen3Encoder, files: list[Document]) -> None:
    texts = [Document("the revenue was 7"), Document("nothing", metadata={"n": 1})]
    expected = encoder.score(
        encoder.encode_queries([QUESTION]),
        encoder.encode_images([files[0].metadata["image_path"]])
        + encoder.encode_texts([d.page_content for d in texts]),
    )[0]
    ranked = reranker(encoder, score_mode="sum").compress_documents([files[0], *texts], QUESTION)
    found = {document.page_content: document.metadata["relevance_score"] for document in ranked}
    assert [found[""], found["the revenue was 7"], found["nothing"]] == pytest.approx(expected.tolist(), abs=1e-3)


def test_images_in_metadata_are_those_of_the_files(encoder: ColQwen3Encoder, files: list[Document]) -> None:
    encoded = base64.b64encode(png(3)).decode()
    held = [
        Document("", metadata={"image": image})
        for image in (encoded, png(3), picture(3), {"type": "image", "base64": encoded, "mime_type": "image/png"})
    ]
    ranked = reranker(encoder).compress_documents([files[0], *held], QUESTION)
    assert np.ptp([document.metadata["relevance_score"] for document in ranked]) < 1e-6


def test_score_modes_are_one_order_on_three_scales(encoder: ColQwen3Encoder, files: list[Document]) -> None:
    length = len(encoder.encode_queries([QUESTION])[0])
    scores = {
        mode: [
            d.metadata["relevance_score"]
            for d in reranker(encoder, score_mode=mode).compress_documents(files, QUESTION)
        ]
        for mode in ("sum", "mean", "relevance")
    }
    assert [total / length for total in scores["sum"]] == pytest.approx(scores["mean"], abs=1e-6)
    assert [(1 + mean) / 2 for mean in scores["mean"]] == pytest.approx(scores["relevance"], abs=1e-6)
    assert reranker(encoder, score_threshold=1.0).compress_documents(files, QUESTION) == []


def test_a_folder_keeps_embeddings_for_the_next_reranker(
    encoder: ColQwen3Encoder, files: list[Document], tmp_path: Path
) -> None:
    first = ColQwen3Reranker(encoder=encoder, cache=tmp_path / "cache")
    wanted = first.compress_documents(files, QUESTION)
    before = encoder.stats.inputs
    other = ColQwen3Reranker(encoder=encoder, cache=str(tmp_path / "cache"), cache_bytes=2**30)
    for tool in (
        other,
        pickle.loads(pickle.dumps(first)),
        ColQwen3Reranker(**json.loads(other.model_dump_json()) | {"encoder": encoder}),
    ):
        first._core.resources.open().cache.flush()
        ranked = tool.compress_documents(files, QUESTION)
        assert [(d.id, d.metadata["relevance_score"]) for d in ranked] == [
            (d.id, d.metadata["relevance_score"]) for d in wanted
        ]
    assert encoder.stats.inputs == before + 3, "the queries alone"
    with pytest.raises(ValueError, match="cache_bytes"):
        ColQwen3Reranker(cache=PageEmbeddingCache(encoder), cache_bytes=5)
    with pytest.raises(ValueError, match="cache"):
        ColQwen3Reranker(encoder=encoder, cache=7)


def test_a_document_that_scores_the_threshold_itself_stays(encoder: ColQwen3Encoder, files: list[Document]) -> None:
    cache = PageEmbeddingCache(encoder)
    first = reranker(encoder, cache=cache).compress_documents(files, QUESTION)
    bound = first[2].metadata["relevance_score"]
    kept = reranker(encoder, cache=cache, score_threshold=bound).compress_documents(files, QUESTION)
    assert [document.id for document in kept] == [document.id for document in first[:3]]


def test_ties_are_ordered_by_id_and_without_one_as_they_came(encoder: ColQwen3Encoder, files: list[Document]) -> None:
    twins = [Document("", id=id_, metadata={**files[0].metadata, "n": n}) for n, id_ in enumerate("c?a?b")]
    for twin in twins:
        twin.id = None if twin.id == "?" else twin.id
    for ranked in ways(reranker(encoder), twins, QUESTION):
        assert [document.metadata["n"] for document in ranked] == [2, 4, 0, 1, 3]


def test_c9_inputs_stay_as_they_are_and_results_keep_all(encoder: ColQwen3Encoder, files: list[Document]) -> None:
    class Rich(Document):
        note: str = ""

    nested = {"deep": [1, {"x": None}]}
    files = [*files[1:], Rich("", id="rich", metadata={**files[0].metadata, "nested": nested}, note="kept")]
    files[0].metadata["relevance_score"] = "somebody else's"
    before = copy.deepcopy(files)
    for ranked in ways(reranker(encoder), files, QUESTION):
        assert files == before
        for document in ranked:
            original = next(item for item in before if item.id == document.id)
            assert document is not original
            assert type(document) is type(original)
            expected = {**original.metadata, "relevance_score": document.metadata["relevance_score"]}
            assert document.metadata == expected
            assert json.loads(json.dumps(document.metadata)) == expected
        assert next(document for document in ranked if document.id == "rich").note == "kept"


# -- nothing is loaded or encoded in vain ------------------------------------------------------------------------------


def test_no_documents_need_no_model() -> None:
    tool = ColQwen3Reranker(model="/nowhere/at-all")
    assert tool.compress_documents([], "x") == asyncio.run(tool.acompress_documents([], "x")) == []
    with pytest.raises((CheckpointError, ConfigError), match="nowhere"):
        tool.compress_documents([Document("x")], "x")


@pytest.mark.parametrize("query", ["", " \n", None, 7])
def test_no_query_is_refused_before_anything_is_loaded(query: Any) -> None:
    tool = ColQwen3Reranker()
    for documents in ([], [Document("x")]):
        with pytest.raises(ConfigError, match="query"):
            tool.compress_documents(documents, query)
        with pytest.raises(ConfigError, match="query"):
            asyncio.run(tool.acompress_documents(documents, query))


def test_a_page_is_encoded_once_whatever_is_asked(encoder: ColQwen3Encoder, files: list[Document]) -> None:
    tool = reranker(encoder)
    tool.compress_documents(files, "one")
    before = encoder.stats.inputs
    tool.compress_documents(files, "two")
    asyncio.run(tool.acompress_documents(files[:2], "three"))
    assert encoder.stats.inputs - before == 2  # the queries


def test_pages_of_the_index_are_not_encoded_at_all(pages: PageIndex, encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    found = ColQwen3Retriever(index=pages, k=5).invoke(QUESTION)
    for document in found:
        document.metadata["image_path"] = str(tmp_path / "moved-away.png")
    tool = ColQwen3Reranker(index=pages, top_n=None, score_mode="sum")
    before = encoder.stats.inputs
    ranked = tool.compress_documents(found, QUESTION)
    assert encoder.stats.inputs - before == 1  # the query
    assert [document.id for document in ranked] == [document.id for document in found]
    for document in ranked:
        assert document.metadata["relevance_score"] == pytest.approx(document.metadata["score"], abs=1e-3)


def test_the_index_is_not_believed_about_another_content(pages: PageIndex, encoder: ColQwen3Encoder) -> None:
    known = page_to_document(pages.get(["a.pdf#page=1"])[0].page)
    changed = page_to_document(Page(source="a.pdf", number=1, text="a new text"))
    assert changed.id == known.id
    tool = ColQwen3Reranker(index=pages, score_mode="sum")
    text = encoder.score(encoder.encode_queries([QUESTION]), encoder.encode_texts(["a new text"]))[0, 0]
    assert tool.compress_documents([changed], QUESTION)[0].metadata["relevance_score"] == pytest.approx(text, abs=1e-3)
    bare = Document("a new text", id=known.id)  # tells no digest: the id is all there is
    assert tool.compress_documents([bare], QUESTION)[0].metadata["relevance_score"] == pytest.approx(
        tool.compress_documents([known], QUESTION)[0].metadata["relevance_score"], abs=1e-6
    )


def test_an_index_by_its_folder_brings_its_model(pages: PageIndex, encoder: ColQwen3Encoder) -> None:
    found = ColQwen3Retriever(index=pages, k=5).invoke(QUESTION)
    loads = encoder.stats.loads
    for options in ({}, {"device": "cpu"}, {"encoder": encoder}, {"model": pages.info.model, "device": "cpu"}):
        ranked = ColQwen3Reranker(index=pages.location, **options).compress_documents(found, QUESTION)
        assert [document.id for document in ranked] == [document.id for document in found[:3]]
    assert encoder.stats.loads == loads  # one model for all of them


def test_an_index_of_another_model_is_refused(pages: PageIndex, tmp_path: Path) -> None:
    other = ColQwen3Encoder(make_checkpoint(tmp_path / "other", "tomoro", seed=8).folder, device="cpu")
    with pytest.raises(StoreMismatchError, match="fingerprint"):
        ColQwen3Reranker(index=pages, encoder=other).compress_documents([Document("x")], "x")


def test_a_cache_may_be_shared(encoder: ColQwen3Encoder, files: list[Document]) -> None:
    cache = PageEmbeddingCache(encoder)
    first = ColQwen3Reranker(cache=cache)
    first.compress_documents(files, "one")
    assert len(cache) == 5
    before = encoder.stats.inputs
    ColQwen3Reranker(cache=cache, encoder=encoder, top_n=1).compress_documents(files, "two")
    assert encoder.stats.inputs - before == 1


def test_a_field_changed_later_counts(encoder: ColQwen3Encoder, pages: PageIndex, files: list[Document]) -> None:
    tool = reranker(encoder)
    tool.compress_documents(files[:1], "one")
    changed = tool.model_copy(update={"encoder": None, "model": "/nowhere/at-all"})
    with pytest.raises((CheckpointError, ConfigError), match="nowhere"):
        changed.compress_documents(files[:1], "one")
    tool.compress_documents(files[:1], "one")


# -- bad documents -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(files: list[Document], tmp_path: Path) -> list[Document]:
    """Two good documents among four that cannot be scored."""
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    return [
        Document("", id="gone", metadata={"image_path": str(tmp_path / "gone.png")}),
        files[0],
        Document(" ", id="empty", metadata={"relevance_score": 0.99}),
        Document("", id="broken", metadata={"image_path": str(tmp_path / "broken.png")}),
        files[1],
        Document("", id="url", metadata={"image": {"type": "image", "url": "http://127.0.0.1/a.png"}}),
    ]


def test_a_bad_document_is_named(encoder: ColQwen3Encoder, mixed: list[Document]) -> None:
    for place, words in ((0, "gone"), (2, "neither a text nor an image"), (3, "broken"), (5, "not fetched")):
        documents = [mixed[1], mixed[place]]
        tool = reranker(encoder)
        for run in (tool.compress_documents, lambda *args, t=tool: asyncio.run(t.acompress_documents(*args))):
            with pytest.raises(EncodeError, match=words) as caught:
                run(documents, QUESTION)
            assert caught.value.index == 1
            assert str(caught.value).startswith(f"document 1 (id {mixed[place].id!r}): ")
            assert "input" not in str(caught.value)


def test_a_bad_document_is_skipped_with_a_warning(
    encoder: ColQwen3Encoder, mixed: list[Document], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "colqwen3_retrievers"):
        ranked = reranker(encoder, on_error="skip").compress_documents(mixed, QUESTION)
    assert {document.id for document in ranked} == {mixed[1].id, mixed[4].id}
    assert len(caplog.records) == 4
    assert all(record.getMessage().startswith("left out: document ") for record in caplog.records)
    assert reranker(encoder, on_error="skip").compress_documents(mixed[:1], QUESTION) == []


def test_a_bad_document_is_kept_behind_the_others(encoder: ColQwen3Encoder, mixed: list[Document]) -> None:
    for ranked in ways(reranker(encoder, on_error="keep"), mixed, QUESTION):
        assert {document.id for document in ranked[:2]} == {mixed[1].id, mixed[4].id}
        assert [document.id for document in ranked[2:]] == ["gone", "empty", "broken", "url"]
        for document in ranked[2:]:
            assert "relevance_score" not in document.metadata  # a stale one would be taken for ours
            assert document.metadata["rerank_error"]
    assert len(reranker(encoder, on_error="keep", top_n=3).compress_documents(mixed, QUESTION)) == 3


def test_a_text_beyond_the_limit_is_the_documents_fault(encoder: ColQwen3Encoder, files: list[Document]) -> None:
    long = Document("word " * 6_000, id="long")
    ranked = reranker(encoder, on_error="keep").compress_documents([long, files[0]], QUESTION)
    assert [document.id for document in ranked] == [files[0].id, "long"]
    assert "tokens" in ranked[1].metadata["rerank_error"]


def test_a_model_that_cannot_be_loaded_is_nobodys_document(files: list[Document]) -> None:
    for on_error in ("skip", "keep"):
        with pytest.raises((CheckpointError, ConfigError), match="nowhere"):
            ColQwen3Reranker(model="/nowhere/at-all", on_error=on_error).compress_documents(files, QUESTION)


def test_a_bar_and_a_window_change_no_ranking(encoder: ColQwen3Encoder, mixed: list[Document]) -> None:
    expected = reranker(encoder, on_error="keep").compress_documents(mixed, QUESTION)
    windowed = reranker(encoder, on_error="keep", embed_batch_size=1, show_progress=True)
    for ranked in ways(windowed, mixed, QUESTION):
        assert [document.id for document in ranked] == [document.id for document in expected]


# -- arguments and copies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_n": 0},
        {"top_n": True},
        {"top_n": "2"},
        {"cache_bytes": True},
        {"embed_batch_size": "2"},
        {"on_error": "ignore"},
        {"score_mode": "max"},
        {"score_threshold": float("nan")},
        {"topn": 3},
        {"embed_batch_size": 0},
    ],
)
def test_wrong_arguments_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ColQwen3Reranker(**wrong)


@pytest.mark.parametrize("wrong", [True, "2", 0, 1.5])
def test_a_number_assigned_later_is_checked_too(wrong: Any) -> None:
    tool = ColQwen3Reranker()
    tool.top_n = wrong
    with pytest.raises(ConfigError, match="top_n: expected a whole number from 1"):
        tool.compress_documents([Document("x")], "revenue")


def test_it_needs_no_argument_and_loads_nothing() -> None:
    tool = ColQwen3Reranker()
    assert (tool.top_n, tool.score_mode, tool.model) == (3, "relevance", None)


def test_one_model_only(encoder: ColQwen3Encoder) -> None:
    for wrong in ({"model": "tiny", "encoder": encoder}, {"device": "cpu", "cache": PageEmbeddingCache(encoder)}):
        with pytest.raises(ValidationError, match="not both"):
            ColQwen3Reranker(**wrong)
    with pytest.raises(ValidationError, match="belongs to another encoder"):
        ColQwen3Reranker(encoder=ColQwen3Encoder("tiny"), cache=PageEmbeddingCache(encoder))


@pytest.mark.parametrize("inputs", [{}, {"documents": []}, {"query": "x"}, []])
def test_a_step_says_what_it_expects(inputs: Any) -> None:
    with pytest.raises(ConfigError, match=r"documents.*query"):
        ColQwen3Reranker().as_runnable().invoke(inputs)


def test_pickle_json_and_copies_carry_settings_only(
    encoder: ColQwen3Encoder, pages: PageIndex, files: list[Document]
) -> None:
    tool = ColQwen3Reranker(index=pages, top_n=2, cache=PageEmbeddingCache(encoder))
    wanted = tool.compress_documents(files, QUESTION)
    data = pickle.dumps(tool)
    assert len(data) < 2_000
    again = pickle.loads(data)
    assert again.cache is None
    assert [d.id for d in again.compress_documents(files, QUESTION)] == [document.id for document in wanted]
    twin = copy.deepcopy(tool)
    assert (twin.index, twin.cache, twin.top_n) == (pages, tool.cache, 2)
    values = json.loads(ColQwen3Reranker(encoder=encoder, index=pages).model_dump_json())
    assert values["encoder"] == encoder.to_dict()
    assert values["index"] == pages.location
    assert values["cache"] is None
    assert pickle.loads(pickle.dumps(ColQwen3Reranker(model="tiny", top_n=None))).top_n is None
