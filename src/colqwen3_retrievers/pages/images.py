"""Images: decoding a file, bytes or a PIL image into RGB pixels.

EXIF orientation is applied, transparency is put over white, palettes, CMYK, greyscale and 16-bit images become 8-bit
RGB, and of an animation the first frame is used. Sizes are checked in the header, before anything is decoded, and only
plain raster formats are tried: some of Pillow's others start programs (EPS runs Ghostscript).
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import numpy as np
from PIL import Image, UnidentifiedImageError

from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.fork import ForkSafeLock, HeldSetting
from colqwen3_retrievers.pages.files import file_size, reason_of

MAX_IMAGE_PIXELS = 178_956_970
"""Most pixels an image may declare (about 0.5 GB as RGB): Pillow's bound, as an error instead of a warning."""

MAX_IMAGE_BYTES = 256 * 2**20
"""Most bytes an encoded image may have before it is opened at all."""

ImageSource = Image.Image | str | Path | bytes
"""An image: a PIL image, a path, or the bytes of an image file."""

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "ICO", "AVIF", "MPO")
"""Pillow's names of the supported formats, where this build of Pillow has them."""

CHAT_FORMATS: Final = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
"""Formats that chat models accept, with their media types."""

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_URL = re.compile(r"(?:https?|ftps?|s3|gs|az|file):/|data:", re.IGNORECASE)  # one slash: a Path folds "//" into "/"
_SECRETS = re.compile(r"(?<=/)[^/?#@]*@|[?#].*", re.DOTALL)  # user and password, and the query
_ORIENTATION = 0x0112  # the EXIF and TIFF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STRIPES = 64
_GIVEN_IMAGES = [ForkSafeLock() for _ in range(_STRIPES)]  # Pillow's lazy load changes an image, which may be in use


