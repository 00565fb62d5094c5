"""The result of an evaluation, as a value and as a file."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.evaluation.files import parse_json, read_text, write_json
from colqwen3_retrievers.evaluation.trec import Qrels, Run

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

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read an evaluation that :meth:`write` wrote.

        Raises:
            ConfigError: no such file, not an evaluation, or a damaged one.

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
            for name in ("unjudged", "unknown_pages"):
                if not isinstance(values.get(name, []), list):
                    raise ConfigError(f"{name}: expected a list")
                values[name] = tuple(values.get(name, ()))
            evaluation = cls(**values)
            evaluation.check()
        except TypeError as exc:  # another set of fields
            raise ConfigError(f"{path}: damaged: {str(exc).removeprefix('Evaluation.__init__() ')}") from exc
        except ConfigError as exc:
            raise ConfigError(f"{path}: damaged: {exc}") from exc
        return evaluation

    def check(self) -> None:
        """Check that all parts have the right types and agree with each other.

        Raises:
            ConfigError: a part that does not.
        """
        _check_table(self.run, "run", numbers.Real)
        _check_table(self.qrels, "qrels", int)
        _check_table(self.per_query, "per_query", numbers.Real)
        _check_numbers(self.measures, "measures", numbers.Real)
        for name in ("settings", "seconds"):
            if not isinstance(getattr(self, name), Mapping | None):
                raise ConfigError(f"{name}: expected an object")
        for name in ("unjudged", "unknown_pages"):
            if not all(isinstance(item, str) for item in getattr(self, name)):
                raise ConfigError(f"{name}: expected ids")
        judged = {query for query, pages in self.qrels.items() if any(relevance > 0 for relevance in pages.values())}
        if not judged or not self.measures:
            raise ConfigError("no measures of any query")
        if set(self.measures) != set(self.per_query):
            raise ConfigError("measures and per_query are of different measures")
        for name, values in self.per_query.items():
            if set(values) != judged:
                example = min(set(values) ^ judged)
                raise ConfigError(f"per_query: {name} and the judgements are of different queries, as {example!r}")
            if abs(math.fsum(values.values()) / len(values) - self.measures[name]) > 1e-6 * max(
                1.0, *map(abs, values.values())
            ):
                raise ConfigError(f"measures: {name} is not the mean of its queries")


def _check_table(value: object, name: str, kind: type) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}: expected an object")
    for key, row in value.items():
        _check_numbers(row, f"{name}: {key}", kind)


def _check_numbers(value: object, name: str, kind: type) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}: expected an object")
    for key, number in value.items():
        if isinstance(number, bool) or not isinstance(number, kind) or not math.isfinite(number):  # type: ignore[arg-type]
            raise ConfigError(f"{name}: {key}: expected a number, got {number!r}")
