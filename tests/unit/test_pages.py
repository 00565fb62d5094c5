from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.page_files import find_page_files
from colqwen3_retrievers.pages import load_pages
from colqwen3_retrievers.pdf import MAX_PAGES_LOST_IN_A_ROW, clean_text, scale_for
from tests.bad_pages import BAD_PAGES, BadPage, encrypted_pdf, image_bytes, one_page_pdf, pdf_bytes, tiff_stack

pdfium = pytest.importorskip("pypdfium2")
reportlab = pytest.importorskip("reportlab")

BOUND = 1_310_720


def make_pdf(path: Path, pages: int = 3, *, size: tuple[float, float] = (595.28, 841.89)) -> Path:
    from reportlab.pdfgen.canvas import Canvas

    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = Canvas(str(path), pagesize=size, invariant=1)
    for number in range(1, pages + 1):
        canvas.drawString(size[0] * 0.1, size[1] * 0.5, f"{path.stem} sheet {number}")
        canvas.showPage()
    canvas.save()
    return path


def make_image(path: Path, size: tuple[int, int] = (40, 30), colour: str = "white") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def live_pdfium_objects() -> int:
    from pypdfium2.internal import bases

    return sum(len(objects) for objects in bases.ObjectTracker.values())


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
    del caught
    gc.collect()
    assert (open_files(), live_pdfium_objects()) == before


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
    assert len(warnings) == (MAX_PAGES_LOST_IN_A_ROW + 1 if "million" in bad.name else 1 + ("circle" in bad.name))


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


def test_a_broken_page_of_a_tiff_is_skipped_alone(tmp_path):
    bad = next(bad for bad in BAD_PAGES if bad.name == "TIFF page broken")
    errors: list[PageError] = []
    pages = list(load_pages(bad.make(tmp_path), on_error=errors.append))
    assert [page.number for page in pages] == [1, 3]
    assert [(error.source, error.page) for error in errors] == [("a.tiff", 2)]


