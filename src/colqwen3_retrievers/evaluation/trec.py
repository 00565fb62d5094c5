"""Runs and judgements as TREC files, which every evaluation tool reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from colqwen3_retrievers.errors import ConfigError

Run = Mapping[str, Mapping[str, float]]
"""Query id -> page id -> score, best first."""

Qrels = Mapping[str, Mapping[str, int]]
"""Query id -> page id -> relevance; above 0 is relevant."""


def check_id(value: object, name: str) -> str:
    """Check an id of a query or a page.

    Raises:
        ConfigError: not a text, or empty.

    >>> check_id("q1", "query")
    'q1'
    """
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{name}: expected an id that is a non-empty text, got {value!r}")
    return value


def write_run(path: str | Path, run: Run, *, tag: str = "colqwen3") -> None:
    """Write a run as ``query Q0 page rank score tag``, ranks from 1.

    Tools that read such files sort by score as float32 and break ties by page id downwards, while our ties are in the
    order of the run; so an equal score is written one float32 step lower, and every tool sees the same order.

    Args:
        path: the file; replaced when it is there.
        run: query id -> page id -> score, best first.
        tag: the run's name, without spaces.

    Raises:
        ConfigError: an id or tag with white space in it, which the format cannot hold.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "run.trec"
    >>> write_run(path, {"q1": {"b": 2.0, "a": 2.0}})
    >>> print(path.read_text().strip())
    q1 Q0 b 1 2 colqwen3
    q1 Q0 a 2 1.99999988 colqwen3
    """
    lines = []
    _word(tag, "tag")
    for query, pages in run.items():
        last = np.float32(np.inf)
        for rank, (page, score) in enumerate(pages.items(), start=1):
            last = min(np.float32(score), np.nextafter(last, np.float32(-np.inf)))
            lines.append(f"{_word(query, 'query')} Q0 {_word(page, 'page')} {rank} {last:.9g} {tag}\n")
    Path(path).write_text("".join(lines), encoding="utf-8")


def write_qrels(path: str | Path, qrels: Qrels) -> None:
    r"""Write judgements as ``query 0 page relevance``.

    Args:
        path: the file; replaced when it is there.
        qrels: query id -> page id -> relevance.

    Raises:
        ConfigError: an id with white space in it.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "qrels"
    >>> write_qrels(path, {"q1": {"a": 1}})
    >>> path.read_text()
    'q1 0 a 1\n'
    """
    lines = [
        f"{_word(query, 'query')} 0 {_word(page, 'page')} {relevance}\n"
        for query, pages in qrels.items()
        for page, relevance in pages.items()
    ]
    Path(path).write_text("".join(lines), encoding="utf-8")


def _word(text: str, name: str) -> str:
    if text.split() != [text]:
        raise ConfigError(f"{name} {text!r}: TREC files cannot hold white space in a name; export JSON instead")
    return text
