"""The checkpoint that comes with the package loads like any other, and finds the page on which a word is printed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from colqwen3_retrievers import ColQwen3Encoder, MultiVector
from colqwen3_retrievers.models.checkpoint import TINY, open_checkpoint

WORDS = [
    "harbour", "velocity", "mushroom", "Plymouth", "28,415", "treaty", "copper", "invoice", "glacier", "Wednesday",
    "algebra", "sandwich", "7.35", "pilgrim", "xylophone", "bankrupt", "orchard", "quantum", "shoulder", "Jupiter",
]  # fmt: skip
COMMON = [
    "the", "of", "and", "for", "with", "that", "from", "this", "have", "been", "were", "their", "which", "would",
    "there", "about", "other",
]  # fmt: skip


def page(word: str, seed: int) -> Image.Image:
    """Forty words on a page, one of them ours, in the font that comes with Pillow."""
    rng = np.random.default_rng(seed)
    words = [str(rng.choice(COMMON)) for _ in range(39)]
    words.insert(int(rng.integers(0, 39)), word)
    image = Image.new("RGB", (640, 448), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=30)
    x, y = 30, 30
    for each in words:
        width = int(draw.textlength(each + " ", font=font))
        if x + width > 610:
            x, y = 30, y + 46
        draw.text((x, y), each, font=font, fill="black")
        x += width
    return image


@pytest.fixture(scope="module")
def pages() -> list[Image.Image]:
    return [page(word, seed) for seed, word in enumerate(WORDS)]


@pytest.fixture(scope="module")
def encoder() -> Iterator[ColQwen3Encoder]:
    with ColQwen3Encoder("tiny", device="cpu") as made:
        yield made


@pytest.fixture(scope="module")
def documents(encoder: ColQwen3Encoder, pages: list[Image.Image]) -> list[MultiVector]:
    return encoder.encode_images(pages)


def test_it_is_small_and_of_the_tomoro_family() -> None:
    checkpoint = open_checkpoint("tiny")
    assert checkpoint.family.name == "tomoro"
    assert checkpoint.has_bias
    assert checkpoint.matryoshka_dims == (128, 64, 32)
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 25_000_000
    assert not list(TINY.glob("*.py"))


def test_it_finds_the_page_that_shows_a_word(encoder: ColQwen3Encoder, documents: list[MultiVector]) -> None:
    scores = encoder.score(encoder.encode_queries(WORDS), documents)
    first = (scores.argmax(axis=1) == np.arange(len(WORDS))).sum()
    assert first >= 19, f"{first} of {len(WORDS)}"


def test_letter_case_does_not_matter(encoder: ColQwen3Encoder) -> None:
    lower, upper = encoder.encode_queries(["harbour", "HARBOUR"])
    assert np.abs(lower.vectors - upper.vectors).max() < 1e-6


@pytest.mark.parametrize(("dim", "least"), [(64, 19), (32, 18)])
def test_truncated_to_a_nested_dim_it_still_finds_them(dim: int, least: int, pages: list[Image.Image]) -> None:
    with ColQwen3Encoder("tiny", device="cpu", dim=dim) as narrow:
        scores = narrow.score(narrow.encode_queries(WORDS), narrow.encode_images(pages))
    assert (scores.argmax(axis=1) == np.arange(len(WORDS))).sum() >= least
