"""Measures by name, parsed and checked before anything is encoded.

ir-measures delegates to several programs. Used here are those that come with it and run in this process (trec_eval's,
and its own in Python); measures that need a Perl script or another package are refused. trec_eval ends the whole
process over some parameters, so these are checked first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, require
from colqwen3_retrievers.evaluation.trec import MAX_RELEVANCE, Qrels, Run

DEFAULT_CUTOFFS = (1, 5, 10)
MAX_CUTOFF: Final = 1_000_000
DEPTH_WITHOUT_CUTOFF: Final = 100
"""Pages retrieved for a measure without a cutoff."""

_PROVIDERS: Final = ("pytrec_eval", "judged", "msmarco", "accuracy", "compat")


@dataclass(frozen=True, slots=True)
class Measures:
    """Measures by name and as objects of ir-measures.

    Attributes:
        names: each as it was given, once.
        by_measure: ir-measures' object -> its names; ``RR@5`` and ``MRR@5`` are one measure.
        provider: of ir-measures, which computes them.
    """

    names: tuple[str, ...]
    by_measure: Mapping[Any, tuple[str, ...]]
    provider: Any

    def depth(self, depth: int | None = None) -> int:
        """Return the number of pages to retrieve for a query.

        Args:
            depth: as given by a user; None takes the largest cutoff, or 100 if a measure has none.

        Raises:
            ConfigError: not a whole number from 1, or less than a cutoff, so that the measure would be of a shorter
                list than its name says.

        >>> parse_measures([10]).depth()                                               # needs the extra eval
        10
        """
        cutoffs = {names[0]: _cutoff(measure) for measure, names in self.by_measure.items()}
        if depth is None:
            return max(cutoff or DEPTH_WITHOUT_CUTOFF for cutoff in cutoffs.values())
        depth = whole_number(depth, "depth", least=1)
        name = max(cutoffs, key=lambda name: cutoffs[name] or 0)
        if depth < (cutoffs[name] or 0):
            raise ConfigError(
                f"depth: {depth} pages are too few for {name}; give at least {cutoffs[name]}, or smaller cutoffs"
            )
        return depth

    def calculate(self, qrels: Qrels, run: Run) -> dict[str, dict[str, float]]:
        """Compute the measures for each query of ``qrels``.

        Args:
            qrels: query id -> page id -> relevance, none below 0; each query has a relevant page.
            run: query id -> page id -> score, no two alike in one query.

        Returns:
            Name -> query id -> value, in the order of ``names`` and of ``qrels``.

        Raises:
            ConfigError: ir-measures cannot compute one of them.
        """
        # Numbers instead of ids: some of the programs end an id at white space or at a NUL.
        queries = {query: str(number) for number, query in enumerate(qrels)}
        names = {number: query for query, number in queries.items()}
        pages = {
            page: f"p{n}" for n, page in enumerate({p for part in (qrels, run) for row in part.values() for p in row})
        }
        gains = {queries[query]: {pages[page]: gain for page, gain in row.items()} for query, row in qrels.items()}
        scores = {
            queries[query]: {pages[page]: score for page, score in row.items()}
            for query, row in run.items()
            if query in queries and row
        }
        per_query = {name: dict.fromkeys(qrels, 0.0) for name in self.names}
        try:
            for metric in self.provider.iter_calc(list(self.by_measure), gains, scores):
                for name in self.by_measure[metric.measure]:
                    per_query[name][names[metric.query_id]] = float(metric.value)
        except Exception as exc:  # the programs may raise anything
            raise ConfigError(f"measures: ir-measures cannot compute {', '.join(self.names)}: {exc}") from exc
        for name, values in per_query.items():
            if not all(map(math.isfinite, values.values())):
                raise ConfigError(f"measures: {name} is not a finite number for every query")
        return per_query


def parse_measures(k: Sequence[int], extra: Sequence[str] = ()) -> Measures:
    """Parse nDCG, recall, success and MRR at each cutoff, and others by name.

    Args:
        k: cutoffs, whole numbers from 1 to 1,000,000.
        extra: ir-measures names, as ``"AP@100"``.

    Raises:
        ConfigError: a cutoff or another parameter that cannot be used, an unknown measure, one that nothing here
            computes, or no measure at all.
        MissingExtraError: ir-measures is not installed (extra ``eval``).

    >>> measures = parse_measures([5], ["AP@100"])                                     # needs the extra eval
    >>> measures.names, measures.depth()
    (('nDCG@5', 'R@5', 'Success@5', 'RR@5', 'AP@100'), 100)
    """
    cutoffs = dict.fromkeys(whole_number(cutoff, "k", least=1, most=MAX_CUTOFF) for cutoff in k)
    names = [f"{name}@{cutoff}" for name in ("nDCG", "R", "Success", "RR") for cutoff in cutoffs]
    names += [name for name in dict.fromkeys(extra) if name not in names]
    if not names:
        raise ConfigError("k: expected at least one cutoff")
    ir = require("eval", "ir_measures", "ir-measures")
    known = ir.providers.registry
    usable = [known[name] for name in _PROVIDERS if name in known and known[name].is_available()]
    provider = ir.providers.FallbackProvider(usable)
    by_measure: dict[Any, tuple[str, ...]] = {}
    for name in names:
        measure = _parse(ir, name)
        try:
            supported = provider.supports(measure)
        except Exception as exc:  # mostly assertions: an unknown parameter, or a missing one
            reason = re.sub(r"invalid param (\w+)=<object.*", r"needs the parameter \1", str(exc))
            raise ConfigError(f"measures: {name!r}: {reason}") from exc
        if not supported:
            raise ConfigError(
                f"measures: {name!r}: nothing here computes it; measures that ir-measures leaves to a Perl script or "
                "to further packages are not supported"
            )
        by_measure[measure] = (*by_measure.get(measure, ()), name)
    return Measures(tuple(names), by_measure, provider)


def _parse(ir: Any, name: object) -> Any:
    try:
        measure = ir.parse_measure(name)
    except Exception as exc:  # it uses Python's parser: SyntaxError, RecursionError, MemoryError, ...
        raise ConfigError(f"measures: ir-measures knows no {name!r}") from exc
    for parameter, value in measure.params.items():
        if not _is_usable(parameter, value):
            raise ConfigError(f"measures: {name!r}: {parameter} cannot be {value!r}")
    return measure


def _is_usable(parameter: str, value: object) -> bool:
    if isinstance(value, bool) or value is None:
        return parameter in ("judged_only", "normalize", "relative")
    if parameter in ("cutoff", "rel"):
        return isinstance(value, int) and 1 <= value <= (MAX_CUTOFF if parameter == "cutoff" else MAX_RELEVANCE)
    if parameter == "gains":
        return isinstance(value, dict) and all(
            isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MAX_RELEVANCE
            for pair in value.items()
            for n in pair
        )
    if isinstance(value, int | float):
        return 0 < value <= 1000 or (parameter == "recall" and value == 0)
    return True


def _cutoff(measure: Any) -> int | None:
    value = measure.params.get("cutoff")
    return value if isinstance(value, int) else None
