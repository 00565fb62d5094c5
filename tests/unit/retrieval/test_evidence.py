"""Boxes and overlays as data: an encoder that knows blocks of pixels by their hash says where an answer lies."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from colqwen3_retrievers import Hit, MultiVector, Page, PageIndex, Query, similarity_map
from colqwen3_retrievers.errors import ConfigError, PageError, StoreError
from colqwen3_retrievers.pages.images import open_image
from colqwen3_retrievers.retrieval.evidence import Evidence, file_stem, indexed_picture, page_map, write_picture
from tests.hashing import BLOCK, HashingEncoder, picture

COLUMNS, ROWS = 3, 2


def block(seed: int, row: int, column: int) -> Image.Image:
    """The piece of a page's picture that is one visual token."""
    left, top = column * BLOCK, row * BLOCK
    return picture(seed).crop((left, top, left + BLOCK, top + BLOCK))


def box(row: int, column: int) -> dict[str, float]:
    return {
        "left": column / COLUMNS, "top": row / ROWS, "right": (column + 1) / COLUMNS, "bottom": (row + 1) / ROWS,
        "score": 1.0,
    }  # fmt: skip


@pytest.fixture
def index(encoder: HashingEncoder, tmp_path: Path) -> Iterator[PageIndex]:
    with PageIndex.open(tmp_path / "index", encoder) as made:
        made.add(Page(source="a.pdf", number=n, image=picture(n)) for n in (1, 2, 3))
        made.add(Page(source="notes.txt", text="revenue rose"))
        yield made


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 2), (0, 1)])
def test_a_box_lies_where_the_answer_lies(index: PageIndex, row: int, column: int) -> None:
    hits, told, _ = Evidence(boxes=1).search(index, Query(image=block(2, row, column)), {"k": 1})
    assert [hit.page.number for hit in hits] == [2]
    (found,) = told["a.pdf#page=2"]["boxes"]
    assert found == pytest.approx(box(row, column), abs=1e-3)  # half precision in the store
    assert json.loads(json.dumps(told)) == told


def test_no_more_boxes_than_asked_for_and_the_best_first(index: PageIndex) -> None:
    asked = Image.new("RGB", (2 * BLOCK, BLOCK))
    asked.paste(block(2, 0, 0), (0, 0))
    asked.paste(block(2, 1, 2), (BLOCK, 0))
    for most, expected in ((1, 1), (5, 2)):
        _, told, _ = Evidence(boxes=most).search(index, Query(image=asked), {"k": 1})
        assert len(told["a.pdf#page=2"]["boxes"]) == expected
    scores = [each["score"] for each in told["a.pdf#page=2"]["boxes"]]
    assert scores == sorted(scores, reverse=True)


def test_neighbours_have_theirs_and_texts_have_none(index: PageIndex) -> None:
    hits, told, _ = Evidence(boxes=1).search(index, Query(image=block(2, 0, 0)), {"k": 4, "window": 1})
    assert len(hits) == 4
    assert told.keys() == {"a.pdf#page=1", "a.pdf#page=2", "a.pdf#page=3"}
    hits, told, _ = Evidence(boxes=1).search(index, Query(image=block(2, 0, 0)), {"k": 1, "window": 1})
    assert told.keys() == {"a.pdf#page=1", "a.pdf#page=2", "a.pdf#page=3"}
    scores = {hit.page.id: hit.score for hit in index.search(Query(image=block(2, 0, 0)), 4, exact=True)}
    for evidence in (Evidence(boxes=1), Evidence()):
        [hit], _, beside = evidence.search(index, Query(image=block(2, 0, 0)), {"k": 1, "window": 1})
        assert beside == {page.id: pytest.approx(scores[page.id], abs=1e-4) for page in hit.neighbours}
        assert {type(score) for score in beside.values()} == {float}
    hits, told, _ = Evidence(boxes=1).search(index, "revenue", {"k": 1, "group_by": "source"})
    assert [hit.page.source for hit in hits] == ["notes.txt"]
    assert told == {}


