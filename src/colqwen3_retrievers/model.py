"""The torch module: Qwen3-VL backbone, projection in float32, and strict loading of every family's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import Qwen3VLConfig, Qwen3VLModel

from colqwen3_retrievers.checkpoint import Checkpoint
from colqwen3_retrievers.errors import CheckpointError, ConfigError
from colqwen3_retrievers.families import VISUAL_TOKEN_SIDE
from colqwen3_retrievers.rendering import EncoderInput
from colqwen3_retrievers.safetensors_table import some_names

_MERGE = 2
_PATCH = VISUAL_TOKEN_SIDE // _MERGE
_FRAMES_A_PATCH = 2
ATTENTION = ("sdpa", "flash_attention_2", "eager")


def rope_positions(item: EncoderInput) -> NDArray[np.int64]:
    """Give the three-axis rotary positions (time, row, column) of each token.

    Text counts on all axes alike; the visual tokens of an image or video step share one time and count rows and columns
    from where the text before them stopped; text goes on after the longer side. Computed anew for every input, so that
    nothing a model caches between calls can leak in.

    Args:
        item: a rendered input.

    Returns:
        int64 (3, n_tokens).

    Source: M-RoPE, Wang et al. 2024, Qwen2-VL, section 2.1 (arXiv 2409.12191).
    """
    positions = np.empty((3, len(item)), dtype=np.int64)
    at = now = 0
    for span in item.spans:
        size = span.rows * span.cols
        positions[:, at : span.start] = np.arange(now, now + span.start - at)
        now += span.start - at
        positions[0, span.start : span.start + size] = now
        positions[1, span.start : span.start + size] = now + np.repeat(np.arange(span.rows), span.cols)
        positions[2, span.start : span.start + size] = now + np.tile(np.arange(span.cols), span.rows)
        now += max(span.rows, span.cols)
        at = span.start + size
    positions[:, at:] = np.arange(now, now + len(item) - at)
    return positions


def patches(pixels: Tensor) -> Tensor:
    """Cut frames into the patches that the vision tower reads, normalised to -1..1.

    Args:
        pixels: uint8 (frames, height, width, 3), sides multiples of 32; a single frame fills both halves of a patch.

    Returns:
        float32 (frames/2 x height/16 x width/16, 3 x 2 x 16 x 16), 2 x 2 patches of one visual token side by side.
    """
    if pixels.shape[0] == 1:
        pixels = pixels.expand(_FRAMES_A_PATCH, -1, -1, -1)
    frames, height, width, _ = pixels.shape
    values = (pixels.float() / 255.0 - 0.5) / 0.5
    values = values.reshape(
        frames // _FRAMES_A_PATCH, _FRAMES_A_PATCH,
        height // VISUAL_TOKEN_SIDE, _MERGE, _PATCH,
        width // VISUAL_TOKEN_SIDE, _MERGE, _PATCH, 3,
    )  # fmt: skip
    return values.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * _FRAMES_A_PATCH * _PATCH * _PATCH)


class ColQwen3Model(nn.Module):
    """Backbone and projection of one checkpoint.

    Args:
        checkpoint: an opened checkpoint.
        attention: one of :data:`ATTENTION`.

    Made by :func:`load_model`, which fills the parameters.
    """

    def __init__(self, checkpoint: Checkpoint, *, attention: str) -> None:
        super().__init__()
        config = _backbone_config(checkpoint, attention)
        self.causal = checkpoint.family.causal
        self.backbone: Any = Qwen3VLModel(config)
        self.projection: nn.Linear | None = None
        if checkpoint.has_projection:
            self.projection = nn.Linear(checkpoint.hidden_size, checkpoint.dim, bias=checkpoint.has_bias)
        if not self.causal:
            for layer in self.backbone.language_model.layers:
                layer.self_attn.is_causal = False

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return cast(torch.device, self.backbone.device)

    def forward(self, inputs: Sequence[EncoderInput]) -> Tensor:
        """Encode a batch of mixed lengths and kinds.

        Short inputs are padded at the end: under a causal mask nothing sees that padding, so no mask is needed; for a
        bidirectional trunk one is passed. Padded rows are cut off before the projection.

        Args:
            inputs: rendered queries or documents, at least one.

        Returns:
            float32 (total_tokens, dim) on the model's device, the inputs' tokens end to end, not yet normalised.
        """
        lengths = [len(item) for item in inputs]
        longest = max(lengths)
        filler = int(inputs[0].token_ids[-1])  # a prompt ends in text, so this is never a visual placeholder
        ids = np.full((len(inputs), longest), filler, dtype=np.int64)
        positions = np.zeros((3, len(inputs), longest), dtype=np.int64)
        for row, item in enumerate(inputs):
            ids[row, : len(item)] = item.token_ids
            positions[:, row, : len(item)] = rope_positions(item)
        mask = None
        if not self.causal and min(lengths) < longest:
            mask = self._put(np.arange(longest)[None, :] < np.asarray(lengths)[:, None])
        hidden = self.backbone(
            input_ids=self._put(ids),
            attention_mask=mask,
            position_ids=self._put(positions),
            use_cache=False,
            **self._visual_inputs(inputs),
        ).last_hidden_state
        rows = torch.cat([hidden[i, :length] for i, length in enumerate(lengths)]).float()
        return rows if self.projection is None else cast(Tensor, self.projection(rows))

    def _visual_inputs(self, inputs: Sequence[EncoderInput]) -> dict[str, Tensor]:
        """Pixels of images and of videos, each in the order of their placeholders."""
        found: dict[str, Tensor] = {}
        for videos, values, grids in (
            (False, "pixel_values", "image_grid_thw"),
            (True, "pixel_values_videos", "video_grid_thw"),
        ):
            shown = [item.pixels for item in inputs if item.pixels is not None and item.is_video == videos]
            if shown:
                found[values] = torch.cat([patches(self._put(pixels)) for pixels in shown])
                shapes = [
                    [max(1, frames // _FRAMES_A_PATCH), height // _PATCH, width // _PATCH]
                    for frames, height, width, _ in (pixels.shape for pixels in shown)
                ]
                found[grids] = torch.tensor(shapes, device=self.device)
        return found

    def _put(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def load_model(
    checkpoint: Checkpoint, *, device: str | torch.device, dtype: torch.dtype, attention: str = "sdpa"
) -> ColQwen3Model:
    """Build the model and fill it, tensor by tensor, straight onto its device.

    Args:
        checkpoint: an opened checkpoint.
        device: where to.
        dtype: the backbone's dtype; the projection stays float32.
        attention: one of :data:`ATTENTION`.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        CheckpointError: a tensor is missing, left over, of the wrong shape or unreadable; it names them.
        ConfigError: the config cannot be a Qwen3-VL config, or the attention is not to be had.
    """
    with _UninitialisedParameters():
        model = ColQwen3Model(checkpoint, attention=attention)
    wanted = {_canonical(name): (name, param) for name, param in model.named_parameters()}
    _check_tensors(checkpoint, {name: tuple(param.shape) for name, (_, param) in wanted.items()})
    for name, value in _read_tensors(checkpoint, device):
        own, _ = wanted[name]
        target = torch.float32 if own.startswith("projection.") else dtype
        owner, _, attribute = own.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(value.to(target), requires_grad=False))
    model.to(device)  # the rotary tables, which are buffers and in no file
    if not checkpoint.family.final_norm:
        model.backbone.language_model.norm = nn.Identity()
    return model.eval()


def _backbone_config(checkpoint: Checkpoint, attention: str) -> Qwen3VLConfig:
    if attention not in ATTENTION:
        raise ConfigError(f"attn_implementation {attention!r}: expected one of {', '.join(ATTENTION)}")
    known = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")
    text = {**checkpoint.config["text_config"], "is_causal": checkpoint.family.causal}
    vision = dict(checkpoint.config["vision_config"])
    for part in (text, vision):
        part.pop("model_type", None)  # each family spells its own; the parts are Qwen3-VL's all the same
    try:
        config = Qwen3VLConfig(
            text_config=text,
            vision_config=vision,
            **{key: checkpoint.config[key] for key in known if key in checkpoint.config},
        )
    except Exception as exc:  # strict configs raise several unrelated types
        raise CheckpointError(f"{checkpoint.model}: not a Qwen3-VL config: {exc}") from exc
    config._attn_implementation = attention
    return config


def _canonical(name: str) -> str:
    return name.removeprefix("backbone.")


def _check_tensors(checkpoint: Checkpoint, wanted: dict[str, tuple[int, ...]]) -> None:
    have = checkpoint.tensors
    missing = sorted(set(wanted) - set(have))
    unexpected = sorted(have[name].name for name in set(have) - set(wanted))
    wrong = [
        f"{have[name].name} {have[name].shape} instead of {shape}"
        for name, shape in wanted.items()
        if name in have and have[name].shape != shape
    ]
    faults = [
        f"{what} {some_names(names)}"
        for what, names in (("missing", missing), ("left over", unexpected), ("of the wrong shape", wrong))
        if names
    ]
    if faults:
        raise CheckpointError(
            f"{checkpoint.model}: tensors {'; '.join(faults)}", missing=missing, unexpected=unexpected
        )


def _read_tensors(checkpoint: Checkpoint, device: str | torch.device) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    by_file: dict[Any, list[str]] = {}
    for name, record in checkpoint.tensors.items():
        by_file.setdefault(record.file, []).append(name)
    for file, names in by_file.items():
        try:
            with safe_open(str(file), framework="pt", device=str(device)) as handle:
                for name in names:
                    yield name, handle.get_tensor(checkpoint.tensors[name].name)
        except (SafetensorError, OSError) as exc:
            raise CheckpointError(f"{checkpoint.model}: {file.name} cannot be read: {exc}") from exc


class _UninitialisedParameters(TorchFunctionMode):
    """Put what modules allocate for their parameters on the meta device, and leave computed buffers real.

    A plain ``torch.device("meta")`` would lose the rotary tables, which no checkpoint carries; random initialisation of
    billions of numbers that are about to be overwritten would cost a minute. The mode holds for this thread only.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
