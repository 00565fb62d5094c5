"""Scoring mteb's benchmarks task by task: what is done is told and kept, whatever becomes of the next one."""

from __future__ import annotations

import contextlib
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colqwen3_retrievers.errors import CheckpointError, ColQwen3Error, ConfigError, MissingExtraError, require
from colqwen3_retrievers.evaluation.mteb_search import MtebSearch
from colqwen3_retrievers.index.page_adder import PageEncoder
from colqwen3_retrievers.pages.files import user_path


@dataclass
class MtebRun:
    """Scores of tasks.

    Attributes:
        scores: task -> subset and split -> its main score, 0 to 1.
        failed: task -> why it has none.
        means: benchmark -> mean of its tasks, each the mean of its parts, as mteb's "Mean (Task)"; None where a task
            failed.
    """

    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    means: dict[str, float | None] = field(default_factory=dict)


Report = Callable[[str, MtebRun], None]
"""Told of each task as it is done, with all that is known so far."""


def run_mteb(
    encoder: PageEncoder,
    names: Sequence[str],
    *,
    exact: bool = False,
    batch_size: int = 16,
    results: str | Path | None = None,
    report: Report | None = None,
) -> MtebRun:
    """Score the pipeline on mteb's benchmarks or tasks.

    A task that cannot be had or run is noted with its error, and the others go on.

    Args:
        encoder: what encodes pages and queries.
        names: benchmarks, as ``"ViDoRe(v2)"``, or tasks, as ``"VidoreDocVQARetrieval"``.
        exact: whether to score every page.
        batch_size: pages committed together, and queries searched together.
        results: folder for mteb's own result files, by model and settings. What is there is not run again, so that an
            interrupted run is gone on with by running it again. None keeps none.
        report: called after each task.

    Raises:
        ConfigError: an unknown name, or a folder that cannot be made.
        CheckpointError: the model cannot be loaded.
        MissingExtraError: mteb is not installed (extra ``mteb``), or what the engine needs.

    >>> run_mteb(ColQwen3Encoder("tiny"), ["ViDoRe(v2)"]).means                            # doctest: +SKIP
    {'ViDoRe(v2)': 0.41}
    """
    mteb = require("mteb", "mteb")
    benchmarks = _tasks(mteb, names)
    try:
        cache = mteb.ResultCache(user_path(results)) if results is not None else None
    except OSError as exc:
        raise ConfigError(f"results {results}: cannot be made: {exc.strerror or exc}") from exc
    run = MtebRun()
    tasks = {_key(task): task for listed in benchmarks.values() for task in listed}
    means: dict[Any, float] = {}
    with MtebSearch(encoder, exact=exact) as search:
        _ = encoder.info  # a model that cannot be had fails here, and not once for each task
        for key, task in tasks.items():
            name = str(task.metadata.name)
            try:
                scores = _scores(mteb, search, task, cache, batch_size)
            except (CheckpointError, MissingExtraError):
                raise
            except Exception as exc:  # whatever a data set, its loading script or the hub comes up with
                kind = "" if isinstance(exc, ColQwen3Error) else f"{type(exc).__name__}: "
                run.failed[name] = f"{kind}{' '.join(str(exc).split())[:500]}"
            else:
                means[key] = statistics.fmean(scores.values())
                run.scores[name] = run.scores.get(name, {}) | scores
            if report is not None:
                report(name, run)
    for name, listed in benchmarks.items():
        done = [means[_key(task)] for task in listed if _key(task) in means]
        run.means[name] = statistics.fmean(done) if len(done) == len(listed) else None
    return run


def _tasks(mteb: Any, names: Sequence[str]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for name in names:
        try:
            found[name] = list(mteb.get_benchmark(name).tasks)
        except (KeyError, ValueError):
            try:
                found[name] = [mteb.get_task(name)]
            except (KeyError, ValueError) as exc:
                raise ConfigError(f"mteb: knows no benchmark or task {name!r}") from exc
    return found


def _key(task: Any) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    return str(task.metadata.name), tuple(task.hf_subsets), tuple(task.eval_splits)


def _scores(mteb: Any, search: MtebSearch, task: Any, cache: Any, batch_size: int) -> dict[str, float]:
    with _quiet():
        done = mteb.evaluate(
            search, task, cache=cache, encode_kwargs={"batch_size": batch_size}, show_progress_bar=False
        )
    if done.exceptions:  # a private data set: mteb warns, and goes on
        raise ConfigError(f"its data set is private, or there is none: {done.exceptions[0].exception}")
    wanted = _parts(task)
    scores = {
        f"{row['hf_subset']} {split}": float(row["main_score"])
        for result in done.task_results
        for split, rows in result.scores.items()
        for row in rows
        if (split, row["hf_subset"]) in wanted  # a result file may hold more than was asked for
    }
    if not scores:
        raise ConfigError("mteb gave no scores")
    return scores


def _parts(task: Any) -> set[tuple[str, str]]:
    return {(str(split), str(subset)) for split in task.eval_splits for subset in task.hf_subsets}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out mteb's warning of a private task, which is reported as a failed one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dataset for private task")
        yield
