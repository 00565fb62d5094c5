"""The curriculum: each stage has its page size, type sizes, fonts and loss weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum."""

    name: str
    width: int
    height: int
    batch: int
    steps: int
    fonts: str
    smallest: float
    largest: float
    queries: int
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
    seed: int = 7
    shard_size: int = 512


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("read", 256, 128, 64, 600, "first", 16, 40, 2, 3, 2.0, 2.0, pads=2, nested_every=0, distort=0.0),
        Stage("fonts", 256, 128, 64, 233, "train", 13, 44, 2, 3, 2.0, 2.0, pads=4, nested_every=3),
        Stage("small", 256, 128, 64, 600, "train", 12, 32, 3, 3, 2.0, 1.6, pads=4, nested_every=3),
        Stage("pages", 320, 192, 32, 1258, "train", 13, 40, 3, 4, 1.7, 0.05, nested_every=2, letter_weight=0.1),
    )
}

ORDER = tuple(STAGES)
