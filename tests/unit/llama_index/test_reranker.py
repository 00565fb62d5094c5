"""The LlamaIndex reranker: what it ranks, what it leaves alone, what it costs, and what it does with bad nodes."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import logging
import pickle
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.schema import (
    BaseNode,
    ImageDocument,
    ImageNode,
    IndexNode,
    MediaResource,
    Node,
    NodeWithScore,
    QueryBundle,
    TextNode,
)

from colqwen3_retrievers import ColQwen3Encoder, MultiVector, Page, PageIndex, Query, maxsim
from colqwen3_retrievers.cache.page_cache import PageEmbeddingCache
from colqwen3_retrievers.errors import ColQwen3Error, ConfigError, EncodeError, StoreMismatchError
from colqwen3_retrievers.llama_index import ColQwen3Reranker
from tests.frameworks.page_folder import make_folder

N_PICTURES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints and some pictures."""
    return make_folder(tmp_path_factory.mktemp("reranker"), N_PICTURES, pages=".", other=True)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Iterator[ColQwen3Encoder]:
    with ColQwen3Encoder(folder / "checkpoint", device="cpu") as made:
        yield made


@pytest.fixture
def index(folder: Path, encoder: ColQwen3Encoder, tmp_path: Path) -> Iterator[PageIndex]:
    with PageIndex.open(tmp_path / "index", encoder) as made:
        made.add(Page(id=f"page {seed}", image=folder / f"{seed}.png") for seed in range(N_PICTURES))
        yield made


def image_nodes(folder: Path) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=ImageNode(id_=f"page {seed}", image_path=str(folder / f"{seed}.png")), score=0.5)
        for seed in range(N_PICTURES)
    ]


def like(folder: Path, seed: int, text: str = "") -> QueryBundle:
    return QueryBundle(text, image_path=str(folder / f"{seed}.png"))


def ids(nodes: list[NodeWithScore]) -> list[str]:
    return [given.node_id for given in nodes]


def same_ranking(one: list[NodeWithScore], other: list[NodeWithScore]) -> bool:
    return ids(one) == ids(other) and np.allclose([n.score for n in one], [n.score for n in other], atol=1e-3)


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(N_PICTURES))
def test_the_page_a_picture_was_taken_of_comes_first(folder: Path, encoder: ColQwen3Encoder, seed: int) -> None:
    ranked = ColQwen3Reranker(encoder=encoder).postprocess_nodes(image_nodes(folder), query_bundle=like(folder, seed))
    assert ranked[0].node_id == f"page {seed}"


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_scores_are_maxsim_in_python_floats_best_first(folder: Path, encoder: ColQwen3Encoder, mode: Any) -> None:
    nodes = image_nodes(folder)
    ranked = ColQwen3Reranker(encoder=encoder, score_mode=mode).postprocess_nodes(nodes, query_str="revenue")
    pages = encoder.encode_images([folder / f"{seed}.png" for seed in range(N_PICTURES)])
    scores = maxsim(encoder.encode_queries(["revenue"]), pages, mode=mode)[0]
    expected = [f"page {i}" for i in np.argsort(-scores)]
    assert ids(ranked) == expected
    assert all(type(given.score) is float for given in ranked)
    np.testing.assert_allclose([given.score for given in ranked], np.sort(scores)[::-1], atol=1e-4)
    if mode == "mean":
        assert all(-1 <= (given.score or 0) <= 1 for given in ranked)


def test_picture_and_text_ask_together(folder: Path, encoder: ColQwen3Encoder) -> None:
    reranker = ColQwen3Reranker(encoder=encoder)
    both = reranker.postprocess_nodes(image_nodes(folder), query_bundle=like(folder, 2, "what is this?"))
    query = encoder.encode_queries([Query("what is this?", folder / "2.png")])
    page = encoder.encode_images([folder / "2.png"])
    assert both[0].node_id == "page 2"
    assert both[0].score == pytest.approx(float(maxsim(query, page)[0, 0]), abs=1e-3)


