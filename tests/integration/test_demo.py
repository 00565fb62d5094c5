"""The demo, as a user runs it: real PDFs in, the right pages out, and a report that stands alone."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw, ImageFont

from colqwen3_retrievers import PageIndex
from colqwen3_retrievers.demo import DEMO_QUESTIONS
from colqwen3_retrievers.demo.run import DemoResult, run_demo
from colqwen3_retrievers.errors import CheckpointError, ColQwen3Error, ConfigError, PageError


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    out = tmp_path_factory.mktemp("demo") / "out"
    mine = tmp_path_factory.mktemp("mine") / "report.pdf"  # as one of the demo's own is called
    Image.new("RGB", (400, 300), (30, 90, 160)).save(mine)
    return run_demo(out, [str(mine)], questions=["a question of mine"])


def test_the_users_own_take_no_pages_place(result: DemoResult) -> None:
    with PageIndex.open(result.report.parent / "index", read_only=True) as index:
        assert [page for page in index.ids() if page.startswith("yours/")] == ["yours/report.pdf#page=1"]
        assert "report.pdf#page=1" in index.ids()


def test_every_page_is_indexed_with_the_users_own(result: DemoResult) -> None:
    assert result.n_pages == 18
    assert result.n_questions == len(DEMO_QUESTIONS) >= 20


def test_questions_return_the_page_they_quote(result: DemoResult) -> None:
    assert result.n_first == result.n_questions


class _Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.elsewhere: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "src":
                self.images.append(value or "")
            if name in ("src", "href") and not (value or "").startswith(("data:", "#")):
                self.elsewhere.append(value or "")


def test_the_report_is_one_file_that_fetches_nothing(result: DemoResult) -> None:
    text = result.report.read_text(encoding="utf-8")
    reader = _Reader()
    reader.feed(text)
    assert len(reader.images) == 3 * (len(DEMO_QUESTIONS) + 1)
    assert all(image.startswith("data:image/jpeg;base64,") for image in reader.images)
    assert reader.elsewhere == []
    assert "a question of mine" in text
    assert result.report.stat().st_size < 12_000_000


def test_best_pages_are_pictures(result: DemoResult) -> None:
    best = sorted((result.report.parent / "best").glob("*.png"))
    assert len(best) == len(DEMO_QUESTIONS) + 1
    with Image.open(best[0]) as picture:
        assert min(picture.size) > 500


def test_a_second_run_replaces_the_first_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="is not a demo's folder"):
        run_demo(tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "keep me"


def left_alone(out: Path) -> Path:
    """What looks like an earlier run's folder."""
    (out / "documents").mkdir(parents=True)
    (out / ".colqwen3-demo").touch()
    (out / "report.html").write_text("of an earlier run")
    Image.new("RGB", (40, 30)).save(out / "documents" / "mine.png")
    return out


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"documents": ["OUT/../no-such.pdf"]}, PageError, "no such file"),
        ({"documents": ["OUT/documents/mine.png"]}, ConfigError, "replaces what is in"),
        ({"documents": ["OUT/.."]}, ConfigError, "replaces what is in"),
        ({"documents": ["OUT/../*/documents/*.png"]}, ConfigError, "replaces what is in"),
        ({"questions": ["what?", " "]}, ConfigError, "query"),
        ({"model": "OUT/no-such-model"}, CheckpointError, "no-such-model"),
    ],
)
def test_what_can_be_told_beforehand_costs_no_earlier_report(
    arguments: dict[str, Any], error: type[ColQwen3Error], message: str, tmp_path: Path
) -> None:
    out = left_alone(tmp_path / "out")
    given = json.loads(json.dumps(arguments).replace("OUT", str(out)))
    with pytest.raises(error, match=message):
        run_demo(out, **given)
    assert (out / "report.html").read_text() == "of an earlier run"
    assert (out / "documents" / "mine.png").is_file()


def test_a_strip_of_a_page_has_its_place_in_the_report(tmp_path: Path) -> None:
    strip = tmp_path / "strip"
    strip.mkdir()
    page = Image.new("RGB", (60, 9000), "white")
    ImageDraw.Draw(page).text((5, 4500), "yak", fill="black", font=ImageFont.load_default(16))
    page.save(strip / "receipt.png")
    run_demo(tmp_path / "out", [str(strip)], questions=["yak"])
    assert "receipt.png" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
