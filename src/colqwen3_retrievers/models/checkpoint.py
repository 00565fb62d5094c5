"""Reading a checkpoint's folder without torch: config, tensor table, family, dim, fingerprint.

The tensor table comes from the safetensors headers, so that a wrong, truncated or foreign checkpoint is refused before
any weight is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colqwen3_retrievers.errors import CheckpointError, require
from colqwen3_retrievers.models.families import (
    PROJECTION_NAMES,
    VISUAL_TOKEN_SIDE,
    Family,
    find_dim_key,
    get_family,
    inner_name,
    tell_family,
)
from colqwen3_retrievers.models.hub import HubFiles
from colqwen3_retrievers.models.tensor_table import LocalFiles, TensorRecord, read_json, read_tensor_table, some_names
from colqwen3_retrievers.pages.files import user_path

DEFAULT_MODEL = "TomoroAI/tomoro-colqwen3-embed-4b"
TINY = Path(__file__).parent / "checkpoints" / "tiny"

_TEXT_FACTS: dict[str, Any] = {  # config keys that shape a vector, and transformers' defaults
    "hidden_size": None, "intermediate_size": None, "num_hidden_layers": None, "num_attention_heads": None,
    "num_key_value_heads": None, "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False,
}  # fmt: skip
_VISION_FACTS: dict[str, Any] = {
    "depth": None, "hidden_size": None, "intermediate_size": None, "num_heads": None, "out_hidden_size": None,
    "num_position_embeddings": 2304, "deepstack_visual_indexes": None, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
_SAMPLE = 4096  # bytes of each tensor that go into a fingerprint
_AT_ONCE = 16  # parts of files read concurrently: a hub takes its time for each
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
_FILES = [*_SMALL_FILES, "*.safetensors"]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A checkpoint's folder and the facts read from it.

    Attributes:
        folder: of the files.
        model: the requested name.
        family: its family's row.
        config: its config.json.
        tensors: records by canonical name (``visual.*``, ``language_model.*``, ``projection.*``), without ``lm_head``.
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
        """Whether there is a projection."""
        return "projection.weight" in self.tensors

    @property
    def has_bias(self) -> bool:
        """Whether the projection has a bias, by its tensors."""
        return "projection.bias" in self.tensors

    @property
    def context_length(self) -> int:
        """Most tokens a whole prompt may have."""
        return int(self.config["text_config"]["max_position_embeddings"])


def locate(model: str | os.PathLike[str], *, revision: str | None = None, weights: bool = True) -> Path:
    """Return the folder of a checkpoint; a hub model is downloaded unless offline or cached.

    Args:
        model: ``"tiny"``, an existing folder, or ``"owner/name"`` on the hub. ``HF_HUB_OFFLINE=1`` and ``HF_HOME`` are
            obeyed. Only data files are downloaded, never code.
        revision: branch, tag or commit on the hub; not for folders.
        weights: whether to download those of a hub model, too.

    Raises:
        CheckpointError: no such folder, or the hub has no such model, is unreachable or forbids access.
        MissingExtraError: a hub name without ``huggingface_hub``.

    >>> locate("surely/not/there/at/all")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.CheckpointError: surely/not/there/at/all: no such folder, and not a hub name (owner/name)
    """
    name = os.fspath(model)
    if name == "tiny":
        return TINY
    if user_path(name).is_dir():
        return user_path(name)
    if Path(name).exists():
        raise CheckpointError(f"{name}: a file, not a checkpoint folder")
    if Path(name).is_absolute():
        raise CheckpointError(f"{name}: no such folder; has the model been moved?")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise CheckpointError(f"{name}: no such folder, and not a hub name (owner/name)")
    hub = require("torch", "huggingface_hub", "huggingface-hub")
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=_FILES if weights else _SMALL_FILES))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as exc:
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise CheckpointError(f"{name}: cannot be downloaded from the hub: {reason}") from exc


def open_checkpoint(
    model: str | os.PathLike[str], *, revision: str | None = None, family: str | None = None, weights: bool = True
) -> Checkpoint:
    """Read everything about a checkpoint except its weights.

    Args:
        model: as for :func:`locate`.
        revision: as for :func:`locate`.
        family: overrides the family identified by config and tensor names.
        weights: whether to download those of a hub model. Without, some megabytes of them are read from the hub unless
            they were downloaded before; ``tensors`` then names files that are not in the folder.

    Raises:
        CheckpointError: a file is missing, truncated or foreign, no family matches, config and weights disagree, or
            there is a LoRA adapter.
        ConfigError: ``family`` is unknown.
    """
    name = os.fspath(model)
    folder = locate(name, revision=revision, weights=weights)
    for adapter in ("adapter_config.json", "adapter_model.safetensors"):
        if (folder / adapter).exists():
            raise CheckpointError(
                f"{name}: {adapter}: a LoRA adapter, which is not applied: merge it into its base first"
            )
    config = _read_config(folder, name)
    local = weights or name == "tiny" or user_path(name).is_dir() or _has_weights(folder, name)
    remote = None if local else HubFiles(name, folder.name)  # a snapshot's name is its commit
    source = read_tensor_table(folder, name, remote=remote)
    projections = {part for tensor in source for part in tensor.split(".") if part in PROJECTION_NAMES}
    row = get_family(family) if family else tell_family(config, projections, model=name)
    tensors = _canonical(source, row, name)
    hidden = int(config["text_config"]["hidden_size"])
    dim = _dim(config, tensors, hidden, name)
    extra = config.get("matryoshka_dims") or row.matryoshka_dims
    if not isinstance(extra, list | tuple) or not all(_is_whole(value) for value in extra):
        raise CheckpointError(f"{name}: config.json matryoshka_dims is {extra!r}, expected a list of whole numbers")
    low, high = _pixel_bounds(folder, row, name)
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
        fingerprint=_fingerprint(config, tensors, remote or LocalFiles(folder)),
    )


def _has_weights(folder: Path, name: str) -> bool:
    """Return whether all of a snapshot's weights were downloaded before."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return (folder / "model.safetensors").exists()
    shards = read_json(index, name).get("weight_map", {})
    return isinstance(shards, dict) and all((folder / str(shard)).exists() for shard in shards.values())


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _whole(value: Any, what: str, name: str) -> int:
    if not _is_whole(value):
        raise CheckpointError(f"{name}: {what} is {value!r}, expected a whole number above 0")
    return int(value)


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    config = read_json(folder / "config.json", name)
    for part in ("text_config", "vision_config"):
        if not isinstance(config.get(part), dict):
            raise CheckpointError(f"{name}: config.json has no {part}: not a Qwen3-VL checkpoint")
    text = config["text_config"]
    for key in ("hidden_size", "num_hidden_layers", "max_position_embeddings"):
        _whole(text.get(key), f"text_config.{key}", name)
    architectures = config.get("architectures")
    if architectures is not None and not isinstance(architectures, list):
        raise CheckpointError(f"{name}: config.json architectures is {architectures!r}, expected a list")
    rope_facts(config, name)
    vision = config["vision_config"]
    for key, value in (("patch_size", 16), ("spatial_merge_size", 2), ("temporal_patch_size", 2)):
        if vision.get(key, value) != value:
            raise CheckpointError(f"{name}: vision_config.{key} is {vision[key]}, expected {value} as in Qwen3-VL")
    return config


