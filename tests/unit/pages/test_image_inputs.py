"""What is accepted as an image besides files, and how much memory an image takes."""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.pages import images as images_module
from colqwen3_retrievers.pages.images import is_image, open_image, plain_image, read_image_bytes
from colqwen3_retrievers.pages.loading import load_pages
from colqwen3_retrievers.pages.page import Page, Query, Video
from tests.bad_pages import image_bytes

PIXELS = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)


class Tensor:
    """What a tensor of any framework has, as far as it is used here."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.ndim = array, array.shape, array.ndim

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.array


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (PIXELS, PIXELS),
        (PIXELS[:, ::-1], PIXELS[:, ::-1]),
        (PIXELS[:, :, 0], PIXELS[:, :, :1].repeat(3, axis=2)),
        (PIXELS[:, :, :1], PIXELS[:, :, :1].repeat(3, axis=2)),
        (np.dstack([PIXELS, np.full((5, 6), 255, np.uint8)]), PIXELS),
        (PIXELS.transpose(2, 0, 1), PIXELS),
        (PIXELS / np.float32(255), PIXELS),
        (Tensor(PIXELS), PIXELS),
        (Tensor(PIXELS.transpose(2, 0, 1)), PIXELS),
        (Tensor(PIXELS.transpose(2, 0, 1) / np.float32(255)), PIXELS),
        (Tensor(PIXELS[:3, :, :].copy()), PIXELS[:3].transpose(1, 2, 0)),  # 3 x 6 x 3: a tensor's channels come first
        (PIXELS[:3], PIXELS[:3]),  # and an array's last
    ],
)
def test_arrays_and_tensors_are_images(array, expected):
    assert np.array_equal(np.asarray(open_image(array)), expected)
    assert np.array_equal(np.asarray(Page(id="a", image=array).image), expected)
    assert np.array_equal(np.asarray(Query(image=array).image.convert("RGB")), expected)
    assert is_image(array)


def test_a_page_keeps_its_pixels_when_the_array_is_written_to():
    array = PIXELS[:, :, 0].copy()
    page = Page(id="a", image=array)
    digest = page.sha256
    array[:] = 0
    assert page.replace(text="").sha256 == Page(id="b", image=PIXELS[:, :, 0]).sha256 == digest


def test_tensors_of_torch_are_images():
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(PIXELS.copy()).permute(2, 0, 1)
    assert np.array_equal(np.asarray(open_image(tensor)), PIXELS)
    assert np.array_equal(np.asarray(open_image((tensor / 255).requires_grad_())), PIXELS)
    with pytest.raises(ConfigError, match="cannot be read as an array"):
        open_image(tensor.to(torch.bfloat16))


@pytest.mark.parametrize(
    "array",
    [PIXELS.astype(np.int64), PIXELS.astype(np.uint16), PIXELS * 2.0, np.full((4, 4), np.nan), PIXELS[None],
     PIXELS[:, :, :2], np.zeros((0, 4, 3), np.uint8), np.uint8(3), np.array(["a.png"]), PIXELS > 3],
)  # fmt: skip
def test_arrays_that_are_no_image_are_named_with_shape_and_type(array):
    with pytest.raises(ConfigError, match=r"page 'a': expected an array of uint8.* got .* of shape \("):
        Page(id="a", image=array)


def test_file_objects_are_read_from_their_start(tmp_path):
    data = image_bytes("PNG")
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "a.png.gz").write_bytes(gzip.compress(data))
    expected = open_image(data).tobytes()
    stream = io.BytesIO(data)
    stream.read()
    with (
        (tmp_path / "a.png").open("rb") as file,
        (tmp_path / "a.png").open("rb", buffering=0) as raw,
        gzip.open(tmp_path / "a.png.gz") as unpacked,
        tempfile.SpooledTemporaryFile() as spooled,
    ):
        spooled.write(data)
        for source in (stream, file, raw, unpacked, spooled):
            assert open_image(source).tobytes() == expected
            assert read_image_bytes(source) == data
            assert Page(id="a", image=source).image_source == Query(image=source).image == data
            assert Video((source,)).frames == (data,)
            assert is_image(source)


def test_file_objects_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    closed = io.BytesIO(b"x")
    closed.close()
    with (tmp_path / "a.txt").open() as text, pytest.raises(ConfigError, match=r"page 'a': .* binary mode"):
        Page(id="a", image=text)
    with pytest.raises(PageError, match="page 'a': cannot be read: I/O operation on closed file"):
        Page(id="a", image=closed)
    monkeypatch.setattr(images_module, "MAX_IMAGE_BYTES", 2**21)
    with pytest.raises(PageError, match="query: more than 2,097,152 bytes"):
        Query(image=io.BytesIO(bytes(2**21 + 1)))


def test_what_is_no_image_names_its_owner():
    for make in (lambda image: Page(id="a", image=image), lambda image: Query(image=image), lambda i: Video((i,))):
        with pytest.raises(ConfigError, match=r"(page 'a'|query|video): an image is .*, not int"):
            make(3)
    assert plain_image(PurePosixPath("a.png")) == Path("a.png")
    assert plain_image(bytearray(b"abc")) == plain_image(memoryview(b"abc")) == b"abc"


@pytest.mark.parametrize("single", [PIXELS, PIXELS[:, :, 0], io.BytesIO(b"x"), b"x", Path("a.png")])
def test_a_single_image_is_no_list_of_its_rows(single):
    from colqwen3_retrievers.encoding.encoder import _listed

    with pytest.raises(ConfigError, match=f"expected a list, got {type(single).__name__}"):
        _listed(single, "images")
    assert len(list(_listed(np.stack([PIXELS, PIXELS]), "images"))) == 2


# --- memory --------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys
from pathlib import Path
from PIL import Image, ImageCms
from colqwen3_retrievers import load_pages
Image.init()
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
for page in load_pages(Path(sys.argv[1])):
    page.image, page.sha256
print((peak() - before) / (4000 * 2500 * 4))
"""


