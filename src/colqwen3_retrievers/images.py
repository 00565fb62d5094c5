"""Opening pictures: one place that decides what RGB pixels a file, some bytes or a PIL image stand for.

EXIF orientation is applied, transparency is laid over white, palettes, CMYK, greyscale and 16-bit images become 8-bit
RGB, and of an animation the first frame counts. Sizes are checked from the header, before anything is decoded.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from colqwen3_retrievers.errors import ConfigError, PageError

MAX_IMAGE_PIXELS = 178_956_970
"""Most pixels an image may declare (about 0.5 GB as RGB): Pillow's own bound, made an error instead of a warning."""

MAX_IMAGE_BYTES = 256 * 2**20
"""Most bytes an encoded image may have before it is opened at all."""

ImageSource = Image.Image | str | Path | bytes
"""What counts as an image everywhere: a PIL image, a path, or the bytes of an image file."""

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


def open_image(source: ImageSource, *, max_pixels: int = MAX_IMAGE_PIXELS, name: str | None = None) -> Image.Image:
    """Decode an image into upright 8-bit RGB.

    Args:
        source: a PIL image, a path, or the bytes of an image file. URLs are refused: nothing is fetched here.
        max_pixels: most pixels (width x height) the header may declare.
        name: what to call it in an error; a path names itself.

    Returns:
        A new PIL image of mode ``RGB``; the source is left as it was.

    Raises:
        PageError: unreadable, truncated, empty or too large; it names the source.
        ConfigError: the source is of a type that is not an image, or a URL.

    >>> from PIL import Image
    >>> grey = Image.new("LA", (2, 1), (0, 0))              # black, fully transparent
    >>> open_image(grey).getpixel((0, 0))
    (255, 255, 255)
    """
    label = name or _label(source)
    if isinstance(source, Image.Image):
        _check_size(source, max_pixels, label)
        return _guarded(lambda: to_rgb(source), label)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is ours and exact
        opened = _guarded(lambda: Image.open(io.BytesIO(read_image_bytes(source, name=label))), label)
        with opened:
            _check_size(opened, max_pixels, label)
            return _guarded(lambda: to_rgb(opened), label)


def read_image_bytes(source: str | Path | bytes, *, name: str | None = None) -> bytes:
    """Give the bytes of an image file, within :data:`MAX_IMAGE_BYTES`.

    Raises:
        PageError: no such file, a folder, empty, or too many bytes.
        ConfigError: a URL, or a type that holds no image.

    >>> read_image_bytes(b"abc")
    b'abc'
    """
    label = name or _label(source)
    if isinstance(source, str | Path):
        text = str(source)
        if text.startswith(("http://", "https://", "data:", "ftp://", "s3://")):
            raise ConfigError(f"{label}: an image URL is not fetched; download it and give the file or its bytes")
        try:
            size = Path(source).stat().st_size
            if size > MAX_IMAGE_BYTES:
                raise PageError(f"{size:,} bytes, more than {MAX_IMAGE_BYTES:,}", source=label)
            source = Path(source).read_bytes()
        except (OSError, ValueError) as exc:  # ValueError: a NUL in the path
            reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
            raise PageError(f"cannot be read: {reason}", source=label) from exc
    elif not isinstance(source, bytes | bytearray | memoryview):
        raise ConfigError(f"an image is a PIL image, a path or bytes, not {type(source).__name__}")
    if len(source) == 0:
        raise PageError("the image is empty (0 bytes)", source=label)
    if len(source) > MAX_IMAGE_BYTES:
        raise PageError(f"{len(source):,} bytes, more than {MAX_IMAGE_BYTES:,}", source=label)
    return bytes(source)


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn any PIL image into upright 8-bit RGB: EXIF orientation, first frame, transparency over white.

    Args:
        image: any mode; left as it was.

    Returns:
        A new image of mode ``RGB``.

    >>> from PIL import Image
    >>> to_rgb(Image.new("I;16", (1, 1), 65535)).getpixel((0, 0))
    (255, 255, 255)
    """
    if getattr(image, "n_frames", 1) > 1:
        image = image.copy() if image.tell() == 0 else _first_frame(image)
    image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BIT:
        high_byte = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        image = Image.fromarray(high_byte, "L")
    elif image.mode in ("I", "F"):
        image = _stretch(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _first_frame(image: Image.Image) -> Image.Image:
    """Read frame 0 of an animation that somebody left at another frame, and put it back there."""
    position = image.tell()
    image.seek(0)
    first = image.copy()
    image.seek(position)
    return first


def _stretch(image: Image.Image) -> Image.Image:
    """32-bit integer and float images: 0..1, 0..255 or 0..65535 by what they hold, for no header says which."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    top = float(values.max(initial=0.0))
    if image.mode == "F" and top <= 1.0:
        values = values * 255.0
    elif top > 255.0:
        values = values * (255.0 / max(top, 65535.0))
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8), "L")


def _check_size(image: Image.Image, max_pixels: int, label: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise PageError(f"the image has no pixels ({width} x {height})", source=label)
    if width * height > max_pixels:
        raise PageError(f"{width} x {height} pixels, more than the bound of {max_pixels:,}", source=label)


def _label(source: object) -> str:
    if isinstance(source, str | Path):
        text = str(source)
        return text if len(text) <= 200 else f"{text[:200]}…"
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"<{source.mode} image>"
    return f"<{len(source):,} bytes>" if isinstance(source, bytes | bytearray) else f"<{type(source).__name__}>"


def _guarded(work: Callable[[], Image.Image], label: str) -> Image.Image:
    """Run a decoder; whatever Pillow's decoders throw at a broken file becomes a PageError."""
    try:
        return work()
    except (PageError, ConfigError, MemoryError):
        raise
    except UnidentifiedImageError as exc:
        raise PageError("not an image that can be read", source=label) from exc
    except Image.DecompressionBombError as exc:
        raise PageError("the image declares too many pixels", source=label) from exc
    except (OSError, ValueError, TypeError, SyntaxError, IndexError, KeyError, EOFError, OverflowError) as exc:
        raise PageError(f"the image is broken: {exc}", source=label) from exc
    except (ZeroDivisionError, AttributeError, struct.error) as exc:
        raise PageError(f"the image is broken: {exc}", source=label) from exc
