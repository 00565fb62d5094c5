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

import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.evaluation.set_files import corpus_ids, corpus_pages, lines_by_id, path_within, tsv_qrels
from colqwen3_retrievers.evaluation.trec import Qrels, check_id, check_relevance
from colqwen3_retrievers.pages.files import error_policy, find_page_files
from colqwen3_retrievers.pages.loading import load_pages
from colqwen3_retrievers.pages.page import Page, Query


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
            return corpus_pages(self.folder)
        return load_pages(self.folder / "corpus")

    def listed_ids(self) -> set[str] | None:
        """Return the ids that ``corpus.jsonl`` lists, or None without that file.

        Raises:
            ConfigError: a line that cannot be used, or a duplicate id.
        """
        if self.folder is None or not (self.folder / "corpus.jsonl").is_file():
            return None
        return corpus_ids(self.folder)

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
    qrels, header = tsv_qrels(root / "qrels" / f"{split}.tsv")
    queries: dict[str, Query] = {}
    ids: set[str] = set()
    for where, key, line in lines_by_id(root / "queries.jsonl", "query"):
        ids.add(key)
        if header is not None and key == header[1]:
            raise ConfigError(f"{header[0]}: expected a whole number as relevance, for {key!r} is a query")
        if key not in qrels:
            continue
        text, image = line.get("text"), line.get("image")
        try:
            queries[key] = Query(text or None, path_within(root, image, where) if image is not None else None)
        except ConfigError as exc:
            raise exc if str(exc).startswith(where) else ConfigError(f"{where}: {exc}") from exc
    unknown = sorted(qrels.keys() - ids)
    if unknown:
        raise ConfigError(f"{root}: {len(unknown)} judged queries are not in queries.jsonl: {unknown[0]!r}")
    return JudgedSet(queries, qrels, root, root.resolve().name)
