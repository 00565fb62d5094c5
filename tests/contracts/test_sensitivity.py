"""The exactness check must be able to fail: each classic fault, made on purpose, must turn it red.

The fault is made in the loaded model or in what it is handed; ``assert_exact`` is the engine contract's own check.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from colqwen3_retrievers import Page, Query
from colqwen3_retrievers.engines.torch.engine import TorchEngine
from colqwen3_retrievers.models.checkpoint import open_checkpoint
from colqwen3_retrievers.models.families import Family
from colqwen3_retrievers.models.rendering import EncoderInput, Renderer
from colqwen3_retrievers.models.tokenizer import PromptTokenizer
from tests.checkpoints import make_checkpoint
from tests.contracts.engine_contract import SENTENCE, assert_exact, pictures
from tests.reference import QUERY, image_prompt, reference_embeddings


@dataclasses.dataclass
class Bench:
    """A loaded engine, its renderer, and the reference's answer for a query and an image that needs resizing."""

    engine: TorchEngine
    family: Family
    folder: Path
    expected: list[np.ndarray]
    max_pixels: int
    min_pixels: int

    def inputs(self, family: Family | None = None, max_pixels: int | None = None) -> list[EncoderInput]:
        renderer = Renderer(
            family or self.family, PromptTokenizer(self.folder, model="test"),
            min_pixels=self.min_pixels, max_pixels=max_pixels or self.max_pixels, context_length=4096,
        )  # fmt: skip
        return [renderer.query(Query(SENTENCE)), renderer.document(Page(id="p", image=pictures()[1]))]

    def check(self, inputs: list[EncoderInput] | None = None) -> None:
        rows = self.engine.embed(inputs or self.inputs())
        assert_exact(self.expected, [part / np.linalg.norm(part, axis=1, keepdims=True) for part in rows])


@pytest.fixture
def bench(tmp_path: Path) -> Callable[[str], Bench]:
    def make(family: str) -> Bench:
        tiny = make_checkpoint(tmp_path / family, family)
        checkpoint = open_checkpoint(tiny.folder)
        expected = reference_embeddings(tiny, [QUERY[family] % SENTENCE, image_prompt(family)], [pictures()[1]])
        engine = TorchEngine(checkpoint, device="cpu", dtype="float32")
        result = Bench(engine, checkpoint.family, tiny.folder, expected, checkpoint.max_pixels, checkpoint.min_pixels)
        result.check()  # whole before it is broken
        return result

    return make


@pytest.mark.parametrize("family", ["tomoro", "ops", "sauerkraut", "colpali"])
def test_a_dropped_bias_is_seen(bench: Callable[[str], Bench], family: str) -> None:
    broken = bench(family)
    broken.engine._model.projection.bias = None
    with pytest.raises(AssertionError, match="cosine"):
        broken.check()


def test_a_causal_mask_for_nemotron_is_seen(bench: Callable[[str], Bench]) -> None:
    broken = bench("nemotron")
    broken.engine._model.causal = True
    with pytest.raises(AssertionError, match="cosine"):
        broken.check()


def test_the_final_norm_for_nemotron_is_seen(bench: Callable[[str], Bench]) -> None:
    broken = bench("nemotron")
    broken.engine._model.backbone.language_model.norm = torch.nn.RMSNorm(64)
    with torch.no_grad():
        broken.engine._model.backbone.language_model.norm.weight.copy_(torch.linspace(0.5, 1.5, 64))
    with pytest.raises(AssertionError, match="cosine"):
        broken.check()


@pytest.mark.parametrize("family", ["tomoro", "ops", "nemotron", "sauerkraut", "colpali"])
def test_a_wrong_prompt_is_seen(bench: Callable[[str], Bench], family: str) -> None:
    broken = bench(family)
    same_length = broken.family.image.replace("user", "image")
    for wrong in (
        dataclasses.replace(broken.family, query=broken.family.query.removesuffix("<|endoftext|>") + "\n"),
        dataclasses.replace(broken.family, image=same_length),
    ):
        with pytest.raises(AssertionError, match=r"cosine|instead of"):
            broken.check(broken.inputs(wrong))


def test_wrong_bounds_are_seen(bench: Callable[[str], Bench]) -> None:
    broken = bench("tomoro")
    with pytest.raises(AssertionError, match="instead of"):
        broken.check(broken.inputs(max_pixels=100_352))


def test_a_wrong_resize_filter_is_seen(bench: Callable[[str], Bench]) -> None:
    broken = bench("tomoro")
    query, page = broken.inputs()
    assert page.pixels is not None
    size = (page.pixels.shape[2], page.pixels.shape[1])
    other = np.asarray(pictures()[1].resize(size, Image.Resampling.NEAREST))[None]
    with pytest.raises(AssertionError, match="cosine"):
        broken.check([query, dataclasses.replace(page, pixels=other)])


def test_a_padded_zero_row_is_seen(bench: Callable[[str], Bench]) -> None:
    broken = bench("tomoro")
    rows = broken.engine.embed(broken.inputs())
    padded = [np.concatenate([part, np.zeros_like(part[:1])]) for part in rows]
    with pytest.raises(AssertionError, match="instead of"):
        assert_exact(broken.expected, padded)


def test_another_image_in_the_batch_is_seen(bench: Callable[[str], Bench]) -> None:
    broken = bench("tomoro")
    query, page = broken.inputs()
    assert page.pixels is not None
    with pytest.raises(AssertionError, match="cosine"):
        broken.check([query, dataclasses.replace(page, pixels=page.pixels[:, ::-1])])
