"""Bytes on the wire of one page to and from a vLLM server, and the time that packing it takes.

    python benchmarks/wire.py                       # packing only, no server
    python benchmarks/wire.py --url http://127.0.0.1:8000 --model tiny

Prints a Markdown table. With a server, the answers are its own: the same page in each of vLLM's encodings.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from colqwen3_retrievers import Page, ServerOptions
from colqwen3_retrievers.engines.server.client import ServerClient
from colqwen3_retrievers.engines.server.probe import Findings, message_text, request_template
from colqwen3_retrievers.engines.server.wire import message_body, picture_part, png
from colqwen3_retrievers.models.checkpoint import open_checkpoint
from colqwen3_retrievers.models.rendering import EncoderInput, Renderer
from colqwen3_retrievers.models.tokenizer import PromptTokenizer

FORMATS = {
    "bytes, float16 (ours)": {"encoding_format": "bytes", "embed_dtype": "float16", "endianness": "little"},
    "bytes, float32": {"encoding_format": "bytes", "embed_dtype": "float32", "endianness": "little"},
    "base64, float16": {"encoding_format": "base64", "embed_dtype": "float16", "endianness": "little"},
    "JSON floats (vLLM's default)": {"encoding_format": "float"},
}


def page(noise: float) -> Image.Image:
    """An A4 page of text at the pixel bound; with noise, as a scanner gives it."""
    image = Image.new("RGB", (960, 1344), "white")
    draw, font, rng = ImageDraw.Draw(image), ImageFont.load_default(16), np.random.default_rng(0)
    for y in range(30, 1310, 22):
        letters = "".join(chr(97 + c) if c < 26 else " " for c in rng.integers(0, 31, 95))
        draw.text((40, y), letters, fill="black", font=font)
    if not noise:
        return image
    return Image.fromarray(np.clip(np.asarray(image) + rng.normal(0, noise, (1344, 960, 3)), 0, 255).astype(np.uint8))


def rendered(model: str, image: Image.Image) -> EncoderInput:
    """The page as an engine gets it."""
    checkpoint = open_checkpoint(model)
    renderer = Renderer(
        checkpoint.family,
        PromptTokenizer(checkpoint.folder, model=model),
        min_pixels=checkpoint.min_pixels,
        max_pixels=checkpoint.max_pixels,
        context_length=checkpoint.context_length,
    )
    return renderer.document(Page(id="page", image=image))


def packing(model: str) -> None:
    """Print what a picture weighs, and how long packing it takes."""
    print("| page | as it lies in memory | PNG | in the request (base64) | packing |\n|---|---|---|---|---|")
    for name, noise in (("text, clean", 0.0), ("text, scanned (noise of 2 levels)", 2.0)):
        item = rendered(model, page(noise))
        assert item.pixels is not None
        times = []
        for _ in range(5):
            start = time.perf_counter()
            part = picture_part(item)
            times.append(time.perf_counter() - start)
        print(
            f"| {name}, {len(item)} tokens | {item.pixels.nbytes / 1e6:.2f} MB "
            f"| {len(png(item.pixels[0])) / 1e6:.2f} MB | {len(part) / 1e6:.2f} MB | {1000 * min(times):.0f} ms |"
        )


def answers(model: str, url: str) -> None:
    """Print what a server's answer weighs in each encoding."""
    item = rendered(model, page(0.0))
    checkpoint = open_checkpoint(model)
    client = ServerClient(
        checkpoint, urls=[url], api_key=None, options=ServerOptions(), max_pixels=checkpoint.max_pixels
    )
    part = picture_part(item)
    print(f"\n| answer for {len(item)} tokens of dim {checkpoint.dim} | bytes | against ours |\n|---|---|---|")
    ours = 0
    for name, settings in FORMATS.items():

        async def ask(url: str, known: Findings, settings: dict[str, str] = settings) -> int:
            asked = {"model": known.model, "task": "token_embed", **settings, **request_template(known.dialect)}
            body = message_body(part, message_text(item, known.dialect, checkpoint.family.image), asked)
            answer = await client.pool(url, body, 16 * len(item))  # JSON is long
            return len(answer.body) + len(answer.metadata or "")

        size = client.ask(ask)
        ours = ours or size
        print(f"| {name} | {size:,} | {size / ours:.2f} x |")
    client.close()


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--url")
    arguments = parser.parse_args()
    packing(arguments.model)
    if arguments.url:
        answers(arguments.model, arguments.url)


if __name__ == "__main__":
    main()
