from __future__ import annotations

import io
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.pages.images import (
    MAX_IMAGE_BYTES,
    MAX_IMAGE_PIXELS,
    checked_size,
    decoding,
    open_header,
    open_image,
    read_image_bytes,
    to_rgb,
)
from tests.bad_pages import image_bytes, png_bytes, tiff_stack

WHITE, BLACK, RED, GREEN, BLUE = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def near(colour, expected, tolerance: int = 12) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(colour, expected, strict=True))


def quarters() -> Image.Image:
    """32 x 16: red, green above blue, white."""
    image = Image.new("RGB", (32, 16), WHITE)
    for colour, box in ((RED, (0, 0, 16, 8)), (GREEN, (16, 0, 32, 8)), (BLUE, (0, 8, 16, 16))):
        image.paste(colour, box)
    return image


# --- what pixels a picture stands for ------------------------------------------------------------------------------

STORED = {  # how the upright picture must be stored for a viewer to show it upright
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation, kind):
    method = STORED[orientation]
    stored = quarters() if method is None else quarters().transpose(method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encode(stored, kind, exif=exif, **options)
    upright = open_image(data)
    assert upright.size == (32, 16)
    assert [
        near(upright.getpixel(at), c)
        for at, c in zip(((4, 4), (27, 4), (4, 12), (27, 12)), (RED, GREEN, BLUE, WHITE), strict=True)
    ] == [True] * 4
    assert open_image(upright).tobytes() == upright.tobytes()  # opening it again turns nothing
    with Image.open(io.BytesIO(data)) as lazy:
        assert to_rgb(lazy).tobytes() == upright.tobytes()
    header = open_header(io.BytesIO(data), name="x")
    assert checked_size(header) == (32, 16)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert open_image(encode(quarters(), "PNG", exif=exif)).tobytes() == quarters().tobytes()


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage!", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"]
)
def test_a_picture_with_broken_exif_is_shown_unturned(exif):
    data = encode(quarters(), "JPEG", quality=100, subsampling=0, exif=exif)
    assert near(open_image(data).getpixel((4, 4)), RED)
    assert checked_size(open_header(io.BytesIO(data), name="x")) == (32, 16)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.merge("LA", (Image.new("L", (2, 2), 64), Image.new("L", (2, 2), 128))).convert("La"), (159, 159, 159)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), WHITE),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), RED),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 128)), (127, 127, 127)),
        (Image.new("RGBa", (2, 2), (0, 0, 0, 0)), WHITE),
        (Image.new("LA", (2, 2), (0, 0)), WHITE),
        (Image.new("LA", (2, 2), (0, 255)), BLACK),
        (Image.new("PA", (2, 2), (0, 0)), WHITE),
        (Image.new("1", (2, 2), 0), BLACK),
        (Image.new("1", (2, 2), 1), WHITE),
        (Image.new("L", (2, 2), 77), (77, 77, 77)),
        (Image.new("RGBX", (2, 2), (9, 8, 7, 0)), (9, 8, 7)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), RED),
        (Image.new("YCbCr", (2, 2), (255, 128, 128)), WHITE),
        (Image.new("HSV", (2, 2), (0, 255, 255)), RED),
        (Image.new("I", (2, 2), 200), (200, 200, 200)),
        (Image.new("I", (2, 2), 65535), WHITE),
        (Image.new("I", (2, 2), -5), BLACK),
        (Image.new("I;16", (2, 2), 65535), WHITE),
        (Image.new("I;16", (2, 2), 0x8000), (128, 128, 128)),
        (Image.new("I;16B", (2, 2), 0x8000), (128, 128, 128)),
        (Image.new("I;16L", (2, 2), 0x8000), (128, 128, 128)),
        (Image.new("F", (2, 2), 1.0), WHITE),
        (Image.new("F", (2, 2), 0.5), (128, 128, 128)),
        (Image.new("F", (2, 2), 100.0), (100, 100, 100)),
        (Image.new("F", (2, 2), 65535.0), WHITE),
        (Image.new("F", (2, 2), float("nan")), BLACK),
        (Image.new("F", (2, 2), float("inf")), BLACK),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
)
def test_every_mode_becomes_rgb_and_the_source_stays(image, expected):
    before = image.mode, image.size, image.tobytes()
    out = open_image(image)
    assert (out.mode, out.size) == ("RGB", (2, 2))
    assert near(out.getpixel((1, 1)), expected, 1)
    assert (image.mode, image.size, image.tobytes()) == before
    out.putpixel((0, 0), (1, 2, 3))
    assert (image.mode, image.size, image.tobytes()) == before


