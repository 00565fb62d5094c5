"""Images for chat models: the pixels that were embedded, within the limits of the APIs."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.pages.images import open_image
from colqwen3_retrievers.retrieval.chat_images import MAX_SIDE, ChatImages
from tests.originals import SCAN_SIZE, naive_pixels, two_colours, write_originals


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_originals(tmp_path_factory.mktemp("originals"))


def test_what_a_chat_model_sees_is_what_was_embedded(originals: dict[str, Path]) -> None:
    for kind, path in originals.items():
        if kind == "scan":
            continue
        data, media_type = ChatImages().encode(path)
        assert Image.MIME[str(Image.open(io.BytesIO(data)).format)] == media_type, kind
        assert ChatImages().encode(path.read_bytes()) == ChatImages().replacement(path) == (data, media_type), kind
        assert np.array_equal(naive_pixels(data), np.asarray(open_image(path))), kind


def test_a_large_scan_is_reduced_to_what_apis_accept(originals: dict[str, Path]) -> None:
    data, media_type = ChatImages().encode(originals["scan"])
    assert len(base64.b64encode(data)) < 5_000_000
    embedded = open_image(originals["scan"])
    assert embedded.size == SCAN_SIZE
    embedded.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    pixels = naive_pixels(data)
    assert (pixels.shape[1], pixels.shape[0]) == embedded.size == (1429, 2000)
    assert media_type == "image/jpeg"
    assert np.abs(pixels.astype(int) - np.asarray(embedded)).mean() < 6  # noise, the worst case


@pytest.mark.parametrize(("kind", "options"), [
    ("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"lossless": True}), ("WEBP", {"quality": 90}),
])  # fmt: skip
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_file_is_sent_unchanged(tmp_path: Path, kind: str, options: dict[str, int], mode: str) -> None:
    path = tmp_path / f"misnamed.{'jpg' if kind == 'PNG' else 'png'}"
    two_colours(mode).save(path, kind, **options)
    data, media_type = path.read_bytes(), f"image/{kind.lower()}"
    assert (
        ChatImages().encode(path) == ChatImages().encode(str(path)) == ChatImages().encode(data) == (data, media_type)
    )
    assert ChatImages().replacement(path) == (None, media_type)
    assert np.array_equal(naive_pixels(data), np.asarray(open_image(path)))


def test_both_limits_hold_however_small() -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 500, 3), dtype=np.uint8))
    for side, most in ((500, 10**9), (100, 10**9), (500, 100_000), (500, 20_000), (7, 1024), (1, 1024), (500, 1024)):
        data, _ = ChatImages(side, most).encode(noise)
        shown = Image.open(io.BytesIO(data))
        assert max(shown.size) <= side
        assert len(data) <= most
    assert noise.size == (500, 300)
    line = Image.new("RGB", (1, 5000))
    assert Image.open(io.BytesIO(ChatImages().encode(line)[0])).size == (1, 2000)


def test_a_picture_in_memory_is_png() -> None:
    data, media_type = ChatImages().encode(two_colours("RGBA"))
    assert media_type == "image/png"
    assert np.array_equal(naive_pixels(data), np.asarray(two_colours()))


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(PageError, match=r"page 3: not an image"):
        ChatImages().encode(b"no image", name="page 3")
    with pytest.raises(PageError, match=r"gone\.png: cannot be read"):
        ChatImages().encode(tmp_path / "gone.png")
    file = io.BytesIO()
    two_colours().save(file, "PNG")
    (tmp_path / "half.png").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    with pytest.raises(PageError, match=r"half\.png: the image is broken"):
        ChatImages().encode(tmp_path / "half.png")


@pytest.mark.parametrize(("limits", "message"), [
    ((0,), "max_side: expected a whole number from 1, got 0"), ((True,), "max_side"), ((2.5,), "max_side"),
    ((10, 1023), "max_bytes: expected a whole number from 1,024, got 1023"), ((10, "5 MB"), "max_bytes"),
])  # fmt: skip
def test_limits_that_cannot_be_kept_are_refused(limits: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ChatImages(*limits)
