"""The torch engine under the engine contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, Page, TorchOptions, attention
from tests.checkpoints import make_checkpoint
from tests.contracts.engine_contract import EngineContract


@pytest.fixture(scope="module")
def open_encoder() -> Iterator[Callable[..., ColQwen3Encoder]]:
    opened: list[ColQwen3Encoder] = []

    def make(folder: object, **settings: object) -> ColQwen3Encoder:
        opened.append(ColQwen3Encoder(folder, engine="torch", device="cpu", **settings))
        return opened[-1]

    yield make
    for encoder in opened:
        encoder.close()


class TestTorchEngine(EngineContract):
    pass


@pytest.mark.parametrize("family", ["tomoro", "nemotron"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_into_which_pieces_rows_are_cut_does_not_matter(
    family: str, implementation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path, family).folder
    rng = np.random.default_rng(1)
    sizes = ((96, 160, 3), (128, 96, 3), (96, 160, 3))
    pages = [Page(str(n), image=Image.fromarray(rng.integers(0, 256, size, np.uint8))) for n, size in enumerate(sizes)]
    pages.append(Page("text", text="a page of text alone, read beside the others"))
    found = []
    for rows in (1 << 20, 7):
        monkeypatch.setattr(attention, "PIECE_ROWS", rows)
        with ColQwen3Encoder(
            folder, engine=TorchOptions(attn_implementation=implementation), device="cpu", dtype="float32"
        ) as encoder:
            found.append(encoder.encode_pages(pages))
    for whole, cut in zip(*found, strict=True):
        np.testing.assert_allclose(cut.vectors, whole.vectors, atol=2e-5)
