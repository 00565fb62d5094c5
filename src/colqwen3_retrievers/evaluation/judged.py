"""A set of queries with judgements, and with the pages they are about: a folder laid out as BEIR's.

::

    queries.jsonl         {"_id": "q1", "text": "what was the revenue?"}        or "image": "shot.png", or both
    qrels/test.tsv        query-id <tab> corpus-id <tab> score                  with or without a header; or TREC's four
    corpus.jsonl          {"_id": "p1", "image": "scans/1.png"}                 or "pdf": "a.pdf", "page": 3
                          {"_id": "t1", "title": "...", "text": "..."}
    corpus/               instead of corpus.jsonl: PDFs and images; page ids are "a.pdf#page=3"

Thakur et al. 2021 (arXiv 2104.08663). Without a corpus, the queries are for an index that is there.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colqwen3_retrievers.documents import Page, Query
from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.evaluation.trec import Qrels, check_id
from colqwen3_retrievers.pages import load_pages


@dataclass(frozen=True)
class JudgedSet:
    """Queries and which pages answer them.

    Attributes:
        queries: query id -> query.
        qrels: query id -> page id -> relevance; above 0 is relevant, higher is more so.
        folder: where the corpus lies, or None without one.
        name: what to call it.

    Raises:
        ConfigError: no query, a judgement of an unknown query, a relevance that is no whole number, or no query with a
            relevant page.

    >>> judged = JudgedSet({"q1": "revenue"}, {"q1": {"a.pdf#page=2": 1}})
    >>> judged.queries["q1"], judged.relevant("q1")
    (Query(text='revenue', image=None), {'a.pdf#page=2'})
    """

    queries: Mapping[str, Query | str]
    qrels: Qrels
    folder: Path | None = None
    name: str = "queries"

    def __post_init__(self) -> None:
        """Check, and freeze."""
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
                if isinstance(relevance, bool) or not isinstance(relevance, int):
                    raise ConfigError(f"{self.name}: query {query!r}, page {page!r}: relevance {relevance!r}")
            qrels[query] = types.MappingProxyType(dict(pages))
        if not any(relevance > 0 for pages in qrels.values() for relevance in pages.values()):
            raise ConfigError(f"{self.name}: no query has a relevant page")
        object.__setattr__(self, "queries", types.MappingProxyType(queries))
        object.__setattr__(self, "qrels", types.MappingProxyType(qrels))

    def relevant(self, query: str) -> set[str]:
        """Ids of the pages that answer a query; empty when none was judged so."""
        return {page for page, relevance in self.qrels.get(query, {}).items() if relevance > 0}

    @property
    def has_corpus(self) -> bool:
        """Whether the pages come with it."""
        return self.folder is not None and (
            (self.folder / "corpus.jsonl").is_file() or (self.folder / "corpus").is_dir()
        )

    def pages(self) -> Iterator[Page]:
        """Read the corpus, one page at a time.

        Raises:
            ConfigError: there is none; a line that cannot be used, or an id that comes twice.
            PageError: a file that cannot be read.
        """
        if self.folder is None or not self.has_corpus:
            raise ConfigError(f"{self.name}: no corpus.jsonl and no corpus folder")
        if (self.folder / "corpus.jsonl").is_file():
            return _corpus(self.folder)
        return load_pages(self.folder / "corpus")


def read_judged_set(folder: str | Path, *, split: str = "test") -> JudgedSet:
    r"""Read a folder laid out as BEIR's; see the module.

    Args:
        folder: where ``queries.jsonl`` and ``qrels/`` lie.
        split: the file of ``qrels/``: ``<split>.tsv``. Queries without any line in it belong to other splits and are
            left out.

    Raises:
        ConfigError: a file that is missing, a line that cannot be used (named by file and number), an id twice, two
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
    qrels = _qrels(root / "qrels" / f"{split}.tsv")
    queries: dict[str, Query] = {}
    for where, line in _lines(root / "queries.jsonl"):
        key = _id(line, where)
        if key in queries:
            raise ConfigError(f"{where}: the query {key!r} comes twice")
        text, image = line.get("text"), line.get("image")
        try:
            queries[key] = Query(text or None, _inside(root, image, where) if image is not None else None)
        except ConfigError as exc:
            raise ConfigError(f"{where}: {exc}") from exc
    asked = {key: query for key, query in queries.items() if key in qrels}
    unknown = sorted(qrels.keys() - queries.keys())
    if unknown:
        raise ConfigError(f"{root}: {len(unknown)} judged queries are not in queries.jsonl: {unknown[0]!r}")
    return JudgedSet(asked, qrels, root, root.name)


