"""Similarity maps: which tokens count, which cells they light, pooled pages, boxes and overlays."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from colqwen3_retrievers import MultiVector, SimilarityMap, similarity_map
from colqwen3_retrievers.errors import ConfigError, DimensionError
from colqwen3_retrievers.models.rendering import fit_size
from colqwen3_retrievers.retrieval import similarity_maps
from colqwen3_retrievers.retrieval.similarity_maps import heat_colours

UNIT = np.eye(8, dtype=np.float32)


def page(rows: int = 2, cols: int = 3) -> MultiVector:
    """A prompt token, a grid of visual tokens that each point their own way, a prompt token."""
    visual = UNIT[1 : 1 + rows * cols]
    return MultiVector(
        np.concatenate([UNIT[:1], visual, UNIT[:1]]), visual=slice(1, 1 + rows * cols), grid=(rows, cols)
    )


def test_each_query_token_lights_its_own_cell() -> None:
    query = MultiVector(UNIT[[1, 6]], tokens=("a", "b"))
    found = similarity_map(query, page())
    assert found.values.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert found.per_token.shape == (2, 2, 3)
    assert found.per_token[1].tolist() == [[0, 0, 0], [0, 0, 1]]
    assert found.tokens == ("a", "b")
    assert not found.pooled


def test_prompt_augmentation_and_punctuation_are_left_out() -> None:
    query = MultiVector(UNIT[[2, 1, 3, 6, 5]], content=slice(1, 4), tokens=("Query:", "a", " ?", " b", "<|endoftext|>"))
    found = similarity_map(query, page())
    assert found.tokens == ("a", " b")
    assert found.values.tolist() == [[1, 0, 0], [0, 0, 1]]


def test_a_query_of_punctuation_alone_still_has_a_map() -> None:
    found = similarity_map(MultiVector(UNIT[[1]], tokens=("?",)), page())
    assert found.tokens == ("?",)


SAYING = [
    "a", "7", "ि", "्", "ा", "ं", "%", "٪", "\uff05", "€", "$", "°", "+", "№", "&", "@", "#", "§", "😀", "\ue000", " b",
    "?!x",
]  # fmt: skip
SILENT = ["", " ", "\t\n", "?", " …", "،", "؟", "„", "—", "(", "_", "*", "\u200d", "\u200b", "\u3000", "।"]


@pytest.mark.parametrize("token", SAYING)
def test_letters_vowel_signs_and_symbols_count(token: str) -> None:
    assert similarity_map(MultiVector(UNIT[[1, 6]], tokens=("?", token)), page()).tokens == (token,)


@pytest.mark.parametrize("token", SILENT)
def test_punctuation_and_white_space_do_not(token: str) -> None:
    assert similarity_map(MultiVector(UNIT[[1, 6]], tokens=("a", token)), page()).tokens == ("a",)


def test_of_a_picture_with_a_text_the_instruction_between_them_is_left_out() -> None:
    query = MultiVector(
        UNIT[[7, 1, 2, 4, 6, 3, 5]], content=slice(4, 6), visual=slice(1, 3), grid=(1, 2),
        tokens=("<|im_start|>", "<|image_pad|>", "<|image_pad|>", "Describe", " red", "?", "<|im_end|>"),
    )  # fmt: skip
    found = similarity_map(query, page())
    assert found.tokens == ("<|image_pad|>", "<|image_pad|>", " red")
    assert found.values.tolist() == [[1, 1, 0], [0, 0, 1]]
    without_strings = MultiVector(query.vectors, content=query.content, visual=query.visual)
    assert len(similarity_map(without_strings, page()).per_token) == 4


def test_a_pooled_page_may_ask_as_well() -> None:
    pooled = MultiVector(
        UNIT[[0, 5, 3, 6]], content=slice(1, 3), visual=slice(1, 3), grid=(1, 2), clusters=np.array([0, 3, 3, 1, 2])
    )
    assert similarity_map(pooled, page()).values.tolist() == [[0, 0, 0], [0, 0, 1]]


def test_pooled_pages_share_values_by_their_clusters() -> None:
    whole = page()
    clusters = np.array([0, 1, 1, 2, 2, 3, 3, 0])
    pooled = MultiVector(UNIT[[0, 1, 3, 6]], visual=whole.visual, grid=whole.grid, clusters=clusters)
    found = similarity_map(MultiVector(UNIT[[1]]), pooled)
    assert found.pooled
    assert found.values.tolist() == [[1, 1, 0], [0, 0, 0]]


def test_boxes_are_connected_regions_best_first_in_pixels() -> None:
    values = np.zeros((4, 5), dtype=np.float32)
    values[0, 0] = values[1, 0] = 0.9
    values[3, 3] = 1.0
    values[2, 2] = 0.95  # touches (3, 3) by a corner only
    found = SimilarityMap(values, values[None])
    boxes = found.boxes((500, 800))
    assert [(box.left, box.top, box.right, box.bottom) for box in boxes] == [
        (300, 600, 400, 800), (200, 400, 300, 600), (0, 0, 100, 400),
    ]  # fmt: skip
    assert [round(box.score, 2) for box in boxes] == [1.0, 0.95, 0.9]
    assert len(found.boxes(top=2)) == 2
    assert found.boxes(threshold=0.99)[0].right == 0.8


def test_a_flat_map_has_no_boxes() -> None:
    flat = np.full((3, 3), 0.4, dtype=np.float32)
    assert SimilarityMap(flat, flat[None]).boxes() == []
    assert SimilarityMap(flat, flat[None]).overlay(Image.new("RGB", (9, 9), "white")).getpixel((4, 4)) == (255,) * 3


def test_an_overlay_colours_what_answered_and_little_else() -> None:
    values = np.zeros((10, 10), dtype=np.float32)
    values[8, 1] = 1
    white = Image.new("RGB", (500, 500), "white")
    made = SimilarityMap(values, values[None]).overlay(white, boxes=1)
    assert made.size == white.size
    assert made.getpixel((450, 50)) == (255, 255, 255)
    assert made.getpixel((75, 425)) != (255, 255, 255)
    assert made.getpixel((50, 400)) == (200, 30, 30), "the frame"
    assert white.getpixel((75, 425)) == (255, 255, 255), "the page itself is left alone"


def blended(found: SimilarityMap, image: Image.Image, opacity: float) -> NDArray[np.float32]:
    """The overlay in plain numpy, nothing rounded; the map's level is 0 and its peak 1."""
    heat = np.asarray(Image.fromarray(np.clip(found.values, 0, 1)).resize(image.size, Image.Resampling.BILINEAR))
    share = (opacity * heat**1.5)[..., None]
    return np.asarray(image) * (1 - share) + heat_colours()[np.rint(heat * 255).astype(int)] * share


