from __future__ import annotations

import gc
import json
import threading
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from colqwen3_retrievers.errors import PageError
from colqwen3_retrievers.pages import loading as pages_module
from colqwen3_retrievers.pages.loading import load_pages
from colqwen3_retrievers.pages.pdf import clean_text, scale_for
from tests.bad_pages import (
    encrypted_pdf,
    live_pdfium_objects,
    make_pdf,
    one_page_pdf,
    open_files,
    pdf_bytes,
    tiff_stack,
)

pdfium = pytest.importorskip("pypdfium2")
pytest.importorskip("reportlab")

BOUND = 1_310_720

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
     b"[0 0 1000000000 1000000000]", b"[0 0 0.5 100]", b"[0 0 600 3]", b"[100 100 -100 -100]", b"[0 0 NaN NaN]",
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


def annotated_pdf(*pages: bytes) -> bytes:
    """Pages that say "Name:", each with a form field of the given value and an annotation "Paid 2024"."""

    def form(text: bytes) -> bytes:
        content = b"BT /F1 12 Tf 2 5 Td (%s) Tj ET" % text
        resources = b"/Resources<</Font<</F1 3 0 R>>>>"
        return b"<</Type/XObject/Subtype/Form/BBox[0 0 180 20]%s/Length %d>>\nstream\n%s\nendstream" % (
            resources, len(content), content,
        )  # fmt: skip

    content = b"BT /F1 12 Tf 50 700 Td (Name:) Tj ET"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R/AcroForm<</Fields[%s]/DA(/F1 12 Tf)>>>>"
        % b" ".join(b"%d 0 R" % (8 + 3 * i) for i in range(len(pages))),
        b"<</Type/Pages/Kids[%s]/Count %d/Resources 6 0 R>>"
        % (b" ".join(b"%d 0 R" % (7 + 3 * i) for i in range(len(pages))), len(pages)),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        b"<</Length %d>>\nstream\n%s\nendstream" % (len(content), content),
        b"[4 0 R]",
        b"<</Font<</F1 3 0 R>>>>",
    ]
    count = 6 + 3 * len(pages)
    for number, value in enumerate(pages):
        first = 7 + 3 * number
        objects += [
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 5 0 R/Annots[%d 0 R %d 0 R]>>"
            % (first + 1, first + 2),
            b"<</Type/Annot/Subtype/Widget/FT/Tx/T(n%d)/F 4/V(%s)/DA(/F1 9 Tf)/Rect[90 695 270 715]/AP<</N %d 0 R>>>>"
            % (number, value, count + 1 + number),
            b"<</Type/Annot/Subtype/FreeText/F 4/Contents(Paid 2024)/Rect[320 695 500 715]/AP<</N %d 0 R>>>>"
            % (count + 1 + len(pages)),
        ]
    return pdf_bytes(*objects, *map(form, pages), form(b"Paid 2024"))


def test_text_of_form_fields_and_annotations_is_read(tmp_path):
    (tmp_path / "a.pdf").write_bytes(annotated_pdf(b"Ada Lovelace"))
    (page,) = load_pages(tmp_path)
    assert page.text.split() == ["Name:", "Ada", "Lovelace", "Paid", "2024"]


def test_annotations_are_read_and_drawn_on_their_own_page_alone(tmp_path):
    names = [b"Ada Lovelace", b"Alan Turing", b"Grace Hopper"]
    (tmp_path / "all.pdf").write_bytes(annotated_pdf(*names))  # the pages share their content and resources
    for number, name in enumerate(names):
        (tmp_path / f"{number}.pdf").write_bytes(annotated_pdf(name))
    alone = [page for number in range(3) for page in load_pages(tmp_path / f"{number}.pdf")]
    together = list(load_pages(tmp_path / "all.pdf"))
    assert [page.text.split() for page in together] == [f"Name: {name.decode()} Paid 2024".split() for name in names]
    assert [page.sha256 for page in together] == [page.sha256 for page in alone]
    assert live_pdfium_objects() == 0


def test_a_hidden_annotation_is_not_read(tmp_path):
    (tmp_path / "a.pdf").write_bytes(annotated_pdf(b"").replace(b"/F 4/Contents", b"/F 2/Contents"))
    (page,) = load_pages(tmp_path)
    assert page.text == "Name:"


def test_the_longer_text_is_kept(tmp_path, monkeypatch):
    from colqwen3_retrievers.pages import pdf

    texts = iter(["all of the words", "fewer words"])
    monkeypatch.setattr(pdf, "_text", lambda page, area: next(texts))
    (tmp_path / "a.pdf").write_bytes(annotated_pdf(b"Ada"))
    (page,) = load_pages(tmp_path)
    assert page.text == "all of the words"


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
    images = live_images()
    tracemalloc.start()
    try:
        for count, page in enumerate(pages, start=2):
            if count % 20 == 0:
                del page
                # one page is still referred to by the reader, none of the earlier ones
                assert live_images() <= images + 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 200
    # Bitmap buffers are Python's memory, three bytes a pixel: all pages are 120 MB, a few are under 12 MB, and other
    # threads of the process, which are traced too, may need some beside them.
    assert peak < 40 * 200_000 * 3


def live_images() -> int:
    return sum(issubclass(type(thing), Image.Image) for thing in gc.get_objects())


def test_while_a_page_is_rendered_no_earlier_one_is_alive(tmp_path, monkeypatch):
    alive: list[int] = []
    render, frame_to_rgb = pdfium.PdfPage.render, pages_module.frame_to_rgb

    def counted_render(self, *args, **kwargs):
        alive.append(live_images())
        return render(self, *args, **kwargs)

    def counted_frame(image, position, *, name):
        alive.append(live_images())
        return frame_to_rgb(image, position, name=name)

    monkeypatch.setattr(pdfium.PdfPage, "render", counted_render)
    monkeypatch.setattr(pages_module, "frame_to_rgb", counted_frame)
    make_pdf(tmp_path / "a.pdf", 4)
    (tmp_path / "b.tif").write_bytes(tiff_stack(4))
    gc.collect()
    for page in load_pages(tmp_path):
        assert page.image is not None
        del page
    assert len(alive) == 8
    assert len(set(alive[:4])) == 1
    assert len(set(alive[4:])) == 1


def test_every_call_into_pdfium_is_made_under_the_lock(tmp_path, monkeypatch):
    import ctypes

    from pypdfium2 import raw

    from colqwen3_retrievers.pages.pdf import _PDFIUM

    outside: list[str] = []
    calls = 0

    def guard(name, function):
        def call(*args):
            nonlocal calls
            calls += 1
            if not _PDFIUM._lock._is_owned():
                outside.append(name)
            return function(*args)

        return call

    for name in dir(raw):
        if isinstance(getattr(raw, name), ctypes._CFuncPtr):
            monkeypatch.setattr(raw, name, guard(name, getattr(raw, name)))
    path = make_pdf(tmp_path / "a.pdf", 3)
    (tmp_path / "bad.pdf").write_bytes(one_page_pdf(kids=b"[3 0 R null]", count=b"2"))
    list(load_pages(tmp_path, on_error="skip"))
    for _ in load_pages(path):
        break
    assert calls > 50
    assert outside == []


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
