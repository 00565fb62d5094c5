"""Rendering the pages of PDF files, one at a time.

PDFium is not thread-safe, so every call into it holds one lock of this module; the lock is not held between pages, so
that two threads can read two files in turn. Pages are drawn as a viewer shows them: crop box, rotation, annotations and
form fields, whose text is read as well.

Only the pixels of a rendered page are bounded, not the memory and time that PDFium takes inside this process. A file of
600 bytes whose drawing commands call themselves, a stream compressed twice, or nested patterns may take all memory,
and then PDFium ends the process without an error to catch, or may draw for hours. Read files you do not trust in a
process with limits of its own (``ulimit -v``, a container).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

from colqwen3_retrievers.errors import PageError, require
from colqwen3_retrievers.fork import ForkSafeLock
from colqwen3_retrievers.pages.files import PageFile
from colqwen3_retrievers.pages.images import check_shape
from colqwen3_retrievers.pages.page import Page

MAX_TEXT_CHARACTERS = 1_000_000
"""Most characters of a page's text layer that are read."""

MAX_PAGES_LOST_IN_A_ROW = 100
"""Broken pages in a row after which a file is abandoned: a page tree of 100 bytes may announce a million pages."""

_MAX_LABEL = 100
# Re-entrant, because the garbage collector may close an abandoned reader in the middle of another one's turn; it runs
# between Python instructions, never inside a call into PDFium.
_PDFIUM = ForkSafeLock(delays_fork=True)
_LOAD_ERRORS = {2: "the file cannot be opened", 3: "not a PDF, or damaged beyond repair", 5: "unknown encryption"}
_PASSWORD_NEEDED = 4
_CONTROLS = {code: None for code in [*range(32), *range(127, 160), 0xFFFE, 0xFFFF] if code not in (9, 10)}
_DROPPED = {**_CONTROLS, **dict.fromkeys(range(0xD800, 0xE000))}


def pdf_pages(
    file: PageFile, *, max_pixels: int, password: str | None = None, failed: Callable[[PageError], None]
) -> Iterator[Page]:
    """Render a PDF's pages, each when it is requested.

    Args:
        file: a regular file, or named bytes.
        max_pixels: most pixels (width x height) of a rendered page; a page has nearly as many, whatever its size on
            paper.
        password: opens an encrypted file; ignored by one that is not.
        failed: called with the error of each page or file; if it returns, the next page follows.

    Yields:
        Pages whose image is RGB and held in memory by the page alone.

    Raises:
        MissingExtraError: pypdfium2 is not installed (extra ``pdf``).
    """
    with _PDFIUM:
        pdfium = require("pdf", "pypdfium2")
    try:
        document = _open(pdfium, file, password)
    except PageError as error:
        failed(error)
        return
    try:
        with _PDFIUM:
            count = len(document)
        lost = 0
        for index in range(count):
            try:
                page = _read(pdfium, document, index, count, file, max_pixels)
            except PageError as error:
                failed(error)
                lost += 1
                if lost == MAX_PAGES_LOST_IN_A_ROW and index + 1 < count:
                    failed(PageError(f"given up: {lost} broken pages in a row of {count:,}", source=file.source))
                    return
                continue
            lost = 0
            yield page
            del page  # else this frame would keep the last page alive while the next one is rendered
    finally:
        with _PDFIUM:
            document.close()


def scale_for(width: float, height: float, max_pixels: int) -> float:
    """Return the scale that brings a page of any size to nearly, and never above, ``max_pixels``.

    Args:
        width: positive, in points.
        height: positive, in points.
        max_pixels: the bound, at least 1.

    Returns:
        Pixels a point, such that both sides rounded up to whole pixels have a product of at most ``max_pixels``.

    >>> scale = scale_for(612, 792, 1_310_720)
    >>> math.ceil(612 * scale), math.ceil(792 * scale)
    (1006, 1302)
    """
    across = min(max_pixels, max(1, math.floor(math.sqrt(max_pixels * (width / height)))))
    down = max_pixels // across
    return min(across / width, down / height) * (1 - 1e-9)  # a hair less, so that rounding up adds no pixel


