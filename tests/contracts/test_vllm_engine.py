"""vLLM in this process under the engine contract, and what is the engine's own: its options, checks and end.

Runs in the environment that ``make test-vllm`` builds.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from colqwen3_retrievers import ColQwen3Encoder
from colqwen3_retrievers.engines.options import VLLMOptions
from colqwen3_retrievers.engines.vllm.engine import VLLMEngine, settle_dtype
from colqwen3_retrievers.errors import CheckpointError, ConfigError, EngineError, InputTooLongError
from colqwen3_retrievers.models.checkpoint import open_checkpoint
from colqwen3_retrievers.models.rendering import EncoderInput, Renderer
from colqwen3_retrievers.models.tokenizer import PromptTokenizer
from colqwen3_retrievers.pages.page import Page, Query, Video
from tests.checkpoints import FAMILY_NAMES, TinyCheckpoint, make_checkpoint
from tests.contracts.engine_contract import SENTENCE, EngineContract, pictures
from tests.reference import QUERY, image_prompt, reference_embeddings
from tests.server_process import CPU_ENVIRONMENT
from tests.tiny_reference import tiny_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's and its dependencies', which are not ours to mend

HEAD_DIM = 32  # the least that vLLM's attention on a CPU takes
OPTIONS = VLLMOptions(enforce_eager=True)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def in_this_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**CPU_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
            patch.setenv(name, value)
        yield


def encoders() -> Iterator[Callable[..., ColQwen3Encoder]]:
    opened: list[ColQwen3Encoder] = []

    def make(folder: object, **settings: object) -> ColQwen3Encoder:
        opened.append(ColQwen3Encoder(folder, engine=OPTIONS, **settings))
        return opened[-1]

    yield make
    for encoder in opened:
        encoder.close()


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, head_dim=HEAD_DIM)


@pytest.fixture(scope="module")
def open_encoder(checkpoint: TinyCheckpoint) -> Iterator[Callable[..., ColQwen3Encoder]]:
    yield from encoders()  # closed before the next family's model is loaded


class TestVLLMEngine(EngineContract):
    pass


class TestVLLMEngineOnTiny(EngineContract):
    @pytest.fixture(scope="class")
    def checkpoint(self) -> TinyCheckpoint:
        return tiny_checkpoint()

    @pytest.fixture(scope="class")
    def open_encoder(self, checkpoint: TinyCheckpoint) -> Iterator[Callable[..., ColQwen3Encoder]]:
        yield from encoders()

    @pytest.fixture(scope="class")
    def encoder(self, checkpoint: TinyCheckpoint, open_encoder: Callable[..., ColQwen3Encoder]) -> ColQwen3Encoder:
        return open_encoder(checkpoint.folder, dtype="float32")

    def test_family_and_dim_are_told(self, encoder: ColQwen3Encoder, checkpoint: TinyCheckpoint) -> None:
        assert checkpoint.bias is not None
        assert (encoder.info.family, encoder.info.dim) == ("tomoro", len(checkpoint.bias))

    def test_token_counts(self, encoder: ColQwen3Encoder, checkpoint: TinyCheckpoint) -> None:
        mv = encoder.encode_images(pictures()[:1])[0]
        assert len(mv) == len(reference_embeddings(checkpoint, [image_prompt("tomoro")], pictures()[:1])[0])
        assert mv.grid == (8, 10)
        assert mv.visual == mv.content

    @pytest.mark.parametrize("n_frames", [2, 3])
    def test_videos_are_exact_where_there_is_a_prompt(
        self, encoder: ColQwen3Encoder, checkpoint: TinyCheckpoint, n_frames: int
    ) -> None:
        """vLLM tokenises each time mark alone; ``tiny``'s tokenizer, unlike Qwen's, then puts a space before it."""
        video = Video(tuple(picture.resize((320, 288)) for picture in pictures()[:1] * n_frames), None)
        with pytest.raises(EngineError, match="splits a video's time marks otherwise alone"):
            encoder.encode_videos([video])
        assert len(encoder.encode_queries([SENTENCE])) == 1


# -- the engine itself -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tomoro(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return make_checkpoint(tmp_path_factory.mktemp("own") / "tomoro", "tomoro", head_dim=HEAD_DIM)


def start(
    model: TinyCheckpoint, *, dtype: str = "float32", options: VLLMOptions = OPTIONS, max_pixels: int = 262_144
) -> VLLMEngine:
    return VLLMEngine(open_checkpoint(model.folder), dtype=dtype, options=options, max_pixels=max_pixels)


def render(model: TinyCheckpoint, what: Query | Page) -> EncoderInput:
    checkpoint = open_checkpoint(model.folder)
    renderer = Renderer(
        checkpoint.family, PromptTokenizer(checkpoint.folder, model="m"), min_pixels=65_536, max_pixels=262_144,
        context_length=checkpoint.context_length,
    )  # fmt: skip
    return renderer.query(what) if isinstance(what, Query) else renderer.document(what)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def loaded_model(engine: VLLMEngine) -> torch.nn.Module:
    """vLLM's model itself, which lives in this process here."""
    return engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model


