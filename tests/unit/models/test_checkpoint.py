"""Opening and loading checkpoints: every naming convention, and everything that can be wrong with the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from colqwen3_retrievers.engines.torch.model import load_model
from colqwen3_retrievers.errors import CheckpointError, ConfigError
from colqwen3_retrievers.models.checkpoint import locate, open_checkpoint
from colqwen3_retrievers.models.tokenizer import PromptTokenizer
from tests.checkpoints import FAMILY_NAMES, TinyCheckpoint, make_checkpoint


def load(folder: Path, **settings: str) -> torch.nn.Module:
    return load_model(open_checkpoint(folder, **settings), device="cpu", dtype=torch.float32)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[[str], TinyCheckpoint]:
    return lambda family: make_checkpoint(tmp_path / family, family)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_tensor_lands_where_it_belongs(tiny: Callable[[str], TinyCheckpoint], family: str) -> None:
    checkpoint = tiny(family)
    model = load(checkpoint.folder)
    have = model.state_dict()
    for name, value in checkpoint.backbone.items():
        if family == "nemotron" and name == "language_model.norm.weight":
            continue  # read before the norm: the gain is read from the file and left aside
        assert torch.equal(have[f"backbone.{name}"], value), name
    if checkpoint.weight is not None:
        assert torch.equal(have["projection.weight"], checkpoint.weight)
        assert torch.equal(have["projection.bias"], checkpoint.bias)


@pytest.mark.parametrize("outer", ["", "model.", "vlm.model.", "base_model.model.", "base_model.model.model."])
@pytest.mark.parametrize("head", ["custom_text_proj", "base_model.model.custom_text_proj", "model.custom_text_proj"])
def test_outer_prefixes(tiny: Callable[[str], TinyCheckpoint], outer: str, head: str) -> None:
    checkpoint = tiny("colpali")
    names = {outer + name: value for name, value in checkpoint.backbone.items()}
    checkpoint.write({**names, f"{head}.weight": checkpoint.weight, f"{head}.bias": checkpoint.bias})
    have = load(checkpoint.folder).state_dict()
    assert torch.equal(have["projection.bias"], checkpoint.bias)
    assert torch.equal(
        have["backbone.visual.patch_embed.proj.weight"], checkpoint.backbone["visual.patch_embed.proj.weight"]
    )


def test_a_projection_without_bias_has_none(tiny: Callable[[str], TinyCheckpoint]) -> None:
    checkpoint = tiny("sauerkraut")
    checkpoint.write({name: value for name, value in checkpoint.names.items() if name != "custom_text_proj.bias"})
    assert load(checkpoint.folder).projection.bias is None


def test_shards_give_the_same_model(tiny: Callable[[str], TinyCheckpoint]) -> None:
    checkpoint = tiny("tomoro")
    one = load(checkpoint.folder).state_dict()
    whole = open_checkpoint(checkpoint.folder).fingerprint
    checkpoint.write(shards=3)
    many = load(checkpoint.folder).state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert open_checkpoint(checkpoint.folder).fingerprint == whole


@pytest.mark.parametrize("key", ["embed_dim", "dims", "dim", "projection_dim", "colbert_dim", None])
def test_the_dim_from_any_key_or_the_shape(tiny: Callable[[str], TinyCheckpoint], key: str | None) -> None:
    checkpoint = tiny("tomoro")
    checkpoint.edit_config(**{"embed_dim": None, **({key: 48} if key else {})})
    assert open_checkpoint(checkpoint.folder, family="tomoro").dim == 48


def test_family_overrules(tiny: Callable[[str], TinyCheckpoint]) -> None:
    checkpoint = tiny("sauerkraut")
    assert open_checkpoint(checkpoint.folder).family.name == "sauerkraut"
    assert open_checkpoint(checkpoint.folder, family="ops").family.name == "ops"
    with pytest.raises(ConfigError, match="family 'x'"):
        open_checkpoint(checkpoint.folder, family="x")


def test_dtype_keeps_the_projection_and_the_rotary_tables_in_float32(tiny: Callable[[str], TinyCheckpoint]) -> None:
    model = load_model(open_checkpoint(tiny("ops").folder), device="cpu", dtype=torch.bfloat16)
    assert model.backbone.dtype == torch.bfloat16
    assert model.projection.weight.dtype == torch.float32
    assert model.backbone.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.backbone.visual.rotary_pos_emb.inv_freq.dtype == torch.float32


def test_matryoshka_dims_from_row_and_config(tiny: Callable[[str], TinyCheckpoint]) -> None:
    checkpoint = tiny("tomoro")
    assert open_checkpoint(checkpoint.folder).matryoshka_dims == (48,)
    checkpoint.edit_config(matryoshka_dims=[32, 48, 16])
    assert open_checkpoint(checkpoint.folder).matryoshka_dims == (48, 32, 16)
    wide = make_checkpoint(checkpoint.folder.parent / "wide", "ops", dim=400)
    assert open_checkpoint(wide.folder).matryoshka_dims == (400, 320, 128)


@pytest.mark.parametrize(
    ("processor", "bounds"),
    [
        ({"size": {"shortest_edge": 4096, "longest_edge": 16_777_216}}, (4096, 1_310_720)),
        ({"min_pixels": 3136, "max_pixels": 786_432}, (3136, 786_432)),
        ({"max_num_visual_tokens": 768, "max_pixels": 16_777_216}, (65_536, 786_432)),
        ({}, (65_536, 1_310_720)),
    ],
)
def test_pixel_bounds_of_a_native_checkpoint(
    tiny: Callable[[str], TinyCheckpoint], processor: dict, bounds: tuple[int, int]
) -> None:
    checkpoint = tiny("colpali")
    (checkpoint.folder / "preprocessor_config.json").write_text(json.dumps(processor))
    opened = open_checkpoint(checkpoint.folder)
    assert (opened.min_pixels, opened.max_pixels) == bounds


def test_pixel_bounds_as_transformers_5_writes_them(tiny: Callable[[str], TinyCheckpoint]) -> None:
    checkpoint = tiny("colpali")
    (checkpoint.folder / "preprocessor_config.json").unlink()
    settings = {"image_processor": {"size": {"shortest_edge": 4096, "longest_edge": 786_432}}, "processor_class": "x"}
    (checkpoint.folder / "processor_config.json").write_text(json.dumps(settings))
    opened = open_checkpoint(checkpoint.folder)
    assert (opened.min_pixels, opened.max_pixels) == (4096, 786_432)


def test_the_published_spelling_of_the_rotary_settings(tiny: Callable[[str], TinyCheckpoint]) -> None:
    checkpoint = tiny("ops")
    expected = load(checkpoint.folder).backbone.language_model.rotary_emb
    before = open_checkpoint(checkpoint.folder).fingerprint
    _nested(
        "text_config", rope_parameters=None, rope_theta=10_000,
        rope_scaling={"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
    )(checkpoint)  # fmt: skip
    found = load(checkpoint.folder).backbone.language_model.rotary_emb
    assert torch.equal(found.inv_freq, expected.inv_freq)
    assert found.mrope_section == expected.mrope_section == [4, 2, 2]
    assert open_checkpoint(checkpoint.folder).fingerprint == before, "another spelling is no other model"


def test_the_cap_is_the_familys_not_the_files(tiny: Callable[[str], TinyCheckpoint]) -> None:
    assert open_checkpoint(tiny("tomoro").folder).max_pixels == 1_310_720  # the file says 16,777,216


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    one = make_checkpoint(tmp_path / "one", "tomoro")
    same = make_checkpoint(tmp_path / "two", "tomoro")
    other = make_checkpoint(tmp_path / "three", "tomoro", seed=8)
    prints = [open_checkpoint(item.folder).fingerprint for item in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]
    same.edit_config(transformers_version="9.9", torch_dtype="float16")
    assert open_checkpoint(same.folder).fingerprint == prints[0]
    for name in ("embedding_proj_layer.bias", "vlm.model.language_model.layers.0.self_attn.q_proj.weight",
                 "vlm.model.visual.blocks.2.mlp.linear_fc1.weight"):  # fmt: skip
        one.write({**one.names, name: one.names[name] + 1})
        assert open_checkpoint(one.folder).fingerprint != prints[0], name


# -- everything that can be wrong -------------------------------------------------------------------------------------


def _drop(*ends: str) -> Callable[[TinyCheckpoint], None]:
    return lambda c: c.write({k: v for k, v in c.names.items() if not k.endswith(ends)})


def _add(name: str, value: torch.Tensor) -> Callable[[TinyCheckpoint], None]:
    return lambda c: c.write({**c.names, name: value})


def _config(**changes: object) -> Callable[[TinyCheckpoint], None]:
    return lambda c: c.edit_config(**changes)


def _text(name: str, text: str) -> Callable[[TinyCheckpoint], None]:
    return lambda c: (c.folder / name).write_text(text) and None


def _cut(c: TinyCheckpoint) -> None:
    path = c.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _lose_a_shard(c: TinyCheckpoint) -> None:
    c.write(shards=3)
    (c.folder / "model-00002-of-00003.safetensors").unlink()


def _promise_too_much(c: TinyCheckpoint) -> None:
    c.write(shards=2)
    path = c.folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["visual.not.there"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))


def _shard_outside(c: TinyCheckpoint) -> None:
    c.write(shards=2)
    path = c.folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))


def _twice(c: TinyCheckpoint) -> None:
    c.write(shards=2)
    first = load_file(c.folder / "model-00001-of-00002.safetensors")
    second = load_file(c.folder / "model-00002-of-00002.safetensors")
    name = next(iter(first))
    save_file({**second, name: first[name]}, c.folder / "model-00002-of-00002.safetensors")


def _only_pickle(c: TinyCheckpoint) -> None:
    (c.folder / "model.safetensors").rename(c.folder / "pytorch_model.bin")


def _adapter(c: TinyCheckpoint) -> None:
    (c.folder / "model.safetensors").rename(c.folder / "adapter_model.safetensors")


def _backwards(c: TinyCheckpoint) -> None:
    path = c.folder / "model.safetensors"
    blob = path.read_bytes()
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    next(entry for name, entry in header.items() if name != "__metadata__")["data_offsets"] = [64, 0]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + blob[8 + length :])


def _nested(part: str, **changes: object) -> Callable[[TinyCheckpoint], None]:
    def edit(c: TinyCheckpoint) -> None:
        config = json.loads((c.folder / "config.json").read_text())
        c.edit_config(**{part: {**config[part], **changes}})

    return edit


VISION_BIAS = "visual.blocks.1.attn.qkv.bias"
BAD_CHECKPOINTS: list[tuple[str, Callable[[TinyCheckpoint], None], str]] = [
    ("a vision bias is missing", _drop(VISION_BIAS), rf"tensors missing {VISION_BIAS}"),
    ("the final norm is missing", _drop("language_model.norm.weight"), r"missing language_model\.norm\.weight"),
    ("the projection is missing", _drop("embedding_proj_layer.weight"), r"no embedding_proj_layer\.weight"),
    ("a tensor is left over", _add("vlm.model.language_model.extra", torch.zeros(2)), "left over vlm.model.language_"),
    ("a foreign head", _add("classifier.weight", torch.zeros(2, 2)), "no place for classifier.weight"),
    ("an unmerged LoRA", _add("base_model.model.q.lora_A.weight", torch.zeros(2)), "an unmerged LoRA"),
    (
        "a projection of the wrong width",
        _add("embedding_proj_layer.weight", torch.zeros(48, 63)),
        r"expected \(dim, 64\)",
    ),
    (
        "a bias of the wrong size",
        _add("embedding_proj_layer.bias", torch.zeros(47)),
        r"bias \(47,\) instead of \(48,\)",
    ),
    ("a norm of the wrong shape", _add("vlm.model.language_model.norm.weight", torch.zeros(65)), "of the wrong shape"),
    ("the same tensor twice", _add("model.visual.merger.norm.bias", torch.zeros(32)), "are the same tensor"),
    ("two projections", _add("custom_text_proj.weight", torch.zeros(48, 64)), "two projections"),
    ("another dim in the config", _config(embed_dim=320), "config says embed_dim = 320"),
    ("no text config", _config(text_config=None), "no text_config: not a Qwen3-VL checkpoint"),
    ("no vision config", _config(vision_config=7), "no vision_config"),
    ("no hidden size", _nested("text_config", hidden_size=None), "text_config.hidden_size is None, expected a whole"),
    ("no layers", _nested("text_config", num_hidden_layers=None), "text_config.num_hidden_layers is None"),
    ("no context", _nested("text_config", max_position_embeddings="x"), "max_position_embeddings is 'x', expected"),
    (
        "no rope theta",
        _nested("text_config", rope_parameters={"mrope_section": [4, 2, 2]}),
        "no text_config rope_theta",
    ),
    ("no rope section", _nested("text_config", rope_parameters={"rope_theta": 1e4}), "no text_config mrope_section"),
    (
        "an architecture that is no list",
        _config(architectures="ColQwen3"),
        "architectures is 'ColQwen3', expected a li",
    ),
    (
        "Matryoshka dims that are none",
        _config(matryoshka_dims=["a"]),
        "matryoshka_dims is .*, expected a list of whole",
    ),
    ("a config without end", _text("config.json", "[" * 100_000), "config.json cannot be read"),
    ("offsets that run backwards", _backwards, "impossible offsets for"),
    ("another patch size", _nested("vision_config", patch_size=14), "patch_size is 14, expected 16"),
    ("a text config that is none", _nested("text_config", num_attention_heads="many"), "not a Qwen3-VL config"),
    ("a config that is no JSON", _text("config.json", "{"), "config.json cannot be read"),
    ("a config that is a list", _text("config.json", "[]"), "config.json holds no JSON object"),
    ("no config", lambda c: (c.folder / "config.json").unlink(), "no config.json in"),
    ("weights cut short", _cut, "model.safetensors is cut short"),
    ("weights empty", _text("model.safetensors", ""), "torn or not safetensors"),
    ("weights that are text", _text("model.safetensors", "version https://git-lfs.github.com/spec/v1"), "torn or not"),
    ("only a pickle", _only_pickle, "pytorch_model.bin is a pickle, which is never read"),
    ("only an adapter", _adapter, "adapter_model.safetensors: a LoRA adapter, which is not applied: merge it"),
    (
        "an adapter beside it",
        _text("adapter_config.json", "{}"),
        "adapter_config.json: a LoRA adapter, which is not ap",
    ),
    ("a shard is lost", _lose_a_shard, "model-00002-of-00003.safetensors is missing"),
    ("the index promises too much", _promise_too_much, "visual.not.there named in model.safetensors.index.json"),
    ("a shard outside the folder", _shard_outside, "shards outside the folder"),
    ("a tensor in two shards", _twice, "lies in two shards"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), BAD_CHECKPOINTS, ids=[row[0] for row in BAD_CHECKPOINTS])
def test_bad_checkpoints(
    tiny: Callable[[str], TinyCheckpoint], name: str, spoil: Callable[[TinyCheckpoint], None], message: str
) -> None:
    checkpoint = tiny("tomoro")
    spoil(checkpoint)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(checkpoint.folder)
    assert str(checkpoint.folder) in str(caught.value)


def test_missing_and_unexpected_are_attributes(tiny: Callable[[str], TinyCheckpoint]) -> None:
    checkpoint = tiny("ops")
    names = dict(checkpoint.names)
    names["visual.blocks.9.norm1.bias"] = names.pop("visual.blocks.0.norm1.bias")
    checkpoint.write(names)
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint.folder)
    assert caught.value.missing == ("visual.blocks.0.norm1.bias",)
    assert caught.value.unexpected == ("visual.blocks.9.norm1.bias",)


def test_tokenizers_that_will_not_do(tiny: Callable[[str], TinyCheckpoint]) -> None:
    checkpoint = tiny("tomoro")
    with pytest.raises(CheckpointError, match=r"has no <\|nothing\|>"):
        PromptTokenizer(checkpoint.folder, model="m").id_of("<|nothing|>")
    (checkpoint.folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read"):
        PromptTokenizer(checkpoint.folder, model="m")
    (checkpoint.folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer.json"):
        PromptTokenizer(checkpoint.folder, model="m")


@pytest.mark.parametrize("model", ["not/there/at/all", "./nowhere", "nowhere", "owner/"])
def test_models_that_are_nowhere(model: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder, and not a hub name"):
        locate(model)


def test_an_absolute_path_is_never_a_hub_name() -> None:
    with pytest.raises(CheckpointError, match="/nowhere/model: no such folder; has the model been moved"):
        locate("/nowhere/model")


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("x")
    with pytest.raises(CheckpointError, match="a file, not a checkpoint folder"):
        locate(tmp_path / "model.bin")
