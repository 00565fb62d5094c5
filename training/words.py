"""The words, numbers, dates and amounts that are printed; one word in ten is held out by the hash of its letters."""

from __future__ import annotations

import calendar
import hashlib
import random
from functools import cache
from pathlib import Path

WORD_LIST = Path("/usr/share/dict/words")  # Debian package wamerican (public domain / SCOWL)

_FUNCTION_TEXT = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one
you were all her she there would their we him been has when who will no more if out so up said what its about than
into them can only other time new some could these two may first then do any like my now over such our man me even
most made after also did many off before must well back through years where much your way down should because
"""
FUNCTION_WORDS = tuple(_FUNCTION_TEXT.split())

MONTHS = tuple(name for name in calendar.month_name if name)

CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"


def is_held_out(text: str) -> bool:
    """True for the tenth of all strings that training never prints or asks for."""
    return hashlib.sha256(text.lower().encode()).digest()[0] < 26


@cache
def lexicon(split: str) -> tuple[str, ...]:
    """Words of 3 to 16 ASCII letters of the ``train`` or ``test`` part, lower case, sorted."""
    words = {w.lower() for w in WORD_LIST.read_text(encoding="utf-8").split() if w.isascii() and w.isalpha()}
    common = set(FUNCTION_WORDS) | {m.lower() for m in MONTHS}
    usable = {w for w in words if 3 <= len(w) <= 16 and w not in common}
    return tuple(sorted(w for w in usable if is_held_out(w) == (split == "test")))


@cache
def _by_ending(split: str) -> tuple[str, ...]:
    return tuple(sorted(lexicon(split), key=lambda w: w[::-1]))


def pseudo_word(rng: random.Random) -> str:
    """A string of letters that looks like no language in particular."""
    n = rng.randint(3, 10)
    if rng.random() < 0.5:
        return "".join(rng.choice(CONSONANTS if (i + n) % 2 else VOWELS) for i in range(n))
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(n))


def number(rng: random.Random) -> str:
    """A number, an amount, a share, a date, a year or a code."""
    kind = rng.randrange(10)
    if kind == 0:
        return str(rng.randint(1900, 2039))
    if kind == 1:
        return f"{rng.randint(1, 28):02d}/{rng.randint(1, 12):02d}/{rng.randint(1980, 2030)}"
    if kind == 2:
        return f"{rng.randint(1980, 2030)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    if kind == 3:
        return f"{rng.randint(0, 99)}.{rng.randint(0, 9)}%"
    if kind == 4:
        return f"${rng.randint(1, 999)},{rng.randint(0, 999):03d}"
    if kind == 5:
        return f"{rng.randint(1, 9999)}.{rng.randint(0, 99):02d}"
    if kind == 6:
        letters = "".join(rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
        return f"{letters}-{rng.randint(10, 9999)}"
    if kind == 7:
        return f"{rng.randint(1, 99)},{rng.randint(0, 999):03d},{rng.randint(0, 999):03d}"
    return str(rng.randint(0, 10 ** rng.randint(2, 7)))


class WordSource:
    """Draws words of one split; neighbours in the sorted list make hard negatives for one another."""

    def __init__(self, split: str, rng: random.Random) -> None:
        self.split, self.rng = split, rng
        self.lists = (lexicon(split), _by_ending(split))
        self.anchors: list[tuple[tuple[str, ...], int]] = []

    def new_anchors(self, count: int) -> None:
        """Choose the places in the word list around which look-alikes are drawn."""
        self.anchors = []
        for _ in range(count):
            words = self.rng.choice(self.lists)
            self.anchors.append((words, self.rng.randrange(len(words))))

    def dictionary_word(self) -> str:
        """A word of the word list."""
        if self.anchors and self.rng.random() < 0.4:
            words, place = self.rng.choice(self.anchors)
            return words[(place + self.rng.randint(-8, 8)) % len(words)]
        return self.rng.choice(self.lists[0])

    def special(self) -> str:
        """A number or code of this split."""
        while True:
            text = number(self.rng)
            if is_held_out(text) == (self.split == "test"):
                return text

    def training_word(self) -> str:
        """A word as training pages print it: mostly of the list, with numbers, compounds and made-up words."""
        kind = self.rng.random()
        if kind < 0.15:
            text = self.special()
            other = text.replace("$", self.rng.choice("$££€"))
            return text if is_held_out(other) else other
        if kind > 0.97:
            return f"{self.dictionary_word()}-{self.dictionary_word()}"
        if kind < 0.27:
            return self.rng.choice(FUNCTION_WORDS)
        if kind < 0.42:
            while is_held_out(word := pseudo_word(self.rng)):
                pass
            return word
        return self.dictionary_word()


def cased(word: str, rng: random.Random, style: str | None = None) -> str:
    """Print a word in lower case, with a capital or in capitals."""
    style = style or rng.choices(("lower", "title", "upper"), (0.6, 0.25, 0.15))[0]
    return {"lower": word, "title": word[:1].upper() + word[1:], "upper": word.upper()}[style]
