from __future__ import annotations

import io
import logging
import os
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin, features

from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.pages import loading
from colqwen3_retrievers.pages.files import find_page_files
from colqwen3_retrievers.pages.loading import MAX_TIFF_PAGES, load_pages
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.pages.pdf import MAX_PAGES_LOST_IN_A_ROW
from tests.bad_pages import (
    BAD_PAGES,
    BadPage,
    image_bytes,
    live_pdfium_objects,
    make_image,
    make_pdf,
    one_page_pdf,
    open_files,
    tiff_stack,
)

pdfium = pytest.importorskip("pypdfium2")
pytest.importorskip("reportlab")

# --- broken files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD_PAGES, ids=lambda bad: bad.name)
def test_a_bad_file_raises_an_error_that_names_it(bad: BadPage, tmp_path: Path):
    path = bad.make(tmp_path)
    before = open_files(), live_pdfium_objects()
    with pytest.raises(bad.error) as caught:
        list(load_pages(path))
    assert bad.text in str(caught.value)
    assert path.name in str(caught.value)
    assert path.name in caught.value.source
    # closed already, not only once the traceback that holds the frames is gone
    assert (open_files(), live_pdfium_objects()) == before


_TWO_ERRORS = ("PDF page tree in a circle", "TIFF page a strip")


@pytest.mark.parametrize("bad", BAD_PAGES, ids=lambda bad: bad.name)
def test_a_bad_file_is_skipped_with_a_warning_and_the_next_one_read(bad: BadPage, tmp_path: Path, caplog):
    path = bad.make(tmp_path)
    good = make_image(tmp_path / "sub" / "good.png")
    with caplog.at_level(logging.WARNING):
        pages = list(load_pages([path, good], on_error="skip"))
    assert pages[-1].id == "good.png#page=1"
    warnings = [record for record in caplog.records if record.name == "colqwen3_retrievers.pages"]
    assert warnings and all(record.levelno == logging.WARNING for record in warnings)
    assert bad.text in warnings[0].getMessage()
    assert len(warnings) == (MAX_PAGES_LOST_IN_A_ROW + 1 if "million" in bad.name else 1 + (bad.name in _TWO_ERRORS))


def test_there_are_many_distinct_bad_files():
    assert len({bad.name for bad in BAD_PAGES}) == len(BAD_PAGES) >= 25


@pytest.mark.parametrize(
    ("kids", "count", "numbers"), [(b"[3 0 R null 3 0 R]", b"3", [1, 3]), (b"[3 0 R 99 0 R]", b"2", [1])]
)
def test_skipping_keeps_the_numbers_of_the_pages_that_can_be_read(tmp_path, kids, count, numbers):
    (tmp_path / "a.pdf").write_bytes(one_page_pdf(kids=kids, count=count))
    assert [page.number for page in load_pages(tmp_path, on_error="skip")] == numbers


def test_a_file_announcing_a_million_pages_is_given_up(tmp_path):
    (tmp_path / "a.pdf").write_bytes(one_page_pdf(count=b"1000000"))
    errors: list[PageError] = []
    assert [page.number for page in load_pages(tmp_path, on_error=errors.append)] == [1]
    assert len(errors) == MAX_PAGES_LOST_IN_A_ROW + 1
    assert "given up" in str(errors[-1])


def test_many_broken_pages_with_good_ones_between_do_not_end_a_file(tmp_path):
    count = MAX_PAGES_LOST_IN_A_ROW + 20
    (tmp_path / "a.pdf").write_bytes(one_page_pdf(kids=b"[%s]" % (b"3 0 R null " * count), count=b"%d" % (2 * count)))
    errors: list[PageError] = []
    pages = load_pages(tmp_path, on_error=errors.append, max_pixels=1000)
    assert [page.number for page in pages] == list(range(1, 2 * count, 2))
    assert [error.page for error in errors] == list(range(2, 2 * count + 1, 2))


def test_an_error_function_is_told_and_may_raise(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"no")
    (tmp_path / "b.png").write_bytes(b"no")
    told: list[PageError] = []
    assert list(load_pages(tmp_path, on_error=told.append)) == []
    assert [error.source for error in told] == ["a.pdf", "b.png"]

    def stop(error: PageError) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError):
        list(load_pages(tmp_path, on_error=stop))


@pytest.mark.parametrize("name", ["TIFF page beyond the end", "TIFF page a bomb"])
def test_a_broken_page_of_a_tiff_is_skipped_alone(tmp_path, name):
    bad = next(bad for bad in BAD_PAGES if bad.name == name)
    errors: list[PageError] = []
    pages = list(load_pages(bad.make(tmp_path), on_error=errors.append))
    assert [page.number for page in pages] == [1, 3]
    assert [(error.source, error.page) for error in errors] == [("a.tiff", 2)]