def test_checks_its_results_and_frees_the_model(tomoro: TinyCheckpoint) -> None:
    query, image = render(tomoro, Query(SENTENCE)), render(tomoro, Page(id="p", image=pictures()[0]))
    assert image.pixels is not None
    engine = start(tomoro)
    assert [len(rows) for rows in engine.embed([query, image])] == [len(query), len(image)]

    smaller = dataclasses.replace(image, pixels=np.ascontiguousarray(image.pixels[:, :64, :64]))
    with pytest.raises(EngineError, match=f"encoded 15 tokens where {len(image)} others were rendered"):
        engine.embed([smaller])
    other = dataclasses.replace(query, token_ids=np.array([10**6]))
    with pytest.raises(EngineError, match="vLLM failed: ") as caught:
        engine.embed([other])
    assert caught.value.__cause__ is not None
    assert len(engine.embed([query])[0]) == len(query), "it goes on after a failed call"

    long = dataclasses.replace(query, token_ids=np.repeat(query.token_ids, 300))
    with pytest.raises(InputTooLongError, match=r"vLLM was started for 4,096 \(max_model_len\)"):
        engine.embed([query, long])

    model, folder = weakref.ref(loaded_model(engine)), engine._folder
    assert folder.is_dir()
    engine.close()
    engine.close()
    gc.collect()
    assert model() is None, "the model is still in memory"
    assert not folder.exists()
    with pytest.raises(EngineError, match="closed"):
        engine.embed([query])


def test_projection_stays_float32_beside_a_bfloat16_backbone(tomoro: TinyCheckpoint) -> None:
    engine = start(tomoro, dtype="bfloat16")
    head = loaded_model(engine).custom_text_proj
    assert (head.weight.dtype, head.bias.dtype) == (torch.float32, torch.float32)
    assert torch.equal(head.bias, tomoro.bias)
    assert next(loaded_model(engine).language_model.parameters()).dtype == torch.bfloat16
    rows = unit(engine.embed([render(tomoro, Query(SENTENCE))])[0])
    expected = reference_embeddings(tomoro, [QUERY["tomoro"] % SENTENCE], [])[0]
    assert (rows * expected).sum(axis=1).min() > 0.99
    engine.close()


@pytest.mark.parametrize(
    "gone", ["visual.blocks.1.mlp.linear_fc1.bias", "language_model.layers.1.self_attn.k_proj.weight"]
)
def test_a_missing_tensor_is_an_error(tmp_path: Path, gone: str) -> None:
    model = make_checkpoint(tmp_path / "m", "tomoro", head_dim=HEAD_DIM)
    model.write({name: tensor for name, tensor in model.names.items() if name != f"vlm.model.{gone}"})
    with pytest.raises(CheckpointError, match="do not fill vLLM's model") as caught:
        start(model)
    assert gone.rpartition(".")[0].rpartition(".")[2] in str(caught.value)


