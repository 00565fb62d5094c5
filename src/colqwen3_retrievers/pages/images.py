"""Images: decoding a file, bytes, an array or a PIL image into RGB pixels.

EXIF orientation is applied, an embedded ICC profile is converted to sRGB, transparency is put over white, palettes,
CMYK, greyscale and 16-bit images become 8-bit RGB, and of an animation the first frame is used. Sizes are checked in
the header, before anything is decoded, and only plain raster formats are tried: some of Pillow's others start programs
(EPS runs Ghostscript).
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from colqwen3_retrievers.errors import ColQwen3Error, ConfigError, PageError
from colqwen3_retrievers.fork import ForkSafeLock, HeldSetting
from colqwen3_retrievers.pages.files import file_size, reason_of

MAX_IMAGE_PIXELS = 178_956_970
"""Most pixels of a PIL image or array: Pillow's own bound, as an error instead of a warning."""

MAX_FILE_PIXELS = 75_000_000
"""Most pixels an image file may declare; A3 at 600 dpi has 69.7 million.

Pillow holds a decoded RGB image in 4 bytes a pixel: 0.3 GB. Opening a file takes at most three times that, 0.9 GB, and
hashing a strip more. Two decoders need more while they run: that of WebP 16 bytes a pixel (1.2 GB), that of JPEG 2000
20 (1.5 GB). Of images above 16.8 million pixels, one at a time is decoded.
"""

MAX_IMAGE_BYTES = 256 * 2**20
"""Most bytes an encoded image may have before it is opened at all."""

MAX_ASPECT_RATIO = 200
"""Largest ratio of the longest side to the shortest for which Qwen3-VL's resizing is defined."""


class _Array(Protocol):
    def __array__(self) -> Any: ...


PlainImage = Image.Image | str | Path | bytes
"""An image as pages hold it: a PIL image, a path, or the bytes of an image file."""

ImageSource = PlainImage | os.PathLike[str] | bytearray | memoryview | IO[bytes] | _Array
"""An image: also a file object opened in binary mode, a NumPy array or a tensor; see :func:`plain_image`."""

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "ICO", "AVIF", "MPO")
"""Pillow's names of the supported formats, where this build of Pillow has them."""

_WIDE_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_FULL_RANGE = ("PNG", "JPEG2000", "PPM")  # formats that define 65,535 as white
_WHITES = (255, 1023, 4095, 16383, 65535)  # of 8, 10, 12, 14 and 16 bits
_URL = re.compile(r"(?:https?|ftps?|s3|gs|az|file):/|data:", re.IGNORECASE)  # one slash: a Path folds "//" into "/"
_SECRETS = re.compile(r"(?<=/)[^/?#@]*@|[?#].*", re.DOTALL)  # user and password, and the query
_ORIENTATION = 0x0112  # the EXIF and TIFF tag
_BITS, _PHOTOMETRIC, _LEAST, _MOST, _LEAST_SIGNED, _MOST_SIGNED = 258, 262, 280, 281, 340, 341  # TIFF tags
_CHANNELS = (1, 3, 4)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_COLOURS = (np.indices((16, 16, 16)).T * 17).astype(np.uint8).reshape(64, 64, 3)
_LARGE = 2**24  # pixels above which images are decoded one at a time, since a decoder's buffers add up
_LARGE_DECODES = ForkSafeLock()
_STRIPES = 64
_GIVEN_IMAGES = [ForkSafeLock() for _ in range(_STRIPES)]  # Pillow's lazy load changes an image, which may be in use


