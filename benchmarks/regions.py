"""Which rule finds the region of a page that answers: single printed words on held-out pages, with the tiny checkpoint.

    python benchmarks/regions.py --cache DIR [--pages 100] [--write] [--write-pages DIR]

Prints Markdown tables; ``--write`` puts them into ``benchmarks/regions.md``. A word that is printed once on its page is
asked for. A rule finds it when the centre of the word lies inside the first box, and the box covers at most four times
the visual tokens that the word's ink touches. The rule was chosen on the pages of one seed and checked on another's;
what was shipped was then asked once on a third's.
``--write-pages`` writes the first pages of the second seed as PNG with the places of the words: those of
``tests/integration/test_regions.py``. Needs the fonts and words of ``training/packages.txt``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from reporting import machine

from colqwen3_retrievers import ColQwen3Encoder, MultiVector, SimilarityMap, similarity_map
from colqwen3_retrievers.retrieval.similarity_maps import _level, _regions
from colqwen3_retrievers.vectors.compression import pool_tokens

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training import heldout  # noqa: E402 - the repository's root is not on the path of a script
from training.fonts import FontFile, load_font  # noqa: E402
from training.pages import Pen  # noqa: E402
from training.words import FUNCTION_WORDS  # noqa: E402

SIDE = 32  # pixels of a visual token
CHOSEN_ON, CHECKED_ON, AFTERWARDS = heldout.SEED, 777, 31_337  # the last was first drawn when the rule had shipped
Word = tuple[str, float, float, float, float]  # text, left, top, right, bottom in pixels
Cells = tuple[float, float, float, float]  # left, top, right, bottom in visual tokens
Rule = Callable[[SimilarityMap], Cells]


class MeasuringPen(Pen):
    """A pen that keeps the place of each word's ink."""

    last: MeasuringPen

    def __init__(self, width: int, height: int, scale: float) -> None:
        super().__init__(width, height, scale)
        self.places: list[Word] = []
        MeasuringPen.last = self

    def word(self, font: FontFile, size: float, x: float, baseline: float, word: str, before: str, after: str) -> None:
        """Print a word and keep where its own ink lies."""
        super().word(font, size, x, baseline, word, before, after)
        ink = load_font(font.path, size * self.scale).getbbox(word, anchor="ls")
        left, top, right, bottom = (edge / self.scale for edge in ink)
        x += self.length(font, size, before)
        self.places.append((word.lower(), x + left, baseline + top, x + right, baseline + bottom))


def draw_pages(seed: int, count: int) -> Iterator[tuple[Image.Image, list[Word]]]:
    """Held-out pages with the place of each printed word, in the order of printing."""
    pen, heldout.Pen = heldout.Pen, MeasuringPen  # type: ignore[misc]
    try:
        for number in range(count):
            page = heldout.draw_page(number, seed=seed)
            yield page.image, MeasuringPen.last.places
    finally:
        heldout.Pen = pen  # type: ignore[misc]


def single_words(words: list[Word], count: int, rng: random.Random) -> list[Word]:
    """Some of the words that are printed once: letters only, no function words."""
    texts = [word[0] for word in words]
    once = [word for word in words if word[0].isalpha() and texts.count(word[0]) == 1 and word[0] not in FUNCTION_WORDS]
    return rng.sample(once, min(count, len(once)))


def pairs(words: list[Word], rng: random.Random) -> list[Word]:
    """One pair of words that stand side by side on a line, as one phrase printed once."""
    beside = [
        (f"{a[0]} {b[0]}", a[1], min(a[2], b[2]), b[3], max(a[4], b[4]))
        for a, b in pairwise(words)
        if b[1] > a[3] and b[1] - a[3] < a[4] - a[2] + b[4] - b[2] and b[2] < a[4] and a[2] < b[4]
    ]
    once = [pair for pair in beside if all(sum(w[0] == text for w in words) == 1 for text in pair[0].split())]
    return rng.sample(once, min(1, len(once)))


@dataclass(frozen=True)
class Page:
    """A page's visual tokens, its grid and its words."""

    rows: np.ndarray
    grid: tuple[int, int]
    words: list[Word]


