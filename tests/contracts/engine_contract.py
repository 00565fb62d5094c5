"""What every engine must do, as a class to subclass in a module that gives the fixture ``open_encoder``.

``open_encoder(folder, **settings)`` makes a ``ColQwen3Encoder`` of the engine under test.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, MultiVector, Page, Query, Video, similarity_map
from colqwen3_retrievers.errors import EncodeError
from tests.checkpoints import TinyCheckpoint
from tests.reference import QUERY, TEXT, image_prompt, reference_embeddings, reference_video

SENTENCE = "what was the revenue of 2024?"
BESIDE = "the revenue in Übersee"
MIN_COSINE = 0.9999


def assert_exact(expected: list[np.ndarray], actual: list[MultiVector] | list[np.ndarray]) -> None:
    """Same number of tokens, unit rows, and each token's cosine at least 0.9999."""
    assert len(expected) == len(actual)
    for want, got in zip(expected, (np.asarray(item) for item in actual), strict=True):
        assert got.shape == want.shape, f"{got.shape} instead of {want.shape}"
        assert got.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1.0, atol=1e-5)
        cosine = (want * got).sum(axis=1)
        assert cosine.min() >= MIN_COSINE, f"token {cosine.argmin()} of {len(want)} has cosine {cosine.min():.6f}"


def pictures() -> list[Image.Image]:
    """Three sizes: one that is read as it is, one below the bounds' grid, one above the bounds."""
    rng = np.random.default_rng(5)
    sizes = ((320, 256), (301, 517), (1500, 1100))
    return [_smooth(rng, width, height) for width, height in sizes]


