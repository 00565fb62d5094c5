"""Pictures that look like scanned pages, for tests of both frameworks."""

from __future__ import annotations

import hashlib
import io

import numpy as np
from PIL import Image


def scan(seed: int) -> Image.Image:
    """A page of coarse blocks, which every checkpoint of the tests tells from the others."""
    blocks = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((256, 256), Image.Resampling.NEAREST)


def digest(image: Image.Image) -> str:
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