def test_tensors_under_a_merged_adapters_names(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", "colpali", head_dim=HEAD_DIM)
    model.write({f"base_model.model.{name}": tensor for name, tensor in model.names.items()})
    engine = start(model)
    rows = unit(engine.embed([render(model, Query(SENTENCE))])[0])
    expected = reference_embeddings(model, [QUERY["colpali"] % SENTENCE], [])[0]
    assert (rows * expected).sum(axis=1).min() >= 0.9999
    engine.close()


def test_bad_options_are_told_before_vllm_starts(tomoro: TinyCheckpoint) -> None:
    with pytest.raises(ConfigError, match="max_model_len 100: a page takes up to 288 tokens"):
        start(tomoro, options=VLLMOptions(max_model_len=100))
    with pytest.raises(ConfigError, match="max_model_len 5000: the model reads at most 4096 tokens"):
        start(tomoro, options=VLLMOptions(max_model_len=5000))


def test_what_vllm_refuses_is_ours_to_raise(tomoro: TinyCheckpoint) -> None:
    with pytest.raises(EngineError, match="vLLM does not start: ") as caught:
        start(tomoro, options=VLLMOptions(tensor_parallel_size=3))  # three GPUs for two heads of keys
    assert caught.value.__cause__ is not None


def test_auto_dtype_is_float32_on_a_cpu() -> None:
    assert (settle_dtype("auto"), settle_dtype("float16")) == ("float32", "float16")


@pytest.mark.timeout(900)
def test_engine_in_processes_of_its_own(tomoro: TinyCheckpoint, tmp_path: Path) -> None:
    """vLLM's default of several processes: exact, without a main guard, alive after a kill, gone at the end."""
    expected = [
        *reference_embeddings(tomoro, [QUERY["tomoro"] % SENTENCE], []),
        *reference_embeddings(tomoro, [image_prompt("tomoro")], pictures()[:1]),
    ]
    np.savez(tmp_path / "expected.npz", *expected)
    script = tmp_path / "script.py"
    script.write_text(IN_PROCESSES)
    done = subprocess.run(
        [sys.executable, str(script), str(tomoro.folder), str(tmp_path / "expected.npz")],
        env={**os.environ, **CPU_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    said = [line for line in done.stdout.splitlines() if line.isalpha()]  # among vLLM's own
    assert said == ["exact", "dead", "again", "exact", "gone"]
    assert done.stdout.count("the plugin is active") == 2, "once for each of the two engines"


IN_PROCESSES = """
import os, signal, subprocess, sys, time
import numpy as np
from colqwen3_retrievers import ColQwen3Encoder
from colqwen3_retrievers.errors import EngineError
from colqwen3_retrievers.engines.options import VLLMOptions
from tests.contracts.engine_contract import SENTENCE, pictures

def children():
    found = {}
    for entry in os.listdir("/proc"):
        try:
            fields = open(f"/proc/{entry}/stat").read().rpartition(")")[2].split()
        except (OSError, NotADirectoryError):
            continue
        if entry.isdigit() and fields[0] != "Z":
            found[int(entry)] = int(fields[1])
    below, grown = {os.getpid()}, True
    while grown:
        more = {pid for pid, parent in found.items() if parent in below} - below
        grown = bool(more)
        below |= more
    below.discard(os.getpid())
    return [pid for pid in below if "VLLM" in open(f"/proc/{pid}/cmdline").read()]

def check(encoder):
    got = [*encoder.encode_queries([SENTENCE]), *encoder.encode_images(pictures()[:1])]
    for want, have in zip(np.load(sys.argv[2]).values(), got, strict=True):
        assert (want * have.vectors).sum(axis=1).min() >= 0.9999
    print("exact", flush=True)

encoder = ColQwen3Encoder(sys.argv[1], engine=VLLMOptions(enforce_eager=True), dtype="float32", max_visual_tokens=256)
check(encoder)
running = children()
assert running, "no process of vLLM's own"
for pid in running:
    os.kill(pid, signal.SIGKILL)
try:
    encoder.encode_queries([SENTENCE])
except EngineError as exc:
    assert exc.retryable, exc
    print("dead", flush=True)
again = encoder.encode_queries([SENTENCE])
print("again", flush=True)
check(encoder)
encoder.close()
deadline = time.monotonic() + 20
while children() and time.monotonic() < deadline:
    time.sleep(0.2)
assert not children(), children()
print("gone", flush=True)
"""