@pytest.mark.parametrize(
    ("kind", "mode", "options", "most"),
    [
        ("PNG", "RGBA", {}, 3), ("PNG", "P", {}, 3), ("JPEG", "CMYK", {}, 3),
        ("TIFF", "1", {"compression": "group4"}, 3), ("TIFF", "F", {}, 3),
        ("WEBP", "RGB", {"lossless": True}, 4), ("JPEG2000", "RGB", {}, 5),
    ],
)  # fmt: skip
def test_opening_and_hashing_takes_little_more_than_the_decoded_image(tmp_path, kind, mode, options, most):
    if kind == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("this Pillow has no JPEG 2000")
    image = Image.new(mode, (4000, 2500), 1 if mode in "1PFI;16" else "red")
    image.save(tmp_path / "a.png", kind, **options)
    del image
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < most + 0.3


def test_a_digest_in_strips_is_that_of_all_pixels():
    image = Image.effect_noise((1500, 1999), 90).convert("RGB")
    expected = hashlib.sha256(b"image\0001500x1999\0" + image.tobytes() + b"text\0").hexdigest()
    assert Page(id="a", image=image).sha256 == expected


def test_hashing_copies_a_strip_at_a_time():
    page = Page(id="a", image=Image.new("RGB", (4000, 3000)))
    tracemalloc.start()
    try:
        page.sha256  # noqa: B018 - computed when it is read
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4000 * 3000 * 3 / 4


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_an_opened_image_leaves_its_file_and_decoder_behind(kind):
    assert type(open_image(image_bytes(kind))) is Image.Image


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    inside, counts, lock = 0, [], threading.Lock()
    original = PngImagePlugin.PngImageFile.load

    def slow(self):
        nonlocal inside
        if self.tile:  # not decoded yet
            with lock:
                inside += 1
                counts.append(inside)
            threading.Event().wait(0.02)
            with lock:
                inside -= 1
        return original(self)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", slow)
    data = image_bytes("PNG", (8, 8))
    for bound, one_at_a_time in ((63, True), (64, False)):
        monkeypatch.setattr(images_module, "_LARGE", bound)
        counts.clear()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(open_image, [data] * 8))
        assert (max(counts) == 1) == one_at_a_time


def test_a_loaded_file_is_freed_before_its_page_is_used(tmp_path):
    (tmp_path / "a.webp").write_bytes(image_bytes("WEBP"))
    pages = load_pages(tmp_path)
    next(pages)
    assert "image" not in pages.gi_yieldfrom.gi_frame.f_locals


def test_an_array_and_a_file_object_are_questions():
    from colqwen3_retrievers.index.search import to_encode

    queries, _ = to_encode([PIXELS, io.BytesIO(b"x"), "text"])
    assert [type(getattr(query, "image", query)) for query in queries] == [Image.Image, bytes, str]
