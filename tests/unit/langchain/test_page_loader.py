"""Pages from files as documents."""

from __future__ import annotations

import asyncio
import copy
import io
import json
import pickle
from pathlib import Path

import pytest
from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document
from PIL import Image

from colqwen3_retrievers import load_pages
from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.langchain import PageLoader
from colqwen3_retrievers.langchain.documents import document_to_page
from tests.hashing import picture


def test_each_page_is_a_document_that_survives_json(folder: Path) -> None:
    loader = PageLoader(folder)
    assert isinstance(loader, BaseLoader)
    documents = loader.load()
    assert [document.id for document in documents] == ["a.png#page=1", "b.tif#page=1", "b.tif#page=2"]
    assert [document.page_content for document in documents] == ["a.png, page 1", "b.tif, page 1", "b.tif, page 2"]
    for document, page in zip(documents, load_pages(folder), strict=True):
        assert json.loads(json.dumps(document.metadata)) == document.metadata
        again = document_to_page(Document.model_validate_json(document.model_dump_json()), "x")
        assert again.sha256 == page.sha256 == document.metadata["sha256"]
        assert document.metadata.items() >= {"source": page.source, "page": page.number, **page.metadata}.items()
    assert documents[0].metadata["image_path"] == str(folder / "a.png")
    assert "image" not in documents[0].metadata
    assert "image_path" not in documents[1].metadata


def test_named_bytes_and_file_objects_are_loaded(folder: Path) -> None:
    data = (folder / "a.png").read_bytes()
    for given in (("up/a.png", data), [("up/a.png", io.BytesIO(data))]):
        (document,) = PageLoader(given).load()
        assert document.id == "up/a.png#page=1"
        assert document_to_page(document, "x").sha256 == document.metadata["sha256"]
    with (folder / "a.png").open("rb") as file:
        assert [document.id for document in PageLoader(file).load()] == ["a.png#page=1"]


def test_images_dir_keeps_rendered_pages_as_files(folder: Path, tmp_path: Path) -> None:
    loader = PageLoader(folder, images_dir=tmp_path / "images")
    documents = loader.load()
    files = [Path(document.metadata["image_path"]) for document in documents]
    assert files[0] == folder / "a.png"
    assert {file.parent for file in files[1:]} == {tmp_path / "images"}
    assert [Image.open(file).tobytes() for file in files] == [picture(n).tobytes() for n in (1, 2, 3)]
    assert not any("image" in document.metadata for document in documents)
    times = [file.stat().st_mtime_ns for file in files]
    assert loader.load() == documents
    assert [file.stat().st_mtime_ns for file in files] == times
    assert len(list((tmp_path / "images").iterdir())) == 2
    (tmp_path / "file").write_text("x")
    with pytest.raises(PageError, match=r"b\.tif, page 1: its image cannot be written"):
        PageLoader(folder, images_dir=tmp_path / "file").load()


def test_pages_are_read_as_they_are_asked_for(folder: Path) -> None:
    documents = PageLoader([folder / "a.png", folder / "b.tif"]).lazy_load()
    assert next(documents).id == "a.png#page=1"
    (folder / "b.tif").unlink()
    with pytest.raises(PageError, match=r"b\.tif"):
        next(documents)


def test_async_loading_leaves_the_loop_free(folder: Path) -> None:
    async def main() -> list[str | None]:
        return [document.id async for document in PageLoader(folder).alazy_load()]

    assert asyncio.run(main()) == ["a.png#page=1", "b.tif#page=1", "b.tif#page=2"]
    assert len(asyncio.run(PageLoader(folder).aload())) == 3


def test_bad_files(folder: Path) -> None:
    (folder / "aa.png").write_bytes(b"not a picture")
    with pytest.raises(PageError, match=r"aa\.png"):
        PageLoader(folder).load()
    assert len(PageLoader(folder, on_error="skip").load()) == 3
    seen: list[PageError] = []
    assert len(PageLoader(folder, on_error=seen.append).load()) == 3
    assert [error.source for error in seen] == ["aa.png"]
    with pytest.raises(PageError, match="nothing-here"):
        PageLoader(folder / "nothing-here").load()
    for wrong in (7, None, b"a"):
        with pytest.raises(ConfigError, match="paths: expected"):
            PageLoader(wrong)
    with pytest.raises(ConfigError, match="max_pixels"):
        PageLoader(folder, max_pixels=0).load()


def test_the_password_is_nowhere_to_be_seen(folder: Path) -> None:
    loader = PageLoader([folder], password="geheim")
    assert "geheim" not in repr(loader)
    assert b"geheim" not in pickle.dumps(loader)
    assert "geheim" not in str(vars(copy.copy(loader)))
    assert pickle.loads(pickle.dumps(loader)).load() == loader.load()
