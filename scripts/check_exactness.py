"""Print the worst per-token cosine against plain transformers, by family and kind of input, in float32 on the CPU.

    python scripts/check_exactness.py           # from the repository's root

The tests hold every one of these at 0.9999 or more; this prints how near they really are.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the factory of random checkpoints and the reference

from colqwen3_retrievers import ColQwen3Encoder, MultiVector, Page, Query, Video
from tests.checkpoints import FAMILY_NAMES, make_checkpoint
from tests.contracts.engine_contract import BESIDE, SENTENCE, pictures
from tests.reference import QUERY, TEXT, image_prompt, reference_embeddings, reference_video

VIDEO = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Describe the video.<|im_end|><|endoftext|>"


def worst(expected: list[np.ndarray], found: list[MultiVector]) -> float:
    """Smallest cosine of a token with its counterpart."""
    return min(float((a * b.vectors).sum(axis=1).min()) for a, b in zip(expected, found, strict=True))


def measure(family: str) -> dict[str, float]:
    """Worst cosine of each kind of input of one family."""
    images = pictures()
    alone, beside = image_prompt(family), image_prompt(family, BESIDE)
    with tempfile.TemporaryDirectory() as folder:
        tiny = make_checkpoint(Path(folder), family)
        with (
            ColQwen3Encoder(folder, device="cpu", dtype="float32") as plain,
            ColQwen3Encoder(folder, device="cpu", dtype="float32", include_text=True) as both,
        ):
            pairs = {
                "query": ([QUERY[family] % SENTENCE], [], plain.encode_queries([SENTENCE])),
                "images": ([alone] * 3, images, plain.encode_images(images)),
                "image query": ([alone], images[1:2], plain.encode_queries([Query(image=images[1])])),
                "image+text query": ([beside], images[:1], plain.encode_queries([Query(BESIDE, images[0])])),
                "text": ([TEXT[family] % SENTENCE], [], plain.encode_texts([SENTENCE])),
                "image+text": ([beside], images[:1], both.encode_pages([Page(id="p", image=images[0], text=BESIDE)])),
            }
            found = {kind: worst(reference_embeddings(tiny, texts, shown), made)
                     for kind, (texts, shown, made) in pairs.items()}  # fmt: skip
            if family == "tomoro":
                frames, times = images[:1] * 3, [0.0, 0.5, 1.0]
                video = plain.encode_videos([Video(tuple(frames), tuple(times))])
                found["video"] = worst([reference_video(tiny, VIDEO, frames, times)], video)
    return found


if __name__ == "__main__":
    lowest = 1.0
    for name in FAMILY_NAMES:
        for kind, cosine in measure(name).items():
            print(f"{name:11} {kind:17} {cosine:.8f}")
            lowest = min(lowest, cosine)
    print(f"worst       {lowest:.8f}")