def test_the_question_is_encoded_once_and_waiting_leaves_the_loop_free(
    index: PageIndex, encoder: HashingEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = encoder.submit_queries

    def counted(queries: Any) -> Any:
        calls.append(len(queries := list(queries)))
        return real(queries)

    monkeypatch.setattr(encoder, "submit_queries", counted)
    asked, how = Query(image=block(3, 1, 1)), {"k": 2}
    alone = Evidence(boxes=2).search(index, asked, how)

    async def many() -> tuple[list[Any], int]:
        encoder.hold.clear()
        tasks = [asyncio.create_task(Evidence(boxes=2).asearch(index, asked, how)) for _ in range(3)]
        ticks = 0
        while len(calls) < 4 or ticks < 20:  # all under way, and none can end
            await asyncio.sleep(0.001)
            ticks += 1
        encoder.hold.set()
        return await asyncio.gather(*tasks), ticks

    answers, _ = asyncio.run(many())
    assert calls == [1] * 4
    for hits, told, _ in answers:
        assert [hit.page.id for hit in hits] == [hit.page.id for hit in alone[0]]
        assert told == alone[1]


def test_nothing_wanted_costs_nothing(index: PageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PageIndex, "get", lambda *_, **__: pytest.fail("the vectors were read"))
    hits, told, _ = Evidence().search(index, "revenue", {"k": 1})
    assert (len(hits), told) == (1, {})
    assert Evidence(boxes=3).of_hits(index, MultiVector(np.eye(1, 32, dtype=np.float32)), []) == {}


def test_an_empty_index_needs_no_encoder(tmp_path: Path, encoder: HashingEncoder) -> None:
    with PageIndex.open(tmp_path / "empty", encoder) as empty:
        encoder.submit_queries = lambda _: pytest.fail("encoded")  # type: ignore[assignment,method-assign]
        assert Evidence(boxes=1).search(empty, "revenue", {}) == ([], {}, {})


def test_overlays_are_files_of_the_pages_size(index: PageIndex, tmp_path: Path) -> None:
    made = Evidence(boxes=1, heatmaps=tmp_path / "why" / "maps")
    asked = Query(image=block(2, 1, 2))
    _, told, _ = made.search(index, asked, {"k": 4})
    assert "heatmap" not in told.get("notes.txt#page=1", {})
    file = Path(told["a.pdf#page=2"]["heatmap"])
    assert file.is_absolute()
    assert file.parent == tmp_path / "why" / "maps"
    assert file.name.startswith("a.pdf-page-2-")
    [vectors] = index.encoder.submit_queries([asked]).result()
    [record] = index.get(["a.pdf#page=2"], vectors=True)
    assert record.multi_vector is not None
    expected = similarity_map(vectors, record.multi_vector).overlay(picture(2), boxes=1)
    assert np.array_equal(np.asarray(open_image(file)), np.asarray(expected))
    before = sorted(file.parent.iterdir())
    assert len(before) == 3
    made.search(index, asked, {"k": 4})
    assert sorted(file.parent.iterdir()) == before, "asking again writes the same files, and leaves no others"
    made.search(index, Query(image=block(2, 0, 0)), {"k": 4})
    assert len(list(file.parent.iterdir())) == 6, "another question has its own"


def test_an_overlay_needs_no_boxes(index: PageIndex, tmp_path: Path) -> None:
    _, told, _ = Evidence(heatmaps=tmp_path).search(index, Query(image=block(1, 0, 0)), {"k": 1})
    assert told["a.pdf#page=1"].keys() == {"heatmap", "pooled"}
    assert told["a.pdf#page=1"]["pooled"] is False


def test_a_picture_that_is_gone_leaves_the_boxes(
    index: PageIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in (tmp_path / "index" / "images").rglob("*.png"):
        file.unlink()
    with caplog.at_level(logging.WARNING):
        _, told, _ = Evidence(boxes=1, heatmaps=tmp_path / "maps").search(index, Query(image=block(1, 0, 0)), {"k": 1})
    assert told["a.pdf#page=1"].keys() == {"boxes", "pooled"}
    assert "without an overlay" in caplog.text


def test_an_original_that_has_changed_is_not_drawn_over(
    tmp_path: Path, encoder: HashingEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    made, asked = Evidence(boxes=1, heatmaps=tmp_path / "maps"), Query(image=block(1, 0, 0))
    file = tmp_path / "scan.png"
    picture(1).save(file)
    with PageIndex.open(tmp_path / "referring", encoder, images="reference") as index:
        index.add(Page(id="scan", image=file, text="as printed"))
        picture(1).save(file, compress_level=0)  # other bytes, the same pixels
        _, told, _ = made.search(index, asked, {})
        assert told["scan"].keys() == {"boxes", "heatmap", "pooled"}
        assert caplog.text == ""
        picture(2).save(file)
        _, told, _ = made.search(index, asked, {})
        assert told["scan"].keys() == {"boxes", "pooled"}
        assert "scan.png: the file has changed since the page was indexed" in caplog.text
        with pytest.raises(PageError, match="has changed"):
            indexed_picture(index.get(["scan"])[0])


@pytest.mark.parametrize("digest", ["of the file", "revision 7"])
def test_a_digest_of_the_callers_own_is_no_change(digest: str, tmp_path: Path, encoder: HashingEncoder) -> None:
    file = tmp_path / "scan.png"
    picture(1).save(file)
    given = hashlib.sha256(file.read_bytes()).hexdigest() if digest == "of the file" else digest
    with PageIndex.open(tmp_path / "referring", encoder, images="reference") as index:
        index.add(Page(id="scan", image=file, sha256=given))
        assert indexed_picture(index.get(["scan"])[0]) is not None


def test_a_stored_picture_has_no_other_to_be_taken_for(tmp_path: Path, encoder: HashingEncoder) -> None:
    with PageIndex.open(tmp_path / "storing", encoder) as index:
        index.add(Page(id="scan", image=picture(1), sha256="0" * 64))
        assert indexed_picture(index.get(["scan"])[0]) is not None


class Pooled(HashingEncoder):
    """Pools each row of a picture's visual tokens into one."""

    def multi_vector(self, text: str, image: Image.Image | None) -> MultiVector:
        made = super().multi_vector(text, image)
        if made.grid != (ROWS, COLUMNS):
            return made
        clusters = np.repeat(np.arange(ROWS), COLUMNS).astype(np.int32)
        rows = np.stack([made.vectors[clusters == row].mean(axis=0) for row in range(ROWS)])
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return MultiVector(rows.astype(np.float32), visual=made.visual, grid=made.grid, clusters=clusters)


def test_a_pooled_page_answers_by_its_clusters(tmp_path: Path) -> None:
    encoder = Pooled()
    with PageIndex.open(tmp_path / "index", encoder) as index:
        index.add(Page(source="a.pdf", image=picture(1)))
        asked = encoder.multi_vector("", block(1, 1, 2))
        _, told, _ = Evidence(boxes=1).search(index, Query(image=block(1, 1, 2)), {"k": 1})
        [record] = index.get(["a.pdf#page=1"], vectors=True)
        made = page_map(asked, record.multi_vector)
        assert made is not None
        assert made.pooled
    encoder.threads.shutdown()
    assert told["a.pdf#page=1"]["pooled"] is True
    (found,) = told["a.pdf#page=1"]["boxes"]
    assert found["score"] < 1
    assert {key: found[key] for key in ("left", "top", "right", "bottom")} == {
        "left": 0, "top": 0.5, "right": 1, "bottom": 1
    }  # fmt: skip


def test_pages_that_are_gone_or_have_no_regions_have_no_map(index: PageIndex, encoder: HashingEncoder) -> None:
    asked = encoder.multi_vector("revenue", None)
    hits = [Hit(Page(source="notes.txt"), 1.0), Hit(Page(source="a.pdf", number=3), 1.0), Hit(Page(id="gone"), 1.0)]
    assert Evidence(boxes=1).of_hits(index, asked, hits).keys() == {"a.pdf#page=3"}
    assert page_map(asked, None) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"boxes": -1},
        {"boxes": True},
        {"boxes": 1.5},
        {"boxes": None},
        {"heatmaps": ""},
        {"heatmaps": 3},
        {"heatmaps": "a\0b"},
    ],
)
def test_a_bad_argument_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Evidence(**wrong)


