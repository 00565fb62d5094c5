"""Loading sampled frames of video files, within bounds.

The whole file is decoded once, front to back, in constant memory. The first frame of each time step is kept; when there
are too many, the step is doubled: frames stay evenly spaced whatever the header says.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from PIL import Image

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ColQwen3Error, ConfigError, PageError, require
from colqwen3_retrievers.pages.files import check_not_empty, reason_of
from colqwen3_retrievers.pages.images import MAX_FILE_PIXELS, check_shape, size_within
from colqwen3_retrievers.pages.page import Video

# Containers that hold pictures themselves. FFmpeg's playlists (hls, concat, dash, sdp, ...) would open further files
# and addresses that the file names.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ogg,asf,gif"


def load_video(
    path: str | os.PathLike[str], *, fps: float = 1.0, max_frames: int = 64, max_pixels: int = 1_310_720
) -> Video:
    """Sample a video's frames evenly.

    Args:
        path: a video file (mp4 mov mkv webm avi flv mpg ts ogv wmv gif); playlists and addresses are refused.
        fps: frames a second wanted, above 0; never more than the video has.
        max_frames: most frames kept, at least 1. A video too long for that is sampled more sparsely, over its whole
            length.
        max_pixels: most pixels (width x height) of a frame; larger ones are made smaller.

    Returns:
        Upright RGB frames of square pixels, all of one size, with the time of each in seconds from the first frame.

    Raises:
        PageError: the file is missing, broken, without pictures, or no video.
        ConfigError: a wrong argument.
        MissingExtraError: PyAV is not installed (extra ``video``).

    >>> load_video("missing.mp4")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.PageError: missing.mp4: cannot be read: No such file or directory
    """
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not math.isfinite(fps) or fps <= 0:
        raise ConfigError(f"fps: expected frames a second above 0, got {fps!r}")
    max_frames = whole_number(max_frames, "max_frames", least=1)
    max_pixels = whole_number(max_pixels, "max_pixels", least=1)
    if not isinstance(path, str | os.PathLike) or "://" in str(path):
        raise ConfigError(f"video: expected the path of a file, got {path!r}")
    source = str(path)
    check_not_empty(path, source)
    av = require("video", "av")
    try:
        frames, times = _sample(av, Path(path), source, 1.0 / fps, max_frames, max_pixels)
    except ColQwen3Error:
        raise
    except Exception as exc:  # decoders raise anything, so no list of types would be complete
        raise PageError(f"not a video that can be read: {reason_of(exc)}", source=source) from exc
    if not frames:
        raise PageError("the video has no frames", source=source)
    return Video(tuple(frames), tuple(times))


def _sample(
    av: Any, path: Path, source: str, step: float, max_frames: int, max_pixels: int
) -> tuple[list[Image.Image], list[float]]:
    frames: list[Image.Image] = []
    times: list[float] = []
    size: tuple[int, int] | None = None
    # An open file rather than its name: FFmpeg would read "concat:a|b" as a protocol.
    with (
        path.open("rb") as stream,
        av.open(stream, options={"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}) as container,
    ):
        if not container.streams.video:
            raise PageError("the file has no pictures", source=source)
        video = container.streams.video[0]
        context = video.codec_context
        if context is None:
            raise PageError("its codec is unknown to FFmpeg", source=source)
        if context.width * context.height > MAX_FILE_PIXELS:
            raise PageError(f"{context.width} x {context.height} pixels a frame, more than the bound", source=source)
        video.thread_type = "AUTO"
        rate = float(video.average_rate or video.guessed_rate or 25)
        first: float | None = None
        for index, frame in enumerate(container.decode(video)):
            now = float(frame.time) if frame.time is not None else index / rate
            first = now if first is None else first
            elapsed = max(0.0, now - first)
            if times and _slot(elapsed, step) <= _slot(times[-1], step):
                continue
            size = size or _size(frame, video.sample_aspect_ratio, max_pixels, source)
            frames.append(_upright(frame, size))
            times.append(elapsed)
            while len(frames) > max_frames:
                step *= 2
                slots = [_slot(time, step) for time in times]
                firsts = [i for i, slot in enumerate(slots) if i == 0 or slot > slots[i - 1]]
                frames, times = [frames[i] for i in firsts], [times[i] for i in firsts]
    return frames, times


def _slot(time: float, step: float) -> int:
    return math.floor(time / step + 1e-6)  # a frame at 0.9999999 s belongs to second 1


def _size(frame: Any, aspect: Any, max_pixels: int, source: str) -> tuple[int, int]:
    """Return the stored size (before rotation) in square pixels within the bound."""
    width = frame.width * (float(aspect) if aspect and 0.1 <= float(aspect) <= 10 else 1.0)
    check_shape(width, frame.height, source)
    return size_within(width, float(frame.height), max_pixels)


def _upright(frame: Any, size: tuple[int, int]) -> Image.Image:
    image: Image.Image = frame.to_image(width=size[0], height=size[1]).convert("RGB")
    turn = int(getattr(frame, "rotation", 0) or 0)
    return image.rotate(turn, expand=True) if turn % 360 else image
