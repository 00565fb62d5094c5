"""Runs judged with ir-measures, and the results as files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.evaluation.files import parse_json, read_text, write_json
from colqwen3_retrievers.evaluation.measures import DEFAULT_CUTOFFS, parse_measures
from colqwen3_retrievers.evaluation.trec import Qrels, Run, check_relevance, check_score

_FORMAT = 1


@dataclass(frozen=True)
class Evaluation:
    """A run, its judgements, and its measures.

    Attributes:
        measures: measure -> mean over the judged queries, as ``{"nDCG@5": 0.93}``.
        per_query: measure -> query id -> value; the same queries for each.
        run: query id -> page id -> score, best first; includes queries that could not be judged.
        qrels: the judgements.
        unjudged: ids of queries without a relevant page, which no mean includes.
        unknown_pages: relevant pages that the index does not hold.
        settings: of the search and the encoder; None if unknown, as of a run that was only judged.
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

    def worst(self, n: int, measure: str | None = None) -> list[tuple[str, float]]:
        """Return the queries with the lowest values of a measure.

        Args:
            n: maximum number of queries.
            measure: its name; None takes the first.

        Returns:
            Query ids with their values, lowest first, equal ones in the order of the judgements.

        Raises:
            ConfigError: a measure that was not computed.

        >>> from colqwen3_retrievers.evaluation import judge                              # needs the extra eval
        >>> evaluation = judge({"q1": {"a": 2.0}}, {"q1": {"a": 1}, "q2": {"b": 1}}, k=[1])
        >>> evaluation.worst(1)
        [('q2', 0.0)]
        """
        name = next(iter(self.per_query)) if measure is None else measure
        if name not in self.per_query:
            raise ConfigError(f"measures: {name!r} was not computed")
        return sorted(self.per_query[name].items(), key=lambda item: item[1])[:n]

    def write(self, path: str | Path) -> None:
        """Write the evaluation as JSON, whole or not at all.

        Raises:
            ConfigError: the file cannot be written.
        """
        values = asdict(self) | {"format": _FORMAT, "qrels": {key: dict(pages) for key, pages in self.qrels.items()}}
        write_json(path, values)

    @staticmethod
    def read(path: str | Path) -> Evaluation:
        """Read an evaluation that :meth:`write` wrote, and judge its run again.

        Raises:
            ConfigError: no such file, not an evaluation, or a damaged one.
            MissingExtraError: ir-measures is not installed (extra ``eval``).

        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.json"
        >>> from colqwen3_retrievers.evaluation import judge                              # needs the extra eval
        >>> judge({"q1": {"a": 2.0}}, {"q1": {"a": 1}}, k=[1]).write(path)
        >>> Evaluation.read(path).measures["nDCG@1"]
        1.0
        """
        values = parse_json(read_text(Path(path)), f"{path}: not an evaluation written by colqwen3 eval --json")
        if not isinstance(values, dict) or "format" not in values:
            raise ConfigError(f"{path}: not an evaluation written by colqwen3 eval --json")
        if values.pop("format") != _FORMAT:
            raise ConfigError(f"{path}: an evaluation of another format")
        try:
            evaluation = judge(values["run"], values["qrels"], k=(), measures=tuple(values["measures"]))
            settings, seconds = (
                None if values[name] is None else dict(values[name]) for name in ("settings", "seconds")
            )
            unknown_pages = tuple(values["unknown_pages"])
        except ConfigError as exc:
            raise ConfigError(f"{path}: damaged: {exc}") from exc
        except (AttributeError, KeyError, TypeError, ValueError) as exc:  # a part is missing or of another type
            raise ConfigError(f"{path}: damaged: {exc!r}") from exc
        return replace(evaluation, unknown_pages=unknown_pages, settings=settings, seconds=seconds)


def judge(run: Run, qrels: Qrels, *, k: Sequence[int] = DEFAULT_CUTOFFS, measures: Sequence[str] = ()) -> Evaluation:
    """Judge a run.

    Pages are ranked by score, equal scores by page id, as everywhere in this library (trec_eval alone would rank equal
    scores by descending id). nDCG uses the relevance as the gain and log2(rank + 1) as the discount (Järvelin and
    Kekäläinen 2002, https://doi.org/10.1145/582415.582418). A query without a relevant page cannot be judged: no mean
    includes it. A judged query without results counts 0.

    Args:
        run: query id -> page id -> score, in any order.
        qrels: query id -> page id -> relevance; below 1 is not relevant.
        k: cutoffs of nDCG, recall (``R``), success and MRR (``RR``).
        measures: further measures by their ir-measures names, as ``"AP@100"``.

    Raises:
        ConfigError: an unknown measure, a score that is not finite, a relevance that is not a whole number or beyond
            10,000, or no query with a relevant page.
        MissingExtraError: ir-measures is not installed (extra ``eval``).

    >>> judge({"q1": {"a": 1.0, "b": 2.0}}, {"q1": {"a": 1}}, k=[1, 2]).measures["RR@2"]   # needs the extra eval
    0.5
    """
    parsed = parse_measures(k, measures)
    for query, pages in qrels.items():
        for page, relevance in pages.items():
            check_relevance(relevance, f"qrels: query {query!r}, page {page!r}")
    judged = {query: pages for query, pages in qrels.items() if any(relevance > 0 for relevance in pages.values())}
    if not judged:
        raise ConfigError("qrels: no query has a relevant page")
    ordered = {query: _ordered(query, pages) for query, pages in run.items()}
    by_rank = {  # scores from ranks: the tools order equal scores, and those beyond float32, in other ways
        query: {page: float(len(pages) - rank) for rank, page in enumerate(pages)} for query, pages in ordered.items()
    }
    gains = {query: {page: max(0, rel) for page, rel in pages.items()} for query, pages in judged.items()}
    per_query = parsed.calculate(gains, by_rank)
    means = {name: math.fsum(values.values()) / len(values) for name, values in per_query.items()}
    unjudged = tuple(query for query in {**qrels, **run} if query not in judged)
    return Evaluation(means, per_query, ordered, {query: dict(pages) for query, pages in qrels.items()}, unjudged)


def _ordered(query: str, pages: Mapping[str, float]) -> dict[str, float]:
    scored = {page: check_score(score, f"query {query!r}, page {page!r}") for page, score in pages.items()}
    return dict(sorted(scored.items(), key=lambda item: (-item[1], item[0])))
