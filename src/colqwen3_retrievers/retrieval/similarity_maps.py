"""Which region of a page answered a query: similarity maps, boxes and overlays.

A page's visual tokens form a grid over its picture, so the similarities of a query token to them are a small image.
Prompt and augmentation tokens of the query are left out, as are tokens of its text that are only punctuation, white
space or control characters. Letters, digits, vowel signs and symbols stay (%, &, #, @ and § too, which Unicode counts
as punctuation: they stand for words).

An engine gets the whole upright page, resized without crop or border to one cell per visual token. So cell (row, col)
is the part of the page from col / cols to (col + 1) / cols of its width, and likewise of its height, at any size.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, DimensionError
from colqwen3_retrievers.pages.images import to_rgb
from colqwen3_retrievers.vectors.multi_vector import Float32, MultiVector

FRAME_COLOUR = (200, 30, 30)
"""RGB of the frames drawn around regions."""

POOLED_NOTE = "pooled: the cells of a cluster share one value"
"""Note on overlays of pooled pages, and wherever else their maps are shown."""

_WORDS = frozenset("%‰‱٪؉؊&@#§")  # punctuation to Unicode, words to a reader
_INVISIBLE = ("Cc", "Cf", "Cs")  # not Co or Cn: private letters, and those newer than this Python's tables
_STRIP = 2**20  # pixels of an overlay coloured at a time
_SMALL = 0.05  # share of the cells: too few to be all the print of a page
_EVEN = 0.2  # share of the step between two classes: a smaller rise within the upper class is no peak


@dataclass(frozen=True, slots=True)
class Box:
    """A region of a page.

    Attributes:
        left, top, right, bottom: its edges, as shares of the page's width and height from the top left corner, or in
            pixels when a size was given.
        score: MaxSim of the query against the region alone, divided by the query's tokens, -1 to 1: the mean over
            them of the largest similarity inside.
    """

    left: float
    top: float
    right: float
    bottom: float
    score: float


@dataclass(frozen=True, slots=True, eq=False)
class SimilarityMap:
    """Similarities of a query to the visual tokens of a page.

    Attributes:
        values: float32 (rows, cols), -1 to 1: for each visual token its largest similarity to a query token.
        per_token: float32 (n_tokens, rows, cols), -1 to 1: the similarities of each query token by itself.
        tokens: the characters of each of these query tokens, ``<|image_pad|>`` for a visual one; None for a query of
            an image alone.
        pooled: whether the page was pooled, so that pooled visual tokens share one value.
    """

    values: Float32
    per_token: Float32
    tokens: tuple[str, ...] | None = None
    pooled: bool = False

    def boxes(self, size: tuple[int, int] | None = None, *, top: int = 3, threshold: float = 0.6) -> list[Box]:
        """Return the regions that stand out, best first.

        A region is a set of visual tokens that touch by an edge and are above a level. On a page of text, similarities
        have three steps: paper, print of any kind, and the answer. So the level is relative to the print, not to the
        page's median, which is paper on most pages and would merge all lines around the answer into one region. Otsu's
        threshold separates print from paper; where there is no print between paper and answer (the upper class is
        even, or a twentieth of the page), the level is relative to the rest of the page. Regions are ordered by the
        mean over the query's tokens of the largest similarity inside: where most tokens agree is the answer, not where
        a single token has its match. Compared with other rules in ``benchmarks/regions.md``.

        Args:
            size: (width, height) of the upright picture for boxes in pixels; None returns shares of 0 to 1.
            top: most regions, from 1.
            threshold: where a region ends, between the similarity of the page at large (0) and the map's maximum (1).

        Returns:
            At most ``top`` boxes; a flat map has none.

        Raises:
            ConfigError: ``top`` below 1, ``threshold`` outside 0..1, or a size without pixels.

        Source: Otsu 1979, "A threshold selection method from gray-level histograms".

        >>> values = np.float32([[0, 0, 0], [0, 0, 1]])
        >>> boxes = SimilarityMap(values, values[None]).boxes()
        >>> [(round(box.left, 2), box.top, box.right, box.bottom, box.score) for box in boxes]
        [(0.67, 0.5, 1.0, 1.0, 1.0)]
        """
        whole_number(top, "top", least=1)
        if not _is_share(threshold):
            raise ConfigError(f"threshold: expected 0 to 1, got {threshold!r}")
        if size is not None and not _is_size(size):
            raise ConfigError(f"size: expected (width, height) in pixels from 1, got {size!r}")
        level, peak = _level(self.values), float(self.values.max())
        if peak - level < 1e-6:
            return []
        rows, cols = self.values.shape
        width, height = size or (1, 1)
        boxes = []
        for region in _regions(self.values >= level + threshold * (peak - level)):
            y, x = np.nonzero(region)
            boxes.append(
                Box(
                    left=float(x.min() / cols * width),
                    top=float(y.min() / rows * height),
                    right=float((x.max() + 1) / cols * width),
                    bottom=float((y.max() + 1) / rows * height),
                    score=float(self.per_token[:, y, x].max(axis=1).mean()),
                )
            )
        return sorted(boxes, key=lambda box: (-box.score, box.top, box.left))[:top]

    def of_token(self, token: int) -> SimilarityMap:
        """Return the map of one query token by itself.

        Args:
            token: its position in ``per_token``.

        Raises:
            ConfigError: there is no such token.

        >>> values = np.float32([[0, 1]])
        >>> SimilarityMap(values, values[None], ("a",)).of_token(0).tokens
        ('a',)
        """
        token = whole_number(token, "token", most=len(self.per_token) - 1)
        names = None if self.tokens is None else self.tokens[token : token + 1]
        return SimilarityMap(self.per_token[token], self.per_token[token : token + 1], names, self.pooled)

    def overlay(
        self, image: Image.Image, *, token: int | None = None, opacity: float = 0.55, boxes: int = 0
    ) -> Image.Image:
        """Draw the map over the page.

        Args:
            image: the page, of any size: the grid covers all of it. Its EXIF orientation is applied.
            token: a single query token's map; None for the map of all.
            opacity: of the colours at the map's maximum, 0 to 1; they fade to nothing at the similarity of the page at
                large, the level 0 of :meth:`boxes`.
            boxes: how many of the best regions to draw a frame around.

        Returns:
            A new RGB image of the upright page's size. On a pooled page a note is in its lower left corner.

        Raises:
            ConfigError: no such token, an opacity outside 0..1, a negative number of boxes, or no PIL image.

        >>> page, values = Image.new("RGB", (64, 32), "white"), np.float32([[0, 1]])
        >>> SimilarityMap(values, values[None]).overlay(page).size
        (64, 32)
        """
        if not _is_share(opacity):
            raise ConfigError(f"opacity: expected 0 to 1, got {opacity!r}")
        whole_number(boxes, "boxes")
        if not isinstance(image, Image.Image) or min(image.size) < 1:
            got = f"one of {image.size}" if isinstance(image, Image.Image) else type(image).__name__
            raise ConfigError(f"image: expected a PIL image with pixels, got {got}")
        if token is not None:
            return self.of_token(token).overlay(image, opacity=opacity, boxes=boxes)
        overlay = to_rgb(image)  # a copy
        level, peak = _level(self.values), float(self.values.max())
        _colour(overlay, np.clip((self.values - level) / max(peak - level, 1e-6), 0, 1), opacity)
        draw = ImageDraw.Draw(overlay)
        line = max(2, round(min(overlay.size) / 250))
        for box in self.boxes(overlay.size, top=boxes) if boxes else []:
            left, upper = round(box.left), round(box.top)
            right, lower = max(left, round(box.right) - 1), max(upper, round(box.bottom) - 1)
            draw.rectangle((left, upper, right, lower), outline=FRAME_COLOUR, width=line)
        if self.pooled:
            font = ImageFont.load_default(size=max(10, round(min(overlay.size) / 50)))
            area = draw.textbbox((4, overlay.height - 4), POOLED_NOTE, font=font, anchor="lb")
            draw.rectangle((area[0] - 2, area[1] - 2, area[2] + 2, area[3] + 2), fill="white")
            draw.text((4, overlay.height - 4), POOLED_NOTE, font=font, anchor="lb", fill="black")
        return overlay


def similarity_map(query: MultiVector, page: MultiVector) -> SimilarityMap:
    """Return the similarities of a query's tokens to each visual token of a page.

    Args:
        query: from ``encode_queries``.
        page: of an image, from ``encode_pages``, ``encode_images`` or an index; pooled or not.

    Returns:
        The map over the page's grid of visual tokens.

    Raises:
        ConfigError: the page has no grid of visual tokens (a text or a video), or an argument is not a MultiVector.
        DimensionError: the two differ in dim.

    Source: the interpretability maps of ColPali, Faysse et al. 2024 (arXiv 2407.01449), section 5.3.

    >>> unit = np.eye(4, dtype=np.float32)
    >>> page = MultiVector(unit, visual=slice(0, 4), grid=(2, 2))
    >>> similarity_map(MultiVector(unit[3:]), page).values.tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    for name, value in (("query", query), ("page", page)):
        if not isinstance(value, MultiVector):
            raise ConfigError(f"similarity_map: {name}: expected a MultiVector, got {type(value).__name__}")
    if page.grid is None or page.visual is None:
        raise ConfigError("similarity_map: the page has no grid of visual tokens; it is a text or a video")
    if query.dim != page.dim:
        raise DimensionError("query against page", expected=page.dim, actual=query.dim)
    tokens = _meaningful_tokens(query)
    query_rows = query.vectors[tokens] if query.clusters is None else query.vectors[query.clusters[tokens]]
    page_rows = page.vectors[page.visual] if page.clusters is None else page.vectors[page.clusters[page.visual]]
    per_token = (query_rows @ page_rows.T).reshape(len(tokens), *page.grid)
    names = None if query.tokens is None else tuple(query.tokens[token] for token in tokens)
    return SimilarityMap(per_token.max(axis=0), per_token, names, pooled=page.clusters is not None)