def test_an_unreadable_file_and_folder_are_errors_for_an_ordinary_user():
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody who may not read")
    script = (
        "import os, sys; from colqwen3_retrievers.pages.loading import load_pages; os.setuid(65534)\n"
        "told = []; assert list(load_pages(sys.argv[1], on_error=told.append)) == []; print(*told, sep='|')"
    )
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        (folder / "a.png").write_bytes(image_bytes("PNG"))
        (folder / "a.png").chmod(0)
        (folder / "shut").mkdir(mode=0)
        folder.chmod(0o755)
        done = subprocess.run([sys.executable, "-c", script, name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cannot be listed: Permission denied" in done.stdout
    assert "a.png: cannot be read: Permission denied" in done.stdout


# --- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [("png", "PNG"), ("jpg", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP"), ("gif", "GIF"), ("bmp", "BMP"),
     ("tif", "TIFF"), ("tiff", "TIFF"), ("PNG", "PNG")],
)  # fmt: skip
def test_an_image_is_one_page_that_lies_in_its_file(tmp_path, suffix, kind):
    path = tmp_path / f"scan.{suffix}"
    path.write_bytes(image_bytes(kind))
    (page,) = load_pages(path)
    assert (page.id, page.number, page.label, page.text) == (f"scan.{suffix}#page=1", 1, None, "")
    assert page.image_path == path
    assert page.image.size == (64, 48)
    assert page.metadata == {
        "file_name": path.name, "file_type": kind.lower(), "page_count": 1, "width": 64, "height": 48,
    }  # fmt: skip


def test_the_size_of_a_turned_photograph_is_the_upright_one(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "b.png", "c.webp", "d.tif"):
        Image.new("RGB", (40, 30)).save(tmp_path / name, exif=exif)
    for page in load_pages(tmp_path):
        assert (page.metadata["width"], page.metadata["height"]) == page.image.size == (30, 40), page.id


def test_each_page_of_a_tiff_is_a_page(tmp_path):
    (tmp_path / "fax.tif").write_bytes(tiff_stack(4))
    pages = list(load_pages(tmp_path))
    assert [page.id for page in pages] == [f"fax.tif#page={n}" for n in (1, 2, 3, 4)]
    assert [page.image.getpixel((0, 0))[0] for page in pages] == [20, 40, 60, 80]
    assert {page.metadata["page_count"] for page in pages} == {4}


def test_tiff_pages_stay_within_the_pixel_bound_and_tell_their_own_size(tmp_path):
    (tmp_path / "fax.tif").write_bytes(tiff_stack(2, size=(300, 200)))
    for page in load_pages(tmp_path, max_pixels=10_000):
        assert 9_700 <= page.image.width * page.image.height <= 10_000
        assert (page.metadata["width"], page.metadata["height"]) == (300, 200)


def test_thumbnails_in_a_tiff_are_no_pages(tmp_path):
    full, small = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (8, 8), "blue")
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[254] = 1
    small.encoderinfo = {"tiffinfo": info}
    full.save(tmp_path / "a.tif", save_all=True, append_images=[small])
    with Image.open(tmp_path / "a.tif") as check:
        assert check.n_frames == 2
    (page,) = load_pages(tmp_path)
    assert page.image.size == (64, 64)
    assert page.metadata["page_count"] == 1


def test_a_long_tiff_page_is_not_reduced_to_a_longer_strip(tmp_path):
    from colqwen3_retrievers.models.rendering import fit_size

    (tmp_path / "a.tif").write_bytes(tiff_stack(2, size=(100, 20_000)))
    for page in load_pages(tmp_path):
        fit_size(*page.image.size, min_pixels=65_536, max_pixels=1_310_720)


def test_a_thumbnail_before_its_page_is_left_out(tmp_path):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[254] = 1
    full, small = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (8, 8), "blue")
    full.encoderinfo = {"tiffinfo": TiffImagePlugin.ImageFileDirectory_v2()}
    small.save(tmp_path / "a.tif", save_all=True, append_images=[full], tiffinfo=info)
    (page,) = load_pages(tmp_path)
    assert page.image.size == (64, 64)


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "b.webp", save_all=True, append_images=frames[1:], lossless=True)
    for page in load_pages(tmp_path):
        assert page.metadata["page_count"] == 1
        assert page.image.getpixel((5, 5))[0] > 200


# --- data in memory ------------------------------------------------------------------------------------------------


def upload(data: bytes, name: object) -> io.BytesIO:
    file = io.BytesIO(data)
    file.name = name  # as uploads of web frameworks have it
    return file


