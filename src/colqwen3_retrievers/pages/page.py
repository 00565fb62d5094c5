"""Pages, queries, videos and hits: plain data, checked once when it is created.

A page may have an image, a text, or both; an image in a file is opened when it is accessed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal
from enum import Enum
from pathlib import Path, PurePath
from typing import Any
from uuid import UUID

import numpy as np
from PIL import Image

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.pages.images import ImageSource, PlainImage, open_image, plain_image, strips


@dataclass(frozen=True, slots=True)
class Video:
    """Sampled frames of a video document.

    Attributes:
        frames: the sampled frames in order, at least one, of one size.
        timestamps: seconds from the start of each frame; None means one frame a second.

    Raises:
        ConfigError: no frame, or timestamps that do not match the frames.

    >>> len(Video((Image.new("RGB", (8, 8)),) * 2).frames)
    2
    """

    frames: tuple[ImageSource, ...]
    timestamps: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "frames", tuple(plain_image(frame, name="video") for frame in self.frames))
        if not self.frames:
            raise ConfigError("video: expected at least one frame")
        if self.timestamps is not None:
            times = tuple(float(t) for t in self.timestamps)
            if len(times) != len(self.frames) or not _rising(times):
                raise ConfigError(f"video: expected {len(self.frames)} rising times in seconds, got {list(times)[:5]}")
            object.__setattr__(self, "timestamps", times)


class Page:
    """One page, image or text: what is indexed and returned by a search.

    Args:
        id: unique name; defaults to ``f"{source}#page={number}"``, so that the same page of a changed file overwrites
            itself.
        source: where it comes from, usually the path relative to the loaded root.
        number: page number, from 1.
        label: the number printed on the page, when the file names one ("iv").
        image: a PIL image, a path, the bytes of an image file, a binary file object (read now), a NumPy array or a
            tensor. A path is opened anew at each :attr:`image`.
        text: the page's text layer or the text document itself; "" when there is none.
        metadata: JSON values by name, or what :func:`json_value` converts to them, as dates and numpy's numbers.
        sha256: hex digest of the content; computed when not given.
        video: sampled frames of a video document.

    Raises:
        ConfigError: no id and no source, a number below 1, no image, or metadata that is not JSON.
        PageError: a file object that cannot be read.

    >>> page = Page(source="a.pdf", number=2, text="Revenue rose.")
    >>> page.id, page.image, page.label
    ('a.pdf#page=2', None, None)
    """

    __slots__ = ("_image", "_sha256", "id", "label", "metadata", "number", "source", "text", "video")

    def __init__(
        self,
        id: str | None = None,
        source: str = "",
        number: int = 1,
        label: str | None = None,
        image: ImageSource | None = None,
        text: str = "",
        metadata: Mapping[str, Any] | None = None,
        sha256: str | None = None,
        video: Video | None = None,
    ) -> None:
        if id is None and not source:
            raise ConfigError("page: give an id or a source")
        if id is not None and (not isinstance(id, str) or not id):
            raise ConfigError(f"page: expected a non-empty string id, got {id!r}")
        if not isinstance(text, str):
            raise ConfigError(f"page {id or source!r}: expected text as a string, got {type(text).__name__}")
        self.source = str(source)
        self.number = whole_number(number, f"page {id or source!r}: number", least=1)
        self.id = id if id is not None else f"{source}#page={self.number}"
        self.label = label
        self.text = text
        self.metadata: dict[str, Any] = json_object(metadata or {}, f"page {self.id!r}")
        self.video = video
        self._image = None if image is None else plain_image(image, name=f"page {self.id!r}")
        self._sha256 = sha256

    @property
    def image(self) -> Image.Image | None:
        """The page as an upright RGB image, opened now if it is in a file; None when it has none.

        Raises:
            PageError: the file is gone or broken.
        """
        if self._image is None:
            return None
        return open_image(self._image, name=self.id if isinstance(self._image, bytes) else None)

    @property
    def image_path(self) -> Path | None:
        """The file of the image, or None when it is in memory or there is none."""
        return Path(self._image) if isinstance(self._image, str | Path) else None

    @property
    def image_source(self) -> PlainImage | None:
        """The image as the page holds it, unopened: a PIL image, a path, bytes, or None."""
        return self._image

    @property
    def sha256(self) -> str:
        """Hex digest of the content: the upright RGB pixels (or the video's frames) and the text.

        The same picture in another file format has the same digest. Raises PageError when the image cannot be opened.
        """
        if self._sha256 is None:
            digest = hashlib.sha256()
            for picture in [self._image] if self._image is not None else []:
                _hash_picture(digest, picture, self.id)
            if self.video is not None:
                digest.update(json.dumps(self.video.timestamps).encode())
                for frame in self.video.frames:
                    _hash_picture(digest, frame, self.id)
            digest.update(b"text\0" + self.text.encode("utf-8", "surrogatepass"))
            self._sha256 = digest.hexdigest()
        return self._sha256

    def replace(self, **changes: Any) -> Page:
        """Return a copy with some of the constructor's arguments changed.

        >>> Page(source="a.pdf").replace(text="x").text
        'x'
        """
        fields = {
            "id": self.id, "source": self.source, "number": self.number, "label": self.label, "image": self._image,
            "text": self.text, "metadata": self.metadata, "sha256": self._sha256, "video": self.video,
        }  # fmt: skip
        if {"image", "text", "video"} & changes.keys():
            fields["sha256"] = None
        return Page(**{**fields, **changes})

    def __repr__(self) -> str:
        kind = "video" if self.video is not None else "image" if self._image is not None else "text"
        return f"Page(id={self.id!r}, source={self.source!r}, number={self.number}, {kind})"


@dataclass(frozen=True, slots=True)
class Query:
    """A question: text, an image, or both.

    Raises:
        ConfigError: neither is given, the text is empty and there is no image, or the image is none.
        PageError: a file object that cannot be read.

    >>> Query("what was the revenue?").text
    'what was the revenue?'
    >>> Query()
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: query: give a text, an image, or both
    """

    text: str | None = None
    image: ImageSource | None = None

    def __post_init__(self) -> None:
        if self.text is not None and not isinstance(self.text, str):
            raise ConfigError(f"query: expected text as a string, got {type(self.text).__name__}")
        if self.image is None and (self.text is None or not self.text.strip()):
            raise ConfigError("query: give a text, an image, or both")
        if self.image is not None:
            object.__setattr__(self, "image", plain_image(self.image, name="query"))


@dataclass(frozen=True, slots=True)
class Hit:
    """One result of a search.

    Attributes:
        page: the page; ``hit.page.image`` opens its image.
        score: MaxSim, the float32 sum over query tokens; within -n and n for a query of n tokens.
        neighbours: pages before and after it in the same source, when requested.
    """

    page: Page
    score: float
    neighbours: tuple[Page, ...] = ()


def json_object(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return metadata as JSON values, converted by :func:`json_value` where they are of other types.

    Args:
        values: by name; not changed.
        name: what to call their owner in an error.

    Raises:
        ConfigError: a value that is not JSON; its key and type are named.

    >>> json_object({"day": date(2024, 5, 17), "tags": ("tax",), "year": np.int64(2024)}, "page 'a'")
    {'day': '2024-05-17', 'tags': ['tax'], 'year': 2024}
    >>> json_object({"size": {"mm": 1j}}, "page")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: page: metadata must be JSON values by name: 'size': a complex is none; ...
    """
    items: dict[Any, Any] = {}
    try:
        items = dict(values)
        copy = json.loads(json.dumps(items, allow_nan=False, default=json_value))
    except (TypeError, ValueError, ArithmeticError, RecursionError) as exc:
        key, reason = next(filter(None, map(_fault, items.items())), (None, exc))
        at = "" if key is None else f"{key!r}: "
        raise ConfigError(f"{name}: metadata must be JSON values by name: {at}{reason}") from exc
    assert isinstance(copy, dict)  # noqa: S101 - narrows the type for the checker
    return copy


def json_value(value: object) -> object:
    """Convert a value of a common type to one that JSON has, for metadata and for filters alike.

    Dates and times become ISO text, those with an offset in UTC, so that their order as texts is their order in time;
    numpy's and other numbers (``Decimal``, ``Fraction``) numbers; a UUID and a path text; a set a sorted list; an array
    a list; a member of an ``Enum`` its value.

    Raises:
        TypeError: a value of another type.
        ValueError: not a number, or not a time (``pandas.NaT``).
        ArithmeticError: a number that no float is near.

    >>> from datetime import timedelta, timezone
    >>> json_value(datetime(2024, 5, 1, 1, tzinfo=timezone(timedelta(hours=2))))
    '2024-04-30T23:00:00+00:00'
    >>> json_value(Decimal("19.90")), json_value(np.datetime64("2024-05-01T10:00", "ns"))
    (19.9, '2024-05-01T10:00:00')
    """
    if isinstance(value, np.generic | date | Decimal) and value != value:  # NaN and NaT alone differ
        raise ValueError(f"{value!r} has no JSON value; leave the key out, or give None")
    if isinstance(value, date | time):
        return _iso_text(value)
    if isinstance(value, np.datetime64):
        text = str(value)
        return text.rstrip("0").rstrip(".") if "." in text else text
    if isinstance(value, np.timedelta64):
        raise TypeError("a timedelta64 is none; keep it as a number of seconds or days")
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, np.floating):
        return float(value)
    if isinstance(value, numbers.Real | Decimal):
        number = float(value)
        return math.floor(value) if abs(number) < 2**63 and value == math.floor(value) else number
    if isinstance(value, np.ndarray):
        return list(value) if value.ndim else value[()]
    if isinstance(value, np.bool):
        return bool(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=lambda item: (type(item).__name__, item))
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, UUID | PurePath):
        return str(value)
    raise TypeError(f"a {type(value).__name__} is none; keep it as text, a number, a list or an object of these")


def _iso_text(value: date | time) -> str:
    if isinstance(value, datetime) and value.utcoffset() is not None:
        with contextlib.suppress(OverflowError, ValueError):  # within a day of the first or last year
            value = value.astimezone(UTC)
    return value.isoformat()


def _fault(item: tuple[Any, Any]) -> tuple[Any, Exception] | None:
    """Return the key of a value that is not JSON, and the error; None when it is."""
    try:
        json.dumps(dict([item]), allow_nan=False, default=json_value)
    except (TypeError, ValueError, ArithmeticError, RecursionError) as exc:
        return item[0], exc
    return None


def _rising(times: tuple[float, ...]) -> bool:
    return all(math.isfinite(t) and t >= 0 for t in times) and all(a <= b for a, b in itertools.pairwise(times))


def _hash_picture(digest: Any, picture: ImageSource, name: str) -> None:
    image = open_image(picture, name=name if isinstance(picture, bytes) else None)
    digest.update(f"image\0{image.width}x{image.height}\0".encode())
    for _, strip in strips(image):
        digest.update(strip.tobytes())
