"""Check the torch engine on this machine's GPU, with random weights and no download, in under five minutes.

    python scripts/check_cuda.py                # from the repository's root
    python scripts/check_cuda.py --device cpu   # the same checks where there is no GPU, but for memory and Triton

Prints one row a check: what was measured, the bar, and whether it holds. The exit code is the number of failed rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the factory of random checkpoints

from colqwen3_retrievers import ColQwen3Encoder, MultiVector, PackedEmbeddings, TorchOptions, maxsim
from colqwen3_retrievers.engines.torch.engine import TorchEngine, settle_device
from colqwen3_retrievers.models.checkpoint import open_checkpoint
from colqwen3_retrievers.models.rendering import Renderer
from colqwen3_retrievers.models.tokenizer import PromptTokenizer
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.vectors.codes import page_code, query_codes
from colqwen3_retrievers.vectors.kernels import torch_kernel
from colqwen3_retrievers.vectors.kernels.gpu_scan import DeviceScan, fused_works
from colqwen3_retrievers.vectors.kernels.scan import bit_scan, numpy_scan
from tests.checkpoints import FAMILY_NAMES, make_checkpoint


@dataclass
class Row:
    """One line of the table."""

    check: str
    measured: str
    bar: str
    holds: bool


def pictures(count: int, size: tuple[int, int] = (640, 800)) -> list[Image.Image]:
    """Random pictures, the first three of different sizes."""
    rng = np.random.default_rng(11)
    sizes = [(320, 256), (301, 517), (1500, 1100)] + [size] * count
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes[:count]]


def encode(folder: Path, device: str, **settings: object) -> list[MultiVector]:
    """Encode two queries and three pictures."""
    with ColQwen3Encoder(folder, device=device, **settings) as encoder:
        return encoder.encode_queries(["revenue", "what was the revenue of 2024?"]) + encoder.encode_images(pictures(3))


def cosines(one: list[MultiVector], other: list[MultiVector]) -> np.ndarray:
    """Cosine of every token with its counterpart."""
    return np.concatenate([(a.vectors * b.vectors).sum(axis=1) for a, b in zip(one, other, strict=True)])


def parity(folders: dict[str, Path], device: str) -> Iterator[Row]:
    """This device against the CPU, family by family, in both precisions."""
    for family, folder in folders.items():
        exact = encode(folder, "cpu", dtype="float32")
        worst = cosines(exact, encode(folder, device, dtype="float32")).min()
        yield Row(f"{family}: float32 against CPU, worst token", f"{worst:.7f}", ">= 0.9999", worst >= 0.9999)
        half = cosines(exact, encode(folder, device, dtype="bfloat16"))
        yield Row(f"{family}: bfloat16 against CPU, mean token", f"{half.mean():.5f}", ">= 0.99", half.mean() >= 0.99)


def attention(folder: Path, device: str) -> Iterator[Row]:
    """Flash attention against sdpa, where the package is installed."""
    if device == "cpu" or importlib.util.find_spec("flash_attn") is None:
        yield Row("flash_attention_2 against sdpa", "not installed", "-", True)
        return
    sdpa = encode(folder, device, dtype="bfloat16")
    flash = encode(folder, device, dtype="bfloat16", engine=TorchOptions(attn_implementation="flash_attention_2"))
    mean = cosines(sdpa, flash).mean()
    yield Row("flash_attention_2 against sdpa, bfloat16, mean token", f"{mean:.5f}", ">= 0.99", mean >= 0.99)


def batching(folder: Path, device: str) -> Iterator[Row]:
    """How a batch is cut must not show."""
    images = pictures(9)
    with ColQwen3Encoder(folder, device=device, dtype="float32", engine=TorchOptions(batch_tokens=1)) as encoder:
        alone = encoder.encode_images(images)
    with ColQwen3Encoder(folder, device=device, dtype="float32", engine=TorchOptions(batch_tokens=10**6)) as encoder:
        together = encoder.encode_images(images)
    worst = max(float(np.abs(a.vectors - b.vectors).max()) for a, b in zip(alone, together, strict=True))
    yield Row("one by one against one batch, float32", f"{worst:.1e}", "<= 1e-5", worst <= 1e-5)


def kernels(device: str) -> Iterator[Row]:
    """MaxSim on the device against numpy."""
    rng = np.random.default_rng(2)
    queries = [rng.standard_normal((20 + i, 320)).astype(np.float32) / 18 for i in range(4)]
    documents = [rng.standard_normal((1 + 37 * i, 320)).astype(np.float32) / 18 for i in range(40)]
    kernel = torch_kernel(device)
    worst = np.abs(maxsim(queries, documents, kernel=kernel) - maxsim(queries, documents)).max()
    yield Row("MaxSim kernel against numpy", f"{worst:.1e}", "<= 1e-3", worst <= 1e-3)


def scans(device: str) -> Iterator[Row]:
    """The scan of codes on the device against numpy: both dims, int8 and single bits, all pages and some."""
    rng = np.random.default_rng(3)
    kinds = [("torch", False)]
    if not device.startswith("cuda"):
        yield Row("fused scan against numpy", "no GPU", "-", True)
    elif importlib.util.find_spec("triton") is None:
        yield Row("fused scan against numpy", "not installed", "-", True)
    else:
        works = all(fused_works(torch.device(device), width) for width in (136, 328))
        yield Row("Triton compiles the fused scan", "yes" if works else "no", "yes", works)
        kinds += [("fused", True)] if works else []
    for dim in (128, 320):
        asked = query_codes(
            PackedEmbeddings.pack([rng.standard_normal((count, dim)).astype(np.float32) for count in (25, 40, 300)])
        )
        pages = [rng.standard_normal((1 + 61 * i % 700, dim)).astype(np.float32) for i in range(60)]
        for bits in (8, 1):
            codes = [page_code(page, 1, bits) for page in pages]
            rows = np.concatenate([code.rows for code in codes])
            lengths = np.asarray([len(code.rows) for code in codes])
            starts, scales = np.cumsum(lengths) - lengths, np.asarray([code.scale for code in codes], dtype=np.float32)
            right = (numpy_scan if bits == 8 else bit_scan(numpy_scan, dim))(asked, rows, starts, lengths, scales)
            for name, fused in kinds:
                scan = DeviceScan(device, fused=fused)
                ours = scan if bits == 8 else bit_scan(scan, dim)
                worst = 0.0
                for some in (slice(None), slice(2, None, 7)):
                    found = ours(asked, rows, starts[some], lengths[some], scales[some])
                    worst = max(worst, float(np.abs(found - right[:, some]).max() / np.abs(right).max()))
                what = f"{name} scan against numpy, dim {dim}, {bits} bit{'s' if bits > 1 else ''}"
                yield Row(what, f"{worst:.1e}", "<= 1e-5", worst <= 1e-5)


def memory(folder: Path, device: str) -> Iterator[Row]:
    """A batch that cannot fit is halved until it does, and the results stay."""
    if not device.startswith("cuda"):
        yield Row("out of memory halves the batch", "no GPU", "-", True)
        return
    checkpoint = open_checkpoint(folder)
    engine = TorchEngine(checkpoint, device=device, dtype="float32", options=TorchOptions(batch_tokens=10**7))
    renderer = Renderer(
        checkpoint.family, PromptTokenizer(checkpoint.folder, model="check"), min_pixels=checkpoint.min_pixels,
        max_pixels=checkpoint.max_pixels, context_length=checkpoint.context_length,
    )  # fmt: skip
    inputs = [renderer.document(Page(id="p", image=image)) for image in pictures(64)]
    expected = [engine.embed([item])[0] for item in inputs]
    torch.cuda.reset_peak_memory_stats(device)
    engine.embed(inputs)
    torch.cuda.synchronize(device)
    needed = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    halvings = engine.n_halvings
    torch.cuda.set_per_process_memory_fraction(0.4 * needed / total, device)
    try:
        found = engine.embed(inputs)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    worst = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True))
    count = engine.n_halvings - halvings
    yield Row("out of memory halves the batch", f"{count} halvings", ">= 1", count >= 1)
    yield Row("... and the results stay, relative", f"{worst:.1e}", "<= 1e-4", worst <= 1e-4)


def main() -> int:
    """Run the checks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = settle_device(parser.parse_args().device)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "CPU"
    print(
        f"{name}; torch {torch.__version__}, transformers {transformers.__version__}, Python {sys.version.split()[0]}"
    )
    start = time.monotonic()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        made = {family: make_checkpoint(Path(folder) / family, family).folder for family in FAMILY_NAMES}
        for rows in (
            parity(made, device), attention(made["tomoro"], device), batching(made["tomoro"], device),
            batching(made["nemotron"], device), kernels(device), scans(device), memory(made["tomoro"], device),
        ):  # fmt: skip
            for row in rows:
                failed += not row.holds
                verdict = "ok" if row.holds else "FAILED"
                print(f"{row.check:52} {row.measured:>14}  {row.bar:10} {verdict}", flush=True)
    print(f"{failed} failed, {time.monotonic() - start:.0f} s")
    return failed


if __name__ == "__main__":
    sys.exit(main())