def _qrels(path: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        cells = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or (number == 1 and cells[-1].strip().lower() in ("score", "relevance", "rel")):
            continue
        if len(cells) == 4:
            cells = [cells[0], cells[2], cells[3]]
        try:
            query, page, relevance = cells[0].strip(), cells[1].strip(), int(cells[2])
            if len(cells) != 3 or not query or not page:
                raise ValueError
        except (ValueError, IndexError):
            raise ConfigError(f"{path}:{number}: expected query id, page id and a whole number, got {line!r}") from None
        if qrels.setdefault(query, {}).setdefault(page, relevance) != relevance:
            raise ConfigError(f"{path}:{number}: query {query!r}, page {page!r} is judged twice, and differently")
    if not qrels:
        raise ConfigError(f"{path}: no judgements")
    return qrels


def _corpus(root: Path) -> Iterator[Page]:
    seen: set[str] = set()
    by_pdf: dict[Path, dict[int, tuple[str, str]]] = {}
    for where, line in _lines(root / "corpus.jsonl"):
        key = _id(line, where)
        if key in seen:
            raise ConfigError(f"{where}: the page {key!r} comes twice")
        seen.add(key)
        if line.get("pdf") is not None:
            number = line.get("page", 1)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigError(f"{where}: expected a page number from 1, got {number!r}")
            path = _inside(root, line["pdf"], where)
            if number in by_pdf.setdefault(path, {}):
                raise ConfigError(f"{where}: {line['pdf']} page {number} is there under another id")
            by_pdf[path][number] = (key, where)
        elif line.get("image") is not None:
            path = _inside(root, line["image"], where)
            for page in load_pages(path, root=root):
                yield page.replace(id=key)
                break
        else:
            title, text = line.get("title") or "", line.get("text") or ""
            if not isinstance(title, str) or not isinstance(text, str) or not f"{title}{text}".strip():
                raise ConfigError(f"{where}: expected an image, a pdf or a text")
            yield Page(id=key, text=f"{title} {text}".strip())
    for path, wanted in by_pdf.items():
        for page in load_pages(path, root=root):
            if page.number in wanted:
                yield page.replace(id=wanted.pop(page.number)[0])
        for number, (_, where) in wanted.items():
            raise PageError(f"{where}: there is no such page", source=path.name, page=number)


def _inside(root: Path, value: object, where: str) -> Path:
    """Give the path of a file within the folder; a set from elsewhere has no business with other files."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: expected a path, got {value!r}")
    path = (root / value).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ConfigError(f"{where}: {value!r} lies outside {root}")
    if not path.is_file():
        raise ConfigError(f"{where}: there is no file {value!r}")
    return path


def _id(line: Mapping[str, Any], where: str) -> str:
    return check_id(line.get("_id", line.get("id")), where)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, text in enumerate(_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        where = f"{path}:{number}"
        try:
            line = json.loads(text)
        except ValueError as exc:
            raise ConfigError(f"{where}: not JSON: {exc}") from exc
        if not isinstance(line, dict):
            raise ConfigError(f"{where}: expected a JSON object")
        yield where, line


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: not UTF-8") from exc
