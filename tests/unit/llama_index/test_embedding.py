"""The LlamaIndex embedding: flat vectors of texts, pictures, nodes and questions; multi-vectors by their own names."""

from __future__ import annotations

import asyncio
import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.schema import Document, ImageDocument, ImageNode, MediaResource, Node, TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, MultiVector, Query
from colqwen3_retrievers.errors import ConfigError, EncodeError
from colqwen3_retrievers.llama_index import ColQwen3Embedding
from colqwen3_retrievers.vectors.single_vector import SingleVectorSettings, single_vector
from tests.frameworks.page_folder import base64_of, page_image

DIM = 256


@pytest.fixture
def embedding(encoder: ColQwen3Encoder) -> ColQwen3Embedding:
    return ColQwen3Embedding(encoder=encoder, dim=DIM)


def same(one: list[float], other: Any) -> bool:
    return bool(np.allclose(one, other, atol=1e-5))


def test_vectors_are_those_of_the_bridge(embedding: ColQwen3Embedding, encoder: ColQwen3Encoder, folder: Path) -> None:
    settings = SingleVectorSettings(encoder.info.dim, dim=DIM)
    assert embedding.settings == settings
    made = {
        "query": (embedding.get_query_embedding("revenue"), encoder.encode_queries(["revenue"]), True),
        "text": (embedding.get_text_embedding("revenue"), encoder.encode_texts(["revenue"]), False),
        "image": (embedding.get_image_embedding(str(page_image(folder))), encoder.encode_images([page_image(folder)]),
                  False),
    }  # fmt: skip
    for vector, (multi_vector,), is_query in made.values():
        assert {type(value) for value in vector} == {float}
        assert same(vector, single_vector(multi_vector, settings, is_query=is_query))
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert not same(made["query"][0], made["text"][0]), "a question is made otherwise than a document"


def test_the_other_method(encoder: ColQwen3Encoder) -> None:
    embedding = ColQwen3Embedding(encoder=encoder, dim=DIM, method="directions")
    settings = SingleVectorSettings(encoder.info.dim, dim=DIM, method="directions")
    assert same(embedding.get_text_embedding("x"), single_vector(encoder.encode_texts(["x"])[0], settings))
    assert len(ColQwen3Embedding(encoder=encoder, dim=3, method="directions").get_query_embedding("x")) == 3


def test_pictures_of_every_kind(embedding: ColQwen3Embedding, folder: Path) -> None:
    path = page_image(folder, 1)
    expected = embedding.get_image_embedding(str(path))
    for picture in (path, path.read_bytes(), io.BytesIO(path.read_bytes()), Image.open(path)):
        assert same(embedding.get_image_embedding(picture), expected)  # type: ignore[arg-type]
    assert not same(embedding.get_image_embedding(str(page_image(folder, 2))), expected)


NODES: dict[str, Any] = {
    "ImageNode, path": lambda path: ImageNode(text="caption", image_path=str(path)),
    "ImageNode, base64": lambda path: ImageNode(image=base64_of(path)),
    "ImageDocument": lambda path: ImageDocument(text="caption", image_path=str(path)),
    "Node": lambda path: Node(image_resource=MediaResource(path=path)),
}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_nodes_get_the_vector_of_their_picture_or_else_of_their_text(
    encoder: ColQwen3Encoder, folder: Path, asynchronous: bool
) -> None:
    embedding = ColQwen3Embedding(encoder=encoder, dim=DIM, embed_batch_size=2)
    nodes = [make(page_image(folder)) for make in NODES.values()]
    nodes += [TextNode(text="revenue", metadata={"year": 1, "x": 2}, excluded_embed_metadata_keys=["x"]),
              Document(text="costs")]  # fmt: skip
    made = asyncio.run(embedding.acall(nodes)) if asynchronous else embedding(nodes)
    assert list(made) == nodes
    picture = embedding.get_image_embedding(str(page_image(folder)))
    for node in nodes[: len(NODES)]:
        assert same(node.embedding, picture)
    assert same(nodes[-2].embedding, embedding.get_text_embedding("year: 1\n\nrevenue"))
    assert same(nodes[-1].embedding, embedding.get_text_embedding("costs"))
    assert list(embedding([])) == []


def test_multi_vectors_have_their_own_methods(
    embedding: ColQwen3Embedding, encoder: ColQwen3Encoder, folder: Path
) -> None:
    path = page_image(folder)
    node = ImageNode(text="caption", image_path=str(path))

    async def run() -> list[list[MultiVector]]:
        return [
            await embedding.aget_query_multi_vectors(["x", Query(image=path)]),
            await embedding.aget_text_multi_vectors(["x"]),
            await embedding.aget_image_multi_vectors([path]),
            await embedding.aget_node_multi_vectors([node]),
        ]

    expected = [
        encoder.encode_queries(["x", Query(image=path)]), encoder.encode_texts(["x"]), encoder.encode_images([path]),
        encoder.encode_images([path]),
    ]  # fmt: skip
    made = [
        embedding.get_query_multi_vectors(["x", Query(image=path)]), embedding.get_text_multi_vectors(["x"]),
        embedding.get_image_multi_vectors([path]), embedding.get_node_multi_vectors([node]),
    ]  # fmt: skip
    for answers in (made, asyncio.run(run())):
        for got, wanted in zip(answers, expected, strict=True):
            for one, other in zip(got, wanted, strict=True):
                np.testing.assert_allclose(one.vectors, other.vectors, atol=1e-5)