def clean_text(text: str) -> str:
    r"""Return text without NULs, control characters and lone surrogates, with ``\n`` as its line end.

    PDFium writes U+0002 for a hyphen at a line's end; it becomes the hyphen that is printed.

    >>> clean_text("Reve\x00nue \ud800rose\r\nby a quar\x02\r\nter")
    'Revenue rose\nby a quar-\nter'
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\x02", "-").translate(_DROPPED).strip()


def _open(pdfium: Any, file: PageFile, password: str | None) -> Any:
    """Open a document that has pages, or raise a PageError; bytes must stay in memory as long as it is open."""
    raw, source = pdfium.raw, file.source
    try:
        name = str(file.path).encode("utf-8") + b"\0"
        secret = None if password is None else password.encode("utf-8") + b"\0"
    except UnicodeEncodeError as exc:
        raise PageError("the file name or the password is not valid Unicode", source=source) from exc
    with _PDFIUM:
        # By hand: the helper class leaves the file open when a document has no pages.
        if isinstance(file.data, bytes):
            handle = raw.FPDF_LoadMemDocument64(file.data, len(file.data), secret)
        else:
            handle = raw.FPDF_LoadDocument(name, secret)
        if not handle:
            code = raw.FPDF_GetLastError()
            if code == _PASSWORD_NEEDED:
                wanted = "give its password (--password-file on the command line)"
                raise PageError(
                    f"encrypted: {wanted if password is None else 'the password does not fit'}", source=source
                )
            raise PageError(_LOAD_ERRORS.get(code, "PDFium cannot load it"), source=source)
        if raw.FPDF_GetPageCount(handle) < 1:
            raw.FPDF_CloseDocument(handle)
            raise PageError("the PDF has no pages", source=source)
        document = pdfium.PdfDocument(handle)
        with contextlib.suppress(pdfium.PdfiumError):  # a broken form is not drawn; the pages are
            document.init_forms()
        return document


def _read(pdfium: Any, document: Any, index: int, count: int, file: PageFile, max_pixels: int) -> Page:
    """Render one page and read its text and label, closing all of PDFium's objects."""
    source, number = file.source, index + 1
    with _PDFIUM:
        try:
            page = document[index]
        except pdfium.PdfiumError as exc:
            raise PageError("the page is missing or broken", source=source, page=number) from exc
        try:
            width, height = page.get_size()
            if not (math.isfinite(width) and math.isfinite(height) and width > 0 and height > 0):
                raise PageError(f"the page has no visible area ({width} x {height})", source=source, page=number)
            check_shape(width, height, source, number)
            image = _render(page, scale_for(width, height, max_pixels))
            text = _drawn_text(pdfium, document, page, index)
            label = clean_text(document.get_page_label(index)[:_MAX_LABEL]) or None
        except (pdfium.PdfiumError, ValueError, AssertionError, MemoryError, OverflowError) as exc:
            raise PageError(f"the page cannot be rendered: {exc}", source=source, page=number) from exc
        finally:
            page.close()
    metadata = {
        "file_name": file.path.name, "file_type": "pdf", "page_count": count,
        "width": round(width, 3), "height": round(height, 3),
    }  # fmt: skip
    return Page(source=source, number=number, label=label, image=image, text=text, metadata=metadata)


def _render(page: Any, scale: float) -> Image.Image:
    bitmap = page.render(scale=scale)
    try:
        image: Image.Image = bitmap.to_pil().convert("RGB")  # a copy: the first may be a view of the bitmap's memory
        return image
    finally:
        bitmap.close()


def _drawn_text(pdfium: Any, document: Any, page: Any, index: int) -> str:
    """Return a page's text with that of its form fields and annotations, which PDFium reads when it is flattened.

    A copy is flattened: pages may share their content, and the next one must be drawn as the file has it. Flattening
    loses text of some files, therefore the text with more characters is kept.
    """
    raw, area = pdfium.raw, page.get_bbox()
    text = _text(page, area)
    if raw.FPDFPage_GetAnnotCount(page) < 1:
        return text
    with contextlib.suppress(pdfium.PdfiumError), contextlib.closing(pdfium.PdfDocument.new()) as copy:
        copy.import_pages(document, [index])
        with contextlib.closing(copy[0]) as unread:
            if raw.FPDFPage_Flatten(unread, raw.FLAT_NORMALDISPLAY) != raw.FLATTEN_SUCCESS:
                return text
        with contextlib.closing(copy[0]) as flat:  # a page has its new content once it is loaded again
            text = max(text, _text(flat, area), key=lambda read: len("".join(read.split())))
    return text


def _text(page: Any, area: tuple[float, float, float, float]) -> str:
    with contextlib.closing(page.get_textpage()) as layer:
        if layer.count_chars() > MAX_TEXT_CHARACTERS:
            return clean_text(layer.get_text_range(0, MAX_TEXT_CHARACTERS))
        return clean_text(layer.get_text_bounded(*area))
