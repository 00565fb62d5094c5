"""A similarity map does not depend on where the page's vectors lay: in memory, a folder, or Qdrant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from colqwen3_retrievers import ColQwen3Encoder, Page, PageIndex, SimilarityMap, similarity_map

QUESTION = "alloy"


@pytest.fixture(scope="module", params=[1, 3], ids=["whole", "pooled"])
def encoder(request: pytest.FixtureRequest) -> Iterator[ColQwen3Encoder]:
    with ColQwen3Encoder("tiny", device="cpu", pool_factor=request.param) as made:
        yield made


def picture() -> Image.Image:
    image = Image.new("RGB", (500, 330), "white")  # no multiple of 32
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(28)
    for place, word in enumerate(("harbour", "alloy", "ledger", "window", "cedar", "marble")):
        draw.text((40 + 240 * (place % 2), 30 + 100 * (place // 2)), word, fill="black", font=font)
    return image


@pytest.fixture(scope="module")
def in_memory(encoder: ColQwen3Encoder) -> SimilarityMap:
    [query], [page] = encoder.encode_queries([QUESTION]), encoder.encode_images([picture()])
    return similarity_map(query, page)


@pytest.mark.parametrize("place", ["folder", "qdrant"])
def test_a_map_is_the_same_from_every_store(
    place: str, encoder: ColQwen3Encoder, in_memory: SimilarityMap, tmp_path: Path
) -> None:
    if place == "qdrant":
        pytest.importorskip("qdrant_client")
        index = PageIndex.open(f"qdrant+path:{tmp_path / 'qdrant'}/pages", encoder, images_dir=tmp_path / "images")
    else:
        index = PageIndex.open(tmp_path / "index", encoder)
    with index:
        index.add([Page(id="words", image=picture())])
        [query] = encoder.encode_queries([QUESTION])
        [record] = index.get(["words"], vectors=True)
        assert record.multi_vector is not None
        kept = similarity_map(query, record.multi_vector)
    assert kept.pooled == in_memory.pooled == (encoder.info.pool_factor > 1)
    assert kept.tokens == in_memory.tokens
    assert np.abs(kept.values - in_memory.values).max() < 2e-3  # stores keep float16
    assert np.abs(kept.per_token - in_memory.per_token).max() < 2e-3
    [one], [other] = kept.boxes((500, 330), top=1), in_memory.boxes((500, 330), top=1)
    assert (one.left, one.top, one.right, one.bottom) == (other.left, other.top, other.right, other.bottom)
    assert one.left <= 330 <= one.right, "where the word stands"
    assert one.top <= 50 <= one.bottom
