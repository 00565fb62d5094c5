"""What a server is refused for before it sees a page, and by which ways it is made to see exact prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, ServerOptions
from colqwen3_retrievers.engines.server.reference import can_compute, lone_token
from colqwen3_retrievers.engines.torch.engine import TorchEngine
from colqwen3_retrievers.errors import ConfigError, DimensionError
from colqwen3_retrievers.models.checkpoint import Checkpoint, open_checkpoint
from colqwen3_retrievers.models.families import get_family
from colqwen3_retrievers.models.rendering import EncoderInput
from tests.checkpoints import FAMILY_NAMES, make_checkpoint
from tests.fault_server import FaultServer

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 320, 3), dtype=np.uint8))
OPTIONS = ServerOptions(timeout=30, retries=0, concurrency=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_checkpoint(tmp_path_factory.mktemp(name), name).folder for name in FAMILY_NAMES}


@pytest.fixture
def connect(folders: dict[str, Path]) -> Iterator[Callable[..., ColQwen3Encoder]]:
    opened: list[ColQwen3Encoder] = []

    def make(server: FaultServer, family: str = "tomoro", options: ServerOptions = OPTIONS, **settings: object):
        settings = {"max_visual_tokens": 96, **settings}
        opened.append(ColQwen3Encoder(folders[family], url=server.url, engine=options, **settings))
        return opened[-1]

    yield make
    for encoder in opened:
        encoder.close()


@pytest.mark.parametrize(
    "ways", [{"trusted": True, "template": "stock"}, {"trusted": False}, {"trusted": False, "template": "turn"}],
    ids=["a template sent along", "a served one that takes whole prompts", "a served one of the family"],
)  # fmt: skip
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_exact_whichever_way_a_server_takes_prompts(
    folders: dict[str, Path], connect: Callable[..., ColQwen3Encoder], family: str, ways: dict[str, object]
) -> None:
    with (
        FaultServer(folders[family], **ways) as server,
        ColQwen3Encoder(folders[family], engine="torch", device="cpu", max_visual_tokens=96) as torch_encoder,
    ):
        encoder = connect(server, family)
        expected = [*torch_encoder.encode_images([IMAGE]), *torch_encoder.encode_queries(["revenue", "of 2024"])]
        found = [*encoder.encode_images([IMAGE]), *encoder.encode_queries(["revenue", "of 2024"])]
        for want, got in zip(expected, found, strict=True):
            assert (want.vectors * got.vectors).sum(axis=1).min() >= 0.9999
        assert len(server.seen) <= 11, "checked once"


WRONG = {
    "an untrusted template": ({"trusted": False, "template": "stock"}, "--trust-request-chat-template"),
    "a low pixel bound": ({"max_pixels": 65_536}, '"max_pixels": 98304'),
    "a high lower pixel bound": ({"min_pixels": 262_144}, "lower min_pixels"),
    "too short a context": ({"max_model_len": 90}, "--max-model-len 107"),
    "no bias": ({"with_bias": False}, "drops the projection's bias"),
}


@pytest.mark.parametrize("fault", list(WRONG))
def test_a_wrong_server_is_refused_with_the_remedy(
    folders: dict[str, Path], connect: Callable[..., ColQwen3Encoder], fault: str
) -> None:
    settings, words = WRONG[fault]
    with FaultServer(folders["tomoro"], **settings) as server, pytest.raises(ConfigError) as caught:
        connect(server).encode_queries(["revenue"])
    assert words in str(caught.value)
    assert server.url in str(caught.value)


def test_a_template_of_the_right_length_and_the_wrong_token_is_refused(
    folders: dict[str, Path], connect: Callable[..., ColQwen3Encoder]
) -> None:
    """Qwen3-VL's own template ends a turn by a line break, where the family ends it by a pad: one token either way."""
    stock = FaultServer(folders["tomoro"], trusted=False, template="stock")
    with stock as server, pytest.raises(ConfigError, match="other tokens than the prompt's"):
        connect(server).encode_queries(["revenue"])


