"""Comparison of two settings over the same queries, with paired significance tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, require
from colqwen3_retrievers.evaluation.results import Evaluation

Float64 = NDArray[np.float64]

_SET_SETTINGS = ("set", "pages", "queries")
_CHUNK = 2_000_000  # resampled differences held at once


@dataclass(frozen=True, slots=True)
class MeasureComparison:
    """A measure of two settings.

    Attributes:
        measure: its name.
        a: mean of the first setting.
        b: mean of the second setting.
        difference: b - a.
        interval: lower and upper end of the confidence interval of the difference: percentiles of means over queries
            drawn with replacement.
        effect: the mean difference in standard deviations of the differences (Cohen's d for pairs); None if all
            differences are equal.
        p: of the paired randomisation test, two-sided.
        p_t: of the paired t-test, two-sided; None if all differences are equal.
        p_adjusted: ``p`` after Holm's correction for all measures compared.
        wins: queries with a higher value in b.
        ties: queries with equal values.
        losses: queries with a higher value in a.
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
        differing: settings that differ, as ``{"encoder.pool_factor": (1, 3)}``; None if one of the evaluations has no
            settings.
    """

    n_queries: int
    confidence: float
    rows: tuple[MeasureComparison, ...]
    differing: Mapping[str, tuple[Any, Any]] | None = None

    def __str__(self) -> str:
        if self.differing is None:
            lines = ["the settings of A and B are not known for both"]
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

    The test is Fisher's paired randomisation test on the mean difference (Smucker, Allan and Carterette 2007,
    https://doi.org/10.1145/1321440.1321528), exact if all 2^n ways to flip the signs of the differences are at most
    ``resamples``. The t-test is reported with it.

    Args:
        a: the first, as of the old setting.
        b: the second.
        measures: names; by default all that both have. More of them make Holm's correction stricter.
        allow_other_set: whether the names of the sets and the numbers of pages and queries may differ. By default they
            may not: among fewer pages, the same ones are easier to find.
        resamples: random flips, and draws of the bootstrap, from 100.
        confidence: of the interval, between 0 and 1.
        seed: of the random numbers.

    Raises:
        ConfigError: other queries, judgements or pages, no common measure, or an argument that cannot be used.
        MissingExtraError: scipy is not installed (extra ``eval``).

    >>> from colqwen3_retrievers.evaluation import judge
    >>> qrels = {f"q{i}": {"x": 1} for i in range(8)}
    >>> worse = judge({q: {"x": 1.0, "y": 2.0} for q in qrels}, qrels, k=[1])      # needs the extra eval
    >>> better = judge({q: {"x": 2.0, "y": 1.0} for q in qrels}, qrels, k=[1])
    >>> row = compare(worse, better, measures=["nDCG@1"]).rows[0]
    >>> row.difference, row.p, row.wins                                            # 2 of the 2^8 ways
    (1.0, 0.0078125, 8)
    """
    resamples = whole_number(resamples, "resamples", least=100)
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence: expected a number between 0 and 1, got {confidence!r}")
    names = [name for name in a.measures if name in b.measures] if measures is None else list(dict.fromkeys(measures))
    for name in names:
        if name not in a.per_query or name not in b.per_query:
            raise ConfigError(f"measures: {name!r} is not in both evaluations")
    if not names:
        raise ConfigError("measures: the evaluations have none in common")
    if {q: dict(pages) for q, pages in a.qrels.items()} != {q: dict(pages) for q, pages in b.qrels.items()}:
        raise ConfigError("qrels: the evaluations were judged by different judgements")
    differing = _differing(a.settings, b.settings)
    of_set = {
        name: values for name, values in (differing or {}).items() if name in _SET_SETTINGS and None not in values
    }
    if of_set and not allow_other_set:
        details = "; ".join(f"{name}: A {first!r}, B {second!r}" for name, (first, second) in of_set.items())
        raise ConfigError(f"the evaluations are of different sets ({details}); allow_other_set compares them anyway")
    queries = list(a.per_query[names[0]])
    require("eval", "scipy")
    rows = []
    for name in names:
        first, second = (np.array([made.per_query[name][query] for query in queries]) for made in (a, b))
        rows.append(_row(name, first, second, resamples, confidence, seed))
    adjusted = holm([row.p for row in rows])
    rows = [replace(row, p_adjusted=p) for row, p in zip(rows, adjusted, strict=True)]
    return Comparison(len(queries), confidence, tuple(rows), differing)


def randomisation_test(differences: Float64, resamples: int, seed: int) -> float:
    """Return the two-sided p-value of the mean of paired differences being 0.

    Args:
        differences: float64 (n_queries,).
        resamples: random flips of signs if there are more than this many ways to flip them. The observed signs count
            too, so that p is never 0 (Phipson and Smyth 2010).
        seed: of the random numbers.

    >>> randomisation_test(np.array([1.0, 2.0, 3.0]), 1000, 0)
    0.25
    """
    from scipy import stats

    flipped = differences[differences != 0]  # flipping a zero changes nothing
    if not len(flipped):
        return 1.0
    total = np.abs(flipped).sum()

    def statistic(values: Float64, axis: int) -> Any:
        # Sums of the same terms in another order differ in their last bits; rounded, they are equal.
        return np.round(np.abs(values.sum(axis=axis)) / total, 12)

    test = stats.permutation_test(
        (flipped,), statistic, permutation_type="samples", alternative="greater", n_resamples=resamples,
        batch=max(1, _CHUNK // len(flipped)), vectorized=True, rng=seed,
    )  # fmt: skip
    return float(test.pvalue)


def bootstrap_interval(differences: Float64, resamples: int, confidence: float, seed: int) -> tuple[float, float]:
    """Return the percentile interval of the mean difference over queries drawn with replacement (Efron 1979).

    Args:
        differences: float64 (n_queries,).
        resamples: draws.
        confidence: of the interval, between 0 and 1.
        seed: of the random numbers.

    >>> bootstrap_interval(np.ones(5), 100, 0.95, 0)
    (1.0, 1.0)
    """
    from scipy import stats

    if len(differences) == 1:
        return float(differences[0]), float(differences[0])
    interval = stats.bootstrap(
        (differences,), np.mean, method="percentile", confidence_level=confidence, n_resamples=resamples,
        batch=max(1, _CHUNK // len(differences)), rng=seed,
    ).confidence_interval  # fmt: skip
    return float(interval.low), float(interval.high)


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[at]))
        adjusted[at] = highest
    return adjusted


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
    varied = spread > 1e-12
    p = randomisation_test(differences, resamples, seed)
    return MeasureComparison(
        measure=name,
        a=float(a.mean()),
        b=float(b.mean()),
        difference=float(differences.mean()),
        interval=bootstrap_interval(differences, resamples, confidence, seed),
        effect=float(differences.mean()) / spread if varied else None,
        p=p,
        p_t=float(stats.ttest_rel(b, a).pvalue) if varied else None,
        p_adjusted=p,
        wins=int((differences > 0).sum()),
        ties=int((differences == 0).sum()),
        losses=int((differences < 0).sum()),
    )