def open_image(source: ImageSource, *, max_pixels: int | None = None, name: str | None = None) -> Image.Image:
    """Decode an image into upright 8-bit sRGB.

    Args:
        source: a PIL image, a path, the bytes of an image file, a binary file object, an array or a tensor. URLs are
            refused: nothing is fetched here.
        max_pixels: most pixels (width x height) the header may declare; by default :data:`MAX_FILE_PIXELS` for a file
            and :data:`MAX_IMAGE_PIXELS` for an image in memory.
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
    label = name or image_label(source)
    source = plain_image(source, name=name)
    if isinstance(source, Image.Image):
        check_size(source, max_pixels or MAX_IMAGE_PIXELS, label)
        if getattr(source, "tile", None) and getattr(getattr(source, "fp", None), "closed", True):
            raise PageError("its file was closed before it was decoded; call its load() first", source=label)
        with decoding(label), _GIVEN_IMAGES[(id(source) >> 4) % _STRIPES]:
            return to_rgb(source)
    stream = io.BytesIO(read_image_bytes(source, name=label))
    with decoding(label):  # no name for the opened image: it would keep the decoder's buffers
        return _converted(open_header(stream, max_pixels=max_pixels or MAX_FILE_PIXELS, name=label), own=True)


def plain_image(source: ImageSource, *, name: str | None = None) -> PlainImage:
    """Read a file object, or convert an array, so that it can be kept.

    Args:
        source: any image. A file object is read from its start. An array or tensor is uint8, or floats from 0 to 1, of
            shape (height, width) or (height, width, channels) with 1, 3 or 4 channels; channels may come first, which
            is preferred for tensors.
        name: what to call it in an error.

    Returns:
        A PIL image, a path, or bytes; a source that is one of these is returned as it is.

    Raises:
        ConfigError: not an image, or an array of another shape or type.
        PageError: a file object that cannot be read, or holds more than :data:`MAX_IMAGE_BYTES`.

    >>> plain_image(io.BytesIO(b"abc")), plain_image(np.zeros((3, 4, 3), np.uint8)).size
    (b'abc', (4, 3))
    """
    if isinstance(source, Image.Image | str | Path | bytes):
        return source
    if isinstance(source, bytearray | memoryview):
        return bytes(source)
    if isinstance(source, os.PathLike):
        return Path(source)
    label = name or image_label(source)
    if hasattr(source, "read"):
        return _read_stream(source, label)
    if hasattr(source, "__array__"):
        return _array_image(source, label)
    expected = "a PIL image, a path, bytes, a binary file object, an array or a tensor"
    raise ConfigError(f"{f'{name}: ' if name else ''}an image is {expected}, not {type(source).__name__}")


def is_image(value: object) -> bool:
    """Return whether a value is a single image, and no list of images; a string may be a path or a text.

    >>> is_image(b"..."), is_image(np.zeros((4, 4, 3))), is_image(np.zeros((2, 4, 4, 3))), is_image("a.png")
    (True, True, False, False)
    """
    if isinstance(value, Image.Image | bytes | bytearray | memoryview | os.PathLike) or hasattr(value, "read"):
        return True
    return hasattr(value, "__array__") and getattr(value, "ndim", None) in (2, 3)


def open_header(stream: IO[bytes], *, max_pixels: int = MAX_FILE_PIXELS, name: str) -> Image.Image:
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
        _load(image)
    else:
        _load(image)
        size = image.size  # Pillow rotates a TIFF as it is loaded
    method = _upright_method(image)
    swapped = method is not None and Image.new("L", (2, 1)).transpose(method).size == (1, 2)
    return (size[1], size[0]) if swapped else size


def read_image_bytes(source: ImageSource, *, name: str | None = None) -> bytes:
    """Return the bytes of an image file, within :data:`MAX_IMAGE_BYTES`.

    Raises:
        PageError: no such file, a folder, a pipe or device, empty, or too many bytes.
        ConfigError: a URL, or a type that holds no image.

    >>> read_image_bytes(b"abc")
    b'abc'
    """
    label = name or image_label(source)
    source = plain_image(source, name=name)
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
    elif not isinstance(source, bytes):
        raise ConfigError(f"an image file is a path, bytes or a file object, not {type(source).__name__}")
    if len(source) == 0:
        raise PageError("the image is empty (0 bytes)", source=label)
    if len(source) > MAX_IMAGE_BYTES:
        raise PageError(f"{len(source):,} bytes, more than {MAX_IMAGE_BYTES:,}", source=label)
    return source


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL image to upright 8-bit sRGB: first frame, orientation and profile applied, alpha over white.

    Args:
        image: any mode; not changed.

    Returns:
        A new image of mode ``RGB``, without metadata.

    >>> from PIL import Image
    >>> to_rgb(Image.new("I;16", (1, 1), 65535)).getpixel((0, 0))
    (255, 255, 255)
    """
    return _converted(_first_frame(image) if image.tell() != 0 else image)