def test_an_rgb_image_is_copied():
    image = Image.new("RGB", (2, 2), RED)
    assert open_image(image) is not image
    assert open_image(image).tobytes() == image.tobytes()


def test_a_palette_with_a_transparent_colour_lies_on_white():
    image = Image.new("P", (4, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1, 0, 1])
    for data in (
        encode(image, "PNG", transparency=0),
        encode(image, "GIF", transparency=0),
        encode(image, "PNG", transparency=b"\0\xff"),
    ):
        out = open_image(data)
        assert [out.getpixel((x, 0)) for x in range(2)] == [WHITE, BLUE]


@pytest.mark.parametrize(("mode", "colour"), [("L", 0), ("RGB", (0, 0, 0)), ("1", 0)])
def test_a_transparent_colour_of_a_png_without_alpha_lies_on_white(mode, colour):
    data = encode(Image.new(mode, (2, 2), colour), "PNG", transparency=colour)
    assert open_image(data).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("bits", [b"\x00\x80", b"\xff\xff"])
def test_a_sixteen_bit_png_keeps_its_high_byte(bits):
    grey = Image.frombytes("I;16", (1, 1), bits)
    assert open_image(encode(grey, "PNG")).getpixel((0, 0)) == (bits[1],) * 3


def test_cmyk_jpegs_keep_their_colours_with_and_without_adobes_inversion():
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    data = encode(ink, "JPEG", quality=100)
    marker = data.index(b"Adobe") - 4
    assert data[marker : marker + 2] == b"\xff\xee"  # Pillow writes Adobe's inverted form
    assert near(open_image(data).getpixel((8, 8)), RED)
    length = int.from_bytes(data[marker + 2 : marker + 4], "big")
    plain = data[:marker] + data[marker + 2 + length :]
    # without the marker nothing says that the inks are inverted, and Pillow, like viewers, inverts all the same
    assert near(open_image(plain).getpixel((8, 8)), RED)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_an_animation_left_at_frame_three_gives_its_first_frame_and_stays_there(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE, WHITE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        for position in (3, 1, 0):
            image.seek(position)
            assert open_image(image).getpixel((4, 4)) == RED
            assert image.tell() == position
            assert image.convert("RGB").getpixel((4, 4)) == (RED, GREEN, BLUE, WHITE)[position]
    assert open_image(data).getpixel((4, 4)) == RED


def test_a_broken_later_frame_does_not_harm_the_first():
    frames = [Image.effect_noise((40, 40), 90).convert("P") for _ in range(3)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    whole, cut = open_image(data), open_image(data[: len(data) // 2])
    assert cut.tobytes() == whole.tobytes()


def test_an_animation_whose_file_was_closed_after_loading_still_opens():
    data = encode(quarters(), "GIF", save_all=True, append_images=[Image.new("RGB", (32, 16), BLUE)])
    with Image.open(io.BytesIO(data)) as image:
        image.load()
    assert near(open_image(image).getpixel((4, 4)), RED)


def test_a_stack_of_tiff_pages_gives_the_first():
    assert open_image(tiff_stack(3)).getpixel((0, 0)) == (20, 20, 20)


def test_paths_bytes_and_images_give_the_same_pixels(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(image_bytes("PNG"))
    with Image.open(path) as image:
        expected = image.convert("RGB").tobytes()
        assert open_image(image).tobytes() == expected
    assert open_image(path).tobytes() == open_image(str(path)).tobytes() == expected
    assert open_image(path.read_bytes()).tobytes() == expected


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000"])
def test_the_usual_formats_are_read(kind):
    from PIL import features

    if kind == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("this Pillow has no JPEG 2000")
    size = (48, 48)  # a size that icons may have
    assert open_image(image_bytes(kind, size)).size == size


def test_pixels_are_those_of_pillow_for_a_photograph():
    data = image_bytes("JPEG", (123, 77))
    with Image.open(io.BytesIO(data)) as image:
        assert open_image(data).tobytes() == ImageOps.exif_transpose(image).convert("RGB").tobytes()


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9])
def test_a_truncated_file_is_a_page_error_that_names_it(tmp_path, kind, share):
    data = image_bytes(kind, mode="P" if kind == "GIF" else "RGB")
    path = tmp_path / "cut.bin"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(PageError, match=r"cut\.bin: "):
        open_image(path)
    with pytest.raises(PageError, match=r"^page 7: "):
        open_image(path.read_bytes(), name="page 7")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM"])
@pytest.mark.filterwarnings("ignore")  # Pillow remarks on damaged metadata; the error is what counts here
def test_a_file_with_flipped_bytes_opens_or_is_a_page_error(kind):
    data = image_bytes(kind, (24, 20), mode="P" if kind == "GIF" else "RGB")
    rng = np.random.default_rng(5)
    failed = 0
    for _ in range(150):
        broken = bytearray(data)
        for at in rng.integers(0, min(len(data), 200), size=rng.integers(1, 6)):
            broken[at] = rng.integers(0, 256)
        try:
            assert open_image(bytes(broken), max_pixels=10**7).mode == "RGB"
        except PageError:
            failed += 1
    assert failed > 0


@pytest.mark.parametrize("size", [(100_000, 100_000), (13_378, 13_378), (2**31 - 1, 1)])
def test_a_bomb_is_refused_from_its_header(size):
    with pytest.raises(PageError, match="pixels"):
        open_image(png_bytes(*size))


def test_the_bound_on_pixels_is_exact_and_without_a_warning():
    data = image_bytes("PNG", (10, 10))
    assert open_image(data, max_pixels=100).size == (10, 10)
    with pytest.raises(PageError, match="10 x 10 pixels, more than the bound of 99"):
        open_image(data, max_pixels=99)
    with pytest.raises(PageError, match="more than the bound of 99"):
        open_image(Image.new("RGB", (10, 10)), max_pixels=99)
    # between Pillow's warning and its error: within our bound, so the missing pixels are what is complained of
    with warnings.catch_warnings(), pytest.raises(PageError, match="broken"):
        warnings.simplefilter("error")
        open_image(png_bytes(10_000, 10_000), max_pixels=MAX_IMAGE_PIXELS)
    with pytest.raises(PageError, match="more than the bound of 75,000,000; reduce it, or pass it as a PIL image"):
        open_image(png_bytes(10_000, 10_000))
    assert open_header(io.BytesIO(png_bytes(7016, 9933)), name="A3 at 600 dpi").size == (7016, 9933)


def test_opening_in_many_threads_leaves_the_warning_filters_alone():
    data = image_bytes("PNG", (8, 8))
    before = list(warnings.filters)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: open_image(data), range(600)))
    assert list(warnings.filters) == before


def test_warnings_are_filtered_until_the_last_thread_has_opened_its_image(monkeypatch):
    original, entered, leave = Image.open, threading.Event(), threading.Event()
    remarks = []

    def slow(*args, **kwargs):
        if not entered.is_set():
            entered.set()
            leave.wait(10)
            warnings.warn("damaged metadata", UserWarning, stacklevel=1)
            remarks.append("passed")
        return original(*args, **kwargs)

    monkeypatch.setattr(Image, "open", slow)
    data = image_bytes("PNG", (8, 8))
    before = list(warnings.filters)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(open_image, data)
        assert entered.wait(10)
        open_image(data)
        leave.set()
        first.result(10)
    assert remarks == ["passed"]
    assert list(warnings.filters) == before


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        b"<svg xmlns='x'/>",
        b"%PDF-1.7\n",
        b"MZ" * 40,
    ],
    ids=["EPS", "SVG", "PDF", "EXE"],
)
def test_formats_that_are_no_plain_pictures_are_refused(data):
    with pytest.raises(PageError, match="not an image that can be read"):
        open_image(data)


