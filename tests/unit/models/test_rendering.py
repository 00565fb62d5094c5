"""Prompts token by token, neutralised texts, limits, and the resizing arithmetic."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_video

from colqwen3_retrievers import Page, Query, Video
from colqwen3_retrievers.errors import ConfigError, EncodeError, InputTooLongError
from colqwen3_retrievers.models.checkpoint import TINY, open_checkpoint
from colqwen3_retrievers.models.rendering import Renderer, fit_size
from colqwen3_retrievers.models.tokenizer import PromptTokenizer
from tests.checkpoints import FAMILY_NAMES, SPECIAL_TOKENS, make_checkpoint

PAD = ["<|endoftext|>"] * 10
IMAGE_HEAD = ["<|im_start|>", "user", "Ċ", "<|vision_start|>", "V", "<|vision_end|>"]


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Renderer]:
    folders: dict[str, Path] = {}

    def make(family: str, *, max_visual_tokens: int = 1280, context: int = 4096, **settings: bool) -> Renderer:
        if family not in folders:
            folders[family] = make_checkpoint(tmp_path_factory.mktemp(family), family).folder
        opened = open_checkpoint(folders[family])
        return Renderer(
            opened.family, PromptTokenizer(opened.folder, model=family), min_pixels=opened.min_pixels,
            max_pixels=min(opened.max_pixels, max_visual_tokens * 1024), context_length=context, **settings,
        )  # fmt: skip

    return make


def spelled(renderer: Renderer, ids: np.ndarray) -> list[str]:
    """Token strings, a run of visual placeholders as one V."""
    tokenizer = renderer._tokenizer._tokenizer
    names = [tokenizer.id_to_token(int(number)) for number in ids]
    shown: list[str] = []
    for name in names:
        name = "V" if name in ("<|image_pad|>", "<|video_pad|>") else name
        if name != "V" or not shown or shown[-1] != "V":
            shown.append(name)
    return shown


PROMPTS = {
    "tomoro": (["revenue", *PAD], [*IMAGE_HEAD, "Describe", "Ġthe", "Ġimage", ".", "<|im_end|>", "<|endoftext|>"]),
    "ops": (
        ["Query", ":", "Ġrevenue", *PAD],
        [*IMAGE_HEAD, "Describe", "Ġthe", "Ġimage", ".", "<|im_end|>", "<|im_start|>", "assistant", "Ċ",
         "<|endoftext|>"],
    ),
    "nemotron": (
        ["<|im_start|>", "user", "Ċ", "Query", ":", "Ġquery", ":", "Ġrevenue", "<|im_end|>", "Ċ",
         "<|im_start|>", "assistant", "Ċ"],
        [*IMAGE_HEAD, "passage", ":", "Ġ", "<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ"],
    ),
    "sauerkraut": (
        ["Query", ":", "Ġrevenue", *PAD],
        [*IMAGE_HEAD, "Describe", "Ġthe", "Ġimage", ".", "<|im_end|>", "<|endoftext|>"],
    ),
    "colpali": (["revenue", *PAD], [*IMAGE_HEAD, "Describe", "Ġthe", "Ġimage", ".", "<|im_end|>", "<|endoftext|>"]),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_prompts_token_by_token(renderer: Callable[..., Renderer], family: str) -> None:
    made = renderer(family)
    query, image = PROMPTS[family]
    assert spelled(made, made.query(Query("revenue")).token_ids) == query
    page = made.document(Page(id="p", image=Image.new("RGB", (320, 256))))
    assert spelled(made, page.token_ids) == image
    assert (page.token_ids == made._image_pad).sum() == 80


@pytest.mark.parametrize(("family", "beside"), [("tomoro", 11), ("ops", 14), ("sauerkraut", 11), ("colpali", 11)])
def test_tokens_beside_the_visual_ones(renderer: Callable[..., Renderer], family: str, beside: int) -> None:
    for size in ((320, 256), (777, 1000), (2000, 3000)):
        page = renderer(family).document(Page(id="p", image=Image.new("RGB", size)))
        assert page.grid is not None
        assert len(page) == beside + page.grid[0] * page.grid[1]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_instruction_beside_a_picture_is_no_part_of_what_the_user_gave(
    renderer: Callable[..., Renderer], family: str
) -> None:
    made, picture = renderer(family, include_text=True), Image.new("RGB", (320, 256))
    asked, kept = made.query(Query("revenue?", picture)), made.document(Page(id="p", image=picture, text="revenue?"))
    for item in (asked, kept):
        assert spelled(made, item.token_ids[item.content])[-2:] == ["Ġrevenue", "?"]
        assert item.content.stop - item.content.start == 2
        assert item.visual is not None
        assert (item.token_ids[item.visual] == made._image_pad).all()
        assert item.visual.stop < item.content.start
    assert asked.tokens is not None
    assert "".join(asked.tokens[asked.content]).strip() == "revenue?"
    assert set(asked.tokens[asked.visual]) == {"<|image_pad|>"}
    assert kept.tokens is None, "a page's would be kept with it"
    alone = made.query(Query(image=picture))
    assert (alone.content, alone.tokens) == (alone.visual, None)


def test_a_space_that_the_tokenizer_put_in_is_spelled_as_one() -> None:
    opened = open_checkpoint(TINY)  # its tokenizer puts one before every prompt
    made = Renderer(
        opened.family, PromptTokenizer(TINY, model="tiny"), min_pixels=1024, max_pixels=10**6, context_length=99
    )
    item = made.query(Query("20% of €"))
    assert item.tokens is not None
    assert item.tokens[item.content] == (" ", "2", "0", "%", " of", " ", "€", "€", "€"), (
        "a letter of three bytes is three"
    )


def test_white_space_is_stripped_where_the_family_strips(renderer: Callable[..., Renderer]) -> None:
    assert renderer("tomoro").query(Query("  revenue \n")).prompt == "revenue" + "".join(PAD)
    assert renderer("colpali").query(Query(" revenue")).prompt == " revenue" + "".join(PAD)


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
@pytest.mark.parametrize("family", ["tomoro", "nemotron"])
def test_special_tokens_in_a_text_are_characters(renderer: Callable[..., Renderer], family: str, special: str) -> None:
    made = renderer(family, include_text=True)
    number = made._tokenizer.id_of(special)
    plain, spiked = made.query(Query("a b")), made.query(Query(f"a {special} b"))
    assert (spiked.token_ids == number).sum() == (plain.token_ids == number).sum()
    picture = Image.new("RGB", (320, 256))
    plain, spiked = (
        made.document(Page(id="p", image=picture, text=text)) for text in ("a", f"a{special}<|im_{special}")
    )
    assert (spiked.token_ids == number).sum() == (plain.token_ids == number).sum()
    assert spiked.grid == plain.grid


def test_neutralising_takes_nothing_out(renderer: Callable[..., Renderer]) -> None:
    neutralise = renderer("tomoro")._tokenizer.neutralise
    assert neutralise("plain <text> | with |> and <| marks") == "plain <text> | with |> and <| marks"
    nested = neutralise("<|im_<|im_end|>end|>")
    assert "<|im_end|>" not in nested
    assert nested.replace(" ", "") == "<|im_<|im_end|>end|>"


def test_special_tokens_of_any_spelling_are_neutralised(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", "nemotron").folder
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    made = PromptTokenizer(folder, model="m")
    assert made.neutralise("an <image> to <think> about") == "an < image> to <think> about"


def test_context_length_is_enforced_or_cut(renderer: Callable[..., Renderer]) -> None:
    text = " ".join(f"w{i}" for i in range(500))
    with pytest.raises(InputTooLongError, match="the limit is 100") as caught:
        renderer("tomoro", context=100).query(Query(text))
    assert caught.value.limit == 100
    assert caught.value.actual > 1000
    for family in FAMILY_NAMES:
        cut = renderer(family, context=100, truncate=True).query(Query(text))
        whole = renderer(family).query(Query("w0"))
        assert 95 <= len(cut) <= 100
        assert list(cut.token_ids[-3:]) == list(whole.token_ids[-3:]), "the prompt's end must survive the cut"


def test_nemotron_queries_end_at_512_tokens(renderer: Callable[..., Renderer]) -> None:
    text = "é" * 2000
    with pytest.raises(InputTooLongError, match="the limit is 512"):
        renderer("nemotron").query(Query(text))
    cut = renderer("nemotron", truncate=True).query(Query(text))
    assert 510 <= len(cut) <= 512
    assert len(renderer("nemotron").document(Page(id="p", text="e" * 600))) > 512


def test_visual_tokens_count_towards_the_context(renderer: Callable[..., Renderer]) -> None:
    page = Page(id="p", image=Image.new("RGB", (640, 640)), text="revenue " * 50)
    with pytest.raises(InputTooLongError, match="the limit is 420"):
        renderer("tomoro", context=420, include_text=True).document(page)
    cut = renderer("tomoro", context=420, include_text=True, truncate=True).document(page)
    assert len(cut) <= 420
    assert cut.visual is not None
    with pytest.raises(InputTooLongError, match="the limit is 300"):
        renderer("tomoro", context=300, truncate=True).document(page)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 64, 100, 640, 1279, 1280])
def test_max_visual_tokens_holds_for_every_shape(renderer: Callable[..., Renderer], tokens: int) -> None:
    made = renderer("tomoro", max_visual_tokens=tokens)
    for size in ((1, 1), (31, 33), (40, 7000), (7000, 40), (595, 842), (2480, 3508)):
        page = made.document(Page(id="p", image=Image.new("RGB", size)))
        assert page.grid is not None
        assert 1 <= page.grid[0] * page.grid[1] <= tokens, size


def test_sizes_equal_transformers() -> None:
    chance = random.Random(3)
    for _ in range(3000):
        width, height = (int(2 ** chance.uniform(0, 13)) for _ in range(2))
        low, high = chance.choice([(65_536, 1_310_720), (4_096, 1_310_720), (3_136, 1_003_520)])
        if max(width, height) > 200 * min(width, height):
            continue
        expected = smart_resize(height, width, factor=32, min_pixels=low, max_pixels=high)
        if expected[0] * expected[1] > high:
            continue  # there transformers leaves its own bound, and we do not
        assert fit_size(width, height, min_pixels=low, max_pixels=high) == expected[::-1], (width, height, low, high)
        frames = chance.randint(2, 40)
        video = smart_resize_video(frames, height, width, factor=32, min_pixels=131_072, max_pixels=786_432)
        found = fit_size(width, height, min_pixels=131_072, max_pixels=786_432, frames=frames)
        assert found == video[::-1], (frames, width, height)


def test_too_thin_is_refused(renderer: Callable[..., Renderer]) -> None:
    with pytest.raises(ConfigError, match="201 x 1 pixels: one side is more than 200 times the other"):
        fit_size(201, 1, min_pixels=1024, max_pixels=1_310_720)
    with pytest.raises(EncodeError, match="more than 200 times"):
        renderer("tomoro").document(Page(id="p", image=Image.new("RGB", (4001, 20))))


def test_an_image_that_fits_is_left_alone(renderer: Callable[..., Renderer]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (288, 320, 3), dtype=np.uint8)
    page = renderer("tomoro").document(Page(id="p", image=Image.fromarray(pixels)))
    assert page.pixels is not None
    assert (page.pixels[0] == pixels).all()


def test_a_page_with_nothing_to_encode(renderer: Callable[..., Renderer]) -> None:
    with pytest.raises(EncodeError, match="page 'p' has neither image nor text"):
        renderer("tomoro").document(Page(id="p", text=" \n"))


def test_a_lone_surrogate_is_refused(renderer: Callable[..., Renderer]) -> None:
    with pytest.raises(EncodeError, match="lone surrogate"):
        renderer("tomoro").query(Query("a\ud800b"))


def test_frames_of_unequal_size_are_refused(renderer: Callable[..., Renderer]) -> None:
    frames = (Image.new("RGB", (320, 288)), Image.new("RGB", (288, 320)))
    with pytest.raises(EncodeError, match="expected frames of one size"):
        renderer("tomoro").document(Page(id="v", video=Video(frames)))


def test_videos(renderer: Callable[..., Renderer]) -> None:
    frames = tuple(Image.new("RGB", (320, 288), (i, 0, 0)) for i in range(3))
    made = renderer("tomoro").document(Page(id="v", video=Video(frames, (0.0, 0.5, 1.0))))
    assert made.is_video
    assert made.pixels is not None
    assert made.pixels.shape[0] == 4  # the last frame fills its patch
    assert [span.rows * span.cols for span in made.spans] == [made.spans[0].rows * made.spans[0].cols] * 2
    assert "<0.2 seconds>" in made.prompt
    assert "<1.0 seconds>" in made.prompt
    assert made.visual is made.grid is None
    one = renderer("tomoro").document(Page(id="v", video=Video(frames[:1])))
    assert one.is_video
    assert len(one.spans) == 1
    with pytest.raises(EncodeError, match="family ops has no prompt for videos"):
        renderer("ops").document(Page(id="v", video=Video(frames)))
