"""Batches for the trainer, out of the shards that the pool draws."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .losses import QueryBatch
from .stages import Stage


def coloured(ink: Tensor, generator: torch.Generator) -> Tensor:
    """Print the ink of each page in one colour on another: ``(B, 3, H, W)`` in [-1, 1]."""
    b = ink.shape[0]
    light = 1 - 0.25 * torch.rand(b, 3, generator=generator) ** 2 * (torch.rand(b, 1, generator=generator) < 0.4)
    dark = 0.5 * torch.rand(b, 3, generator=generator) * (torch.rand(b, 1, generator=generator) < 0.5)
    inverted = torch.rand(b, 1, generator=generator) < 0.2
    paper, pen = torch.where(inverted, dark, light), torch.where(inverted, light, dark)
    cover = (ink.float() / 255)[:, None]
    x = paper[:, :, None, None] + cover * (pen - paper)[:, :, None, None]
    return (x + 0.03 * (torch.rand(b, 1, *ink.shape[1:], generator=generator) - 0.5)).mul_(2).sub_(1)


def collate(shard: dict[str, np.ndarray], rows: slice, pads: int, pad_id: int, length: int) -> QueryBatch:
    """Queries of some pages of a shard, with ``pads`` augmentation pads after the text, filled up to ``length``."""
    ids = torch.from_numpy(shard["ids"][rows].astype(np.int64))
    places = torch.from_numpy(shard["places"][rows].astype(np.int64))
    slots = torch.from_numpy(shard["slots"][rows].astype(np.int64))
    asked = torch.from_numpy(shard["asked"][rows])
    printed = torch.from_numpy(shard["printed"][rows])
    n_pages, per_page, width = ids.shape
    ids, places, slots, asked = (x.flatten(0, 1) for x in (ids, places, slots, asked))
    text_length = (ids != 0).sum(1)  # shards hold token ids plus one; zero ends a query
    position = torch.arange(length)
    valid = position < (text_length + pads)[:, None]
    is_text = position < text_length[:, None]
    if length > width:
        ids = torch.nn.functional.pad(ids, (0, length - width))
        places = torch.nn.functional.pad(places, (0, 0, 0, length - width), value=-1)
        slots = torch.nn.functional.pad(slots, (0, length - width), value=-1)
    ids = torch.where(is_text, ids[:, :length] - 1, pad_id)
    places = places[:, :length]
    owner = torch.arange(n_pages).repeat_interleave(per_page)
    return QueryBatch(
        ids=ids,
        valid=valid,
        piece=is_text & (places[..., 0] >= 0),
        pad=valid & ~is_text,
        places=places,
        slots=slots[:, :length],
        owner=owner,
        asked=asked,
        printed=printed,
    )


def shards(stage: Stage, folder: Path, first: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield the shards of a stage in order, waiting for the pool, and delete each after use."""
    number = first
    while True:
        path = folder / f"{stage.name}-{number:05d}.npz"
        while not path.exists():
            time.sleep(0.2)
        with np.load(path) as file:
            shard = {name: file[name] for name in file.files}
        yield number, shard
        path.unlink(missing_ok=True)
        number += 1
