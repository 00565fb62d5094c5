"""Rendering pages and queries into the exact prompt tokens and pixels of the checkpoint's family.

All engines take the result, so none tokenises, resizes or truncates anything itself. Images are resized once, with
Pillow's bicubic filter, to multiples of 32 within the family's bounds; a stock Qwen3-VL processor with the same bounds
does not change the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from colqwen3_retrievers.errors import ConfigError, EncodeError, InputTooLongError, PageError
from colqwen3_retrievers.models.families import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, VISUAL_TOKEN_SIDE, Family
from colqwen3_retrievers.models.tokenizer import PromptTokenizer
from colqwen3_retrievers.pages.images import MAX_ASPECT_RATIO, ImageSource, open_image
from colqwen3_retrievers.pages.page import Page, Query, Video

if TYPE_CHECKING:
    from tokenizers import Encoding

VIDEO_MIN_PIXELS = 131_072
VIDEO_MAX_PIXELS = 786_432
"""Bounds on frames x height x width of a resized video, as in transformers' Qwen3VLVideoProcessor."""

_SIDE = VISUAL_TOKEN_SIDE
_FRAMES_A_PATCH = 2


@dataclass(frozen=True, slots=True)
class VisualSpan:
    """Adjacent visual tokens of a prompt: an image, or one time step of a video.

    Attributes:
        start: index of the first one.
        rows: rows of visual tokens.
        cols: columns of visual tokens.
    """

    start: int
    rows: int
    cols: int


@dataclass(frozen=True, slots=True, eq=False)
class EncoderInput:
    """One query or document, ready for any engine.

    Attributes:
        is_query: whether it is a query.
        prompt: the prompt with one placeholder for each image or video time step, as a server takes it.
        token_ids: int64 (n_tokens,), visual placeholders repeated for each visual token.
        content: tokens that are neither prompt nor augmentation: the text's, or without one the visual tokens, from
            the first to the last.
        spans: the visual tokens.
        pixels: uint8 (frames, height, width, 3), sides multiples of 32; one frame for an image; None for text.
        timestamps: seconds of each frame of a video; empty for an image.
        tokens: the characters each token stands for; None for pages with visual tokens and for queries of an image
            alone.
    """

    is_query: bool
    prompt: str
    token_ids: NDArray[np.int64]
    content: slice
    spans: tuple[VisualSpan, ...] = ()
    pixels: NDArray[np.uint8] | None = None
    timestamps: tuple[float, ...] = ()
    tokens: tuple[str, ...] | None = field(default=None)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_video(self) -> bool:
        """Whether the pixels are a video's."""
        return bool(self.timestamps)

    @property
    def visual(self) -> slice | None:
        """Visual tokens of an image; None for text, and for a video, whose time marks are between them."""
        if self.is_video or not self.spans:
            return None
        span = self.spans[0]
        return slice(span.start, span.start + span.rows * span.cols)

    @property
    def grid(self) -> tuple[int, int] | None:
        """(rows, cols) of an image's visual tokens."""
        return (self.spans[0].rows, self.spans[0].cols) if self.visual is not None else None


