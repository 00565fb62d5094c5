"""What an encoder is given, checked and wrapped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import TypeVar

from colqwen3_retrievers.documents import Page, Query, Video
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.images import ImageSource
from colqwen3_retrievers.submission import about

T = TypeVar("T")


def check_items(values: Iterable[T], name: str) -> Iterable[T]:
    """Refuse a single input where a list is expected.

    Raises:
        ConfigError: it names the argument.

    >>> check_items("revenue", "queries")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: queries: expected a list, got str; wrap a single one: [...]
    """
    if isinstance(values, str | bytes | Page | Query | Path) or not isinstance(values, Iterable):
        raise ConfigError(f"{name}: expected a list, got {type(values).__name__}; wrap a single one: [...]")
    return values


def known_size(values: object) -> int | None:
    """Give the length of what has one, for a progress bar.

    >>> known_size([1, 2]), known_size(iter([1]))
    (2, None)
    """
    return len(values) if isinstance(values, Sized) else None


def page_of(index: int, *, image: ImageSource | None = None, text: str = "", video: Video | None = None) -> Page:
    """Wrap input ``index`` of a call as a page.

    Raises:
        EncodeError: it is none; ``.index`` is ``index``.

    >>> page_of(0, text="hello").text
    'hello'
    """
    with about(index):
        return Page(id=f"input {index}", image=image, text=text, video=video)


def video_of(video: Video | str | Path | Sequence[ImageSource], fps: float, index: int) -> Video:
    """Sample a video file, or wrap frames that are sampled already.

    Raises:
        EncodeError: it cannot be read; ``.index`` is ``index``.

    >>> video_of(["a.png", "b.png"], 2.0, 0).timestamps
    (0.0, 0.5)
    """
    with about(index):
        if isinstance(video, Video):
            return video
        if isinstance(video, str | Path):
            from colqwen3_retrievers.video import load_video

            return load_video(video, fps=fps)
        if not isinstance(video, Sequence):
            raise ConfigError(f"a video is a file, a list of frames or a Video, not {type(video).__name__}")
        return Video(tuple(video), tuple(i / fps for i in range(len(video))))