def test_data_gives_the_pages_of_the_same_files(tmp_path):
    make_pdf(tmp_path / "2024" / "a.pdf", 2)
    make_image(tmp_path / "2024" / "b.png")
    (tmp_path / "2024" / "c.tif").write_bytes(tiff_stack(2))
    paths = sorted((tmp_path / "2024").iterdir())
    expected = [(page.id, page.sha256, page.metadata) for page in load_pages(tmp_path)]

    def read(items: object) -> list[tuple[object, ...]]:
        return [(page.id, page.sha256, page.metadata) for page in load_pages(items)]

    for convert in (bytes, bytearray, memoryview, io.BytesIO):
        assert read([(f"2024/{path.name}", convert(path.read_bytes())) for path in paths]) == expected
    files = [path.open("rb") for path in paths]
    assert [page.id for page in load_pages(files)] == [page.id for page in load_pages(paths)]
    assert [(page.id, page.sha256, page.metadata) for page in load_pages(files, root=tmp_path)] == expected
    assert not any(file.closed for file in files)
    for file in files:
        file.close()


def test_a_file_object_is_read_from_its_start_and_named_by_its_file(tmp_path):
    data = make_pdf(tmp_path / "a.pdf", 1).read_bytes()
    file = upload(b"", "folder/report.pdf")
    file.write(data)
    assert [(page.id, page.text) for page in load_pages(file)] == [("report.pdf#page=1", "a sheet 1")]
    assert [page.id for page in load_pages(("mail 7/report", data))] == ["mail 7/report#page=1"]  # no suffix
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.pdf", "inner/a.pdf")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, archive.open("inner/a.pdf") as member:
        assert [page.id for page in load_pages([tmp_path / "a.pdf", ("z/a.pdf", member)])] == [
            "a.pdf#page=1", "z/a.pdf#page=1",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("items", "text"),
    [
        (b"%PDF-1.7", "a bytes has no file name"),
        ([b"%PDF-1.7"], "a bytes has no file name"),
        (io.BytesIO(b"%PDF-1.7"), "a BytesIO has no file name"),
        (upload(b"x", 5), "a BytesIO has no file name"),
        (("", b"x"), "expected a name"),
        ((Path("a.pdf"), b"x"), "expected a name"),
        ([("a.pdf", b"x"), ("a.pdf", b"y")], r"give each a name, as a pair"),
        ([("a.pdf", 3)], "expected a non-empty path"),
    ],
)
def test_data_without_a_name_of_its_own_is_a_config_error(items, text):
    with pytest.raises(ConfigError, match=text):
        load_pages(items)


def test_data_that_cannot_be_read_is_an_error_that_names_it_and_is_skipped(tmp_path):
    closed = upload(b"x", "closed.pdf")
    closed.close()

    class Broken(io.BytesIO):
        name = "broken.pdf"

        def read(self, *_: object) -> bytes:
            raise RuntimeError("connection lost")

    bad = [
        closed,
        Broken(),
        ("empty.png", b""),
        ("cut.png", image_bytes("PNG")[:99]),
        ("junk.pdf", b"junk"),
        ("x", b"?"),
    ]
    errors: list[PageError] = []
    pages = list(load_pages([*bad, ("good.png", image_bytes("PNG"))], on_error=errors.append))
    assert [page.id for page in pages] == ["good.png#page=1"]
    assert [str(error) for error in errors] == [
        "closed.pdf: cannot be read: I/O operation on closed file.",
        "broken.pdf: cannot be read: connection lost",
        "empty.png: the file is empty (0 bytes)",
        str(errors[3]),
        "junk.pdf: not a PDF, or damaged beyond repair",
        "x: not an image that can be read",
    ]
    assert str(errors[3]).startswith("cut.png: the image is broken")
    with pytest.raises(ConfigError, match=r"notes\.pdf: open the file in binary mode"):
        list(load_pages(("notes.pdf", io.StringIO("text"))))


def test_files_are_still_found_by_path_alone():
    for item in (b"x", ("a.pdf", b"x"), io.BytesIO(b"x")):
        for paths in (item, [item]):
            with pytest.raises(
                ConfigError, match="expected paths of files; read bytes and file objects with load_pages"
            ):
                find_page_files(paths)


def chained_tiff(count: int) -> bytes:
    """A TIFF of one white pixel, shown by ``count`` directories."""
    entries = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 1}
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, entries[tag]) for tag in entries)
    size = len(body) + 4
    links = [struct.pack("<I", 10 + size * number if number < count else 0) for number in range(1, count + 1)]
    return struct.pack("<2sHI", b"II", 42, 10) + b"\xff\0" + b"".join(body + link for link in links)


