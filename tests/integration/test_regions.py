"""A hundred words that are printed once on held-out pages: the first box is where the word is, and no wider than it.

The pages were drawn by ``benchmarks/regions.py --write-pages``: words, fonts and layouts the checkpoint never saw, of
the second seed that ``benchmarks/regions.md`` tells of. ``words.json`` holds the place of each word's ink in pixels.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, similarity_map

PAGES = Path(__file__).parent.parent / "data" / "regions"
SIDE = 32


def test_the_first_box_is_the_words() -> None:
    places = json.loads((PAGES / "words.json").read_text(encoding="utf-8"))
    asked = [(name, *word) for name, words in places.items() for word in words]
    assert len(asked) == 100
    found = []
    with ColQwen3Encoder("tiny", device="cpu") as encoder:
        queries = encoder.encode_queries([text for _, text, *_ in asked])
        pages = dict(zip(places, encoder.encode_images([PAGES / name for name in places]), strict=True))
    for (name, text, left, top, right, bottom), query in zip(asked, queries, strict=True):
        with Image.open(PAGES / name) as image:
            size = image.size
        [box] = similarity_map(query, pages[name]).boxes(size, top=1)
        inside = box.left <= (left + right) / 2 <= box.right and box.top <= (top + bottom) / 2 <= box.bottom
        cells = (math.ceil(right / SIDE) - left // SIDE) * (math.ceil(bottom / SIDE) - top // SIDE)
        area = (box.right - box.left) * (box.bottom - box.top) / SIDE**2
        found.append((inside and area <= 4 * cells + 1e-6, text))
    missed = [text for right, text in found if not right]
    assert len(missed) <= 15, missed
