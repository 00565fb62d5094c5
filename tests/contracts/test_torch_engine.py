"""The torch engine under the engine contract."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.activations import GELUTanh

from colqwen3_retrievers import ColQwen3Encoder, Page, TorchOptions
from colqwen3_retrievers.engines.torch import attention, packed_linear, text_trunk
from colqwen3_retrievers.engines.torch.model import ColQwen3Model
from colqwen3_retrievers.fork import HeldSetting
from colqwen3_retrievers.models.rendering import EncoderInput
from tests.checkpoints import make_checkpoint
from tests.contracts.engine_contract import SENTENCE, EngineContract, pictures
from tests.reference import QUERY, image_prompt, reference_embeddings


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


needs_packing = pytest.mark.skipif(not packed_linear.can_pack(), reason="bfloat16 is not packed on this processor")


@needs_packing
@pytest.mark.parametrize("family", ["tomoro", "sauerkraut"])
def test_packed_weights_are_nearer_to_float32_than_plain_ones(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_checkpoint(tmp_path, family)
    expected = reference_embeddings(made, [image_prompt(family)] * 3, pictures())
    expected += reference_embeddings(made, [QUERY[family] % SENTENCE], [])
    found = []
    for packs in (True, False):
        monkeypatch.setattr(packed_linear, "can_pack", lambda packs=packs: packs)
        with ColQwen3Encoder(made.folder, engine="torch", device="cpu", dtype="bfloat16") as encoder:
            rows = [*encoder.encode_images(pictures()), *encoder.encode_queries([SENTENCE])]
        found.append(np.concatenate([(mv.vectors * want).sum(1) for mv, want in zip(rows, expected, strict=True)]))
    packed, plain = found
    assert packed.min() > 0.99
    assert not np.array_equal(packed, plain)
    assert packed.mean() > plain.mean() - 1e-5


@needs_packing
def test_activations_go_into_packed_layers_and_others_stay() -> None:
    class Block(torch.nn.Module):
        def __init__(self, act_fn: torch.nn.Module) -> None:
            super().__init__()
            self.linear_fc1, self.linear_fc2, self.act_fn = torch.nn.Linear(5, 4), torch.nn.Linear(4, 5), act_fn

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.linear_fc2(self.act_fn(self.linear_fc1(rows)))

    rows = 3 * torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    for act_fn in (torch.nn.SiLU(), torch.nn.GELU(), torch.nn.GELU("tanh"), GELUTanh(), torch.nn.Tanh()):
        block = Block(act_fn).to(torch.bfloat16).requires_grad_(False)
        expected = block(rows.bfloat16())
        packed_linear.pack_linears(block)
        assert isinstance(block.linear_fc1, packed_linear.PackedLinear)
        assert isinstance(block.linear_fc2, packed_linear.PackedLinear)
        assert isinstance(block.act_fn, torch.nn.Identity) is not isinstance(act_fn, torch.nn.Tanh)
        torch.testing.assert_close(block(rows.bfloat16()), expected, atol=0.02, rtol=0.02)


@needs_packing
@pytest.mark.parametrize("count", [1, 64, 65, 513])
def test_rows_added_to_make_a_round_number_are_never_seen(count: int) -> None:
    layer = torch.nn.Linear(24, 40, dtype=torch.bfloat16).requires_grad_(False)
    rows = torch.randn(count, 24, generator=torch.Generator().manual_seed(count)).bfloat16()
    found = packed_linear.PackedLinear(layer)(rows)
    assert found.shape == (count, 40)
    torch.testing.assert_close(found, layer(rows), atol=0.03, rtol=0.02)


@needs_packing
@pytest.mark.parametrize("family", ["tomoro", "nemotron"])
def test_a_batch_is_filled_up_once_for_all_packed_layers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    forward = ColQwen3Model.forward

    def counting(self: ColQwen3Model, inputs: Sequence[EncoderInput]) -> torch.Tensor:
        sizes.append(sum(len(item) for item in inputs))
        return forward(self, inputs)

    monkeypatch.setattr(ColQwen3Model, "forward", counting)
    with ColQwen3Encoder(
        make_checkpoint(tmp_path, family).folder, engine="torch", device="cpu", dtype="bfloat16"
    ) as encoder:
        texts = [f"{SENTENCE} {'on and ' * number}" for number in range(9)]
        alone = [encoder.encode_queries([text])[0] for text in texts]
        sizes.clear()
        together = encoder.encode_queries(texts)
    assert sizes
    assert all(size == packed_linear.rounded(size) for size in sizes)
    assert any(size > 64 for size in sizes)
    for one, same in zip(alone, together, strict=True):
        assert one.vectors.shape == same.vectors.shape
        assert (one.vectors * same.vectors).sum(axis=1).min() > 0.99


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

    def prepare() -> tuple[Callable[[], object], Callable[[], object]]:
        return lambda: held.append("held"), lambda: held.append("put back")

    setting, inside, leave = HeldSetting(prepare), threading.Barrier(3), threading.Event()

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
