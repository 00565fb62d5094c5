"""A factory of tiny random checkpoints, one a family, in which everything that could be forgotten shows.

Every bias is non-zero, every norm gain unequal, and the tensors bear the family's own names, so that dropping a bias,
skipping a norm, or reading the wrong tensor changes the embeddings. The factory gives back the same weights under plain
transformers' names, for a reference that shares no code with the library.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen3VLConfig, Qwen3VLModel

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
FAMILY_NAMES = ("tomoro", "ops", "nemotron", "sauerkraut", "colpali")

# The pre-tokenisation of Qwen's tokenizer: words with their leading space, single digits, punctuation, white space.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROMPT_WORDS = "user assistant Describe the image video . Query query passage : the seconds what was revenue of in 2024"

HIDDEN = 64


def make_tokenizer(path: Path) -> None:
    """Write a byte-level BPE tokenizer.json in which the prompts' words are single tokens, as in Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [*PROMPT_WORDS.split()] + [f" {word}" for word in PROMPT_WORDS.split()]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(path))


@dataclass
class TinyCheckpoint:
    """A written checkpoint, and what a reference needs of it."""

    folder: Path
    family: str
    config: Qwen3VLConfig
    backbone: dict[str, torch.Tensor]
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    names: dict[str, torch.Tensor] = field(default_factory=dict)

    def write(self, names: dict[str, torch.Tensor] | None = None, *, shards: int = 1) -> None:
        """Write the tensors, under other names or in several shards when asked."""
        names = self.names if names is None else names
        for old in self.folder.glob("*.safetensors*"):
            old.unlink()
        tensors = {key: value.contiguous().clone() for key, value in names.items()}
        if shards == 1:
            save_file(tensors, self.folder / "model.safetensors", metadata={"format": "pt"})
            return
        keys = sorted(tensors)
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = {key: tensors[key] for key in keys[shard::shards]}
            save_file(part, self.folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        index = {"metadata": {}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def edit_config(self, **changes: Any) -> None:
        """Change keys of config.json; None takes a key out."""
        path = self.folder / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def make_checkpoint(folder: Path, family: str, *, dim: int = 48, seed: int = 7, head_dim: int = 16) -> TinyCheckpoint:
    """Write a random checkpoint of a family into a folder (about 0.7 MB); vLLM on CPU wants a ``head_dim`` of 32."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": tokenizer.get_vocab_size(), "hidden_size": HIDDEN, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim,
            "max_position_embeddings": 4096, "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10_000.0, "mrope_interleaved": True,
                "mrope_section": [head_dim // 4, head_dim // 8, head_dim // 8],
            },
        },
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": HIDDEN,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=tokenizer.token_to_id("<|image_pad|>"),
        video_token_id=tokenizer.token_to_id("<|video_pad|>"),
        vision_start_token_id=tokenizer.token_to_id("<|vision_start|>"),
        vision_end_token_id=tokenizer.token_to_id("<|vision_end|>"),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    backbone = {
        name: _random(name, tensor, generator) for name, tensor in sorted(Qwen3VLModel(config).state_dict().items())
    }
    weight = bias = None
    if family != "nemotron":
        weight = torch.randn(dim, HIDDEN, generator=generator) / HIDDEN**0.5
        bias = torch.randn(dim, generator=generator) * 0.7
    checkpoint = TinyCheckpoint(folder, family, config, backbone, weight, bias)
    checkpoint.names = family_names(checkpoint)
    checkpoint.write()
    head: dict[str, dict[str, Any]] = {
        "tomoro": {"architectures": ["ColQwen3"], "model_type": "colqwen3", "embed_dim": dim},
        "ops": {"architectures": ["OpsColQwen3Model"], "model_type": "ops_colqwen3", "dims": dim},
        "nemotron": {
            "architectures": ["Qwen3VLNemotronEmbedModel"], "model_type": "qwen3_vl_nemotron_embed",
            "pooling": "colbert",
        },
        "sauerkraut": {"architectures": ["ColQwen3"], "model_type": "colqwen3", "dim": dim},
        "colpali": {"architectures": ["ColQwen3"], "model_type": "qwen3_vl"},
    }  # fmt: skip
    plain = json.loads(config.to_json_string(use_diff=False))
    kept = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    parts = {"text_config": plain["text_config"], "vision_config": plain["vision_config"]}
    (folder / "config.json").write_text(
        json.dumps({**head[family], **{key: plain[key] for key in kept}, **parts}, indent=1)
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}, "patch_size": 16, "merge_size": 2})
    )
    return checkpoint


def family_names(checkpoint: TinyCheckpoint) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors under its family's own names."""
    prefix = {"tomoro": "vlm.model.", "nemotron": "model."}.get(checkpoint.family, "")
    tensors = {prefix + name: value for name, value in checkpoint.backbone.items()}
    if checkpoint.family == "tomoro":
        tensors["vlm.lm_head.weight"] = checkpoint.backbone["language_model.embed_tokens.weight"]
    if checkpoint.family == "nemotron":
        tensors["lm_head.weight"] = checkpoint.backbone["language_model.embed_tokens.weight"]
    if checkpoint.weight is not None and checkpoint.bias is not None:
        head = "embedding_proj_layer" if checkpoint.family == "tomoro" else "custom_text_proj"
        tensors[f"{head}.weight"], tensors[f"{head}.bias"] = checkpoint.weight, checkpoint.bias
    return tensors


def _random(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(tensor.shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.4 * noise
    if name.endswith("bias"):
        return 0.3 * noise
    if "embed" in name:
        return noise
    return noise * 1.5 / tensor[0].numel() ** 0.5
