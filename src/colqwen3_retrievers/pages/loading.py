"""Loading pages of PDFs and images, by file, folder or pattern, one page at a time.

A file is opened when its first page is requested; of a PDF or multi-page TIFF one rendered page is held at a time. A
file that is broken, encrypted, empty or hostile is a :class:`PageError`, or a warning before the next page.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import IO

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
    checked_size,
    decoding,
    frame_to_rgb,
    open_header,
    size_within,
)
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.pages.pdf import pdf_pages

DEFAULT_MAX_PIXELS = 1_310_720
"""Pixels of a rendered page: 1,280 visual tokens of 32 x 32, the bound of the checkpoint families."""

MAX_TIFF_PAGES = 10_000
"""Pages of a TIFF after which the rest is left out: a small file may chain directories without end."""

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
            kind = (image.format or "").lower()
            frames, broken = _tiff_pages(stream, file.source) if kind == "tiff" else ([0], None)
            if frames == [0] and broken is None:
                with decoding(file.source):
                    size = checked_size(image)
                check_shape(*size, file.source)
        except PageError as error:
            failed(error)
            return
        if frames == [0] and broken is None:
            del image  # a decoder's buffers, while the caller opens the file again
            content = file.data if isinstance(file.data, bytes) else file.path
            yield Page(source=file.source, image=content, metadata=_metadata(file, kind, 1, size))
            return
        for number, frame in enumerate(frames, start=1):
            try:
                picture = frame_to_rgb(image, frame, name=file.source)
                size = picture.size
                check_shape(*size, file.source)
                picture = picture.resize(size_within(*size, max_pixels), Image.Resampling.LANCZOS)  # a copy if equal
            except PageError as error:
                failed(caused_by(PageError(error.message, source=file.source, page=number), error))
                continue
            metadata = _metadata(file, kind, len(frames), size)
            yield Page(source=file.source, number=number, image=picture, metadata=metadata)
            del picture  # else this frame would keep the last page alive while the next one is decoded
        if broken is not None:
            failed(broken)


def _tiff_pages(stream: IO[bytes], source: str) -> tuple[list[int], PageError | None]:
    """Return the positions of a TIFF's pages, reduced copies left out, and the error that ends the list.

    Only the links of the directories are read: Pillow takes a millisecond for each.
    """
    stream.seek(0)
    head = stream.read(16)
    order, big = "<" if head.startswith(b"II") else ">", b"+" in head[2:4]
    count_format, entry, link_format = (f"{order}Q", 20, f"{order}Q") if big else (f"{order}H", 12, f"{order}I")
    pages: list[int] = []
    seen: set[int] = set()
    try:
        (link,) = struct.unpack_from(link_format, head, 8 if big else 4)
        while link and link not in seen:
            if len(seen) == MAX_TIFF_PAGES:
                raise PageError(f"more than {MAX_TIFF_PAGES:,} pages; the others are left out", source=source)
            stream.seek(link)
            (count,) = struct.unpack(count_format, stream.read(struct.calcsize(count_format)))
            entries = stream.read(min(count, 64) * entry)  # in the order of their tags; this one is the lowest
            for at in range(0, len(entries) - entry + 1, entry):
                tag, kind = struct.unpack_from(f"{order}HH", entries, at)
                if tag == _REDUCED:
                    value = struct.unpack_from(order + ("H" if kind == 3 else "I"), entries, at + (12 if big else 8))
                    reduced = bool(value[0] & 1)
                    break
            else:
                reduced = False
            if not reduced:
                pages.append(len(seen))
            seen.add(link)
            stream.seek(link + struct.calcsize(count_format) + count * entry)
            (link,) = struct.unpack(link_format, stream.read(struct.calcsize(link_format)))
    except (struct.error, OSError, ValueError, OverflowError) as exc:
        return pages or [0], caused_by(PageError("the TIFF's list of pages is broken", source=source), exc)
    except PageError as error:
        return pages, error
    return pages or [0], None


def _metadata(file: PageFile, kind: str, count: int, size: tuple[int, int]) -> dict[str, str | int]:
    """Return a page's metadata, which does not depend on where the file is stored."""
    return {
        "file_name": file.path.name, "file_type": kind, "page_count": count,
        "width": size[0], "height": size[1],
    }  # fmt: skip
