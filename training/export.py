"""Write the shipped folder from a training state: ``python -m training.export --work RUN --out FOLDER``."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from .model import EMBED_DIM, MATRYOSHKA_DIMS
from .tokenizer import save_tokenizer
from .train import Trainer

LIMIT_BYTES = 25_000_000
MIN_PIXELS, MAX_PIXELS = 65_536, 1_310_720
CHAT_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}{{ '\\n' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\\n' }}{%- endif -%}
"""


def image_processor_settings(processor: str) -> dict[str, object]:
    """Settings of the image (or video) processor."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "rescale_factor": 1 / 255,
        "resample": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "processor_class": "Qwen3VLProcessor",
        **({"image_processor_type": processor} if "Image" in processor else {"video_processor_type": processor}),
    }


def write_json(path: Path, values: dict[str, object]) -> None:
    """Write JSON as the other files of a checkpoint are written."""
    path.write_text(json.dumps(values, indent=2, sort_keys=False) + "\n", encoding="utf-8")


def export(trainer: Trainer, folder: Path) -> int:
    """Write weights, configuration, tokenizer and processor settings; return the size of the weights in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(trainer.model.shipped_state(), folder / "model.safetensors", metadata={"format": "pt"})
    config = trainer.model.config.to_diff_dict()
    config.update(
        architectures=["ColQwen3"],
        model_type="colqwen3",
        embed_dim=EMBED_DIM,
        matryoshka_dims=list(MATRYOSHKA_DIMS),
        dtype="float16",
    )
    write_json(folder / "config.json", config)
    save_tokenizer(trainer.tokenizer, folder)
    write_json(folder / "preprocessor_config.json", image_processor_settings("Qwen2VLImageProcessor"))
    write_json(folder / "video_preprocessor_config.json", image_processor_settings("Qwen3VLVideoProcessor"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return (folder / "model.safetensors").stat().st_size


def replace_folder(new: Path, target: Path) -> None:
    """Move the new files over those of the target, the weights last, each in one step."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(new.iterdir(), key=lambda p: p.name == "model.safetensors"):
        part = target / f".{path.name}.part"
        shutil.copyfile(path, part)
        part.rename(target / path.name)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--last", action="store_true", help="the last weights in place of the averaged ones")
    args = parser.parse_args()
    trainer = Trainer(args.work, compiled=False)
    trainer.load(args.work / "state.pt")
    if not args.last:
        trainer.use_average()
    with tempfile.TemporaryDirectory() as name:
        size = export(trainer, Path(name))
        if size > LIMIT_BYTES:
            raise SystemExit(f"the weights take {size} bytes, more than {LIMIT_BYTES}")
        replace_folder(Path(name), args.out)
    print(f"step {trainer.step}: {size} bytes of weights in {args.out}")


if __name__ == "__main__":
    main()