def test_nodes_of_every_kind_are_ranked_together(folder: Path, encoder: ColQwen3Encoder) -> None:
    file = folder / "0.png"
    data = base64.b64encode(file.read_bytes()).decode()
    nodes: list[BaseNode] = [
        TextNode(id_="text", text="Revenue rose."),
        IndexNode(id_="index", text="Costs fell.", index_id="x"),
        ImageNode(id_="path", image_path=str(file)),
        ImageNode(id_="base64", image=data),
        ImageDocument(id_="document", image=data),
        Node(id_="bytes", image_resource=MediaResource(data=file.read_bytes())),
        Node(id_="resource", image_resource=MediaResource(path=file)),
        ImageNode(id_="another", image_path=str(folder / "1.png")),
    ]
    given = [NodeWithScore(node=node) for node in nodes]
    ranked = ColQwen3Reranker(encoder=encoder, top_n=8).postprocess_nodes(given, query_bundle=like(folder, 0))
    assert ids(ranked)[:5] == ["base64", "bytes", "document", "path", "resource"], "equal scores by id"
    assert len({found.score for found in ranked[:5]}) == 1
    assert sorted(ids(ranked)[5:]) == ["another", "index", "text"]


def test_top_n_bounds_what_comes_back(folder: Path, encoder: ColQwen3Encoder) -> None:
    reranker = ColQwen3Reranker(encoder=encoder)
    nodes = image_nodes(folder) + [NodeWithScore(node=TextNode(text=text)) for text in "abc"]
    assert len(reranker.postprocess_nodes(nodes, query_str="x")) == 5
    reranker.top_n = 2
    assert len(reranker.postprocess_nodes(nodes, query_str="x")) == 2
    reranker.top_n = 50
    assert len(reranker.postprocess_nodes(nodes, query_str="x")) == len(nodes)


def test_ties_do_not_depend_on_the_order_they_came_in(folder: Path, encoder: ColQwen3Encoder) -> None:
    reranker = ColQwen3Reranker(encoder=encoder)
    twins = [NodeWithScore(node=TextNode(id_=id_, text="the same")) for id_ in "cab"]
    for nodes in (twins, twins[::-1]):
        assert ids(reranker.postprocess_nodes(nodes, query_str="x")) == ["a", "b", "c"]


def test_the_text_of_a_picture_joins_only_with_include_text(folder: Path, encoder: ColQwen3Encoder) -> None:
    def score(made: ColQwen3Encoder, text: str) -> float:
        node = ImageNode(id_="n", text=text, image_path=str(folder / "0.png"))
        (ranked,) = ColQwen3Reranker(encoder=made).postprocess_nodes([NodeWithScore(node=node)], query_str="revenue")
        return ranked.get_score(raise_error=True)

    assert score(encoder, "Revenue rose.") == score(encoder, "")
    with ColQwen3Encoder(folder / "checkpoint", device="cpu", include_text=True) as reading:
        assert abs(score(reading, "Revenue rose.") - score(reading, "")) > 1e-3


# -- what is left alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
def test_what_is_handed_in_is_never_changed(folder: Path, encoder: ColQwen3Encoder, keep: bool) -> None:
    nodes = image_nodes(folder)
    objects, before = list(nodes), [given.to_dict() for given in nodes]
    ranked = ColQwen3Reranker(encoder=encoder, keep_retrieval_score=keep).postprocess_nodes(nodes, query_str="x")
    assert [given.to_dict() for given in nodes] == before
    assert all(one is other for one, other in zip(nodes, objects, strict=True))
    assert not {id(found) for found in ranked} & {id(given) for given in nodes}
    assert [found.metadata.get("retrieval_score") for found in ranked] == ([0.5] * 4 if keep else [None] * 4)


