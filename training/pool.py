"""Draws training pages ahead of the trainer: ``python -m training.pool --stage read --out DIR`` writes shard files."""

from __future__ import annotations

import argparse
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .pages import Page, style_of, training_page
from .stages import STAGES, Stage
from .tokenizer import train_tokenizer
from .words import FUNCTION_WORDS, WordSource

DOC_WORDS = 512
GLUE = (*[" "] * 8, ", ", "-", "/", " (", ' "', "! ", "? ", ": ")  # between the words of a query
TOKEN = 32  # px that one visual token shows


@dataclass
class Query:
    """Token ids of a query and, for each, the rectangle of visual tokens that show it and its word (-1: none)."""

    ids: np.ndarray
    places: np.ndarray
    slots: np.ndarray
    words: np.ndarray


def word_hash(text: str) -> int:
    """A number in [1, 2**31) that stands for a word."""
    value = 5381
    for char in text:
        value = (value * 33 + ord(char)) % 2147483629
    return value + 1


def make_query(page: Page, rng: random.Random, tokenizer: Tokenizer, stage: Stage) -> Query | None:
    """Ask for some words of the page and align the pieces to the visual tokens that show them; None if too long."""
    length = stage.query_length
    count = rng.randint(1, min(stage.most_words, len(page.words)))
    rare = [i for i, w in enumerate(page.words) if w.text not in FUNCTION_WORDS] or list(range(len(page.words)))
    if rng.random() < 0.5:
        start = min(rng.choice(rare), len(page.words) - count)
        chosen = list(range(start, start + count))
    else:
        chosen = rng.sample(rare, min(count, len(rare)))
    text, spans = "", []
    for index in chosen:
        word = page.words[index].text
        if text or rng.random() < 0.1:
            text += rng.choice(GLUE)
        spans.append((len(text), len(text) + len(word), index))
        text += word
    encoding = tokenizer.encode(text)
    if len(encoding.ids) > length:
        return None
    ids = np.zeros(length, dtype=np.int16)
    places = np.full((length, 4), -1, dtype=np.int8)
    slots = np.full(length, -1, dtype=np.int8)
    rows, cols = page.ink.height // TOKEN, page.ink.width // TOKEN
    for position, (token, (begin, end)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
        ids[position] = token + 1  # 0 ends the query
        for slot, (first, last, index) in enumerate(spans):
            a, b = max(begin, first), min(end, last)
            if a >= b or not any(c.isalnum() for c in text[a:b]):
                continue
            word = page.words[index]
            x0, x1 = word.edges[a - first], word.edges[b - first]
            inset = 0.15 * (x1 - x0)
            top, bottom = (word.baseline - 0.5 * word.size) // TOKEN, (word.baseline - 1) // TOKEN
            left, right = (x0 + inset) // TOKEN, (x1 - inset) // TOKEN
            if min(top, left) >= 0 and bottom < rows and right < cols:
                places[position] = (top, bottom, left, right)
                slots[position] = slot
    words = np.zeros(4, dtype=np.int32)
    for i, index in enumerate(chosen[:4]):
        words[i] = word_hash(page.words[index].text)
    return Query(ids, places, slots, words)


def make_shard(stage: Stage, number: int, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Draw the pages and queries of one shard; the shard depends on the stage and its number only."""
    rng = random.Random(f"{stage.name}-{stage.seed}-{number}")
    source = WordSource("train", rng)
    style = style_of(stage.fonts, stage.smallest, stage.largest)
    size = stage.size(number)
    ink, cells, ids, places, slots, asked, printed = [], [], [], [], [], [], []
    while len(ink) < stage.shard_steps * size.batch:
        if len(ink) % size.batch == 0:
            source.new_anchors(12)
        page = training_page(rng, source, style, size.width, size.height, stage.distort)
        if len(page.words) < 2:
            continue
        queries: list[Query] = []
        while len(queries) < size.queries:
            query = make_query(page, rng, tokenizer, stage)
            if query is not None:
                queries.append(query)
        ink.append(np.asarray(page.ink, dtype=np.uint8))
        cells.append(page.cells())
        ids.append([q.ids for q in queries])
        places.append([q.places for q in queries])
        slots.append([q.slots for q in queries])
        asked.append([q.words for q in queries])
        hashes = np.zeros(DOC_WORDS, dtype=np.int32)
        for i, word in enumerate(page.words[:DOC_WORDS]):
            hashes[i] = word_hash(word.text)
        printed.append(hashes)
    return {
        "ink": np.stack(ink),
        "cells": np.stack(cells),
        "ids": np.array(ids),
        "places": np.array(places),
        "slots": np.array(slots),
        "asked": np.array(asked),
        "printed": np.stack(printed),
    }


def main() -> None:
    """Keep a few shards ahead of the trainer, which deletes those that it has used."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", required=True, choices=sorted(STAGES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0, help="number of the first shard")
    parser.add_argument("--ahead", type=int, default=8)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stage, tokenizer, number = STAGES[args.stage], train_tokenizer(), args.first
    parent = os.getppid()
    while os.getppid() == parent:
        if len(list(args.out.glob(f"{stage.name}-*.npz"))) >= args.ahead:
            time.sleep(0.5)
            continue
        shard = make_shard(stage, number, tokenizer)
        target = args.out / f"{stage.name}-{number:05d}.npz"
        temporary = target.with_suffix(".part")
        with temporary.open("wb") as file:
            np.savez(file, **shard)
        temporary.rename(target)
        number += 1


if __name__ == "__main__":
    main()
