"""Evaluation of retrieval: measures over local sets of queries, comparison of two settings, and mteb's tasks.

Requires the extra ``eval`` for measures, comparisons and reading TREC files, and the extra ``mteb`` for
:class:`MtebSearch` and :func:`run_mteb`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from colqwen3_retrievers.lazy import lazy_names

if TYPE_CHECKING:
    from colqwen3_retrievers.evaluation.comparison import Comparison as Comparison
    from colqwen3_retrievers.evaluation.comparison import MeasureComparison as MeasureComparison
    from colqwen3_retrievers.evaluation.comparison import compare as compare
    from colqwen3_retrievers.evaluation.judged import JudgedSet as JudgedSet
    from colqwen3_retrievers.evaluation.judged import read_judged_set as read_judged_set
    from colqwen3_retrievers.evaluation.measuring import evaluate as evaluate
    from colqwen3_retrievers.evaluation.measuring import judge as judge
    from colqwen3_retrievers.evaluation.mteb import MtebRun as MtebRun
    from colqwen3_retrievers.evaluation.mteb import MtebSearch as MtebSearch
    from colqwen3_retrievers.evaluation.mteb import run_mteb as run_mteb
    from colqwen3_retrievers.evaluation.results import Evaluation as Evaluation
    from colqwen3_retrievers.evaluation.trec import read_qrels as read_qrels
    from colqwen3_retrievers.evaluation.trec import read_run as read_run
    from colqwen3_retrievers.evaluation.trec import write_qrels as write_qrels
    from colqwen3_retrievers.evaluation.trec import write_run as write_run

_WHERE = {
    "Comparison": "comparison",
    "Evaluation": "results",
    "JudgedSet": "judged",
    "MeasureComparison": "comparison",
    "MtebRun": "mteb",
    "MtebSearch": "mteb",
    "compare": "comparison",
    "evaluate": "measuring",
    "judge": "measuring",
    "read_judged_set": "judged",
    "read_qrels": "trec",
    "read_run": "trec",
    "run_mteb": "mteb",
    "write_qrels": "trec",
    "write_run": "trec",
}

__all__ = sorted(_WHERE)  # noqa: PLE0605 - one table says both what is public and where it lies

__getattr__, __dir__ = lazy_names(__name__, _WHERE)
