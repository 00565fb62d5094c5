"""Plain transformers, by hand: from the raw image through transformers' own processor to unit token embeddings.

Nothing here comes from the library: prompts and pixel bounds are spelled out again, the model is filled from the
factory's own tensors, the batch is padded on the left, and a bidirectional trunk gets an explicit mask.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen3VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize

from tests.checkpoints import TinyCheckpoint

PADS = "<|endoftext|>" * 10
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
A = "<|im_start|>user\n" + VISION + "Describe the image.%s<|im_end|><|endoftext|>"
B = "<|im_start|>user\n" + VISION + "Describe the image.%s<|im_end|><|im_start|>assistant\n<|endoftext|>"
NEMOTRON = "<|im_start|>user\n" + VISION + "passage: %s<|im_end|>\n<|im_start|>assistant\n"

QUERY = {
    "tomoro": "%s" + PADS,
    "ops": "Query: %s" + PADS,
    "nemotron": "<|im_start|>user\nQuery: query: %s<|im_end|>\n<|im_start|>assistant\n",
    "sauerkraut": "Query: %s" + PADS,
    "colpali": "%s" + PADS,
}
TEXT = {
    "tomoro": "%s" + PADS,
    "ops": "Query: %s" + PADS,
    "nemotron": "<|im_start|>user\npassage: %s<|im_end|>\n<|im_start|>assistant\n",
    "sauerkraut": "Query: %s" + PADS,
    "colpali": "%s",
}
IMAGE = {"tomoro": A, "ops": B, "nemotron": NEMOTRON, "sauerkraut": A, "colpali": A}
PIXELS = {
    "tomoro": (65_536, 1_310_720),
    "ops": (4_096, 1_310_720),
    "nemotron": (65_536, 1_310_720),
    "sauerkraut": (3_136, 1_003_520),
    "colpali": (65_536, 1_310_720),
}


def image_prompt(family: str, text: str = "") -> str:
    """The family's image prompt, with a text beside the image after one space."""
    if not text:
        return IMAGE[family] % ""
    return IMAGE[family] % (text if family == "nemotron" else f" {text}")


def reference_embeddings(checkpoint: TinyCheckpoint, prompts: list[str], images: list[Image.Image]) -> list[np.ndarray]:
    """Unit token embeddings of one left-padded batch of prompts; images in the order of their placeholders."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint.folder / "tokenizer.json"), pad_token="<|endoftext|>", padding_side="left"
    )
    low, high = PIXELS[checkpoint.family]
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": low, "longest_edge": high}, patch_size=16, merge_size=2,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    batch = dict(image_processor(images, return_tensors="pt")) if images else {}
    counts = iter((batch["image_grid_thw"].prod(-1) // 4).tolist() if images else [])
    expanded = [_expand(prompt, "<|image_pad|>", counts) for prompt in prompts]
    batch.update(tokenizer(expanded, padding=True, return_tensors="pt"))
    batch["mm_token_type_ids"] = (batch["input_ids"] == checkpoint.config.image_token_id).int()
    batch.pop("token_type_ids", None)
    return run_reference(checkpoint, batch)


def _expand(prompt: str, placeholder: str, counts: Iterator[int]) -> str:
    """Repeat the placeholder once a visual token, as Qwen3-VL's processor does (which needs torchvision to be made)."""
    before, found, after = prompt.partition(placeholder)
    return before + placeholder * next(counts) + after if found else prompt


def run_reference(checkpoint: TinyCheckpoint, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """Run plain transformers on a processor's batch: trunk, projection with bias, L2, padding cut off."""
    model = Qwen3VLModel(checkpoint.config).eval()
    model.set_attn_implementation("eager")
    model.load_state_dict(checkpoint.backbone, strict=True)
    keep = batch["attention_mask"].bool()
    before_norm: list[torch.Tensor] = []
    model.language_model.norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    if checkpoint.family == "nemotron":
        positions, _ = model.get_rope_index(
            batch["input_ids"], mm_token_type_ids=batch["mm_token_type_ids"],
            image_grid_thw=batch.get("image_grid_thw"), attention_mask=batch["attention_mask"],
        )  # fmt: skip
        batch = {**batch, "position_ids": positions}
        batch["attention_mask"] = torch.where(keep, 0.0, -1e9)[:, None, None, :].expand(-1, -1, keep.shape[1], -1)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    if checkpoint.family == "nemotron":
        hidden = before_norm[0]
    if checkpoint.weight is not None:
        hidden = hidden @ checkpoint.weight.T + checkpoint.bias
    hidden = hidden / hidden.norm(dim=-1, keepdim=True)
    return [rows[mask].numpy() for rows, mask in zip(hidden, keep, strict=True)]


def reference_video(
    checkpoint: TinyCheckpoint, prompt: str, frames: list[Image.Image], times: list[float]
) -> np.ndarray:
    """Unit token embeddings of one video: transformers' own resizing arithmetic, patches and time marks.

    The prompt's whole ``vision_start video_pad vision_end`` makes way for the time steps, each between marks of its
    own, as Qwen3-VL was trained (Qwen3VLProcessor of transformers 4.57).
    """
    high, wide = smart_resize(
        len(frames), frames[0].height, frames[0].width, factor=32, min_pixels=131_072, max_pixels=786_432
    )
    stack = np.stack([np.asarray(frame.resize((wide, high), Image.Resampling.BICUBIC)) for frame in frames])
    values = (torch.from_numpy(stack).permute(0, 3, 1, 2)[None].float() / 255 - 0.5) / 0.5
    patches, steps, rows, cols = Qwen3VLVideoProcessor.patchify(None, values, 16, 2, 2)
    marks = Qwen3VLProcessor._calculate_timestamps(None, list(times), 1.0, 2)
    shown = "".join(
        f"<{mark:.1f} seconds><|vision_start|>{'<|video_pad|>' * (rows * cols // 4)}<|vision_end|>" for mark in marks
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(checkpoint.folder / "tokenizer.json"))
    batch = dict(tokenizer([prompt.replace("<|vision_start|><|video_pad|><|vision_end|>", shown)], return_tensors="pt"))
    batch.pop("token_type_ids", None)
    batch["mm_token_type_ids"] = 2 * (batch["input_ids"] == checkpoint.config.video_token_id).int()
    batch["pixel_values_videos"] = patches.reshape(-1, patches.shape[-1])
    batch["video_grid_thw"] = torch.tensor([[steps, rows, cols]])
    return run_reference(checkpoint, batch)[0]