def test_the_kept_retrieval_score_is_json_and_not_told_to_models(folder: Path, encoder: ColQwen3Encoder) -> None:
    nodes = image_nodes(folder)[:2]
    nodes[0].score = np.float32(0.25)  # type: ignore[assignment]
    nodes[1].score = None
    ranked = ColQwen3Reranker(encoder=encoder, keep_retrieval_score=True).postprocess_nodes(nodes, query_str="x")
    assert {found.node_id: found.metadata["retrieval_score"] for found in ranked} == {"page 0": 0.25, "page 1": None}
    assert all("retrieval_score" not in found.node.get_content("llm") for found in ranked)  # type: ignore[arg-type]
    assert json.loads(ranked[0].to_json())["score"] == ranked[0].score


def test_no_nodes_give_none_and_nothing_is_loaded(tmp_path: Path) -> None:
    reranker = ColQwen3Reranker(tmp_path / "no such model")
    assert reranker.postprocess_nodes([], query_str="x") == []
    assert reranker.postprocess_nodes([]) == []
    assert asyncio.run(reranker.apostprocess_nodes([], query_str="x")) == []


@pytest.mark.parametrize("asked", [{}, {"query_str": ""}, {"query_bundle": QueryBundle("  ")}])
def test_nodes_without_a_query_are_a_value_error(folder: Path, asked: dict[str, Any], tmp_path: Path) -> None:
    reranker = ColQwen3Reranker(tmp_path / "no such model")
    with pytest.raises(ValueError, match="query"):
        reranker.postprocess_nodes(image_nodes(folder), **asked)
    with pytest.raises(ValueError, match="query"):
        asyncio.run(reranker.apostprocess_nodes(image_nodes(folder), **asked))


# -- what it costs ----------------------------------------------------------------------------------------------------


def test_pages_are_not_encoded_again_for_the_next_query(folder: Path, encoder: ColQwen3Encoder) -> None:
    reranker = ColQwen3Reranker(encoder=encoder)
    reranker.postprocess_nodes(image_nodes(folder), query_str="one")
    before = encoder.stats.inputs
    reranker.postprocess_nodes(image_nodes(folder), query_str="two")
    assert encoder.stats.inputs - before == 1, "the query alone"
    narrow = reranker.model_copy(update={"top_n": 1})
    assert len(narrow.postprocess_nodes(image_nodes(folder), query_str="three")) == 1
    assert encoder.stats.inputs - before == 2, "a copy shares the cache"
    forgetful = ColQwen3Reranker(encoder=encoder, cache_bytes=0)
    for _ in range(2):
        forgetful.postprocess_nodes(image_nodes(folder), query_str="two")
    assert encoder.stats.inputs - before == 2 + 2 * (1 + N_PICTURES)


def test_a_folder_keeps_embeddings_for_the_next_reranker(
    folder: Path, encoder: ColQwen3Encoder, tmp_path: Path
) -> None:
    first = ColQwen3Reranker(encoder=encoder, cache=tmp_path / "cache")
    wanted = first.postprocess_nodes(image_nodes(folder), query_str="revenue")
    first._core.resources.open().cache.flush()
    shared = PageEmbeddingCache(encoder, folder=tmp_path / "cache")
    before = encoder.stats.inputs
    others = [
        ColQwen3Reranker(encoder=encoder, cache=str(tmp_path / "cache"), cache_bytes=2**30),
        ColQwen3Reranker(cache=shared),
        pickle.loads(pickle.dumps(first)),
    ]
    for reranker in others:
        assert reranker.to_dict()["cache"] == str(tmp_path / "cache")
        assert same_ranking(reranker.postprocess_nodes(image_nodes(folder), query_str="revenue"), wanted)
    assert encoder.stats.inputs == before + len(others), "the queries alone"
    for wrong in ({"cache_bytes": 5}, {"model": "tiny"}, {"encoder": ColQwen3Encoder("tiny")}):
        with pytest.raises(ConfigError, match="cache"):
            ColQwen3Reranker(cache=shared, **wrong)
    with pytest.raises(ConfigError, match="cache"):
        ColQwen3Reranker(encoder=encoder, cache=7)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["the index", "its location", "its location and an encoder"])
