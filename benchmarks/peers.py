"""Other ways to encode with the very same weights, for the benchmarks to compare with.

The packages stand in an environment of their own (``sh benchmarks/peers.sh``), this package among them, with the same
torch. Where one is not installed it is left out.

Each gets the checkpoint's own tensors, prompt and pixel bounds, its own processor and its own defaults; only the batch
size is tried out, and the best is what counts.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder
from colqwen3_retrievers.models.checkpoint import Checkpoint, open_checkpoint

PROMPT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|><|endoftext|>"
PADS = "<|endoftext|>" * 10
TEMPLATE = (
    "{# task #}{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    + PROMPT.replace("\n", "{{ '\\n' }}")
    + "{% else %}{{ part['text'] }}"
    + PADS
    + "{% endif %}{% endfor %}{% endfor %}"
)

Encode = Callable[[Sequence[Any], int], list[np.ndarray]]


@dataclass(frozen=True)
class Peer:
    """One way to encode.

    Attributes:
        name: with its version.
        pages: images and a batch size to unit token embeddings, float32 (n_tokens, dim) each.
        queries: the same of texts.
    """

    name: str
    pages: Encode
    queries: Encode


PEERS = {
    "ours": (),
    "transformers": ("torchvision",),  # its own processor wants it
    "colpali-engine": ("torchvision", "colpali_engine"),
    "sentence-transformers": ("torchvision", "sentence_transformers"),
}
"""Who there is, and what has to be installed for it beside this package."""


def installed(module: str) -> bool:
    """Whether a peer is here."""
    return importlib.util.find_spec(module) is not None


def present() -> list[str]:
    """Who of :data:`PEERS` is here, ourselves first."""
    return [who for who, modules in PEERS.items() if all(map(installed, modules))]


def open_peer(who: str, model: str | Path, dtype: str) -> Peer:
    """Open one of :data:`PEERS` on the CPU, with a checkpoint's own weights."""
    if who == "ours":
        return _ours(model, dtype)
    checkpoint = open_checkpoint(model)
    tensors = _tensors(checkpoint)
    opened = {
        "transformers": _transformers,
        "colpali-engine": _colpali_engine,
        "sentence-transformers": _sentence_transformers,
    }
    with tempfile.TemporaryDirectory() as name:
        _write_plain(Path(name), checkpoint, tensors)
        return opened[who](Path(name), tensors, getattr(torch, dtype))


def _ours(model: str | Path, dtype: str) -> Peer:
    """This package; it makes its batches itself."""
    encoder = ColQwen3Encoder(model, engine="torch", device="cpu", dtype=dtype)
    return Peer(
        "**ours**",
        lambda images, _: [np.asarray(page) for page in encoder.encode_images(list(images))],
        lambda texts, _: [np.asarray(query) for query in encoder.encode_queries(list(texts))],
    )


def _tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    by_file = {record.file for record in checkpoint.tensors.values()}
    loaded = {name: value for file in by_file for name, value in load_file(file).items()}
    return {name: loaded[record.name].float() for name, record in checkpoint.tensors.items()}


def _config(checkpoint: Checkpoint) -> Any:
    from transformers import Qwen3VLConfig

    kept = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    parts = {name: dict(checkpoint.config[name]) for name in ("text_config", "vision_config")}
    for part in parts.values():
        part.pop("model_type", None)
    return Qwen3VLConfig(**parts, **{name: checkpoint.config[name] for name in kept})


