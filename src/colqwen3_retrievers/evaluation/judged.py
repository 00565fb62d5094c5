"""A set of queries with judgements, and usually their corpus: a folder laid out as BEIR's.

::

    queries.jsonl         {"_id": "q1", "text": "what was the revenue?"}        or "image": "shot.png", or both
    qrels/test.tsv        query-id <tab> corpus-id <tab> score                  with or without a header; or TREC's four
    corpus.jsonl          {"_id": "p1", "image": "scans/1.png"}                 or "pdf": "a.pdf", "page": 3
                          {"_id": "t1", "title": "...", "text": "..."}          or both; a TIFF's page, too, by "page"
    corpus/               instead of corpus.jsonl: PDFs and images; page ids are "a.pdf#page=3"

Thakur et al. 2021 (https://arxiv.org/abs/2104.08663). Without a corpus, the queries are for an existing index.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.evaluation.files import parse_json, read_text
from colqwen3_retrievers.evaluation.trec import Qrels, check_id, check_relevance
from colqwen3_retrievers.pages.files import error_policy, find_page_files
from colqwen3_retrievers.pages.loading import load_pages
from colqwen3_retrievers.pages.page import Page, Query

_ASCII_SPACE = " \t\r\f\v"  # an id may hold other white space, as U+2028 or U+00A0
_MULTIPAGE = (".pdf", ".tif", ".tiff")


@dataclass(frozen=True)
class JudgedSet:
    """Queries and the relevance of pages to them.

    Attributes:
        queries: query id -> query.
        qrels: query id -> page id -> relevance; above 0 is relevant, higher is more so.
        folder: of the corpus, or None without one.
        name: of the set, for messages and reports.

    Raises:
        ConfigError: no query, a judgement of an unknown query, a relevance that is not a whole number or beyond 10,000,
            or no query with a relevant page.

    >>> judged = JudgedSet({"q1": "revenue"}, {"q1": {"a.pdf#page=2": 1}})
    >>> judged.queries["q1"], judged.relevant("q1")
    (Query(text='revenue', image=None), {'a.pdf#page=2'})
    """

    queries: Mapping[str, Query | str]
    qrels: Qrels
    folder: Path | None = None
    name: str = "queries"

    def __post_init__(self) -> None:
        queries = {
            check_id(key, "query"): Query(value) if isinstance(value, str) else value
            for key, value in self.queries.items()
        }
        if not queries:
            raise ConfigError(f"{self.name}: no queries")
        qrels: dict[str, Mapping[str, int]] = {}
        for query, pages in self.qrels.items():
            if query not in queries:
                raise ConfigError(f"{self.name}: judgements name the unknown query {query!r}")
            for page, relevance in pages.items():
                check_id(page, f"page of query {query!r}")
                check_relevance(relevance, f"{self.name}: query {query!r}, page {page!r}")
            qrels[query] = types.MappingProxyType(dict(pages))
        if not any(relevance > 0 for pages in qrels.values() for relevance in pages.values()):
            raise ConfigError(f"{self.name}: no query has a relevant page")
        object.__setattr__(self, "queries", types.MappingProxyType(queries))
        object.__setattr__(self, "qrels", types.MappingProxyType(qrels))

    def relevant(self, query: str) -> set[str]:
        """Return the ids of the pages judged relevant to a query."""
        return {page for page, relevance in self.qrels.get(query, {}).items() if relevance > 0}

    @property
    def has_corpus(self) -> bool:
        """Whether the set has its pages."""
        return self.folder is not None and (
            (self.folder / "corpus.jsonl").is_file() or (self.folder / "corpus").is_dir()
        )

    def pages(self) -> Iterator[Page]:
        """Read the corpus, one page at a time.

        Raises:
            ConfigError: no corpus, a line that cannot be used, or a duplicate id.
            PageError: a file that cannot be read.
        """
        if self.folder is None or not self.has_corpus:
            raise ConfigError(f"{self.name}: no corpus.jsonl and no corpus folder")
        if (self.folder / "corpus.jsonl").is_file():
            return _listed_pages(self.folder)
        return load_pages(self.folder / "corpus")

    def listed_ids(self) -> set[str] | None:
        """Return the ids that ``corpus.jsonl`` lists, or None without that file; no page is read.

        Raises:
            ConfigError: a line that cannot be used, a duplicate id, or a page under two ids.
        """
        if self.folder is None or not (self.folder / "corpus.jsonl").is_file():
            return None
        return {line.key for line in _corpus_lines(self.folder)}

    def absent(self, pages: Iterable[str]) -> list[str]:
        """Return the page ids that the corpus certainly lacks, without reading a page.

        Of a folder's files, the numbers of pages are not known.

        Raises:
            ConfigError: a line of ``corpus.jsonl`` that cannot be used, or a duplicate id.
            PageError: a folder that cannot be listed.
        """
        listed = self.listed_ids()
        if listed is not None:
            return sorted(set(pages) - listed)
        if self.folder is None or not self.has_corpus:
            return []
        sources = {file.source for file in find_page_files(self.folder / "corpus", on_error=error_policy("raise"))}
        return sorted(page for page in set(pages) if page.rpartition("#page=")[0] not in sources)


def read_judged_set(folder: str | Path, *, split: str = "test") -> JudgedSet:
    r"""Read a folder laid out as BEIR's; see the module.

    Args:
        folder: with ``queries.jsonl`` and ``qrels/``.
        split: the file of ``qrels/``: ``<split>.tsv``. Queries without any line in it belong to other splits and are
            left out, unread.

    Raises:
        ConfigError: a missing file, a line that cannot be used (named by file and number), a duplicate id, two
            different judgements of one page, or a judgement of an unknown query.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "revenue"}')
    >>> (folder / "qrels").mkdir()
    >>> _ = (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\ta.pdf#page=2\t1")
    >>> dict(read_judged_set(folder).qrels["q1"])
    {'a.pdf#page=2': 1}
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"{root}: not a folder")
    qrels, header = _tsv_qrels(root / "qrels" / f"{split}.tsv")
    queries: dict[str, Query] = {}
    ids: set[str] = set()
    for where, key, line in _lines_by_id(root / "queries.jsonl", "query"):
        ids.add(key)
        if header is not None and key == header[1]:
            raise ConfigError(f"{header[0]}: expected a whole number as relevance, for {key!r} is a query")
        if key not in qrels:
            continue
        text, image = line.get("text"), line.get("image")
        try:
            queries[key] = Query(text or None, _path_within(root, image, where) if image is not None else None)
        except ConfigError as exc:
            raise exc if str(exc).startswith(where) else ConfigError(f"{where}: {exc}") from exc
    unknown = sorted(qrels.keys() - ids)
    if unknown:
        raise ConfigError(f"{root}: {len(unknown)} judged queries are not in queries.jsonl: {unknown[0]!r}")
    return JudgedSet(queries, qrels, root, root.resolve().name)


