"""What an encoder is given, checked and wrapped; and what it gives back, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence, Sized
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from colqwen3_retrievers.encoding import shared_engine as sharing
from colqwen3_retrievers.encoding.futures import gather
from colqwen3_retrievers.encoding.submission import about
from colqwen3_retrievers.errors import ConfigError, require
from colqwen3_retrievers.pages.images import ImageSource
from colqwen3_retrievers.pages.page import Page, Query, Video
from colqwen3_retrievers.pages.remote_images import AllowRemote, local_image
from colqwen3_retrievers.vectors.multi_vector import MultiVector

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


def page_of(
    index: int,
    *,
    image: ImageSource | None = None,
    text: str = "",
    video: Video | None = None,
    allow_remote: AllowRemote = False,
) -> Page:
    """Wrap input ``index`` of a call as a page; an image at a web address is fetched where that is allowed.

    Raises:
        EncodeError: it is none; ``.index`` is ``index``.

    >>> page_of(0, text="hello").text
    'hello'
    """
    with about(index):
        return Page(id=f"input {index}", image=local_image(image, allow_remote), text=text, video=video)


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
            from colqwen3_retrievers.pages.video import load_video

            return load_video(video, fps=fps)
        if not isinstance(video, Sequence):
            raise ConfigError(f"a video is a file, a list of frames or a Video, not {type(video).__name__}")
        return Video(tuple(video), tuple(i / fps for i in range(len(video))))


def gathered(items: Iterable[T], submit: Callable[[T, int], Future[MultiVector]]) -> Future[list[MultiVector]]:
    """Submit all inputs at once, and give one future for all; an input that cannot be submitted cancels the others.

    >>> def submit(item, index):
    ...     future = Future()
    ...     future.set_result(item * 2)
    ...     return future
    >>> gathered([1, 2], submit).result()
    [2, 4]
    """
    parts: list[Future[MultiVector]] = []
    try:
        for index, item in enumerate(items):
            parts.append(submit(item, index))
    except BaseException:
        for part in parts:
            part.cancel()
        raise
    return gather(parts)


def collected(
    items: Iterable[T],
    submit: Callable[[T, int], Future[MultiVector]],
    unit: str,
    show_progress: bool,
    *,
    total: int | None,
) -> list[MultiVector]:
    """Keep a bounded number of inputs under way, and give the results in order.

    Args:
        items: read at most :data:`~colqwen3_retrievers.encoding.shared_engine.IN_FLIGHT_PAGES` ahead of what is done.
        submit: starts encoding one, given its position.
        unit: what a progress bar counts.
        show_progress: whether to draw one (on a terminal).
        total: how many there are, when that is known.

    >>> def submit(item, index):
    ...     future = Future()
    ...     future.set_result(item * 2)
    ...     return future
    >>> collected(iter([1, 2]), submit, "pages", False, total=None)
    [2, 4]
    """
    results: list[MultiVector] = []
    pending: deque[Future[MultiVector]] = deque()
    bar: Any = None
    if show_progress:
        bar = require("torch", "tqdm").tqdm(total=total, unit=f" {unit}", disable=None)

    def take() -> None:
        results.append(pending.popleft().result())
        if bar is not None:
            bar.update()

    try:
        for index, item in enumerate(items):
            pending.append(submit(item, index))
            if len(pending) > sharing.IN_FLIGHT_PAGES:
                take()
        while pending:
            take()
    finally:
        for future in pending:
            future.cancel()
        if bar is not None:
            bar.close()
    return results
