from __future__ import annotations

import re

import pytest

from colqwen3_retrievers.demo import DEMO_QUESTIONS, write_demo_documents
from colqwen3_retrievers.pages.loading import load_pages
from examples.demo_documents import draw_demo_documents
from examples.demo_documents.scan import SCAN_TEXT

PAGES = {"invoice.pdf": 2, "report.pdf": 7, "scan.pdf": 2, "slides.pdf": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_demo_documents(folder)
    return folder


@pytest.fixture(scope="module")
def texts(folder) -> dict[tuple[str, int], str]:
    """The text of each page, with single spaces; of the scan, what was drawn before it was scanned."""
    printed = {(page.source, page.number): page.text for page in load_pages(folder)}
    for number, lines in enumerate(SCAN_TEXT, start=1):
        printed["scan.pdf", number] = "\n".join(lines)
    return {key: " ".join(text.split()) for key, text in printed.items()}


def test_the_set_has_the_documents_and_pages_it_promises(folder, texts):
    assert sorted(path.name for path in folder.iterdir()) == sorted(PAGES)
    for source, count in PAGES.items():
        assert sorted(number for name, number in texts if name == source) == list(range(1, count + 1))


def test_every_question_stands_on_its_page_and_on_no_other(texts):
    for question, source, number in DEMO_QUESTIONS:
        found = [key for key, text in texts.items() if question.lower() in text.lower()]
        assert found == [(source, number)], question


def test_every_question_has_a_word_that_no_other_page_has(texts):
    words = {key: set(re.findall(r"[\w£.,%-]*\w%?", text.lower())) for key, text in texts.items()}
    for question, source, number in DEMO_QUESTIONS:
        asked = re.findall(r"[\w£.,%-]*\w%?", question.lower())
        own = [word for word in asked if [key for key in words if word in words[key]] == [(source, number)]]
        assert own, question


def test_the_questions_are_many_mixed_and_cover_every_page(texts):
    questions = [question for question, _, _ in DEMO_QUESTIONS]
    assert len(set(questions)) == len(questions) >= 24
    assert {(source, number) for _, source, number in DEMO_QUESTIONS} == set(texts)
    assert {len(question.split()) for question in questions} >= {1, 2, 3}
    assert sum(any(character.isdigit() for character in question) for question in questions) >= 5
    assert any("£" in question for question in questions)


def test_copies_replace_files_of_the_same_names(folder, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "scan.pdf").write_text("another")
    for path in write_demo_documents(tmp_path / "new"):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_the_drawing_code_draws_the_documents_of_the_package(folder, tmp_path):
    assert [path.name for path in draw_demo_documents(tmp_path)] == sorted(PAGES)
    packaged, drawn = ([(page.id, page.label, page.text) for page in load_pages(place)] for place in (folder, tmp_path))
    assert drawn == packaged


def test_the_report_is_numbered_in_roman_then_arabic_and_prints_these_numbers(folder):
    pages = list(load_pages(folder / "report.pdf"))
    assert [page.label for page in pages] == ["i", "ii", "1", "2", "3", "4", "5"]
    for page in pages[1:]:
        assert page.label in page.text.split()


def test_the_slides_are_landscape_and_the_rest_portrait(folder):
    for page in load_pages(folder):
        assert (page.metadata["width"] > page.metadata["height"]) == (page.source == "slides.pdf")


def test_the_scan_has_no_text_layer_and_is_grey_noisy_and_crooked(folder):
    for page in load_pages(folder / "scan.pdf"):
        assert page.text == ""
        red, green, blue = page.image.split()
        assert red.tobytes() == green.tobytes() == blue.tobytes()
        assert len(page.image.crop((0, 0, 60, 60)).convert("L").getcolors()) > 8  # bare paper is not one colour


def test_the_figures_of_the_invoice_and_the_report_add_up(texts):
    amounts = [float(text.replace(",", "")) for text in re.findall(r"[\d,]+\.\d\d", texts["invoice.pdf", 1])]
    net, tax, total = amounts[-3:]
    assert sum(amounts[1:-3:2]) == pytest.approx(net)
    assert (tax, total) == (pytest.approx(0.2 * net), pytest.approx(1.2 * net))
    for line in ("Revenue", "Cost of sales", "Gross profit", "Research", "Administration", "Operating profit"):
        row = re.search(rf"{line} ((?:\(?[\d,]+\)? ?){{5}})", texts["report.pdf", 4])
        assert row, line
        *quarters, year = [int(re.sub(r"\D", "", value)) for value in row[1].split()]
        assert sum(quarters) == year, line


def test_no_page_is_empty_or_overfull(folder):
    for page in load_pages(folder, max_pixels=100_000):
        dark = sum(page.image.convert("L").histogram()[:140])
        assert 0.002 < dark / (page.image.width * page.image.height) < 1.0, page.id
        margin = page.image.crop((0, page.image.height - 8, page.image.width, page.image.height)).convert("L")
        low, high = margin.getextrema()
        assert high - low < 60, page.id  # nothing runs over the bottom edge
