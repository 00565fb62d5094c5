"""What colours a file's values stand for: profiles, ranges, transparent colours."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from colqwen3_retrievers.models.families import FAMILIES
from colqwen3_retrievers.pages.images import open_image
from tests.icc_profiles import ADOBE_GAMMA, ADOBE_RGB, cmyk_profile, grey_profile, rgb_profile

SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixel(data: bytes | Image.Image) -> tuple[int, ...]:
    return open_image(data).getpixel((0, 0))


def in_srgb(colour: tuple[int, int, int]) -> np.ndarray:
    """A colour of Adobe RGB by the formulas of both standards."""
    linear = (np.array(colour) / 255) ** ADOBE_GAMMA
    linear = np.clip(np.linalg.solve(np.array(SRGB).T, np.array(ADOBE_RGB).T @ linear), 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def raw_tiff(values: bytes, bits: int, **tags: int) -> bytes:
    """A little-endian TIFF of one row of grey values."""
    width = len(values) * 8 // bits
    entries = {256: width, 257: 1, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(values)}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    values += bytes(len(values) % 2)
    body = b"".join(struct.pack("<HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    return struct.pack("<2sHI", b"II", 42, 8 + len(values)) + values + struct.pack("<H", len(entries)) + body + bytes(4)


def png(depth: int, kind: int, row: bytes, transparent: bytes) -> bytes:
    """A PNG of two pixels with a transparent colour."""
    data = b"\x89PNG\r\n\x1a\n"
    head = struct.pack(">IIBBBBB", 2, 1, depth, kind, 0, 0, 0)
    for name, chunk in ((b"IHDR", head), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")):
        data += struct.pack(">I", len(chunk)) + name + chunk + struct.pack(">I", zlib.crc32(name + chunk))
    return data


# --- ICC profiles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [(200, 50, 50), (30, 160, 90), (90, 90, 240), (128, 128, 128), (255, 255, 255)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_a_wide_gamut_is_converted_to_srgb(colour, kind):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(kind, {})
    data = encode(Image.new("RGB", (8, 8), colour), kind, icc_profile=rgb_profile(), **options)
    assert np.abs(in_srgb(colour) - pixel(data)).max() <= 3


def test_a_profile_applies_to_every_mode_and_before_transparency():
    red, palette = (200, 50, 50), Image.new("P", (2, 2), 0)
    palette.putpalette(red)
    expected = in_srgb(red)
    assert np.abs(expected - pixel(encode(palette, "PNG", icc_profile=rgb_profile()))).max() <= 2
    half = Image.new("RGBA", (2, 2), (*red, 128))
    over_white = expected * 128 / 255 + 255 * 127 / 255
    assert np.abs(over_white - pixel(encode(half, "PNG", icc_profile=rgb_profile()))).max() <= 2
    with Image.open(io.BytesIO(encode(half.convert("RGB"), "PNG", icc_profile=rgb_profile()))) as given:
        before = given.tobytes()
        assert np.abs(expected - pixel(given)).max() <= 2
        assert given.tobytes() == before
    assert "icc_profile" not in open_image(encode(half, "PNG", icc_profile=rgb_profile())).info


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_profile_of_grey_values_applies(mode):
    grey = Image.new(mode, (2, 2), {"L": 55, "LA": (55, 255), "I;16": 55 << 8}[mode])
    data = encode(grey, "PNG", icc_profile=grey_profile(1.0))
    assert pixel(data) == (128, 128, 128)  # 0.2157 of white's light


def test_inks_are_converted_by_their_profile():
    profile = cmyk_profile((150, 208, 128))
    white, cyan = (encode(Image.new("CMYK", (8, 8), (ink, 0, 0, 0)), "JPEG", icc_profile=profile) for ink in (0, 255))
    assert pixel(white) == (255, 255, 255)
    assert np.abs(np.array(pixel(cyan)) - (255, 48, 146)).max() <= 3  # L* 59, a* 80, b* 0
    assert pixel(encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG"))[0] < 10  # without one it is cyan


@pytest.mark.parametrize("profile", [b"", b"junk", rgb_profile()[:200], grey_profile(1.0), cmyk_profile((0, 128, 128))])
def test_a_profile_that_is_broken_or_of_other_colours_is_ignored(profile):
    image = Image.new("RGB", (2, 2), (200, 50, 50))
    image.info["icc_profile"] = profile
    assert pixel(image) == (200, 50, 50)


def test_the_profile_of_srgb_changes_nothing():
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    data = encode(image, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert open_image(data).tobytes() == image.tobytes()


def test_cielab_is_converted():
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(Image.new("RGB", (8, 8), (200, 50, 50)), to_lab)
    assert np.abs(np.array(pixel(encode(lab, "TIFF"))) - (200, 50, 50)).max() <= 2


def test_pixels_of_other_versions_are_not_compared():
    assert {family.rendering_version for family in FAMILIES.values()} == {2}


# --- ranges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("white", [255, 1023, 4095, 16383, 65535])
def test_sixteen_bit_values_are_scaled_by_their_range(white):
    values = np.array([[0, white // 2 + 1, white]], np.uint16)
    for image in (Image.fromarray(values), Image.fromarray(values.astype(np.int32))):
        out = np.asarray(open_image(encode(image, "TIFF")))[0, :, 0]
        assert out.tolist() == [0, 128, 255]


def test_a_format_that_says_what_is_white_is_believed():
    values = np.array([[0, 2000, 4095]], np.uint16)
    assert np.asarray(open_image(encode(Image.fromarray(values), "PNG")))[0, :, 0].tolist() == [0, 7, 15]


def test_tags_say_what_is_black_and_white():
    row = struct.pack("<3H", 100, 550, 1000)
    data = raw_tiff(row, 16, t280=100, t281=1000)
    assert np.asarray(open_image(data))[0, :, 0].tolist() == [0, 127, 255]
    assert np.asarray(open_image(raw_tiff(row, 16, t281=65535)))[0, :, 0].tolist() == [0, 2, 3]
    assert np.asarray(open_image(raw_tiff(row, 16, t281=10)))[0, :, 0].tolist() == [25, 137, 250]  # cannot be
    assert np.asarray(open_image(raw_tiff(row, 16, t262=0)))[0, :, 0].tolist() == [230, 118, 5]  # white is zero
    packed = bytes([0x80, 0x00, 0x64])  # 2048 and 100 in 12 bits each
    assert np.asarray(open_image(raw_tiff(packed, 12)))[0, :, 0].tolist() == [128, 6]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([100, 1550, 3000], [0, 128, 255]),
        ([-1, 0, 1], [0, 128, 255]),
        ([0, 0.5, 1], [0, 128, 255]),
        ([0, 100, 200], [0, 100, 200]),
        ([0, 1e30, 3e38], [0, 1, 255]),
        ([float("nan"), 1000, 2000], [0, 0, 255]),
        ([float("nan"), float("inf"), -float("inf")], [0, 0, 0]),
    ],
)
def test_floats_are_scaled_by_their_range(values, expected):
    image = Image.fromarray(np.array([values], np.float32))
    for source in (image, encode(image, "TIFF")):
        assert np.abs(np.asarray(open_image(source))[0, :, 0].astype(int) - expected).max() <= 1


def test_floats_have_a_range_in_their_tags_too():
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in ((340, 0.0), (341, 4000.0)):
        info.tagtype[tag] = 11
        info[tag] = value
    image = Image.fromarray(np.array([[100, 2000, 3000]], np.float32))
    assert np.asarray(open_image(encode(image, "TIFF", tiffinfo=info)))[0, :, 0].tolist() == [6, 128, 191]


def test_a_range_is_that_of_the_whole_picture():
    values = np.zeros((3000, 1000), np.uint16)  # several strips
    values[:1000] = 200
    values[2999] = 4095
    out = np.asarray(open_image(encode(Image.fromarray(values), "TIFF")))
    assert [out[row, 0, 0] for row in (0, 1500, 2999)] == [12, 0, 255]


# --- transparent colours -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "kind", "row", "transparent", "other"),
    [
        (16, 0, struct.pack(">2H", 0, 0x8000), struct.pack(">H", 0), 128),
        (16, 0, struct.pack(">2H", 0x1234, 0x1235), struct.pack(">H", 0x1234), 0x12),
        (16, 2, struct.pack(">6H", *[0x1234] * 3, *[0x8000] * 3), struct.pack(">3H", *[0x1234] * 3), 128),
        (4, 0, bytes([0x37]), struct.pack(">H", 3), 7 * 17),
        (2, 0, bytes([0x60]), struct.pack(">H", 1), 2 * 85),
        (1, 0, bytes([0x80]), struct.pack(">H", 1), 0),
    ],
)
def test_a_transparent_colour_is_white_at_every_depth(depth, kind, row, transparent, other):
    out = open_image(png(depth, kind, row, transparent))
    assert [out.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (other,) * 3]


@pytest.mark.parametrize("mode", ["I", "I;16"])
def test_a_transparent_value_of_an_image_in_memory_is_white(mode):
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), 65535 // 2)
    image.info["transparency"] = 0
    assert pixel(image) == (255, 255, 255)