def test_the_first_page_of_a_tiff_of_100_000_directories_comes_at_once(tmp_path):
    (tmp_path / "a.tif").write_bytes(chained_tiff(100_000))
    start = time.monotonic()
    page = next(load_pages(tmp_path))
    assert time.monotonic() - start < 5
    assert page.image.getpixel((0, 0)) == (255, 255, 255)
    assert page.metadata["page_count"] == MAX_TIFF_PAGES


def test_the_pages_of_a_tiff_are_bounded_and_its_links_may_not_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "MAX_TIFF_PAGES", 4)
    errors: list[PageError] = []
    for count, expected in ((3, []), (4, []), (5, ["a.tif: more than 4 pages; the others are left out"])):
        errors.clear()
        (tmp_path / "a.tif").write_bytes(chained_tiff(count))
        assert [page.number for page in load_pages(tmp_path, on_error=errors.append)] == list(
            range(1, min(count, 4) + 1)
        )
        assert [str(error) for error in errors] == expected
    data = chained_tiff(2)
    for link, numbers, expected in ((10, [1, 2], []), (10**9, [1, 2], ["a.tif: the TIFF's list of pages is broken"])):
        errors.clear()
        (tmp_path / "a.tif").write_bytes(data[:-4] + struct.pack("<I", link))
        assert [page.number for page in load_pages(tmp_path, on_error=errors.append)] == numbers
        assert [str(error) for error in errors] == expected


@pytest.mark.parametrize(("order", "big"), [("<", True), ("<", False), (">", False)])  # Pillow reads no other
def test_tiffs_of_64_bits_and_of_either_byte_order_are_read(tmp_path, order, big):
    count, entry, link = ("Q", "HHQQ", "Q") if big else ("H", "HHII", "I")
    count, entry, link = order + count, order + entry, order + link
    entries = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 16, 277: 1, 278: 1, 279: 1}

    def directory(start: int, extra: dict[int, int], *, last: bool = False) -> bytes:
        tags = sorted((entries | extra).items())
        body = b"".join(struct.pack(entry, tag, 16 if big else 4, 1, value) for tag, value in tags)
        body = struct.pack(count, len(tags)) + body
        return body + struct.pack(link, 0 if last else start + len(body) + struct.calcsize(link))

    data = b"II" if order == "<" else b"MM"
    data += struct.pack(f"{order}HHHQ", 43, 8, 0, 24) if big else struct.pack(f"{order}HI", 42, 24)
    data = data.ljust(16, b"\0") + b"\xff" + bytes(7)
    for extra, last in (({}, False), ({254: 1}, False), ({}, True)):
        data += directory(len(data), extra, last=last)
    (tmp_path / "a.tif").write_bytes(data)
    assert [page.metadata["page_count"] for page in load_pages(tmp_path)] == [2, 2]  # the second is a thumbnail


@pytest.mark.parametrize("name", ["a.avif", "m.png"])
def test_an_avif_that_breaks_its_decoder_is_skipped(tmp_path, name):
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(file, "AVIF")
    data = file.getvalue()
    start = data.index(b"mdat") + 4
    (tmp_path / name).write_bytes(data[:start] + b"\xff" * (len(data) - start))
    (tmp_path / "z.png").write_bytes(image_bytes("PNG"))
    assert [page.source for page in load_pages(tmp_path, on_error="skip")] == ["z.png"]
    with pytest.raises(PageError, match=f"{name}: the image is broken: "):
        Page(id="a", image=tmp_path / name).sha256  # noqa: B018 - computed when it is read


@pytest.mark.parametrize("error", [RuntimeError("x"), MemoryError(), UserWarning("x"), AssertionError()])
def test_whatever_a_decoder_raises_ends_one_file_alone(tmp_path, monkeypatch, error):
    for name in ("a.png", "z.tif"):
        (tmp_path / name).write_bytes(image_bytes("PNG" if name == "a.png" else "TIFF"))

    def broken(self):
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", broken)
    errors: list[PageError] = []
    assert [page.source for page in load_pages(tmp_path, on_error=errors.append)] == ["z.tif"]
    assert [(bad.source, bad.__cause__) for bad in errors] == [("a.png", error)]


@pytest.mark.parametrize("size", [(10_000, 9_000), (13_000, 13_700), (8_000, 8_000)])
def test_a_large_tiff_is_read_or_refused_without_a_warning(tmp_path, size):
    Image.MAX_IMAGE_PIXELS, bound = None, Image.MAX_IMAGE_PIXELS
    try:
        Image.new("1", size, 1).save(tmp_path / "a.tif", compression="group4")
    finally:
        Image.MAX_IMAGE_PIXELS = bound
    errors: list[PageError] = []
    pages = list(load_pages(tmp_path, on_error=errors.append))
    assert len(pages) + len(errors) == 1
    assert len(pages) == (size[0] * size[1] <= 75_000_000)
