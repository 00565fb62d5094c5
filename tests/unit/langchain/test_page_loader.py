"""Pages from files as documents, the keys `index()` tells them by, and the tool that shows them to an agent."""

from __future__ import annotations

import asyncio
import base64
import copy
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from colqwen3_retrievers import load_pages
from colqwen3_retrievers.errors import ConfigError, EncodeError, PageError
from tests.hashing import HashingEncoder, picture

pytest.importorskip("langchain_core")
from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document
from langchain_core.messages import ToolMessage
from langchain_core.retrievers import BaseRetriever

from colqwen3_retrievers.langchain import (
    ColQwen3Retriever,
    ColQwen3VectorStore,
    PageLoader,
    create_page_retriever_tool,
    page_key_encoder,
)
from colqwen3_retrievers.langchain.documents import document_image, document_to_page, page_to_document


def tiff(path: Path, *seeds: int) -> Path:
    first, *others = [picture(seed) for seed in seeds]
    first.save(path, save_all=True, append_images=others)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "reports"
    made.mkdir()
    picture(1).save(made / "a.png")
    tiff(made / "b.tif", 2, 3)
    return made


# -- loader ------------------------------------------------------------------------------------------------------------


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


# -- keys --------------------------------------------------------------------------------------------------------------


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


# -- tool --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def retriever(tmp_path: Path) -> Iterator[ColQwen3Retriever]:
    encoder = HashingEncoder()
    with ColQwen3VectorStore(tmp_path / "index", encoder) as store:
        store.add_images([picture(1), picture(2)], [{"source": "a.pdf", "page": n} for n in (1, 2)], texts=["tax", ""])
        yield ColQwen3Retriever(index=store.index, k=2)
    encoder.threads.shutdown()


def call(query: Any) -> dict[str, Any]:
    return {"name": "search_pages", "args": {"query": query}, "id": "call-1", "type": "tool_call"}


def test_a_tool_message_shows_each_page_after_its_name(retriever: ColQwen3Retriever) -> None:
    tool = create_page_retriever_tool(retriever, "search_pages", "Search.")
    assert (tool.name, tool.description, list(tool.args)) == ("search_pages", "Search.", ["query"])
    for message in (tool.invoke(call("tax")), asyncio.run(tool.ainvoke(call("tax")))):
        assert isinstance(message, ToolMessage)
        blocks = message.content_blocks
        assert [block["type"] for block in blocks] == ["text", "image", "text", "image"]
        assert [blocks[0]["text"], blocks[2]["text"]] == [
            f"[{n}] {document.metadata['citation']}" for n, document in enumerate(message.artifact, start=1)
        ]
        shown = [Image.open(io.BytesIO(base64.b64decode(block["base64"]))) for block in (blocks[1], blocks[3])]
        wanted = [picture(document.metadata["page"]) for document in message.artifact]
        assert [image.tobytes() for image in shown] == [image.tobytes() for image in wanted]
        assert message.artifact == retriever.invoke("tax")


def test_max_images_and_no_page(retriever: ColQwen3Retriever) -> None:
    one = create_page_retriever_tool(retriever, "search_pages", "Search.", max_images=1).invoke(call("tax"))
    assert [block["type"] for block in one.content_blocks] == ["text", "image", "text"]
    none = ColQwen3Retriever(index=retriever.index, filter={"source": "nobody"})
    message = create_page_retriever_tool(none, "search_pages", "Search.").invoke(call("tax"))
    assert message.content_blocks == [{"type": "text", "text": "No page was found."}]
    assert message.artifact == []


def test_a_bad_question_goes_back_to_the_model_and_a_broken_retriever_does_not(retriever: ColQwen3Retriever) -> None:
    tool = create_page_retriever_tool(retriever, "search_pages", "Search.")
    for message in (tool.invoke(call(" ")), asyncio.run(tool.ainvoke(call("")))):
        assert message.status == "error"
        assert "expected words to look for" in str(message.content)

    class Failing(BaseRetriever):
        error: Any

        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
            raise self.error

    too_long = create_page_retriever_tool(Failing(error=EncodeError("too long")), "search_pages", "Search.")
    assert too_long.invoke(call("x")).content == asyncio.run(too_long.ainvoke(call("x"))).content == "too long"
    broken = create_page_retriever_tool(Failing(error=ConfigError("where: ...")), "search_pages", "Search.")
    for ask in (lambda: broken.invoke(call("x")), lambda: asyncio.run(broken.ainvoke(call("x")))):
        with pytest.raises(ConfigError, match="where"):
            ask()


def test_what_makes_no_tool_is_refused(retriever: ColQwen3Retriever) -> None:
    with pytest.raises(ConfigError, match="retriever: expected a LangChain retriever, got str"):
        create_page_retriever_tool("x", "a", "b")
    with pytest.raises(ConfigError, match="max_images"):
        create_page_retriever_tool(retriever, "a", "b", max_images=-1)


# -- technical keys ----------------------------------------------------------------------------------------------------


def test_nothing_technical_stands_in_what_models_read(retriever: ColQwen3Retriever) -> None:
    for document in retriever.invoke("tax"):
        assert document_image(document) == document.metadata["image_path"]
        for key in ("sha256", "image_path", "score"):
            assert str(document.metadata[key]) not in document.page_content
        assert not any(key.startswith("_") for key in document.metadata)
    kept = Document("wine", metadata={"page": 1})
    store = ColQwen3VectorStore(retriever.index)
    store.add_documents([kept], ids=["k"])
    assert retriever.index.get(["k"])[0].page.text == "wine"  # what is encoded has no metadata in it
    assert store.get_by_ids(["k"])[0].metadata == {"page": 1}
    assert page_to_document(retriever.index.get(["k"])[0].page, 2.0).metadata == {"page": 1, "score": 2.0}