def open_image(source: ImageSource, *, max_pixels: int = MAX_IMAGE_PIXELS, name: str | None = None) -> Image.Image:
    """Decode an image into upright 8-bit RGB.

    Args:
        source: a PIL image, a path, or the bytes of an image file. URLs are refused: nothing is fetched here.
        max_pixels: most pixels (width x height) the header may declare.
        name: what to call it in an error; a path names itself.

    Returns:
        A new PIL image of mode ``RGB``; the source is not changed.

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
        check_size(source, max_pixels, label)
        with decoding(label):
            with _GIVEN_IMAGES[(id(source) >> 4) % _STRIPES]:
                loaded = _loaded(source)
            return _converted(*loaded)
    opened = open_header(io.BytesIO(read_image_bytes(source, name=label)), max_pixels=max_pixels, name=label)
    with opened, decoding(label):
        return to_rgb(opened)


def open_header(stream: IO[bytes], *, max_pixels: int = MAX_IMAGE_PIXELS, name: str) -> Image.Image:
    """Read an image's header and check its size; no pixel is decoded.

    Args:
        stream: the image file, open for reading; it must stay open until the pixels have been read.
        max_pixels: most pixels (width x height) the header may declare.
        name: what to call it in an error.

    Returns:
        Pillow's lazy image.

    Raises:
        PageError: not an image of :data:`IMAGE_FORMATS`, or too large.

    >>> open_header(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0"), name="drawing.eps")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.PageError: drawing.eps: not an image that can be read
    """
    Image.init()
    formats = [kind for kind in IMAGE_FORMATS if kind in Image.OPEN]
    with decoding(name), _fewer_warnings:
        opened = Image.open(stream, formats=formats)
    check_size(opened, max_pixels, name)
    return opened


def _ignore_warnings() -> tuple[Callable[[], object], Callable[[], object]]:
    filters = warnings.catch_warnings()  # swaps a list of the whole process

    def hold() -> None:
        filters.__enter__()
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_size's bound is ours and exact
        warnings.simplefilter("ignore", UserWarning)  # Pillow's remarks on damaged metadata, which is not used

    def restore() -> None:
        with contextlib.suppress(RuntimeError):  # not entered, in a child forked just before
            filters.__exit__(None, None, None)

    return hold, restore


_fewer_warnings = HeldSetting(_ignore_warnings)


def checked_size(image: Image.Image) -> tuple[int, int]:
    """Decode an image of :func:`open_header` to its end, and return its upright size.

    A JPEG is decoded at an eighth of its size, which reads all of its bytes.

    Args:
        image: of :func:`open_header`; afterwards it holds reduced pixels, and only its header should be used.

    Returns:
        Width and height in pixels, as of :func:`open_image`.

    Raises:
        Exception: of Pillow, for a broken file; call it under :func:`decoding`.

    >>> file = io.BytesIO()
    >>> Image.new("RGB", (40, 30)).save(file, "JPEG")
    >>> checked_size(open_header(file, name="a.jpg"))
    (40, 30)
    """
    size = image.size
    if image.format in ("JPEG", "MPO"):
        image.draft(None, (1, 1))
        image.load()
    else:
        image.load()
        size = image.size  # Pillow rotates a TIFF as it is loaded
    method = _upright_method(image)
    swapped = method is not None and Image.new("L", (2, 1)).transpose(method).size == (1, 2)
    return (size[1], size[0]) if swapped else size


def chat_image(source: ImageSource, *, name: str | None = None) -> tuple[bytes, str]:
    """Return an image in a format of :data:`CHAT_FORMATS`, converted to PNG if it has another one.

    Not every chat model applies the EXIF orientation, so a file that is not upright becomes PNG, too.

    Args:
        source: a PIL image, a path, or the bytes of an image file.
        name: what to call it in an error; a path names itself.

    Returns:
        The bytes of an image file, and its media type.

    Raises:
        PageError, ConfigError: as for :func:`open_image`.

    >>> chat_image(Image.new("RGB", (2, 1)))[1]
    'image/png'
    """
    if not isinstance(source, Image.Image):
        label = name or _label(source)
        data = read_image_bytes(source, name=label)
        header = open_header(io.BytesIO(data), name=label)
        media_type = CHAT_FORMATS.get(header.format or "")
        if media_type is not None and _upright_method(header) is None:
            return data, media_type
        source, name = data, label
    file = io.BytesIO()
    open_image(source, name=name).save(file, "PNG")
    return file.getvalue(), "image/png"


def read_image_bytes(source: str | Path | bytes, *, name: str | None = None) -> bytes:
    """Return the bytes of an image file, within :data:`MAX_IMAGE_BYTES`.

    Raises:
        PageError: no such file, a folder, a pipe or device, empty, or too many bytes.
        ConfigError: a URL, or a type that holds no image.

    >>> read_image_bytes(b"abc")
    b'abc'
    """
    label = name or _label(source)
    if isinstance(source, str | Path):
        if _URL.match(str(source)):
            raise ConfigError(f"{label}: an image URL is not fetched; download it and give the file or its bytes")
        size = file_size(source, label)
        if size > MAX_IMAGE_BYTES:
            raise PageError(f"{size:,} bytes, more than {MAX_IMAGE_BYTES:,}", source=label)
        try:
            with Path(source).open("rb") as file:
                source = file.read(MAX_IMAGE_BYTES + 1)  # the file may be growing
        except OSError as exc:
            raise PageError(f"cannot be read: {reason_of(exc)}", source=label) from exc
    elif not isinstance(source, bytes | bytearray | memoryview):
        raise ConfigError(f"an image is a PIL image, a path or bytes, not {type(source).__name__}")
    if len(source) == 0:
        raise PageError("the image is empty (0 bytes)", source=label)
    if len(source) > MAX_IMAGE_BYTES:
        raise PageError(f"{len(source):,} bytes, more than {MAX_IMAGE_BYTES:,}", source=label)
    return bytes(source)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL image to upright 8-bit RGB: EXIF orientation, first frame, transparency over white.

    Args:
        image: any mode; not changed.

    Returns:
        A new image of mode ``RGB``, without metadata.

    >>> from PIL import Image
    >>> to_rgb(Image.new("I;16", (1, 1), 65535)).getpixel((0, 0))
    (255, 255, 255)
    """
    return _converted(*_loaded(image))


def _loaded(image: Image.Image) -> tuple[Image.Image, Image.Transpose | None]:
    """Load the first frame's pixels, and return them with the transposition that makes them upright."""
    if image.tell() != 0:
        image = _first_frame(image)
    image.load()
    return image, _upright_method(image)


def _converted(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    """Convert loaded pixels to upright RGB, without changing the image."""
    image = image if turn is None else image.transpose(turn)
    if image.mode in _SIXTEEN_BIT:
        high_byte = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        image = Image.fromarray(high_byte)
    elif image.mode in ("I", "F"):
        image = _stretch(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", rgba.size, (255, 255, 255))
        image.paste(rgba, mask=rgba)
    image = image.convert("RGB") if image.mode != "RGB" else image.copy()
    image.info = {}  # an orientation left here would be applied a second time
    return image


def _upright_method(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition of the EXIF orientation; None if the EXIF cannot be read, as viewers do."""
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the EXIF parser raises anything, and no pixel depends on it
        return None


def _first_frame(image: Image.Image) -> Image.Image:
    """Return frame 0 of an animation that is at another frame, and leave it there."""
    position = image.tell()
    image.seek(0)
    first = image.copy()
    image.seek(position)
    return first


def _stretch(image: Image.Image) -> Image.Image:
    """Convert a 32-bit image to 8 bits: 0..1, 0..255 or 0..65535 by its values, since no header says which."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    top = float(values.max(initial=0.0))
    if image.mode == "F" and top <= 1.0:
        values = values * 255.0
    elif top > 255.0:
        values = values * (255.0 / max(top, 65535.0))
    np.rint(values, out=values)
    return Image.fromarray(np.clip(values, 0, 255, out=values).astype(np.uint8))


def size_within(width: float, height: float, max_pixels: int) -> tuple[int, int]:
    """Return the whole size of an image within a bound: reduced when it is above it, never enlarged.

    >>> size_within(2000, 1000, 500_000), size_within(30, 20, 500_000)
    ((1000, 500), (30, 20))
    """
    scale = min(1.0, math.sqrt(max_pixels / (width * height)))
    across = min(max_pixels, max(1, math.floor(width * scale)))
    return across, max(1, min(max_pixels // across, math.floor(height * scale)))


def check_size(image: Image.Image, max_pixels: int, label: str) -> None:
    """Refuse an image that has no pixels or more than ``max_pixels``.

    Raises:
        PageError: it does; the message names ``label``.
    """
    width, height = image.size
    if width < 1 or height < 1:
        raise PageError(f"the image has no pixels ({width} x {height})", source=label)
    if width * height > max_pixels:
        raise PageError(f"{width} x {height} pixels, more than the bound of {max_pixels:,}", source=label)


def _label(source: object) -> str:
    if isinstance(source, str | Path):
        text = str(source)
        if _URL.match(text) and not text.lower().startswith("data:"):
            text = _SECRETS.sub("", text)
        return text if len(text) <= 200 else f"{text[:200]}…"
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"<{source.mode} image>"
    return f"<{len(source):,} bytes>" if isinstance(source, bytes | bytearray) else f"<{type(source).__name__}>"


@contextmanager
def decoding(label: str) -> Iterator[None]:
    """Raise exceptions of Pillow's decoders as a PageError that names ``label``.

    >>> with decoding("a.png"):
    ...     raise SyntaxError("broken PNG file")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.PageError: a.png: the image is broken: broken PNG file
    """
    try:
        yield
    except UnidentifiedImageError as exc:
        raise PageError("not an image that can be read", source=label) from exc
    except Image.DecompressionBombError as exc:
        raise PageError("the image declares too many pixels", source=label) from exc
    except (OSError, ValueError, TypeError, SyntaxError, LookupError, EOFError, ArithmeticError) as exc:
        raise exc if isinstance(exc, ConfigError) else PageError(f"the image is broken: {exc}", source=label) from exc
    except (AttributeError, AssertionError, NotImplementedError, struct.error, zlib.error) as exc:
        raise PageError(f"the image is broken: {exc}", source=label) from exc
