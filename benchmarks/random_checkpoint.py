"""Random checkpoints of true Qwen3-VL shapes, written where there is nothing to download.

    python benchmarks/random_checkpoint.py SHAPE FOLDER       # small, mid, 4b or 8b

Every tensor is there, under colpali-engine's names, so that it is opened and loaded as any other checkpoint is. The
numbers are drawn once and repeated: what they are says nothing about speed, but zeros would (a GPU draws less power).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import Qwen3VLConfig, Qwen3VLModel

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # for the tokenizer of the tests' checkpoints

from tests.checkpoints import make_tokenizer  # noqa: E402  # the path has to be there first

DIM = 320  # what colpali-engine gives every ColQwen3


def _shape(text: tuple[int, int, int, int, int], head_dim: int, vision: tuple[int, int, int, int]) -> dict[str, Any]:
    hidden, intermediate, layers, heads, key_heads = text
    depth, width, inner, vision_heads = vision
    step = depth // 4
    rope = [head_dim * 24 // 128, head_dim * 20 // 128, head_dim * 20 // 128]
    return {
        "text_config": {
            "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": head_dim,
            "max_position_embeddings": 262_144, "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True, "mrope_section": rope,
            },
        },
        "vision_config": {
            "depth": depth, "hidden_size": width, "intermediate_size": inner, "num_heads": vision_heads,
            "out_hidden_size": hidden, "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [step - 1, 2 * step - 1, 3 * step - 1],
        },
    }  # fmt: skip


# hidden, intermediate, layers, heads, key heads; head dim; vision depth, width, intermediate, heads
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "small": (1024, _shape((64, 128, 2, 4, 2), 32, (4, 64, 128, 2))),
    "mid": (1024, _shape((1024, 3072, 10, 16, 8), 128, (12, 768, 3072, 12))),
    "4b": (151_936, _shape((2560, 9728, 36, 32, 8), 128, (24, 1024, 4096, 16))),
    "8b": (151_936, _shape((4096, 12_288, 36, 32, 8), 128, (27, 1152, 4304, 16))),
}
"""Rows of the embedding and config, by name: Qwen3-VL-4B and -8B as published, and two scaled down."""

_BLOCK = 1 << 22  # random numbers drawn


def config_of(shape: str) -> Qwen3VLConfig:
    """Give a shape's config, without the tokenizer's ids."""
    vocabulary, parts = SHAPES[shape]
    return Qwen3VLConfig(
        text_config={**parts["text_config"], "vocab_size": vocabulary}, vision_config=parts["vision_config"]
    )


def write_checkpoint(folder: Path, shape: str, dtype: torch.dtype = torch.float32) -> int:
    """Write a checkpoint, and give how many parameters it has.

    Args:
        folder: where to; made when it is not there.
        shape: one of :data:`SHAPES`.
        dtype: float32 or bfloat16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = config_of(shape)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Qwen3VLModel(config).state_dict().items()}
    hidden = config.text_config.hidden_size
    shapes |= {"custom_text_proj.weight": (DIM, hidden), "custom_text_proj.bias": (DIM,)}
    _write_tensors(folder / "model.safetensors", shapes, dtype)
    plain = json.loads(config.to_json_string(use_diff=False))
    ids = {
        f"{name}_token_id": tokenizer.token_to_id(token)
        for name, token in {
            "image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
        }.items()
    }  # fmt: skip
    parts = {"text_config": plain["text_config"], "vision_config": plain["vision_config"]}
    head = {"architectures": ["ColQwen3"], "model_type": "qwen3_vl", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps({**head, **ids, **parts}, indent=1), encoding="utf-8")
    bounds = {"shortest_edge": 65_536, "longest_edge": 1_310_720}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({
            "size": bounds, "patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3, "image_processor_type": "Qwen2VLImageProcessor",
        }),
        encoding="utf-8",
    )  # fmt: skip
    return sum(math.prod(size) for size in shapes.values())


@contextlib.contextmanager
def checkpoints(names: Iterable[str]) -> Iterator[Iterator[tuple[str, str | Path]]]:
    """Give ``tiny``, which comes with the package, and random checkpoints, each written when its turn comes.

    Args:
        names: ``"tiny"`` or one of :data:`SHAPES`.

    Returns:
        Pairs of a name and what :class:`ColQwen3Encoder` takes as the model; their folders go in the end.
    """
    with tempfile.TemporaryDirectory() as folder:

        def made() -> Iterator[tuple[str, str | Path]]:
            for name in names:
                if name != "tiny":
                    write_checkpoint(Path(folder) / name, name)
                yield name, "tiny" if name == "tiny" else Path(folder) / name

        yield made()


def _write_tensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """Write a safetensors file: eight bytes of length, a JSON header, the tensors end to end."""
    noise = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(5))
    width = torch.empty((), dtype=dtype).element_size()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, size in shapes.items():
        length = math.prod(size) * width
        spelled = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
        header[name] = {"dtype": spelled, "shape": size, "data_offsets": [at, at + length]}
        at += length
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    blocks: dict[float, np.ndarray] = {}
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, size in shapes.items():
            gain = "norm" in name and name.endswith("weight")
            spread = 0.0 if gain else 0.1 if len(size) == 1 else 1.0 / math.sqrt(math.prod(size[1:]))
            if spread not in blocks:  # gains lie around one, all else around zero
                values = 1 + 0.1 * noise if gain else spread * noise
                blocks[spread] = values.to(dtype).view(torch.uint8).numpy()
            left = math.prod(size) * width
            while left > 0:
                part = blocks[spread][:left]
                file.write(part.data)
                left -= len(part)


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    count = write_checkpoint(options.folder, options.shape, getattr(torch, options.dtype))
    print(f"{options.folder}: {count / 1e6:,.0f} M parameters")


if __name__ == "__main__":
    main()