def fit_size(width: int, height: int, *, min_pixels: int, max_pixels: int, frames: int = 1) -> tuple[int, int]:
    """Return the size an image is resized to: multiples of 32, aspect ratio kept, area within bounds.

    The arithmetic is exactly Qwen2-VL's "smart resize", because another rounding gives other visual tokens. Only where
    it would exceed ``max_pixels`` with an image (a very long strip, or bounds closer than one visual token), the longer
    side is reduced. A video of an odd number of frames may exceed the bound by one frame.

    Args:
        width: in pixels.
        height: in pixels.
        min_pixels: fewest pixels after resizing (frames x height x width).
        max_pixels: most.
        frames: frames of a video; 1 for an image.

    Returns:
        (width, height), each a multiple of 32 and at least 32.

    Raises:
        ConfigError: one side is more than 200 times the other.

    Source: Wang et al. 2024, Qwen2-VL, section 2.1 (arXiv 2409.12191).

    >>> fit_size(1240, 1754, min_pixels=65536, max_pixels=1310720)
    (960, 1344)
    """
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ConfigError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other")
    steps = frames if frames == 1 else round(frames / _FRAMES_A_PATCH) * _FRAMES_A_PATCH
    if frames > 1 and min(width, height) < _SIDE:
        scale = max(_SIDE / height, _SIDE / width)
        width, height = int(width * scale), int(height * scale)
    wide, high = round(width / _SIDE) * _SIDE, round(height / _SIDE) * _SIDE
    if steps * wide * high > max_pixels:
        shrink = math.sqrt(frames * width * height / max_pixels)
        wide = max(_SIDE, math.floor(width / shrink / _SIDE) * _SIDE)
        high = max(_SIDE, math.floor(height / shrink / _SIDE) * _SIDE)
    elif steps * wide * high < min_pixels:
        grow = math.sqrt(min_pixels / (frames * width * height))
        wide = math.ceil(width * grow / _SIDE) * _SIDE
        high = math.ceil(height * grow / _SIDE) * _SIDE
    budget = max(1, max_pixels // _SIDE**2)
    if frames == 1 and (wide // _SIDE) * (high // _SIDE) > budget:
        if wide >= high:
            wide = max(1, budget // (high // _SIDE)) * _SIDE
        else:
            high = max(1, budget // (wide // _SIDE)) * _SIDE
    return wide, high


class Renderer:
    """Renders pages and queries for one checkpoint.

    Args:
        family: the checkpoint's family.
        tokenizer: the checkpoint's tokenizer.
        min_pixels: fewest pixels of a resized image.
        max_pixels: most pixels of a resized image.
        context_length: most tokens a whole prompt may have.
        include_text: whether a page's text joins its image's prompt.
        truncate: whether a text beyond the limit is cut instead of refused.
    """

    def __init__(
        self,
        family: Family,
        tokenizer: PromptTokenizer,
        *,
        min_pixels: int,
        max_pixels: int,
        context_length: int,
        include_text: bool = False,
        truncate: bool = False,
    ) -> None:
        self._family = family
        self._tokenizer = tokenizer
        self._min_pixels = min(min_pixels, max_pixels)
        self._max_pixels = max_pixels
        self._context = context_length
        self._include_text = include_text
        self._truncate = truncate
        self._image_pad = tokenizer.id_of("<|image_pad|>")
        self._space = tokenizer.find("Ġ")  # the byte-level alphabet's letter for a space
        self._video_pad = tokenizer.id_of("<|video_pad|>") if family.video else None

    def query(self, query: Query) -> EncoderInput:
        """Render a query: text, image, or image with text.

        Raises:
            InputTooLongError: beyond the family's query limit, unless truncating.
            EncodeError: an image that cannot be read or resized.
        """
        limit = min(self._family.max_query_tokens or self._context, self._context)
        if query.image is not None:
            return self._image(query.image, query.text or "", limit=self._context, is_query=True)
        return self._text(self._family.query, query.text or "", limit=limit, is_query=True)

    def document(self, page: Page) -> EncoderInput:
        """Render a page: its video, else its image (with its text when ``include_text``), else its text.

        Raises:
            InputTooLongError: a text beyond the context length, unless truncating.
            EncodeError: nothing to encode, an image that cannot be read, or a video without a prompt of the family.
        """
        if page.video is not None:
            return self._video(page.video)
        if page.image_source is not None:
            text = page.text if self._include_text else ""
            return self._image(page.image_source, text, limit=self._context, is_query=False)
        if not page.text.strip():
            raise EncodeError(f"page {page.id!r} has neither image nor text")
        return self._text(self._family.text, page.text, limit=self._context, is_query=False)

    def _text(self, template: str, text: str, *, limit: int, is_query: bool) -> EncoderInput:
        before, after = template.split("{text}")
        text = self._tokenizer.neutralise(text.strip() if self._family.strip else text)
        prompt, tokens, content = self._fit(before, text, after, limit)
        return EncoderInput(
            is_query=is_query,
            prompt=prompt,
            token_ids=np.asarray(tokens.ids, dtype=np.int64),
            content=content,
            tokens=self._spelled(prompt, tokens),
        )

    def _spelled(self, prompt: str, tokens: Encoding) -> tuple[str, ...]:
        """Return each token's characters; the span of a space that the tokenizer added is the next character."""
        return tuple(
            " " if number == self._space else prompt[start:stop]
            for number, (start, stop) in zip(tokens.ids, tokens.offsets, strict=True)
        )

    def _image(self, source: ImageSource, text: str, *, limit: int, is_query: bool) -> EncoderInput:
        pixels = self._resized([source])
        rows, cols = pixels.shape[1] // _SIDE, pixels.shape[2] // _SIDE
        return self._visual(
            self._family.image, IMAGE_PLACEHOLDER, self._image_pad, text, pixels, (), [(rows, cols)], limit, is_query
        )

    def _video(self, video: Video) -> EncoderInput:
        if self._family.video is None or self._video_pad is None:
            raise EncodeError(f"family {self._family.name} has no prompt for videos")
        times = list(video.timestamps or (float(i) for i in range(len(video.frames))))
        pixels = self._resized(video.frames)
        if len(times) % _FRAMES_A_PATCH:  # a patch spans two frames: the last one counts twice
            times.append(times[-1])
            pixels = np.concatenate([pixels, pixels[-1:]])
        rows, cols = pixels.shape[1] // _SIDE, pixels.shape[2] // _SIDE
        steps = [(times[i] + times[i + 1]) / 2 for i in range(0, len(times), _FRAMES_A_PATCH)]
        placeholder = "".join(f"<{time:.1f} seconds>{VIDEO_PLACEHOLDER}" for time in steps)
        grids = [(rows, cols)] * len(steps)
        template = self._family.video
        return self._visual(
            template, placeholder, self._video_pad, "", pixels, tuple(times), grids, self._context, is_query=False
        )

    def _visual(
        self,
        template: str,
        placeholder: str,
        pad: int,
        text: str,
        pixels: NDArray[np.uint8],
        timestamps: tuple[float, ...],
        grids: Sequence[tuple[int, int]],
        limit: int,
        is_query: bool,
    ) -> EncoderInput:
        before, after = template.replace("{visual}", placeholder).split("{text}")
        text = self._tokenizer.neutralise(text.strip())
        beside = self._family.beside if text else ""
        extra = sum(rows * cols - 1 for rows, cols in grids)
        prompt, tokens, content = self._fit(before, beside + text, after, limit - extra, extra=extra)
        ids: list[int] = []
        strings: list[str] = []
        spans: list[VisualSpan] = []
        shapes = iter(grids)
        for token, string in zip(tokens.ids, self._spelled(prompt, tokens), strict=True):
            count = 1
            if token == pad:
                rows, cols = next(shapes)
                spans.append(VisualSpan(len(ids), rows, cols))
                count = rows * cols
            ids.extend([token] * count)
            strings.extend([string] * count)
        if text:  # the instruction is between the image and the text: no slice holds both without it
            own = slice(content.start + extra, content.stop + extra)
        else:
            own = slice(spans[0].start, spans[-1].start + spans[-1].rows * spans[-1].cols)
        return EncoderInput(
            is_query=is_query,
            prompt=prompt,
            token_ids=np.asarray(ids, dtype=np.int64),
            content=own,
            spans=tuple(spans),
            pixels=pixels,
            timestamps=timestamps,
            tokens=tuple(strings) if text and is_query else None,  # those of pages would only fill the index
        )

    def _fit(self, before: str, text: str, after: str, limit: int, *, extra: int = 0) -> tuple[str, Encoding, slice]:
        """Return a prompt within a limit, its tokens, and the slice of the user's tokens."""
        while True:
            prompt = before + text + after
            tokens = self._tokenizer.encode(prompt)
            first, last = len(before), len(before) + len(text)
            inside = [i for i, (start, stop) in enumerate(tokens.offsets) if start < last and stop > first]
            content = slice(inside[0], inside[-1] + 1) if inside else slice(0, 0)
            over = len(tokens.ids) - limit
            if over <= 0:
                return prompt, tokens, content
            if not self._truncate or len(inside) <= over:
                raise InputTooLongError(
                    f"the prompt has {len(tokens.ids) + extra:,} tokens, the limit is {limit + extra:,}",
                    limit=limit + extra,
                    actual=len(tokens.ids) + extra,
                )
            length = tokens.offsets[inside[-1] + 1 - over][0] - first
            text = text[: min(max(length, 0), len(text) - 1)]

    def _resized(self, sources: Sequence[ImageSource]) -> NDArray[np.uint8]:
        """Open and resize an image, or all frames of a video to the size of the first."""
        try:
            images = [open_image(source) for source in sources]
            width, height = images[0].size
            if any(image.size != (width, height) for image in images):
                raise ConfigError("video: expected frames of one size")
            if len(images) == 1:
                size = fit_size(width, height, min_pixels=self._min_pixels, max_pixels=self._max_pixels)
            else:
                most = min(VIDEO_MAX_PIXELS, self._max_pixels)
                least = min(VIDEO_MIN_PIXELS, most)
                size = fit_size(width, height, min_pixels=least, max_pixels=most, frames=len(images))
        except (PageError, ConfigError) as exc:
            raise EncodeError(str(exc)) from exc
        return np.stack(
            [np.asarray(im.resize(size, Image.Resampling.BICUBIC) if im.size != size else im) for im in images]
        )
