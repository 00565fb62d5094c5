"""A GPU measured with the true shapes of the 4B and 8B checkpoints, at random weights, in under ten minutes.

    python benchmarks/gpu.py [--shapes 4b 8b] [--write]       # on a CUDA machine; nothing is downloaded
    python benchmarks/gpu.py --quick                          # a small shape on whatever device there is, in seconds

Everything goes through the library: the checkpoint is written to a temporary folder and opened as any other, pages are
rendered by its renderer and encoded by its torch engine. What a page costs at least is counted exactly
(:func:`page_flops`) and set against the matrix products that this device was seen to reach.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from device import Ceilings, ceilings, fastest
from forward_time import PARTS, split
from PIL import Image
from random_checkpoint import DIM, config_of, write_checkpoint
from reporting import machine, publish, table

from colqwen3_retrievers import ColQwen3Encoder, PackedEmbeddings, Page, Query, TorchOptions, maxsim
from colqwen3_retrievers.engines.torch.engine import TorchEngine, settle_device, settle_dtype
from colqwen3_retrievers.models.checkpoint import Checkpoint, open_checkpoint
from colqwen3_retrievers.models.rendering import EncoderInput, Renderer
from colqwen3_retrievers.models.tokenizer import PromptTokenizer
from colqwen3_retrievers.vectors.codes import BLOCK, query_codes
from colqwen3_retrievers.vectors.kernels import default_scan, torch_kernel
from colqwen3_retrievers.vectors.kernels.gpu_scan import DeviceScan, fused_works
from colqwen3_retrievers.vectors.kernels.scan import CodeScan, numpy_scan

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


def mixed(checkpoint: Checkpoint, most: int, count: int) -> list[EncoderInput]:
    """Render pages no two of which are of one size, of 0.6 to 1 times so many visual tokens, tall and wide."""
    renderer = renderer_of(checkpoint, most)
    least, sides = max(64, int(0.6 * most)), range(4, most)
    sizes = [(w, h) for w, h in itertools.product(sides, sides) if least <= w * h <= most and w <= 2 * h <= 4 * w]
    order = np.random.default_rng(3).permutation(len(sizes))[:count]
    if len(order) < count:
        raise ValueError(f"{count} sizes asked for, there are {len(sizes)}")
    scans = [scan_of((32 * sizes[i][0], 32 * sizes[i][1]), int(i)) for i in order]
    return [renderer.document(Page(f"m{i}", image=scan)) for i, scan in enumerate(scans)]


class Pages:
    """Measures pages a second of an engine.

    Attributes:
        rows: of the table: visual tokens, batch, pages a second, share of the floor.
    """

    def __init__(self, config: Any, engine: TorchEngine, device: str, compute: float, *, quick: bool) -> None:
        self.rows: list[list[object]] = []
        self._config, self._engine, self._device, self._compute = config, engine, device, compute
        self._seconds = 0.0 if quick else 3.0

    def __call__(self, what: object, inputs: Sequence[EncoderInput]) -> tuple[float, bool]:
        """Measure one batch, again and again; give pages a second, and whether the batch went through whole."""
        engine, halvings = self._engine, self._engine.n_halvings
        self.in_one_batch(inputs)
        rate = len(inputs) / fastest(lambda: engine.embed(inputs), self._device, self._seconds)
        whole = engine.n_halvings == halvings
        self.add(what, inputs, rate, whole=whole)
        return rate, whole

    def first_seen(self, what: object, batches: Sequence[Sequence[EncoderInput]]) -> None:
        """Measure batches once each, unprepared."""
        rates, halvings = [], self._engine.n_halvings
        for inputs in batches:
            self.in_one_batch(inputs)
            start = time.perf_counter()
            self._engine.embed(inputs)
            rates.append(len(inputs) / (time.perf_counter() - start))
        self.add(what, batches[0], statistics.median(rates), whole=self._engine.n_halvings == halvings)

    def in_one_batch(self, inputs: Sequence[EncoderInput]) -> None:
        """Let the engine take some inputs at once."""
        self._engine.batch_tokens = len(inputs) * max(map(len, inputs))

    def add(self, what: object, inputs: Sequence[EncoderInput], rate: float, *, whole: bool) -> None:
        """Add a row; what did not fit, and ran in halves, says so."""
        shown = [(item.spans[0].rows * item.spans[0].cols, len(item)) for item in inputs]
        floor = sum(page_flops(self._config, *sizes, DIM) for sizes in shown) / len(inputs) / self._compute
        batch = f"{len(inputs)}" if whole else f"{len(inputs)}, halved: out of memory"
        self.rows.append([what, batch, f"{rate:.1f}", f"{floor * rate:.0%}"])


def pages(
    checkpoint: Checkpoint, engine: TorchEngine, measured: Pages, device: str, *, quick: bool
) -> tuple[list[list[object]], int]:
    """Measure pages a second at several batch sizes, where the time goes at the best, and pages of mixed sizes.

    Returns:
        Rows of the split, and the best batch's tokens with the smaller pages.
    """
    rows: list[list[object]] = []
    batch_tokens = 0
    for tokens in PAGES:
        made, preparation = rendered(checkpoint, tokens, quick=quick)
        seen = made[0].spans[0].rows * made[0].spans[0].cols
        best = (0.0, 1)
        for batch in (1, 2) if quick else (1, 2, 4, 8, 16, 32):
            rate, whole = measured(seen, [made[i % len(made)] for i in range(batch)])
            if not whole:
                break
            best = max(best, (rate, batch))
        inputs = [made[i % len(made)] for i in range(best[1])]
        measured.in_one_batch(inputs)
        spent = split(engine, inputs, device, 3 if quick else 7)
        milliseconds = (f"{1000 * spent[part] / len(inputs):.2f}" for part in PARTS)
        rows.append([seen, len(inputs), f"{1000 * preparation:.1f}", *milliseconds])
        batch_tokens = batch_tokens or len(inputs) * len(made[0])
        others = mixed(checkpoint, SMALL_TOKENS if quick else tokens, 3 * len(inputs))
        batches = [others[at : at + len(inputs)] for at in range(0, len(others), len(inputs))]
        measured.first_seen(f"up to {seen}, each of another size, first seen", batches)
        measured(f"up to {seen}, each of another size, again", batches[0])
    return rows, batch_tokens


def end_to_end(folder: Path, device: str, dtype: str, batch_tokens: int, *, quick: bool) -> float:
    """Pages a second of the whole encoder, scans in memory to multi-vectors, preparation overlapped."""
    scans = [scan_of(SMALL_SCAN if quick else PAGES[640], seed) for seed in range(4)]
    given = [scans[i % len(scans)] for i in range(4 if quick else 64)]
    with ColQwen3Encoder(
        folder, engine=TorchOptions(batch_tokens=batch_tokens), device=device, dtype=dtype,
        max_visual_tokens=SMALL_TOKENS if quick else 640,
    ) as encoder:  # fmt: skip
        encoder.encode_images(given)  # as many as are timed: batches of other sizes would be new to the device
        start = time.perf_counter()
        encoder.encode_images(given)
        return len(given) / (time.perf_counter() - start)


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


def scoring(device: str, ceiling: Ceilings, *, quick: bool) -> list[list[object]]:
    """Measure MaxSim: float16 pages that lie in the machine's memory, and int8 codes that stay on the device.

    Raises:
        AssertionError: scores are not those of the reference.
    """
    rng = np.random.default_rng(1)
    count, tokens, checked = (64, 80, 64) if quick else (20_000, 640, 500)
    block = rng.standard_normal((tokens, DIM), dtype=np.float32)
    block = (block / np.linalg.norm(block, axis=1, keepdims=True)).astype(np.float16)
    stored = np.tile(block, (count, 1)) if quick else np.resize(block, (count * tokens, DIM))
    packed = PackedEmbeddings(stored, np.arange(count + 1) * tokens)
    query = np.asarray(block[:25], dtype=np.float32)
    kernel = torch_kernel(device)
    np.testing.assert_allclose(maxsim(query, [block[:50]], kernel=kernel), maxsim(query, [block[:50]]), rtol=1e-4)
    seconds = fastest(lambda: maxsim(query, packed, kernel=kernel), device)
    share = packed.vectors.nbytes / seconds / ceiling.upload
    rows: list[list[object]] = [
        ["MaxSim, float16 in the machine's memory", 1, f"{count / seconds:,.0f}", f"{share:.0%} of the upload"]
    ]
    lengths = np.full(count, -(-tokens // 3 // BLOCK) * BLOCK)
    starts, scales = np.cumsum(lengths) - lengths, np.ones(count, dtype=np.float32)
    width = query_codes(PackedEmbeddings.pack([query])).rows.shape[1]
    codes = rng.integers(-127, 128, (int(lengths.sum()), width), dtype=np.int8)
    for name, scan in scans_on(device, width).items():
        for n_queries in (1, 8):
            asked = query_codes(PackedEmbeddings.pack([block[at : at + 25] for at in range(n_queries)]))
            found = scan(asked, codes, starts, lengths, scales)[:, :checked]
            right = numpy_scan(asked, codes, starts[:checked], lengths[:checked], scales[:checked])
            np.testing.assert_allclose(found, right, rtol=1e-5)
            seconds = fastest(lambda scan=scan, asked=asked: scan(asked, codes, starts, lengths, scales), device)
            share = codes.nbytes / seconds / ceiling.read
            what = f"scan of int8 codes pooled by 3, {name}"
            rows.append([what, n_queries, f"{count / seconds:,.0f}", f"{share:.0%} of reading them once"])
    return rows


def scans_on(device: str, width: int) -> dict[str, CodeScan]:
    """Give the scans there are for a device, by name."""
    if not device.startswith("cuda"):
        return {"the default": default_scan()}
    scans: dict[str, CodeScan] = {"torch": DeviceScan(device, fused=False)}
    if fused_works(torch.device(device), width):
        scans = {"fused": DeviceScan(device, fused=True), **scans}
    return scans


def report(shape: str, device: str, ceiling: Ceilings, *, quick: bool) -> str:
    """Measure one shape; its part of the report."""
    dtype = settle_dtype("auto", device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = write_checkpoint(folder, shape, torch.float32 if dtype == "float32" else torch.bfloat16)
        checkpoint = open_checkpoint(folder)
        start = time.perf_counter()
        engine = TorchEngine(checkpoint, device=device, dtype=dtype)
        loading = time.perf_counter() - start
        measured = Pages(config_of(shape), engine, device, ceiling.compute, quick=quick)
        parts, batch_tokens = pages(checkpoint, engine, measured, device, quick=quick)
        asked = queries(checkpoint, engine, device)
        engine.close()
        whole = end_to_end(folder, device, dtype, batch_tokens, quick=quick)
    return f"""## {shape}: {count / 1e9:.2f} G parameters, {dtype}

