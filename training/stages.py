"""The curriculum: each stage has its page sizes, type sizes, fonts and loss weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A page size in px, and how many pages and queries a page make a batch of it."""

    width: int
    height: int
    batch: int
    queries: int


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum; its shards take the sizes in turn."""

    name: str
    sizes: tuple[Size, ...]
    steps: int
    fonts: str
    smallest: float
    largest: float
    most_words: int
    lr: float
    last_lr: float
    pads: int = 10
    query_length: int = 24
    nested_every: int = 2
    distort: float = 0.1
    char_weight: float = 1.0
    merged_weight: float = 0.5
    align_weight: float = 1.0
    letter_weight: float = 0.3
    maxsim_weight: float = 1.0
    bank: int = 0
    seed: int = 7
    shard_steps: int = 16

    def size(self, shard: int) -> Size:
        """The page size of a shard."""
        return self.sizes[shard % len(self.sizes)]


SMALL = Size(256, 128, 64, 2)
LARGE = (Size(448, 320, 14, 7), Size(640, 448, 7, 14), Size(448, 640, 7, 14))
SHEETS = (
    Size(640, 448, 7, 14),
    Size(672, 960, 3, 30),
    Size(448, 320, 14, 7),
    Size(960, 544, 3, 30),
    Size(448, 640, 7, 14),
    Size(800, 1120, 2, 40),
)

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("read", (SMALL,), 600, "first", 16, 40, 3, 2.0, 2.0, pads=2, nested_every=0, distort=0.0),
        Stage("fonts", (SMALL,), 233, "train", 13, 44, 3, 2.0, 2.0, pads=4, nested_every=3),
        Stage("small", (Size(256, 128, 64, 3),), 600, "train", 12, 32, 3, 2.0, 1.6, pads=4, nested_every=3),
        Stage("pages", (Size(320, 192, 32, 3),), 1258, "train", 13, 40, 4, 1.7, 0.05, letter_weight=0.1),
        Stage("large", LARGE, 432, "train", 13, 40, 4, 1.2, 1.2, letter_weight=0.1, bank=12),
        Stage("sheets", SHEETS, 2000, "train", 12, 40, 4, 0.5, 0.03, letter_weight=0.1, bank=12),
    )
}

ORDER = tuple(STAGES)
