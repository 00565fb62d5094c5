"""Where the time of page encoding goes on a CPU: torch's attention kernel, its matrix products, and all the rest.

    python benchmarks/encoding_time.py [--write]
    python benchmarks/encoding_time.py --quick

The kernels are torch's own and the same for everybody; only what is around them can be made faster by a way through the
model. The pages are those of ``encoding.py``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from encoding import draw_pages
from gpu import renderer_of
from random_checkpoint import checkpoints
from reporting import machine, publish, table
from torch.profiler import ProfilerActivity, profile

from colqwen3_retrievers import Page
from colqwen3_retrievers.engines.torch.engine import TorchEngine
from colqwen3_retrievers.models.checkpoint import open_checkpoint

KERNELS = {
    "attention": ("scaled_dot_product",),
    "matrix products": ("aten::addmm", "aten::mm", "aten::bmm", "mkldnn::_linear_pointwise"),
    "GELU and SiLU": ("aten::gelu", "aten::silu"),
}


def shares(model: str | Path, dtype: str, count: int, scale: float) -> list[str]:
    """Share of each kind of kernel in the forward pass, then of everything else; copies of a bias count as that."""
    checkpoint = open_checkpoint(model)
    renderer = renderer_of(checkpoint, checkpoint.max_pixels // (32 * 32))
    inputs = [renderer.document(Page(f"p{i}", image=image)) for i, image in enumerate(draw_pages(count, scale))]
    engine = TorchEngine(checkpoint, device="cpu", dtype=dtype)
    engine.embed(inputs)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        engine.embed(inputs)
    spent = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    found = [
        sum(time for name, time in spent.items() if any(part in name for part in kernels))
        for kernels in KERNELS.values()
    ]
    total = sum(spent.values())
    return [f"{part / total:.0%}" for part in (*found, total - sum(found))]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few small pages of a small checkpoint")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/encoding_time.md")
    options = parser.parse_args()
    models, dtypes = (("small",), ("float32",)) if options.quick else (("tiny", "mid"), ("float32", "bfloat16"))
    count, scale = (3, 0.2) if options.quick else (8, 0.7)
    rows = []
    with checkpoints(models) as opened:
        for name, model in opened:
            for dtype in dtypes:
                rows.append([name, dtype, *shares(model, dtype, count, scale)])
    text = f"""# Where the time of page encoding goes

Made by `python benchmarks/encoding_time.py --write` on {machine("transformers", "numpy")}.

Shares of the time inside torch, of the pages of `encoding.py`; preparing the images comes on top and overlaps. In
bfloat16 the activations are applied inside the matrix products.

{table(("checkpoint", "precision", *KERNELS, "all else"), rows)}
"""
    publish(__file__, text, write=options.write)


if __name__ == "__main__":
    main()
