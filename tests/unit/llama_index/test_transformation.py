"""The page-node transformation: nodes that nothing in LlamaIndex mixes up."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.schema import Document, ImageDocument, ImageNode, MediaResource, MetadataMode, Node, TextNode
from llama_index.core.storage.docstore.utils import doc_to_json, json_to_doc

from colqwen3_retrievers.errors import EncodeError
from colqwen3_retrievers.llama_index import PageNodes, page_from_node
from tests.frameworks.page_folder import base64_of, pixels, shown

CARRIERS: dict[str, Any] = {
    "ImageNode, path": lambda path: ImageNode(id_="n", image_path=str(path)),
    "ImageNode, base64": lambda path: ImageNode(id_="n", image=base64_of(path)),
    "Node, bytes": lambda path: Node(id_="n", image_resource=MediaResource(data=path.read_bytes())),
    "ImageDocument, base64": lambda path: ImageDocument(
        id_="n", image=base64_of(path)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CARRIERS)
def test_any_picture_becomes_a_node_that_survives(kind: str, file: Path) -> None:
    (node,) = PageNodes()([CARRIERS[kind](file)])
    again = json_to_doc(json.loads(json.dumps(doc_to_json(node))))
    assert type(again) is ImageNode
    assert again.text == "n"
    assert again.metadata["sha256"] == page_from_node(again).sha256
    assert again.get_metadata_str(MetadataMode.EMBED) == ""
    assert again.get_metadata_str(MetadataMode.LLM) == "page_id: n", "the picture is given with its label"
    assert np.array_equal(pixels(shown(again)), pixels(file))
    assert again.ref_doc_id == ("n" if kind.startswith("ImageDocument") else None)


def test_the_same_again_changes_nothing(file: Path) -> None:
    once = PageNodes()([CARRIERS[kind](file) for kind in CARRIERS])
    assert [node.to_dict() for node in PageNodes()(once)] == [node.to_dict() for node in once]


def test_texts_pass() -> None:
    node = TextNode(text="Revenue rose.")
    document = Document(id_="d", text="Costs fell.", metadata={"year": 2024}, excluded_llm_metadata_keys=["year"])
    same, made = PageNodes()([node, document])
    assert same is node
    assert (type(made), made.get_content(), made.metadata, made.ref_doc_id) == (
        TextNode, "Costs fell.", {"year": 2024}, "d",
    )  # fmt: skip
    assert made.excluded_llm_metadata_keys == ["year"]
    assert asyncio.run(PageNodes().acall([node])) == [node]


def test_bad_pictures_raise_or_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = [
        ImageNode(id_="remote", image_url="https://example.org/a.png"),
        ImageNode(id_="gone", image_path=str(tmp_path / "gone.png")),
        ImageNode(id_="no base64", image="???"),
    ]
    for node in bad:
        with pytest.raises(EncodeError, match=r"^input 1: ") as caught:
            PageNodes()([TextNode(text="x"), node])
        assert caught.value.index == 1
    with caplog.at_level(logging.WARNING):
        assert len(PageNodes(on_error="skip")([*bad, TextNode(text="x")])) == 1
    assert [record.args[0] for record in caplog.records] == ["remote", "gone", "no base64"]  # type: ignore[index]


def test_its_settings_survive_and_no_two_calls_look_the_same() -> None:
    made = PageNodes(on_error="skip")
    assert made.to_dict() != made.to_dict()
    for again in (PageNodes.from_dict(made.to_dict()), pickle.loads(pickle.dumps(made))):
        assert again == made