def _canonical(source: dict[str, TensorRecord], family: Family, name: str) -> dict[str, TensorRecord]:
    """Return tensors by canonical name: ``visual.*``, ``language_model.*``, ``projection.*``."""
    tensors: dict[str, TensorRecord] = {}
    foreign: list[str] = []
    for original, record in source.items():
        inner = inner_name(original)
        head, _, rest = inner.partition(".")
        if head == "lm_head":
            continue  # a late-interaction model does not use it
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


def _pixel_bounds(folder: Path, family: Family, name: str) -> tuple[int, int]:
    low, high = family.min_pixels, family.max_pixels
    processor = _image_processor(folder, name) if family.processor_pixels else {}
    size = processor.get("size")
    size = size if isinstance(size, dict) else {}
    low = _whole(processor.get("min_pixels") or size.get("shortest_edge") or low, "the processor's lower bound", name)
    tokens = processor.get("max_num_visual_tokens")
    stated = processor.get("max_pixels") or size.get("longest_edge") or high
    if tokens:
        stated = _whole(tokens, "max_num_visual_tokens", name) * VISUAL_TOKEN_SIDE**2
    # the stock bound of 16,777,216 would make one scan 16,384 visual tokens
    high = min(high, _whole(stated, "the processor's upper bound", name))
    return min(low, high), high


def _image_processor(folder: Path, name: str) -> dict[str, Any]:
    """Return the image processor's settings, of their own file or, as transformers 5 writes it, part of another."""
    settings: dict[str, Any] = {}
    if (folder / "processor_config.json").exists():
        whole = read_json(folder / "processor_config.json", name)
        settings.update({key: whole[key] for key in ("max_num_visual_tokens",) if key in whole})
        if isinstance(whole.get("image_processor"), dict):
            settings.update(whole["image_processor"])
    if (folder / "preprocessor_config.json").exists():
        settings.update(read_json(folder / "preprocessor_config.json", name))
    return settings


def _fingerprint(config: dict[str, Any], tensors: dict[str, TensorRecord], files: LocalFiles | HubFiles) -> str:
    """Return the digest of what makes two checkpoints' embeddings comparable.

    Of the config, the values that shape a vector, in any spelling; of the tensors, the whole projection and some bytes
    from the middle of every other, so that a fine-tune with its base's projection has another digest.
    """
    text, vision = config["text_config"], config["vision_config"]
    facts = {
        "text": {key: text.get(key, default) for key, default in _TEXT_FACTS.items()},
        "vision": {key: vision.get(key, default) for key, default in _VISION_FACTS.items()},
        "rope": rope_facts(config, "checkpoint"),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())

    def sample(name: str) -> bytes:
        record = tensors[name]
        start, length = record.start, record.end - record.start
        if not name.startswith("projection.") and length > _SAMPLE:
            start, length = start + (length - _SAMPLE) // 2, _SAMPLE
        return files.read(record.file.name, start, length)

    names = sorted(tensors)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for name, content in zip(names, pool.map(sample, names), strict=True):
            digest.update(f"\0{name}\0{tensors[name].dtype}\0{tensors[name].shape}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def rope_facts(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the rotary settings of a text config, in any of transformers' spellings.

    Raises:
        CheckpointError: no theta or no section: transformers' defaults, which differ from Qwen3-VL's, would be used.

    >>> old = {"rope_theta": 5e6, "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]}}
    >>> new = {"rope_parameters": {"rope_theta": 5000000, "rope_type": "default", "mrope_section": [24, 20, 20]}}
    >>> rope_facts({"text_config": old}, "m") == rope_facts({"text_config": new}, "m")
    True
    """
    text = config["text_config"]
    merged: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(text.get(key), dict):
            merged.update(text[key])
    theta = merged.get("rope_theta", text.get("rope_theta"))
    section = merged.get("mrope_section")
    if not isinstance(theta, int | float) or not isinstance(section, list):
        lacking = "rope_theta" if not isinstance(theta, int | float) else "mrope_section"
        raise CheckpointError(f"{name}: config.json names no text_config {lacking}")
    return {"theta": float(theta), "section": section, "type": merged.get("rope_type", merged.get("type", "default"))}
