"""Two settings over the same queries: how much they differ, and whether that may be chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from colqwen3_retrievers.errors import ConfigError, require
from colqwen3_retrievers.evaluation.paired_tests import Float64, bootstrap_interval, holm, randomisation_test
from colqwen3_retrievers.evaluation.results import Evaluation

_OF_THE_SET = ("set", "pages", "queries")


@dataclass(frozen=True, slots=True)
class MeasureComparison:
    """One measure of two settings.

    Attributes:
        measure: its name.
        a: mean of the first.
        b: mean of the second.
        difference: b - a.
        interval: lower and upper end of the confidence interval of the difference: percentiles of means over queries
            drawn with replacement.
        effect: the mean difference in standard deviations of the differences (Cohen's d for pairs); None where every
            query differs alike.
        p: of the paired randomisation test, two-sided.
        p_t: of the paired t-test, two-sided; None where every query differs alike.
        p_adjusted: ``p`` after Holm's correction for all measures compared.
        wins: queries that b does better.
        ties: queries that are equal.
        losses: queries that a does better.
    """

    measure: str
    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    effect: float | None
    p: float
    p_t: float | None
    p_adjusted: float
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two settings over the same queries.

    Attributes:
        n_queries: queries that both were judged on.
        confidence: of the intervals, 0 to 1.
        rows: a comparison for each measure.
        differing: settings that are not the same, as ``{"encoder.pool_factor": (1, 3)}``; None where one of the
            evaluations does not know its own, as of a run that was only judged.
    """

    n_queries: int
    confidence: float
    rows: tuple[MeasureComparison, ...]
    differing: Mapping[str, tuple[Any, Any]] | None = None

    def __str__(self) -> str:
        """Lay it out as a table."""
        if self.differing is None:
            lines = ["what A and B were made with is not known of both"]
        elif not self.differing:
            lines = ["A and B were made with the same settings"]
        else:
            lines = [f"{name}: A {a!r}, B {b!r}" for name, (a, b) in self.differing.items()]
        lines += [
            f"{self.n_queries} queries, paired; p of the randomisation test, and Holm's over {len(self.rows)} measures",
            f"{'measure':12} {'A':>7} {'B':>7} {'B - A':>8}  {f'{self.confidence:.0%} interval':19} {'effect':>7} "
            f"{'p':>7} {'Holm':>7} {'t-test':>7}  win/tie/loss",
        ]
        for row in self.rows:
            effect = "-" if row.effect is None else f"{row.effect:+.2f}"
            t_test = "-" if row.p_t is None else f"{row.p_t:.4f}"
            lines.append(
                f"{row.measure:12} {row.a:7.4f} {row.b:7.4f} {row.difference:+8.4f}  "
                f"[{row.interval[0]:+.4f}, {row.interval[1]:+.4f}]  {effect:>7} {row.p:7.4f} {row.p_adjusted:7.4f} "
                f"{t_test:>7}  {row.wins}/{row.ties}/{row.losses}"
            )
        return "\n".join(lines)


def compare(
    a: Evaluation,
    b: Evaluation,
    *,
    measures: Sequence[str] | None = None,
    allow_other_set: bool = False,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two evaluations of the same queries.

    The test is Fisher's paired randomisation test on the mean difference (Smucker, Allan and Carterette 2007): signs of
    the queries' differences are flipped, in all 2^n ways where these are at most ``resamples``, else at random, the
    observed one counted too so that p is never 0 (Phipson and Smyth 2010). The t-test stands beside it.

    Args:
        a: the first, what was there before.
        b: the second.
        measures: which; by default all that both have. The more are looked at, the stricter Holm's correction.
        allow_other_set: whether the names of the sets and the numbers of pages and queries may differ. Otherwise they
            may not: among fewer pages, the same ones are found more easily.
        resamples: random flips, and draws of the bootstrap, from 100.
        confidence: of the interval, between 0 and 1.
        seed: of the random numbers.

    Raises:
        ConfigError: other queries, judgements or pages, no common measure, a damaged evaluation, or an argument that
            cannot be used.
        MissingExtraError: scipy is not installed (extra ``eval``).

    >>> from colqwen3_retrievers.evaluation import judge
    >>> qrels = {f"q{i}": {"x": 1} for i in range(8)}
    >>> worse = judge({q: {"x": 1.0, "y": 2.0} for q in qrels}, qrels, k=[1])      # needs the extra eval
    >>> better = judge({q: {"x": 2.0, "y": 1.0} for q in qrels}, qrels, k=[1])
    >>> row = compare(worse, better, measures=["nDCG@1"]).rows[0]
    >>> row.difference, row.p, row.wins                                            # 2 of the 2^8 ways
    (1.0, 0.0078125, 8)
    """
    if isinstance(resamples, bool) or not isinstance(resamples, int) or resamples < 100:
        raise ConfigError(f"resamples: expected a whole number from 100, got {resamples!r}")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence: expected a number between 0 and 1, got {confidence!r}")
    for letter, made in (("A", a), ("B", b)):
        try:
            made.check()
        except ConfigError as exc:
            raise ConfigError(f"{letter}: {exc}") from exc
    names = [name for name in a.measures if name in b.measures] if measures is None else list(dict.fromkeys(measures))
    for name in names:
        if name not in a.per_query or name not in b.per_query:
            raise ConfigError(f"measures: {name!r} is not in both evaluations")
    if not names:
        raise ConfigError("measures: the evaluations have none in common")
    if {q: dict(pages) for q, pages in a.qrels.items()} != {q: dict(pages) for q, pages in b.qrels.items()}:
        raise ConfigError("qrels: the evaluations were judged by different judgements")
    differing = _differing(a.settings, b.settings)
    others = [name for name in _OF_THE_SET if differing and None not in differing.get(name, (None,))]
    if others and differing and not allow_other_set:
        told = "; ".join(f"{name}: A {differing[name][0]!r}, B {differing[name][1]!r}" for name in others)
        raise ConfigError(f"the evaluations are of different sets ({told}); allow_other_set compares them all the same")
    queries = list(a.per_query[names[0]])
    require("eval", "scipy")
    found = [
        _row(
            name,
            np.array([a.per_query[name][query] for query in queries]),
            np.array([b.per_query[name][query] for query in queries]),
            resamples,
            confidence,
            seed,
        )
        for name in names
    ]
    adjusted = holm([row.p for row in found])
    rows = [
        MeasureComparison(
            row.measure, row.a, row.b, row.difference, row.interval, row.effect, row.p, row.p_t, p, row.wins, row.ties,
            row.losses,
        )
        for row, p in zip(found, adjusted, strict=True)
    ]  # fmt: skip
    return Comparison(len(queries), confidence, tuple(rows), differing)


def _differing(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> dict[str, tuple[Any, Any]] | None:
    if a is None or b is None:
        return None
    first, second = _flat(a), _flat(b)
    names = dict.fromkeys([*first, *second])
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{name}.")
        else:
            flat[f"{above}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _row(name: str, a: Float64, b: Float64, resamples: int, confidence: float, seed: int) -> MeasureComparison:
    from scipy import stats

    differences = b - a
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    mean = float(differences.mean())
    varied = spread > 1e-12
    p = randomisation_test(differences, resamples, seed)
    return MeasureComparison(
        name,
        float(a.mean()),
        float(b.mean()),
        mean,
        bootstrap_interval(differences, resamples, confidence, seed),
        mean / spread if varied else None,
        p,
        float(stats.ttest_rel(b, a).pvalue) if varied else None,
        p,
        int((differences > 0).sum()),
        int((differences == 0).sum()),
        int((differences < 0).sum()),
    )
