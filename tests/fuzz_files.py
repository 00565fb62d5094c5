"""Damaged files of every format, each read in a process of its own: what must come out are pages or PageErrors.

    python -m tests.fuzz_files 2000                     some 2,000 of them, and what became of each kind
    python -m tests.fuzz_files 1 --first 1234           number 1,234 again, alone
    python -m tests.fuzz_files 2000 --keep broken/      files that do worse than a PageError are kept there

Real small files are made at run time and read whole first; then each is damaged, by a random generator of its own
number, and its pages are loaded, opened and hashed. A process ends at its time limit or at its limit of memory. The
exit status is 1 when any file does worse than a PageError.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import json
import logging
import os
import random
import re
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from colqwen3_retrievers.errors import PageError
from colqwen3_retrievers.pages.loading import load_pages
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.pages.video import load_video
from tests.bad_pages import encrypted_pdf, one_page_pdf, pdf_bytes

SECONDS = 30
MOST_RSS = 3 * 2**30
ADDRESS_SPACE = 8 * 2**30  # a guard for the machine; what counts is MOST_RSS
VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".mov", ".avi", ".ts", ".mpg", ".flv", ".wmv"}


# -- whole files -------------------------------------------------------------------------------------------------------


def whole_files() -> dict[str, bytes]:
    """Make small files of all formats that are read, by name; the suffix decides how each is read."""
    return {**_images(), **_pdfs(), **_videos()}


def _picture(mode: str = "RGB", size: tuple[int, int] = (61, 47)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    noise[10:30] = 230  # something to compress
    return Image.fromarray(noise).convert(mode)


def _saved(image: Image.Image, kind: str, *more: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    if more:
        options = {**options, "save_all": True, "append_images": [one.copy() for one in more]}
    image.copy().save(file, kind, **options)  # Pillow leaves settings of a format behind in the image
    return file.getvalue()


def _images() -> dict[str, bytes]:
    rgb, rgba, grey, palette, bits = map(_picture, ("RGB", "RGBA", "L", "P", "1"))
    more = [_picture(size=(61, 47)).transpose(Image.Transpose.ROTATE_180), rgb.copy()]
    exif = Image.Exif()
    exif[274] = 6  # turned
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    floats = Image.fromarray(np.asarray(grey).astype(np.float32) * 10)
    files = {
        "rgb.png": _saved(rgb, "PNG"), "alpha.png": _saved(rgba, "PNG", exif=exif), "deep.png": _saved(deep, "PNG"),
        "palette.png": _saved(palette, "PNG", transparency=0), "bits.png": _saved(bits, "PNG"),
        "animated.png": _saved(rgb, "PNG", *more),
        "rgb.jpg": _saved(rgb, "JPEG", exif=exif), "grey.jpg": _saved(grey, "JPEG"),
        "progressive.jpeg": _saved(rgb, "JPEG", progressive=True), "cmyk.jpg": _saved(_picture("CMYK"), "JPEG"),
        "mpo.jpg": _saved(rgb, "MPO", *more),
        "lossy.webp": _saved(rgb, "WEBP"), "lossless.webp": _saved(rgba, "WEBP", lossless=True),
        "animated.webp": _saved(rgb, "WEBP", *more),
        "still.gif": _saved(palette, "GIF"), "animated.gif": _saved(rgb, "GIF", *more),
        "rgb.bmp": _saved(rgb, "BMP"), "palette.bmp": _saved(palette, "BMP"), "bits.bmp": _saved(bits, "BMP"),
        "raw.tif": _saved(rgb, "TIFF"), "big.tiff": _saved(rgb, "TIFF", big_tiff=True),
        "deep.tif": _saved(deep, "TIFF"), "floats.tif": _saved(floats, "TIFF"),
        "fax.tif": _saved(bits, "TIFF", compression="group4"),
        "pages.tif": _saved(rgb, "TIFF", *more, compression="tiff_lzw"),
        "ppm.png": _saved(rgb, "PPM"), "ico.png": _saved(rgba, "ICO", sizes=[(32, 32)]),
    }  # fmt: skip
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        files[f"{compression}.tiff"] = _saved(rgb, "TIFF", compression=compression)
    wide = Image.new("RGB", (4000, 3000), "red")  # a few bytes that become 36 MB
    files["wide.webp"] = _saved(wide, "WEBP", lossless=True)
    files["wide.tif"] = _saved(Image.new("1", wide.size), "TIFF", compression="group4")
    files["wide.png"] = _saved(wide.convert("P"), "PNG")
    if "JPEG2000" in Image.SAVE:
        files["jp2.png"] = _saved(rgb, "JPEG2000")
    if "AVIF" in Image.SAVE:
        files["avif.png"] = _saved(rgb, "AVIF")
    return files


def _pdfs() -> dict[str, bytes]:
    text = b"BT /F1 24 Tf 72 700 Td (Revenue rose.) Tj ET 0 0 1 rg 72 72 200 100 re f"
    field = b"<</Type/Annot/Subtype/Widget/FT/Tx/T(name)/V(Ada)/Rect[72 600 200 620]/AP<</N 6 0 R>>>>"
    note = b"<</Type/Annot/Subtype/FreeText/Contents(Paid)/DA(/F1 12 Tf)/Rect[72 500 200 520]/AP<</N 6 0 R>>>>"
    pattern = b"<</Type/Pattern/PatternType 1/PaintType 1/TilingType 1/BBox[0 0 9 9]/XStep 9/YStep 9/Resources<<>>"
    form = pdf_bytes(
        b"<</Type/Catalog/Pages 2 0 R/AcroForm<</Fields[4 0 R]/DR<</Font<</F1 7 0 R>>>>>>>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 700]/Annots[4 0 R 5 0 R]/Contents 8 0 R"
        b"/Resources<</XObject<</X 6 0 R>>/Font<</F1 7 0 R>>/Pattern<</P 9 0 R>>>>>>",
        field,
        note,
        b"<</Type/XObject/Subtype/Form/BBox[0 0 128 20]/Resources<</Font<</F1 7 0 R>>>>/Length 33>>\nstream\n"
        b"BT /F1 12 Tf 2 4 Td (Ada Ada) Tj ET\nendstream",
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        b"<</Length 47>>\nstream\n/X Do q 2 0 0 2 9 9 cm /X Do Q /Pattern cs /P scn \nendstream",
        pattern + b"/Length 11>>\nstream\n0 0 5 5 re f\nendstream",
    )
    return {
        "text.pdf": one_page_pdf(content=text), "form.pdf": form, "encrypted.pdf": encrypted_pdf(""),
        "scans.pdf": _saved(_picture(), "PDF", _picture("L")),
        "bits.pdf": _saved(_picture("1"), "PDF"),
    }  # fmt: skip


def _videos() -> dict[str, bytes]:
    import av

    kinds = {
        "mp4": ("mp4", "mpeg4"), "mkv": ("matroska", "mpeg4"), "webm": ("webm", "libvpx"), "mov": ("mov", "mjpeg"),
        "avi": ("avi", "mpeg4"), "ts": ("mpegts", "mpeg2video"), "mpg": ("mpeg", "mpeg1video"), "flv": ("flv", "flv"),
        "wmv": ("asf", "wmv2"),
    }  # fmt: skip
    files = {}
    for suffix, (container, codec) in kinds.items():
        file = io.BytesIO()
        with av.open(file, "w", container) as output:
            stream = output.add_stream(codec, rate=25)
            stream.width, stream.height = 64, 48
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for shift in range(0, 50, 5):
                picture = np.roll(np.asarray(_picture(size=(64, 48))), shift, axis=0)
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                    output.mux(packet)
            for packet in stream.encode():
                output.mux(packet)
        files[f"video.{suffix}"] = file.getvalue()
    return files


# -- damage ------------------------------------------------------------------------------------------------------------

_NUMBERS = [0, 1, 2, 7, 8, 127, 128, 255, 256, 1000, 16_383, 32_767, 65_535, 65_536, 10**6, 2**31 - 1, 2**31, 2**32 - 1]


def damaged(data: bytes, suffix: str, rng: random.Random) -> bytes:
    """Return a file damaged in a few places, its checksums mended where its decoder would stop at them."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        kinds = [_bits, _bytes, _number, _number, _cut, _doubled, _tail] + [_pdf_token] * 8 * (suffix == ".pdf")
        rng.choice(kinds)(changed, rng)
        if not changed:
            return data[:1]
    return _with_checksums(bytes(changed)) if rng.random() < 0.9 else bytes(changed)


