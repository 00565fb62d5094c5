"""Keys that tell `index()` one page from another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from PIL import Image

from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.langchain import PageLoader, page_key_encoder
from tests.hashing import picture


def test_a_key_is_of_the_page_and_not_of_its_file(folder: Path, tmp_path: Path) -> None:
    one = PageLoader(folder).load()
    two = PageLoader(folder, images_dir=tmp_path / "images").load()
    assert [page_key_encoder(document) for document in one] == [page_key_encoder(document) for document in two]
    keys = [page_key_encoder(document) for document in one]
    assert len(set(keys)) == 3
    assert keys[0].startswith("a.png#page=1@")
    (tmp_path / "moved.png").write_bytes((folder / "a.png").read_bytes())
    moved = Document(one[0].page_content, id=one[0].id, metadata={**one[0].metadata, "score": 3.0})
    moved.metadata["image_path"] = str(tmp_path / "moved.png")
    assert page_key_encoder(moved) == keys[0]


@pytest.mark.parametrize(
    "change",
    [{"id": "x"}, {"page_content": "y"}, {"metadata": {"year": 2021}}, {"metadata": {"year": 2020, "image": b"2"}}],
)
def test_whatever_counts_changes_the_key(change: dict[str, Any]) -> None:
    plain = {"id": "a", "page_content": "t", "metadata": {"year": 2020, "image": b"1"}}
    assert page_key_encoder(Document(**plain)) != page_key_encoder(Document(**{**plain, **change}))


def test_pictures_in_memory_have_keys_by_their_pixels() -> None:
    keys = [page_key_encoder(Document("", metadata={"image": picture(n)})) for n in (1, 2, 1)]
    assert keys[0] == keys[2] != keys[1]
    wide, high = Image.new("RGB", (8, 4)), Image.new("RGB", (4, 8))
    assert page_key_encoder(Document("", metadata={"image": wide})) != page_key_encoder(
        Document("", metadata={"image": high})
    )


def test_what_has_no_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="document 'a': metadata must be JSON"):
        page_key_encoder(Document("x", id="a", metadata={"blob": b"1"}))
    with pytest.raises(PageError, match=r"gone\.png"):
        page_key_encoder(Document("x", metadata={"image_path": "/nowhere/gone.png"}))
    with pytest.raises(ConfigError, match="not fetched"):
        page_key_encoder(Document("x", metadata={"image_path": "https://example.com/a.png"}))
