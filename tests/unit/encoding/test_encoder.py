"""The encoder: sharing, threads, batching, order, futures, closing, copies, processes, and bad input."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, MultiVector, Page, TorchOptions, Video
from colqwen3_retrievers.encoding.batching import Job
from colqwen3_retrievers.encoding.futures import ListFuture
from colqwen3_retrievers.encoding.shared_engine import SharedEngine
from colqwen3_retrievers.engines.torch.engine import TorchEngine
from colqwen3_retrievers.errors import (
    CheckpointError,
    ColQwen3Error,
    ConfigError,
    EncodeError,
    EngineError,
    InputTooLongError,
    PageError,
)
from colqwen3_retrievers.models import checkpoint as checkpoint_module
from colqwen3_retrievers.models.checkpoint import open_checkpoint
from colqwen3_retrievers.models.rendering import EncoderInput
from colqwen3_retrievers.pages.images import open_image
from tests.checkpoints import TinyCheckpoint, make_checkpoint

MAX_DIFFERENCE = 1e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("tomoro"), "tomoro")
    checkpoint.edit_config(matryoshka_dims=[48, 32, 16])
    return checkpoint


@pytest.fixture
def encoder(tiny: TinyCheckpoint) -> Iterator[ColQwen3Encoder]:
    with ColQwen3Encoder(tiny.folder, device="cpu") as made:
        yield made


def picture(seed: int = 0, size: tuple[int, int] = (320, 256)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def same(one: MultiVector, other: MultiVector) -> bool:
    return one.vectors.shape == other.vectors.shape and np.abs(one.vectors - other.vectors).max() <= MAX_DIFFERENCE


# -- what comes out ---------------------------------------------------------------------------------------------------


def test_multi_vectors_are_unit_float32_and_keep_order(encoder: ColQwen3Encoder) -> None:
    texts = ["a", "what was the revenue of 2024?" * 3, "b c", "revenue"]
    found = encoder.encode_queries(texts)
    for text, mv in zip(texts, found, strict=True):
        assert mv.vectors.dtype == np.float32
        assert mv.dim == 48
        np.testing.assert_allclose(np.linalg.norm(mv.vectors, axis=1), 1, atol=1e-6)
        assert mv.tokens is not None
        assert "".join(mv.tokens[mv.content]) == text
        assert same(mv, encoder.encode_queries([text])[0])


def test_matryoshka_truncates_and_renormalises(tiny: TinyCheckpoint, encoder: ColQwen3Encoder) -> None:
    full = encoder.encode_queries(["revenue"])[0].vectors
    with ColQwen3Encoder(tiny.folder, device="cpu", dim=16) as narrow:
        cut = narrow.encode_queries(["revenue"])[0].vectors
        assert narrow.info.dim == 16
    expected = full[:, :16] / np.linalg.norm(full[:, :16], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, atol=1e-6)


def test_pooling_is_for_documents_only(tiny: TinyCheckpoint, encoder: ColQwen3Encoder) -> None:
    with ColQwen3Encoder(tiny.folder, device="cpu", pool_factor=3) as pooled:
        query, page = pooled.encode_queries(["revenue"])[0], pooled.encode_images([picture()])[0]
    plain = encoder.encode_images([picture()])[0]
    assert query.clusters is None
    assert page.clusters is not None
    assert len(page.clusters) == len(plain) == 91
    assert len(page) <= -(-91 // 3)
    assert page.visual == plain.visual, "the slice still tells the original visual tokens"
    assert page.grid == (8, 10)


def test_images_in_every_form_are_the_same(encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    picture().save(path)
    forms = [picture(), path, str(path), path.read_bytes()]
    first, *others = encoder.encode_images(forms)
    assert all(same(first, other) for other in others)


def test_videos_as_files_frames_and_video(encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    frames = [picture(i, (320, 288)) for i in range(4)]
    by_frames, by_video = encoder.encode_videos([frames, Video(tuple(frames), (0.0, 0.5, 1.0, 1.5))], fps=2)
    assert same(by_frames, by_video)
    path = tmp_path / "clip.mp4"
    write_clip(path)
    assert len(encoder.encode_videos([path], fps=2)[0]) > 20


def write_clip(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 320, 288, "yuv420p"
        for i in range(30):
            frame = av.VideoFrame.from_image(Image.new("RGB", (320, 288), (8 * i, 90, 255 - 8 * i)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_pages_may_be_a_generator_and_mixed(encoder: ColQwen3Encoder) -> None:
    def pages() -> Iterator[Page]:
        for i in range(150):
            yield Page(id=f"t{i}", text=f"revenue {i}") if i % 50 else Page(id=f"i{i}", image=picture(i))

    found = encoder.encode_pages(pages())
    assert len(found) == 150
    assert [mv.grid for mv in found[:2]] == [(8, 10), None]
    assert same(found[7], encoder.encode_texts(["revenue 7"])[0])


def test_a_progress_bar_is_drawn_on_a_terminal_only(
    encoder: ColQwen3Encoder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder.encode_texts(["a", "b"], show_progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    encoder.encode_texts(["a", "b"], show_progress=True)
    assert "2/2" in capsys.readouterr().err


def test_score_is_maxsim(encoder: ColQwen3Encoder) -> None:
    queries, documents = encoder.encode_queries(["a", "b c"]), encoder.encode_texts(["a", "revenue", "of"])
    expected = [[(q.vectors @ d.vectors.T).max(axis=1).sum() for d in documents] for q in queries]
    scores = encoder.score(queries, documents)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    lengths = np.asarray([[len(q)] for q in queries])
    np.testing.assert_allclose(encoder.score(queries, documents, mode="mean"), expected / lengths, atol=1e-5)
    assert encoder.score([], []).shape == (0, 0)
    assert (encoder.score(queries, []).shape, encoder.score([], documents).shape) == ((2, 0), (0, 3))


def test_bfloat16_is_near_float32(tiny: TinyCheckpoint, encoder: ColQwen3Encoder) -> None:
    exact = encoder.encode_images([picture()])[0].vectors
    with ColQwen3Encoder(tiny.folder, device="cpu", dtype="bfloat16") as half:
        rough = half.encode_images([picture()])[0].vectors
    cosine = (exact * rough).sum(axis=1)
    assert 0.99 < cosine.min() < 0.999999, "near, but bfloat16 must really have been used"


def test_info_names_everything_that_shapes_a_vector(encoder: ColQwen3Encoder, tiny: TinyCheckpoint) -> None:
    info = encoder.info
    assert (info.family, info.dim, info.pool_factor, info.max_visual_tokens) == ("tomoro", 48, 1, 1280)
    assert len(info.fingerprint) == 64
    assert info.model == str(tiny.folder)
    assert not info.verified
    assert "the lower pixel bound" in info.unverified


# -- sharing, threads, order ------------------------------------------------------------------------------------------


def test_a_thousand_calls_from_32_threads(tiny: TinyCheckpoint) -> None:
    with ColQwen3Encoder(tiny.folder, device="cpu", dtype="float32") as shared:
        texts = [f"what was the revenue of {i}" + " in the image" * (i % 7) for i in range(1000)]
        expected = [shared.encode_queries([text])[0] for text in texts]
        before = shared.stats.batches
        barrier = threading.Barrier(32)

        def caller(start: int) -> list[tuple[int, MultiVector]]:
            barrier.wait()
            return [(i, shared.encode_queries([texts[i]])[0]) for i in range(start, 1000, 32)]

        with ThreadPoolExecutor(32) as pool:
            found = dict(item for part in pool.map(caller, range(32)) for item in part)
        worst = max(np.abs(found[i].vectors - expected[i].vectors).max() for i in range(1000))
        assert worst <= MAX_DIFFERENCE
        assert shared.stats.loads == 1
        assert shared.stats.batches - before < 1000, "concurrent callers must be gathered"


def test_equal_settings_share_one_model_and_closing_one_leaves_the_other(tiny: TinyCheckpoint) -> None:
    one = ColQwen3Encoder(tiny.folder, device="cpu")
    two = ColQwen3Encoder(str(tiny.folder), device="cpu", dim=16, max_visual_tokens=100)
    one.encode_queries(["a"])
    two.encode_queries(["a"])
    assert one.stats is two.stats
    assert one.stats.loads == 1
    one.close()
    one.close()
    assert two.encode_queries(["b"])[0].dim == 16
    for use in (lambda: one.encode_queries(["a"]), lambda: one.submit_pages([Page(id="p", text="a")])):
        with pytest.raises(EngineError, match="the encoder is closed"):
            use()
    two.close()
    with ColQwen3Encoder(tiny.folder, device="cpu") as three:
        three.encode_queries(["a"])
        assert three.stats.inputs == 1, "the last handle freed the model; this is a new one"


def test_a_forgotten_encoder_frees_its_model(tiny: TinyCheckpoint) -> None:
    def engines() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "colqwen3-engine"}

    before = engines()
    forgotten = ColQwen3Encoder(tiny.folder, device="cpu", dtype="bfloat16")
    forgotten.encode_queries(["a"])
    [mine] = engines() - before
    del forgotten
    gc.collect()
    mine.join(30)
    assert not mine.is_alive()


@pytest.mark.parametrize("budget", [1, 64, 300, 100_000])
def test_results_do_not_depend_on_the_batch_budget(tiny: TinyCheckpoint, encoder: ColQwen3Encoder, budget: int) -> None:
    pages = [Page(id=f"p{i}", image=picture(i, (256 + 64 * i, 256))) for i in range(4)]
    pages += [Page(id=f"t{i}", text="revenue " * (i + 1)) for i in range(6)]
    expected = [encoder.encode_pages([page])[0] for page in pages]
    with ColQwen3Encoder(tiny.folder, device="cpu", engine=TorchOptions(batch_tokens=budget)) as other:
        assert all(same(a, b) for a, b in zip(expected, other.encode_pages(pages), strict=True))


def test_futures_can_be_awaited_while_the_loop_runs(encoder: ColQwen3Encoder) -> None:
    encoder.encode_queries(["warm"])

    async def main() -> tuple[int, list[MultiVector]]:
        ticks = 0
        done = asyncio.wrap_future(encoder.submit_pages([Page(id=f"{i}", image=picture(i)) for i in range(10)]))
        while not done.done():
            ticks += 1
            await asyncio.sleep(0.001)
        return ticks, await done

    ticks, found = asyncio.run(main())
    assert len(found) == 10
    assert ticks >= 5


def test_closing_fails_what_waits_and_hangs_nobody(tiny: TinyCheckpoint) -> None:
    closing = ColQwen3Encoder(tiny.folder, device="cpu", engine=TorchOptions(batch_tokens=100))
    closing.encode_queries(["warm"])
    future = closing.submit_pages([Page(id=f"p{i}", image=picture(i, (640, 512))) for i in range(200)])
    closing.close()
    with pytest.raises(EngineError, match="closed"):
        future.result(30)


def test_cancelling_takes_back_what_was_not_encoded(tiny: TinyCheckpoint) -> None:
    with ColQwen3Encoder(tiny.folder, device="cpu", engine=TorchOptions(batch_tokens=100)) as one:
        one.encode_queries(["warm"])
        before = one.stats.inputs
        future = one.submit_pages([Page(id=f"p{i}", image=picture(i, (640, 512))) for i in range(100)])
        assert future.cancel()
        assert wait([future], timeout=10).done == {future}, "whoever waits for it must be told"
        one.encode_texts(["after"])
        assert one.stats.inputs - before < 10


def test_an_iterable_that_fails_takes_back_what_it_gave(tiny: TinyCheckpoint) -> None:
    def pages() -> Iterator[Page]:
        for i in range(50):
            yield Page(id=f"p{i}", image=picture(i, (640, 512)))
        raise PageError("broken", source="a.pdf")

    with ColQwen3Encoder(tiny.folder, device="cpu", engine=TorchOptions(batch_tokens=100)) as one:
        one.encode_queries(["warm"])
        before = one.stats.inputs
        with pytest.raises(PageError):
            one.submit_pages(pages())
        one.encode_texts(["after"])
        assert one.stats.inputs - before < 10


def test_a_generator_is_read_at_most_64_pages_ahead(encoder: ColQwen3Encoder) -> None:
    read = 0
    ahead = []

    def pages() -> Iterator[Page]:
        nonlocal read
        for i in range(300):
            read += 1
            ahead.append(read - (encoder.stats.inputs - before))
            yield Page(id=f"p{i}", text=f"revenue {i}")

    encoder.encode_queries(["warm"])
    before = encoder.stats.inputs
    assert len(encoder.encode_pages(pages())) == 300
    assert max(ahead) <= 66


def test_an_encoder_out_of_scope_finishes_its_work(tiny: TinyCheckpoint) -> None:
    future = ColQwen3Encoder(tiny.folder, device="cpu").submit_queries(["a", "b"])
    gc.collect()
    assert len(future.result(60)) == 2


def test_the_first_submit_returns_at_once(tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening may be a download of minutes: here the real opening, made slow."""
    really = checkpoint_module.locate

    def slowly(*args: Any, **kwargs: Any) -> Path:
        time.sleep(1)
        return really(*args, **kwargs)

    monkeypatch.setattr(checkpoint_module, "locate", slowly)
    with ColQwen3Encoder(tiny.folder, device="cpu") as slow:
        start = time.monotonic()
        futures = [slow.submit_queries(["a"]), slow.submit_pages([Page(id="p", text="b")])]
        assert time.monotonic() - start < 0.5
        assert [len(future.result(60)) for future in futures] == [1, 1]