def _place(data: bytearray, rng: random.Random) -> int:
    """Return a position, half of the time in the head, where sizes and offsets are."""
    return rng.randrange(min(len(data), 160) if rng.random() < 0.5 else len(data))


def _bits(data: bytearray, rng: random.Random) -> None:
    data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _bytes(data: bytearray, rng: random.Random) -> None:
    at = _place(data, rng)
    data[at : at + rng.randint(1, 8)] = rng.randbytes(rng.randint(1, 8))


def _number(data: bytearray, rng: random.Random) -> None:
    number = rng.choice(_NUMBERS)
    layout = rng.choice([">I", "<I", ">H", "<H", ">Q", "B"])
    size = struct.calcsize(layout)
    at = _place(data, rng)
    data[at : at + size] = struct.pack(layout, number % 256**size)


def _cut(data: bytearray, rng: random.Random) -> None:
    at = _place(data, rng)
    del data[at : at + rng.choice([1, 4, 64, len(data)])]


def _doubled(data: bytearray, rng: random.Random) -> None:
    at = _place(data, rng)
    data[at:at] = data[at : at + rng.choice([1, 4, 64, 4096])] * rng.choice([1, 2, 50])


def _tail(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:] = rng.choice([b"\xff", b"\0", b"a"]) * (len(data) - at)