def encoded(encoder: ColQwen3Encoder, cache: Path, seed: int, count: int) -> list[Page]:
    """Encode pages, or read them from the folder."""
    path = cache / f"regions-{encoder.info.fingerprint[:12]}-{seed}-{count}.npz"
    if not path.exists():
        vectors, grids, words = [], [], []
        for image, places in draw_pages(seed, count):
            [made] = encoder.encode_images([image])
            assert made.visual is not None
            vectors.append(made.vectors[made.visual].astype(np.float16))
            grids.append(made.grid)
            words.append({"words": places})
        cache.mkdir(parents=True, exist_ok=True)
        ends = np.cumsum([len(each) for each in vectors])
        np.savez(path, v=np.concatenate(vectors), ends=ends, grids=grids, meta=json.dumps(words))
    with np.load(path, allow_pickle=False) as kept:
        parts = np.split(kept["v"].astype(np.float32), kept["ends"][:-1])
        meta = json.loads(str(kept["meta"]))
        return [
            Page(rows, (int(grid[0]), int(grid[1])), [tuple(word) for word in each["words"]])
            for rows, grid, each in zip(parts, kept["grids"], meta, strict=True)
        ]


Case = tuple[SimilarityMap, Word]


def cases(encoder: ColQwen3Encoder, pages: list[Page], asked: list[list[Word]], pool: int = 1) -> list[Case]:
    """Maps of words over their pages."""
    queries = iter(encoder.encode_queries([word[0] for words in asked for word in words]))
    made = []
    for page, words in zip(pages, asked, strict=True):
        rows, clusters = pool_tokens(page.rows, pool)
        vector = MultiVector(rows, visual=slice(None), grid=page.grid, clusters=clusters if pool > 1 else None)
        made += [(similarity_map(next(queries), vector), word) for word in words]
    return made


def found(box: Cells, word: Word) -> tuple[bool, float]:
    """Whether the word's centre is inside, and the box's area over that of the cells that the word's ink touches."""
    left, top, right, bottom = (edge / SIDE for edge in word[1:])
    inside = box[0] <= (left + right) / 2 <= box[2] and box[1] <= (top + bottom) / 2 <= box[3]
    cells = (math.ceil(right) - math.floor(left)) * (math.ceil(bottom) - math.floor(top))
    return inside, (box[2] - box[0]) * (box[3] - box[1]) / cells


def figures(rule: Rule, asked: list[Case]) -> str:
    """A rule's figures as cells of a table."""
    judged = [found(rule(made), word) for made, word in asked]
    both = np.mean([inside and area <= 4 for inside, area in judged])
    inside, small = np.mean([inside for inside, _ in judged]), np.mean([area <= 4 for _, area in judged])
    return f"{both:.1%} | {inside:.1%} | {small:.1%} | {np.median([area for _, area in judged]):.2f}"


def rule(level: Callable[[np.ndarray], float], threshold: float, best: str = "mean", by: str = "max") -> Rule:
    """Regions above a level, of the maximum over tokens or of each token's own contrast; the first by ``best``."""

    def apply(made: SimilarityMap) -> Cells:
        if by == "token":
            heights = [(each - level(each)) / max(each.max() - level(each), 1e-6) for each in made.per_token]
            height = np.max(heights, axis=0)
        else:
            height = (made.values - level(made.values)) / (made.values.max() - level(made.values))
        inside = made.per_token if best == "mean" else made.values[None]
        region = max(_regions(height >= min(threshold, height.max())), key=lambda part: inside[:, part].max(1).mean())
        y, x = np.nonzero(region)
        return float(x.min()), float(y.min()), float(x.max() + 1), float(y.max() + 1)

    return apply


def shipped(made: SimilarityMap) -> Cells:
    """The first box of the package."""
    [box] = made.boxes(made.values.shape[::-1], top=1)
    return box.left, box.top, box.right, box.bottom


def median(values: np.ndarray) -> float:
    """The page's median."""
    return float(np.median(values))


def ninth_decile(values: np.ndarray) -> float:
    """What a tenth of the page is above."""
    return float(np.quantile(values, 0.9))


