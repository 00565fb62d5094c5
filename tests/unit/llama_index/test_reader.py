"""The page reader: documents that nothing in LlamaIndex mixes up, alone and in a directory reader."""

from __future__ import annotations

import json
import logging
import pickle
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from llama_index.core import SimpleDirectoryReader
from llama_index.core.base.llms.types import ImageBlock, TextBlock
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.readers.base import ReaderConfig
from llama_index.core.schema import (
    ImageDocument,
    ImageNode,
    MetadataMode,
)
from llama_index.core.storage.docstore.utils import doc_to_json, json_to_doc
from PIL import Image
from reportlab.pdfgen.canvas import Canvas

from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.llama_index import PageNodes, PageReader, page_from_node
from tests.frameworks.page_folder import pixels, shown

SIZE = (200, 300)


def make_pdf(path: Path, pages: list[str], password: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = Canvas(str(path), pagesize=SIZE, encrypt=password)
    for text in pages:
        canvas.drawString(20, 250, text)
        canvas.showPage()
    canvas.save()
    return path


@pytest.fixture
def folder(tmp_path: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = tmp_path / "reports"
    make_pdf(made / "a.pdf", ["Revenue rose.", "Costs fell."])
    make_pdf(made / "deeper" / "a.pdf", ["Something else."])
    image.save(made / "scan.png")
    return made


# -- the reader alone -------------------------------------------------------------------------------------------------


def test_a_folder_gives_a_document_a_page(folder: Path) -> None:
    documents = PageReader().load_data(folder)
    assert [document.id_ for document in documents] == [
        "a.pdf#page=1", "a.pdf#page=2", "deeper/a.pdf#page=1", "scan.png#page=1",
    ]  # fmt: skip
    assert {type(document) for document in documents} == {ImageDocument}
    first = documents[0]
    assert first.text == "a.pdf#page=1\n\nRevenue rose."
    assert first.ref_doc_id is None, "each page is a document of its own"
    known = {"source": "a.pdf", "file_name": "a.pdf", "page": 1, "page_count": 2, "page_id": "a.pdf#page=1"}
    assert known.items() <= first.metadata.items()
    assert first.metadata["sha256"] == page_from_node(first).sha256, "an index knows the page again"
    assert first.get_metadata_str(MetadataMode.EMBED) == ""
    told = first.get_metadata_str(MetadataMode.LLM).splitlines()
    assert {"file_name: a.pdf", "page: 1"} <= set(told)
    assert not any(line.startswith(("sha256", "page_id", "source", "page_count")) for line in told)
    blocks = first.get_content_blocks(MetadataMode.LLM)
    assert [type(block) for block in blocks][-1] is ImageBlock
    assert isinstance(blocks[0], TextBlock)


def test_pictures_of_pages_are_files_and_image_files_are_their_own(folder: Path, tmp_path: Path) -> None:
    documents = PageReader(image_dir=tmp_path / "pictures").load_data(folder)
    paths = [Path(str(document.image_path)) for document in documents]  # type: ignore[attr-defined]
    assert all(path.is_absolute() and path.is_file() for path in paths)
    assert all(path.is_relative_to(tmp_path / "pictures") for path in paths[:3])
    assert paths[3] == folder / "scan.png"
    assert shown(documents[0]).size[0] * shown(documents[0]).size[1] > 100_000, "rendered for the model, not thumbnails"
    small = PageReader(image_dir=tmp_path / "small", max_pixels=5000).load_data(folder / "a.pdf")
    width, height = shown(small[0]).size
    assert width * height <= 5000
    default = PageReader().load_data(folder / "a.pdf")
    assert str(default[0].image_path).startswith(str(tmp_path / "cache" / "colqwen3-retrievers" / "pages"))  # type: ignore[attr-defined]


def test_reading_twice_gives_the_same(folder: Path) -> None:
    one, other = (PageReader().load_data(folder) for _ in range(2))
    assert [document.to_dict() for document in one] == [document.to_dict() for document in other]
    assert [document.hash for document in one] == [document.hash for document in other]
    assert len({document.hash for document in one}) == len(one)


def test_documents_survive_json_and_pickle(folder: Path) -> None:
    for document in PageReader().load_data(folder):
        for again in (json_to_doc(json.loads(json.dumps(doc_to_json(document)))), pickle.loads(pickle.dumps(document))):
            assert (again.id_, again.hash, again.metadata) == (document.id_, document.hash, document.metadata)
            assert np.array_equal(np.asarray(shown(again)), np.asarray(shown(document)))


def test_sources_are_relative_to_a_root(folder: Path) -> None:
    documents = PageReader(root=folder.parent).load_data([folder / "a.pdf", folder / "deeper"])
    assert {document.metadata["source"] for document in documents} == {"reports/a.pdf", "reports/deeper/a.pdf"}


def test_what_cannot_be_read_raises_or_is_skipped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "b.pdf").write_bytes(b"%PDF-1.4 broken")
    with pytest.raises(PageError, match=r"b\.pdf"):
        PageReader().load_data(folder)
    with caplog.at_level(logging.WARNING):
        assert len(PageReader(on_error="skip").load_data(folder)) == 4
    assert "b.pdf" in caplog.text
    with pytest.raises(PageError, match="nothing"):
        PageReader().load_data(folder / "nothing")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"max_pixels": "many"}, "max_pixels"), ({"on_error": "keep"}, "on_error"), ({"password": 3}, "password")],
    ids=str,
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}: "):
        PageReader(**arguments)


def test_a_bad_pixel_bound_is_told_when_reading(folder: Path) -> None:
    with pytest.raises(ConfigError, match="max_pixels"):
        PageReader(max_pixels=0).load_data(folder)