def _pdf_token(data: bytearray, rng: random.Random) -> None:
    """Exchange a number or a name of a PDF's objects."""
    tokens = list(re.finditer(rb"(?<![\w.])-?\d+(\.\d+)?(?![\w.])|/\w+", data))
    if not tokens:
        return
    token, other = rng.choice(tokens), rng.choice(tokens).group()
    new = other if token.group()[:1] == b"/" else rng.choice([other, b"-1", b"1e9", str(rng.choice(_NUMBERS)).encode()])
    data[token.start() : token.end()] = new


def _with_checksums(data: bytes) -> bytes:
    """Return a PNG with right checksums, and anything else as it is."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        parts.append(data[at:end] + zlib.crc32(data[at + 4 : end]).to_bytes(4, "big"))
        at = end + 4
    return b"".join([*parts, data[at:]])


# -- reading -----------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of a file.

    Attributes:
        pages: opened and hashed.
        errors: PageErrors, of the file or of single pages.
        fault: what is worse than those, or "".
        rss: most resident bytes of its process.
    """

    name: str
    number: int
    pages: int
    errors: int
    fault: str
    rss: int


def _read(path: Path, number: int) -> tuple[int, int, str]:
    counts: Counter[str] = Counter()

    def failed(_: PageError) -> None:
        counts["errors"] += 1

    def opened(page: Page) -> None:
        try:
            _ = page.image
            assert len(page.sha256) == 64
            counts["pages"] += 1
        except PageError as error:
            failed(error)

    # every second one as under `python -W error`
    warnings.simplefilter("error" if number % 2 else "ignore")
    try:
        if path.suffix in VIDEO_SUFFIXES:
            try:
                opened(Page(source=path.name, video=load_video(path)))
            except PageError as error:
                failed(error)
        else:
            for page in load_pages(path, on_error=failed):
                opened(page)
    except BaseException as exc:
        place = traceback.extract_tb(exc.__traceback__)[-1]
        return counts["pages"], counts["errors"], f"{exc!r:.200} in {Path(place.filename).name}:{place.lineno}"
    return counts["pages"], counts["errors"], ""


