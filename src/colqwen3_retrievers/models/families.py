"""Checkpoint families as data: a new checkpoint is a row here, never a class.

A row has the names of a family's checkpoints, their tensors' names, the exact prompt strings they were trained with,
their pixel bounds, and which of these facts the authors' files have not confirmed.

In a prompt, ``{visual}`` is the visual placeholder and ``{text}`` the user's text; the rest is literal, special tokens
included. No chat template is added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from colqwen3_retrievers.errors import CheckpointError, ConfigError

VISUAL_TOKEN_SIDE = 32
"""Pixels on each side of one visual token: patch 16 times spatial merge 2."""

DIM_KEYS = ("embed_dim", "dims", "dim", "projection_dim", "colbert_dim")
"""Config keys that may hold the token embedding's dim, in the order tried."""

PROJECTION_NAMES = ("embedding_proj_layer", "custom_text_proj")
"""Names of the projection in checkpoints."""

IMAGE_PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO_PLACEHOLDER = "<|vision_start|><|video_pad|><|vision_end|>"

_OUTER_PREFIXES = ("base_model.model.", "vlm.", "model.")
_AUGMENTATION = "<|endoftext|>" * 10
_MIN_PIXELS = 65_536
_MAX_PIXELS = 1_310_720
_PROMPT_A = "<|im_start|>user\n{visual}Describe the image.{text}<|im_end|><|endoftext|>"
_PROMPT_B = "<|im_start|>user\n{visual}Describe the image.{text}<|im_end|><|im_start|>assistant\n<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Family:
    """One checkpoint family.

    Attributes:
        name: the key, as in ``family="tomoro"``.
        models: hub names known to belong to it.
        architectures: values of ``architectures`` in its config.
        model_types: values of ``model_type``; names shared with another row do not identify a family.
        projection: name of the projection's tensors, or None when the hidden state itself is the token embedding.
        dim_key: the config key of its dim, or None.
        matryoshka_dims: dims it was trained to be truncated to, besides its full dim; a config may name more.
        causal: whether a token attends only to those before it in the text trunk.
        final_norm: whether the token embedding is read after the trunk's final RMSNorm.
        query: prompt of a text query.
        image: prompt of an image document, and of an image query.
        text: prompt of a text document.
        video: prompt of a video document, or None when the family has none.
        beside: separator between an image's instruction and a text that follows it.
        strip: whether white space around a user's text is removed.
        max_query_tokens: most tokens of a query's whole prompt, or None for the context length.
        min_pixels: fewest pixels an image is resized to.
        max_pixels: most pixels an image is resized to.
        processor_pixels: whether the checkpoint's own preprocessor file may narrow these bounds.
        rendering_version: incremented when a prompt or the pixels change, since old embeddings cannot be compared.
        unverified: what its authors' files have not confirmed.

    >>> get_family("nemotron").causal, get_family("tomoro").query[:6]
    (False, '{text}')
    """

    name: str
    models: tuple[str, ...]
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    projection: str | None
    dim_key: str | None
    query: str
    image: str
    text: str
    video: str | None = None
    beside: str = " "
    matryoshka_dims: tuple[int, ...] = ()
    causal: bool = True
    final_norm: bool = True
    strip: bool = False
    max_query_tokens: int | None = None
    min_pixels: int = _MIN_PIXELS
    max_pixels: int = _MAX_PIXELS
    processor_pixels: bool = False
    rendering_version: int = 2
    unverified: tuple[str, ...] = ()

    @property
    def verified(self) -> bool:
        """Whether everything about it is confirmed."""
        return not self.unverified