def test_a_password_opens_a_file_and_is_written_nowhere(folder: Path) -> None:
    path = make_pdf(folder / "locked.pdf", ["Secret."], password="sesame-7")
    reader = PageReader(password="sesame-7")
    assert reader.load_data(path)[0].text.endswith("Secret.")
    for written in (repr(reader), str(reader), str(reader.to_dict()), reader.to_json(), str(pickle.dumps(reader))):
        assert "sesame-7" not in written
    assert pickle.loads(pickle.dumps(reader)).password is None
    with pytest.raises(ConfigError) as caught:
        PageReader(password="sesame-7", max_pixels="x")  # type: ignore[arg-type]
    assert "sesame-7" not in str(caught.value)
    with pytest.raises(PageError, match="password"):
        PageReader().load_data(path)


def test_settings_survive_serialisation(tmp_path: Path) -> None:
    reader = PageReader(image_dir=tmp_path, root="/data", max_pixels=1000, on_error="skip")
    for again in (PageReader.from_dict(reader.to_dict()), PageReader.from_json(reader.to_json()),
                  pickle.loads(pickle.dumps(reader)), reader.model_copy()):  # fmt: skip
        assert again == reader
    assert PageReader.class_name() == "PageReader"


def test_it_reads_for_a_pipeline(folder: Path) -> None:
    config = ReaderConfig(reader=PageReader(), reader_args=[str(folder)])
    nodes = IngestionPipeline(readers=[config], transformations=[PageNodes()]).run()
    assert [node.ref_doc_id for node in nodes] == [document.id_ for document in PageReader().load_data(folder)]
    assert {type(node) for node in nodes} == {ImageNode}


# -- in a directory reader --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [None, 2])
def test_it_reads_for_a_directory_reader(folder: Path, workers: int | None) -> None:
    reader = SimpleDirectoryReader(
        str(folder), recursive=True, file_extractor={".pdf": PageReader(), ".png": PageReader()}, raise_on_error=True
    )
    documents = reader.load_data(num_workers=workers)
    name = folder.as_posix()
    assert sorted(document.id_ for document in documents) == sorted(
        f"{name}/{page}" for page in ("a.pdf#page=1", "a.pdf#page=2", "deeper/a.pdf#page=1", "scan.png#page=1")
    ), "two files of one name keep their pages apart"
    first = next(document for document in documents if document.id_ == f"{name}/a.pdf#page=2")
    assert first.metadata["file_path"] == f"{name}/a.pdf"
    assert first.metadata["file_size"] > 0
    assert (first.metadata["page"], first.text.splitlines()[-1]) == (2, "Costs fell.")
    told = first.get_metadata_str(MetadataMode.LLM).splitlines()
    assert f"source: {name}/a.pdf" in told, "the directory reader hides the file's name"
    assert "page: 2" in told
    assert not any(line.startswith(("file_path", "file_size", "creation", "sha256")) for line in told)
    assert first.get_metadata_str(MetadataMode.EMBED) == ""
    assert shown(first).size[0] > 100


def test_a_directory_readers_metadata_come_first(folder: Path) -> None:
    def told(path: str) -> dict[str, Any]:
        return {"author": "Ada", "file_name": "renamed", "page": 99, "sha256": "0", "page_id": "x"}

    (document, _) = SimpleDirectoryReader(
        input_files=[folder / "a.pdf"], file_extractor={".pdf": PageReader(root=folder)}, file_metadata=told
    ).load_data()
    assert {"author": "Ada", "file_name": "renamed", "page": 1, "page_id": "a.pdf#page=1"}.items() <= (
        document.metadata.items()
    )
    assert len(document.metadata["sha256"]) == 64
    assert document.id_ == "a.pdf#page=1"


def test_it_reads_from_another_file_system(folder: Path, image: Image.Image) -> None:
    fs = MemoryFileSystem()
    for name in ("a.pdf", "scan.png"):
        fs.pipe(f"/bucket/{name}", (folder / name).read_bytes())
    reader = SimpleDirectoryReader(
        "/bucket", fs=fs, file_extractor={".pdf": PageReader(), ".png": PageReader()}, raise_on_error=True
    )
    documents = reader.load_data()
    assert [document.id_ for document in documents] == [
        "/bucket/a.pdf#page=1", "/bucket/a.pdf#page=2", "/bucket/scan.png#page=1",
    ]  # fmt: skip
    assert np.array_equal(pixels(shown(documents[2])), pixels(image))
    with pytest.raises(PageError, match="gone"):
        PageReader().load_data("/bucket/gone.pdf", fs=fs)


def test_documents_of_the_reader_become_nodes(folder: Path) -> None:
    documents = PageReader().load_data(folder)
    before = [document.to_dict() for document in documents]
    nodes = PageNodes()(documents)
    assert [document.to_dict() for document in documents] == before
    for node, document in zip(nodes, documents, strict=True):
        assert type(node) is ImageNode
        assert (node.ref_doc_id, node.text, node.metadata) == (document.id_, document.text, document.metadata)
        assert node.get_metadata_str(MetadataMode.LLM) == document.get_metadata_str(MetadataMode.LLM)
        assert page_from_node(node).sha256 == page_from_node(document).sha256 == node.metadata["sha256"]


def test_extra_info_becomes_json_values(folder: Path, tmp_path: Path) -> None:
    extra = {"year": np.int64(2024), "day": date(2024, 5, 1), "from": Path("reports")}
    for document in PageReader(image_dir=str(tmp_path / "images")).load_data(folder, extra):
        assert [document.metadata[name] for name in extra] == [2024, "2024-05-01", "reports"]
    with pytest.raises(ConfigError, match="extra_info: metadata must be JSON values by name: 'day': "):
        PageReader(image_dir=str(tmp_path / "images")).load_data(folder, {"day": float("nan")})
