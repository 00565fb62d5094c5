"""Mapping tensor names from any family's convention to vLLM's, and from vLLM's packed parameters back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from colqwen3_retrievers.models.families import PROJECTION_NAMES, inner_name

PROJECTION = "custom_text_proj"
"""vLLM's name of the projection, whatever a checkpoint's."""


def renamed(name: str) -> str:
    """Return the name under which vLLM maps a tensor, for a name of any family's convention.

    Args:
        name: as in a checkpoint.

    Returns:
        ``model.visual.*``, ``model.language_model.*``, ``lm_head.*`` or ``custom_text_proj.*``; other names unchanged.

    >>> renamed("base_model.model.vlm.model.visual.patch_embed.proj.weight")
    'model.visual.patch_embed.proj.weight'
    >>> renamed("embedding_proj_layer.bias")
    'custom_text_proj.bias'
    """
    inner = inner_name(name)
    part, _, rest = inner.partition(".")
    if part in PROJECTION_NAMES:
        return f"{PROJECTION}.{rest}"
    if part in ("visual", "language_model"):
        return f"model.{inner}"
    return inner if part == "lm_head" else name


def mapped(name: str) -> str:
    """Return the parameter's name of a renamed tensor.

    >>> mapped("model.language_model.norm.weight")
    'language_model.model.norm.weight'
    """
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    return name.removeprefix("model.")


def sources(parameter: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the tensors that fill a parameter: vLLM packs some that are separate in a checkpoint.

    >>> sources("language_model.model.layers.0.mlp.gate_up_proj.weight", {"gate_up_proj": ["gate_proj", "up_proj"]})
    ['language_model.model.layers.0.mlp.gate_proj.weight', 'language_model.model.layers.0.mlp.up_proj.weight']
    """
    parts = parameter.split(".")
    for index, part in enumerate(parts):
        if part in packed:
            return [".".join([*parts[:index], source, *parts[index + 1 :]]) for source in packed[part]]
    return [parameter]
