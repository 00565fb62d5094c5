"""Loading pages of PDFs and images, by file, folder or pattern, one page at a time.

A file is opened when its first page is requested; of a PDF or multi-page TIFF one rendered page is held at a time. A
file that is broken, encrypted, empty or hostile is a :class:`PageError`, or a warning before the next page.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator

from PIL import Image

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.pages.files import (
    OnError,
    PageFile,
    PageInput,
    PagePath,
    caused_by,
    error_policy,
    find_page_files,
    reason_of,
)
from colqwen3_retrievers.pages.images import (
    MAX_IMAGE_PIXELS,
    check_shape,
    check_size,
    checked_size,
    decoding,
    open_header,
    size_within,
    to_rgb,
)
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.pages.pdf import pdf_pages

DEFAULT_MAX_PIXELS = 1_310_720
"""Pixels of a rendered page: 1,280 visual tokens of 32 x 32, the bound of the checkpoint families."""

_REDUCED = 254  # TIFF tag NewSubfileType; its lowest bit marks a smaller copy of another page


def load_pages(
    paths: PageInput | Iterable[PageInput],
    *,
    root: PagePath | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    on_error: OnError = "raise",
    password: str | None = None,
) -> Iterator[Page]:
    """Read the pages of PDFs and images, one at a time.

    The paths are looked up now; files are opened as their pages are requested. PDF pages are rendered with as many
    pixels as the bound allows and have their text layer and label. A single image is checked to its end, and its page
    has the path, which ``Page.image`` opens; each page of a TIFF of several is an image in memory within
    ``max_pixels``, thumbnails left out; the page of an animation is its first frame. Text files are not read: index
    text as ``Page(source=..., text=...)``.

    Args:
        paths: one or several of: a file (png jpg jpeg webp gif bmp tif tiff pdf), a folder, read with its subfolders,
            or a pattern (``*``, ``?``, ``[...]``, and ``**`` for any subfolders) that finds files. Hidden files and
            other types are left out of folders and patterns. Inside a folder, links to files are read and links to
            folders are not followed. Files in memory, too: a binary file object, which has the source of the file that
            its ``name`` says, or a pair of a name, which is the source, and bytes or a file object. A file object is
            read from its start when its pages are requested, whole, and is not closed.
        root: what sources are relative to. By default a folder itself, a file's folder, and of a pattern the folders
            before its first wildcard. The names of pairs stay as they are.
        max_pixels: most pixels (width x height) of a rendered page, from 1 to 178,956,970.
        on_error: ``"raise"``; ``"skip"``, which logs a warning and goes on with the next page or file; or a function
            that is called with the PageError and, by returning, skips.
        password: opens encrypted PDFs; others ignore it.

    Returns:
        An iterator over pages: paths in the given order, the files of each in the order of their names' characters,
        folder by folder, pages from 1. A file reached by two paths comes once. ``metadata`` holds ``file_name``,
        ``file_type``, ``page_count``, and ``width`` and ``height`` in points for a PDF, else in pixels.

    Raises:
        PageError: a path that does not exist, a pattern that finds nothing, a file of another type, or, while
            iterating, a file or page that cannot be read. With ``"skip"`` these are logged.
        ConfigError: a wrong argument, a file outside ``root``, or two files that would have the same source.
        MissingExtraError: while iterating: a PDF, and pypdfium2 is not installed (extra ``pdf``).

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> Image.new("RGB", (40, 30), "white").save(folder / "scan.png")
    >>> [(page.id, page.metadata["width"]) for page in load_pages(folder)]
    [('scan.png#page=1', 40)]
    >>> [page.id for page in load_pages([("upload/1.png", (folder / "scan.png").read_bytes())])]
    ['upload/1.png#page=1']
    """
    max_pixels = whole_number(max_pixels, "max_pixels", least=1, most=MAX_IMAGE_PIXELS)
    if password is not None and not isinstance(password, str):
        raise ConfigError(f"password: expected a string, got {type(password).__name__}")  # never its value
    failed = error_policy(on_error)
    return _read(find_page_files(paths, root=root, on_error=failed, data=True), max_pixels, failed, password)


def _read(
    files: list[PageFile], max_pixels: int, failed: Callable[[PageError], None], password: str | None
) -> Iterator[Page]:
    for file in files:
        try:
            file = file.read()
            check_name(file)
        except PageError as error:
            failed(error)
            continue
        if file.is_pdf:
            yield from pdf_pages(file, max_pixels=max_pixels, password=password, failed=failed)
        else:
            yield from _image_pages(file, max_pixels, failed)


def check_name(file: PageFile) -> None:
    """Check that a file's name is valid Unicode, since it is its pages' source.

    Raises:
        PageError: it is not.

    >>> from pathlib import Path
    >>> check_name(PageFile(Path("/scans/a.png"), "a.png"))
    """
    if any(0xD800 <= ord(character) <= 0xDFFF for character in file.source):
        raise PageError("the file name is not valid Unicode", source=file.source)


def _image_pages(file: PageFile, max_pixels: int, failed: Callable[[PageError], None]) -> Iterator[Page]:
    try:
        stream = io.BytesIO(file.data) if isinstance(file.data, bytes) else file.path.open("rb")
    except OSError as exc:
        failed(caused_by(PageError(f"cannot be read: {reason_of(exc)}", source=file.source), exc))
        return
    with stream:
        try:
            image = open_header(stream, name=file.source)
            frames, broken = _frames(image, file.source)
            if len(frames) == 1 and broken is None:
                with decoding(file.source):
                    image.seek(0)
                    width, height = checked_size(image)
                check_shape(width, height, file.source)
        except PageError as error:
            failed(error)
            return
        if len(frames) == 1 and broken is None:
            content = file.data if isinstance(file.data, bytes) else file.path
            yield Page(source=file.source, image=content, metadata=_metadata(file, image, 1, (width, height)))
            return
        for number, frame in enumerate(frames, start=1):
            try:
                picture, size = _frame(image, frame, max_pixels, file.source)
            except PageError as error:
                failed(caused_by(PageError(error.message, source=file.source, page=number), error))
                continue
            yield Page(
                source=file.source, number=number, image=picture, metadata=_metadata(file, image, len(frames), size)
            )
            del picture  # else this frame would keep the last page alive while the next one is decoded
        if broken is not None:
            failed(broken)


def _frames(image: Image.Image, source: str) -> tuple[list[int], PageError | None]:
    """Return the positions of a TIFF's pages, and the error that ended it; any other image is one page."""
    if image.format != "TIFF":
        return [0], None
    frames: list[int] = []
    try:
        with decoding(source):
            for position in range(2**31):
                try:
                    image.seek(position)
                except EOFError:
                    break
                if not int(getattr(image, "tag_v2", {}).get(_REDUCED, 0)) & 1:
                    frames.append(position)
    except PageError as error:
        return frames or [0], error
    return frames or [0], None


def _frame(image: Image.Image, position: int, max_pixels: int, source: str) -> tuple[Image.Image, tuple[int, int]]:
    """Return a page of a TIFF as RGB within ``max_pixels``, and its own size."""
    with decoding(source):
        image.seek(position)
        check_size(image, MAX_IMAGE_PIXELS, source)
        picture = to_rgb(image.copy())
        check_shape(*picture.size, source)
        full, size = picture.size, size_within(*picture.size, max_pixels)
        return picture if size == full else picture.resize(size, Image.Resampling.LANCZOS), full


def _metadata(file: PageFile, image: Image.Image, count: int, size: tuple[int, int]) -> dict[str, str | int]:
    """Return a page's metadata, which does not depend on where the file is stored."""
    return {
        "file_name": file.path.name, "file_type": (image.format or "").lower(), "page_count": count,
        "width": size[0], "height": size[1],
    }  # fmt: skip
