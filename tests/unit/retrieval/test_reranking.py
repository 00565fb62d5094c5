"""The rules of reranking, the same in every framework: stated once, for the core under both rerankers."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from colqwen3_retrievers import ColQwen3Encoder, EncoderInfo, MultiVector, Page, PageIndex, Query, maxsim
from colqwen3_retrievers.cache.page_cache import PageEmbeddingCache
from colqwen3_retrievers.errors import ConfigError, EncodeError, EngineError, PageError, StoreError, StoreMismatchError
from colqwen3_retrievers.retrieval.reranking import RERANK_ERROR, Candidate, Ranked, Reranker, RerankerOptions
from tests.hashing import INFO, HashingEncoder, picture

TEXTS = ("the board met", "revenue rose", "revenue rose by 7 percent", "costs fell")
QUERY = Query("revenue rose by 7 percent")


class Encoder(HashingEncoder):
    """Encodes pages in a thread, one at a time, and not before its gate is open."""

    def __init__(self, info: EncoderInfo = INFO) -> None:
        super().__init__(info)
        self.gate = threading.Event()
        self.gate.set()
        self.page_thread = ThreadPoolExecutor(1)
        self.pages: list[Future[list[MultiVector]]] = []
        self.callers: set[int] = set()
        self.under_way = self.most_under_way = 0

    def submit_pages(self, pages: Iterable[Page]) -> Future[list[MultiVector]]:
        def encode(page: Page) -> list[MultiVector]:
            if not self.gate.wait(10):
                raise TimeoutError("the gate was never opened: something blocks")
            if page.text == "no engine":
                raise EngineError("out of memory")
            if page.text == "unreadable, and shut":
                self.gate.clear()
            if "unreadable" in page.text:
                raise EncodeError("it cannot be read", index=0)
            return self.encode_pages([page])

        [page] = pages
        self.callers.add(threading.get_ident())
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        future = self.page_thread.submit(encode, page)
        future.add_done_callback(self._count_down)
        self.pages.append(future)
        return future

    def _count_down(self, _: object) -> None:
        self.under_way -= 1


@pytest.fixture
def encoder() -> Iterator[Encoder]:
    made = Encoder()
    yield made
    made.gate.set()
    made.threads.shutdown()
    made.page_thread.shutdown()


Rank = Callable[[Reranker, Sequence[Candidate], Query], list[Ranked]]


@pytest.fixture(params=["sync", "async"])
def rank(request: pytest.FixtureRequest) -> Rank:
    """Both ways to call a reranker."""

    def arank(reranker: Reranker, candidates: Sequence[Candidate], query: Query) -> list[Ranked]:
        return asyncio.run(asyncio.wait_for(reranker.arerank(candidates, query), 30))

    return Reranker.rerank if request.param == "sync" else arank


def text(content: str, *ids: str, sha256: str | None = None) -> Candidate:
    return Candidate(partial(Page, id="page", text=content), f"text {content!r}", ids or (content,), sha256)


def broken(exc: Exception, name: str = "broken") -> Candidate:
    def page() -> Page:
        raise exc

    return Candidate(page, name, (name,))


def reranker(encoder: Any, **options: Any) -> Reranker:
    return Reranker(RerankerOptions(encoder=encoder, **options))


def positions(ranking: list[Ranked]) -> list[int]:
    return [ranked.position for ranked in ranking]


# -- order and scores --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sum", "mean", "relevance"])
def test_scores_are_maxsim_on_the_scale_asked_for(encoder: Encoder, rank: Rank, mode: Any) -> None:
    ranking = rank(reranker(encoder, score_mode=mode), [text(each) for each in TEXTS], QUERY)
    query = encoder.multi_vector(QUERY.text or "", None)
    sums = maxsim(query, [encoder.multi_vector(each, None) for each in TEXTS])[0]
    assert positions(ranking) == (-sums).argsort().tolist()
    mean = sums / len(query)
    expected = {"sum": sums, "mean": mean, "relevance": (1 + mean) / 2}[mode]
    assert [ranked.score for ranked in ranking] == pytest.approx([expected[p] for p in positions(ranking)], abs=1e-5)
    assert all(type(ranked.score) is float for ranked in ranking)


def test_equal_scores_are_ordered_by_id_then_by_position(encoder: Encoder, rank: Rank) -> None:
    twins = [Candidate(partial(Page, id="page", text="same"), "twin", ids) for ids in [(), ("c",), ("a",), (), ("b",)]]
    assert positions(rank(reranker(encoder), twins, QUERY)) == [2, 4, 1, 0, 3]
    assert positions(rank(reranker(encoder), twins[::-1], QUERY)) == [2, 0, 3, 1, 4]


def test_top_n_and_the_threshold_bound_the_ranking(encoder: Encoder, rank: Rank) -> None:
    candidates = [text(each) for each in TEXTS]
    everything = rank(reranker(encoder), candidates, QUERY)
    assert len(everything) == len(TEXTS)
    assert rank(reranker(encoder, top_n=2), candidates, QUERY) == everything[:2]
    assert rank(reranker(encoder, score_threshold=everything[1].score), candidates, QUERY) == everything[:2]
    assert (
        rank(reranker(encoder, score_threshold=100.0, on_error="keep"), [*candidates, text(" ")], QUERY)[0].score
        is None
    )


def test_no_candidates_need_no_model(rank: Rank) -> None:
    assert rank(Reranker(RerankerOptions(model="/nowhere")), [], QUERY) == []


# -- where embeddings come from ----------------------------------------------------------------------------------------


@pytest.fixture
def index(encoder: Encoder, tmp_path: Path) -> Iterator[PageIndex]:
    with PageIndex.open(tmp_path / "index", encoder) as made:
        made.add(Page(id=each, text=each) for each in TEXTS)
        made.add([Page(id="picture", image=picture(1))])
        yield made


def test_what_the_index_holds_is_not_encoded(encoder: Encoder, index: PageIndex, rank: Rank) -> None:
    expected = rank(reranker(encoder), [text(each) for each in TEXTS], QUERY)
    encoder.pages.clear()
    known = [broken(AssertionError("not to be made"), each) for each in TEXTS]
    other_id = Candidate(known[0].page, "renamed", ("another id", TEXTS[0]))
    for given in (known, [other_id, *known[1:]]):
        ranking = rank(Reranker(RerankerOptions(index=index)), given, QUERY)
        assert positions(ranking) == positions(expected)
        assert [one.score for one in ranking] == pytest.approx([one.score for one in expected], abs=1e-2)
    assert encoder.pages == []


def test_another_digest_is_another_content(encoder: Encoder, index: PageIndex, rank: Rank) -> None:
    [record] = index.get([TEXTS[0]])
    for digest, n_encoded in ((record.page.sha256, 0), ("another", 1)):
        rank(Reranker(RerankerOptions(index=index)), [text("new text", TEXTS[0], sha256=digest)], QUERY)
        assert len(encoder.pages) == n_encoded


def test_pages_seen_before_are_not_encoded_again(encoder: Encoder, rank: Rank) -> None:
    candidates = [text(each) for each in TEXTS]
    one = reranker(encoder)
    rank(one, candidates, QUERY)
    rank(one.with_options(RerankerOptions(encoder=encoder, top_n=1)), candidates, Query("costs"))
    assert len(encoder.pages) == len(TEXTS), "other options share the cache"
    rank(one.with_options(RerankerOptions(encoder=encoder, cache_bytes=0)), candidates, QUERY)
    assert len(encoder.pages) == 2 * len(TEXTS)
    assert one.with_options(one.options) is one
    cache = PageEmbeddingCache(encoder)
    for _ in range(2):
        rank(Reranker(RerankerOptions(cache=cache)), candidates, QUERY)
    assert len(encoder.pages) == 3 * len(TEXTS)


def test_device_with_an_index_is_that_of_its_own_model(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests.checkpoints import make_checkpoint

    folder = make_checkpoint(tmp_path / "checkpoint", "tomoro").folder
    with ColQwen3Encoder(folder) as encoder, PageIndex.open(tmp_path / "index", encoder) as index:
        index.add([Page(id="a", text="revenue rose")])
        for given in (index, index.location, tmp_path / "index"):
            resources = Reranker(RerankerOptions(index=given, device="cpu")).resources
            opened = resources.open()
            assert isinstance(opened.encoder, ColQwen3Encoder)
            assert opened.encoder.to_dict()["device"] == "cpu"
            assert opened.encoder.to_dict()["model"] == str(folder)
            resources.close()
        assert Reranker(RerankerOptions(index=index)).resources.open().encoder is encoder


def test_a_device_needs_an_encoder_that_has_one(index: PageIndex) -> None:
    with pytest.raises(ConfigError, match="device"):
        Reranker(RerankerOptions(index=index, device="cpu")).resources.open()


def test_the_index_has_to_be_there_and_of_the_same_model(encoder: Encoder, index: PageIndex, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        reranker(encoder, index=tmp_path / "nowhere").rerank([text("x")], QUERY)
    other = Encoder(EncoderInfo("cd34", "other", "tomoro", INFO.dim, 1, 1280, False, 1))
    with pytest.raises(StoreMismatchError, match="fingerprint"):
        reranker(other, index=index).rerank([text("x")], QUERY)


def test_closing_closes_what_was_opened_here(encoder: Encoder, index: PageIndex) -> None:
    ready, by_location = reranker(encoder, index=index), reranker(encoder, index=index.location)
    for one in (ready, by_location):
        opened = one.resources.open().index
        one.resources.close()
        assert opened is not None
        if one is ready:
            assert len(opened) == len(TEXTS) + 1
        else:
            with pytest.raises(StoreError, match="closed"):
                len(opened)
        assert len(one.rerank([text(TEXTS[0])], QUERY)) == 1, "the next use opens it again"
        one.resources.close()


# -- bad candidates ----------------------------------------------------------------------------------------------------


BAD = [
    broken(PageError("not an image", source="a.png"), "no image"),
    broken(ConfigError("not base64"), "no base64"),
    text(" ", "empty"),
    text("unreadable", "unreadable"),
    text("endless", "endless"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda candidate: candidate.ids[0])
def test_a_bad_candidate_raises_at_its_position_and_by_its_name(encoder: Encoder, rank: Rank, bad: Candidate) -> None:
    with pytest.raises(EncodeError) as caught:
        rank(reranker(encoder), [text(TEXTS[0]), bad, text(TEXTS[1])], QUERY)
    assert caught.value.index == 1
    assert str(caught.value).startswith(f"{bad.name}: ")


@pytest.mark.parametrize("on_error", ["skip", "keep"])
@pytest.mark.parametrize("embed_batch_size", [None, 2])
def test_bad_candidates_are_skipped_or_kept_last_with_a_warning(
    encoder: Encoder, rank: Rank, on_error: Any, embed_batch_size: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    candidates = [BAD[0], text(TEXTS[0]), *BAD[1:], text(TEXTS[2])]
    options = {"on_error": on_error, "embed_batch_size": embed_batch_size}
    with caplog.at_level(logging.WARNING, "colqwen3_retrievers"):
        ranking = rank(reranker(encoder, **options), candidates, QUERY)
    bad = [0, 2, 3, 4, 5]
    assert positions(ranking) == [6, 1, *(bad if on_error == "keep" else [])]
    for ranked in ranking[2:]:
        assert ranked.score is None
        assert ranked.metadata[RERANK_ERROR]
        assert candidates[ranked.position].name not in ranked.metadata[RERANK_ERROR]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(bad)
    assert all(any(candidates[position].name in message for message in messages) for position in bad)
    assert rank(reranker(encoder, on_error="skip"), BAD, QUERY) == []
    assert positions(rank(reranker(encoder, on_error="keep", top_n=3), candidates, QUERY)) == [6, 1, 0]


def test_what_is_nobodys_fault_always_raises(encoder: Encoder, rank: Rank, tmp_path: Path) -> None:
    lenient = reranker(encoder, on_error="skip")
    with pytest.raises(EngineError, match="out of memory"):
        rank(lenient, [text(TEXTS[0]), text("no engine")], QUERY)
    with pytest.raises(PageError, match=r"gone\.png"):
        rank(lenient, [text(TEXTS[0])], Query(image=tmp_path / "gone.png"))


def test_after_a_bad_candidate_the_others_are_cancelled(encoder: Encoder, rank: Rank) -> None:
    encoder.gate.clear()
    with pytest.raises(EncodeError, match="neither a text nor an image"):
        rank(reranker(encoder, embed_batch_size=3), [*map(text, TEXTS[:2]), text(" ", "empty")], QUERY)
    assert encoder.pages == [], "it is known to be bad before anything is encoded"
    threading.Timer(0.2, encoder.gate.set).start()
    with pytest.raises(EncodeError, match="unreadable"):
        rank(reranker(encoder), [text("unreadable, and shut"), *map(text, TEXTS)], QUERY)
    assert sum(page.cancelled() for page in encoder.pages) >= len(TEXTS) - 1, "all but the one that waits at the gate"


# -- the work ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, None])
def test_no_more_candidates_are_under_way_than_asked_for(encoder: Encoder, rank: Rank, size: int | None) -> None:
    candidates = [text(f"text {n}") for n in range(7)]
    expected = rank(reranker(encoder), candidates, QUERY)
    encoder.most_under_way = 0
    assert rank(reranker(encoder, embed_batch_size=size), candidates, QUERY) == expected
    assert 0 < encoder.most_under_way <= (size or len(candidates))


def test_the_event_loop_runs_on_and_calls_share_pages(encoder: Encoder) -> None:
    encoder.gate.clear()

    async def main() -> list[list[Ranked]]:
        one, candidates = reranker(encoder), [text(each) for each in TEXTS]
        calls = [asyncio.create_task(one.arerank(candidates, Query(question))) for question in ("a", "b")]
        while len(encoder.pages) < len(TEXTS):
            await asyncio.sleep(0.001)
        for _ in range(50):
            await asyncio.sleep(0.001)
        encoder.gate.set()
        return await asyncio.gather(*calls)

    rankings = asyncio.run(asyncio.wait_for(main(), 10))
    assert [len(ranking) for ranking in rankings] == [len(TEXTS)] * 2
    assert len(encoder.pages) == len(TEXTS)
    assert threading.get_ident() not in encoder.callers, "opening files and checkpoints is not for the loop's thread"


@pytest.mark.parametrize("submitting", [False, True])
def test_cancelling_the_task_cancels_the_encoding(encoder: Encoder, submitting: bool) -> None:
    encoder.gate.clear()
    in_step, go_on = threading.Event(), threading.Event()

    def slow() -> Page:
        in_step.set()
        assert go_on.wait(10)
        return Page(id="slow", text="slow")

    candidates = [*map(text, TEXTS), Candidate(slow, "slow", ("slow",))]

    async def main() -> None:
        task = asyncio.create_task(reranker(encoder).arerank(candidates, QUERY))
        while not in_step.is_set():
            await asyncio.sleep(0.001)
        if not submitting:
            go_on.set()
            while len(encoder.pages) < len(candidates):
                await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        for _ in range(1000):  # the first one runs already: a thread cannot be stopped
            if len(encoder.pages) == len(candidates) and all(page.cancelled() for page in encoder.pages[1:]):
                return
            await asyncio.sleep(0.005)
        pytest.fail("something is still under way")

    asyncio.run(asyncio.wait_for(main(), 10))


def test_evidence_comes_with_what_is_returned(encoder: Encoder, index: PageIndex, rank: Rank, tmp_path: Path) -> None:
    known = Candidate(partial(Page, id="picture", text="a caption"), "known", ("picture",))
    new = Candidate(partial(Page, id="new", image=picture(2)), "new")
    one = Reranker(RerankerOptions(index=index, boxes=1, heatmaps=tmp_path / "maps", top_n=2))
    ranking = rank(one, [known, text("x"), new], Query(image=picture(2)))
    assert positions(ranking) == [2, 0]
    for ranked in ranking:
        assert ranked.metadata.keys() == {"boxes", "heatmap", "pooled"}
        assert ranked.plain({"boxes": [], "pooled": True, RERANK_ERROR: "x", "year": 2024}) == {"year": 2024}
    assert len(list((tmp_path / "maps").iterdir())) == 2
    [plain] = rank(reranker(encoder), [new], QUERY)
    assert plain.metadata == {}
    assert plain.plain({"boxes": [], "pooled": True}) == {"boxes": [], "pooled": True}


# -- arguments ---------------------------------------------------------------------------------------------------------


def ready_cache() -> PageEmbeddingCache:
    return PageEmbeddingCache(ColQwen3Encoder("tiny"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: {"encoder": ColQwen3Encoder("tiny"), "model": "tiny"}, "encoder: .*not both"),
        (lambda: {"encoder": ColQwen3Encoder("tiny"), "device": "cpu"}, "encoder: .*not both"),
        (lambda: {"cache": ready_cache(), "model": "tiny"}, "cache: .*not both"),
        (lambda: {"cache": ready_cache(), "cache_bytes": 5}, "cache_bytes: "),
        (lambda: {"cache": ready_cache(), "encoder": ColQwen3Encoder("tiny")}, "cache: it belongs to another encoder"),
        (lambda: {"images_dir": "pictures"}, "images_dir: "),
        (lambda: {"scoring": "server", "index": "my-index"}, "neither index nor cache"),
        (lambda: {"scoring": "server", "cache_bytes": 0}, "neither index nor cache"),
        (lambda: {"scoring": "server", "boxes": 1}, "neither boxes nor heatmaps"),
        (lambda: {"boxes": -1}, "boxes: "),
        (lambda: {"heatmaps": ""}, "heatmaps: "),
    ],
)
def test_arguments_that_contradict_each_other_are_named(wrong: Callable[[], dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RerankerOptions(**wrong())


def test_an_open_index_has_its_own_images(index: PageIndex) -> None:
    with pytest.raises(ConfigError, match="images_dir: "):
        RerankerOptions(index=index, images_dir="pictures")