def _write_plain(folder: Path, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    """Write the backbone and its processor as transformers itself would."""
    from safetensors.torch import save_file
    from transformers import PreTrainedTokenizerFast

    config = _config(checkpoint)
    config.architectures = ["Qwen3VLModel"]
    config.save_pretrained(folder)
    backbone = {name: value for name, value in tensors.items() if not name.startswith("projection.")}
    save_file(backbone, folder / "model.safetensors", metadata={"format": "pt"})
    PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint.folder / "tokenizer.json"), pad_token="<|endoftext|>", padding_side="left",
        image_token="<|image_pad|>", video_token="<|video_pad|>", vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
                              "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"},
    ).save_pretrained(folder)  # fmt: skip
    shared = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.5] * 3,
              "image_std": [0.5] * 3}  # fmt: skip
    size = {"shortest_edge": checkpoint.min_pixels, "longest_edge": checkpoint.max_pixels}
    image = {**shared, "size": size, "image_processor_type": "Qwen2VLImageProcessor"}
    video = {**shared, "video_processor_type": "Qwen3VLVideoProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image), encoding="utf-8")
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def _processor(folder: Path) -> Any:
    from transformers import Qwen3VLProcessor

    return Qwen3VLProcessor.from_pretrained(folder)


def _in_batches(one: Callable[[Sequence[Any]], list[np.ndarray]]) -> Encode:
    def encode(items: Sequence[Any], batch: int) -> list[np.ndarray]:
        with torch.inference_mode():
            return [rows for first in range(0, len(items), batch) for rows in one(items[first : first + batch])]

    return encode


def _transformers(folder: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Peer:
    """Plain transformers: its processor, its model, a linear layer, a division."""
    import transformers

    model = transformers.Qwen3VLModel.from_pretrained(folder, dtype=dtype).eval()
    processor = _processor(folder)
    weight, bias = tensors["projection.weight"].to(dtype), tensors["projection.bias"].to(dtype)

    def run(**given: Any) -> list[np.ndarray]:
        inputs = processor(padding="longest", return_tensors="pt", **given)
        hidden = model(**inputs, use_cache=False).last_hidden_state
        rows = torch.nn.functional.linear(hidden, weight, bias).float()
        rows = rows / rows.norm(dim=-1, keepdim=True)
        return [own[mask].numpy() for own, mask in zip(rows, inputs["attention_mask"].bool(), strict=True)]

    return Peer(
        f"transformers {transformers.__version__}",
        _in_batches(lambda images: run(text=[PROMPT] * len(images), images=list(images))),
        _in_batches(lambda texts: run(text=[text + PADS for text in texts])),
    )


def _colpali_engine(folder: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Peer:
    """colpali-engine's ColQwen3 and its processor, as its documentation shows them."""
    from colpali_engine.models import ColQwen3, ColQwen3Processor
    from transformers import AutoConfig

    model = ColQwen3(AutoConfig.from_pretrained(folder))
    dim, hidden = tensors["projection.weight"].shape
    model.custom_text_proj = torch.nn.Linear(hidden, dim)  # it makes 320 of every checkpoint
    named = {name.replace("projection.", "custom_text_proj."): value for name, value in tensors.items()}
    model.load_state_dict(named, strict=True)
    model = model.to(dtype).eval()
    processor = ColQwen3Processor.from_pretrained(folder)

    def run(inputs: Any) -> list[np.ndarray]:
        found = model(**inputs).float()
        return [own[mask].numpy() for own, mask in zip(found, inputs["attention_mask"].bool(), strict=True)]

    return Peer(
        f"colpali-engine {version('colpali-engine')}",
        _in_batches(lambda images: run(processor.process_images(list(images)))),
        _in_batches(lambda texts: run(processor.process_queries(list(texts)))),
    )


def _sentence_transformers(folder: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Peer:
    """sentence-transformers' MultiVectorEncoder, put together of its own modules."""
    import sentence_transformers
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    trunk = Transformer(str(folder), model_kwargs={"dtype": dtype})
    dim, hidden = tensors["projection.weight"].shape
    head = Dense(
        hidden, dim, activation_function=None, init_weight=tensors["projection.weight"],
        init_bias=tensors["projection.bias"], module_input_name="token_embeddings",
    ).to(dtype)  # fmt: skip
    norm = Normalize(module_input_name="token_embeddings")
    model = MultiVectorEncoder(modules=[trunk, head, norm, MultiVectorMask()], device="cpu")

    def pages(images: Sequence[Image.Image], batch: int) -> list[np.ndarray]:
        return [np.asarray(rows.float()) for rows in model.encode_document(list(images), batch_size=batch)]

    def queries(texts: Sequence[str], batch: int) -> list[np.ndarray]:
        return [np.asarray(rows.float()) for rows in model.encode_query(list(texts), batch_size=batch)]

    return Peer(f"sentence-transformers {sentence_transformers.__version__}", pages, queries)
