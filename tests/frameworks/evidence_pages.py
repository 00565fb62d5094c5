"""What the tests of regions stand on in both frameworks: pages by blocks of colour, and a checkpoint with pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from colqwen3_retrievers import Page, PageIndex
from tests.checkpoints import make_checkpoint
from tests.hashing import BLOCK, HashingEncoder, picture


@contextmanager
def three_pages_and_a_text(folder: Path) -> Iterator[PageIndex]:
    """An index of three pictures and a text, by an encoder that knows blocks of pixels by their hash."""
    encoder = HashingEncoder()
    with PageIndex.open(folder / "index", encoder) as made:
        made.add(Page(source="a.pdf", number=n, image=picture(n)) for n in (1, 2, 3))
        made.add(Page(source="notes.txt", text="revenue rose"))
        yield made
    encoder.threads.shutdown()


def checkpoint_and_pictures(folder: Path) -> Path:
    """Make ``checkpoint``, and ``0.png`` to ``2.png`` beside it."""
    make_checkpoint(folder / "checkpoint", "tomoro")
    for seed in range(3):
        picture(seed, 128, 96).save(folder / f"{seed}.png")
    return folder


def last_token(n: int) -> Image.Image:
    """The last visual token of page n: columns 16 to 24 of 24, rows 8 to 16 of 16."""
    return picture(n).crop((2 * BLOCK, BLOCK, 3 * BLOCK, 2 * BLOCK))
