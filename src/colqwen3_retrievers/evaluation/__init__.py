"""Evaluation of retrieval: measures over local sets of queries, comparison of two settings, and mteb's tasks.

Requires the extra ``eval`` for measures, comparisons and reading TREC files, and the extra ``mteb`` for
:class:`MtebSearch` and :func:`run_mteb`.
"""

from colqwen3_retrievers.evaluation.comparison import Comparison, MeasureComparison, compare
from colqwen3_retrievers.evaluation.judged import JudgedSet, read_judged_set
from colqwen3_retrievers.evaluation.measuring import evaluate
from colqwen3_retrievers.evaluation.mteb import MtebRun, MtebSearch, run_mteb
from colqwen3_retrievers.evaluation.results import Evaluation, judge
from colqwen3_retrievers.evaluation.trec import read_qrels, read_run, write_qrels, write_run

__all__ = [
    "Comparison", "Evaluation", "JudgedSet", "MeasureComparison", "MtebRun", "MtebSearch", "compare", "evaluate",
    "judge", "read_judged_set", "read_qrels", "read_run", "run_mteb", "write_qrels", "write_run",
]  # fmt: skip
