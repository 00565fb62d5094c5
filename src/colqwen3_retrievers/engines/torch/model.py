"""The torch module: Qwen3-VL backbone, projection in float32, and strict loading of any family's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import Qwen3VLConfig, Qwen3VLModel

from colqwen3_retrievers.engines.torch.attention import Packing, to_device
from colqwen3_retrievers.engines.torch.text_trunk import run_trunk
from colqwen3_retrievers.engines.torch.vision_tower import VisionTower
from colqwen3_retrievers.errors import CheckpointError
from colqwen3_retrievers.models.checkpoint import Checkpoint
from colqwen3_retrievers.models.rendering import EncoderInput
from colqwen3_retrievers.models.tensor_table import some_names
from colqwen3_retrievers.vectors.kernels.torch_settings import exact_matmul, no_cudnn_attention


def rope_positions(item: EncoderInput) -> NDArray[np.int64]:
    """Return the three-axis rotary positions (time, row, column) of each token.

    Text counts on all axes alike; the visual tokens of an image or video step share one time and count rows and columns
    from the end of the text before them; text continues after the longer side. Computed for every input, so that no
    state cached by a model can leak in.

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


class ColQwen3Model(nn.Module):
    """Backbone and projection of one checkpoint.

    Args:
        checkpoint: an opened checkpoint.
        attention: as ``TorchOptions.attn_implementation``.

    Created by :func:`load_model`, which fills the parameters.
    """

    def __init__(self, checkpoint: Checkpoint, *, attention: str) -> None:
        super().__init__()
        config = _backbone_config(checkpoint, attention)
        self.causal = checkpoint.family.causal
        self.backbone: Any = Qwen3VLModel(config)
        self.projection: nn.Linear | None = None
        if checkpoint.has_projection:
            self.projection = nn.Linear(checkpoint.hidden_size, checkpoint.dim, bias=checkpoint.has_bias)
        self._attention = attention
        self._tower = VisionTower(self.backbone.visual, attention)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return cast(torch.device, self.backbone.device)

    def forward(self, inputs: Sequence[EncoderInput]) -> Tensor:
        """Encode a batch of mixed lengths and kinds, in transformers' arithmetic and without its padding.

        Args:
            inputs: rendered queries or documents, at least one.

        Returns:
            float32 (total_tokens, dim) on the model's device, the inputs' tokens end to end, not yet normalised.
        """
        with exact_matmul, no_cudnn_attention:
            return self._encode(inputs)

    def _encode(self, inputs: Sequence[EncoderInput]) -> Tensor:
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))  # equal lengths attend together
        ordered = [inputs[i] for i in order]
        lengths = [len(item) for item in ordered]
        trunk, device = self.backbone.language_model, self.device
        positions = to_device(np.concatenate([rope_positions(item) for item in ordered], axis=1), device)
        packing = Packing(lengths, device, pad=True, causal=self.causal)
        hidden = trunk.embed_tokens(to_device(np.concatenate([item.token_ids for item in ordered]), device))
        visual_rows, stacked = self._place_visual(ordered, hidden)
        rows = run_trunk(
            trunk,
            hidden,
            positions,
            packing,
            implementation=self._attention,
            visual_rows=visual_rows,
            stacked=stacked,
        ).float()
        if self.projection is not None:
            rows = self.projection(rows)
        if order == list(range(len(order))):
            return rows
        parts = dict(zip(order, torch.split(rows, lengths), strict=True))
        return torch.cat([parts[i] for i in range(len(inputs))])

    def _place_visual(self, ordered: Sequence[EncoderInput], hidden: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """Write visual tokens over their placeholders, and return those rows and what the first layers add there."""
        starts = np.cumsum([0, *(len(item) for item in ordered)])
        shown = [
            (item.spans, int(start), item.pixels)
            for item, start in zip(ordered, starts[:-1], strict=True)
            if item.pixels is not None
        ]
        if not shown:
            return None, []
        shown.sort(key=lambda entry: entry[0][0].rows * entry[0][0].cols)  # equal sizes attend together
        places = [
            np.arange(start + span.start, start + span.start + span.rows * span.cols)
            for spans, start, _ in shown
            for span in spans
        ]
        rows = to_device(np.concatenate(places), self.device)
        tokens, stacked = self._tower([to_device(pixels, self.device) for _, _, pixels in shown])
        hidden.index_copy_(0, rows, tokens)
        return rows, stacked


def load_model(
    checkpoint: Checkpoint, *, device: str | torch.device, dtype: torch.dtype, attention: str = "sdpa"
) -> ColQwen3Model:
    """Return the model, filled tensor by tensor on its device.

    Args:
        checkpoint: an opened checkpoint.
        device: where to.
        dtype: the backbone's dtype; the projection stays float32.
        attention: as ``TorchOptions.attn_implementation``.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        CheckpointError: not a Qwen3-VL config, or a tensor is missing, left over, of the wrong shape or unreadable.
    """
    with _UninitialisedParameters():
        model = ColQwen3Model(checkpoint, attention=attention)
    wanted = {name.removeprefix("backbone."): (name, param) for name, param in model.named_parameters()}
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
    """Allocates modules' parameters on the meta device, and computed buffers on the real one.

    A plain ``torch.device("meta")`` would lose the rotary tables, which no checkpoint has; random initialisation of
    billions of numbers that are then overwritten would take a minute. The mode affects this thread only.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
