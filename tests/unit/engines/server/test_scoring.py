"""A server's own scores, through both of its paths and both rerankers: the same as ours, or an error that says why."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, Page, Query, ServerOptions, Video
from colqwen3_retrievers.encoding.server_scores import server_scores
from colqwen3_retrievers.errors import ConfigError, EncodeError, EngineResponseError
from tests.checkpoints import make_checkpoint
from tests.fault_server import FaultServer

OPTIONS = ServerOptions(timeout=30, retries=1)
IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (256, 256, 3), dtype=np.uint8)) for seed in range(9)
]
TEXTS = ["revenue in 2024", "what was the image?", "Describe the passage"]
QUESTION = "what was the revenue?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("ops"), "ops").folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[FaultServer]:
    with FaultServer(folder) as running:
        yield running


@pytest.fixture(scope="module")
def encoder(folder: Path, server: FaultServer) -> Iterator[ColQwen3Encoder]:
    with ColQwen3Encoder(folder, url=server.url, engine=OPTIONS, max_visual_tokens=64) as made:
        yield made


def pages() -> list[Page]:
    made = [Page(id=f"i{number}", image=image) for number, image in enumerate(IMAGES)]
    return [*made, *(Page(id=text, text=text) for text in TEXTS)]


def given(some: list[Page]) -> list[partial[Page]]:
    return [partial(lambda page: page, page) for page in some]


@pytest.fixture(scope="module")
def truth(folder: Path) -> list[float]:
    with ColQwen3Encoder(folder, engine="torch", device="cpu", max_visual_tokens=64) as torch_encoder:
        query = torch_encoder.encode_queries([QUESTION])
        return torch_encoder.score(query, torch_encoder.encode_pages(pages()))[0].tolist()


@pytest.mark.parametrize("endpoint", ["score", "rerank"])
def test_the_servers_scores_are_ours(
    server: FaultServer, encoder: ColQwen3Encoder, truth: list[float], endpoint: str
) -> None:
    before = len(server.seen)
    found = server_scores(encoder, Query(QUESTION), given(pages()), endpoint=endpoint)
    np.testing.assert_allclose([found.sums[place] for place in range(12)], truth, atol=1e-3)
    assert sorted(one.n_inputs for one in server.seen[before:] if one.path == f"/{endpoint}") == [4, 8]


def test_what_cannot_be_scored_is_told_page_by_page(encoder: ColQwen3Encoder, truth: list[float]) -> None:
    broken = [
        Page(id="no", image=b"no picture"),
        Page(id="none", text=" "),
        Page(id="video", video=Video((IMAGES[0],) * 2)),
    ]
    found = server_scores(encoder, Query(QUESTION), given([broken[0], pages()[0], *broken[1:]]))
    assert found.sums == pytest.approx({1: truth[0]}, abs=1e-3)
    assert {place: error.index for place, error in found.broken.items()} == {0: 0, 2: 2, 3: 3}
    assert "a video is not scored by a server" in str(found.broken[3])


@pytest.mark.parametrize("fault", ["400", "500", "close"])
def test_a_server_that_fails(server: FaultServer, encoder: ColQwen3Encoder, fault: str) -> None:
    server.fault(fault, 9)
    with pytest.raises(Exception, match=r"/score: ") as caught:
        server_scores(encoder, Query(QUESTION), given(pages()[:1]))
    server.clear()
    assert isinstance(caught.value, EngineResponseError) == fault.isdigit()


def test_only_a_servers_whole_vectors_can_be_scored_there(folder: Path, server: FaultServer) -> None:
    for settings in ({"engine": "torch", "device": "cpu"}, {"url": server.url, "pool_factor": 2}):
        with ColQwen3Encoder(folder, **settings) as encoder, pytest.raises(ConfigError, match="scoring='server'"):
            server_scores(encoder, Query(QUESTION), given(pages()[:1]))


def test_a_server_that_resizes_is_found_out(folder: Path, tmp_path: Path) -> None:
    """The check at connecting is of the largest and a small picture; scoring counts again."""
    small = Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8))
    with (
        FaultServer(folder, min_pixels=65_536) as server,
        ColQwen3Encoder(folder, url=server.url, engine=OPTIONS, max_visual_tokens=64) as encoder,
        pytest.raises(ConfigError, match=r"saw \d+ tokens where \d+ were rendered"),
    ):
        server_scores(encoder, Query(QUESTION), given([Page(id="s", image=small)]))


def test_langchain_reranker(encoder: ColQwen3Encoder, truth: list[float]) -> None:
    documents_of = pytest.importorskip("langchain_core.documents")
    from colqwen3_retrievers.langchain import ColQwen3Reranker

    documents = [documents_of.Document(text, id=text) for text in TEXTS]
    reranker = ColQwen3Reranker(encoder=encoder, scoring="server", score_mode="sum", top_n=None)
    expected = sorted(zip(truth[9:], TEXTS, strict=True), reverse=True)
    for ranked in (
        reranker.compress_documents(documents, QUESTION),
        asyncio.run(reranker.acompress_documents(documents, QUESTION)),
    ):
        assert [document.id for document in ranked] == [text for _, text in expected]
        scores = [document.metadata["relevance_score"] for document in ranked]
        assert scores == pytest.approx([score for score, _ in expected], abs=1e-3)
    broken = [*documents, documents_of.Document("", metadata={"image_path": "/no/such.png"})]
    with pytest.raises(EncodeError, match="document 3"):
        reranker.compress_documents(broken, QUESTION)
    kept = ColQwen3Reranker(encoder=encoder, scoring="server", on_error="keep", top_n=None)
    assert "rerank_error" in kept.compress_documents(broken, QUESTION)[-1].metadata
    with pytest.raises(ValueError, match="neither index nor cache"):
        ColQwen3Reranker(encoder=encoder, scoring="server", cache_bytes=0)


def test_llama_index_reranker(encoder: ColQwen3Encoder, truth: list[float]) -> None:
    schema = pytest.importorskip("llama_index.core.schema")
    from colqwen3_retrievers.llama_index import ColQwen3Reranker

    nodes = [schema.NodeWithScore(node=schema.TextNode(text=text, id_=text)) for text in TEXTS]
    reranker = ColQwen3Reranker(encoder=encoder, scoring="server", top_n=2)
    expected = sorted(zip(truth[9:], TEXTS, strict=True), reverse=True)[:2]
    for ranked in (
        reranker.postprocess_nodes(nodes, query_str=QUESTION),
        asyncio.run(reranker.apostprocess_nodes(nodes, query_str=QUESTION)),
    ):
        assert [found.node.node_id for found in ranked] == [text for _, text in expected]
        assert [found.score for found in ranked] == pytest.approx([score for score, _ in expected], abs=1e-3)
    assert reranker.from_dict(reranker.to_dict()).scoring == "server"
    empty = [*nodes, schema.NodeWithScore(node=schema.TextNode(text=" ", id_="empty"))]
    with pytest.raises(EncodeError, match=r"node 3 \(id 'empty'\)"):
        reranker.postprocess_nodes(empty, query_str=QUESTION)
    with pytest.raises(ConfigError, match="neither index nor cache"):
        ColQwen3Reranker(encoder=encoder, scoring="server", cache_bytes=0)
