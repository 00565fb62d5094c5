"""Readers of a judged set's files: queries and corpus as JSON lines, judgements as tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.evaluation.files import parse_json, read_text
from colqwen3_retrievers.evaluation.trec import check_id, parse_relevance
from colqwen3_retrievers.pages.loading import load_pages
from colqwen3_retrievers.pages.page import Page

_ASCII_SPACE = " \t\r\f\v"  # an id may hold other white space, as U+2028 or U+00A0
_MULTIPAGE = (".pdf", ".tif", ".tiff")


def lines_by_id(path: Path, what: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield each line that is not blank, with its place and its id: ``_id``, or ``id``.

    Args:
        path: a file of JSON lines.
        what: a line's kind, for errors.

    Raises:
        ConfigError: a file that cannot be read; a line that is not a JSON object, or has no usable id; a duplicate id.
    """
    keys: set[str] = set()
    for number, text in enumerate(read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        where = f"{path}:{number}"
        line = parse_json(text, where)
        if not isinstance(line, dict):
            raise ConfigError(f"{where}: expected a JSON object")
        key = check_id(line.get("_id", line.get("id")), where)
        if key in keys:
            raise ConfigError(f"{where}: the {what} {key!r} comes twice")
        keys.add(key)
        yield where, key, line


def path_within(root: Path, value: object, where: str) -> Path:
    """Return the path of a file within the folder; a set from elsewhere may not name other files.

    Raises:
        ConfigError: not a path, one that leads out of the folder, or not a file's.
    """
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: expected a path, got {value!r}")
    try:
        path = (root / value).resolve()
        if not path.is_relative_to(root.resolve()):
            raise ConfigError(f"{where}: {value!r} is outside {root}")
        exists = path.is_file()
    except (OSError, RuntimeError, ValueError) as exc:  # too long, a loop of links, a NUL
        if isinstance(exc, ConfigError):
            raise
        shown = value if len(value) <= 80 else f"{value[:80]}..."
        raise ConfigError(f"{where}: {shown!r} is not a path: {getattr(exc, 'strerror', None) or exc}") from exc
    if not exists:
        raise ConfigError(f"{where}: there is no file {value!r}")
    return path


def tsv_qrels(path: Path) -> tuple[dict[str, dict[str, int]], tuple[str, str] | None]:
    """Read judgements: three columns separated by tabs or white space, or TREC's four.

    Returns:
        Query id -> page id -> relevance; and, if the first line does not end in a number and so is taken for a header,
        its place and first cell. If that cell is a query's id, the line is a mistyped judgement.

    Raises:
        ConfigError: a file that cannot be read, a line that is not a judgement, or two different judgements of a page.
    """
    qrels: dict[str, dict[str, int]] = {}
    header: tuple[str, str] | None = None
    lines = ((number, line.strip(_ASCII_SPACE)) for number, line in enumerate(read_text(path).split("\n"), start=1))
    for n, (number, line) in enumerate((number, line) for number, line in lines if line):
        where = f"{path}:{number}"
        cells = line.split("\t") if "\t" in line else re.split(r"[ \r\f\v]+", line)
        cells = [cell.strip(_ASCII_SPACE) for cell in cells]
        if n == 0 and not _is_number(cells[-1]):
            header = (where, cells[0])
            continue
        if len(cells) == 4:
            cells = [cells[0], cells[2], cells[3]]
        if len(cells) != 3 or not cells[0].strip() or not cells[1].strip():
            raise ConfigError(f"{where}: expected query id, page id and a whole number, got {line[:200]!r}")
        query, page, relevance = cells[0], cells[1], parse_relevance(cells[2], where)
        if qrels.setdefault(query, {}).setdefault(page, relevance) != relevance:
            raise ConfigError(f"{where}: query {query!r}, page {page!r} is judged twice, differently")
    if not qrels:
        raise ConfigError(f"{path}: no judgements" + (f" after the header {header[0]}" if header else ""))
    return qrels, header


class _Line(NamedTuple):
    """A page that ``corpus.jsonl`` lists; ``path`` is None for a text alone."""

    key: str
    text: str
    where: str
    path: Path | None
    number: int


def corpus_ids(root: Path) -> set[str]:
    """Return the ids that ``corpus.jsonl`` lists; its lines are checked, and no page is read.

    Raises:
        ConfigError: a line that cannot be used, a duplicate id, or a page under two ids.
    """
    return {line.key for line in _corpus_lines(root)}


def corpus_pages(root: Path) -> Iterator[Page]:
    """Yield the pages that ``corpus.jsonl`` lists.

    Texts and single images come in their order, then the pages of files of several pages. A line's own title and text
    become the page's text, in place of the text layer that a PDF may have.

    Raises:
        ConfigError: as :func:`corpus_ids`.
        PageError: a file that cannot be read, or a page it does not have.
    """
    by_file: dict[Path, list[_Line]] = {}
    for line in _corpus_lines(root):
        if line.path is None:
            yield Page(id=line.key, text=line.text)
        elif line.path.suffix.lower() in _MULTIPAGE:
            by_file.setdefault(line.path, []).append(line)
        else:
            yield from _pages_of(root, line.path, [line])
    for path, lines in by_file.items():
        yield from _pages_of(root, path, lines)


def _corpus_lines(root: Path) -> Iterator[_Line]:
    places: set[tuple[Path, int]] = set()
    for where, key, line in lines_by_id(root / "corpus.jsonl", "page"):
        text = _text(line, where)
        kind = "pdf" if line.get("pdf") is not None else "image"
        if line.get(kind) is None:
            if not text:
                raise ConfigError(f"{where}: expected an image, a pdf or a text")
            yield _Line(key, text, where, None, 1)
            continue
        path = path_within(root, line[kind], where)
        number = whole_number(line.get("page", 1), f"{where}: page", least=1)
        if path.suffix.lower() in _MULTIPAGE:
            if (path, number) in places:
                raise ConfigError(f"{where}: {line[kind]} page {number} is there under another id")
            places.add((path, number))
        yield _Line(key, text, where, path, number)


def _pages_of(root: Path, path: Path, lines: Iterable[_Line]) -> Iterator[Page]:
    """Yield the pages of a file that lines name."""
    pending = {line.number: line for line in lines}
    for page in load_pages(path, root=root.resolve()):
        line = pending.pop(page.number, None)
        if line is not None:
            yield page.replace(id=line.key, text=line.text) if line.text else page.replace(id=line.key)
        if not pending:
            return
    for number, line in pending.items():
        raise PageError(f"{line.where}: there is no such page", source=path.name, page=number)


def _text(line: Mapping[str, Any], where: str) -> str:
    title, text = line.get("title") or "", line.get("text") or ""
    if not isinstance(title, str) or not isinstance(text, str):
        raise ConfigError(f"{where}: expected title and text as texts")
    return f"{title} {text}".strip()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