@pytest.mark.parametrize("strip", [1, 7_777, 2**20])
def test_an_overlay_is_the_blend_of_page_and_colours(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity_maps, "_STRIP", strip)
    rng = np.random.default_rng(0)
    values = np.zeros((9, 7), dtype=np.float32)
    values[2:6, 3] = (0.3, 1.0, 0.7, 0.1)
    found = SimilarityMap(values, values[None])
    for size in ((203, 301), (5, 4)):
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        for opacity in (0.0, 0.55, 1.0):
            made = np.asarray(found.overlay(image, opacity=opacity), dtype=np.float32)
            assert np.abs(made - blended(found, image, opacity)).max() <= 2.5


def test_an_overlay_takes_little_more_memory_than_the_page() -> None:
    code = (
        "import numpy as np, resource; from PIL import Image; from colqwen3_retrievers import SimilarityMap;"
        "values = np.random.default_rng(0).random((40, 30), dtype=np.float32); image = Image.new('RGB', (4000, 3000));"
        "found = SimilarityMap(values, values[None]); found.overlay(Image.new('RGB', (500, 500)), boxes=3);"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; found.overlay(image, boxes=3);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    kilobytes = int(done.stdout) / (1024 if sys.platform == "darwin" else 1)
    assert kilobytes < 3 * 4 * 4000 * 3000 / 1024, "three pictures of four bytes a pixel"


def test_one_tokens_overlay_differs_from_anothers() -> None:
    found = similarity_map(MultiVector(UNIT[[1, 6]]), page())
    white = Image.new("RGB", (300, 200), "white")
    assert found.overlay(white, token=0).tobytes() != found.overlay(white, token=1).tobytes()


def test_lightness_of_the_colours_never_falls() -> None:
    grey = heat_colours() @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(grey) > -0.5).all()
    assert grey[-1] - grey[0] > 150


