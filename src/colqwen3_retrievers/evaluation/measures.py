"""Which measures: named, checked and understood before anything is encoded.

ir-measures hands its work to several programs. Used here are those that come with it and run in this process
(trec_eval's, and its own in Python); what it would ask a Perl script or another package for is refused. trec_eval ends
the whole process over some parameters, so these are checked before it sees them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from colqwen3_retrievers.errors import ConfigError, require
from colqwen3_retrievers.evaluation.trec import MAX_RELEVANCE, Qrels, Run

DEFAULT_CUTOFFS = (1, 5, 10)
MAX_CUTOFF: Final = 1_000_000
DEPTH_WITHOUT_CUTOFF: Final = 100
"""How many pages are asked for where a measure looks at all that were found."""

_PROVIDERS: Final = ("pytrec_eval", "judged", "msmarco", "accuracy", "compat")


@dataclass(frozen=True, slots=True)
class Measures:
    """Measures, as they were named and as ir-measures knows them.

    Attributes:
        names: each as it was asked for, once.
        by_measure: ir-measures' object -> its names; ``RR@5`` and ``MRR@5`` are one measure.
        provider: what computes them.
    """

    names: tuple[str, ...]
    by_measure: Mapping[Any, tuple[str, ...]]
    provider: Any

    @property
    def cutoff(self) -> tuple[str, int]:
        """The measure with the largest cutoff, and that; ``("", 0)`` where none has one."""
        found = [(cutoff, names[0]) for made, names in self.by_measure.items() if (cutoff := _cutoff(made))]
        largest, name = max(found, key=lambda item: item[0], default=(0, ""))
        return name, largest

    @property
    def depth(self) -> int:
        """How many pages a query has to be answered with; 100 or more where a measure looks at all."""
        open_ended = any(_cutoff(made) is None for made in self.by_measure)
        return max(self.cutoff[1], DEPTH_WITHOUT_CUTOFF if open_ended else 1)

    def calculate(self, qrels: Qrels, run: Run) -> dict[str, dict[str, float]]:
        """Compute them for each query of ``qrels``.

        Args:
            qrels: query id -> page id -> relevance, none below 0; each query has a relevant page.
            run: query id -> page id -> score, no two alike in one query.

        Returns:
            Name -> query id -> value, in the order of ``names`` and of ``qrels``.

        Raises:
            ConfigError: ir-measures cannot compute one of them.
        """
        # Numbers for ids: the tools behind it end a name at white space or at a NUL.
        queries = {query: str(number) for number, query in enumerate(qrels)}
        names = {number: query for query, number in queries.items()}
        pages = {
            page: f"p{n}" for n, page in enumerate({p for part in (qrels, run) for row in part.values() for p in row})
        }
        gains = {queries[query]: {pages[page]: gain for page, gain in row.items()} for query, row in qrels.items()}
        asked = {
            queries[query]: {pages[page]: score for page, score in row.items()}
            for query, row in run.items()
            if query in queries and row
        }
        per_query = {name: dict.fromkeys(qrels, 0.0) for name in self.names}
        try:
            for metric in self.provider.iter_calc(list(self.by_measure), gains, asked):
                for name in self.by_measure[metric.measure]:
                    per_query[name][names[metric.query_id]] = float(metric.value)
        except Exception as exc:  # the programs behind it raise whatever they come upon
            raise ConfigError(f"measures: ir-measures cannot compute {', '.join(self.names)}: {exc}") from exc
        for name, values in per_query.items():
            if not all(map(math.isfinite, values.values())):
                raise ConfigError(f"measures: {name} is not a finite number for every query")
        return per_query


def parse_measures(k: Sequence[int], extra: Sequence[str] = ()) -> Measures:
    """Take nDCG, recall, success and MRR at each cutoff, then others by their own name.

    Args:
        k: cutoffs, whole numbers from 1 to 1,000,000.
        extra: ir-measures names, as ``"AP@100"``.

    Raises:
        ConfigError: a cutoff or another parameter that cannot be used, an unknown measure, one that nothing here
            computes, or none at all.
        MissingExtraError: ir-measures is not installed (extra ``eval``).

    >>> measures = parse_measures([5], ["AP@100"])                                     # needs the extra eval
    >>> measures.names, measures.depth
    (('nDCG@5', 'R@5', 'Success@5', 'RR@5', 'AP@100'), 100)
    """
    for cutoff in k:
        if isinstance(cutoff, bool) or not isinstance(cutoff, int) or not 1 <= cutoff <= MAX_CUTOFF:
            raise ConfigError(f"k: expected whole numbers from 1 to {MAX_CUTOFF:,}, got {cutoff!r}")
    names = [f"{name}@{cutoff}" for name in ("nDCG", "R", "Success", "RR") for cutoff in dict.fromkeys(k)]
    names += [name for name in dict.fromkeys(extra) if name not in names]
    if not names:
        raise ConfigError("k: expected at least one cutoff")
    ir = require("eval", "ir_measures", "ir-measures")
    known = ir.providers.registry
    usable = [known[name] for name in _PROVIDERS if name in known and known[name].is_available()]
    provider = ir.providers.FallbackProvider(usable)
    by_measure: dict[Any, tuple[str, ...]] = {}
    for name in names:
        made = _parsed(ir, name)
        try:
            computed = provider.supports(made)
        except Exception as exc:  # assertions, mostly: a parameter it does not take, or one that is missing
            told = re.sub(r"invalid param (\w+)=<object.*", r"needs the parameter \1", str(exc))
            raise ConfigError(f"measures: {name!r}: {told}") from exc
        if not computed:
            raise ConfigError(
                f"measures: {name!r}: nothing here computes it; what ir-measures leaves to a Perl script or to "
                "further packages are not supported"
            )
        by_measure[made] = (*by_measure.get(made, ()), name)
    return Measures(tuple(names), by_measure, provider)


def _parsed(ir: Any, name: object) -> Any:
    try:
        made = ir.parse_measure(name)
    except Exception as exc:  # Python's own parser does the reading: SyntaxError, RecursionError, MemoryError, ...
        raise ConfigError(f"measures: ir-measures knows no {name!r}") from exc
    for parameter, value in made.params.items():
        if not _usable(parameter, value):
            raise ConfigError(f"measures: {name!r}: {parameter} cannot be {value!r}")
    return made


def _usable(parameter: str, value: object) -> bool:
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


def _cutoff(made: Any) -> int | None:
    value = made.params.get("cutoff")
    return value if isinstance(value, int) else None
