"""Hits as nodes and nodes as pages: every way LlamaIndex carries a picture, and what must survive the journey."""

from __future__ import annotations

import base64
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.base.llms.types import ImageBlock, TextBlock
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageDocument,
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    QueryBundle,
    TextNode,
)
from llama_index.core.storage.docstore.utils import doc_to_json, json_to_doc

from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.llama_index import node_from_hit, page_from_node
from colqwen3_retrievers.llama_index.nodes import query_from_bundle
from colqwen3_retrievers.pages.page import Hit, Page
from tests.frameworks.page_folder import base64_of, pixels


def image_page(file: Path, **changes: Any) -> Page:
    return Page(source="reports/a.pdf", number=2, label="ii", image=file, text="Revenue rose.").replace(**changes)


# -- hit to node ------------------------------------------------------------------------------------------------------


def test_a_page_with_a_picture_is_an_image_node(file: Path) -> None:
    known = {"file_name": "a.pdf", "page_count": 9, "author": "Ada", "width": 595.3, "height": 841.9}
    page = image_page(file, metadata=known)
    found = node_from_hit(Hit(page, np.float32(3.5)))  # type: ignore[arg-type]
    node = found.node
    assert isinstance(node, ImageNode)
    assert type(found.score) is float
    assert (node.node_id, found.score, node.image_path, node.image_mimetype) == (
        "reports/a.pdf#page=2", 3.5, str(file), "image/png",
    )  # fmt: skip
    assert node.metadata == {
        "page_id": "reports/a.pdf#page=2", "source": "reports/a.pdf", "file_name": "a.pdf", "page": 2,
        "page_label": "ii", "page_count": 9, "author": "Ada", "width": 595.3, "height": 841.9, "sha256": page.sha256,
    }  # fmt: skip
    assert node.ref_doc_id == "reports/a.pdf"
    assert node.text == "reports/a.pdf#page=2\n\nRevenue rose."


def test_sizes_come_from_the_picture_when_the_page_tells_none(file: Path) -> None:
    assert {"width": 64, "height": 48}.items() <= node_from_hit(Hit(image_page(file), 1.0)).metadata.items()


def test_the_model_is_told_what_a_reader_would_cite_and_nothing_technical(file: Path) -> None:
    node = node_from_hit(Hit(image_page(file, metadata={"author": "Ada", "file_name": "a.pdf"}), 1.0)).node
    told = node.get_metadata_str(MetadataMode.LLM).splitlines()
    assert sorted(told) == ["author: Ada", "file_name: a.pdf", "page: 2", "page_label: ii"]
    unnamed = node_from_hit(Hit(image_page(file), 1.0)).node.get_metadata_str(MetadataMode.LLM).splitlines()
    assert sorted(unnamed) == ["page: 2", "page_label: ii", "source: reports/a.pdf"]
    assert node.get_metadata_str(MetadataMode.EMBED) == ""
    blocks = node.get_content_blocks(MetadataMode.LLM)
    assert [type(block) for block in blocks] == [TextBlock, ImageBlock]
    assert blocks[1].resolve_image().read() == file.read_bytes()  # type: ignore[attr-defined]


def test_what_other_views_of_an_index_keep_is_not_shown() -> None:
    page = Page(source="a.txt", text="Revenue rose.", metadata={"_langchain": "text", "year": 2024})
    assert node_from_hit(Hit(page, 1.0)).metadata.keys() == {"year", "page_id", "page", "sha256", "source"}


def test_a_text_page_is_a_text_node() -> None:
    node = node_from_hit(Hit(Page(source="a.txt", text="Revenue rose."), 1.0)).node
    assert type(node) is TextNode
    assert node.text == "Revenue rose."


def test_inline_images_carry_the_file_in_base64(file: Path) -> None:
    node = node_from_hit(Hit(image_page(file), 1.0), inline_image=True).node
    assert isinstance(node, ImageNode)
    assert node.image is not None
    assert base64.b64decode(node.image) == file.read_bytes()
    assert node.image_path == str(file)


