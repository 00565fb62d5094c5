"""The held-out set: words, fonts and layouts that training never saw.

``python -m training.heldout --out DIR`` writes the pages as PNG with ``queries.jsonl``; the evaluation draws the same
pages itself.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from PIL import Image

from .fonts import FontFile, installed_fonts
from .pages import Pen, jpeg
from .words import FUNCTION_WORDS, WordSource, cased

SEED = 20_240_229
SIZES = {
    "report": ((672, 960), (800, 1120), (960, 1344)),
    "slide": ((960, 544), (1024, 576), (1280, 736)),
    "letter": ((672, 960), (736, 1056), (960, 1344)),
    "invoice": ((672, 960), (800, 1120)),
    "card": ((512, 384), (640, 480), (768, 512)),
}
COLOURS = (("#000000", "#ffffff"), ("#222222", "#ffffff"), ("#1a2b4c", "#ffffff"), ("#000000", "#f6f1e4"))
DARK = (("#ffffff", "#000000"), ("#f0f0f0", "#1b2333"), ("#ffffff", "#3b1f4d"))
VARIANTS = ("plain", "rotated 2 degrees", "JPEG quality 40", "white on dark")


@dataclass
class HeldOutPage:
    """A page with the words that can be asked for, in reading order."""

    image: Image.Image
    words: list[str]
    layout: str


@dataclass
class _Sheet:
    """Running state while a page is set."""

    pen: Pen
    rng: random.Random
    source: WordSource
    left: int
    unseen: list[str] = field(default_factory=list)

    def text(self, case: str | None = "lower") -> str:
        """The next word to print: unseen, or now and then a function word that nobody asks for."""
        self.left -= 1
        if self.rng.random() < 0.15:
            return cased(self.rng.choice(FUNCTION_WORDS), self.rng, case)
        word = self.source.special() if self.rng.random() < 0.15 else self.source.dictionary_word()
        return cased(word, self.rng, case)

    def put(self, font: FontFile, size: float, x: float, baseline: float, text: str, after: str = "") -> float:
        """Print a word and return the x after it."""
        self.pen.word(font, size, x, baseline, text, "", after)
        if text.lower() not in FUNCTION_WORDS:
            self.unseen.append(text.lower())
        return x + self.pen.length(font, size, text + after)

    def lines(
        self, font: FontFile, size: float, box: tuple[float, float, float], count: int, leading: float, case: str | None
    ) -> float:
        """Set up to ``count`` words as ragged lines from (x0, y) to x1; return the lower end."""
        x0, y, x1 = box
        space = self.pen.length(font, size, " ")
        x, baseline = x0, y + 0.8 * size
        while count > 0 and self.left > 0 and baseline < self.pen.height - 0.3 * size:
            text = self.text(case)
            after = self.rng.choice(("", "", "", "", "", ",", "."))
            if x + self.pen.length(font, size, text + after) > x1:
                x, baseline = x0, baseline + leading
                if baseline > self.pen.height - 0.3 * size or x0 + self.pen.length(font, size, text + after) > x1:
                    break
            x = self.put(font, size, x, baseline, text, after) + space
            count -= 1
        return baseline + 0.3 * size


def _report(sheet: _Sheet, fonts: tuple[FontFile, ...]) -> None:
    rng, width = sheet.rng, sheet.pen.width
    margin, body, head = rng.uniform(0.07, 0.13) * width, rng.uniform(14, 20), rng.uniform(24, 40)
    title, text = rng.choice(fonts), rng.choice(fonts)
    y = sheet.lines(title, head, (margin, margin, width - margin), rng.randint(2, 4), head * 1.2, "title")
    sheet.pen.line(margin, y + 8, width - margin, y + 8, 200)
    y += 30
    while sheet.left > 0 and y < sheet.pen.height - 80:
        y = sheet.lines(title, body * 1.3, (margin, y, width - margin), rng.randint(1, 3), body * 1.6, None) + 6
        y = sheet.lines(text, body, (margin, y, width - margin), rng.randint(8, 20), body * 1.45, "lower") + 24


def _slide(sheet: _Sheet, fonts: tuple[FontFile, ...]) -> None:
    rng, width = sheet.rng, sheet.pen.width
    margin, body, head = rng.uniform(0.05, 0.1) * width, rng.uniform(19, 28), rng.uniform(34, 54)
    font = rng.choice(fonts)
    y = sheet.lines(rng.choice(fonts), head, (margin, 30, width - margin), rng.randint(2, 4), head * 1.15, "title") + 20
    while sheet.left > 0 and y < sheet.pen.height - 2 * body:
        s = sheet.pen.scale
        dot = (margin * s, (y + 0.3 * body) * s, (margin + 0.35 * body) * s, (y + 0.65 * body) * s)
        sheet.pen.draw.ellipse(dot, fill=220)
        y = sheet.lines(font, body, (margin + body, y, width - margin), rng.randint(4, 8), body * 1.3, None) + body / 2


def _letter(sheet: _Sheet, fonts: tuple[FontFile, ...]) -> None:
    rng, width = sheet.rng, sheet.pen.width
    size, font = rng.uniform(14, 19), rng.choice(fonts)
    margin = rng.uniform(0.1, 0.15) * width
    y = margin
    for _ in range(rng.randint(3, 4)):
        y = sheet.lines(font, size, (width * 0.6, y, width - 20), 2, size * 1.3, "title")
    y += 40
    while sheet.left > 0 and y < sheet.pen.height - 60:
        y = sheet.lines(font, size, (margin, y, width - margin), rng.randint(6, 24), size * 1.5, "lower") + size


def _invoice(sheet: _Sheet, fonts: tuple[FontFile, ...]) -> None:
    rng, width = sheet.rng, sheet.pen.width
    size, font = rng.uniform(14, 21), rng.choice(fonts)
    y = sheet.lines(rng.choice(fonts), size * 2, (40, 40, width - 40), 2, size * 2.4, "upper") + 30
    columns = [40, 40 + 0.3 * (width - 80), 40 + 0.6 * (width - 80), width - 40]
    while sheet.left > 0 and y < sheet.pen.height - 60:
        sheet.pen.line(40, y, width - 40, y, 120)
        for x0, x1 in pairwise(columns):
            if sheet.left > 0:
                sheet.lines(font, size, (x0 + 4, y + 0.4 * size, x1), 1, size, None)
        y += 2.1 * size


def _card(sheet: _Sheet, fonts: tuple[FontFile, ...]) -> None:
    rng, y = sheet.rng, 16.0
    while sheet.left > 0 and y < sheet.pen.height - 24:
        size, font = rng.uniform(15, 34), rng.choice(fonts)
        inset = rng.uniform(0.03, 0.25) * sheet.pen.width
        y = sheet.lines(font, size, (inset, y, sheet.pen.width - 12), rng.randint(2, 7), 1.25 * size, None) + 6


LAYOUTS: dict[str, Callable[[_Sheet, tuple[FontFile, ...]], None]] = {
    "report": _report,
    "slide": _slide,
    "letter": _letter,
    "invoice": _invoice,
    "card": _card,
}


def draw_page(number: int, variant: str = "plain", seed: int = SEED) -> HeldOutPage:
    """Draw one page of 20 to 60 words; the words do not depend on the variant."""
    attempt = 0
    while True:
        rng = random.Random(f"{seed}-{number}-{attempt}")
        layout = rng.choice(sorted(LAYOUTS))
        width, height = rng.choice(SIZES[layout])
        pen = Pen(width, height, rng.choice((1.0, 2.0, 3.0)))
        sheet = _Sheet(pen, rng, WordSource("test", rng), rng.randint(22, 58))
        LAYOUTS[layout](sheet, installed_fonts("test"))
        resample = rng.choice((Image.Resampling.BOX, Image.Resampling.BICUBIC))
        ink_colour, paper = rng.choice(COLOURS)
        dark = rng.choice(DARK)
        turn = rng.choice((-2.0, 2.0))
        if 20 <= len(pen.page.words) <= 60 and len(sheet.unseen) >= 8:
            break
        attempt += 1
    ink = pen.finish(resample).ink
    if variant == "rotated 2 degrees":
        ink = ink.rotate(turn, Image.Resampling.BICUBIC)
    if variant == "white on dark":
        ink_colour, paper = dark
    image = Image.composite(Image.new("RGB", ink.size, ink_colour), Image.new("RGB", ink.size, paper), ink)
    if variant == "JPEG quality 40":
        image = jpeg(image, 40)
    return HeldOutPage(image, sheet.unseen, layout)


def draw_queries(pages: list[list[str]], count: int, most_words: int, seed: int) -> list[tuple[str, set[int]]]:
    """Queries of one to ``most_words`` words of a page, with all pages that hold every word."""
    rng = random.Random(seed)
    sets = [set(words) for words in pages]
    queries = []
    for _ in range(count):
        words = pages[rng.randrange(len(pages))]
        n = rng.randint(1, most_words)
        if rng.random() < 0.5:
            start = rng.randrange(len(words) - n + 1)
            chosen = words[start : start + n]
        else:
            chosen = rng.sample(words, n)
        queries.append((" ".join(chosen), {i for i, have in enumerate(sets) if have.issuperset(chosen)}))
    return queries


def draw_words(pages: list[list[str]], count: int, seed: int) -> list[tuple[str, set[int]]]:
    """Single unseen words (letters only)."""
    rng = random.Random(seed)
    sets = [set(words) for words in pages]
    queries = []
    while len(queries) < count:
        word = rng.choice(rng.choice(pages))
        if word.isalpha():
            queries.append((word, {i for i, have in enumerate(sets) if word in have}))
    return queries


def main() -> None:
    """Write the set to a folder, to look at it or to use it elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pages", type=int, default=500)
    parser.add_argument("--variant", choices=VARIANTS, default="plain")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    words = []
    for number in range(args.pages):
        page = draw_page(number, args.variant)
        page.image.save(args.out / f"{number:04d}.png")
        words.append(page.words)
    with (args.out / "queries.jsonl").open("w", encoding="utf-8") as file:
        for kind, queries in (
            ("one to four words", draw_queries(words, 500, 4, SEED + 1)),
            ("single words", draw_words(words, 500, SEED + 2)),
        ):
            for text, relevant in queries:
                file.write(json.dumps({"kind": kind, "query": text, "pages": sorted(relevant)}) + "\n")


if __name__ == "__main__":
    main()