def test_a_text_chunk_that_inflates_without_end_is_harmless():
    info = PngImagePlugin.PngInfo()
    info.add_text("k", "x" * 20_000_000, zip=True)
    with pytest.raises(PageError):
        open_image(encode(Image.new("RGB", (4, 4)), "PNG", pnginfo=info))


@pytest.mark.parametrize("empty", [b"", Path("empty.png")])
def test_empty_files_and_bytes_are_page_errors(tmp_path, monkeypatch, empty):
    monkeypatch.chdir(tmp_path)
    Path("empty.png").write_bytes(b"")
    with pytest.raises(PageError, match=r"empty \(0 bytes\)"):
        open_image(empty)


def test_an_image_of_no_pixels_is_a_page_error():
    with pytest.raises(PageError, match=r"no pixels \(0 x 5\)"):
        open_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("wrong", [None, 3, 2.5, ["a.png"], {"a": 1}, object()])
def test_what_is_no_image_source_is_a_config_error(wrong):
    with pytest.raises(ConfigError, match=f"not {type(wrong).__name__}"):
        open_image(wrong)


@pytest.mark.parametrize(
    "url",
    ["http://example.org/a.png", "HTTPS://EXAMPLE.ORG/a.png", "data:image/png;base64,AAAA", "ftp://x/a.png", "s3://b/a.png",
     "gs://b/a.png", "file:///etc/passwd", Path("https://example.org/a.png")],
)  # fmt: skip
def test_urls_are_refused(url):
    with pytest.raises(ConfigError, match="an image URL is not fetched"):
        open_image(url)


