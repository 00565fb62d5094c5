"""Measure a checkpoint folder on the held-out set: ``python -m training.evaluate CHECKPOINT --json figures.json``.

The model runs as plain ``transformers.Qwen3VLModel`` in float32, one page at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as fn
from transformers import Qwen3VLConfig, Qwen3VLModel

from .heldout import SEED, VARIANTS, draw_page, draw_queries, draw_words
from .model import AUGMENTATION_PADS
from .train import IMAGE_PREFIX, IMAGE_SUFFIX

OWN_KEYS = ("architectures", "model_type", "embed_dim", "matryoshka_dims")


class Checkpoint:
    """A shipped folder, ready to embed pages and queries."""

    def __init__(self, folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.dims = values["matryoshka_dims"]
        config = Qwen3VLConfig(**{k: v for k, v in values.items() if k not in OWN_KEYS})
        self.model = Qwen3VLModel(config).eval()
        state = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.weight = state.pop("embedding_proj_layer.weight")
        self.bias = state.pop("embedding_proj_layer.bias")
        self.model.load_state_dict({k.removeprefix("vlm.model."): v for k, v in state.items()}, strict=True)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.image_id = config.image_token_id

    @torch.no_grad()
    def page(self, image: Image.Image, bf16: bool = False) -> Tensor:
        """Unnormalised embeddings of all tokens of a page whose sides are multiples of 32."""
        pixels = (torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32)) / 255 - 0.5) / 0.5
        height, width, _ = pixels.shape
        x = pixels.permute(2, 0, 1).reshape(3, height // 32, 2, 16, width // 32, 2, 16)
        x = x.permute(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, 2, -1, -1)
        count = (height // 32) * (width // 32)
        prefix, suffix = self.tokenizer.encode(IMAGE_PREFIX).ids, self.tokenizer.encode(IMAGE_SUFFIX).ids
        ids = torch.tensor([[*prefix, *[self.image_id] * count, *suffix]])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = self.model(
                input_ids=ids,
                pixel_values=x.reshape(count * 4, -1),
                image_grid_thw=torch.tensor([[1, height // 16, width // 16]]),
                mm_token_type_ids=(ids == self.image_id).int(),
                use_cache=False,
            ).last_hidden_state
        return fn.linear(hidden.float(), self.weight, self.bias)[0]

    @torch.no_grad()
    def query(self, text: str) -> Tensor:
        """Unnormalised embeddings of a query with its augmentation pads."""
        self.model.rope_deltas = None
        ids = self.tokenizer.encode(text.strip() + "<|endoftext|>" * AUGMENTATION_PADS).ids
        hidden = self.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
        return fn.linear(hidden.float(), self.weight, self.bias)[0]


def ranks(queries: list[Tensor], pages: list[Tensor], dim: int) -> np.ndarray:
    """Order of the pages for each query by MaxSim at a nested dimension."""
    q = [fn.normalize(x[:, :dim], dim=-1) for x in queries]
    lengths = [len(x) for x in q]
    joined = torch.cat(q)
    columns = []
    for page in pages:
        best = (joined @ fn.normalize(page[:, :dim], dim=-1).T).amax(1)
        columns.append(torch.stack([part.sum() for part in best.split(lengths)]))
    return torch.argsort(torch.stack(columns, 1), dim=1, descending=True, stable=True).numpy()


def measures(order: np.ndarray, relevant: list[set[int]]) -> dict[str, float]:
    """recall@1, recall@5 (any relevant page), nDCG@5."""
    first = five = gain = 0.0
    for row, wanted in zip(order, relevant, strict=True):
        found = [int(page) in wanted for page in row[:5]]
        first += found[0]
        five += any(found)
        ideal = sum(1 / math.log2(i + 2) for i in range(min(5, len(wanted))))
        gain += sum(hit / math.log2(i + 2) for i, hit in enumerate(found)) / ideal
    n = len(relevant)
    return {"recall@1": round(first / n, 4), "recall@5": round(five / n, 4), "ndcg@5": round(gain / n, 4)}


def evaluate(folder: Path, pages: int, queries: int, variants: list[str], bf16: bool = False) -> dict[str, object]:
    """All figures of a checkpoint."""
    checkpoint = Checkpoint(folder)
    figures: dict[str, object] = {"pages": pages, "queries": queries, "seed": SEED}
    for variant in variants:
        began = time.perf_counter()
        words, embedded, layouts, tokens = [], [], [], 0
        for number in range(pages):
            page = draw_page(number, variant)
            words.append(page.words)
            layouts.append(page.layout)
            embedded.append(checkpoint.page(page.image, bf16))
            tokens += len(embedded[-1])
        result: dict[str, object] = {"visual and prompt tokens": tokens}
        sets = {"one to four words": draw_queries(words, queries, 4, SEED + 1)}
        sets["single words"] = draw_words(words, queries, SEED + 2)
        for name, asked in sets.items():
            vectors = [checkpoint.query(text) for text, _ in asked]
            relevant = [wanted for _, wanted in asked]
            for dim in checkpoint.dims:
                order = ranks(vectors, embedded, dim)
                result[f"{name}, {dim} dims"] = measures(order, relevant)
                if dim == checkpoint.dims[0]:
                    by_layout: dict[str, list[bool]] = {}
                    for row, wanted in zip(order, relevant, strict=True):
                        by_layout.setdefault(layouts[min(wanted)], []).append(int(row[0]) in wanted)
                    result[f"{name}, recall@1 by layout"] = {
                        k: round(sum(v) / len(v), 3) for k, v in sorted(by_layout.items())
                    }
                    if name == "one to four words":
                        for n in range(1, 5):
                            some = [i for i, (text, _) in enumerate(asked) if len(text.split()) == n]
                            result[f"queries of {n} words"] = measures(order[some], [relevant[i] for i in some])
        result["seconds"] = round(time.perf_counter() - began)
        figures[variant] = result
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--pages", type=int, default=500)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--bf16", action="store_true", help="quicker, a little less exact")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures = evaluate(args.checkpoint, args.pages, args.queries, args.variants, args.bf16)
    text = json.dumps(figures, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