def _smooth(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    coarse = Image.fromarray(rng.integers(0, 255, (height // 9, width // 9, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BILINEAR)


class EngineContract:
    """Exactness against plain transformers, for five families and every kind of input."""

    def test_family_and_dim_are_told(self, encoder: ColQwen3Encoder, checkpoint: TinyCheckpoint) -> None:
        assert encoder.info.family == checkpoint.family
        assert encoder.info.dim == (64 if checkpoint.family == "nemotron" else 48)

    def test_queries_are_exact(self, encoder: ColQwen3Encoder, checkpoint: TinyCheckpoint) -> None:
        texts = [SENTENCE, "revenue", "Describe the image of 2024: ¿dónde?"]
        expected = reference_embeddings(checkpoint, [QUERY[checkpoint.family] % text for text in texts], [])
        assert_exact(expected, encoder.encode_queries(texts))

    def test_images_of_three_sizes_are_exact(self, encoder: ColQwen3Encoder, checkpoint: TinyCheckpoint) -> None:
        images = pictures()
        expected = reference_embeddings(checkpoint, [image_prompt(checkpoint.family)] * 3, images)
        assert_exact(expected, encoder.encode_images(images))

    def test_image_queries_are_exact(self, encoder: ColQwen3Encoder, checkpoint: TinyCheckpoint) -> None:
        image = pictures()[1]
        expected = reference_embeddings(checkpoint, [image_prompt(checkpoint.family)], [image])
        assert_exact(expected, encoder.encode_queries([Query(image=image)]))

    def test_image_with_text_queries_are_exact(self, encoder: ColQwen3Encoder, checkpoint: TinyCheckpoint) -> None:
        images = pictures()[:2]
        prompts = [image_prompt(checkpoint.family, BESIDE), image_prompt(checkpoint.family)]
        expected = reference_embeddings(checkpoint, prompts, images)
        queries = [Query(text=f" {BESIDE}\n", image=images[0]), Query(image=images[1])]
        assert_exact(expected, encoder.encode_queries(queries))

    def test_text_documents_are_exact(self, encoder: ColQwen3Encoder, checkpoint: TinyCheckpoint) -> None:
        expected = reference_embeddings(checkpoint, [TEXT[checkpoint.family] % SENTENCE], [])
        assert_exact(expected, encoder.encode_texts([SENTENCE]))

    def test_text_beside_an_image_only_with_include_text(
        self, checkpoint: TinyCheckpoint, open_encoder: Callable[..., ColQwen3Encoder]
    ) -> None:
        page = Page(id="p", image=pictures()[0], text=BESIDE)
        with_text = reference_embeddings(checkpoint, [image_prompt(checkpoint.family, BESIDE)], [pictures()[0]])
        without = reference_embeddings(checkpoint, [image_prompt(checkpoint.family)], [pictures()[0]])
        with open_encoder(checkpoint.folder, dtype="float32", include_text=True) as encoder:
            assert_exact(with_text, encoder.encode_pages([page]))
        with open_encoder(checkpoint.folder, dtype="float32") as encoder:
            assert_exact(without, encoder.encode_pages([page]))

    def test_query_beside_pages_in_one_batch(self, encoder: ColQwen3Encoder, checkpoint: TinyCheckpoint) -> None:
        images = pictures()[:2]
        expected = reference_embeddings(
            checkpoint, [image_prompt(checkpoint.family), QUERY[checkpoint.family] % SENTENCE,
                         image_prompt(checkpoint.family, BESIDE)], images,
        )  # fmt: skip
        futures = [
            encoder.submit_pages([Page(id="a", image=images[0])]),
            encoder.submit_queries([SENTENCE, Query(image=images[1], text=BESIDE)]),
        ]
        assert_exact(expected, [mv for future in futures for mv in future.result(60)])

    @pytest.mark.parametrize("n_frames", [2, 3])
    def test_videos_are_exact_where_there_is_a_prompt(
        self, encoder: ColQwen3Encoder, checkpoint: TinyCheckpoint, n_frames: int
    ) -> None:
        rng = np.random.default_rng(1)
        frames = [_smooth(rng, 320, 288) for _ in range(n_frames)]
        times = [0.5 * i for i in range(n_frames)]
        video = Video(tuple(frames), tuple(times))
        if checkpoint.family != "tomoro":
            with pytest.raises(EncodeError, match="has no prompt for videos"):
                encoder.encode_videos([video])
            return
        prompt = (
            "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Describe the video.<|im_end|><|endoftext|>"
        )
        expected = reference_video(checkpoint, prompt, frames, times)
        assert_exact([expected], encoder.encode_videos([video]))

    def test_token_counts(self, encoder: ColQwen3Encoder, checkpoint: TinyCheckpoint) -> None:
        mv = encoder.encode_images([pictures()[0]])[0]
        assert mv.grid == (8, 10)
        beside = {"tomoro": 11, "ops": 14, "nemotron": 13, "sauerkraut": 11, "colpali": 11}
        assert len(mv) == 80 + beside[checkpoint.family]
        assert mv.visual is not None
        assert mv.visual == mv.content
        assert len(mv.vectors[mv.visual]) == 80

    def test_content_of_a_query_leaves_prompt_and_augmentation_out(self, encoder: ColQwen3Encoder) -> None:
        mv = encoder.encode_queries([SENTENCE])[0]
        assert mv.tokens is not None
        assert "".join(mv.tokens[mv.content]).strip() == SENTENCE

    def test_similarity_maps_are_exact(self, encoder: ColQwen3Encoder, checkpoint: TinyCheckpoint) -> None:
        [query], images = encoder.encode_queries([SENTENCE]), pictures()
        asked = reference_embeddings(checkpoint, [QUERY[checkpoint.family] % SENTENCE], [])[0]
        pages = reference_embeddings(checkpoint, [image_prompt(checkpoint.family)] * 3, images)
        assert query.tokens is not None
        matter = [
            i for i, token in enumerate(query.tokens)
            if i in range(len(query))[query.content] and token.strip() not in ("", "?")
        ]  # fmt: skip
        assert 0 < len(matter) < len(query)
        for rows, mv in zip(pages, encoder.encode_images(images), strict=True):
            found = similarity_map(query, mv)
            assert mv.grid is not None
            assert mv.visual is not None
            expected = (asked[matter] @ rows[mv.visual].T).reshape(-1, *mv.grid)
            np.testing.assert_allclose(found.per_token, expected, atol=5e-3)
            np.testing.assert_allclose(found.values, expected.max(axis=0), atol=5e-3)
            assert found.tokens == tuple(query.tokens[i] for i in matter)

    def test_maps_of_an_image_with_text_leave_the_instruction_out(
        self, encoder: ColQwen3Encoder, checkpoint: TinyCheckpoint
    ) -> None:
        asked_with, shown = pictures()[:2]
        [query] = encoder.encode_queries([Query(text=f"{BESIDE}?", image=asked_with)])
        [page] = encoder.encode_images([shown])
        prompts = [image_prompt(checkpoint.family, f"{BESIDE}?"), image_prompt(checkpoint.family)]
        asked, kept = reference_embeddings(checkpoint, prompts, [asked_with, shown])
        assert query.tokens is not None
        assert query.visual is not None
        assert page.visual is not None
        assert page.grid is not None
        assert "".join(query.tokens[query.content]).split()[0] == BESIDE.split()[0], "what follows the instruction"
        text = [i for i in range(len(query))[query.content] if query.tokens[i].strip() not in ("", "?")]
        matter = [*range(len(query))[query.visual], *text]
        found = similarity_map(query, page)
        assert found.tokens == tuple(query.tokens[i] for i in matter)
        expected = (asked[matter] @ kept[page.visual].T).reshape(-1, *page.grid)
        np.testing.assert_allclose(found.per_token, expected, atol=5e-3)
        np.testing.assert_allclose(found.values, expected.max(axis=0), atol=5e-3)

    def test_batches_do_not_change_results(self, encoder: ColQwen3Encoder) -> None:
        texts = [SENTENCE[: 3 + i] for i in range(20)]
        together = encoder.encode_queries(texts)
        for text, mv in zip(texts, together, strict=True):
            alone = encoder.encode_queries([text])[0]
            assert np.abs(alone.vectors - mv.vectors).max() <= 1e-5
