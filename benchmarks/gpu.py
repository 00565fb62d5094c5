"""A GPU measured with the true shapes of the 4B and 8B checkpoints, at random weights, in under ten minutes.

    python benchmarks/gpu.py [--shapes 4b 8b] [--write]       # on a CUDA machine; nothing is downloaded
    python benchmarks/gpu.py --quick                          # a small shape on whatever device there is, in seconds

Everything goes through the library: the checkpoint is written to a temporary folder and opened as any other, pages are
rendered by its renderer and encoded by its torch engine. What a page costs at least is counted exactly
(:func:`page_flops`) and set against the matrix products that this device was seen to reach.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from random_checkpoint import DIM, config_of, write_checkpoint
from reporting import machine, publish, table

from colqwen3_retrievers import ColQwen3Encoder, PackedEmbeddings, Page, Query, TorchOptions, maxsim, model
from colqwen3_retrievers.checkpoint import Checkpoint, open_checkpoint
from colqwen3_retrievers.codes import BLOCK, query_codes
from colqwen3_retrievers.engines.torch import TorchEngine, settle_dtype
from colqwen3_retrievers.kernels import default_scan, device_scan, torch_kernel
from colqwen3_retrievers.rendering import EncoderInput, Renderer
from colqwen3_retrievers.tokens import PromptTokenizer

PAGES = {640: (1280, 2048), 1280: (2048, 2560)}
"""Visual tokens of a page, and the pixels of the scan it is resized from."""

SMALL_TOKENS, SMALL_SCAN = 80, (512, 640)
"""The same where a quick look is wanted."""

QUESTION = "what was the revenue of 2024 in each region, before tax?"


def page_flops(config: Any, visual_tokens: int, tokens: int, dim: int, *, causal: bool = True) -> int:
    """Count the operations of encoding one page that no implementation can do without.

    A product of (m, k) with (k, n) is 2mkn operations; whatever is not a product counts nothing. With P = 4V patches of
    V visual tokens, T tokens, vision width w, inner width i, trunk width h, inner width j, H heads of d, K key heads,
    D layers of DeepStack:

    - vision: 2P x 1536w for the patches; for each layer 2P(4w^2 + 2wi) and, for attention, 4P^2 w;
    - mergers: (1 + D) x 2V((4w)^2 + 4wh);
    - trunk: for each layer 2T(2hHd + 2hKd + 3hj) and, for attention, 4Hd x T(T + 1)/2, since a token sees only those
      before it;
    - projection: 2Th x dim.

    Args:
        config: a ``Qwen3VLConfig``.
        visual_tokens: of the page, in one image.
        tokens: of the page, prompt and visual tokens.
        dim: of a token embedding.
        causal: False counts the trunk's attention as if every token saw every other, 4Hd x T^2, as an implementation
            that masks does.
    """
    vision, text = config.vision_config, config.text_config
    patches, width = 4 * visual_tokens, vision.hidden_size
    layer = 2 * patches * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * patches**2 * width
    hidden, inside = text.hidden_size, text.num_attention_heads * text.head_dim
    merger = 2 * visual_tokens * ((4 * width) ** 2 + 4 * width * hidden)
    seen = tokens * (tokens + 1) // 2 if causal else tokens**2
    keys = text.num_key_value_heads * text.head_dim
    linear = 2 * hidden * inside + 2 * hidden * keys + 3 * hidden * text.intermediate_size
    return int(
        2 * patches * 1536 * width
        + vision.depth * layer
        + (1 + len(vision.deepstack_visual_indexes)) * merger
        + text.num_hidden_layers * (2 * tokens * linear + 4 * inside * seen)
        + 2 * tokens * hidden * dim
    )


def wait(device: str) -> None:
    """Wait until the device has nothing left to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def fastest(work: Callable[[], object], device: str, seconds: float = 1.0) -> float:
    """Time of the fastest of several calls, after one that warms up."""
    work()
    wait(device)
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 50):
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def ceilings(device: str, dtype: torch.dtype, *, quick: bool) -> tuple[float, float, float]:
    """Measure operations a second of a matrix product, and bytes a second of a copy on and to the device."""
    side, count = (512, 1 << 22) if quick else (8192, 1 << 30)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    compute = 2 * side**3 / fastest(lambda: left @ right, device)
    source, target = (torch.empty(count, device=device, dtype=torch.uint8) for _ in range(2))
    copy = 2 * count / fastest(lambda: target.copy_(source), device)
    host = torch.empty(min(count, 1 << 28), dtype=torch.uint8)
    host = host.pin_memory() if device.startswith("cuda") else host
    upload = len(host) / fastest(lambda: target[: len(host)].copy_(host, non_blocking=True), device)
    return compute, copy, upload