def test_a_home_folder_of_nobody_is_named() -> None:
    with pytest.raises(ConfigError, match="~no-such-user/maps"):
        Evidence(heatmaps="~no-such-user/maps")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="file/maps"):
        write_picture(picture(1), tmp_path / "file" / "maps" / "a.png")
    with pytest.raises(StoreError):
        write_picture(picture(1), tmp_path / ("x" * 300 + ".png"))
    assert [left.name for left in tmp_path.iterdir()] == ["file"]


NAMES = ["../../etc/passwd", "a/b\\c", "é" * 300, "財務部/年度報告書" * 12, "\0\n", "..", "https://example.org/a?b=c"]


@pytest.mark.parametrize("name", NAMES)
def test_no_page_id_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    unit = np.eye(4, dtype=np.float32)
    page = MultiVector(unit, visual=slice(0, 4), grid=(2, 2))
    told = Evidence(heatmaps=tmp_path).of_page(MultiVector(unit[3:]), page, lambda: picture(1), name)
    assert Path(told["heatmap"]).parent == tmp_path
    assert Path(told["heatmap"]).is_file()


def test_ids_of_any_length_have_files_of_their_own(tmp_path: Path) -> None:
    unit = np.eye(4, dtype=np.float32)
    page = MultiVector(unit, visual=slice(0, 4), grid=(2, 2))
    long = "あ" * 99
    for name in (f"1{long}", f"2{long}", f"{long}/", f"{long}?", long, long[1:]):
        Evidence(heatmaps=tmp_path).of_page(MultiVector(unit[3:]), page, lambda: picture(1), name)
    written = [path.name for path in tmp_path.iterdir()]
    assert len(written) == 6
    assert max(len(name.encode()) for name in written) < 128


def test_a_name_is_cut_between_letters() -> None:
    for most in range(4, 12):
        assert "書報告書".endswith(file_stem("報告書" * 9, most))
