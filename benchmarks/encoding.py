"""Page encoding on the CPU: pages a second, ours against the peers, with the same weights, pages and precision.

    build/peers/bin/python benchmarks/encoding.py [--write]      # sh benchmarks/peers.sh builds that environment
    python benchmarks/encoding.py --quick                        # seconds; without peers where they are not installed

Everyone has a process, gets the same images, still to be resized, and gives unit token embeddings in float32. Ours is
called once with all pages; every peer is tried with batches of 1 and of 4, its better time counts. All take turns. That
the work is the same is checked: the worst cosine of a token with ours is in the table.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from participants import ask_options, participants
from peers import Peer, present
from PIL import Image, ImageDraw, ImageFont
from random_checkpoint import checkpoints
from reporting import in_turn, machine, publish, ratio, spread, table

SIZES = ((1240, 1754), (1280, 720), (827, 1170), (960, 960), (640, 480), (800, 1100), (1754, 1240), (600, 1500))
"""A scan, a slide, a fax, a square, a photograph, a letter, a scan on its side, a receipt."""

BATCHES = (1, 4)


def draw_pages(count: int, scale: float = 1.0, seed: int = 0) -> list[Image.Image]:
    """Draw pages of words, in the sizes of :data:`SIZES`."""
    rng, font = np.random.default_rng(seed), ImageFont.load_default(18)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(3, 9))) for _ in range(300)]
    pages = []
    for number in range(count):
        width, height = (max(64, int(side * scale)) for side in SIZES[number % len(SIZES)])
        page = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(page)
        for y in range(20, height - 20, 26):
            draw.text((20, y), " ".join(rng.choice(words, max(1, width // 70))), fill="black", font=font)
        pages.append(page)
    return pages


def worst_cosine(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Smallest cosine of a token with its counterpart; the shapes must agree."""
    return min(float((a * b).sum(axis=1).min()) for a, b in zip(ours, theirs, strict=True))


def encode(peer: Peer, pages: list[Image.Image], batch: int) -> list[np.ndarray]:
    """What is timed."""
    return peer.pages(pages, batch)


def measure(name: str, model: str | Path, dtype: str, pages: list[Image.Image], rounds: int) -> list[list[object]]:
    """Measure one checkpoint in one precision: rows of the table, the best batch of each peer."""
    with participants(present(), model, dtype) as [ours, *peers]:
        ways = {(ours.name, 0): lambda: ours.seconds(encode, pages, 0)}
        for peer in peers:
            for batch in BATCHES:
                ways[peer.name, batch] = lambda peer=peer, batch=batch: peer.seconds(encode, pages, batch)
        times = in_turn(ways, rounds, clock=lambda way: way())
        made = ours.result(encode, pages, 0)
        tokens = sum(len(page) for page in made) / len(made)
        own = times[ours.name, 0]
        rows: list[list[object]] = [
            [name, dtype, f"{tokens:.0f}", ours.name, "", f"{len(pages) / statistics.median(own):.2f}", "", ""]
        ]
        for peer in peers:
            batch = min(BATCHES, key=lambda size: statistics.median(times[peer.name, size]))
            theirs = times[peer.name, batch]
            cosine = worst_cosine(made, peer.result(encode, pages, batch))
            rows.append(
                [
                    name, dtype, "", peer.name, batch, f"{len(pages) / statistics.median(theirs):.2f}",
                    f"**{ratio(own, theirs):.2f}x** ({spread(own, theirs)})", f"{cosine:.6f}",
                ]
            )  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Measure and print."""
    options = ask_options(__file__, __doc__, rounds=3)
    pages = draw_pages(3, 0.2) if options.quick else draw_pages(len(SIZES), 0.7)
    rows: list[list[object]] = []
    with checkpoints(options.models) as opened:
        for name, model in opened:
            for dtype in options.dtypes:
                rows += measure(name, model, dtype, pages, options.rounds)
    columns = (
        "checkpoint", "precision", "tokens a page", "who", "its batch", "pages a second", "ours is faster by",
        "worst cosine of a token with ours",
    )  # fmt: skip
    text = f"""# Page encoding on a CPU

Made by `build/peers/bin/python benchmarks/encoding.py --write` on {machine("transformers", "numpy", "pillow")}.

{len(pages)} pages of {len(SIZES)} sizes, images in, token embeddings out, everyone in a process of its own;
{options.rounds} rounds in which all take turns: the median of the ratios within them, and the smallest and the largest.
`tiny` comes with the package; `mid` is a random checkpoint of 297 M parameters in Qwen3-VL's shape. A peer's better of
the batches {" and ".join(map(str, BATCHES))} is shown. In float32 what differs is the resize: the peers' processors
resize with torchvision, ours with Pillow. In bfloat16 all peers round the projection, and two the norm.

{table(columns, rows)}
"""
    publish(__file__, text, write=options.write)


if __name__ == "__main__":
    main()
