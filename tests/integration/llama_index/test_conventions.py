"""LlamaIndex: what a user of it takes for granted and no other file shows."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle, TextNode

from colqwen3_retrievers import ColQwen3Encoder, PageIndex, Query
from colqwen3_retrievers.llama_index import ColQwen3Embedding, ColQwen3Reranker, ColQwen3Retriever
from tests.frameworks.page_folder import like, page_image
from tests.terminal import open_terminal

N_PICTURES = 5


def nodes_of(folder: Path) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=ImageNode(id_=f"page {n}", image_path=str(page_image(folder, n)))) for n in range(N_PICTURES)
    ]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_picture_with_words_asks_with_both(
    index: PageIndex, encoder: ColQwen3Encoder, folder: Path, asynchronous: bool
) -> None:
    retriever = ColQwen3Retriever(index, similarity_top_k=N_PICTURES)
    asked = like(folder, 2, "what was the revenue?")
    found = asyncio.run(retriever.aretrieve(asked)) if asynchronous else retriever.retrieve(asked)
    image = page_image(folder, 2)
    queries = encoder.encode_queries([Query("what was the revenue?", image), Query(image=image)])
    pages = encoder.encode_images([page_image(folder, n) for n in range(N_PICTURES)])
    both, alone = encoder.score(queries, pages)
    order = np.argsort(-both, kind="stable")
    assert [node.node_id for node in found] == [f"{n}.png#page=1" for n in order]
    assert [node.score for node in found] == pytest.approx(sorted(both, reverse=True), rel=5e-3)
    assert not np.allclose(both, alone, rtol=2e-2), "the words count"


def test_bars_count_every_node(
    folder: Path, encoder: ColQwen3Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for asynchronous in (False, True):
        terminal = open_terminal(monkeypatch)
        reranker = ColQwen3Reranker(encoder=encoder, show_progress=True)
        if asynchronous:
            asyncio.run(reranker.apostprocess_nodes(nodes_of(folder), QueryBundle("x")))
        else:
            reranker.postprocess_nodes(nodes_of(folder), query_str="x")
        assert terminal.counted == [(N_PICTURES, N_PICTURES)]
    terminal = open_terminal(monkeypatch)
    ColQwen3Embedding(encoder=encoder, dim=128, embed_batch_size=2)([n.node for n in nodes_of(folder)], True)
    assert terminal.counted == [(3, 3)], "LlamaIndex counts batches"
    terminal = open_terminal(monkeypatch)
    with PageIndex.open(tmp_path / "index", encoder) as made:
        ColQwen3Retriever.from_nodes(nodes_of(folder), made, show_progress=True)
    assert f"{N_PICTURES} pages" in terminal.getvalue()
    terminal = open_terminal(monkeypatch)
    ColQwen3Reranker(encoder=encoder).postprocess_nodes(nodes_of(folder), query_str="x")
    assert terminal.getvalue() == "", "nothing is drawn unless asked for"


def test_no_key_is_written_or_shown() -> None:
    encoder = ColQwen3Encoder("x", url="http://127.0.0.1:9", api_key="geheim")
    made: list[Any] = [ColQwen3Reranker(encoder=encoder), ColQwen3Embedding(encoder=encoder)]
    for each in made:
        assert each.to_dict()["encoder"]["url"] == ["http://127.0.0.1:9"]
        shown = repr(each) + each.to_json() + str(pickle.dumps(each)) + str(each.to_dict()) + str(each.model_dump())
        assert "geheim" not in shown
        assert len(shown) < 25_000, "settings, no weights"
    assert "geheim" not in str(made[1].to_payload())


def test_mixed_lists_keep_what_is_bad_last_in_the_order_it_came(folder: Path, encoder: ColQwen3Encoder) -> None:
    bad = [ImageNode(id_=name, image_path=str(folder / "gone.png")) for name in ("z", "a")]
    given = [NodeWithScore(node=node) for node in (bad[0], TextNode(id_="t", text="Revenue rose."), bad[1])]
    ranked = ColQwen3Reranker(encoder=encoder, on_error="keep").postprocess_nodes(
        [*given, *nodes_of(folder)], like(folder, 3)
    )
    assert ranked[0].node_id == "page 3"
    everything = ColQwen3Reranker(encoder=encoder, on_error="keep", top_n=None)
    ranked = everything.postprocess_nodes([*given, *nodes_of(folder)], like(folder, 3))
    assert [node.node_id for node in ranked][-2:] == ["z", "a"]
    assert ["rerank_error" in node.metadata for node in ranked] == [False] * 6 + [True] * 2
    scores = [node.get_score(raise_error=True) for node in ranked]
    assert scores == sorted(scores, reverse=True)