def heat_colours() -> Float32:
    """Return the 256 colours of an overlay, from dark blue through red to yellow.

    Lightness rises evenly in Oklab (Ottosson 2020), so that equal steps of similarity look equal, in grey too.

    Returns:
        float32 (256, 3), RGB, 0 to 255.

    >>> heat_colours().shape
    (256, 3)
    """
    t = np.linspace(0, 1, 256)[:, None]
    light = 0.30 + 0.62 * t
    hue = np.radians(-95 + 200 * t)
    chroma = 0.17 * (1 - 0.35 * np.abs(2 * t - 1))
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    lms = (light + np.hstack([
        0.3963377774 * a + 0.2158037573 * b, -0.1055613458 * a - 0.0638541728 * b, -0.0894841775 * a - 1.2914855480 * b,
    ])) ** 3  # fmt: skip
    linear = lms @ np.asarray([
        [4.0767416621, -1.2684380046, -0.0041960863],
        [-3.3077115913, 2.6097574011, -0.7034186147],
        [0.2309699292, -0.3413193965, 1.7076147010],
    ])  # fmt: skip
    linear = np.clip(linear, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray(255 * encoded, dtype=np.float32)


def _colour(page: Image.Image, heat: Float32, opacity: float) -> None:
    """Draw heat, (rows, cols) of 0 to 1, over an RGB page, in strips that bound the memory."""
    small = Image.fromarray(heat.astype(np.float32) * 255 + 0.5)  # half a step more, as Pillow truncates fractions
    palette = np.rint(heat_colours()).astype(np.uint8).tobytes()
    shares = [round(255 * opacity * (step / 255) ** 1.5) for step in range(256)]
    (rows, cols), (width, height) = heat.shape, page.size
    strip = max(1, _STRIP // width)
    for top in range(0, height, strip):
        bottom = min(top + strip, height)
        part = (0.0, top * rows / height, float(cols), bottom * rows / height)
        smooth = small.resize((width, bottom - top), Image.Resampling.BILINEAR, box=part).convert("L")
        share = smooth.point(shares)
        smooth.putpalette(palette)
        page.paste(smooth.convert("RGB"), (0, top), share)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(0 <= value <= 1)


def _is_size(size: object) -> bool:
    return (
        isinstance(size, Sequence)
        and len(size) == 2
        and all(isinstance(side, int | float | np.number) and 1 <= side < np.inf for side in size)
    )


def _meaningful_tokens(query: MultiVector) -> list[int]:
    """Return the positions of a query's own tokens, without those that are silent if others remain."""
    tokens: list[int] = query.user_tokens.tolist() or list(range(len(query)))
    if query.tokens is None:
        return tokens
    visual = set() if query.visual is None else set(range(len(query.tokens))[query.visual])
    return [i for i in tokens if i in visual or not all(map(_is_silent, query.tokens[i]))] or tokens


def _is_silent(character: str) -> bool:
    """Return whether a character means nothing by itself: punctuation, white space, and what is invisible."""
    kind = unicodedata.category(character)
    silent = kind[0] in "PZ" or kind in _INVISIBLE
    return silent and unicodedata.normalize("NFKC", character) not in _WORDS  # a wide % is a %


def _level(values: Float32) -> float:
    """Return the similarity of the page at large: of its print if there is any beside the answer, else of the rest."""
    ordered = np.sort(values, axis=None).astype(np.float64)
    n = len(ordered)
    if n == 1 or ordered[0] == ordered[-1]:
        return float(ordered[0]) if n > 1 else -1.0  # a page of one visual token is all answer
    below = np.arange(1, n)
    sums = np.cumsum(ordered)
    between = below * (n - below) * (sums[:-1] / below - (sums[-1] - sums[:-1]) / (n - below)) ** 2
    cut = int(between.argmax()) + 1
    rest, upper = float(np.median(ordered[:cut])), float(np.median(ordered[cut:]))
    answer_alone = n - cut <= _SMALL * n or ordered[-1] - upper < _EVEN * (upper - rest)
    return rest if answer_alone else upper


def _regions(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Split a mask into regions whose cells touch by an edge."""
    left = mask.copy()
    regions = []
    while left.any():
        region = np.zeros_like(mask)
        waiting = [tuple(np.argwhere(left)[0])]
        while waiting:
            y, x = waiting.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and left[y, x]:
                left[y, x] = False
                region[y, x] = True
                waiting += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        regions.append(region)
    return regions