def frame_to_rgb(image: Image.Image, position: int, *, name: str) -> Image.Image:
    """Convert one page of a TIFF of :func:`open_header`, as :func:`to_rgb` converts the first.

    Raises:
        PageError: it is broken, or has more than :data:`MAX_FILE_PIXELS`.
    """
    with decoding(name):
        with _fewer_warnings:
            image.seek(position)
        check_size(image, MAX_FILE_PIXELS, name)
        return _converted(image)


def strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield an image in strips of about a million pixels, each with its top row, so that copies stay small.

    >>> [(top, strip.size) for top, strip in strips(Image.new("L", (2**19, 3)))]
    [(0, (524288, 2)), (2, (524288, 1))]
    """
    width, height = image.size
    rows = max(1, 2**20 // width)
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def _converted(image: Image.Image, *, own: bool = False) -> Image.Image:
    """Convert the current frame to upright sRGB; with ``own`` nobody else uses the image, and no copy is made."""
    transparent = _transparent_colour(image)
    _load(image)
    turn, profile = _upright_method(image), image.info.get("icc_profile")
    original = image
    if image.mode in _WIDE_GREY:
        image = _grey(image)
    elif transparent is not None:
        image = image.copy()
        image.info["transparency"] = transparent
    elif own:
        image = image._new(image.im)  # a plain image of the same pixels: the decoder and its buffers are freed
    own = own or image is not original
    del original
    if turn is not None:
        image, own = image.transpose(turn), True
    if image.mode == "La":
        image = image.convert("LA")
    grey = image.mode in ("1", "L", "LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        image, own = Image.new("RGB", rgba.size, (255, 255, 255)), True
        image.paste(_in_srgb(rgba, profile, grey), mask=rgba)
    elif profile or image.mode == "LAB":
        colours = _in_srgb(image, profile, grey)
        image, own = colours, own or colours is not image
    if image.mode != "RGB":
        image = image.convert("RGB")
    elif not own:
        image = image.copy()
    image.info = {}  # an orientation left here would be applied a second time
    return image


def _load(image: Image.Image) -> None:
    with _LARGE_DECODES if image.width * image.height > _LARGE else contextlib.nullcontext():
        image.load()


def _in_srgb(image: Image.Image, profile: bytes | None, grey: bool) -> Image.Image:
    """Convert an image by its ICC profile to sRGB; one that is broken or of other colours is ignored, as by viewers."""
    try:
        space = "Lab " if image.mode == "LAB" else _opened_profile(profile).profile.xcolor_space
        if space == "GRAY" and grey:
            image = image.getchannel(0) if image.mode == "RGBA" else image.convert("L")
        elif space == "RGB " and image.mode not in ("RGB", "RGBA", "CMYK"):
            image = image.convert("RGB")
        elif image.mode not in {"RGB ": ("RGB", "RGBA"), "CMYK": ("CMYK",), "Lab ": ("LAB",)}.get(space, ()):
            return image
        transform = _transform(None if image.mode == "LAB" else profile, image.mode)
        return image if transform is None else transform.point(image)
    except Exception:  # a profile is metadata, and LittleCMS may be missing from a build of Pillow
        return image


def _opened_profile(profile: bytes | None) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(io.BytesIO(profile) if profile else ImageCms.createProfile("LAB"))


@functools.lru_cache(maxsize=8)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return what converts images of a profile (None is CIELAB) to sRGB; None if it is sRGB itself, up to rounding."""
    transform = ImageCms.buildTransform(_opened_profile(profile), ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode not in ("CMYK", "LAB"):
        probe = Image.fromarray(_COLOURS).convert(mode)
        change = np.asarray(transform.point(probe)).astype(int) - np.asarray(probe.convert("RGB"))
        return None if np.abs(change).max() <= 2 else transform
    return transform


def _transparent_colour(image: Image.Image) -> int | tuple[int, ...] | None:
    """Return the transparent colour of a PNG of 2, 4 or 16 bits in the 8 bits that Pillow decodes it to, else None."""
    colour, tiles = image.info.get("transparency"), getattr(image, "tile", None)
    if image.format != "PNG" or not tiles or colour is None:
        return None
    raw_mode = tiles[0][3]
    if raw_mode == "RGB;16B" and isinstance(colour, tuple):
        return tuple(value >> 8 for value in colour)
    return colour * {"L;2": 85, "L;4": 17}[raw_mode] if raw_mode in ("L;2", "L;4") and isinstance(colour, int) else None


def is_upright(image: Image.Image) -> bool:
    """Return whether a file has no EXIF orientation to apply.

    >>> is_upright(Image.new("RGB", (4, 3)))
    True
    """
    return _upright_method(image) is None


def _upright_method(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition of the EXIF orientation; None if the EXIF cannot be read, as viewers do."""
    try:
        with _fewer_warnings:
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


def _grey(image: Image.Image) -> Image.Image:
    """Convert a 16-bit, 32-bit or float image to 8 bits, its transparent colour to white."""
    black, white = _levels(image)
    transparent = image.info.get("transparency")
    inverted = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    grey = Image.new("L", image.size)
    for top, strip in strips(image):
        values = np.asarray(strip)
        if image.mode == "F":
            finite = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
            levels = np.rint((finite - black) * (255.0 / (white - black)))
        else:  # the high bits
            levels = (values.astype(np.int64) - int(black)) * 256 // (int(white) - int(black) + 1)
        levels = np.clip(levels, 0, 255)
        if inverted:
            levels = 255 - levels
        if isinstance(transparent, int):
            levels[values == transparent] = 255
        grey.paste(Image.fromarray(levels.astype(np.uint8)), (0, top))
    return grey


def _levels(image: Image.Image) -> tuple[float, float]:
    """Return the values that are black and white: by the format or a TIFF's tags, else by the range of the values.

    Whole numbers are taken to have 8, 10, 12, 14 or 16 bits; floats to be 0..1 or 0..255 if they are within, otherwise
    their lowest value is black and their highest white.
    """
    if image.format in _FULL_RANGE and image.mode != "F":
        return 0, 65535
    low, high = math.inf, -math.inf
    for _, strip in strips(image):
        values = np.asarray(strip)
        values = values[np.isfinite(values)]
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    if low > high:
        return 0, 1  # no number at all
    least, most = _tag(image, _LEAST, _LEAST_SIGNED), _tag(image, _MOST, _MOST_SIGNED)
    black = least if least is not None and least <= low else min(0.0, low)
    if most is not None and most >= high and most > black:
        return black, most
    if image.mode == "F":
        if low >= 0 and high <= 255:
            return 0, 1 if high <= 1 else 255
        return (low, high) if low < high else (black, max(high, black + 1))
    bits = _tag(image, _BITS)
    whites = (2 ** int(bits) - 1, *_WHITES) if bits is not None and 8 < bits < 16 else _WHITES
    return black, next((white for white in whites if low >= 0 and white >= high), max(high, black + 1))


def _tag(image: Image.Image, *tags: int) -> float | None:
    """Return the first number of the first of some tags that a TIFF has; None when it has none."""
    directory = getattr(image, "tag_v2", {})
    for tag in tags:
        with contextlib.suppress(LookupError, TypeError, ValueError, ArithmeticError):
            value = directory[tag]
            return float(value[0] if isinstance(value, tuple) else value)
    return None


def _read_stream(stream: Any, label: str) -> bytes:
    """Read a file object from its start, within :data:`MAX_IMAGE_BYTES`."""
    try:
        if hasattr(stream, "seekable") and stream.seekable():
            stream.seek(0)
        data = bytearray()
        while len(data) <= MAX_IMAGE_BYTES and (piece := stream.read(2**20)):
            data += piece  # a str is a TypeError
    except TypeError as exc:
        raise ConfigError(f"{label}: expected a file object opened in binary mode ('rb')") from exc
    except Exception as exc:  # whatever a file object of others raises
        raise PageError(f"cannot be read: {reason_of(exc)}", source=label) from exc
    if len(data) > MAX_IMAGE_BYTES:
        raise PageError(f"more than {MAX_IMAGE_BYTES:,} bytes", source=label)
    return bytes(data)


def _array_image(source: Any, label: str) -> Image.Image:
    """Convert an array, or a tensor of any library that NumPy can read, to a PIL image."""
    is_tensor = hasattr(source, "detach")
    try:
        array = np.asarray(source.detach().cpu() if is_tensor else source)
    except Exception as exc:
        raise ConfigError(f"{label}: cannot be read as an array: {exc}") from exc
    shape, dtype = array.shape, array.dtype
    if array.ndim == 3 and shape[0] in _CHANNELS and (is_tensor or shape[2] not in _CHANNELS):
        array = np.moveaxis(array, 0, 2)
    if array.dtype.kind == "f" and array.size and array.min() >= 0 and array.max() <= 1:
        array = np.rint(array * 255).astype(np.uint8)
    if (
        array.dtype != np.uint8
        or not array.size
        or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in _CHANNELS))
    ):
        expected = "uint8, or floats from 0 to 1, of shape (height, width) or (height, width, 1, 3 or 4)"
        raise ConfigError(f"{label}: expected an array of {expected}, got {dtype} of shape {shape}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.array(array, order="C"))  # a copy: the caller may go on writing to the array


def size_within(width: float, height: float, max_pixels: int) -> tuple[int, int]:
    """Return the whole size of an image within a bound: reduced when it is above it, never enlarged.

    Rounding makes no strip longer than :data:`MAX_ASPECT_RATIO`.

    >>> size_within(2000, 1000, 500_000), size_within(30, 20, 500_000), size_within(100, 20_000, 1_310_720)
    ((1000, 500), (30, 20), (80, 16000))
    """
    scale = min(1.0, math.sqrt(max_pixels / (width * height)))
    across = min(max_pixels, max(1, math.floor(width * scale)))
    down = max(1, min(max_pixels // across, math.floor(height * scale), MAX_ASPECT_RATIO * across))
    return min(across, MAX_ASPECT_RATIO * down), down


def check_shape(width: float, height: float, source: str, page: int | None = None) -> None:
    """Refuse a strip that no family can encode.

    Raises:
        PageError: one side is more than :data:`MAX_ASPECT_RATIO` times the other.

    >>> check_shape(1, 2_000_000, "a.pdf", 3)
    Traceback (most recent call last):
    colqwen3_retrievers.errors.PageError: a.pdf, page 3: 1 x 2000000: one side is more than 200 times the other
    """
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        message = f"{width:.12g} x {height:.12g}: one side is more than {MAX_ASPECT_RATIO} times the other"
        raise PageError(message, source=source, page=page)


def check_size(image: Image.Image, max_pixels: int, label: str) -> None:
    """Refuse an image that has no pixels or more than ``max_pixels``.

    Raises:
        PageError: it does; the message names ``label``.
    """
    width, height = image.size
    if width < 1 or height < 1:
        raise PageError(f"the image has no pixels ({width} x {height})", source=label)
    if width * height > max_pixels:
        remedy = "; reduce it, or pass it as a PIL image" if max_pixels == MAX_FILE_PIXELS else ""
        raise PageError(f"{width} x {height} pixels, more than the bound of {max_pixels:,}{remedy}", source=label)


def image_label(source: object) -> str:
    """Return what to call an image in an error: its path without secrets, or its type.

    >>> image_label("https://ada:secret@example.org/a.png?key=1"), image_label(b"abc")
    ('https://example.org/a.png', '<3 bytes>')
    """
    if isinstance(source, str | Path):
        text = str(source)
        if _URL.match(text) and not text.lower().startswith("data:"):
            text = _SECRETS.sub("", text)
        return text if len(text) <= 200 else f"{text[:200]}…"
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"<{source.mode} image>"
    return f"<{len(source):,} bytes>" if isinstance(source, bytes | bytearray) else f"<{type(source).__name__}>"


@contextlib.contextmanager
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
    except ColQwen3Error:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise PageError("the image declares too many pixels", source=label) from exc
    except MemoryError as exc:
        raise PageError("the image takes more memory than is available", source=label) from exc
    except Exception as exc:  # decoders raise anything, so no list of types would be complete
        raise PageError(f"the image is broken: {str(exc) or type(exc).__name__}", source=label) from exc