def test_an_unreadable_file_and_folder_are_errors_for_an_ordinary_user():
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody who may not read")
    script = (
        "import os, sys; from colqwen3_retrievers.pages import load_pages; os.setuid(65534)\n"
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


# --- PDFs ----------------------------------------------------------------------------------------------------------


def test_pages_of_a_pdf_carry_ids_text_and_metadata(tmp_path):
    make_pdf(tmp_path / "year" / "report.pdf", 2)
    first, second = load_pages(tmp_path)
    assert (first.id, second.id) == ("year/report.pdf#page=1", "year/report.pdf#page=2")
    assert (second.source, second.number, second.label) == ("year/report.pdf", 2, None)
    assert second.text == "report sheet 2"
    assert second.metadata == {
        "file_name": "report.pdf", "file_type": "pdf", "page_count": 2, "width": 595.28, "height": 841.89,
    }  # fmt: skip
    assert str(tmp_path) not in json.dumps(second.metadata)
    assert second.image is not None and second.image.mode == "RGB"


@pytest.mark.parametrize("max_pixels", [1, 1000, 65_536, BOUND, 4_000_000])
@pytest.mark.parametrize(
    "box",
    [b"[0 0 612 792]", b"[0 0 842 595]", b"[0 0 36 36]", b"[0 0 0.01 0.01]", b"[0 0 1036800 1036800]",
     b"[0 0 1000000000 1000000000]", b"[0 0 0.5 100000]", b"[0 0 14400 3]", b"[100 100 -100 -100]", b"[0 0 NaN NaN]",
     b"[0 0 0 0]", b"[0 0 1e30 1e30]", b"[0 0 612]", b"null"],
)  # fmt: skip
def test_a_page_of_any_size_fills_the_pixel_bound_and_never_exceeds_it(tmp_path, box, max_pixels):
    (tmp_path / "a.pdf").write_bytes(one_page_pdf(box))
    (page,) = load_pages(tmp_path, max_pixels=max_pixels)
    pixels = page.image.width * page.image.height
    assert 1 <= pixels <= max_pixels
    wide = page.image.width / page.image.height
    if max_pixels >= 65_536 and 0.1 < wide < 10:
        assert pixels > 0.985 * max_pixels
        assert wide == pytest.approx(page.metadata["width"] / page.metadata["height"], rel=0.01)


def test_scale_for_is_the_largest_that_fits():
    for width, height in ((612, 792), (595.28, 841.89), (1e-3, 2e-3), (1e9, 3e8), (1000, 10)):
        scale = scale_for(width, height, BOUND)
        assert -(-width * scale // 1) * -(-height * scale // 1) <= BOUND
        assert (width * scale * 1.02) * (height * scale * 1.02) > BOUND


def corners(image: Image.Image) -> list[str]:
    names = {(255, 0, 0): "red", (0, 0, 255): "blue", (255, 255, 255): "white"}
    w, h = image.size
    return [names.get(image.getpixel(at), "other") for at in ((9, 9), (w - 9, 9), (9, h - 9), (w - 9, h - 9))]


RED_TOP_LEFT = b"1 0 0 rg 0 396 306 396 re f 0 0 1 rg 306 0 306 396 re f"  # red top left, blue bottom right


@pytest.mark.parametrize(
    ("extra", "expected", "upright"),
    [
        (b"", ["red", "white", "white", "blue"], True),
        (b"/Rotate 90", ["white", "red", "blue", "white"], False),
        (b"/Rotate 180", ["blue", "white", "white", "red"], True),
        (b"/Rotate 270", ["white", "blue", "red", "white"], False),
        (b"/CropBox[0 396 306 792]", ["red"] * 4, True),
        (b"/CropBox[306 0 612 396]", ["blue"] * 4, True),
    ],
)
def test_rotation_and_crop_box_are_those_of_a_viewer(tmp_path, extra, expected, upright):
    (tmp_path / "a.pdf").write_bytes(one_page_pdf(extra=extra, content=RED_TOP_LEFT))
    (page,) = load_pages(tmp_path)
    assert corners(page.image) == expected
    assert (page.image.height > page.image.width) == upright


def test_text_outside_the_crop_box_is_not_read(tmp_path):
    words = b"BT /F1 20 Tf 50 700 Td (above) Tj ET BT /F1 20 Tf 50 100 Td (below) Tj ET"
    (tmp_path / "a.pdf").write_bytes(one_page_pdf(content=words, extra=b"/CropBox[0 0 612 396]"))
    (page,) = load_pages(tmp_path)
    assert page.text == "below"


def test_annotations_are_drawn(tmp_path):
    square = b"/Annots[<</Type/Annot/Subtype/Square/Rect[0 0 612 792]/F 4/IC[1 0 0]/C[1 0 0]/AP<</N 6 0 R>>>>]"
    appearance = b"1 0 0 rg 0 0 612 792 re f"
    form = b"<</Type/XObject/Subtype/Form/BBox[0 0 612 792]/Length %d>>\nstream\n%s\nendstream"
    (tmp_path / "a.pdf").write_bytes(
        pdf_bytes(
            b"<</Type/Catalog/Pages 2 0 R>>",
            b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]%s>>" % square,
            b"null",
            b"null",
            form % (len(appearance), appearance),
        )
    )
    (page,) = load_pages(tmp_path)
    assert corners(page.image) == ["red"] * 4


def test_form_fields_are_drawn(tmp_path):
    from reportlab.pdfgen.canvas import Canvas

    canvas = Canvas(str(tmp_path / "form.pdf"), pagesize=(300, 200))
    canvas.acroForm.textfield(value="FILLED IN", x=40, y=80, width=220, height=40, fontSize=20)
    canvas.showPage()
    canvas.save()
    (page,) = load_pages(tmp_path)
    dark = sum(page.image.convert("L").histogram()[:100])
    assert dark > 1000  # the value's letters; an undrawn field leaves the page white


def test_labels_are_those_the_file_names(tmp_path):
    from reportlab.pdfgen.canvas import Canvas

    canvas = Canvas(str(tmp_path / "a.pdf"))
    canvas.addPageLabel(0, style="ROMAN_LOWER", start=3)
    canvas.addPageLabel(2, style="ARABIC", start=1, prefix="A-")
    for number in range(4):
        canvas.drawString(99, 99, str(number))
        canvas.showPage()
    canvas.save()
    assert [page.label for page in load_pages(tmp_path)] == ["iii", "iv", "A-1", "A-2"]


def test_an_endless_label_is_cut(tmp_path):
    nums = b"<</Type/Catalog/Pages 2 0 R/PageLabels<</Nums[0<</S/A/P(%s)>>]>>>>" % (b"x" * 100_000)
    tree = b"<</Type/Pages/Kids[3 0 R]/Count 1>>"
    (tmp_path / "a.pdf").write_bytes(pdf_bytes(nums, tree, b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>"))
    (page,) = load_pages(tmp_path)
    assert page.label == "x" * 100


def test_text_is_cleaned():
    assert clean_text("a\0b\r\nc\rd\te\x07\x9f\ufffe") == "ab\nc\nd\te"
    assert clean_text("\ud83d lone \udc00 🙂") == "lone  🙂"
    assert clean_text("exam\x02\r\nple") == "exam-\nple"
    clean_text("\ud800x").encode("utf-8")


def test_text_of_other_scripts_and_beyond_the_basic_plane_survives(tmp_path):
    cmap = (
        b"/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /X def 1 begincodespacerange <00> "
        b"<ff> endcodespacerange 4 beginbfchar <41> <D83DDE42> <42> <0416> <43> <0000> <44> <D800> "
        b"endbfchar endcmap end end"
    )
    words = b"BT /F1 20 Tf 50 700 Td (ABCDx) Tj ET"
    (tmp_path / "a.pdf").write_bytes(
        pdf_bytes(
            b"<</Type/Catalog/Pages 2 0 R>>",
            b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
            b"<</Length %d>>\nstream\n%s\nendstream" % (len(words), words),
            b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/ToUnicode 6 0 R>>",
            b"<</Length %d>>\nstream\n%s\nendstream" % (len(cmap), cmap),
        )
    )
    (page,) = load_pages(tmp_path)
    assert "\u0416" in page.text and "🙂" in page.text
    assert "\0" not in page.text
    page.text.encode("utf-8")


def test_an_encrypted_pdf_opens_with_its_password_only(tmp_path):
    (tmp_path / "a.pdf").write_bytes(encrypted_pdf("geheim"))
    make_pdf(tmp_path / "b.pdf", 1)
    assert [page.text for page in load_pages(tmp_path, password="geheim")] == ["secret", "b sheet 1"]
    with pytest.raises(PageError, match=r"a\.pdf: encrypted: the password does not fit") as caught:
        list(load_pages(tmp_path, password="wrong"))
    assert "wrong" not in str(caught.value)


def test_a_bomb_inside_a_pdf_gives_a_bounded_page(tmp_path):
    import zlib

    side = 4000  # 48 MB once inflated, 47 kB in the file
    data = zlib.compress(bytes(side * side * 3), 9)
    image = b"<</Type/XObject/Subtype/Image/Width %d/Height %d/ColorSpace/DeviceRGB/BitsPerComponent 8" % (side, side)
    draw = b"q 612 0 0 792 0 0 cm /I Do Q"
    (tmp_path / "a.pdf").write_bytes(
        pdf_bytes(
            b"<</Type/Catalog/Pages 2 0 R>>",
            b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</XObject<</I 5 0 R>>>>>>",
            b"<</Length %d>>\nstream\n%s\nendstream" % (len(draw), draw),
            image + b"/Filter/FlateDecode/Length %d>>\nstream\n%s\nendstream" % (len(data), data),
        )
    )
    (page,) = load_pages(tmp_path)
    assert page.image.width * page.image.height <= BOUND
    assert page.image.getpixel((99, 99)) == (0, 0, 0)


# --- streaming -----------------------------------------------------------------------------------------------------


def test_two_hundred_pages_stream_in_the_memory_of_one(tmp_path):
    path = make_pdf(tmp_path / "long.pdf", 200)
    pages = load_pages(path, max_pixels=200_000)
    next(pages)
    gc.collect()
    images = sum(isinstance(thing, Image.Image) for thing in gc.get_objects())
    tracemalloc.start()
    try:
        for count, page in enumerate(pages, start=2):
            if count % 20 == 0:
                del page
                # one page is still referred to by the reader, none of the earlier ones
                assert sum(isinstance(thing, Image.Image) for thing in gc.get_objects()) <= images + 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 200
    assert peak < 3 * 200_000 * 3  # bitmap buffers are Python's memory: at most a few pages of three bytes a pixel


def test_nothing_is_rendered_before_it_is_asked_for(tmp_path, monkeypatch):
    path = make_pdf(tmp_path / "a.pdf", 5)
    rendered: list[float] = []
    original = pdfium.PdfPage.render

    def counted(self, *args, **kwargs):
        rendered.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(pdfium.PdfPage, "render", counted)
    before = open_files()
    pages = load_pages(path)
    assert (len(rendered), open_files()) == (0, before)
    next(pages)
    assert len(rendered) == 1
    next(pages)
    assert len(rendered) == 2
    pages.close()


@pytest.mark.parametrize("suffix", ["pdf", "tiff"])
def test_stopping_early_closes_the_file(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    make_pdf(path, 5) if suffix == "pdf" else path.write_bytes(tiff_stack(5))
    before = open_files(), live_pdfium_objects()
    for _ in load_pages(path):
        assert open_files() == before[0] + 1
        break
    gc.collect()
    assert (open_files(), live_pdfium_objects()) == before
    pages = load_pages(path)
    next(pages)
    pages.close()
    assert (open_files(), live_pdfium_objects()) == before
    with pytest.raises(ZeroDivisionError):
        for page in load_pages(path):
            page.number / 0
    gc.collect()
    assert (open_files(), live_pdfium_objects()) == before


def test_two_threads_read_two_files_at_once(tmp_path):
    paths = [make_pdf(tmp_path / f"{name}.pdf", 12) for name in "abcd"]
    alone = {path.stem: [page.sha256 for page in load_pages(path, max_pixels=50_000)] for path in paths}
    together: dict[str, list[str]] = {}
    barrier = threading.Barrier(len(paths))

    def read(path: Path) -> None:
        barrier.wait()
        together[path.stem] = [page.sha256 for page in load_pages(path, max_pixels=50_000)]

    threads = [threading.Thread(target=read, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_two_readers_in_one_thread_take_turns(tmp_path):
    a, b = make_pdf(tmp_path / "a.pdf", 3), make_pdf(tmp_path / "b.pdf", 3)
    texts = [(x.text, y.text) for x, y in zip(load_pages(a), load_pages(b), strict=True)]
    assert texts == [(f"a sheet {n}", f"b sheet {n}") for n in (1, 2, 3)]


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
    from PIL import TiffImagePlugin

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


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "b.webp", save_all=True, append_images=frames[1:], lossless=True)
    for page in load_pages(tmp_path):
        assert page.metadata["page_count"] == 1
        assert page.image.getpixel((5, 5))[0] > 200


# --- names and order -----------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.png", "a.png", "A.png", "2024/z.PNG", "2024/q1/deep.png", "2024/a.jpg", "c.png/inside.png"):
        make_image(tmp_path / name)
    for name in (".hidden.png", ".git/x.png", "2024/.cache/y.png"):
        make_image(tmp_path / name)
    for name in ("notes.txt", "table.xlsx", "README", "x.pdf.bak"):
        (tmp_path / name).write_text("no page")
    return tmp_path


ALL = ["2024/a.jpg", "2024/q1/deep.png", "2024/z.PNG", "A.png", "a.png", "b.png", "c.png/inside.png"]


def sources(*args, **kwargs) -> list[str]:
    return [page.source for page in load_pages(*args, **kwargs)]


def test_a_folder_is_read_in_order_without_hidden_files_and_other_types(tree):
    assert sources(tree) == ALL
    assert [file.source for file in find_page_files(tree)] == ALL


def test_paths_may_be_strings_relative_and_roundabout(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert sources(".") == sources("2024/..") == sources("./") == sources([Path()]) == ALL
    assert sources("b.png") == sources(tree / "b.png") == sources("2024/../b.png") == ["b.png"]
    (page,) = load_pages("b.png")
    monkeypatch.chdir(tree.parent)
    assert page.image.size == (40, 30)  # the page keeps an absolute path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.png", ["A.png", "a.png", "b.png"]),
        ("[ab].png", ["a.png", "b.png"]),
        ("?.png", ["A.png", "a.png", "b.png"]),
        ("*", ["A.png", "a.png", "b.png"]),
        ("**", ALL),
        ("**/*.png", ["2024/q1/deep.png", "A.png", "a.png", "b.png", "c.png/inside.png"]),
        ("2024/**/*", ["a.jpg", "q1/deep.png", "z.PNG"]),
        ("20*/*.jpg", ["2024/a.jpg"]),
        ("*/*/deep.*", ["2024/q1/deep.png"]),
        ("c.png/*", ["inside.png"]),
        ("**/**/deep.png", ["2024/q1/deep.png"]),
    ],
)
def test_patterns_find_files_relative_to_what_stands_before_them(tree, pattern, expected):
    assert sources(str(tree / pattern)) == expected


def test_a_relative_pattern_works_in_a_folder_named_like_a_pattern(tree, monkeypatch):
    odd = tree / "odd[1]"
    make_image(odd / "in.png")
    make_image(odd / "x[1].png")
    assert sources(str(odd / "i*.png")) == ["in.png"]
    assert sources(str(odd)) == ["in.png", "x[1].png"]
    assert sources(str(odd / "x[1].png")) == ["x[1].png"]
    monkeypatch.chdir(odd)
    assert sources("i*.png") == ["in.png"]


@pytest.mark.parametrize("pattern", ["*.pdf", "nowhere/*.png", "**/*.bmp"])
def test_a_pattern_that_finds_nothing_is_an_error(tree, pattern):
    with pytest.raises(PageError, match=r"matches the pattern|cannot be listed"):
        load_pages(str(tree / pattern))
    assert sources(str(tree / pattern), on_error="skip") == []


def test_an_empty_folder_and_no_paths_give_no_pages(tmp_path):
    assert sources(tmp_path) == []
    assert sources([]) == []


def test_errors_of_paths_are_raised_by_the_call_itself(tree):
    with pytest.raises(PageError, match="no such file or folder"):
        load_pages(tree / "missing")


def test_one_file_reached_by_two_paths_is_read_once(tree):
    assert sources([tree / "b.png", tree, tree / "2024", str(tree / "*.png")])[0] == "b.png"
    assert sorted(sources([tree / "b.png", tree, tree / "2024", str(tree / "*.png")])) == sorted(ALL)


def test_two_files_of_the_same_source_are_refused_naming_both(tmp_path):
    one, two = make_image(tmp_path / "one" / "a.png"), make_image(tmp_path / "two" / "a.png")
    with pytest.raises(ConfigError, match=r"would both be 'a\.png'") as caught:
        load_pages([tmp_path / "one", tmp_path / "two"])
    assert str(one) in str(caught.value) and str(two) in str(caught.value)
    assert sources([tmp_path / "one", tmp_path / "two"], root=tmp_path) == ["one/a.png", "two/a.png"]


def test_a_root_above_names_the_sources_and_one_beside_is_refused(tree):
    assert sources(tree / "2024" / "q1", root=tree) == ["2024/q1/deep.png"]
    assert sources(str(tree / "2024" / "*.jpg"), root=tree) == ["2024/a.jpg"]
    with pytest.raises(ConfigError, match="outside the root"):
        load_pages(tree / "b.png", root=tree / "2024")


def test_links_to_files_are_read_and_loops_of_folders_are_not_followed(tmp_path):
    make_image(tmp_path / "real" / "a.png")
    (tmp_path / "link.png").symlink_to("real/a.png")
    (tmp_path / "real" / "loop").symlink_to("..")
    (tmp_path / "real" / "loop2").symlink_to(".")
    assert sources(tmp_path) == ["link.png", "real/a.png"]
    assert sources(str(tmp_path / "**")) == ["link.png", "real/a.png"]
    (tmp_path / "alias").symlink_to("real")
    assert sources(tmp_path / "alias") == ["a.png"]  # a link that is named is meant


def test_a_folder_with_bad_entries_reports_each_and_reads_the_rest(tmp_path):
    make_image(tmp_path / "good.png")
    os.mkfifo(tmp_path / "pipe.pdf")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "zero.pdf").write_bytes(b"")
    told: list[PageError] = []
    assert [page.source for page in load_pages(tmp_path, on_error=told.append)] == ["good.png"]
    assert [error.source for error in told] == ["gone.png", "pipe.pdf", "self.png", "zero.pdf"]


def test_a_file_that_vanishes_before_its_turn_is_an_error(tree):
    pages = load_pages([tree / "a.png", tree / "b.png"])
    (tree / "b.png").unlink()
    assert next(pages).source == "a.png"
    with pytest.raises(PageError, match=r"b\.png: cannot be read: No such file"):
        next(pages)


def test_the_same_page_of_a_changed_file_keeps_its_id_and_changes_its_digest(tmp_path):
    path = make_image(tmp_path / "a.png")
    (before,) = load_pages(tmp_path)
    digest = before.sha256
    make_image(path, colour="red")
    (after,) = load_pages(tmp_path)
    assert after.id == before.id
    assert after.sha256 != digest


def test_a_moved_folder_gives_the_same_pages(tmp_path):
    make_pdf(tmp_path / "one" / "a.pdf", 2)
    make_image(tmp_path / "one" / "b.png")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    kept = [[(p.id, p.metadata, p.sha256) for p in load_pages(tmp_path / name)] for name in ("one", "two")]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"paths": 3}, "expected a path or a list"),
        ({"paths": None}, "expected a path or a list"),
        ({"paths": b"a.pdf"}, "expected a path or a list"),
        ({"paths": ""}, "non-empty path"),
        ({"paths": [""]}, "non-empty path"),
        ({"paths": [b"a.pdf"]}, "non-empty path"),
        ({"paths": [None]}, "non-empty path"),
        ({"paths": "https://example.org/a.pdf"}, "a URL is not fetched"),
        ({"paths": [], "on_error": "ignore"}, "on_error"),
        ({"paths": [], "max_pixels": 0}, "max_pixels"),
        ({"paths": [], "max_pixels": True}, "max_pixels"),
        ({"paths": [], "max_pixels": 1e6}, "max_pixels"),
        ({"paths": [], "max_pixels": 10**12}, "max_pixels"),
        ({"paths": [], "password": b"geheim"}, "password: expected a string, got bytes"),
        ({"paths": [], "root": ""}, "non-empty path"),
    ],
)
def test_wrong_arguments_are_config_errors_at_once(arguments, text):
    with pytest.raises(ConfigError, match=text) as caught:
        load_pages(**arguments)
    assert "geheim" not in str(caught.value)