def test_pages_of_the_index_are_not_encoded_at_all(
    folder: Path, encoder: ColQwen3Encoder, index: PageIndex, how: str
) -> None:
    expected = ColQwen3Reranker(encoder=encoder).postprocess_nodes(image_nodes(folder), query_str="revenue")
    reranker = {
        "the index": lambda: ColQwen3Reranker(index=index),
        "its location": lambda: ColQwen3Reranker(index=index.location),
        "its location and an encoder": lambda: ColQwen3Reranker(index=Path(index.location), encoder=encoder),
    }[how]()
    nodes = image_nodes(folder)
    for given in nodes:
        assert isinstance(given.node, ImageNode)
        given.node.image_path = "/gone.png"  # so that encoding it would fail
    before = encoder.stats.inputs
    assert same_ranking(reranker.postprocess_nodes(nodes, query_str="revenue"), expected)
    if how != "its location":  # then the model is rebuilt from what the index knows, on the best device
        assert encoder.stats.inputs - before == 1, "the query alone"
    reranker.close()
    assert len(index) == N_PICTURES, "an index that was handed in stays open"


def test_a_device_with_an_index_is_where_its_model_runs(folder: Path, index: PageIndex) -> None:
    nodes = image_nodes(folder)
    expected = ColQwen3Reranker(index=index).postprocess_nodes(nodes, query_str="revenue")
    for given in (index, index.location):
        reranker = ColQwen3Reranker(index=given, device="cpu")
        assert same_ranking(reranker.postprocess_nodes(nodes, query_str="revenue"), expected)
        opened = reranker._core.resources.open().encoder
        assert isinstance(opened, ColQwen3Encoder)
        assert opened.to_dict()["device"] == "cpu"
        reranker.close()


def test_nodes_outside_the_index_or_of_another_content_are_encoded(
    folder: Path, encoder: ColQwen3Encoder, index: PageIndex
) -> None:
    nodes = image_nodes(folder)
    nodes[0].node.metadata["sha256"] = "of another picture"
    assert isinstance(nodes[0].node, ImageNode)
    nodes[0].node.image_path = str(folder / "3.png")
    nodes.append(NodeWithScore(node=TextNode(id_="text", text="Revenue rose.")))
    before = encoder.stats.inputs
    ranked = ColQwen3Reranker(index=index).postprocess_nodes(nodes, query_bundle=like(folder, 3))
    assert encoder.stats.inputs - before == 1 + 2
    assert ids(ranked)[:2] == ["page 0", "page 3"]


def test_an_encoder_that_did_not_make_the_index_is_refused(folder: Path, index: PageIndex) -> None:
    reranker = ColQwen3Reranker(folder / "other", device="cpu", index=index)
    with pytest.raises(StoreMismatchError, match="fingerprint"):
        reranker.postprocess_nodes(image_nodes(folder), query_str="x")


def test_a_changed_setting_counts_from_the_next_call(folder: Path) -> None:
    reranker = ColQwen3Reranker(folder / "checkpoint", device="cpu")
    one = reranker.postprocess_nodes(image_nodes(folder), query_str="x")
    reranker.model = str(folder / "other")
    other = reranker.postprocess_nodes(image_nodes(folder), query_str="x")
    assert not same_ranking(one, other)
    assert same_ranking(ColQwen3Reranker(folder / "other", device="cpu").postprocess_nodes(one, query_str="x"), other)


# -- bad nodes --------------------------------------------------------------------------------------------------------