@contextlib.contextmanager
def stopwatch(engine: TorchEngine, device: str) -> Iterator[dict[str, float]]:
    """Time the parts of an engine's forward pass, waiting for the device around each; seconds by part."""
    spent = {"vision": 0.0, "text": 0.0}
    tower, trunk = model.VisionTower.__call__, model.run_trunk

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            wait(device)
            start = time.perf_counter()
            found = call(*given, **named)
            wait(device)
            spent[part] += time.perf_counter() - start
            return found

        return run

    model.VisionTower.__call__, model.run_trunk = timed("vision", tower), timed("text", trunk)  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        model.VisionTower.__call__, model.run_trunk = tower, trunk  # type: ignore[method-assign]


def renderer_of(checkpoint: Checkpoint, visual_tokens: int = 1280) -> Renderer:
    """Give the renderer that an encoder with so many visual tokens a page would use."""
    tokenizer = PromptTokenizer(checkpoint.folder, model=checkpoint.model)
    return Renderer(
        checkpoint.family, tokenizer, min_pixels=checkpoint.min_pixels, max_pixels=visual_tokens * 32 * 32,
        context_length=checkpoint.context_length,
    )  # fmt: skip


def scan_of(size: tuple[int, int], seed: int) -> Image.Image:
    """A page of noise, the worst a resize can meet."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def rendered(checkpoint: Checkpoint, tokens: int, *, quick: bool) -> tuple[list[EncoderInput], float]:
    """Render some pages of so many visual tokens; give them and the seconds one took."""
    renderer = renderer_of(checkpoint, SMALL_TOKENS if quick else tokens)
    scans = [scan_of(SMALL_SCAN if quick else PAGES[tokens], seed) for seed in range(3)]
    start = time.perf_counter()
    inputs = [renderer.document(Page(f"p{i}", image=scan)) for i, scan in enumerate(scans)]
    return inputs, (time.perf_counter() - start) / len(scans)


def pages(
    checkpoint: Checkpoint, config: Any, engine: TorchEngine, device: str, compute: float, *, quick: bool
) -> tuple[list[list[object]], list[list[object]]]:
    """Measure pages a second at several batch sizes, and where the time goes at the best."""
    rates: list[list[object]] = []
    split: list[list[object]] = []
    for tokens in PAGES:
        made, preparation = rendered(checkpoint, tokens, quick=quick)
        length = len(made[0])
        found_tokens = made[0].spans[0].rows * made[0].spans[0].cols
        floor = page_flops(config, found_tokens, length, DIM) / compute
        best = (0.0, 1)
        for batch in (1, 2) if quick else (1, 2, 4, 8, 16, 32):
            engine.batch_tokens = batch * length
            inputs = [made[i % len(made)] for i in range(batch)]
            seconds = fastest(lambda inputs=inputs: engine.embed(inputs), device, 3.0 if not quick else 0.0)
            rate = batch / seconds
            rates.append([found_tokens, batch, f"{rate:.1f}", f"{floor * rate:.0%}"])
            best = max(best, (rate, batch))
        batch = best[1]
        engine.batch_tokens = batch * length
        inputs = [made[i % len(made)] for i in range(batch)]
        engine.embed(inputs)
        with stopwatch(engine, device) as spent:
            start = time.perf_counter()
            engine.embed(inputs)
            total = time.perf_counter() - start
        rest = total - spent["vision"] - spent["text"]
        milliseconds = [1000 * part / batch for part in (spent["vision"], spent["text"], rest)]
        split.append([found_tokens, batch, f"{1000 * preparation:.1f}", *(f"{part:.2f}" for part in milliseconds)])
    return rates, split


def end_to_end(folder: Path, device: str, dtype: str, batch: int, *, quick: bool) -> float:
    """Pages a second of the whole encoder, scans in memory to multi-vectors, preparation overlapped."""
    count = 4 if quick else 64
    scans = [scan_of(SMALL_SCAN if quick else PAGES[640], seed) for seed in range(4)]
    options = TorchOptions(batch_tokens=batch * 660)
    with ColQwen3Encoder(
        folder, engine=options, device=device, dtype=dtype, max_visual_tokens=SMALL_TOKENS if quick else 640
    ) as encoder:
        encoder.encode_images(scans)
        start = time.perf_counter()
        encoder.encode_images([scans[i % len(scans)] for i in range(count)])
        return count / (time.perf_counter() - start)


def queries(checkpoint: Checkpoint, engine: TorchEngine, device: str) -> list[list[object]]:
    """Measure queries a second, alone and 64 at a time."""
    renderer = renderer_of(checkpoint)
    asked = [renderer.query(Query(QUESTION[: 20 + i % 36])) for i in range(64)]
    engine.batch_tokens = 64 * max(map(len, asked))
    rows: list[list[object]] = []
    for count in (1, 64):
        seconds = fastest(lambda count=count: engine.embed(asked[:count]), device)
        rows.append([count, f"{1000 * seconds:.1f}", f"{count / seconds:.0f}"])
    return rows


def scoring(device: str, copy: float, upload: float, *, quick: bool) -> list[list[object]]:
    """Measure MaxSim: float16 pages that lie in the machine's memory, and int8 codes that stay on the device."""
    rng = np.random.default_rng(1)
    rows: list[list[object]] = []
    count, tokens = (64, 80) if quick else (20_000, 640)
    block = rng.standard_normal((tokens, DIM), dtype=np.float32)
    block = (block / np.linalg.norm(block, axis=1, keepdims=True)).astype(np.float16)
    stored = np.tile(block, (count, 1)) if quick else np.resize(block, (count * tokens, DIM))
    packed = PackedEmbeddings(stored, np.arange(count + 1) * tokens)
    query = np.asarray(block[:25], dtype=np.float32)
    kernel = torch_kernel("cuda" if device.startswith("cuda") else "cpu")
    seconds = fastest(lambda: maxsim(query, packed, kernel=kernel), device)
    share = packed.vectors.nbytes / seconds / upload
    rows.append(["MaxSim, float16 in the machine's memory", f"{count / seconds:,.0f}", f"{share:.0%} of the upload"])
    coded = query_codes(PackedEmbeddings.pack([query]))
    lengths = np.full(count, -(-tokens // 3 // BLOCK) * BLOCK)
    codes = rng.integers(-127, 128, (int(lengths.sum()), coded.rows.shape[1]), dtype=np.int8)
    starts = np.cumsum(lengths) - lengths
    scan = device_scan(device) if device.startswith("cuda") else default_scan()
    scales = np.ones(count, dtype=np.float32)
    seconds = fastest(lambda: scan(coded, codes, starts, lengths, scales), device)
    share = codes.nbytes / seconds / (copy / 2)  # a copy reads and writes
    rows.append(["scan of int8 codes pooled by 3", f"{count / seconds:,.0f}", f"{share:.0%} of reading"])
    return rows


def report(shape: str, device: str, ceiling: tuple[float, float, float], *, quick: bool) -> str:
    """Measure one shape; its part of the report."""
    dtype = settle_dtype("auto", device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = write_checkpoint(folder, shape, torch.float32 if dtype == "float32" else torch.bfloat16)
        checkpoint = open_checkpoint(folder)
        config = config_of(shape)
        start = time.perf_counter()
        engine = TorchEngine(checkpoint, device=device, dtype=dtype)
        loading = time.perf_counter() - start
        rates, split = pages(checkpoint, config, engine, device, ceiling[0], quick=quick)
        asked = queries(checkpoint, engine, device)
        engine.close()
        del engine
        batch = max(rates[: len(rates) // 2], key=lambda row: float(str(row[2])))[1]
        whole = end_to_end(folder, device, dtype, int(str(batch)), quick=quick)
    return f"""## {shape}: {count / 1e9:.2f} G parameters, {dtype}

Loaded in {loading:.1f} s. The floor is the operations a page needs at the matrix products' measured rate.

{table(["visual tokens", "batch", "pages a second", "share of the floor"], rates)}

Milliseconds a page at the best batch; preparation is one thread's, and is overlapped with the rest.

{table(["visual tokens", "batch", "image preparation", "vision", "text", "projection and copy to the host"], split)}

The whole encoder, from scans in memory, 640 visual tokens a page: **{whole:.1f} pages a second**.

{table(["queries at once", "ms", "queries a second"], asked)}
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="*", default=["4b", "8b"], choices=("small", "mid", "4b", "8b"))
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a small shape, few pages")
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/gpu.md")
    options = parser.parse_args()
    device, quick = options.device, options.quick
    if not quick and not device.startswith("cuda") and not {"small", "mid"}.issuperset(options.shapes):
        parser.error("the true shapes want a GPU; --quick runs anywhere")
    start = time.monotonic()
    dtype = getattr(torch, settle_dtype("auto", device))
    ceiling = ceilings(device, dtype, quick=quick)
    compute, copy, upload = ceiling
    parts = [report(shape, device, ceiling, quick=quick) for shape in (["small"] if quick else options.shapes)]
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else "the CPU"
    text = f"""# The torch engine on {where}

Made by `python benchmarks/gpu.py --write` on {machine("transformers", "triton")}, in {{minutes:.1f}} minutes.

Measured ceilings: {compute / 1e12:,.2f} Tflop/s in a {str(dtype).removeprefix("torch.")} matrix product,
{copy / 1e9:,.0f} GB/s in a copy on the device (read and written), {upload / 1e9:,.1f} GB/s to the device.

{"".join(part + chr(10) for part in parts)}## MaxSim, a query of 25 tokens, pages of 640 tokens, dim {DIM}

{table(["what", "pages a second", "share of the bandwidth"], scoring(device, copy, upload, quick=quick))}
"""
    publish(__file__, text.format(minutes=(time.monotonic() - start) / 60), write=options.write)


if __name__ == "__main__":
    main()
