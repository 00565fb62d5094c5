"""Which region of a page answered: similarity maps, boxes and overlays.

A page's visual tokens lie in a grid over its picture, so the similarities of a query token to them are a small image.
Prompt and augmentation tokens of the query are left out, as are tokens that are only punctuation or white space.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from colqwen3_retrievers.datatypes import Float32, MultiVector
from colqwen3_retrievers.errors import ConfigError, DimensionError


@dataclass(frozen=True, slots=True)
class Box:
    """A region of a page.

    Attributes:
        left, top, right, bottom: its edges, as shares of the page's width and height from the top left corner, or in
            pixels when a size was given.
        score: the largest similarity inside, -1 to 1.
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
        per_token: float32 (n_tokens, rows, cols), -1 to 1: the same for each query token by itself.
        tokens: the characters of each of these query tokens, or None for an image query.
        pooled: whether the page was pooled, so that pooled visual tokens share one value.
    """

    values: Float32
    per_token: Float32
    tokens: tuple[str, ...] | None = None
    pooled: bool = False

    def boxes(self, size: tuple[int, int] | None = None, *, top: int = 3, threshold: float = 0.7) -> list[Box]:
        """Give the regions that stand out, best first.

        A region is a set of visual tokens that touch by an edge and lie above the threshold.

        Args:
            size: (width, height) of the picture to give pixels for; None gives shares of 0 to 1.
            top: most regions, from 1.
            threshold: where a region ends, between the map's median (0) and its maximum (1).

        Returns:
            At most ``top`` boxes; a flat map has none.

        Raises:
            ConfigError: ``top`` below 1 or ``threshold`` outside 0..1.

        >>> found = SimilarityMap(np.float32([[0, 0, 0], [0, 0, 1]]), np.zeros((1, 2, 3), np.float32)).boxes()
        >>> [(round(box.left, 2), box.top, box.right, box.bottom, box.score) for box in found]
        [(0.67, 0.5, 1.0, 1.0, 1.0)]
        """
        if top < 1 or not 0 <= threshold <= 1:
            raise ConfigError(f"boxes: expected top from 1 and threshold in 0..1, got {top} and {threshold}")
        middle, peak = float(np.median(self.values)), float(self.values.max())
        if peak - middle < 1e-6:
            return []
        rows, cols = self.values.shape
        wide, high = size or (1, 1)
        found = []
        for region in _regions(self.values >= middle + threshold * (peak - middle)):
            y, x = np.nonzero(region)
            found.append(
                Box(
                    left=float(x.min() / cols * wide),
                    top=float(y.min() / rows * high),
                    right=float((x.max() + 1) / cols * wide),
                    bottom=float((y.max() + 1) / rows * high),
                    score=float(self.values[region].max()),
                )
            )
        return sorted(found, key=lambda box: (-box.score, box.top, box.left))[:top]

    def overlay(
        self, image: Image.Image, *, token: int | None = None, opacity: float = 0.55, boxes: int = 0
    ) -> Image.Image:
        """Lay the map over the page.

        Args:
            image: the page, of any size: the grid covers all of it.
            token: a single query token's map; None for the map of all.
            opacity: of the colours at the map's maximum, 0 to 1; they fade to nothing at its median.
            boxes: how many of the best regions to draw a frame around.

        Returns:
            A new RGB image of the page's size.

        Raises:
            ConfigError: no such token, or an opacity outside 0..1.

        >>> page = Image.new("RGB", (64, 32), "white")
        >>> SimilarityMap(np.float32([[0, 1]]), np.zeros((1, 1, 2), np.float32)).overlay(page).size
        (64, 32)
        """
        if not 0 <= opacity <= 1:
            raise ConfigError(f"opacity: expected 0 to 1, got {opacity}")
        if token is not None and not 0 <= token < len(self.per_token):
            raise ConfigError(f"token: expected 0 to {len(self.per_token) - 1}, got {token}")
        values = self.values if token is None else self.per_token[token]
        middle, peak = float(np.median(values)), float(values.max())
        heat = np.clip((values - middle) / max(peak - middle, 1e-6), 0, 1).astype(np.float32)
        smooth = np.asarray(Image.fromarray(heat, "F").resize(image.size, Image.Resampling.BILINEAR))
        page = np.asarray(image.convert("RGB"), dtype=np.float32)
        share = (opacity * np.clip(smooth, 0, 1) ** 1.5)[..., None]
        colours = heat_colours()[np.clip(smooth * 255, 0, 255).astype(np.uint8)]
        mixed = Image.fromarray(np.rint(page * (1 - share) + colours * share).astype(np.uint8))
        if boxes:
            draw = ImageDraw.Draw(mixed)
            line = max(2, round(min(image.size) / 250))
            shown = SimilarityMap(values, values[None])
            for box in shown.boxes(image.size, top=boxes):
                draw.rectangle((box.left, box.top, box.right - 1, box.bottom - 1), outline=(200, 30, 30), width=line)
        return mixed


def similarity_map(query: MultiVector, page: MultiVector) -> SimilarityMap:
    """Compare a query's tokens with each visual token of a page.

    Args:
        query: from ``encode_queries``.
        page: of an image, from ``encode_pages``, ``encode_images`` or an index; pooled or not.

    Returns:
        The map over the page's grid of visual tokens.

    Raises:
        ConfigError: the page has no grid of visual tokens (a text or a video).
        DimensionError: the two differ in dim.

    Source: the interpretability maps of ColPali, Faysse et al. 2024 (arXiv 2407.01449), section 5.3.

    >>> unit = np.eye(4, dtype=np.float32)
    >>> page = MultiVector(unit, visual=slice(0, 4), grid=(2, 2))
    >>> similarity_map(MultiVector(unit[3:]), page).values.tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    if page.grid is None or page.visual is None:
        raise ConfigError("similarity_map: the page has no grid of visual tokens; it is a text or a video")
    if query.dim != page.dim:
        raise DimensionError("query against page", expected=page.dim, actual=query.dim)
    matter = _tokens_that_matter(query)
    rows = page.vectors[page.visual] if page.clusters is None else page.vectors[page.clusters[page.visual]]
    per_token = (query.vectors[matter] @ rows.T).reshape(len(matter), *page.grid)
    tokens = None if query.tokens is None else tuple(query.tokens[i] for i in matter)
    return SimilarityMap(per_token.max(axis=0), per_token, tokens, pooled=page.clusters is not None)


def heat_colours() -> Float32:
    """Give the 256 colours of an overlay, from dark blue through red to yellow.

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


def _tokens_that_matter(query: MultiVector) -> list[int]:
    content = list(range(len(query))[query.content]) or list(range(len(query)))
    if query.tokens is None:
        return content
    return [i for i in content if any(char.isalnum() for char in query.tokens[i])] or content


def _regions(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Split a mask into parts that touch by an edge."""
    left = mask.copy()
    found = []
    while left.any():
        region = np.zeros_like(mask)
        waiting = [tuple(np.argwhere(left)[0])]
        while waiting:
            y, x = waiting.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and left[y, x]:
                left[y, x] = False
                region[y, x] = True
                waiting += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        found.append(region)
    return found
