"""Makes every kind of broken, hostile or unreadable page file we know of, each with the error it must give."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from colqwen3_retrievers.errors import PageError


class BadPage(NamedTuple):
    """One bad file: how to make it in a folder, the error, and what its message must contain besides the name."""

    name: str
    make: Callable[[Path], Path]
    error: type[Exception]
    text: str


def pdf_bytes(*objects: bytes, trailer: bytes = b"", root: bytes = b"/Root 1 0 R") -> bytes:
    """A PDF of the given object bodies, numbered from 1, with a correct cross-reference table."""
    out, offsets = b"%PDF-1.7\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n" % number + body + b"\nendobj\n"
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    end = b"trailer\n<</Size %d%s%s>>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, root, trailer, len(out))
    return out + head + table + end


def one_page_pdf(
    box: bytes = b"[0 0 612 792]", *, kids: bytes = b"[3 0 R]", count: bytes = b"1", extra: bytes = b"",
    content: bytes = b"",
) -> bytes:  # fmt: skip
    """A PDF of one page object, with any MediaBox, page tree and page entries."""
    return pdf_bytes(
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids%s/Count %s>>" % (kids, count),
        b"<</Type/Page/Parent 2 0 R/MediaBox%s/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>%s>>" % (box, extra),
        b"<</Length %d>>\nstream\n%s\nendstream" % (len(content), content),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    )


def _form(content: bytes, resources: bytes = b"", kind: bytes = b"/Type/XObject/Subtype/Form") -> bytes:
    head = b"<<%s/BBox[0 0 612 792]/Resources<<%s>>/Length %d>>" % (kind, resources, len(content))
    return head + b"\nstream\n%s\nendstream" % content


def _page_of_forms(resources: bytes, content: bytes, *forms: bytes) -> bytes:
    """A PDF whose page draws forms or patterns, numbered from 5."""
    return pdf_bytes(
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<<%s>>>>" % resources,
        b"<</Length %d>>\nstream\n%s\nendstream" % (len(content), content),
        *forms,
    )


def self_referring_form_pdf() -> bytes:
    """A form that draws itself twice: some 600 bytes that ask for 2 ** depth forms."""
    return _page_of_forms(b"/XObject<</I 5 0 R>>", b"/I Do", _form(b"/I Do /I Do", b"/XObject<</I 5 0 R>>"))


def nested_forms_pdf(depth: int = 30) -> bytes:
    """Forms that each draw the next one twice."""
    forms = [_form(b"/I Do /I Do", b"/XObject<</I %d 0 R>>" % (6 + i)) for i in range(depth)]
    return _page_of_forms(b"/XObject<</I 5 0 R>>", b"/I Do", *forms, _form(b"0 0 9 9 re f"))


def nested_patterns_pdf(depth: int = 8) -> bytes:
    """Tiling patterns one point apart that are each filled with the next one."""
    kind, fill = b"/PatternType 1/PaintType 1/TilingType 1/XStep 1/YStep 1", b"/Pattern cs /P scn 0 0 612 792 re f"
    patterns = [_form(fill, b"/Pattern<</P %d 0 R>>" % (6 + i), kind) for i in range(depth)]
    return _page_of_forms(b"/Pattern<</P 5 0 R>>", fill, *patterns, _form(b"0 0 9 9 re f", kind=kind))


def double_flate_pdf(mebibytes: int = 4096) -> bytes:
    """A page whose commands are blanks compressed twice: 4 GiB in a few kilobytes."""
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(b" " * 2**20) + packer.flush(zlib.Z_FULL_FLUSH)  # may be repeated, as it stands alone
    data = zlib.compress(b"\x78\xda" + block * mebibytes + b"\x03\x00" + bytes(4), 9)
    return pdf_bytes(
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R>>",
        b"<</Filter[/FlateDecode/FlateDecode]/Length %d>>\nstream\n%s\nendstream" % (len(data), data),
    )


PDF_BOMBS = {
    "form that draws itself": self_referring_form_pdf,
    "nested forms": nested_forms_pdf,
    "nested tiling patterns": nested_patterns_pdf,
    "stream compressed twice": double_flate_pdf,
}
"""Small PDFs that take a renderer without limits all memory or hours; use them in a process with limits only."""


def encrypted_pdf(password: str) -> bytes:
    """A PDF of one page that says "secret", for one password."""
    from reportlab.lib.pdfencrypt import StandardEncryption
    from reportlab.pdfgen.canvas import Canvas

    file = io.BytesIO()
    canvas = Canvas(file, encrypt=StandardEncryption(password, strength=128))
    canvas.drawString(72, 700, "secret")
    canvas.showPage()
    canvas.save()
    return file.getvalue()


def png_bytes(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG header of any declared size, followed by the given chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        out += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return out


def image_bytes(kind: str, size: tuple[int, int] = (64, 48), mode: str = "RGB") -> bytes:
    """A sound image with some detail, so that its file is not tiny."""
    picture = Image.effect_noise(size, 60).convert(mode)
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def tiff_stack(count: int, *, size: tuple[int, int] = (40, 30)) -> bytes:
    """A TIFF of grey pages, the first the darkest."""
    frames = [Image.new("RGB", size, (20 * i, 20 * i, 20 * i)) for i in range(1, count + 1)]
    file = io.BytesIO()
    frames[0].save(file, "TIFF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def _tiff_with_second_page(tag_values: dict[int, int]) -> bytes:
    """A TIFF of three pages, with tags of the second overwritten."""
    data = bytearray(tiff_stack(3))
    first = struct.unpack_from("<I", data, 4)[0]
    entries = struct.unpack_from("<H", data, first)[0]
    second = struct.unpack_from("<I", data, first + 2 + 12 * entries)[0]
    for i in range(struct.unpack_from("<H", data, second)[0]):
        at = second + 2 + 12 * i
        tag = struct.unpack_from("<H", data, at)[0]
        if tag in tag_values:
            struct.pack_into("<HHII", data, at, tag, 4, 1, tag_values[tag])
    return bytes(data)


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def _file(name: str, data: Callable[[], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(data())
        return path

    return make


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.pdf")
    return folder / "pipe.pdf"


def _socket(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket.png"))  # an absolute path may be longer than a socket's may be
    return folder / "socket.png"


def _link(name: str, target: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).symlink_to(target)
        return folder / name

    return make


def _undecodable(folder: Path) -> Path:
    path = Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.pdf"))
    path.write_bytes(one_page_pdf())
    return path


def _nothing(name: str) -> Callable[[Path], Path]:
    return lambda folder: folder / name


_BROKEN, _NOT_PDF, _NO_PAGES, _LOST = "the image is broken", "not a PDF", "no pages", "missing or broken"
_NOT_IMAGE, _TOO_BIG = "not an image that can be read", "too many pixels"
_CATALOG = b"<</Type/Catalog/Pages 2 0 R>>"
_UNKNOWN_LOCK = b"/Encrypt<</Filter/Nobody/V 99>>/ID[<00><00>]"
_TEXT_BOMB = zlib.compress(bytes(80 * 2**20))

BAD_PAGES: list[BadPage] = [
    # files that are not there, or not files
    BadPage("missing", _nothing("missing.pdf"), PageError, "no such file"),
    BadPage("missing in a file", lambda f: _file("a.png", lambda: b"x")(f) / "b.pdf", PageError, "no such file"),
    BadPage("NUL in the name", _nothing("a\0b.pdf"), PageError, "cannot be read"),
    BadPage("name too long", _nothing("a" * 300 + ".pdf"), PageError, "cannot be read"),
    BadPage("name is not Unicode", _undecodable, PageError, "not valid Unicode"),
    BadPage("pipe", _fifo, PageError, "not a regular file"),
    BadPage("socket", _socket, PageError, "not a regular file"),
    BadPage("endless device", _link("zero.png", "/dev/zero"), PageError, "not a regular file"),
    BadPage("dangling link", _link("gone.pdf", "nowhere.pdf"), PageError, "no such file"),
    BadPage("link to itself", _link("self.pdf", "self.pdf"), PageError, "cannot be read"),
    BadPage("other type", _file("letter.docx", lambda: b"PK"), PageError, "not a page file"),
    BadPage("text file", _file("notes.txt", lambda: b"hello"), PageError, "not a page file"),
    # PDFs
    BadPage("empty PDF", _file("a.pdf", lambda: b""), PageError, "empty (0 bytes)"),
    BadPage("garbage PDF", _file("a.pdf", lambda: b"hello world " * 99), PageError, _NOT_PDF),
    BadPage("PDF header only", _file("a.pdf", lambda: b"%PDF-1.7\n"), PageError, _NOT_PDF),
    BadPage("truncated PDF", _file("a.pdf", lambda: one_page_pdf()[:90]), PageError, _NOT_PDF),
    BadPage("zeros named pdf", _file("a.pdf", lambda: bytes(4096)), PageError, _NOT_PDF),
    BadPage("PNG named pdf", _file("a.pdf", lambda: image_bytes("PNG")), PageError, _NOT_PDF),
    BadPage("PDF without catalog", _file("a.pdf", lambda: pdf_bytes(b"<</Type/X>>")), PageError, _NO_PAGES),
    BadPage("PDF without page tree", _file("a.pdf", lambda: pdf_bytes(b"<</Type/Catalog>>")), PageError, _NO_PAGES),
    BadPage("PDF of no pages", _file("a.pdf", lambda: one_page_pdf(kids=b"[]", count=b"0")), PageError, _NO_PAGES),
    BadPage(
        "PDF page tree in a circle",
        _file("a.pdf", lambda: pdf_bytes(_CATALOG, b"<</Type/Pages/Kids[2 0 R]/Count 2>>")),
        PageError,
        f"page 1: the page is {_LOST}",
    ),
    BadPage(
        "PDF page object missing",
        _file("a.pdf", lambda: one_page_pdf(kids=b"[3 0 R 99 0 R]", count=b"2")),
        PageError,
        f"page 2: the page is {_LOST}",
    ),
    BadPage(
        "PDF page null",
        _file("a.pdf", lambda: one_page_pdf(kids=b"[3 0 R null 3 0 R]", count=b"3")),
        PageError,
        f"page 2: the page is {_LOST}",
    ),
    BadPage(
        "PDF announcing a million pages",
        _file("a.pdf", lambda: one_page_pdf(count=b"1000000")),
        PageError,
        f"page 2: the page is {_LOST}",
    ),
    BadPage(
        "PDF crop box beside the page",
        _file("a.pdf", lambda: one_page_pdf(extra=b"/CropBox[1000 1000 1200 1200]")),
        PageError,
        "page 1: the page has no visible area",
    ),
    BadPage(
        "PDF page a strip",
        _file("a.pdf", lambda: one_page_pdf(b"[0 0 1 2000000]")),
        PageError,
        "page 1: 1 x 2000000: one side is more than 200 times the other",
    ),
    BadPage(
        "encrypted PDF", _file("a.pdf", lambda: encrypted_pdf("geheim")), PageError, "encrypted: give its password"
    ),
    BadPage(
        "PDF of unknown encryption",
        _file("a.pdf", lambda: pdf_bytes(_CATALOG, b"<</Type/Pages/Kids[]/Count 0>>", trailer=_UNKNOWN_LOCK)),
        PageError,
        "unknown encryption",
    ),
    # images
    BadPage("empty image", _file("a.png", lambda: b""), PageError, "empty (0 bytes)"),
    BadPage("garbage image", _file("a.jpg", lambda: b"hello world " * 99), PageError, _NOT_IMAGE),
    BadPage("PDF named png", _file("a.png", one_page_pdf), PageError, _NOT_IMAGE),
    BadPage("SVG named png", _file("a.png", lambda: b"<svg xmlns='x' width='9' height='9'/>"), PageError, _NOT_IMAGE),
    BadPage(
        "EPS named png",
        _file("a.png", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"),
        PageError,
        _NOT_IMAGE,
    ),
    BadPage("PNG of no width", _file("a.png", lambda: png_bytes(0, 9)), PageError, "a.png: "),
    BadPage("PNG without pixels", _file("a.png", lambda: png_bytes(9, 9)), PageError, _BROKEN),
    BadPage("PNG bomb", _file("a.png", lambda: png_bytes(100_000, 100_000)), PageError, _TOO_BIG),
    BadPage(
        "PNG text bomb", _file("a.png", lambda: png_bytes(9, 9, (b"zTXt", b"k\0\0" + _TEXT_BOMB))), PageError, "a.png"
    ),
    BadPage("PNG flipped byte", _file("a.png", lambda: _flipped(image_bytes("PNG"), 60)), PageError, _BROKEN),
    BadPage("truncated PNG", _file("a.png", lambda: _half(image_bytes("PNG"))), PageError, _BROKEN),
    BadPage("truncated JPEG", _file("a.jpg", lambda: _half(image_bytes("JPEG"))), PageError, _BROKEN),
    BadPage("truncated large JPEG", _file("a.jpg", lambda: _half(image_bytes("JPEG", (800, 900)))), PageError, _BROKEN),
    BadPage("truncated WebP", _file("a.webp", lambda: _half(image_bytes("WEBP"))), PageError, "a.webp: "),
    BadPage("truncated GIF", _file("a.gif", lambda: _half(image_bytes("GIF", mode="P"))), PageError, _BROKEN),
    BadPage("truncated BMP", _file("a.bmp", lambda: _half(image_bytes("BMP"))), PageError, _BROKEN),
    BadPage("truncated TIFF", _file("a.tif", lambda: _half(image_bytes("TIFF"))), PageError, "a.tif: "),
    BadPage("image a strip", _file("a.png", lambda: image_bytes("PNG", (402, 2))), PageError, "402 x 2: one side"),
    BadPage(
        "TIFF page a strip", _file("a.tif", lambda: tiff_stack(2, size=(1, 201))), PageError, "page 1: 1 x 201: one"
    ),
    BadPage("BMP of endless width", _file("a.bmp", lambda: _wide_bmp()), PageError, _TOO_BIG),
    BadPage(
        "TIFF page beyond the end", _file("a.tiff", lambda: _tiff_with_second_page({273: 2**31})), PageError, "page 2: "
    ),
    BadPage(
        "TIFF page a bomb",
        _file("a.tiff", lambda: _tiff_with_second_page({256: 100_000, 257: 100_000})),
        PageError,
        "page 2: 100000 x 100000 pixels, more than the bound",
    ),
]


def make_pdf(path: Path, pages: int = 3, *, size: tuple[float, float] = (595.28, 841.89)) -> Path:
    """A sound PDF; each page says its file and number."""
    from reportlab.pdfgen.canvas import Canvas

    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = Canvas(str(path), pagesize=size, invariant=1)
    for number in range(1, pages + 1):
        canvas.drawString(size[0] * 0.1, size[1] * 0.5, f"{path.stem} sheet {number}")
        canvas.showPage()
    canvas.save()
    return path


def make_image(path: Path, size: tuple[int, int] = (40, 30), colour: str = "white") -> Path:
    """A sound image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def open_files() -> int:
    """How many files this process holds open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def live_pdfium_objects() -> int:
    """How many documents, pages, text layers and bitmaps of PDFium are open."""
    from pypdfium2.internal import bases

    return sum(len(objects) for objects in bases.ObjectTracker.values())


def _wide_bmp() -> bytes:
    data = bytearray(image_bytes("BMP"))
    struct.pack_into("<ii", data, 18, 2**30, 2**20)
    return bytes(data)