def test_no_secret_of_a_url_is_repeated():
    with pytest.raises(ConfigError, match=r"^https://example\.org/a\.png: ") as caught:
        open_image("https://ada:secret@example.org/a.png?key=secret#secret")
    assert "secret" not in str(caught.value)
    with pytest.raises(PageError, match=r"what\?/a#1\.png"):
        open_image("what?/a#1.png")  # a file may be named so


def test_a_long_data_url_is_not_repeated_in_full():
    with pytest.raises(ConfigError) as caught:
        open_image("data:image/png;base64," + "A" * 100_000)
    assert len(str(caught.value)) < 400


def test_paths_that_cannot_be_read_are_page_errors(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for path, text in (
        (tmp_path / "none.png", "No such file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe.png", "not a regular file"),
        (tmp_path / "zero.png", "not a regular file"),
        (tmp_path / "loop.png", "cannot be read"),
        ("a\0b.png", "cannot be read"),
        ("a" * 5000, "cannot be read"),
    ):
        with pytest.raises(PageError, match=text) as caught:
            open_image(path)
        assert len(str(caught.value)) < 600


def test_too_many_bytes_are_refused_before_they_are_read(tmp_path):
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    with pytest.raises(PageError, match="268,435,457 bytes, more than 268,435,456"):
        open_image(tmp_path / "sparse.png")


@pytest.mark.parametrize("source", [b"abc", bytearray(b"abc"), memoryview(b"abc")])
def test_bytes_of_any_kind_are_read(source):
    assert read_image_bytes(source) == b"abc"


def test_an_image_of_a_closed_file_is_a_page_error(tmp_path):
    (tmp_path / "a.png").write_bytes(image_bytes("PNG"))
    with Image.open(tmp_path / "a.png") as image:
        pass
    with pytest.raises(PageError, match=r"a\.png: its file was closed before it was decoded; call its load\(\) first"):
        open_image(image)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        KeyError("x"),
        OSError("x"),
        SyntaxError("x"),
        EOFError("x"),
        OverflowError("x"),
        AttributeError("x"),
        RuntimeError("x"),
        UserWarning("x"),
        Exception("x"),
    ],
)
def test_what_decoders_throw_becomes_a_page_error_with_its_cause(error):
    with pytest.raises(PageError, match=r"a\.png: the image is broken") as caught, decoding("a.png"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "takes more memory than is available"),
        (Image.DecompressionBombWarning("x"), "declares too many pixels"),
        (RuntimeError(), "the image is broken: RuntimeError"),
    ],
)
def test_an_error_without_words_gets_some(error, text):
    with pytest.raises(PageError, match=text), decoding("a.png"):
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ConfigError("x"), PageError("x", source="b")])
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, decoding("a.png"):
        raise error
    assert caught.value is error
