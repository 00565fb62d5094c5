"""The torch engine under the engine contract."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, Page, TorchOptions, attention, text_trunk
from colqwen3_retrievers.torch_settings import HeldSetting
from tests.checkpoints import make_checkpoint
from tests.contracts.engine_contract import EngineContract, pictures
from tests.reference import image_prompt, reference_embeddings


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
def test_exact_where_the_process_allows_reduced_products(family: str, tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, family)
    expected = reference_embeddings(made, [image_prompt(family)], pictures()[:1])[0]
    torch.set_float32_matmul_precision("medium")  # on a CPU with the instructions for it, products in bfloat16
    try:
        with ColQwen3Encoder(made.folder, engine="torch", device="cpu", dtype="float32") as encoder:
            np.testing.assert_allclose(encoder.encode_images(pictures()[:1])[0].vectors, expected, atol=1e-4)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_attention_keeps_clear_of_cudnn_and_puts_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    attend = attention.attend

    def watched(*args: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args)

    monkeypatch.setattr(text_trunk, "attend", watched)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for allowed in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(allowed)
            with ColQwen3Encoder("tiny", engine="torch", device="cpu") as encoder:
                encoder.encode_queries(["alloy"])
            assert torch.backends.cuda.cudnn_sdp_enabled() is allowed
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert seen
    assert not any(seen)


def test_a_held_setting_is_put_back_by_the_last_thread_to_leave() -> None:
    held: list[str] = []

    def hold() -> Callable[[], None]:
        held.append("held")
        return lambda: held.append("put back")

    setting, inside, leave = HeldSetting(hold), threading.Barrier(3), threading.Event()

    def stay() -> None:
        with setting:
            inside.wait(10)
            leave.wait(10)

    threads = [threading.Thread(target=stay) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait(10)
    with setting:
        pass
    assert held == ["held"]
    leave.set()
    for thread in threads:
        thread.join()
    assert held == ["held", "put back"]


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