FAMILIES: Mapping[str, Family] = {
    row.name: row
    for row in (
        Family(
            name="tomoro",
            models=("TomoroAI/tomoro-colqwen3-embed-4b", "TomoroAI/tomoro-colqwen3-embed-8b"),
            architectures=("ColQwen3",),
            model_types=("colqwen3",),
            projection="embedding_proj_layer",
            dim_key="embed_dim",
            query="{text}" + _AUGMENTATION,
            image=_PROMPT_A,
            text="{text}" + _AUGMENTATION,
            video=_PROMPT_A.replace("image", "video"),
            strip=True,
            unverified=("the lower pixel bound", "the pixels and time marks of a video"),
        ),
        Family(
            name="ops",
            models=("OpenSearch-AI/Ops-Colqwen3-4B",),
            architectures=("OpsColQwen3Model",),
            model_types=("ops_colqwen3",),
            projection="custom_text_proj",
            dim_key="dims",
            matryoshka_dims=(320, 128),
            query="Query: {text}" + _AUGMENTATION,
            image=_PROMPT_B,
            text="Query: {text}" + _AUGMENTATION,
            min_pixels=4_096,
            unverified=("the prompt of text documents",),
        ),
        Family(
            name="nemotron",
            models=("nvidia/nemotron-colembed-vl-4b-v2", "nvidia/nemotron-colembed-vl-8b-v2"),
            architectures=("Qwen3VLNemotronEmbedModel",),
            model_types=("qwen3_vl_nemotron_embed",),
            projection=None,
            dim_key=None,
            query="<|im_start|>user\nQuery: query: {text}<|im_end|>\n<|im_start|>assistant\n",
            image="<|im_start|>user\n{visual}passage: {text}<|im_end|>\n<|im_start|>assistant\n",
            text="<|im_start|>user\npassage: {text}<|im_end|>\n<|im_start|>assistant\n",
            beside="",
            causal=False,
            final_norm=False,
            max_query_tokens=512,
            unverified=("the pixel bounds", "text documents, which its authors do not support"),
        ),
        Family(
            name="sauerkraut",
            models=(
                "VAGOsolutions/SauerkrautLM-ColQwen3-1.7b-Turbo-v0.1",
                "VAGOsolutions/SauerkrautLM-ColQwen3-2b-v0.1",
                "VAGOsolutions/SauerkrautLM-ColQwen3-4b-v0.1",
                "VAGOsolutions/SauerkrautLM-ColQwen3-8b-v0.1",
            ),
            architectures=("ColQwen3",),
            model_types=("colqwen3", "qwen3_vl"),  # unconfirmed, so both: neither then tells it from another row
            projection="custom_text_proj",
            dim_key="dim",
            query="Query: {text}" + _AUGMENTATION,
            image=_PROMPT_A,
            text="Query: {text}" + _AUGMENTATION,
            min_pixels=3_136,
            max_pixels=1_003_520,
            unverified=("the prompt of text documents", "model_type"),
        ),
        Family(
            name="colpali",
            models=("Verm1ion/ColTurk-VDR-Qwen3VL-4B",),
            architectures=("ColQwen3",),
            model_types=("qwen3_vl", "colqwen3"),
            projection="custom_text_proj",
            dim_key=None,
            query="{text}" + _AUGMENTATION,
            image=_PROMPT_A,
            text="{text}",
            processor_pixels=True,
            unverified=("the pixel bounds, where the preprocessor file names none", "'Query: ' in older releases"),
        ),
    )
}


def get_family(name: str) -> Family:
    """Look a family up by its key.

    Raises:
        ConfigError: unknown; the message lists the known ones.

    >>> get_family("ops").dim_key
    'dims'
    >>> get_family("colqwen2")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: family 'colqwen2': expected one of tomoro, ops, ...
    """
    try:
        return FAMILIES[name]
    except KeyError:
        raise ConfigError(f"family {name!r}: expected one of {', '.join(FAMILIES)}") from None


def inner_name(tensor: str) -> str:
    """Return a tensor's name without the prefixes that wrappers and trainers add.

    >>> inner_name("base_model.model.vlm.model.visual.pos_embed.weight")
    'visual.pos_embed.weight'
    """
    for prefix in _OUTER_PREFIXES:
        tensor = tensor.removeprefix(prefix)
    return tensor


def find_dim_key(config: Mapping[str, Any]) -> str | None:
    """Return which of :data:`DIM_KEYS` a config uses for the dim, or None.

    >>> find_dim_key({"dims": 2560, "hidden_size": 8})
    'dims'
    """
    return next((key for key in DIM_KEYS if isinstance(config.get(key), int)), None)


def tell_family(config: Mapping[str, Any], projections: Iterable[str], *, model: str) -> Family:
    """Return the family of a checkpoint, identified by its config and its tensor names together.

    The projection's name must match; a name in the config that is unique to one family decides among the rest, then
    the key of the dim. A config that names one family while the tensors match another is an error, as is a checkpoint
    that matches none or several: a wrong guess would mean wrong prompts, which no error would show.

    Args:
        config: the checkpoint's config.json.
        projections: which of :data:`PROJECTION_NAMES` have tensors in the checkpoint.
        model: what to call it in an error.

    Returns:
        The family's row.

    Raises:
        CheckpointError: it matches none or several families; pass ``family=``.

    >>> tell_family({"architectures": ["ColQwen3"], "dim": 128}, ["custom_text_proj"], model="x").name
    'sauerkraut'
    """
    names = sorted(set(projections))
    if len(names) > 1:
        raise CheckpointError(f"{model}: two projections ({', '.join(names)})", unexpected=names)
    projection = names[0] if names else None
    named = _named_families(config)
    fitting = [row for row in FAMILIES.values() if row.projection == projection]
    if named or projection is None:  # a stock Qwen3-VL has no projection either, and is no late-interaction model
        fitting = [row for row in fitting if row.name in named]
    if len(fitting) > 1:
        dim_key = find_dim_key(config)
        fitting = [row for row in fitting if row.dim_key == dim_key]
    if len(fitting) == 1:
        return fitting[0]
    shown = {key: config.get(key) for key in ("architectures", "model_type", *DIM_KEYS) if key in config}
    raise CheckpointError(
        f"{model}: cannot tell the family from config {shown} and projection {projection or 'none'}; "
        f"give family= one of {', '.join(FAMILIES)}"
    )


def _named_families(config: Mapping[str, Any]) -> set[str]:
    """Return the families identified by a name in the config that no other family has."""
    architectures = config.get("architectures") or []
    model_type = config.get("model_type")
    named: set[str] = set()
    for rows in (
        [row for row in FAMILIES.values() if set(row.architectures) & set(architectures)],
        [row for row in FAMILIES.values() if model_type in row.model_types],
    ):
        if len(rows) == 1:
            named.add(rows[0].name)
    return named
