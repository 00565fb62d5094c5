from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from langchain_core.documents import Document
from PIL import Image

from colqwen3_retrievers import Page
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.langchain.documents import (
    citation,
    document_citation,
    document_image,
    document_text,
    document_to_page,
    page_to_document,
)
from tests.frameworks.scans import png

PNG = png(Image.new("RGB", (8, 6), "red"))
ENCODED = base64.b64encode(PNG).decode()
FORGED = {
    "source": "forged", "page": 99, "sha256": "0", "image_path": "/etc/passwd", "score": 1, "relevance_score": 1,
}  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "page.png").write_bytes(PNG)
    return tmp_path / "page.png"


def test_a_page_becomes_a_document(path: Path) -> None:
    page = Page(
        source="reports/a.pdf", number=3, label="iii", image=path, text="Revenue rose.",
        metadata={"page_count": 9, "year": 2020},
    )  # fmt: skip
    document = page_to_document(page, score=7.5)
    assert type(document) is Document
    assert document.id == "reports/a.pdf#page=3"
    assert document.page_content == "reports/a.pdf, page 3 (iii)\n\nRevenue rose."
    assert document.metadata == {
        "source": "reports/a.pdf", "file_name": "a.pdf", "page": 3, "page_label": "iii", "page_count": 9, "year": 2020,
        "citation": "reports/a.pdf, page 3 (iii)", "sha256": page.sha256, "image_path": str(path), "score": 7.5,
    }  # fmt: skip


def test_c4_no_two_pages_share_a_content() -> None:
    blank = "This page is intentionally left blank."
    pages = [
        Page(source="a.pdf", number=1, label="1", text=blank), Page(source="a.pdf", number=2, label="1", text=blank),
        Page(source="b.pdf", number=1, text=blank), Page(source="b.pdf", number=2), Page(source="b.pdf", number=3),
        Page(id="x", source="b.pdf", number=3), Page(id="y"), Page(id="z", text=" \n"),
    ]  # fmt: skip
    contents = [page_to_document(page).page_content for page in pages]
    assert len(set(contents)) == len(pages)
    assert all(content.strip() for content in contents)


def test_c5_metadata_is_json_even_from_an_image_in_memory() -> None:
    document = page_to_document(Page(source="a.pdf", image=Image.new("RGB", (4, 4))), score=1.0)
    assert json.loads(json.dumps(document.metadata)) == document.metadata
    assert "image_path" not in document.metadata


def test_what_the_page_says_of_itself_beats_its_metadata() -> None:
    document = page_to_document(Page(source="a.pdf", text="x", metadata=FORGED))
    assert document.metadata["source"] == "a.pdf"
    assert document.metadata["page"] == 1
    assert not {"image_path", "score", "relevance_score"} & document.metadata.keys()


def test_a_page_without_a_source_is_named_by_its_id() -> None:
    document = page_to_document(Page(id="folder/note 7", text="x"))
    assert (document.metadata["source"], document.metadata["citation"]) == ("folder/note 7", "folder/note 7")


def test_an_image_path_is_absolute(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    assert page_to_document(Page(source="a", image="page.png")).metadata["image_path"] == str(path)


@pytest.mark.parametrize("text", ["", "Revenue rose.", "a.pdf, page 1", "\n\nindented\n", "a.pdf, page 1\n\nagain"])
def test_a_document_goes_back_to_the_same_content(path: Path, text: str) -> None:
    page = Page(source="a.pdf", image=path, text=text)
    again = document_to_page(page_to_document(page), "document 0")
    assert (again.text, again.sha256) == (page.text, page.sha256)


def test_citations() -> None:
    assert citation(Page(source="a.pdf", number=3, label="3")) == "a.pdf, page 3"
    assert document_citation(Document("x", metadata={"source": "a.pdf", "page": 0}), 4) == "a.pdf, page 0"
    assert document_citation(Document("x", metadata={"source": "a.txt"}), 4) == "a.txt"
    assert document_citation(Document("x", id="7"), 4) == "7"
    assert document_citation(Document("x"), 4) == "document 5"


def test_the_text_of_foreign_documents_is_left_alone() -> None:
    assert document_text(Document("  as it is ", metadata={"source": "a"})) == "  as it is "
    assert document_text(Document("x", metadata={"citation": 7})) == "x"


@pytest.mark.parametrize(
    "image",
    [
        PNG,
        ENCODED,
        "\n".join(ENCODED[i : i + 60] for i in range(0, len(ENCODED), 60)),
        f"data:image/png;base64,{ENCODED}",
        f"DATA:image/png;charset=x;base64,{ENCODED}",
        {"type": "image", "base64": ENCODED, "mime_type": "image/png"},
        {"type": "image", "source_type": "base64", "data": ENCODED, "mime_type": "image/png"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{ENCODED}"}},
        {"type": "image_url", "image_url": f"data:image/png;base64,{ENCODED}"},
        {"type": "image", "url": f"data:image/png;base64,{ENCODED}"},
    ],
)
def test_images_are_found_in_every_common_place(image: object) -> None:
    assert document_image(Document("", metadata={"image": image})) == PNG


def test_an_image_path_comes_before_an_image() -> None:
    assert document_image(Document("", metadata={"image_path": "a.png", "image": PNG})) == "a.png"


@pytest.mark.parametrize("metadata", [{}, {"image": None}, {"image": ""}, {"image": b""}, {"image_path": ""}])
def test_no_image(metadata: dict[str, object]) -> None:
    assert document_image(Document("x", metadata=metadata)) is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"image": 7}, "metadata\\['image'\\]: expected base64"),
        ({"image": "page 7.png"}, "a path belongs in metadata\\['image_path'\\]"),
        ({"image": {"type": "image", "file_id": "x"}}, "without base64 data"),
        ({"image": {"type": "image", "url": "https://example.com/a.png"}}, "not fetched"),
        ({"image_path": 7}, "metadata\\['image_path'\\]: expected a path"),
    ],
)
def test_what_is_no_image_is_refused_by_name(metadata: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        document_image(Document("x", metadata=metadata))


def test_a_preview_address_of_a_web_page_leaves_its_text() -> None:
    document = Document("An article.", metadata={"image": "https://example.com/preview.png"})
    assert document_to_page(document, "d").text == "An article."
    with pytest.raises(ConfigError, match="neither a text nor an image"):
        document_to_page(Document(" ", metadata=document.metadata), "d")