def _lines_by_id(path: Path, what: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield each JSON line that is not blank, with its place and its id: ``_id``, or ``id``."""
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


def _path_within(root: Path, value: object, where: str) -> Path:
    """Return the path of a file within the folder; a set from elsewhere may not name other files."""
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


def _tsv_qrels(path: Path) -> tuple[dict[str, dict[str, int]], tuple[str, str] | None]:
    """Read judgements: three columns separated by tabs or white space, or TREC's four.

    Returns:
        Query id -> page id -> relevance; and, if the first line does not end in a number and so is taken for a header,
        its place and first cell. If that cell is a query's id, the line is a mistyped judgement.
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
        query, page, relevance = cells[0], cells[1], _relevance(cells[2], where)
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


def _listed_pages(root: Path) -> Iterator[Page]:
    """Yield the pages that ``corpus.jsonl`` lists.

    Texts and single images come in their order, then the pages of files of several pages. A line's own title and text
    become the page's text, in place of the text layer that a PDF may have.
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
    for where, key, line in _lines_by_id(root / "corpus.jsonl", "page"):
        text = _text(line, where)
        kind = "pdf" if line.get("pdf") is not None else "image"
        if line.get(kind) is None:
            if not text:
                raise ConfigError(f"{where}: expected an image, a pdf or a text")
            yield _Line(key, text, where, None, 1)
            continue
        path = _path_within(root, line[kind], where)
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


def _relevance(text: str, where: str) -> int:
    """Parse a relevance; 1.0 is 1."""
    number = float(text) if _is_number(text) else math.nan
    if not number.is_integer():
        raise ConfigError(f"{where}: expected a whole number as relevance, got {text!r}")
    return check_relevance(int(number), where)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
