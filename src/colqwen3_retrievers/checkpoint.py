"""What lies in a checkpoint's folder, read without torch: config, tensor table, family, dim, fingerprint.

The tensor table comes from the safetensors headers alone, so that a wrong, torn or foreign checkpoint is refused before
a single weight is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colqwen3_retrievers.errors import CheckpointError, require
from colqwen3_retrievers.families import PROJECTION_NAMES, Family, find_dim_key, get_family, tell_family
from colqwen3_retrievers.safetensors_table import TensorRecord, read_json, read_tensor_table, some_names

DEFAULT_MODEL = "TomoroAI/tomoro-colqwen3-embed-4b"
TINY = Path(__file__).parent / "checkpoints" / "tiny"

_OUTER_PREFIXES = ("base_model.model.", "vlm.", "model.")
_VOLATILE_KEYS = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "pad_token_id",
    "torch_dtype", "transformers_version", "use_cache", "_attn_implementation_autoset", "tie_word_embeddings",
}  # fmt: skip
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A checkpoint folder, understood.

    Attributes:
        folder: where it lies.
        model: how it was asked for.
        family: its family's row.
        config: its config.json.
        tensors: canonical name (``visual.*``, ``language_model.*``, ``projection.*``) -> where it lies; no ``lm_head``.
        dim: width of a token embedding before Matryoshka truncation.
        hidden_size: width of the text trunk.
        matryoshka_dims: dims it may be truncated to, its full dim included, descending.
        min_pixels: fewest pixels an image is resized to.
        max_pixels: most pixels an image is resized to.
        fingerprint: sha256 hex digest (64 characters) of config and projection weights.
    """

    folder: Path
    model: str
    family: Family
    config: dict[str, Any]
    tensors: dict[str, TensorRecord]
    dim: int
    hidden_size: int
    matryoshka_dims: tuple[int, ...]
    min_pixels: int
    max_pixels: int
    fingerprint: str

    @property
    def has_projection(self) -> bool:
        """Whether there is a projection at all."""
        return "projection.weight" in self.tensors

    @property
    def has_bias(self) -> bool:
        """Whether the projection has a bias: what the file says, never what a config says."""
        return "projection.bias" in self.tensors

    @property
    def context_length(self) -> int:
        """Most tokens a whole prompt may have."""
        return int(self.config["text_config"].get("max_position_embeddings", 32_768))