def bad_nodes(tmp_path: Path) -> list[NodeWithScore]:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    nodes = [
        ImageNode(id_="broken", image_path=str(tmp_path / "broken.png")),
        ImageNode(id_="gone", image_path=str(tmp_path / "gone.png")),
        ImageNode(id_="url", image_url="https://example.org/a.png"),
        ImageNode(id_="garbage", image="???"),
        TextNode(id_="empty", text="", metadata={"file_name": "a.pdf"}),
    ]
    return [NodeWithScore(node=node, score=1.0) for node in nodes]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_bad_node_raises_and_is_named(
    folder: Path, encoder: ColQwen3Encoder, tmp_path: Path, asynchronous: bool
) -> None:
    reranker = ColQwen3Reranker(encoder=encoder)
    for bad in bad_nodes(tmp_path):
        nodes = [*image_nodes(folder)[:2], bad]
        with pytest.raises(EncodeError, match=r"node 2 \(id ") as caught:
            if asynchronous:
                asyncio.run(reranker.apostprocess_nodes(nodes, query_str="x"))
            else:
                reranker.postprocess_nodes(nodes, query_str="x")
        assert caught.value.index == 2


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("on_error", ["skip", "keep"])
def test_bad_nodes_are_skipped_or_kept_last_with_a_warning(
    folder: Path,
    encoder: ColQwen3Encoder,
    tmp_path: Path,
    on_error: Any,
    asynchronous: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    good, bad = image_nodes(folder)[:2], bad_nodes(tmp_path)
    nodes = [bad[0], good[0], *bad[1:], good[1]]
    reranker = ColQwen3Reranker(encoder=encoder, on_error=on_error, top_n=10)
    with caplog.at_level(logging.WARNING):
        if asynchronous:
            ranked = asyncio.run(reranker.apostprocess_nodes(nodes, query_bundle=like(folder, 1)))
        else:
            ranked = reranker.postprocess_nodes(nodes, query_bundle=like(folder, 1))
    kept = ids(bad) if on_error == "keep" else []
    assert ids(ranked) == ["page 1", "page 0", *kept]
    lowest = min(0.0, ranked[1].score or 0.0)
    assert [(type(found.score), found.score) for found in ranked[2:]] == [(float, lowest)] * len(kept)
    assert all(found.metadata["rerank_error"] for found in ranked[2:])
    assert all("rerank_error" not in found.node.get_content("llm") for found in ranked[2:])  # type: ignore[arg-type]
    (again,) = reranker.postprocess_nodes(
        [NodeWithScore(node=TextNode(text="x", metadata={"rerank_error": "old"}))], query_str="x"
    )
    assert again.metadata == {}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(bad)
    assert all(any(repr(given.node_id) in line for line in said) for given in bad)


def test_a_bad_query_or_model_is_never_skipped(folder: Path, encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    reranker = ColQwen3Reranker(encoder=encoder, on_error="skip")
    with pytest.raises(EncodeError):
        reranker.postprocess_nodes(image_nodes(folder), query_bundle=QueryBundle("", image_path="/gone.png"))
    with pytest.raises(ColQwen3Error):
        ColQwen3Reranker(tmp_path / "no such model", on_error="skip").postprocess_nodes(
            image_nodes(folder), query_str="x"
        )


def test_all_bad_nodes_leave_none(encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    assert (
        ColQwen3Reranker(encoder=encoder, on_error="skip").postprocess_nodes(bad_nodes(tmp_path), query_str="x") == []
    )


# -- async ------------------------------------------------------------------------------------------------------------


class Gated(ColQwen3Encoder):
    """The real encoder, whose pages are held back until the gate opens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate = threading.Event()
        self.held: list[Future[list[MultiVector]]] = []
        self.threads: set[int] = set()

    def submit_pages(self, pages: Iterable[Page]) -> Future[list[MultiVector]]:
        real, late = super().submit_pages(pages), Future[list[MultiVector]]()
        self.held.append(late)
        self.threads.add(threading.get_ident())

        def give() -> None:
            opened = self.gate.wait(5)
            if not late.set_running_or_notify_cancel():
                return
            if opened:
                late.set_result(real.result())
            else:
                late.set_exception(TimeoutError("the gate was never opened: something blocks the event loop"))

        threading.Thread(target=give, daemon=True).start()
        return late


@pytest.fixture
def gated(folder: Path) -> Iterator[Gated]:
    with Gated(folder / "checkpoint", device="cpu") as made:
        yield made
        made.gate.set()


def test_the_async_path_gives_what_the_sync_path_gives(folder: Path, encoder: ColQwen3Encoder) -> None:
    reranker = ColQwen3Reranker(encoder=encoder, keep_retrieval_score=True)
    one = reranker.postprocess_nodes(image_nodes(folder), query_str="revenue")
    other = asyncio.run(reranker.apostprocess_nodes(image_nodes(folder), query_str="revenue"))
    assert same_ranking(one, other)


def test_the_event_loop_runs_on_while_pages_are_encoded(folder: Path, gated: Gated) -> None:
    before = gated.stats.inputs

    async def run() -> list[list[NodeWithScore]]:
        reranker = ColQwen3Reranker(encoder=gated)
        calls = [
            asyncio.create_task(reranker.apostprocess_nodes(image_nodes(folder), query_str=text)) for text in ("a", "b")
        ]
        while len(gated.held) < N_PICTURES or gated.stats.inputs < before + 2 + N_PICTURES:
            await asyncio.sleep(0.001)
        for _ in range(100):  # the queries are there: both calls wait for pages by now
            await asyncio.sleep(0.001)
        gated.gate.set()
        return await asyncio.gather(*calls)

    both = asyncio.run(asyncio.wait_for(run(), 10))
    assert [len(ranked) for ranked in both] == [N_PICTURES, N_PICTURES]
    assert len(gated.held) == N_PICTURES, "both share the pages"
    assert threading.get_ident() not in gated.threads, "opening files and checkpoints is not for the loop's thread"


def test_cancelling_the_task_cancels_the_encoding(folder: Path, gated: Gated) -> None:
    async def run() -> None:
        reranker = ColQwen3Reranker(encoder=gated)
        task = asyncio.create_task(reranker.apostprocess_nodes(image_nodes(folder), query_str="a"))
        while len(gated.held) < N_PICTURES:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(1000):
            if all(future.cancelled() for future in gated.held):
                return
            await asyncio.sleep(0.005)
        pytest.fail("something is still under way")

    asyncio.run(asyncio.wait_for(run(), 10))


def test_trap_l20_the_sync_path_works_inside_a_running_loop(folder: Path, encoder: ColQwen3Encoder) -> None:
    async def run() -> list[NodeWithScore]:
        return ColQwen3Reranker(encoder=encoder).postprocess_nodes(image_nodes(folder), query_bundle=like(folder, 1))

    assert asyncio.run(run())[0].node_id == "page 1"


# -- events -----------------------------------------------------------------------------------------------------------


class Heard(BaseEventHandler):
    """Keeps what it is told."""

    events: list[Any] = []  # noqa: RUF012 - a pydantic field: each handler gets its own

    def handle(self, event: Any, **_: Any) -> None:
        self.events.append(event)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_events_and_callbacks_tell_of_the_reranking(folder: Path, encoder: ColQwen3Encoder, asynchronous: bool) -> None:
    heard, debug, nodes = Heard(), LlamaDebugHandler(print_trace_on_end=False), image_nodes(folder)
    reranker = ColQwen3Reranker(encoder=encoder, top_n=2)
    reranker.callback_manager = CallbackManager([debug])  # as query engines do
    root = get_dispatcher()
    root.add_event_handler(heard)
    try:
        if asynchronous:
            ranked = asyncio.run(reranker.apostprocess_nodes(nodes, query_str="revenue"))
        else:
            ranked = reranker.postprocess_nodes(nodes, query_str="revenue")
    finally:
        root.event_handlers.remove(heard)
    start, end = (event for event in heard.events if isinstance(event, ReRankStartEvent | ReRankEndEvent))
    assert (start.top_n, start.model_name, start.query.query_str) == (2, str(folder / "checkpoint"), "revenue")
    assert ids(start.nodes) == ids(nodes)
    assert ids(end.nodes) == ids(ranked)
    ((begun, ended),) = debug.get_event_pairs(CBEventType.RERANKING)
    assert begun.payload is not None
    assert ended.payload is not None
    assert begun.payload[EventPayload.QUERY_STR] == "revenue"
    assert begun.payload[EventPayload.TOP_K] == 2
    assert ids(ended.payload[EventPayload.NODES]) == ids(ranked)


def test_a_failure_ends_its_callback_event(folder: Path, encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    reranker = ColQwen3Reranker(encoder=encoder, callback_manager=CallbackManager([debug]))
    with pytest.raises(EncodeError):
        reranker.postprocess_nodes(bad_nodes(tmp_path), query_str="x")
    ((_, ended),) = debug.get_event_pairs(CBEventType.RERANKING)
    assert ended.payload is not None
    assert isinstance(ended.payload[EventPayload.EXCEPTION], EncodeError)


def test_a_progress_bar_does_not_get_in_the_way(folder: Path, encoder: ColQwen3Encoder) -> None:
    reranker = ColQwen3Reranker(encoder=encoder, show_progress=True)
    assert len(reranker.postprocess_nodes(image_nodes(folder), query_str="x")) == N_PICTURES


# -- as plain data ----------------------------------------------------------------------------------------------------


def test_it_needs_no_argument_and_loads_nothing() -> None:
    reranker = ColQwen3Reranker()
    assert (reranker.top_n, reranker.score_mode, reranker.model) == (5, "sum", None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"top_n": 0}, "top_n"),
        ({"top_n": True}, "top_n"),
        ({"cache_bytes": -1}, "cache_bytes"),
        ({"embed_batch_size": 0}, "embed_batch_size"),
        ({"score_mode": "max"}, "score_mode"),
        ({"on_error": "ignore"}, "on_error"),
        ({"model": 3}, "model"),
        ({"index": 3}, "index"),
        ({"encoder": "tiny"}, "encoder"),
        ({"encoder": {"model": "tiny"}}, "encoder settings"),
        ({"encoder": ColQwen3Encoder("tiny"), "model": "tiny"}, "encoder"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}: "):
        ColQwen3Reranker(**arguments)


def test_a_misspelt_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="topn"):
        ColQwen3Reranker(topn=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="top_n"):
        ColQwen3Reranker().top_n = 0


def copies(reranker: ColQwen3Reranker) -> list[ColQwen3Reranker]:
    return [
        ColQwen3Reranker.from_dict(reranker.to_dict()),
        ColQwen3Reranker.from_json(reranker.to_json()),
        pickle.loads(pickle.dumps(reranker)),
        reranker.model_copy(),
        reranker.model_copy(deep=True),
        copy.copy(reranker),
        copy.deepcopy(reranker),
    ]


def test_copies_of_any_kind_keep_the_settings_and_load_nothing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "top_n": 3, "score_mode": "mean", "keep_retrieval_score": True, "on_error": "keep", "cache_bytes": 7,
        "embed_batch_size": 2, "show_progress": True,
    }  # fmt: skip
    for reranker in [
        ColQwen3Reranker(tmp_path / "no such model", device="cpu", index="no such index", **settings),
        ColQwen3Reranker(encoder=ColQwen3Encoder("no such model", dim=64, include_text=True), **settings),
    ]:
        for made in copies(reranker):
            assert type(made) is ColQwen3Reranker
            assert made.to_dict() == reranker.to_dict()
    assert ColQwen3Reranker(encoder=ColQwen3Encoder("x", dim=64)).to_dict()["encoder"]["dim"] == 64


def test_trap_l15_a_pickled_reranker_shares_the_loaded_model(folder: Path, encoder: ColQwen3Encoder) -> None:
    reranker = ColQwen3Reranker(encoder=encoder)
    ranked = reranker.postprocess_nodes(image_nodes(folder), query_str="revenue")
    for made in copies(reranker):
        assert same_ranking(made.postprocess_nodes(image_nodes(folder), query_str="revenue"), ranked)
    assert encoder.stats.loads == 1


def test_what_is_written_holds_no_weights_and_no_embeddings(
    folder: Path, encoder: ColQwen3Encoder, index: PageIndex
) -> None:
    reranker = ColQwen3Reranker(encoder=encoder, index=index)
    reranker.postprocess_nodes(image_nodes(folder), query_str="revenue")
    assert reranker.to_dict()["index"] == index.location
    assert len(reranker.to_json()) < 1500
    assert len(pickle.dumps(reranker)) < 1500