def _forked(work: Callable[[], object], seconds: int = SECONDS) -> tuple[int, int]:
    """Start work in a child, which ends at its time or memory; gives its process and where its result comes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    import resource  # which Windows lacks, as it does fork

    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process also inside a decoder
        signal.alarm(seconds)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders of C write there
        with os.fdopen(writer, "w") as out:
            json.dump(work(), out)
        os._exit(0)
    except BaseException:
        os._exit(1)


def outcomes(
    folder: Path, count: int, *, first: int = 0, seed: int = 0, workers: int = 2, seconds: int = SECONDS,
    keep: Path | None = None,
) -> Iterator[Outcome]:  # fmt: skip
    """Read all whole files, as numbers below 0, then ``count`` damaged ones from number ``first`` on."""
    maker, reader = _forked(lambda: [
        [name, (folder / name).write_bytes(data)] for name, data in whole_files().items()
    ], seconds=120)  # fmt: skip
    with os.fdopen(reader) as told:
        names = [name for name, _ in json.loads(told.read() or "[]")]
    assert os.waitpid(maker, 0)[1] == 0, "the whole files cannot be made here"
    assert names
    for module in ("av", "pypdfium2"):  # once for all children
        importlib.import_module(module)
    Image.init()
    waiting = [*range(-len(names), 0), *range(first, first + count)][::-1]
    running: dict[int, tuple[int, int, Path]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            number = waiting.pop()
            name = names[number % len(names)]
            data = (folder / name).read_bytes()
            path = folder / f"{number}-{name}"
            if number >= 0:
                data = damaged(data, path.suffix, random.Random(f"{seed}/{number}"))
            path.write_bytes(data)
            child, reader = _forked(functools.partial(_read, path, number), seconds)
            running[child] = number, reader, path
        child, status, usage = os.wait4(-1, 0)
        number, reader, path = running.pop(child)
        with os.fdopen(reader) as told:
            text = told.read()
        pages, errors, fault = json.loads(text) if status == 0 else (0, 0, "")
        if status != 0:
            code = os.waitstatus_to_exitcode(status)
            signalled = signal.Signals(-code).name if code < 0 else ""
            fault = "hangs" if signalled == "SIGALRM" else f"the process dies: {signalled or code}"
        rss = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if not fault and rss > MOST_RSS:
            fault = "takes too much memory"
        if number < 0 and not fault and (errors or not pages):
            fault = "the whole file is not read"
        if fault and keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / path.name).write_bytes(path.read_bytes())
        path.unlink()
        yield Outcome(names[number % len(names)], number, pages, errors, fault, rss)


def main(arguments: list[str] | None = None) -> int:
    """Read damaged files and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("count", type=int, nargs="?", default=2000, help="of damaged files; 2000 by default")
    parser.add_argument("--first", type=int, default=0, help="the first one's number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"each may take; {SECONDS} by default")
    parser.add_argument("--keep", type=Path, help="a folder for files that do worse than a PageError")
    given = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    results, start = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(outcomes(
        Path(folder), given.count, first=given.first, seed=given.seed, workers=given.workers, seconds=given.seconds,
        keep=given.keep,
    )) as reading:  # fmt: skip
        for one in reading:
            results.append(one)
            if one.fault:
                _say(f"{one.number:6} {one.name}: {one.fault} ({one.rss / 2**20:,.0f} MiB)")
    faults = [one.fault for one in results if one.fault]
    kinds = ("hangs", "the process dies", "takes too much memory")
    counts = {kind: sum(fault.startswith(kind) for fault in faults) for kind in kinds}
    largest = max(results, key=lambda one: one.rss)
    _say(
        f"{len(results):,} files, {given.count:,} of them damaged, in {time.monotonic() - start:.0f} s: "
        f"{sum(one.pages for one in results):,} pages, {sum(one.errors for one in results):,} PageErrors, "
        f"{len(faults) - sum(counts.values())} foreign errors, {counts['hangs']} hangs, "
        f"{counts['the process dies']} dead processes, {counts['takes too much memory']} above "
        f"{MOST_RSS / 2**30:.0f} GiB; largest {largest.rss / 2**20:,.0f} MiB ({largest.number} {largest.name})"
    )
    return 1 if faults else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