def report(encoder: ColQwen3Encoder, cache: Path, count: int) -> str:
    """Both tables."""
    sets = {}
    for seed in (CHOSEN_ON, CHECKED_ON, AFTERWARDS):
        pages, rng = encoded(encoder, cache, seed, count), random.Random(seed)
        sets[seed] = pages, [single_words(page.words, 3, rng) for page in pages]
    asked = {seed: cases(encoder, pages, words) for seed, (pages, words) in sets.items()}
    rules = [
        (f"{name}; {order}", threshold, rule(level, threshold, best, by))
        for name, level, order, best, by in (
            ("maximum over tokens, from the median", median, "largest similarity", "max", "max"),
            ("maximum over tokens, from the 90 % quantile", ninth_decile, "largest similarity", "max", "max"),
            ("maximum over tokens, from the print", _level, "largest similarity", "max", "max"),
            ("each token's contrast, from the print", _level, "mean over tokens", "mean", "token"),
            ("maximum over tokens, from the print", _level, "mean over tokens", "mean", "max"),
        )
        for threshold in ((0.7, 0.8, 0.9) if level is median else (0.5, 0.6, 0.7))
    ]
    head = "| found | centre inside | at most 4 x | median area "
    lines = [
        f"| region; order | threshold {head}{head.replace('found', 'found, 2nd')}|",
        "|---|---|" + "---|" * 8,
    ]
    lines += [
        f"| {name} | {threshold} | {figures(each, asked[CHOSEN_ON])} | {figures(each, asked[CHECKED_ON])} |"
        for name, threshold, each in rules
    ]
    lines.append(
        f"| **`boxes()` as shipped** | 0.6 | {figures(shipped, asked[CHOSEN_ON])} | "
        f"{figures(shipped, asked[CHECKED_ON])} |"
    )
    pages, words = sets[CHECKED_ON]
    rng = random.Random(CHECKED_ON)
    others = {
        "second pages, single words": asked[CHECKED_ON],
        "second pages, single words, pooled by 3": cases(encoder, pages, words, pool=3),
        "second pages, two words side by side": cases(encoder, pages, [pairs(page.words, rng) for page in pages]),
        "third pages, single words": asked[AFTERWARDS],
    }
    lines += ["", f"| `boxes()` as shipped {head}|", "|---|" + "---|" * 4]
    lines += [f"| {name}, {len(some)} | {figures(shipped, some)} |" for name, some in others.items()]
    return "\n".join(lines)


def write_pages(folder: Path, count: int) -> None:
    """Write pages of the second seed as PNG of 16 shades, with the places of four words each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, kept = random.Random(CHECKED_ON), {}
    for number, (image, words) in enumerate(draw_pages(CHECKED_ON, count)):
        name = f"page-{number:02}.png"
        image.quantize(16, dither=Image.Dither.NONE).save(folder / name, optimize=True, bits=4)
        kept[name] = single_words(words, 4, rng)
    lines = [f"{json.dumps(name)}: {json.dumps([[w[0], *(round(v, 1) for v in w[1:])] for w in words])}"
             for name, words in kept.items()]  # fmt: skip
    (folder / "words.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--pages", type=int, default=100)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--write-pages", type=Path, metavar="DIR")
    options = parser.parse_args()
    if options.write_pages:
        write_pages(options.write_pages, 25)
        return
    encoder = ColQwen3Encoder("tiny", device="cpu")
    text = report(encoder, options.cache, options.pages)
    print(text)
    if options.write:
        about = INTRODUCTION.format(
            pages=options.pages, model=f"tiny {encoder.info.fingerprint[:12]}", machine=machine("numpy")
        )
        Path(__file__).with_suffix(".md").write_text(about + "\n" + text + "\n", encoding="utf-8")


INTRODUCTION = """# Which region answered

Made by `python benchmarks/regions.py --cache DIR --pages {pages} --write` on {machine}.

With {model}: {pages} held-out pages of each of three seeds, up to three words a page that are printed on it
once. A word is found when its centre lies inside the first box and the box covers at most four times the
visual tokens that the word's ink touches. "Median area" is the box over those tokens. The rule was chosen
on the first pages (left four columns) and checked on the second (right four).

What made boxes too wide: `tiny` compares a word with paper at about 0.2, with print of any kind at 0.7, and
with its own picture at 0.95. The median of a page is mostly paper, so 0.7 of the way from it to the maximum
lies within the print, and all lines of a paragraph become one region. Counted from the print, every threshold
from 0.5 to 0.7 serves; counted from the median, 0.8 and 0.9 do too, but 0.7 does not. Both sets of figures were
seen before the threshold was settled, so the second is no untouched test; the third pages are: they were drawn, and
asked once, when the rule had long shipped. A real checkpoint's maps are larger and smoother, and were not
measured here.
"""

if __name__ == "__main__":
    main()
