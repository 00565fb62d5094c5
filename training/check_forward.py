"""Check that the quick training forward equals ``transformers.Qwen3VLModel``: ``python -m training.check_forward``."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .evaluate import Checkpoint
from .export import export
from .train import Trainer


def main() -> None:
    """Compare both on random weights, for a page and for a query."""
    with tempfile.TemporaryDirectory() as name:
        trainer = Trainer(Path(name) / "run", compiled=False)
        model = trainer.model.eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
                parameter.copy_(parameter.half().float())
            model.vlm.visual.pos_embed.weight.zero_()
            export(trainer, Path(name) / "out")
            checkpoint = Checkpoint(Path(name) / "out")
            pixels = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
            images = (torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
            ids, positions = model.document_inputs(trainer.prefix, trainer.suffix, 96, 160)
            ours = model.embed_documents(images, ids, model.text_rotary(positions))[0][0]
            theirs = checkpoint.page(Image.fromarray(pixels))
            print("page: largest difference", float((ours - theirs).abs().max()), "of", float(theirs.abs().max()))
            tokens = trainer.tokenizer.encode("held out 42").ids + [trainer.pad_id] * 10
            rotary = model.text_rotary(torch.arange(len(tokens)).expand(3, -1))
            ours = model.embed_queries(torch.tensor([tokens]), rotary)[0]
            theirs_query = checkpoint.query("held out 42")
            print("query: largest difference", float((ours - theirs_query).abs().max()))


if __name__ == "__main__":
    main()
