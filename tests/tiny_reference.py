"""The package's own trained checkpoint in the form that the reference in plain transformers takes."""

from __future__ import annotations

import json
from dataclasses import dataclass

from safetensors.torch import load_file
from transformers import Qwen3VLConfig

from colqwen3_retrievers.models.checkpoint import TINY
from tests.checkpoints import TinyCheckpoint


@dataclass
class TrainedCheckpoint(TinyCheckpoint):
    """``tiny``: read, never written."""

    def write(self, names: object = None, *, shards: int = 1) -> None:
        raise AssertionError("the package's checkpoint is not a test's to write")


def tiny_checkpoint() -> TrainedCheckpoint:
    """Read ``tiny`` with plain tools: its tensors in float32, under transformers' names."""
    config = json.loads((TINY / "config.json").read_text())
    tensors = {name: tensor.float() for name, tensor in load_file(TINY / "model.safetensors").items()}
    weight = tensors.pop("embedding_proj_layer.weight")
    bias = tensors.pop("embedding_proj_layer.bias")
    backbone = {
        name.removeprefix("vlm.model."): tensor
        for name, tensor in tensors.items()
        if not name.startswith("vlm.lm_head")
    }
    parts = {key: config[key] for key in ("text_config", "vision_config")}
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    plain = Qwen3VLConfig(**parts, **ids, tie_word_embeddings=True)
    return TrainedCheckpoint(TINY, "tomoro", plain, backbone, weight, bias, tensors)
