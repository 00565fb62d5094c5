"""Asking an index every query of a judged set, and judging what it finds, with ir-measures."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from colqwen3_retrievers.documents import Query
from colqwen3_retrievers.errors import ConfigError, require
from colqwen3_retrievers.evaluation.judged import JudgedSet
from colqwen3_retrievers.evaluation.trec import Qrels, Run
from colqwen3_retrievers.index import PageIndex

DEFAULT_CUTOFFS = (1, 5, 10)
_FORMAT = 1


@dataclass(frozen=True)
class Evaluation:
    """What was found, and how good it is.

    Attributes:
        measures: measure -> mean over the judged queries, as ``{"nDCG@5": 0.93}``.
        per_query: measure -> query id -> value; the same queries for each.
        run: query id -> page id -> score, best first; also of queries that could not be judged.
        qrels: the judgements.
        unjudged: ids of queries without a relevant page, which no mean counts.
        unknown_pages: relevant pages that the index does not hold.
        settings: how it was searched and what made the multi-vectors.
        seconds: ``load`` (the first query, with the model), ``encode`` (all queries), ``search``.
    """

    measures: Mapping[str, float]
    per_query: Mapping[str, Mapping[str, float]]
    run: Run
    qrels: Qrels
    unjudged: tuple[str, ...] = ()
    unknown_pages: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] | None = None

    def write(self, path: str | Path) -> None:
        """Write all of it as JSON."""
        values = asdict(self) | {"format": _FORMAT, "qrels": {key: dict(pages) for key, pages in self.qrels.items()}}
        Path(path).write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read what :meth:`write` wrote.

        Raises:
            ConfigError: no such file, or not an evaluation.

        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.json"
        >>> judge({"q1": {"a": 2.0}}, {"q1": {"a": 1}}, k=[1]).write(path)          # needs the extra eval
        >>> Evaluation.read(path).measures["nDCG@1"]
        1.0
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values.pop("format") != _FORMAT:
                raise ConfigError(f"{path}: an evaluation of another format")
            for name in ("unjudged", "unknown_pages"):
                values[name] = tuple(values[name])
            made = cls(**values)
            made.measures.items(), [made.per_query[name].items() for name in made.measures]
        except OSError as exc:
            raise ConfigError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
        except ConfigError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise ConfigError(f"{path}: not an evaluation written by colqwen3 eval --json") from exc
        return made


def measure_names(k: Sequence[int], extra: Sequence[str] = ()) -> list[str]:
    """Name the measures for some cutoffs: nDCG, recall, success and MRR at each, then others by their own name.

    Raises:
        ConfigError: a cutoff that is no whole number from 1, or none at all.

    >>> measure_names([5], ["AP@100"])
    ['nDCG@5', 'R@5', 'Success@5', 'RR@5', 'AP@100']
    """
    for cutoff in k:
        if isinstance(cutoff, bool) or not isinstance(cutoff, int) or cutoff < 1:
            raise ConfigError(f"k: expected whole numbers from 1, got {cutoff!r}")
    names = [f"{name}@{cutoff}" for name in ("nDCG", "R", "Success", "RR") for cutoff in dict.fromkeys(k)]
    names += [name for name in extra if name not in names]
    if not names:
        raise ConfigError("k: expected at least one cutoff")
    return names


def judge(run: Run, qrels: Qrels, *, k: Sequence[int] = DEFAULT_CUTOFFS, measures: Sequence[str] = ()) -> Evaluation:
    """Judge a run.

    Ranks are those of the run: pages by score, equal scores by page id, as everywhere in this library (trec_eval by
    itself would take equal scores by id downwards). nDCG takes the relevance as the gain and log2(rank + 1) as the
    discount (Järvelin and Kekäläinen 2002). A query without a relevant page cannot be judged: no mean counts it. A
    judged query for which nothing was found counts 0.

    Args:
        run: query id -> page id -> score, in any order.
        qrels: query id -> page id -> relevance; below 1 is not relevant.
        k: cutoffs of nDCG, recall (``R``), success and MRR (``RR``).
        measures: more of them by their ir-measures names, as ``"AP@100"``.

    Raises:
        ConfigError: an unknown measure, a score that is not finite, or no query with a relevant page.
        MissingExtraError: ir-measures is not installed (extra ``eval``).

    >>> judge({"q1": {"a": 1.0, "b": 2.0}}, {"q1": {"a": 1}}, k=[1, 2]).measures["RR@2"]   # needs the extra eval
    0.5
    """
    names = measure_names(k, measures)
    ir = require("eval", "ir_measures", "ir-measures")
    parsed = {}
    for name in names:
        try:
            parsed[ir.parse_measure(name)] = name
        except (NameError, ValueError, SyntaxError, TypeError) as exc:
            raise ConfigError(f"measures: ir-measures knows no {name!r}") from exc
    judged = {query: pages for query, pages in qrels.items() if any(relevance > 0 for relevance in pages.values())}
    if not judged:
        raise ConfigError("qrels: no query has a relevant page")
    ordered = {query: _ordered(query, pages) for query, pages in run.items()}
    by_rank = {  # scores that say the rank alone: tools order equal scores, and those beyond float32, in their own way
        query: {page: float(len(pages) - rank) for rank, page in enumerate(pages)}
        for query, pages in ordered.items()
        if query in judged and pages
    }
    gains = {query: {page: max(0, rel) for page, rel in pages.items()} for query, pages in judged.items()}
    per_query: dict[str, dict[str, float]] = {name: dict.fromkeys(judged, 0.0) for name in names}
    if by_rank:
        try:
            for metric in ir.iter_calc(list(parsed), gains, by_rank):
                per_query[parsed[metric.measure]][metric.query_id] = float(metric.value)
        except (ValueError, RuntimeError) as exc:
            raise ConfigError(f"measures: ir-measures cannot compute them: {exc}") from exc
    means = {name: math.fsum(values.values()) / len(values) for name, values in per_query.items()}
    unjudged = tuple(query for query in {**qrels, **run} if query not in judged)
    return Evaluation(means, per_query, ordered, {query: dict(pages) for query, pages in qrels.items()}, unjudged)


def evaluate(
    index: PageIndex,
    judged: JudgedSet,
    *,
    k: Sequence[int] = DEFAULT_CUTOFFS,
    measures: Sequence[str] = (),
    depth: int | None = None,
    exact: bool = False,
    allow_unknown_pages: bool = False,
    batch_size: int = 64,
) -> Evaluation:
    """Search an index for every query and judge what is found.

    Args:
        index: what is searched, as a user would search it: its encoder, pooling, codes and store.
        judged: queries and judgements.
        k: cutoffs of nDCG, recall (``R``), success and MRR (``RR``).
        measures: more of them by their ir-measures names, as ``"AP@100"``.
        depth: how many pages are asked for; by default the largest cutoff, or 100 when a measure has none. A deeper
            search also looks at more candidates.
        exact: whether to score every page; False measures what a search finds by default.
        allow_unknown_pages: whether relevant pages that the index does not hold count as not found; otherwise they are
            an error, as they mostly mean that ids are written otherwise.
        batch_size: queries searched together.

    Returns:
        Means, values of each query, the run, and times.

    Raises:
        ConfigError: an argument that cannot be used, or judgements of pages that the index does not hold.
        MissingExtraError: ir-measures is not installed (extra ``eval``).

    >>> evaluate(PageIndex.open("my-index"), read_judged_set("my-queries")).measures       # doctest: +SKIP
    {'nDCG@1': 0.91, 'nDCG@5': 0.94, ...}
    """
    names = measure_names(k, measures)
    require("eval", "ir_measures", "ir-measures")
    for name, value in (("depth", depth), ("batch_size", batch_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name}: expected a whole number from 1, got {value!r}")
    held = set(index.ids())
    unknown = sorted({page for query in judged.qrels for page in judged.relevant(query)} - held)
    if unknown and not allow_unknown_pages:
        example = f"; it holds {min(held)!r}" if held else ""
        raise ConfigError(
            f"{index.location}: {len(unknown)} relevant pages are not in the index: {', '.join(unknown[:3])}{example}"
        )
    deep = depth or _depth(names)
    queries = [query if isinstance(query, Query) else Query(query) for query in judged.queries.values()]
    clock = time.perf_counter
    start = clock()
    index.encoder.submit_queries(queries[:1]).result()  # so that loading a model is not told as encoding
    loaded = clock()
    made = index.encoder.submit_queries(queries).result()
    encoded = clock()
    found = [
        hits
        for at in range(0, len(made), batch_size)
        for hits in index.search_many(made[at : at + batch_size], deep, exact=exact)
    ]
    searched = clock()
    run = {
        query: {hit.page.id: float(hit.score) for hit in hits}
        for query, hits in zip(judged.queries, found, strict=True)
    }
    got = judge(run, judged.qrels, k=k, measures=measures)
    settings = {
        "set": judged.name, "index": index.location, "pages": len(held), "queries": len(queries), "depth": deep,
        "exact": exact, "encoder": index.info.to_dict(),
    }  # fmt: skip
    seconds = {"load": loaded - start, "encode": encoded - loaded, "search": searched - encoded}
    return Evaluation(got.measures, got.per_query, got.run, got.qrels, got.unjudged, tuple(unknown), settings, seconds)


def _ordered(query: str, pages: Mapping[str, float]) -> dict[str, float]:
    for page, score in pages.items():
        if not math.isfinite(score):
            raise ConfigError(f"run: query {query!r}, page {page!r} has the score {score}")
    return dict(sorted(pages.items(), key=lambda item: (-item[1], item[0])))


def _depth(names: Sequence[str]) -> int:
    cutoffs = [name.rpartition("@")[2] for name in names]
    return max([int(cutoff) if cutoff.isdigit() else 100 for cutoff in cutoffs])
