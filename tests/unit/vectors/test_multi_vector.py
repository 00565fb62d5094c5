"""Multi-vectors, packed embeddings, pages, queries, videos: what they take, refuse and keep."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from colqwen3_retrievers import EncoderInfo, MultiVector, PackedEmbeddings, Page, Query, Video
from colqwen3_retrievers.errors import ConfigError, DimensionError, PageError

UNIT = np.eye(4, dtype=np.float32)


def test_a_multi_vector_is_its_array_and_read_only() -> None:
    mv = MultiVector(UNIT)
    assert np.asarray(mv) is mv.vectors
    assert np.asarray(mv, dtype=np.float16).dtype == np.float16
    assert np.array(mv) is not mv.vectors
    assert (len(mv), mv.dim) == (4, 4)
    with pytest.raises(ValueError, match="read-only"):
        mv.vectors[0, 0] = 2
    assert UNIT.flags.writeable, "the caller's own array is left as it is"


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda mv: pickle.loads(pickle.dumps(mv))])
def test_copies_of_a_multi_vector_are_whole_and_read_only(clone: Callable[[MultiVector], MultiVector]) -> None:
    mv = MultiVector(UNIT, content=slice(1, 3), visual=slice(0, 4), tokens=tuple("abcd"), grid=(2, 2))
    other = clone(mv)
    assert (other.vectors == mv.vectors).all()
    assert (other.content, other.visual, other.tokens, other.grid) == (mv.content, mv.visual, mv.tokens, mv.grid)
    assert not other.vectors.flags.writeable


def test_half_precision_rows_are_taken_as_float32() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 320))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert MultiVector(rows.astype(np.float16)).vectors.dtype == np.float32


BAD_MULTI_VECTORS: list[tuple[Callable[[], object], str]] = [
    (lambda: MultiVector(np.zeros((0, 4), np.float32)), r"expected shape \(n_tokens >= 1, dim >= 1\), got \(0, 4\)"),
    (lambda: MultiVector(np.ones(4, np.float32)), r"got \(4,\)"),
    (lambda: MultiVector(np.ones((2, 2, 2), np.float32)), r"got \(2, 2, 2\)"),
    (lambda: MultiVector([[1.0, 0.0], [1.0]]), "rows of unequal length"),
    (lambda: MultiVector(np.eye(2, dtype=np.int64)), "expected floating token embeddings, got int64"),
    (lambda: MultiVector(np.array([[np.nan, 1.0]])), "NaN or infinity inside"),
    (lambda: MultiVector(np.array([[1.0, 0.0], [0.0, 0.5]])), r"row 1 has length 0\.500000, expected unit rows"),
    (lambda: MultiVector(np.array([[0.0, 0.0]])), "expected unit rows"),
    (lambda: MultiVector(UNIT, tokens=("a",)), "tokens: 1 strings for 4 tokens"),
    (lambda: MultiVector(UNIT, visual=slice(0, 3), grid=(2, 2)), "grid: 2 x 2 for 3 visual tokens"),
    (lambda: MultiVector(UNIT, clusters=np.array([0, 4])), "clusters: expected one pooled row index"),
    (lambda: PackedEmbeddings(UNIT.astype(np.float64), [0, 4]), "expected float32 or float16"),
    (lambda: PackedEmbeddings(UNIT, [0, 2, 2, 4]), "at least one token a document"),
    (lambda: PackedEmbeddings(UNIT, [0, 3]), "offsets: expected 0 < ... < total_tokens"),
    (lambda: PackedEmbeddings.pack([]), "at least one multi-vector"),
    (lambda: PackedEmbeddings.pack([UNIT, np.eye(3, dtype=np.float32)]), "document 1: expected dim 4, got 3"),
    (lambda: EncoderInfo.from_dict({"model": "m"}), "encoder info: .*missing"),
]


@pytest.mark.parametrize(("make", "message"), BAD_MULTI_VECTORS, ids=lambda value: str(value)[:50])
def test_bad_multi_vectors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_tensors_that_numpy_cannot_take_are_named() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ConfigError, match="cannot be read as an array"):
        MultiVector(torch.eye(2, dtype=torch.bfloat16))


def test_packed_embeddings_give_documents_back() -> None:
    packed = PackedEmbeddings.pack([UNIT[:3], UNIT[3:]], dtype=np.float16)
    assert [len(document) for document in packed] == [3, 1]
    assert (packed[-1] == UNIT[3:]).all()
    with pytest.raises(IndexError):
        packed[2]
    with pytest.raises(DimensionError):
        PackedEmbeddings.pack([UNIT, UNIT[:, :2] / 1.0 + 0.0])


def picture() -> Image.Image:
    return Image.effect_noise((32, 24), 80).convert("RGB")


def test_a_page_knows_its_content_whatever_file_holds_it(tmp_path: Path) -> None:
    image = picture()
    for name in ("a.png", "b.bmp", "c.webp"):
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    forms = [image, tmp_path / "a.png", str(tmp_path / "b.bmp"), (tmp_path / "c.webp").read_bytes()]
    digests = {Page(id=str(i), image=form).sha256 for i, form in enumerate(forms)}
    assert len(digests) == 1
    assert Page(id="x", image=image, text="other").sha256 not in digests
    assert Page(id="x", image=image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).sha256 not in digests


def test_a_page_opens_its_image_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    page = Page(source="a.pdf", number=7, image=path)
    assert page.id == "a.pdf#page=7"
    assert page.image_path == path
    assert page.image is not None
    assert page.image.size == (32, 24)
    path.unlink()
    with pytest.raises(PageError, match=r"a\.png: cannot be read"):
        _ = page.image


def test_replacing_the_content_of_a_page_renews_its_digest() -> None:
    page = Page(id="p", text="a")
    assert page.replace(metadata={"n": 1}).sha256 == page.sha256
    assert page.replace(text="b").sha256 != page.sha256


def test_a_page_keeps_nothing_of_what_its_metadata_came_from() -> None:
    given = {"tags": ["a"]}
    page = Page(id="p", text="a", metadata=given)
    given["tags"].append("b")
    assert page.metadata == {"tags": ["a"]}


BAD_PAGES: list[tuple[Callable[[], object], str]] = [
    (lambda: Page(), "page: give an id or a source"),
    (lambda: Page(id=""), "expected a non-empty string id"),
    (lambda: Page(id=3), "expected a non-empty string id, got 3"),
    (lambda: Page(id="p", number=0), "page 'p': number: expected a whole number from 1, got 0"),
    (lambda: Page(id="p", number=True), "number: expected a whole number from 1, got True"),
    (lambda: Page(id="p", text=None), "page 'p': expected text as a string, got NoneType"),
    (lambda: Page(id="p", image=np.zeros((2, 2, 2))), "page 'p': expected an array of uint8"),
    (
        lambda: Page(id="p", image=3),
        "an image is a PIL image, a path, bytes, a binary file object, an array or a tensor",
    ),
    (lambda: Page(id="p", metadata={"x": object()}), "page 'p': metadata must be JSON"),
    (lambda: Page(id="p", metadata={"x": float("nan")}), "metadata must be JSON"),
    (lambda: Query(), "query: give a text, an image, or both"),
    (lambda: Query("  "), "query: give a text, an image, or both"),
    (lambda: Query(3), "query: expected text as a string, got int"),
    (lambda: Video(()), "video: expected at least one frame"),
    (lambda: Video((picture(),), (1.0, 2.0)), "video: expected 1 rising times"),
    (lambda: Video((picture(),) * 2, (2.0, 1.0)), "video: expected 2 rising times"),
    (lambda: Video((picture(),), (float("inf"),)), "video: expected 1 rising times"),
]


@pytest.mark.parametrize(("make", "message"), BAD_PAGES, ids=lambda value: str(value)[:50])
def test_bad_pages_queries_and_videos(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_infos_differ_by_what_shapes_a_vector() -> None:
    info = EncoderInfo("ab", "m", "tomoro", 128, 1, 1280, False, 1, unverified=("x",), verified=False)
    assert EncoderInfo.from_dict({**info.to_dict(), "later": 1}) == info
