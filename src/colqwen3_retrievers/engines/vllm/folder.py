"""A folder that vLLM can start from: links to a checkpoint's weights, and the small files that vLLM requires.

This library reads a checkpoint's ``config.json``, ``tokenizer.json`` and tensors, and nothing else. vLLM also reads the
processor's and the tokenizer's settings, which some checkpoints lack and others spell in ways that break its loaders.
They are all known from the family, so they are written anew; the weights are only linked to.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from colqwen3_retrievers.errors import EngineError
from colqwen3_retrievers.models.checkpoint import Checkpoint
from colqwen3_retrievers.models.families import VISUAL_TOKEN_SIDE, Family

CAUSAL_ARCHITECTURE = "ColQwen3RetrieversModel"
"""Architecture of families whose text trunk is causal and read after the final norm."""

BIDIRECTIONAL_ARCHITECTURE = "ColQwen3RetrieversBidirectionalModel"
"""Architecture of families whose text trunk is bidirectional and read before the final norm."""

NEEDED_BY_VLLM = ("preprocessor_config.json", "tokenizer_config.json")
"""Files that vLLM requires and this library does not."""

_PAD = "<|endoftext|>"
_END = "<|im_end|>"


def architecture(family: Family) -> str:
    """Return the architecture that serves a family.

    No vLLM knows it without our plugin, so a server that lacks the plugin does not start, rather than serving
    embeddings without the projection bias.

    >>> from colqwen3_retrievers.models.families import get_family
    >>> architecture(get_family("nemotron"))
    'ColQwen3RetrieversBidirectionalModel'
    """
    return CAUSAL_ARCHITECTURE if family.causal and family.final_norm else BIDIRECTIONAL_ARCHITECTURE


def config_overrides(family: Family) -> dict[str, Any]:
    """Return vLLM's overrides of a checkpoint's ``config.json``.

    >>> from colqwen3_retrievers.models.families import get_family
    >>> config_overrides(get_family("ops"))
    {'architectures': ['ColQwen3RetrieversModel']}
    """
    overrides: dict[str, Any] = {"architectures": [architecture(family)]}
    if not family.causal:
        overrides["text_config"] = {"is_causal": False}
    return overrides


def write_folder(checkpoint: Checkpoint, folder: Path, *, max_pixels: int | None = None) -> None:
    """Write a folder that vLLM can start from.

    Args:
        checkpoint: an opened checkpoint.
        folder: where to; made when it is not there. One that this wrote before is written anew, any other has to be
            empty.
        max_pixels: most pixels of an image; None takes the checkpoint's bound.

    Raises:
        EngineError: the folder cannot be written, is the checkpoint's own, or holds something else.
    """
    source = checkpoint.folder.resolve()
    if folder.resolve() == source:
        raise EngineError(f"{folder}: the checkpoint's own folder; choose another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not _is_ours(folder):
            raise EngineError(f"{folder}: holds other files; choose an empty folder")
        for name, content in _small_files(checkpoint, max_pixels or checkpoint.max_pixels).items():
            (folder / name).unlink(missing_ok=True)  # never write through a link
            (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        for old in folder.glob("*.safetensors*"):  # vLLM reads all there are, those of another checkpoint too
            old.unlink()
        for path in sorted({record.file for record in checkpoint.tensors.values()}):
            _link(path.resolve(), folder / path.name)
        for name in ("tokenizer.json", "model.safetensors.index.json"):
            if (source / name).exists():
                _link((source / name).resolve(), folder / name)
    except OSError as exc:
        raise EngineError(f"{folder}: cannot be written: {exc.strerror or exc}") from exc


def _is_ours(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config["architectures"][0] in (CAUSAL_ARCHITECTURE, BIDIRECTIONAL_ARCHITECTURE)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _small_files(checkpoint: Checkpoint, max_pixels: int) -> dict[str, dict[str, Any]]:
    family = checkpoint.family
    config = {key: value for key, value in checkpoint.config.items() if key != "auto_map"}
    overrides = config_overrides(family)
    text = {**config["text_config"], **overrides.get("text_config", {})}
    patches: dict[str, Any] = {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
        "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "patch_size": VISUAL_TOKEN_SIDE // 2, "merge_size": 2, "temporal_patch_size": 2,
        "size": {"shortest_edge": min(checkpoint.min_pixels, max_pixels), "longest_edge": max_pixels},
        "processor_class": "Qwen3VLProcessor",
    }  # fmt: skip
    return {
        # the names under which vLLM finds a config class, whatever a fine-tune calls itself
        "config.json": {
            **config, **overrides, "text_config": text, "model_type": family.model_types[0],
        },
        "preprocessor_config.json": {**patches, "image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": {**patches, "video_processor_type": "Qwen3VLVideoProcessor"},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": _PAD, "eos_token": _END,
            "model_max_length": checkpoint.context_length, "clean_up_tokenization_spaces": False,
        },
    }  # fmt: skip


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        target.symlink_to(source)
    except OSError:  # a file system without symbolic links
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
