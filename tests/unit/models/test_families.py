"""The family table, and telling a family from a config and tensor names together."""

from __future__ import annotations

import pytest

from colqwen3_retrievers.errors import CheckpointError, ConfigError
from colqwen3_retrievers.models.families import FAMILIES, find_dim_key, get_family, tell_family

TOLD = [
    ("tomoro", {"architectures": ["ColQwen3"], "model_type": "colqwen3", "embed_dim": 320}, ["embedding_proj_layer"]),
    ("tomoro", {}, ["embedding_proj_layer"]),
    ("ops", {"architectures": ["OpsColQwen3Model"], "model_type": "ops_colqwen3", "dims": 2560}, ["custom_text_proj"]),
    ("ops", {"dims": 2560}, ["custom_text_proj"]),
    ("ops", {"architectures": ["OpsColQwen3Model"]}, ["custom_text_proj"]),
    ("nemotron", {"architectures": ["Qwen3VLNemotronEmbedModel"], "pooling": "colbert"}, []),
    ("nemotron", {"model_type": "qwen3_vl_nemotron_embed"}, []),
    ("sauerkraut", {"architectures": ["ColQwen3"], "dim": 128}, ["custom_text_proj"]),
    ("sauerkraut", {"architectures": ["ColQwen3"], "model_type": "colqwen3", "dim": 128}, ["custom_text_proj"]),
    ("sauerkraut", {"architectures": ["ColQwen3"], "model_type": "qwen3_vl", "dim": 128}, ["custom_text_proj"]),
    ("colpali", {"architectures": ["ColQwen3"], "model_type": "qwen3_vl"}, ["custom_text_proj"]),
]


@pytest.mark.parametrize(("name", "config", "projections"), TOLD)
def test_family_is_told(name: str, config: dict, projections: list[str]) -> None:
    assert tell_family(config, projections, model="m").name == name


@pytest.mark.parametrize(
    ("config", "projections"),
    [
        ({"architectures": ["OpsColQwen3Model"], "dims": 2560}, ["embedding_proj_layer"]),
        ({"architectures": ["Qwen3VLNemotronEmbedModel"]}, ["custom_text_proj"]),
        ({"architectures": ["ColQwen3"], "colbert_dim": 128}, ["custom_text_proj"]),
        ({"architectures": ["OpsColQwen3Model"], "model_type": "qwen3_vl_nemotron_embed"}, ["embedding_proj_layer"]),
        ({}, ["custom_text_proj", "embedding_proj_layer"]),
        ({"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl"}, []),
    ],
)
def test_contradictions_are_refused(config: dict, projections: list[str]) -> None:
    with pytest.raises(CheckpointError, match=r"^m: "):
        tell_family(config, projections, model="m")


def test_dim_keys_are_tried_in_order() -> None:
    config = {"colbert_dim": 5, "projection_dim": 4, "dim": 3, "dims": 2, "embed_dim": 1}
    for key in ("embed_dim", "dims", "dim", "projection_dim", "colbert_dim"):
        assert find_dim_key(config) == key
        del config[key]
    assert find_dim_key(config) is None


def test_every_row_is_whole() -> None:
    assert list(FAMILIES) == ["tomoro", "ops", "nemotron", "sauerkraut", "colpali"]
    for name, row in FAMILIES.items():
        assert row.name == name
        assert row.query.count("{text}") == row.image.count("{text}") == row.text.count("{text}") == 1
        assert row.image.count("{visual}") == 1
        assert row.min_pixels < row.max_pixels
        assert row.rendering_version >= 1
        assert row.verified == (row.unverified == ())


def test_augmentation_is_ten_pads() -> None:
    for name in ("tomoro", "ops", "sauerkraut", "colpali"):
        assert get_family(name).query.count("<|endoftext|>") == 10
    assert "<|endoftext|>" not in get_family("nemotron").query


def test_unknown_family_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="tomoro, ops, nemotron, sauerkraut, colpali"):
        get_family("colqwen2")
