from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage
from PIL import Image

from colqwen3_retrievers import Page
from colqwen3_retrievers.errors import ConfigError, EncodeError
from colqwen3_retrievers.langchain import docs_to_content_blocks
from colqwen3_retrievers.langchain.documents import page_to_document

HALVES = Image.new("RGB", (8, 4), "red")
HALVES.paste("blue", (4, 0, 8, 4))


def write(path: Path, **options: object) -> Path:
    HALVES.save(path, **options)
    return path


def data(block: dict[str, str]) -> bytes:
    return base64.b64decode(block["base64"])


def test_each_image_travels_right_after_its_name(tmp_path: Path) -> None:
    first, second = write(tmp_path / "1.png"), write(tmp_path / "2.webp", lossless=True)
    documents = [
        page_to_document(Page(source="a.pdf", number=1, image=first, text="One.")),
        Document("Plain text.", metadata={"source": "notes.txt"}),
        page_to_document(Page(source="a.pdf", number=2, image=second)),
    ]
    blocks = docs_to_content_blocks(documents)
    assert [block.get("text") for block in blocks] == [
        "[1] a.pdf, page 1", None, "[2] notes.txt\n\nPlain text.", "[3] a.pdf, page 2", None,
    ]  # fmt: skip
    assert (blocks[1]["type"], blocks[1]["mime_type"], data(blocks[1])) == ("image", "image/png", first.read_bytes())
    assert (blocks[4]["type"], blocks[4]["mime_type"], data(blocks[4])) == ("image", "image/webp", second.read_bytes())


def test_langchain_takes_them_for_its_own(tmp_path: Path) -> None:
    blocks = docs_to_content_blocks([page_to_document(Page(source="a", image=write(tmp_path / "a.png")))])
    assert HumanMessage(content_blocks=blocks).content_blocks == blocks


@pytest.mark.parametrize(("most", "images"), [(None, 3), (0, 0), (1, 1), (2, 2), (9, 3)])
def test_beyond_max_images_the_text_goes(tmp_path: Path, most: int | None, images: int) -> None:
    path = write(tmp_path / "a.png")
    documents = [page_to_document(Page(source="a", number=n, image=path, text=f"Text {n}.")) for n in (1, 2, 3)]
    blocks = docs_to_content_blocks(documents, max_images=most)
    assert [block["type"] for block in blocks].count("image") == images
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    assert texts == [f"[{n}] a, page {n}" + (f"\n\nText {n}." if n > images else "") for n in (1, 2, 3)]


def test_images_a_chat_model_may_not_read_go_as_png(tmp_path: Path) -> None:
    for image in (write(tmp_path / "a.bmp"), HALVES.convert("CMYK")):
        block = docs_to_content_blocks(
            [Document("", metadata={"image_path": str(image)} if isinstance(image, Path) else {"image": image})]
        )[1]
        assert block["mime_type"] == "image/png"
        assert Image.open(io.BytesIO(data(block))).format == "PNG"


def test_a_picture_that_lies_on_its_side_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write(tmp_path / "a.jpg", quality=95, exif=exif)
    block = docs_to_content_blocks([Document("", metadata={"image_path": str(path)})])[1]
    upright = Image.open(io.BytesIO(data(block)))
    assert upright.size == (4, 8)
    assert upright.getpixel((1, 1))[0] > 200
    assert upright.getpixel((1, 6))[2] > 200
    assert upright.getexif().get(0x0112, 1) == 1


def test_an_image_that_is_gone_is_sent_as_text_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = {"image_path": str(tmp_path / "gone.png")}
    blocks = docs_to_content_blocks([Document("Revenue rose.", metadata=gone)])
    assert [block["type"] for block in blocks] == ["text"]
    assert "Revenue rose." in blocks[0]["text"]
    assert "document 0 is sent as text" in caplog.text
    with pytest.raises(EncodeError, match=r"document 1: .*gone\.png") as caught:
        docs_to_content_blocks([Document("x"), Document("", metadata=gone)])
    assert caught.value.index == 1


@pytest.mark.parametrize("most", [-1, 1.5, "3"])
def test_max_images_is_a_count(most: object) -> None:
    with pytest.raises(ConfigError, match="max_images"):
        docs_to_content_blocks([], max_images=most)
    assert docs_to_content_blocks([]) == []
