"""Pages of words with the place of every letter known.

A page is drawn as the coverage of ink in [0, 255]; colours are put on later.  Text is drawn either at its size (hinted,
as office programs do) or larger and then reduced (as PDF renderers with fractional positions do).
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from .fonts import FontFile, advance, installed_fonts, load_font
from .words import WordSource, cased

CELL = 8
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-/$%:()+&#"
N_CHARS = len(CHARACTERS) + 2  # blank first, any other character last
CHAR_INDEX = {c: i + 1 for i, c in enumerate(CHARACTERS)}


@dataclass
class PrintedWord:
    """A word on a page: its bare text, the x of its letter boundaries, its baseline and its size in px."""

    text: str
    edges: list[float]
    baseline: float
    size: float


@dataclass
class Page:
    """Ink coverage of a page and what is printed on it."""

    ink: Image.Image
    words: list[PrintedWord] = field(default_factory=list)
    marks: list[tuple[str, float, float, float, float]] = field(default_factory=list)

    def cells(self) -> np.ndarray:
        """Class of the character shown in each 8 x 8 px cell; 0 is blank."""
        width, height = self.ink.size
        grid = np.zeros((height // CELL, width // CELL), dtype=np.int8)
        for char, x0, x1, baseline, size in self.marks:
            first = int(np.ceil((baseline - 0.72 * size) / CELL - 0.5))
            last = int(np.ceil((baseline + 0.06 * size) / CELL - 0.5))
            if last <= first:
                first = int((baseline - 0.35 * size) // CELL)
                last = first + 1
            left, right = int(np.ceil(x0 / CELL - 0.5)), int(np.ceil(x1 / CELL - 0.5))
            value = CHAR_INDEX.get(char.lower(), N_CHARS - 1)
            rows = slice(max(first, 0), max(last, 0))
            if right > left:
                grid[rows, max(left, 0) : max(right, 0)] = value
            else:
                left = int((x0 + x1) / 2 // CELL)
                part = grid[rows, max(left, 0) : left + 1]
                part[part == 0] = value
        return grid


class Pen:
    """Draws words on a canvas that is ``scale`` times larger than the page."""

    def __init__(self, width: int, height: int, scale: float) -> None:
        self.width, self.height, self.scale = width, height, scale
        self.canvas = Image.new("L", (round(width * scale), round(height * scale)), 0)
        self.draw = ImageDraw.Draw(self.canvas)
        self.page = Page(self.canvas)

    def length(self, font: FontFile, size: float, text: str) -> float:
        """Width of a text in page px."""
        return advance(font.path, size * self.scale, text) / self.scale

    def word(self, font: FontFile, size: float, x: float, baseline: float, word: str, before: str, after: str) -> None:
        """Print ``before + word + after``; only ``word`` can be asked for."""
        text, s = before + word + after, self.scale
        self.draw.text((x * s, baseline * s), text, fill=255, font=load_font(font.path, size * s), anchor="ls")
        widths = [self.length(font, size, c) for c in text]
        stretch = self.length(font, size, text) / max(sum(widths), 1e-6)
        edges = [x]
        for char, width in zip(text, widths, strict=True):
            edges.append(edges[-1] + width * stretch)
            self.page.marks.append((char, edges[-2], edges[-1], baseline, size))
        inner = edges[len(before) : len(before) + len(word) + 1]
        self.page.words.append(PrintedWord(word.lower(), inner, baseline, size))

    def line(self, x0: float, y0: float, x1: float, y1: float, ink: int = 160) -> None:
        """Draw a rule."""
        s = self.scale
        self.draw.line((x0 * s, y0 * s, x1 * s, y1 * s), fill=ink, width=max(1, round(s)))

    def finish(self, resample: Image.Resampling) -> Page:
        """Reduce the canvas to the size of the page."""
        if self.canvas.size != (self.width, self.height):
            self.page.ink = self.canvas.resize((self.width, self.height), resample)
        return self.page


@dataclass(frozen=True)
class Style:
    """Range of type sizes in px and the fonts to choose from."""

    fonts: tuple[FontFile, ...]
    smallest: float
    largest: float

    def size(self, rng: random.Random) -> float:
        """A size; small type is drawn more often than large."""
        size = self.smallest * (self.largest / self.smallest) ** rng.random()
        return round(size * 4) / 4


NextWord = Callable[[], str]


def _dressed(rng: random.Random) -> tuple[str, str]:
    """Punctuation around a word, mostly none."""
    kind = rng.random()
    if kind < 0.82:
        return "", ""
    return rng.choice((("", ","), ("", "."), ("(", ")"), ("", ":"), ('"', '"'), ("", ";"), ("-", ""), ("", "?")))


def fill_block(
    pen: Pen,
    rng: random.Random,
    next_word: NextWord,
    font: FontFile,
    size: float,
    box: tuple[float, float, float, float],
    limit: int = 10_000,
) -> float:
    """Set lines of words in a box (x0, y0, x1, y1) until it or the number of words is full; return the lower end."""
    x0, y0, x1, y1 = box
    leading = size * rng.uniform(1.12, 1.6)
    space = pen.length(font, size, " ") * rng.uniform(0.9, 1.4)
    align = rng.choice(("left", "left", "left", "centre", "right", "justify"))
    case = rng.choice((None, None, "lower", "lower", "title", "upper")) if rng.random() < 0.7 else "lower"
    baseline = y0 + 0.8 * size
    while baseline + 0.25 * size <= y1 and limit > 0:
        row: list[tuple[str, str, str, float]] = []
        used = 0.0
        while limit > 0:
            word = cased(next_word(), rng, case)
            before, after = _dressed(rng)
            width = pen.length(font, size, before + word + after)
            if used + width > x1 - x0:
                break
            row.append((before, word, after, width))
            used += width + space
            limit -= 1
            if rng.random() < 0.04:
                break
        if row:
            slack = (x1 - x0) - (used - space)
            x = x0 + {"left": 0.0, "justify": 0.0, "centre": slack / 2, "right": slack}[align]
            gap = space + (slack / (len(row) - 1) if align == "justify" and len(row) > 1 and slack < 6 * size else 0)
            for before, word, after, width in row:
                pen.word(font, size, x, baseline, word, before, after)
                x += width + gap
        baseline += leading
    return baseline - 0.8 * size


def _paragraphs(pen: Pen, rng: random.Random, word: NextWord, style: Style, margin: float) -> None:
    y, font = margin, rng.choice(style.fonts)
    while y < pen.height - style.smallest:
        if rng.random() < 0.4:
            font = rng.choice(style.fonts)
        size = style.size(rng)
        bottom = pen.height - margin if rng.random() < 0.5 else min(pen.height - margin, y + size * rng.uniform(1.3, 7))
        indent = rng.choice((0.0, 0.0, rng.uniform(0, 0.3) * pen.width))
        y = fill_block(pen, rng, word, font, size, (margin + indent, y, pen.width - margin, bottom))
        y += rng.uniform(0.0, 0.6) * size if y < bottom else style.smallest
    if rng.random() < 0.1:
        at = rng.uniform(0, pen.height)
        pen.line(0, at, pen.width, at, rng.randint(60, 255))


def _columns(pen: Pen, rng: random.Random, word: NextWord, style: Style, margin: float) -> None:
    n = 2 if pen.width < 500 else rng.randint(2, 3)
    width = (pen.width - margin) / n
    font, size = rng.choice(style.fonts), style.size(rng)
    for i in range(n):
        left = margin + i * width
        top = margin + rng.choice((0.0, rng.uniform(0, 20)))
        fill_block(pen, rng, word, font, size, (left, top, left + width - margin, pen.height - margin))


def _table(pen: Pen, rng: random.Random, word: NextWord, style: Style, margin: float) -> None:
    font, size = rng.choice(style.fonts), style.size(rng)
    row_height, cell_width = size * rng.uniform(1.3, 2.2), size * rng.uniform(4.5, 8)
    rules, y = rng.random() < 0.6, margin
    ink = rng.randint(50, 255)
    while y + row_height <= pen.height:
        x = margin
        while x + cell_width <= pen.width:
            text = cased(word(), rng)
            if rng.random() < 0.85 and pen.length(font, size, text) < cell_width - 4:
                slack = cell_width - 4 - pen.length(font, size, text)
                pen.word(font, size, x + rng.choice((2.0, slack)), y + row_height * 0.5 + size * 0.35, text, "", "")
            if rules:
                pen.line(x, y, x, y + row_height, ink)
            x += cell_width
        y += row_height
        if rules:
            pen.line(margin, y, pen.width - margin, y, ink)


def training_page(
    rng: random.Random, source: WordSource, style: Style, width: int, height: int, distort: float = 0.1
) -> Page:
    """Draw one page (or piece of a page) of the training layouts."""
    scale = rng.choice((1.0, 1.0, 1.5, 2.0, 2.0, 3.0))
    pen = Pen(width, height, scale)
    margin = rng.uniform(1, 12) if width < 400 or rng.random() < 0.6 else rng.uniform(0.03, 0.13) * width
    layout = rng.choices((_paragraphs, _columns, _table), (0.7, 0.12, 0.18))[0]
    layout(pen, rng, source.training_word, style, margin)
    page = pen.finish(rng.choice((Image.Resampling.BOX, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)))
    if rng.random() < distort:
        page.ink = distorted(page.ink, rng)
    return page


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Pass an image through JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert(image.mode)


def distorted(ink: Image.Image, rng: random.Random) -> Image.Image:
    """Turn the page a little or compress it."""
    if rng.random() < 0.5:
        return ink.rotate(rng.uniform(-2, 2), Image.Resampling.BICUBIC)
    return jpeg(ink, rng.randint(30, 80))


def style_of(split: str, smallest: float, largest: float) -> Style:
    """Style with all installed fonts of a split."""
    return Style(installed_fonts(split), smallest, largest)