def test_callbacks_and_events_tell_of_nodes_in_batches(encoder: ColQwen3Encoder, folder: Path) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    embedding = ColQwen3Embedding(
        encoder=encoder, dim=DIM, embed_batch_size=2, callback_manager=CallbackManager([debug])
    )
    embedding([TextNode(text="one"), TextNode(text="two"), ImageNode(text="three", image_path=str(page_image(folder)))])
    ends = [end for _, end in debug.get_event_pairs(CBEventType.EMBEDDING)]
    assert [end.payload[EventPayload.CHUNKS] for end in ends] == [["one", "two"], ["three"]]
    assert [len(end.payload[EventPayload.EMBEDDINGS]) for end in ends] == [2, 1]


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_bad_node_is_named_and_no_node_is_changed(encoder: ColQwen3Encoder, folder: Path) -> None:
    embedding = ColQwen3Embedding(encoder=encoder, dim=DIM, embed_batch_size=2)
    good = [TextNode(text=str(i)) for i in range(3)]
    for bad, said in (
        (TextNode(text=" "), "neither image nor text"),
        (ImageNode(image_url="https://example.org/a.png"), "not fetched"),
        (ImageNode(image_path=str(folder / "gone.png")), "gone"), (ImageNode(image="???"), "base64"),
    ):  # fmt: skip
        for call in (lambda nodes: embedding(nodes), lambda nodes: asyncio.run(embedding.acall(nodes))):
            with pytest.raises(EncodeError, match=f"^input 3: .*{said}") as caught:
                call([*good, bad])
            assert caught.value.index == 3
    assert [node.embedding for node in good] == [None] * 3


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_text_is_no_vector(embedding: ColQwen3Embedding, text: str) -> None:
    with pytest.raises(EncodeError):
        embedding.get_text_embedding(text)
    with pytest.raises((EncodeError, ConfigError)):
        embedding.get_query_embedding(text)


def test_what_is_no_picture_or_text_is_refused(embedding: ColQwen3Embedding, folder: Path) -> None:
    with pytest.raises(EncodeError, match="not fetched"):
        embedding.get_image_embedding("https://example.org/a.png")
    with pytest.raises(EncodeError, match="input 1: "):
        embedding.get_image_embedding_batch([str(page_image(folder)), str(folder / "gone.png")])
    with pytest.raises(EncodeError, match=r"input 0: .*expected text as a string, got int"):
        embedding.get_text_multi_vectors([3])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="texts: "):
        embedding.get_text_multi_vectors("text")
    with pytest.raises(ConfigError, match="images: "):
        embedding.get_image_multi_vectors("a.png")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dim": 0}, "dim"),
        ({"dim": 100, "method": "fde"}, "dim"),
        ({"dim": 1.5}, "dim"),
        ({"method": "mean"}, "method"),
        ({"embed_batch_size": 0}, "embed_batch_size"),
        ({"embed_batch_size": True}, "embed_batch_size"),
        ({"embed_batch_size": "2"}, "embed_batch_size"),
        ({"num_workers": True}, "num_workers"),
        ({"encoder": 3}, "encoder"),
        ({"encoder": ColQwen3Encoder("tiny"), "model_name": "tiny"}, "encoder"),
        ({"encoder": ColQwen3Encoder("tiny"), "device": "cpu"}, "encoder"),
        ({"embeddings_cache": SimpleKVStore()}, "embeddings_cache"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}: "):
        ColQwen3Embedding(**arguments)


def test_a_misspelt_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="model_nam"):
        ColQwen3Embedding(model_nam="tiny")  # type: ignore[call-arg]


# -- as plain data ----------------------------------------------------------------------------------------------------


def test_it_needs_no_argument_and_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLQWEN3_MODEL", "/nowhere")
    embedding = ColQwen3Embedding()
    assert (embedding.model_name, embedding.dim, embedding.embed_batch_size) == ("/nowhere", 2048, 10)
    assert embedding.class_name() == "ColQwen3Embedding"


def test_copies_of_any_kind_keep_the_settings_and_load_nothing() -> None:
    embedding = ColQwen3Embedding("/nowhere", device="cpu", dim=128, method="fde", embed_batch_size=3, num_workers=2)
    for again in (
        ColQwen3Embedding.from_dict(embedding.to_dict()), ColQwen3Embedding.from_json(embedding.to_json()),
        pickle.loads(pickle.dumps(embedding)), copy.deepcopy(embedding), embedding.model_copy(),
    ):  # fmt: skip
        assert json.loads(again.to_json()) == json.loads(embedding.to_json())
        assert again.encoder.to_dict()["device"] == "cpu"