def test_errors() -> None:
    text = MultiVector(UNIT[:2])
    with pytest.raises(ConfigError, match="no grid of visual tokens"):
        similarity_map(text, text)
    with pytest.raises(DimensionError, match="expected dim 8, got 2"):
        similarity_map(MultiVector(np.eye(2, dtype=np.float32)), page())
    found = similarity_map(text, page())
    white = Image.new("RGB", (30, 20))
    with pytest.raises(ConfigError, match="opacity: expected 0 to 1, got 2"):
        found.overlay(white, opacity=2)
    with pytest.raises(ConfigError, match="token: expected a whole number from 0 to 1, got 2"):
        found.overlay(white, token=2)
    with pytest.raises(ConfigError, match="top: expected a whole number from 1, got 0"):
        found.boxes(top=0)


def test_print_around_the_answer_is_no_part_of_its_region() -> None:
    values = np.full((12, 20), 0.2, dtype=np.float32)
    values[2:10, 2:18] = 0.7 + 0.02 * np.sin(np.arange(128)).reshape(8, 16)
    values[5, 6:9] = (0.93, 0.96, 0.94)
    [box] = SimilarityMap(values, values[None]).boxes((20, 12))
    assert (box.left, box.top, box.right, box.bottom) == (6, 5, 9, 6)


def test_an_even_paragraph_that_answers_is_one_region() -> None:
    values = np.full((12, 20), 0.2, dtype=np.float32)
    values[3:7, 2:14] = 0.6 + 0.01 * np.sin(np.arange(48)).reshape(4, 12)
    [box] = SimilarityMap(values, values[None]).boxes((20, 12))
    assert (box.left, box.top, box.right, box.bottom) == (2, 3, 14, 7)


def test_the_region_where_most_tokens_agree_comes_first() -> None:
    per_token = np.zeros((2, 6, 6), dtype=np.float32)
    per_token[0, 0, 0] = 1.0  # one token's like
    per_token[:, 4, 4] = 0.9
    first, second = SimilarityMap(per_token.max(axis=0), per_token).boxes((6, 6))
    assert (first.left, first.top) == (4, 4)
    assert (round(first.score, 3), round(second.score, 3)) == (0.9, 0.5)


def test_a_page_of_one_visual_token_answers_with_it() -> None:
    values = np.full((1, 1), 0.4, dtype=np.float32)
    [box] = SimilarityMap(values, values[None]).boxes((30, 20))
    assert (box.left, box.top, box.right, box.bottom) == (0, 0, 30, 20)


