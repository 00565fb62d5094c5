"""Runs and judgements as TREC files, and checks of their ids and values.

The format separates its columns by white space, so an id that contains some is written percent-encoded, as in URLs:
``my page`` as ``my%20page``. A percent sign stays as it is, unless it would be read as the start of such a code. So the
ids of almost all files are written as they are, and :func:`read_run` and :func:`read_qrels` restore every id exactly.
"""

from __future__ import annotations

import io
import numbers
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote, unquote

import numpy as np

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, require
from colqwen3_retrievers.evaluation.files import read_text, write_text

Run = Mapping[str, Mapping[str, float]]
"""Query id -> page id -> score, best first."""

Qrels = Mapping[str, Mapping[str, int]]
"""Query id -> page id -> relevance; above 0 is relevant."""

MAX_RELEVANCE: Final = 10_000
"""Highest relevance: trec_eval loops over all values up to the highest, too long at 10^6, and crashes at 2^31."""

_Value = TypeVar("_Value", int, float)

_UNFIT = re.compile(r"[\s\x00-\x1f\x7f]|%(?=[0-9A-Fa-f]{2})")  # \s is what str.split() separates words at


def check_id(value: object, name: str) -> str:
    """Return an id of a query or a page, if it is one.

    Raises:
        ConfigError: not a text, empty, or not valid Unicode.
    """
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{name}: expected an id that is a non-empty text, got {value!r}")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise ConfigError(f"{name}: the id {value!r} is not valid Unicode")
    return value


def check_relevance(value: object, name: str) -> int:
    """Return a relevance, if it is one.

    Raises:
        ConfigError: not a whole number, or above :data:`MAX_RELEVANCE` or below its negative.
    """
    return whole_number(value, f"{name}: relevance", least=-MAX_RELEVANCE, most=MAX_RELEVANCE)


def encode_id(text: str) -> str:
    """Return an id as TREC files can hold it.

    >>> encode_id("my page 5%.pdf"), encode_id("a.pdf#page=3"), encode_id("a%20b")
    ('my%20page%205%.pdf', 'a.pdf#page=3', 'a%2520b')
    """
    return _UNFIT.sub(lambda match: quote(match[0], safe=""), text)


def decode_id(text: str) -> str:
    """Return the id that :func:`encode_id` encoded.

    >>> decode_id("my%20page%205%.pdf"), decode_id("a%2520b")
    ('my page 5%.pdf', 'a%20b')
    """
    return unquote(text)


def write_run(path: str | Path, run: Run, *, tag: str = "colqwen3") -> None:
    """Write a run as ``query Q0 page rank score tag``, ranks from 1.

    Pages are written by score, equal scores in the order of the run. Tools that read such files sort by score as
    float32 and break ties by descending page id, so an equal score is written one float32 step lower, and every tool
    sees the same order.

    Args:
        path: the file; an existing one is replaced whole or not at all.
        run: query id -> page id -> score.
        tag: the run's name, without spaces.

    Raises:
        ConfigError: white space in a tag, a score that float32 cannot hold, or a file that cannot be written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "run.trec"
    >>> write_run(path, {"q1": {"b": 2.0, "my page": 2.0}})
    >>> print(path.read_text().strip())
    q1 Q0 b 1 2 colqwen3
    q1 Q0 my%20page 2 1.99999988 colqwen3
    """
    if not isinstance(tag, str) or tag.split() != [tag]:
        raise ConfigError(f"tag {tag!r}: TREC files cannot hold white space in a run's name")
    lines = []
    for query, pages in run.items():
        check_id(query, "query")
        last = np.float32(np.inf)
        ordered = sorted(pages.items(), key=lambda item: -check_score(item[1], f"query {query!r}, page {item[0]!r}"))
        for rank, (page, score) in enumerate(ordered, start=1):
            check_id(page, f"page of query {query!r}")
            last = min(np.float32(score), np.nextafter(last, np.float32(-np.inf)))
            lines.append(f"{encode_id(query)} Q0 {encode_id(page)} {rank} {last:.9g} {tag}\n")
    write_text(path, "".join(lines))


