"""The page cache: one encoding a content, a bound in bytes, errors that name the page, threads, cancelling, forks."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, MultiVector, Page
from colqwen3_retrievers.cache.page_cache import PageEmbeddingCache, result_at
from colqwen3_retrievers.errors import CheckpointError, ConfigError, EncodeError, EngineError
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cache")
    make_checkpoint(made / "checkpoint", "tomoro")
    return made


@pytest.fixture
def encoder(folder: Path) -> Iterator[ColQwen3Encoder]:
    with ColQwen3Encoder(folder / "checkpoint", device="cpu") as made:
        yield made


class ByHand:
    """An encoder whose futures the test settles: no thread decides when."""

    def __init__(self, *, include_text: bool = False) -> None:
        self.info = EncoderInfo("ab", "by hand", "tomoro", 2, 1, 64, include_text, 1)
        self.started: list[tuple[Page, Future[list[MultiVector]]]] = []

    def submit_pages(self, pages: Iterable[Page], /) -> Future[list[MultiVector]]:
        future: Future[list[MultiVector]] = Future()
        (page,) = pages
        self.started.append((page, future))
        return future


def vector(tokens: int = 1) -> MultiVector:
    return MultiVector(np.tile(np.asarray([[0.6, 0.8]], dtype=np.float32), (tokens, 1)))


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8))


def text_page(text: str) -> Page:
    return Page(id=f"page {text}", text=text)


def test_a_page_seen_before_is_not_encoded_again(encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    pages = [Page(id="a", image=tmp_path / "a.png"), Page(id="b", image=picture(1)), text_page("revenue")]
    cache = PageEmbeddingCache(encoder)
    first = cache.get_or_encode(pages)
    encoded = encoder.stats.inputs
    again = cache.get_or_encode([page.replace(id=f"{page.id} again", metadata={"x": 1}) for page in reversed(pages)])
    assert encoder.stats.inputs == encoded
    assert all(one is other for one, other in zip(first, reversed(again), strict=True))
    for one, plain in zip(first, encoder.encode_pages(pages), strict=True):
        np.testing.assert_allclose(one.vectors, plain.vectors, atol=1e-5)


def test_a_file_changed_in_place_is_another_page(encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    cache = PageEmbeddingCache(encoder)
    page = Page(id="a", image=tmp_path / "a.bmp")
    picture(0).save(tmp_path / "a.bmp")
    before = cache.get_or_encode([page])[0]
    picture(1).save(tmp_path / "a.bmp")  # of the same size in bytes
    after = cache.get_or_encode([page])[0]
    assert np.abs(before.vectors - after.vectors).max() > 0.01
    assert len(cache) == 2


@pytest.mark.parametrize(("include_text", "encodings"), [(False, 1), (True, 2)])
def test_the_text_beside_a_picture_counts_only_where_it_is_encoded(include_text: bool, encodings: int) -> None:
    encoder = ByHand(include_text=include_text)
    data = b"any bytes: nothing is decoded to know them"
    PageEmbeddingCache(encoder).submit([Page(id="a", image=data, text="x"), Page(id="a", image=data, text="y")])
    assert len(encoder.started) == encodings


def test_two_who_ask_at_the_same_time_share_one_encoding() -> None:
    encoder = ByHand()
    cache = PageEmbeddingCache(encoder)
    one, other = (cache.submit([text_page("x")])[0] for _ in range(2))
    assert len(encoder.started) == 1
    made = vector()
    encoder.started[0][1].set_result([made])
    assert one.result(1) is made
    assert other.result(1) is made


def test_many_threads_encode_each_content_once(encoder: ColQwen3Encoder) -> None:
    cache = PageEmbeddingCache(encoder)
    barrier = threading.Barrier(8)

    def ask(_: int) -> list[MultiVector]:
        barrier.wait(10)
        return cache.get_or_encode([text_page(text) for text in "abcde"])

    before = encoder.stats.inputs
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert encoder.stats.inputs - before == 5
    assert all(one is other for answer in answers for one, other in zip(answers[0], answer, strict=True))


def test_the_least_recently_used_go_beyond_the_bound() -> None:
    encoder = ByHand()
    size = vector(10).vectors.nbytes
    cache = PageEmbeddingCache(encoder, max_bytes=2 * size)

    def ask(text: str) -> int:
        before = len(encoder.started)
        cache.submit([text_page(text)])
        for _, future in encoder.started[before:]:
            future.set_result([vector(10)])
        assert cache.nbytes == len(cache) * size <= cache.max_bytes
        return len(encoder.started) - before

    assert [ask(text) for text in "ab"] == [1, 1]
    assert ask("a") == 0
    assert ask("c") == 1  # "b" has to go, "a" was used since
    assert [ask("a"), ask("b")] == [0, 1]
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


def test_a_page_larger_than_the_bound_is_given_and_not_kept() -> None:
    encoder = ByHand()
    cache = PageEmbeddingCache(encoder, max_bytes=0)
    future = cache.submit([text_page("x")])[0]
    encoder.started[0][1].set_result([vector()])
    assert len(future.result(1)) == 1
    assert len(cache) == 0


@pytest.mark.parametrize("bound", [-1, True, 1.5, "1"])
def test_a_bad_bound_is_refused(bound: object) -> None:
    with pytest.raises(ConfigError, match="max_bytes"):
        PageEmbeddingCache(ByHand(), max_bytes=bound)  # type: ignore[arg-type]


def test_a_bad_page_is_named_by_its_place(encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    cache = PageEmbeddingCache(encoder)
    good = text_page("good")
    for bad, said in [
        (Page(id="b", image=tmp_path / "broken.png"), "not an image"),
        (Page(id="g", image=tmp_path / "gone.png"), "cannot be read"),
        (Page(id="u", image="https://example.org/a.png"), "not fetched"),
        (Page(id="e"), "neither image nor text"),
    ]:
        with pytest.raises(EncodeError, match=said) as caught:
            cache.get_or_encode([good, bad, good])
        assert caught.value.index == 1
        assert str(caught.value).count("input ") == 1
    assert cache.get_or_encode([good])
    assert len(cache) == 1, "what failed is not kept, and is tried anew"


def test_what_is_not_the_fault_of_a_page_is_not_called_so() -> None:
    encoder = ByHand()
    cache = PageEmbeddingCache(encoder)
    for error in [CheckpointError("no such model"), EngineError("out of memory")]:
        future = cache.submit([text_page("x")])[0]
        encoder.started[-1][1].set_exception(error)
        with pytest.raises(type(error)) as caught:
            result_at(future, 0)
        assert caught.value is error


def test_an_encoding_is_cancelled_when_the_last_who_waits_has_gone() -> None:
    encoder = ByHand()
    cache = PageEmbeddingCache(encoder)
    one, other = (cache.submit([text_page("x")])[0] for _ in range(2))
    encoding = encoder.started[0][1]
    one.cancel()
    assert not encoding.cancelled()
    other.cancel()
    assert encoding.cancelled()
    third = cache.submit([text_page("x")])[0]
    assert len(encoder.started) == 2, "the next one starts anew"
    encoder.started[1][1].set_result([vector()])
    assert len(third.result(1)) == 1


def test_one_who_goes_away_takes_nothing_from_the_others() -> None:
    encoder = ByHand()
    cache = PageEmbeddingCache(encoder)
    one, other = (cache.submit([text_page("x")])[0] for _ in range(2))
    one.cancel()
    encoder.started[0][1].set_result([vector()])
    assert len(other.result(1)) == 1
    assert len(cache) == 1


def test_an_encoder_that_refuses_leaves_nobody_waiting() -> None:
    class Closed(ByHand):
        def submit_pages(self, pages: Iterable[Page], /) -> Future[list[MultiVector]]:
            raise EngineError("the encoder is closed")

    cache = PageEmbeddingCache(Closed())
    for _ in range(2):
        with pytest.raises(EngineError, match="closed"):
            cache.submit([text_page("x")])


def _ask_in_child(cache: PageEmbeddingCache, answers: multiprocessing.Queue[int]) -> None:
    assert isinstance(cache.encoder, ByHand)
    before = len(cache.encoder.started)
    cache.submit([text_page("x")])
    answers.put(len(cache.encoder.started) - before)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_its_parents_threads() -> None:
    cache = PageEmbeddingCache(ByHand())
    cache.submit([text_page("x")])
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_ask_in_child, args=(cache, answers))
    child.start()
    assert answers.get(timeout=20) == 1
    child.join(20)


def test_a_digest_that_a_caller_gave_does_not_mix_pages(encoder: ColQwen3Encoder) -> None:
    shown = [Page(id=str(n), image=Image.new("RGB", (64, 64), (n * 90, 0, 0)), sha256="whole file") for n in (1, 2)]
    texts = [Page(id=f"text {n}", text=f"words {n}", sha256="whole file") for n in (1, 2)]
    cache = PageEmbeddingCache(encoder)
    made = cache.get_or_encode([*shown, *texts])
    assert len(cache) == 4
    alone = encoder.encode_pages([shown[1], texts[1]])
    assert np.allclose(made[1].vectors, alone[0].vectors, atol=1e-5)
    assert np.allclose(made[3].vectors, alone[1].vectors, atol=1e-5)
