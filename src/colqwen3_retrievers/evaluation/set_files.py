"""The files of a judged set, line by line: queries and corpus as JSON, judgements as tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.evaluation.files import parse_json, read_text
from colqwen3_retrievers.evaluation.trec import check_id, parse_relevance
from colqwen3_retrievers.pages.loading import load_pages
from colqwen3_retrievers.pages.page import Page

_ASCII_SPACE = " \t\r\f\v"  # an id may hold other white space, as U+2028 or U+00A0
_SEVERAL_PAGES = (".pdf", ".tif", ".tiff")


def lines_by_id(path: Path, what: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Give each line that is not blank, with its place and its id: ``_id``, or ``id``.

    Args:
        path: a file of JSON lines.
        what: what a line stands for, for errors.

    Raises:
        ConfigError: a file that cannot be read; a line that is no JSON object, or has no id that can be used; an id
            that comes twice.
    """
    seen: set[str] = set()
    for where, line in _json_lines(path):
        key = check_id(line.get("_id", line.get("id")), where)
        if key in seen:
            raise ConfigError(f"{where}: the {what} {key!r} comes twice")
        seen.add(key)
        yield where, key, line


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give each line that is not blank, with its file and number."""
    for number, text in enumerate(read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        where = f"{path}:{number}"
        line = parse_json(text, where)
        if not isinstance(line, dict):
            raise ConfigError(f"{where}: expected a JSON object")
        yield where, line


def path_within(root: Path, value: object, where: str) -> Path:
    """Give the path of a file within the folder; a set from elsewhere has no business with other files.

    Raises:
        ConfigError: no path, one that leads out of the folder, or none of a file.
    """
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: expected a path, got {value!r}")
    try:
        path = (root / value).resolve()
        if not path.is_relative_to(root.resolve()):
            raise ConfigError(f"{where}: {value!r} lies outside {root}")
        found = path.is_file()
    except (OSError, RuntimeError, ValueError) as exc:  # too long, a loop of links, a NUL
        if isinstance(exc, ConfigError):
            raise
        shown = value if len(value) <= 80 else f"{value[:80]}..."
        raise ConfigError(f"{where}: {shown!r} is no path: {getattr(exc, 'strerror', None) or exc}") from exc
    if not found:
        raise ConfigError(f"{where}: there is no file {value!r}")
    return path


def tsv_qrels(path: Path) -> tuple[dict[str, dict[str, int]], tuple[str, str] | None]:
    """Read judgements: three columns with tabs, or white space, between them, or TREC's four.

    Returns:
        Query id -> page id -> relevance; and where the first line ends in no number and so is taken for a header, its
        place and first cell: were that a query, it would be a judgement with a slip.

    Raises:
        ConfigError: a file that cannot be read, a line that is no judgement, or two different ones of a page.
    """
    qrels: dict[str, dict[str, int]] = {}
    header: tuple[str, str] | None = None
    first = True
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        where, line = f"{path}:{number}", line.strip(_ASCII_SPACE)
        if not line:
            continue
        cells = [
            cell.strip(_ASCII_SPACE) for cell in (line.split("\t") if "\t" in line else re.split(r"[ \r\f\v]+", line))
        ]
        if first and not _is_number(cells[-1]):
            header, first = (where, cells[0]), False
            continue
        first = False
        if len(cells) == 4:
            cells = [cells[0], cells[2], cells[3]]
        if len(cells) != 3 or not cells[0].strip() or not cells[1].strip():
            raise ConfigError(f"{where}: expected query id, page id and a whole number, got {line[:200]!r}")
        query, page, relevance = cells[0], cells[1], parse_relevance(cells[2], where)
        if qrels.setdefault(query, {}).setdefault(page, relevance) != relevance:
            raise ConfigError(f"{where}: query {query!r}, page {page!r} is judged twice, and differently")
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
    """Give the ids that ``corpus.jsonl`` lists; its lines are checked, and no page is read.

    Raises:
        ConfigError: a line that cannot be used, an id that comes twice, or a page under two ids.
    """
    return {line.key for line in _corpus_lines(root)}


def corpus_pages(root: Path) -> Iterator[Page]:
    """Read the pages that ``corpus.jsonl`` lists: texts and single images as they come, then files of several pages.

    A line's own title and text become the page's text, in place of the text layer a PDF may have.

    Raises:
        ConfigError: as :func:`corpus_ids`.
        PageError: a file that cannot be read, or a page it does not have.
    """
    by_file: dict[Path, dict[int, tuple[str, str, str]]] = {}
    for key, text, where, path, number in _corpus_lines(root):
        if path is None:
            yield Page(id=key, text=text)
        elif path.suffix.lower() in _SEVERAL_PAGES:
            by_file.setdefault(path, {})[number] = (key, text, where)
        else:
            yield from _wanted(root, path, {number: (key, text, where)})
    for path, wanted in by_file.items():
        yield from _wanted(root, path, wanted)


def _corpus_lines(root: Path) -> Iterator[_Line]:
    seen: set[tuple[Path, int]] = set()
    for where, key, line in lines_by_id(root / "corpus.jsonl", "page"):
        text = _text(line, where)
        kind = "pdf" if line.get("pdf") is not None else "image"
        if line.get(kind) is None:
            if not text:
                raise ConfigError(f"{where}: expected an image, a pdf or a text")
            yield _Line(key, text, where, None, 1)
            continue
        path = path_within(root, line[kind], where)
        number = line.get("page", 1)
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ConfigError(f"{where}: expected a page number from 1, got {number!r}")
        if path.suffix.lower() in _SEVERAL_PAGES:
            if (path, number) in seen:
                raise ConfigError(f"{where}: {line[kind]} page {number} is there under another id")
            seen.add((path, number))
        yield _Line(key, text, where, path, number)


def _wanted(root: Path, path: Path, wanted: dict[int, tuple[str, str, str]]) -> Iterator[Page]:
    left = dict(wanted)
    for page in load_pages(path, root=root.resolve()):
        if page.number in left:
            key, text, _ = left.pop(page.number)
            yield page.replace(id=key, text=text) if text else page.replace(id=key)
        if not left:
            return
    for number, (_, _, where) in left.items():
        raise PageError(f"{where}: there is no such page", source=path.name, page=number)


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
