"""Adding files: one file never takes another's pages, one bad page stops nobody, what a user said of a page stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from colqwen3_retrievers import Page, PageIndex, load_pages
from colqwen3_retrievers.errors import ConfigError, EncodeError, PageError
from colqwen3_retrievers.index.file_sync import Synced
from tests.hashing import HashingEncoder, picture, qdrant_index


@pytest.fixture
def years(tmp_path: Path) -> Path:
    """A folder for each of two years, with a report of the same name in each."""
    for seed, year in enumerate(("2023", "2024"), start=1):
        (tmp_path / "years" / year).mkdir(parents=True)
        draw(tmp_path / "years" / year / "report.png", seed)
    return tmp_path / "years"


def draw(path: Path, seed: int) -> None:
    picture(seed).save(path, compress_level=0)


def pixels(index: PageIndex, page_id: str) -> bytes:
    image = index.get([page_id])[0].page.image
    assert image is not None
    return image.tobytes()


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["add_files", "sync"])
def test_a_second_folder_never_replaces_the_pages_of_the_first(index: PageIndex, years: Path, call: str) -> None:
    assert index.add_files(years / "2023") == Synced(added=1)
    with pytest.raises(ConfigError, match=r"2023/report\.png, .* and .*2024/report\.png .* root= .*--root"):
        getattr(index, call)(years / "2024")
    assert pixels(index, "report.png#page=1") == picture(1).tobytes()
    assert getattr(index, call)(years / "2024", root=years) == Synced(added=1)
    assert index.ids() == ["2024/report.png#page=1", "report.png#page=1"]


def test_two_folders_in_one_call_need_a_root(index: PageIndex, years: Path) -> None:
    both = [years / "2023", years / "2024"]
    with pytest.raises(ConfigError, match="give a root= above both of them"):
        index.add_files(both)
    assert index.add_files(both, root=years) == Synced(added=2)
    assert index.add_files(str(years / "*" / "*.png")) == Synced(unchanged=2)


def test_a_file_that_changed_is_updated_and_nothing_is_forgotten(
    index: PageIndex, years: Path, encoder: HashingEncoder
) -> None:
    index.add_files(years)
    draw(years / "2023" / "report.png", 9)
    (years / "2024" / "report.png").unlink()
    encoder.encoded.clear()
    assert index.add_files(years) == Synced(updated=1)
    assert encoder.encoded == ["2023/report.png#page=1"]
    assert len(index) == 2
    assert index.sync(years) == Synced(unchanged=1, removed=1)  # what was added is known to a sync


def test_a_moved_folder(index: PageIndex, years: Path, tmp_path: Path) -> None:
    index.add_files(years)
    moved = years.rename(tmp_path / "archive")
    assert index.add_files(moved) == Synced(unchanged=2)
    again = moved.rename(tmp_path / "attic")
    draw(again / "2023" / "report.png", 9)
    with pytest.raises(PageError, match=r"archive/2023/report\.png, which is not there now: .* \(--moved\)"):
        index.add_files(again)
    assert pixels(index, "2023/report.png#page=1") == picture(1).tobytes()
    [failed] = index.sync(again).failed
    assert "--moved" in failed.reason
    assert index.sync(again, moved=True) == Synced(updated=1, unchanged=1)
    assert index.add_files(again) == Synced(unchanged=2)


def test_a_copied_folder_may_take_over(index: PageIndex, years: Path) -> None:
    index.add_files(years / "2023")
    assert index.add_files(years / "2024", moved=True) == Synced(updated=1)
    assert pixels(index, "report.png#page=1") == picture(2).tobytes()


def test_the_images_of_an_index_are_no_pages(index: PageIndex, years: Path, tmp_path: Path) -> None:
    assert index.add_files(tmp_path) == Synced(added=2)
    assert index.add_files(tmp_path) == Synced(unchanged=2)


def test_without_a_place_for_a_ledger_files_are_added_all_the_same(years: Path, encoder: HashingEncoder) -> None:
    index = qdrant_index(encoder, images="none")
    assert index.add_files(years) == Synced(added=2)
    assert index.add_files(years) == Synced(unchanged=2)


# -- failures ----------------------------------------------------------------------------------------------------------


def bad_pages(tmp_path: Path) -> list[Page]:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return [
        Page(id="a", text="good"),
        Page(id="b", text="unreadable"),
        Page(id="c", image=tmp_path / "broken.png"),
        Page(id="d", text="endless"),
        Page(id="e", text="good too"),
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_one_bad_page_stops_nobody(index: PageIndex, tmp_path: Path, batch_size: int) -> None:
    told: list[EncodeError | PageError] = []
    done = index.add(bad_pages(tmp_path), on_error=told.append, batch_size=batch_size)
    assert (done.added, done.skipped) == (2, 3)
    assert index.ids() == ["a", "e"]
    assert sorted(type(error).__name__ for error in told) == ["EncodeError", "InputTooLongError", "PageError"]
    assert any("page 'b'" in str(error) for error in told)


def test_skipping_is_logged_and_raising_is_the_default(
    index: PageIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pages = bad_pages(tmp_path)
    with pytest.raises(PageError, match=r"broken\.png"):
        index.add(pages[2:])
    with pytest.raises(EncodeError, match="page 'b'"):
        index.add(pages[:2])
    assert index.add(pages, on_error="skip").skipped == 3
    assert sum("skipped: " in record.message for record in caplog.records) == 3
    with pytest.raises(ConfigError, match="on_error: expected 'raise', 'skip' or a function"):
        index.add(pages, on_error="ignore")  # type: ignore[arg-type]


def test_a_bad_file_and_a_bad_path_are_told_and_the_rest_is_added(index: PageIndex, years: Path) -> None:
    (years / "2023" / "broken.png").write_bytes(b"no picture")
    told: list[EncodeError | PageError] = []
    done = index.add_files([years / "gone", years], on_error=told.append)
    assert done.added == 2
    assert [item.source for item in done.failed] == [str(years / "gone"), "2023/broken.png"]
    assert [str(error) for error in told] == [str(item) for item in done.failed]
    with pytest.raises(PageError, match=r"broken\.png"):
        index.add_files(years)


def test_a_page_that_cannot_be_encoded_is_tried_again_next_time(
    index: PageIndex, years: Path, encoder: HashingEncoder
) -> None:
    def fail(pages: list[Page]) -> None:
        for position, page in enumerate(pages):
            if page.source.startswith("2023"):
                raise EncodeError("too thin", index=position)

    encoder.before = fail
    with pytest.raises(EncodeError, match="too thin"):
        index.add_files(years)
    assert index.add_files(years, on_error="skip").added == 1
    encoder.before = len
    assert index.add_files(years) == Synced(added=1, unchanged=1)


# -- metadata ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"max_pixels": 100}, {"verify": True}, "changed"])
@pytest.mark.parametrize("before", [True, False])
def test_what_a_user_said_of_a_page_stays(index: PageIndex, years: Path, before: bool, how: object) -> None:
    if before:
        index.sync(years)
    index.add(page.replace(metadata={**page.metadata, "year": 2023, "width": 1}) for page in load_pages(years))
    if how == "changed":
        draw(years / "2023" / "report.png", 9)
    index.sync(years, **(how if isinstance(how, dict) else {}))
    assert [record.page.metadata["year"] for record in index.get(index.ids())] == [2023, 2023]
    if how == "changed":
        assert index.get(["2023/report.png#page=1"])[0].page.metadata["width"] == 24, "a file's keys are the file's"
    assert index.ids({"year": 2023}) == index.ids()


def test_metadata_for_every_page(index: PageIndex, years: Path, encoder: HashingEncoder) -> None:
    index.sync(years)
    encoder.encoded.clear()
    assert index.sync(years, metadata={"team": "audit", "tags": ["a"]}) == Synced(updated=2)
    assert encoder.encoded == []
    assert index.sync(years, metadata={"tags": ["a"]}) == Synced(unchanged=2)
    assert index.sync(years / "2024", root=years, metadata={"team": "tax"}) == Synced(updated=1)
    assert index.add_files(years) == Synced(unchanged=2)
    assert index.ids({"team": "tax", "tags": {"$contains": "a"}}) == ["2024/report.png#page=1"]
    with pytest.raises(ConfigError, match="metadata"):
        index.sync(years, metadata={"when": object()})