@pytest.mark.parametrize("size", [(641, 457), (1000, 93), (77, 700), (40, 33), (2000, 1501)])
def test_boxes_are_the_pixels_that_the_engine_saw_in_those_cells(size: tuple[int, int]) -> None:
    wide, high = fit_size(*size, min_pixels=65_536, max_pixels=1_310_720)
    rows, cols = high // 32, wide // 32
    for row, col in ((0, 0), (rows - 1, cols - 1), (rows // 2, cols // 3)):
        values = np.zeros((rows, cols), dtype=np.float32)
        values[row, col] = 1
        [box] = SimilarityMap(values, values[None]).boxes(size)
        inside = np.zeros(size[::-1], dtype=np.float32)
        edges = (box.left, box.top, box.right, box.bottom)
        inside[round(edges[1]) : max(round(edges[3]), round(edges[1]) + 1),
               round(edges[0]) : max(round(edges[2]), round(edges[0]) + 1)] = 1  # fmt: skip
        seen = np.asarray(Image.fromarray(inside).resize((wide, high), Image.Resampling.BICUBIC))
        cells = seen.reshape(rows, 32, cols, 32).mean(axis=(1, 3))
        assert np.unravel_index(cells.argmax(), cells.shape) == (row, col)
        assert edges == pytest.approx(
            (col / cols * size[0], row / rows * size[1], (col + 1) / cols * size[0], (row + 1) / rows * size[1])
        )


def test_an_overlay_lies_over_the_upright_page() -> None:
    values = np.zeros((3, 5), dtype=np.float32)
    values[2, 0] = 1
    found = SimilarityMap(values, values[None])
    upright = Image.new("RGB", (50, 30), "white")
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    lying.getexif()[0x0112] = 6
    assert ImageOps.exif_transpose(lying).size == upright.size
    assert found.overlay(lying, boxes=1).tobytes() == found.overlay(upright, boxes=1).tobytes()


def test_an_overlay_of_a_pooled_page_says_so() -> None:
    values = np.zeros((10, 10), dtype=np.float32)
    values[1, 1] = 1
    white = Image.new("RGB", (500, 400), "white")
    plain = np.asarray(SimilarityMap(values, values[None]).overlay(white))
    pooled = np.asarray(SimilarityMap(values, values[None], pooled=True).overlay(white))
    differ = np.argwhere((plain != pooled).any(axis=2))
    assert len(differ) > 100
    assert differ[:, 0].min() > 370, "only the lower edge"


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_half_precision_in_a_store_moves_no_box(dtype: type[np.floating[Any]]) -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(12 * 9, 32)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    query = MultiVector(rows[[40, 41]])
    exact = similarity_map(query, MultiVector(rows, visual=slice(None), grid=(12, 9)))
    stored = similarity_map(query, MultiVector(rows.astype(dtype), visual=slice(None), grid=(12, 9)))
    assert np.abs(exact.values - stored.values).max() < 1e-3
    where = [[(b.left, b.top, b.right, b.bottom) for b in made.boxes(top=1)] for made in (exact, stored)]
    assert where[0] == where[1]


@pytest.mark.parametrize(
    "ask",
    [
        lambda found, image: found.boxes(top=2.5),
        lambda found, image: found.boxes(top="3"),
        lambda found, image: found.boxes(threshold="x"),
        lambda found, image: found.boxes(size=(100,)),
        lambda found, image: found.boxes(size=100),
        lambda found, image: found.boxes(size=(float("nan"), 1)),
        lambda found, image: found.of_token(1.0),
        lambda found, image: found.overlay(image, boxes=1.5),
        lambda found, image: found.overlay(image, token=1.5),
        lambda found, image: found.overlay(image, opacity="x"),
        lambda found, image: found.overlay(image, opacity=float("nan")),
        lambda found, image: found.overlay("page.png"),
        lambda found, image: found.overlay(Image.new("RGB", (0, 5))),
        lambda found, image: similarity_map("revenue", page()),
        lambda found, image: similarity_map(MultiVector(UNIT[[1]]), image),
    ],
)
def test_what_is_no_argument_is_named(ask: Any) -> None:
    found = similarity_map(MultiVector(UNIT[[1, 6]], tokens=("a", "b")), page())
    with pytest.raises(ConfigError, match="expected"):
        ask(found, Image.new("RGB", (30, 20)))


def test_numbers_of_numpy_are_numbers() -> None:
    found = similarity_map(MultiVector(UNIT[[1, 6]], tokens=("a", "b")), page())
    assert found.boxes([30, 20], top=np.int64(1), threshold=np.float32(0.5)) == found.boxes(
        (30, 20), top=1, threshold=0.5
    )