@pytest.mark.parametrize("harm", [lambda file: file.unlink(), lambda file: file.write_bytes(b"not an image")])
def test_a_picture_that_is_not_at_hand_leaves_a_text_node_and_a_warning(
    file: Path, harm: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    page = image_page(file, sha256="ab")
    harm(file)
    with caplog.at_level(logging.WARNING):
        nodes = [node_from_hit(Hit(page.replace(text=text, sha256="ab"), 1.0)).node for text in ("Revenue rose.", "")]
    assert [type(node) for node in nodes] == [TextNode, TextNode]
    assert [node.get_content() for node in nodes] == ["Revenue rose.", "reports/a.pdf#page=2"]
    assert len(caplog.records) == 2
    assert all("reports/a.pdf#page=2" in record.getMessage() for record in caplog.records)
    assert [page_from_node(node).text for node in nodes] == ["Revenue rose.", ""], "an id is not something to rank by"


def test_nodes_survive_json(file: Path) -> None:
    found = node_from_hit(Hit(image_page(file), 1.0))
    json.dumps(found.to_dict())
    again = json_to_doc(json.loads(json.dumps(doc_to_json(found.node))))
    assert again.hash == found.node.hash
    assert again == found.node


# -- node to page -----------------------------------------------------------------------------------------------------

CARRIERS: dict[str, Callable[[Path], BaseNode]] = {
    "ImageNode, base64": lambda file: ImageNode(image=base64_of(file)),
    "ImageNode, base64 in lines": lambda file: ImageNode(image=base64.encodebytes(file.read_bytes()).decode()),
    "ImageNode, data URL": lambda file: ImageNode(image_url=f"data:image/png;base64,{base64_of(file)}"),
    "ImageNode, data URL as base64": lambda file: ImageNode(image=f"data:image/png;base64,{base64_of(file)}"),
    "ImageNode, path": lambda file: ImageNode(image_path=str(file)),
    "ImageDocument, base64": lambda file: ImageDocument(image=base64_of(file)),
    "ImageDocument, path": lambda file: ImageDocument(image_path=str(file)),
    "Node, bytes": lambda file: Node(image_resource=MediaResource(data=file.read_bytes())),
    "Node, base64": lambda file: Node(image_resource=MediaResource(data=base64_of(file).encode())),
    "Node, path": lambda file: Node(image_resource=MediaResource(path=file)),
    "Node, data URL": lambda file: Node(
        image_resource=MediaResource(url=f"data:image/png;base64,{base64_of(file)}")  # type: ignore[arg-type]
    ),
    "Document with an image": lambda file: Document(text="x", image_resource=MediaResource(path=file)),
}


@pytest.mark.parametrize("kind", CARRIERS)
def test_every_carrier_of_a_picture_gives_its_pixels(kind: str, file: Path) -> None:
    node = CARRIERS[kind](file)
    page = page_from_node(node)
    assert page.id == node.node_id
    assert page.image is not None
    assert np.array_equal(pixels(page.image), pixels(file))


@pytest.mark.parametrize(
    "node",
    [
        TextNode(text="Revenue rose.", metadata={"year": 2024, "secret": 1}, excluded_embed_metadata_keys=["secret"]),
        IndexNode(
            text="Revenue rose.", index_id="i", metadata={"year": 2024, "s": 1}, excluded_embed_metadata_keys=["s"]
        ),
        Node(text_resource=MediaResource(text="Revenue rose."), metadata={"year": 2024}),
        Document(text="Revenue rose.", metadata={"year": 2024}),
    ],
    ids=lambda node: type(node).__name__,
)
def test_texts_come_as_embedding_models_get_them(node: BaseNode) -> None:
    page = page_from_node(node)
    assert page.text == "year: 2024\n\nRevenue rose."
    assert page.image_source is None


@pytest.mark.parametrize("text", ["", "  \n"])
def test_metadata_alone_is_no_text(text: str, file: Path) -> None:
    assert page_from_node(TextNode(text=text, metadata={"file_name": "a.pdf"})).text == ""
    assert page_from_node(ImageNode(text=text, image_path=str(file), metadata={"file_name": "a.pdf"})).text == ""


def test_a_node_of_ours_gives_back_the_page_the_index_encoded(file: Path) -> None:
    for page in [image_page(file), image_page(file, text=""), Page(source="a.txt", text="Revenue rose.")]:
        again = page_from_node(node_from_hit(Hit(page, 1.0)).node)
        assert (again.id, again.text, again.sha256) == (page.id, page.text, page.sha256)


@pytest.mark.parametrize(
    "node",
    [
        ImageNode(id_="n", image_url="https://example.org/a.png"),
        Node(id_="n", image_resource=MediaResource(url="https://example.org/a.png")),  # type: ignore[arg-type]
    ],
    ids=lambda node: type(node).__name__,
)
def test_trap_l18_an_image_url_is_refused_and_never_fetched(node: BaseNode) -> None:
    with pytest.raises(ConfigError, match=r"'n'.*not fetched"):
        page_from_node(node)


def test_what_is_not_base64_is_told_with_the_node() -> None:
    with pytest.raises(PageError, match="n: the image is not base64"):
        page_from_node(ImageNode(id_="n", image="???"))


# -- queries ----------------------------------------------------------------------------------------------------------


def test_a_bundle_asks_by_text_by_picture_or_by_both(file: Path) -> None:
    assert query_from_bundle(QueryBundle("revenue")).image is None
    both = query_from_bundle(QueryBundle("revenue", image_path=str(file)))
    assert (both.text, both.image) == ("revenue", str(file))
    alone = query_from_bundle(QueryBundle(" ", image_path=str(file)))
    assert (alone.text, alone.image) == (None, str(file))


@pytest.mark.parametrize("bundle", [None, QueryBundle(""), QueryBundle("  ")])
def test_no_query_is_a_value_error(bundle: QueryBundle | None) -> None:
    with pytest.raises(ValueError, match="query"):
        query_from_bundle(bundle)


# -- the package ------------------------------------------------------------------------------------------------------


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_no_framework() -> None:
    code = (
        "import sys; import colqwen3_retrievers.llama_index as l; dir(l); "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'llama_index', 'torch', 'numpy', 'pydantic'}))"
    )
    assert run_python(code) == "[]"


def test_without_the_framework_the_error_is_the_pip_line() -> None:
    code = (
        "import sys; sys.modules['llama_index'] = None\n"
        "sys.modules['llama_index.core'] = None\n"
        "try:\n    from colqwen3_retrievers.llama_index import ColQwen3Reranker\n"
        "except ImportError as exc:\n    print(type(exc).__name__, exc)"
    )
    assert run_python(code) == (
        'MissingExtraError llama-index-core is not installed: pip install "colqwen3-retrievers[llama-index]"'
    )


def test_names_are_listed_and_others_are_not_there() -> None:
    from colqwen3_retrievers import llama_index

    for name in dir(llama_index):
        assert getattr(llama_index, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llama_index.nothing
