"""A terminal that only remembers."""

from __future__ import annotations

import io
import re
import sys

import pytest


class Terminal(io.StringIO):
    """Takes what is written, and says that it is a terminal, so that progress bars are drawn."""

    def isatty(self) -> bool:
        return True

    @property
    def counted(self) -> list[tuple[int, int]]:
        """What the bars said last, each: done, of how many."""
        bars = [line.split("\r")[-1] for line in self.getvalue().split("\n") if "/" in line]
        return [(int(found[1]), int(found[2])) for bar in bars if (found := re.search(r"(\d+)/(\d+)", bar))]


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make standard error a terminal until the test ends."""
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    return made