def locate(model: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Find the folder of a checkpoint: ``"tiny"``, a folder, or a hub name (downloaded unless offline or cached).

    Args:
        model: ``"tiny"``, an existing folder, or ``"owner/name"`` on the hub. Naming a hub model asks for its download;
            ``HF_HUB_OFFLINE=1`` and ``HF_HOME`` are obeyed. Only data files are fetched, never code.
        revision: branch, tag or commit on the hub; not for folders.

    Raises:
        CheckpointError: no such folder, or the hub has no such model, is out of reach or forbids it.
        MissingExtraError: a hub name without ``huggingface_hub``.

    >>> locate("surely/not/there/at/all")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.CheckpointError: surely/not/there/at/all: no such folder, and not a hub name (owner/name)
    """
    name = os.fspath(model)
    if name == "tiny":
        return TINY
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise CheckpointError(f"{name}: a file, not a checkpoint folder")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise CheckpointError(f"{name}: no such folder, and not a hub name (owner/name)")
    hub = require("torch", "huggingface_hub", "huggingface-hub")
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as exc:
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise CheckpointError(f"{name}: not to be had from the hub: {reason}") from exc


def open_checkpoint(
    model: str | os.PathLike[str], *, revision: str | None = None, family: str | None = None
) -> Checkpoint:
    """Read everything of a checkpoint but its weights.

    Args:
        model: as for :func:`locate`.
        revision: as for :func:`locate`.
        family: overrules the family told from config and tensor names.

    Raises:
        CheckpointError: a file is missing, torn or foreign, the family cannot be told, or config and weights disagree.
        ConfigError: ``family`` is unknown.
    """
    name = os.fspath(model)
    folder = locate(name, revision=revision)
    config = _read_config(folder, name)
    source = read_tensor_table(folder, name)
    projections = {part for tensor in source for part in tensor.split(".") if part in PROJECTION_NAMES}
    row = get_family(family) if family else tell_family(config, projections, model=name)
    tensors = _canonical(source, row, name)
    hidden = int(config["text_config"]["hidden_size"])
    dim = _dim(config, tensors, hidden, name)
    if not config.get("matryoshka_dims"):
        extra = row.matryoshka_dims
    else:
        extra = tuple(int(d) for d in config["matryoshka_dims"])
    low, high = _pixel_bounds(folder, row)
    return Checkpoint(
        folder=folder,
        model=name,
        family=row,
        config=config,
        tensors=tensors,
        dim=dim,
        hidden_size=hidden,
        matryoshka_dims=tuple(sorted({dim, *(d for d in extra if 0 < d < dim)}, reverse=True)),
        min_pixels=low,
        max_pixels=high,
        fingerprint=_fingerprint(config, tensors),
    )


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    config = read_json(folder / "config.json", name)
    for part in ("text_config", "vision_config"):
        if not isinstance(config.get(part), dict):
            raise CheckpointError(f"{name}: config.json has no {part}: not a Qwen3-VL checkpoint")
    if not isinstance(config["text_config"].get("hidden_size"), int):
        raise CheckpointError(f"{name}: config.json has no text_config.hidden_size")
    vision = config["vision_config"]
    for key, value in (("patch_size", 16), ("spatial_merge_size", 2), ("temporal_patch_size", 2)):
        if vision.get(key, value) != value:
            raise CheckpointError(f"{name}: vision_config.{key} is {vision[key]}, expected {value} as in Qwen3-VL")
    return config


def _canonical(source: dict[str, TensorRecord], family: Family, name: str) -> dict[str, TensorRecord]:
    """Bring every naming convention to one: ``visual.*``, ``language_model.*``, ``projection.*``."""
    tensors: dict[str, TensorRecord] = {}
    foreign: list[str] = []
    for original, record in source.items():
        inner = original
        for prefix in _OUTER_PREFIXES:
            inner = inner.removeprefix(prefix)
        head, _, rest = inner.partition(".")
        if head == "lm_head":
            continue  # the one part a late-interaction model has no use for
        if head == family.projection:
            inner = f"projection.{rest}"
        elif head not in ("visual", "language_model"):
            foreign.append(original)
        if inner in tensors:
            raise CheckpointError(
                f"{name}: {original} and {tensors[inner].name} are the same tensor", unexpected=[original]
            )
        tensors[inner] = record
    if foreign:
        hint = "; an unmerged LoRA?" if any("lora_" in tensor for tensor in foreign) else ""
        raise CheckpointError(
            f"{name}: no place for {some_names(foreign)} in family {family.name}{hint}", unexpected=foreign
        )
    if family.projection and "projection.weight" not in tensors:
        wanted = f"{family.projection}.weight"
        raise CheckpointError(f"{name}: no {wanted}, which family {family.name} needs", missing=[wanted])
    return tensors


def _dim(config: dict[str, Any], tensors: dict[str, TensorRecord], hidden: int, name: str) -> int:
    key = find_dim_key(config)
    weight = tensors.get("projection.weight")
    if weight is None:
        if key is not None and config[key] != hidden:
            raise CheckpointError(f"{name}: config says {key} = {config[key]}, but without a projection it is {hidden}")
        return hidden
    if len(weight.shape) != 2 or weight.shape[1] != hidden:
        raise CheckpointError(f"{name}: {weight.name} has shape {weight.shape}, expected (dim, {hidden})")
    if key is not None and config[key] != weight.shape[0]:
        raise CheckpointError(f"{name}: config says {key} = {config[key]}, {weight.name} has {weight.shape[0]} rows")
    return weight.shape[0]


def _pixel_bounds(folder: Path, family: Family) -> tuple[int, int]:
    low, high = family.min_pixels, family.max_pixels
    path = folder / "preprocessor_config.json"
    if family.processor_pixels and path.exists():
        processor = read_json(path, str(folder))
        size = processor.get("size")
        size = size if isinstance(size, dict) else {}
        low = int(processor.get("min_pixels") or size.get("shortest_edge") or low)
        tokens = processor.get("max_num_visual_tokens")
        stated = tokens * 1024 if tokens else processor.get("max_pixels") or size.get("longest_edge") or high
        high = min(high, int(stated))  # the stock bound of 16,777,216 would make one scan 16,384 visual tokens
    return min(low, high), high


def _fingerprint(config: dict[str, Any], tensors: dict[str, TensorRecord]) -> str:
    """Digest what makes two checkpoints' embeddings comparable.

    Beside the projection, the final norm's gain and the last layer's output matrix are taken in, so that two fine-tunes
    of one base without a projection, or with a frozen one, do not pass for each other.
    """
    digest = hashlib.sha256(json.dumps(_stable(config), sort_keys=True).encode())
    last = int(config["text_config"].get("num_hidden_layers", 0)) - 1
    for name in (
        "projection.weight",
        "projection.bias",
        "language_model.norm.weight",
        f"language_model.layers.{last}.self_attn.o_proj.weight",
    ):
        record = tensors.get(name)
        if record is not None:
            digest.update(f"{name}\0{record.dtype}\0{record.shape}\0".encode())
            with record.file.open("rb") as stream:
                stream.seek(record.start)
                digest.update(stream.read(record.end - record.start))
    return digest.hexdigest()


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if key not in _VOLATILE_KEYS}
    return value