def test_callbacks_may_close_or_exit_and_the_engine_lives_on(tiny: TinyCheckpoint) -> None:
    with ColQwen3Encoder(tiny.folder, device="cpu") as other:
        other.encode_queries(["warm"])
        closing = ColQwen3Encoder(tiny.folder, device="cpu")
        done = threading.Event()
        future = closing.submit_pages([Page(id="p", text="x")])
        future.add_done_callback(lambda _: (closing.close(), done.set()))
        future.result(30)
        assert done.wait(30)
        other.submit_queries(["a"]).add_done_callback(lambda _: sys.exit(3))
        other.submit_pages([Page(id="p", text="a")]).add_done_callback(lambda _: sys.exit(3))
        for _ in range(3):
            assert len(other.submit_queries(["b"]).result(30)) == 1
            assert len(other.submit_pages([Page(id="p", text="b")]).result(30)) == 1


def test_one_lazy_image_given_many_times_in_many_threads(encoder: ColQwen3Encoder, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(3, (900, 900)).save(path)
    expected = encoder.encode_images([path])[0]
    for _ in range(5):
        with Image.open(path) as lazy:
            with ThreadPoolExecutor(8) as pool:
                opened = list(pool.map(open_image, [lazy] * 8))
            assert len({image.tobytes() for image in opened}) == 1
    with Image.open(path) as lazy:
        assert all(same(expected, mv) for mv in encoder.encode_images([lazy] * 8))


def test_equal_engines_however_they_are_spelled_are_one(tiny: TinyCheckpoint) -> None:
    spellings = [{"device": "cpu"}, {"device": "cpu", "dtype": "float32"}, {"device": "cpu", "engine": "torch"}]
    if not torch.cuda.is_available():
        spellings.append({})
    encoders = [ColQwen3Encoder(tiny.folder, **settings) for settings in spellings]
    assert len({id(one.stats) for one in encoders}) == 1
    for one in encoders:
        one.close()


def test_another_checkpoint_in_the_same_folder_is_another_model(tmp_path: Path) -> None:
    first = make_checkpoint(tmp_path / "c", "tomoro", seed=1)
    with ColQwen3Encoder(first.folder, device="cpu") as old:
        before = old.encode_queries(["revenue"])[0]
        make_checkpoint(tmp_path / "c", "tomoro", seed=2)
        with ColQwen3Encoder(first.folder, device="cpu") as new:
            assert new.info.fingerprint != old.info.fingerprint
            assert not same(before, new.encode_queries(["revenue"])[0])


def test_a_kept_error_keeps_no_model(tiny: TinyCheckpoint) -> None:
    engines = [TorchEngine(open_checkpoint(tiny.folder), device="cpu", dtype="float32")]
    alive = weakref.ref(engines[0])
    shared = SharedEngine("key", engines.pop)
    future: ListFuture[MultiVector] = ListFuture()
    job = Job("page", 0, lambda _: job.item, future, future.add_item())
    job.item = EncoderInput(False, "", np.full(3, 10**6), slice(0, 3))
    shared.submit_rendered(job)
    with pytest.raises(EngineError) as caught:
        future.result(30)
    shared.close()
    del shared
    gc.collect()
    assert caught.value is not None
    assert alive() is None


# -- copies and processes ---------------------------------------------------------------------------------------------


def test_copies_hold_settings_only_and_share_the_model(tiny: TinyCheckpoint) -> None:
    original = ColQwen3Encoder(tiny.folder, device="cpu", dim=32, pool_factor=2, engine=TorchOptions(batch_tokens=512))
    blob = pickle.dumps(original)
    assert len(blob) < 2000
    for copy in (pickle.loads(blob), ColQwen3Encoder.from_dict(original.to_dict())):
        assert copy.to_dict() == original.to_dict()
        assert repr(copy) == repr(original)
        original.encode_queries(["a"])
        copy.encode_queries(["a"])
        assert copy.stats is original.stats
        copy.close()
    original.close()
    with pytest.raises(ConfigError, match="encoder settings"):
        ColQwen3Encoder.from_dict({"model": "tiny"})


def _encode_in_child(encoder: ColQwen3Encoder, queue: Any) -> None:
    queue.put(np.asarray(encoder.encode_queries(["from a child"])[0]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_loads_its_own(encoder: ColQwen3Encoder, method: str) -> None:
    expected = encoder.encode_queries(["from a child"])[0].vectors
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_encode_in_child, args=(encoder, queue))
    child.start()
    found = queue.get(timeout=90)
    child.join(30)
    assert child.exitcode == 0
    assert np.abs(found - expected).max() <= MAX_DIFFERENCE
    assert same(encoder.encode_queries(["from a child"])[0], MultiVector(found)), "the parent goes on"


def test_a_script_that_leaves_work_undone_ends(tiny: TinyCheckpoint) -> None:
    code = (
        "from colqwen3_retrievers import ColQwen3Encoder, Page\n"
        f"encoder = ColQwen3Encoder({str(tiny.folder)!r}, device='cpu')\n"
        "encoder.encode_queries(['a'])\n"
        "import time; from PIL import Image; picture = Image.effect_noise((1100, 1100), 90)\n"
        "encoder.submit_pages([Page(id=str(i), image=picture) for i in range(2000)])\n"
        "print(time.time(), flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=90, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert time.time() - float(done.stdout) < 20, "a process that ends must not first encode all it was asked"


# -- environment ------------------------------------------------------------------------------------------------------


def test_argument_beats_environment_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLQWEN3_MODEL", raising=False)
    assert ColQwen3Encoder().to_dict()["model"] == "TomoroAI/tomoro-colqwen3-embed-4b"
    monkeypatch.setenv("COLQWEN3_MODEL", "some/model")
    assert ColQwen3Encoder().to_dict()["model"] == "some/model"
    assert ColQwen3Encoder("other/model").to_dict()["model"] == "other/model"
    monkeypatch.setenv("COLQWEN3_ENGINE", "quantum")
    with pytest.raises(ConfigError, match="engine 'quantum'"):
        ColQwen3Encoder()
    assert ColQwen3Encoder(engine="torch").to_dict()["engine"]["name"] == "torch"


# -- bad input --------------------------------------------------------------------------------------------------------

BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"dim": 0}, "dim: expected a whole number from 1, got 0"),
    ({"dim": 16.0}, "dim: expected a whole number from 1"),
    ({"dim": True}, "dim: expected a whole number from 1"),
    ({"pool_factor": 0}, "pool_factor: expected"),
    ({"pool_factor": None}, "pool_factor: expected"),
    ({"max_visual_tokens": -1}, "max_visual_tokens: expected"),
    ({"dtype": "float64"}, "dtype 'float64': expected auto, bfloat16"),
    ({"engine": "onnx"}, "engine 'onnx': expected auto, torch"),
    ({"engine": 3}, "engine 3: expected auto"),
    ({"family": "colqwen2"}, "family 'colqwen2': expected one of"),
    ({"include_text": "yes"}, "include_text: expected True or False"),
    ({"truncate": 1}, "truncate: expected True or False"),
    ({"device": 0}, "device: expected a string, got 0"),
    ({"model": ""}, "model: expected a hub name or a folder"),
    ({"model": 7}, "model: expected a hub name or a folder, got 7"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS, ids=lambda value: str(value)[:40])
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ColQwen3Encoder(**settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens: expected .* from 1"),
        ({"attn_implementation": "magic"}, "attn_implementation 'magic': expected sdpa"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TorchOptions(**options)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"dim": 47}, ConfigError, "dim 47: .* was trained for 48, 32, 16"),
        ({"max_visual_tokens": 1281}, ConfigError, "max_visual_tokens 1281: .* reads at most 1280 a page"),
        ({"device": "cuda"}, ConfigError, "device 'cuda': this torch .* sees no CUDA device"),
        ({"device": "warp"}, ConfigError, "device 'warp'"),
        ({"device": "meta"}, ConfigError, "device 'meta': expected cuda, mps or cpu"),
        ({"engine": TorchOptions(attn_implementation="flash_attention_2")}, ConfigError, "flash_attention_2' requires"),
        ({"family": "ops"}, CheckpointError, "no place for embedding_proj_layer"),
        ({"model": "nowhere/at/all"}, CheckpointError, "nowhere/at/all: no such folder"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_settings_for_this_checkpoint(
    tiny: TinyCheckpoint, settings: dict[str, Any], kind: type[ColQwen3Error], message: str
) -> None:
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    made = ColQwen3Encoder(**{"model": tiny.folder, "device": "cpu", **settings})
    with made, pytest.raises(kind, match=message):
        made.encode_queries(["a"])


BAD_CALLS: list[tuple[str, Callable[[ColQwen3Encoder], object], type[ColQwen3Error], str]] = [
    ("a bare query", lambda e: e.encode_queries("revenue"), ConfigError, r"queries: expected a list, got str"),
    ("a bare page", lambda e: e.encode_pages(Page(id="p", text="x")), ConfigError, "pages: expected a list, got Page"),
    ("a bare path", lambda e: e.encode_images(Path("a.png")), ConfigError, "images: expected a list"),
    ("no iterable", lambda e: e.encode_texts(5), ConfigError, "texts: expected a list, got int"),
    ("an empty query", lambda e: e.encode_queries(["a", " "]), EncodeError, "input 1: query: give a text"),
    ("a number as query", lambda e: e.encode_queries([3]), EncodeError, "input 0: a query is a text or a Query"),
    ("None as page", lambda e: e.encode_pages([None]), EncodeError, "input 0: expected a Page, not NoneType"),
    ("an empty text", lambda e: e.encode_texts(["a", "b", "\n"]), EncodeError, "input 2: page 'input 2' has neither"),
    ("a number as text", lambda e: e.encode_texts([4]), EncodeError, "input 0: page 'input 0': expected text"),
    ("a missing image", lambda e: e.encode_images(["no.png"]), EncodeError, "input 0: no.png: cannot be read: No such"),
    ("bytes that are no image", lambda e: e.encode_images([b"hello"]), EncodeError, "input 0: <5 bytes>: not an image"),
    ("no bytes at all", lambda e: e.encode_images([b""]), EncodeError, "input 0: <0 bytes>: the image is empty"),
    ("an array of integers", lambda e: e.encode_images([np.zeros((8, 8, 3), int)]), EncodeError, "an array of uint8"),
    ("a url", lambda e: e.encode_images(["https://x.test/a.png"]), EncodeError, "an image URL is not fetched"),
    ("a thin image", lambda e: e.encode_images([Image.new("RGB", (1, 300))]), EncodeError, "more than 200 times"),
    ("a video without frames", lambda e: e.encode_videos([[]]), EncodeError, "input 0: video: expected at least one"),
    ("a missing video", lambda e: e.encode_videos(["no.mp4"]), EncodeError, "input 0: no.mp4"),
    ("a number as video", lambda e: e.encode_videos([5]), EncodeError, "input 0: a video is a file, a list of frames"),
    ("a text as pace", lambda e: e.encode_videos([], fps="x"), ConfigError, "fps: expected a number above 0, got 'x'"),
    ("no pace", lambda e: e.encode_videos([], fps=0), ConfigError, "fps: expected a number above 0"),
    ("a surrogate", lambda e: e.encode_queries(["a", "\udc00"]), EncodeError, "input 1: the text holds a lone"),
    ("too long", lambda e: e.encode_queries(["é" * 3000]), InputTooLongError, "input 0: the prompt .* limit is 4,096"),
    ("another mode", lambda e: e.score(*[e.encode_queries(["a"])] * 2, mode="max"), ConfigError, "mode"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "call", "kind", "message"), BAD_CALLS, ids=[row[0] for row in BAD_CALLS])
def test_bad_calls(
    encoder: ColQwen3Encoder,
    name: str,
    call: Callable[[ColQwen3Encoder], object],
    kind: type[ColQwen3Error],
    message: str,
) -> None:
    with pytest.raises(kind, match=message) as caught:
        call(encoder)
    if isinstance(caught.value, EncodeError):
        assert caught.value.index is not None
    assert len(encoder.encode_queries(["and it still works"])) == 1


def test_a_bad_page_among_good_ones_names_itself(encoder: ColQwen3Encoder) -> None:
    pages = [Page(id=f"p{i}", text="fine") for i in range(5)]
    pages[3] = Page(id="p3", image=b"broken")
    for call in (encoder.encode_pages, lambda p: encoder.submit_pages(p).result(60)):
        with pytest.raises(EncodeError, match="input 3") as caught:
            call(pages)
        assert caught.value.index == 3


def test_a_load_that_failed_is_tried_again(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", "ops")
    blob = (checkpoint.folder / "model.safetensors").read_bytes()
    with ColQwen3Encoder(checkpoint.folder, device="cpu") as one:
        assert one.info.dim == 48
        spoiled = bytearray(blob)
        spoiled[:8] = (2**40).to_bytes(8, "little")
        (checkpoint.folder / "model.safetensors").write_bytes(spoiled)
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
            one.encode_queries(["a"])
        (checkpoint.folder / "model.safetensors").write_bytes(blob)
        assert len(one.encode_queries(["a"])) == 1


def test_nan_from_the_model_is_an_error_not_a_result(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", "tomoro")
    spoiled = checkpoint.names["embedding_proj_layer.bias"].clone()
    spoiled[3] = float("nan")
    checkpoint.write({**checkpoint.names, "embedding_proj_layer.bias": spoiled})
    with ColQwen3Encoder(checkpoint.folder, device="cpu") as one, pytest.raises(EngineError, match="NaN or infinity"):
        one.encode_queries(["a"])


def test_out_of_memory_halves_the_batch_and_goes_on(tiny: TinyCheckpoint) -> None:
    """Real: a child process whose address space is capped so that the whole batch cannot fit, but parts can."""
    code = f"""
import resource, sys
import numpy as np
from PIL import Image
from colqwen3_retrievers.models.checkpoint import open_checkpoint
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.engines.torch.engine import TorchEngine
from colqwen3_retrievers.engines.options import TorchOptions
from colqwen3_retrievers.models.rendering import Renderer
from colqwen3_retrievers.models.tokenizer import PromptTokenizer

opened = open_checkpoint({str(tiny.folder)!r})
engine = TorchEngine(opened, device="cpu", dtype="float32", options=TorchOptions(batch_tokens=1_000_000))
renderer = Renderer(opened.family, PromptTokenizer(opened.folder, model="m"), min_pixels=opened.min_pixels,
                    max_pixels=opened.max_pixels, context_length=4096)
rng = np.random.default_rng(0)
images = [Image.fromarray(rng.integers(0, 256, (512, 640, 3), dtype=np.uint8)) for _ in range(24)]
inputs = [renderer.document(Page(id="p", image=image)) for image in images]
expected = [engine.embed([item])[0] for item in inputs]
with open("/proc/self/statm") as f:
    used = int(f.read().split()[0]) * resource.getpagesize()
for room in range(120_000_000, 0, -10_000_000):  # how much the heap has free already is not known
    resource.setrlimit(resource.RLIMIT_AS, (used + room, -1))
    found = engine.embed(inputs)
    if engine.n_halvings:
        break
assert engine.n_halvings > 0, "the cap was too loose for this test to mean anything"
assert engine.batch_tokens < 1_000_000
worst = max(float(np.abs(a - b).max()) for a, b in zip(expected, found))
print(len(found), engine.n_halvings, worst)
assert worst < 1e-4
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("24 ")