def write_qrels(path: str | Path, qrels: Qrels) -> None:
    r"""Write judgements as ``query 0 page relevance``.

    Args:
        path: the file; an existing one is replaced whole or not at all.
        qrels: query id -> page id -> relevance.

    Raises:
        ConfigError: an id or a relevance that cannot be written, or a file that cannot.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "qrels"
    >>> write_qrels(path, {"q1": {"a": 1}})
    >>> path.read_text()
    'q1 0 a 1\n'
    """
    lines = [
        f"{encode_id(check_id(query, 'query'))} 0 {encode_id(check_id(page, f'page of query {query!r}'))} "
        f"{check_relevance(relevance, f'query {query!r}, page {page!r}')}\n"
        for query, pages in qrels.items()
        for page, relevance in pages.items()
    ]
    write_text(path, "".join(lines))


def read_run(path: str | Path, *, decode: bool = True) -> dict[str, dict[str, float]]:
    """Read a TREC run, of this library or any other.

    The order of pages is that of their scores; the rank column is ignored.

    Args:
        path: the file.
        decode: whether ids are percent-decoded, as :func:`write_run` encodes them.

    Returns:
        Query id -> page id -> score, as in the file.

    Raises:
        ConfigError: a file that cannot be read, a line that is not one of a run (named by number), or a duplicate page.
        MissingExtraError: ir-measures is not installed (extra ``eval``).

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "run.trec"
    >>> write_run(path, {"q1": {"my page": 2.0}})
    >>> read_run(path)                                                                 # needs the extra eval
    {'q1': {'my page': 2.0}}
    """
    form = "'query Q0 page rank score tag' with a number as score"
    return _read(path, "read_trec_run", form, check_score, decode=decode)


def read_qrels(path: str | Path, *, decode: bool = True) -> dict[str, dict[str, int]]:
    """Read TREC judgements: ``query 0 page relevance``.

    Args:
        path: the file.
        decode: whether ids are percent-decoded, as :func:`write_qrels` encodes them.

    Returns:
        Query id -> page id -> relevance, as in the file.

    Raises:
        ConfigError: a file that cannot be read, a line that is no judgement (named by number), or a page judged twice.
        MissingExtraError: ir-measures is not installed (extra ``eval``).

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "qrels"
    >>> write_qrels(path, {"q1": {"my page": 1}})
    >>> read_qrels(path)                                                               # needs the extra eval
    {'q1': {'my page': 1}}
    """
    form = "'query 0 page relevance' with a whole number as relevance"
    return _read(path, "read_trec_qrels", form, check_relevance, decode=decode)


def check_score(value: object, name: str) -> float:
    """Return a score, if it is one.

    Raises:
        ConfigError: not a number, not finite, or beyond float32.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not abs(float(value)) < 3e38:
        raise ConfigError(f"run: {name} has the score {value!r}")
    return float(value)


class _Lines(io.StringIO):
    """A text that knows the line read last, for errors; only line feeds end lines."""

    number = 0
    line = ""

    def __next__(self) -> str:  # type: ignore[override]  # a text's lines are texts
        self.line = super().__next__()
        self.number += 1
        return self.line


def _read(
    path: str | Path, reader: str, form: str, check: Callable[[object, str], _Value], *, decode: bool
) -> dict[str, dict[str, _Value]]:
    """Read the value of each query and page of a file, whose lines a reader of ir-measures parses."""
    read = getattr(require("eval", "ir_measures", "ir-measures"), reader)
    lines = _Lines(read_text(Path(path)))
    values: dict[str, dict[str, _Value]] = {}
    try:
        for query, page, value, *_ in read(lines):
            where = f"{path}:{lines.number}"
            query, page = (decode_id(query), decode_id(page)) if decode else (query, page)
            if page in values.setdefault(query, {}):
                raise ConfigError(f"{where}: query {query!r}, page {page!r} comes twice")
            values[query][page] = check(value, where)
    except ValueError as exc:
        if isinstance(exc, ConfigError):
            raise
        raise ConfigError(f"{path}:{lines.number}: expected {form}, got {lines.line.strip()[:80]!r}") from exc
    if not values:
        raise ConfigError(f"{path}: no lines")
    return values