def test_another_model_is_refused_however_it_is_called(
    folders: dict[str, Path], connect: Callable[..., ColQwen3Encoder], tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "other", "tomoro", seed=8).folder
    alias = FaultServer(other, name=str(folders["tomoro"]))
    with alias as server, pytest.raises(ConfigError, match=r"does not serve .*cosine"):
        connect(server).encode_queries(["revenue"])
    narrow = make_checkpoint(tmp_path / "narrow", "tomoro", dim=32).folder
    with FaultServer(narrow) as server, pytest.raises(DimensionError, match="expected dim 48, got 32"):
        connect(server).encode_queries(["revenue"])


@pytest.mark.parametrize(
    ("fact", "words"),
    [("causal", "runs causal, family nemotron is bidirectional"),
     ("final_norm", "does not read the hidden state before the final norm")],
)  # fmt: skip
def test_a_trunk_run_as_other_families_do_is_refused(
    folders: dict[str, Path], connect: Callable[..., ColQwen3Encoder], fact: str, words: str
) -> None:
    """As vLLM runs nemotron without the plugin."""
    row = get_family("nemotron")
    object.__setattr__(row, fact, True)  # for as long as the server's model is built
    try:
        server = FaultServer(folders["nemotron"])
    finally:
        object.__setattr__(row, fact, False)
    with server, pytest.raises(ConfigError, match=words):
        connect(server, "nemotron").encode_queries(["revenue"])


def test_which_of_several_models_must_be_said(
    folders: dict[str, Path], connect: Callable[..., ColQwen3Encoder]
) -> None:
    with FaultServer(folders["tomoro"], name="mine") as server:
        with pytest.raises(ConfigError, match=r"served_model 'yours': .* serves mine"):
            connect(server, options=ServerOptions(served_model="yours")).encode_queries(["revenue"])
        connect(server, options=ServerOptions(served_model="mine")).encode_queries(["revenue"])


def test_what_cannot_be_checked_is_said_once(
    folders: dict[str, Path], connect: Callable[..., ColQwen3Encoder], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("colqwen3_retrievers.engines.server.probe._CHEAP", 0)
    biasless = {"folder": folders["tomoro"], "with_bias": False}
    with FaultServer(**biasless) as one, FaultServer(**biasless) as two:
        encoder = ColQwen3Encoder(folders["tomoro"], url=[one.url, two.url], engine=OPTIONS, max_visual_tokens=96)
        with encoder, caplog.at_level(logging.WARNING):
            encoder.encode_images([IMAGE] * 8)
        assert caplog.text.count("not checked whether the projection's bias is kept") == 1
        assert "its plugin mends this" in caplog.text
        caplog.clear()
        with pytest.raises(ConfigError, match="drops the projection's bias"):
            connect(one, options=ServerOptions(check_weights=True)).encode_queries(["revenue"])
        connect(one, options=ServerOptions(check_weights=False)).encode_queries(["the user knows"])
        assert not caplog.text


@pytest.mark.parametrize("family", [*FAMILY_NAMES, "tiny"])
def test_the_known_answer_is_the_models_own(folders: dict[str, Path], family: str) -> None:
    checkpoint: Checkpoint = open_checkpoint(folders.get(family, family))
    assert can_compute(checkpoint)
    engine = TorchEngine(checkpoint, device="cpu", dtype="float32")
    for token in (5, 300):
        (rows,) = engine.embed([EncoderInput(True, "", np.array([token]), slice(0, 1))])
        known = lone_token(checkpoint, token)
        row = rows[0] / np.linalg.norm(rows[0])
        assert row @ known.right > 0.999999
        assert row @ known.other_norm < 0.9999
        assert (known.without_bias is None) == (family == "nemotron")
        assert known.without_bias is None or row @ known.without_bias < 0.9999
