"""What tests of the LlamaIndex adapters stand on: a checkpoint, pictures, and a question that is a copy of one.

The encoder is real (a tiny random checkpoint), so a question that is a copy of a page's picture finds that page.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from llama_index.core.schema import QueryBundle
from PIL import Image

from tests.checkpoints import make_checkpoint


def make_folder(folder: Path, pictures: int, *, pages: str = "pages", other: bool = False) -> Path:
    """Make ``checkpoint``, with ``other`` a second one of other weights, and ``0.png`` and so on under ``pages``."""
    make_checkpoint(folder / "checkpoint", "tomoro")
    if other:
        make_checkpoint(folder / "other", "tomoro", seed=8)
    (folder / pages).mkdir(exist_ok=True)
    for seed in range(pictures):
        pixels = np.random.default_rng(seed).integers(0, 256, (96, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / pages / f"{seed}.png")
    return folder


def like(folder: Path, seed: int, text: str = "") -> QueryBundle:
    """A question that is a copy of a picture under ``pages``, with or without words."""
    return QueryBundle(text, image_path=str(folder / "pages" / f"{seed}.png"))