Loaded in {loading:.1f} s. The floor is the operations a page needs at the matrix products' measured rate.

{table(["visual tokens", "batch", "pages a second", "share of the floor"], measured.rows)}

Milliseconds a page at the best batch, medians{" of CUDA events" if device.startswith("cuda") else ""}. Image
preparation is one thread's, and is overlapped with the others; the rest is prompts' embeddings and bookkeeping.

{table(["visual tokens", "batch", "image preparation", *PARTS], parts)}

The whole encoder, from scans in memory, {SMALL_TOKENS if quick else 640} visual tokens a page:
**{whole:.1f} pages a second**.

{table(["queries at once", "ms", "queries a second"], asked)}
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="*", default=["4b", "8b"], choices=("small", "mid", "4b", "8b"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a small shape, few pages")
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/gpu.md")
    options = parser.parse_args()
    device, quick = settle_device(options.device), options.quick
    if not quick and not device.startswith("cuda") and not {"small", "mid"}.issuperset(options.shapes):
        parser.error("the true shapes want a GPU; --quick runs anywhere")
    start = time.monotonic()
    dtype = getattr(torch, settle_dtype("auto", device))
    ceiling = ceilings(device, dtype, quick=quick)
    parts = [report(shape, device, ceiling, quick=quick) for shape in (["small"] if quick else options.shapes)]
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else "the CPU"
    text = f"""# The torch engine on {where}

Made by `python benchmarks/gpu.py --write` on {machine("transformers", "triton")}, in {{minutes:.1f}} minutes.

Measured ceilings: {ceiling.compute / 1e12:,.2f} Tflop/s in a {str(dtype).removeprefix("torch.")} matrix product,
{ceiling.read / 1e9:,.0f} GB/s of the device's memory, {ceiling.upload / 1e9:,.1f} GB/s to the device.

{"".join(part + chr(10) for part in parts)}## MaxSim, queries of 25 tokens, pages of {80 if quick else 640}, dim {DIM}

{table(["what", "queries", "pages a second", "share of the bandwidth"], scoring(device, ceiling, quick=quick))}
"""
    publish(__file__, text.format(minutes=(time.monotonic() - start) / 60), write=options.write)


if __name__ == "__main__":
    main()
