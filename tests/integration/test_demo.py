"""The demo, as a user runs it: real PDFs in, the right pages out, and a report that stands alone."""

from __future__ import annotations

import html.parser
from pathlib import Path

import pytest
from PIL import Image

from colqwen3_retrievers.demo import DEMO_QUESTIONS
from colqwen3_retrievers.demo.run import DemoResult, run_demo
from colqwen3_retrievers.errors import ConfigError


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    out = tmp_path_factory.mktemp("demo") / "out"
    mine = tmp_path_factory.mktemp("mine") / "photo.png"
    Image.new("RGB", (400, 300), (30, 90, 160)).save(mine)
    return run_demo(out, [str(mine)], questions=["a question of mine"])


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
