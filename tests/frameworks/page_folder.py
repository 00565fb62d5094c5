"""Pages, questions and filters for tests of the LlamaIndex adapter.

The encoder is real (a tiny random checkpoint), so a question that is a copy of a page's image finds that page.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.base.llms.types import ImageBlock
from llama_index.core.schema import BaseNode, MetadataMode, QueryBundle
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters
from PIL import Image

from tests.hashing import picture


def make_folder(folder: Path, pictures: int, *, pages: str = "pages", other: bool = False) -> Path:
    """Make ``checkpoint``, with ``other`` a second one of other weights, and ``0.png`` and so on under ``pages``."""
    from tests.checkpoints import make_checkpoint  # needs torch, which not all tests do

    make_checkpoint(folder / "checkpoint", "tomoro")
    if other:
        make_checkpoint(folder / "other", "tomoro", seed=8)
    (folder / pages).mkdir(exist_ok=True)
    for seed in range(pictures):
        picture(seed, 128, 96).save(folder / pages / f"{seed}.png")
    return folder


def page_image(folder: Path, seed: int = 0) -> Path:
    """The file of an image under ``pages``."""
    return folder / "pages" / f"{seed}.png"


def like(folder: Path, seed: int, text: str = "") -> QueryBundle:
    """A question that is a copy of an image under ``pages``, with or without words."""
    return QueryBundle(text, image_path=str(page_image(folder, seed)))


def only(key: str, value: Any, operator: FilterOperator = FilterOperator.EQ) -> MetadataFilters:
    """A single filter."""
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value, operator=operator)])


def base64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def pixels(image: Image.Image | Path | str | bytes) -> np.ndarray[Any, Any]:
    if not isinstance(image, Image.Image):
        image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    return np.asarray(image.convert("RGB"))


def shown(node: BaseNode) -> Image.Image:
    """The image that a chat model sees of a node."""
    (block,) = (block for block in node.get_content_blocks(MetadataMode.LLM) if isinstance(block, ImageBlock))
    return Image.open(block.resolve_image())


def shown_page(data: bytes, folder: Path) -> int:
    """Which of the images under ``pages`` this is, pixel for pixel."""
    files = sorted((folder / "pages").iterdir())
    return next(seed for seed, file in enumerate(files) if np.array_equal(pixels(data), pixels(file)))
