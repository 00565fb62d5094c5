"""mteb's retrieval tasks through the whole pipeline: encoder, pooling, store, search.

mteb supplies a corpus and queries, and asks for pages and scores; the measures are its own.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from colqwen3_retrievers.cache.page_cache import PageEmbeddingCache
from colqwen3_retrievers.errors import CheckpointError, ColQwen3Error, ConfigError, MissingExtraError, require
from colqwen3_retrievers.evaluation.measuring import encoder_settings
from colqwen3_retrievers.index.page_adder import PageEncoder
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.pages.files import user_path
from colqwen3_retrievers.pages.page import Page, Query

_MAX_CACHED = 64 * 2**30  # bytes; at most half of the free disk, as the index needs the rest


class MtebSearch:
    """An encoder and its store as mteb's ``SearchProtocol``.

    A row of a corpus is its image if it has one (its text joins it with ``include_text`` only), else its title and
    text. Each split and subset has an index of its own, in a temporary folder, which is removed before the next one. A
    page is encoded once: subsets that ask about the same pages in other languages take token embeddings from a cache.

    Args:
        encoder: encodes pages and queries.
        folder: for the indexes; None takes a temporary folder. :meth:`close` removes what was written there.
        exact: whether to score every page; False measures the default search.

    >>> import mteb                                                                        # doctest: +SKIP
    >>> with MtebSearch(ColQwen3Encoder("tiny")) as search:                                # doctest: +SKIP
    ...     mteb.evaluate(search, mteb.get_tasks(tasks=["VidoreDocVQARetrieval"]))
    """

    def __init__(self, encoder: PageEncoder, *, folder: str | Path | None = None, exact: bool = False) -> None:
        require("mteb", "mteb")
        self._encoder = encoder
        self._exact = exact
        self._folder = tempfile.TemporaryDirectory(prefix="colqwen3-mteb-", dir=folder)
        self._index: PageIndex | None = None
        self._n_indexes = 0
        place = Path(self._folder.name)
        capacity = min(_MAX_CACHED, shutil.disk_usage(place).free // 2)
        self._cache = PageEmbeddingCache(encoder, capacity, folder=place / "embeddings")

    def index(
        self,
        corpus: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        encode_kwargs: Mapping[str, Any],
        num_proc: int | None = None,
        **kwargs: Any,  # mteb's signature
    ) -> None:
        """Encode a corpus and index it, in place of the one before.

        Of mteb's arguments, ``corpus`` (rows with ``id``, and ``image`` or ``text`` and ``title``) and the
        ``batch_size`` and ``show_progress_bar`` of ``encode_kwargs`` are used.

        Raises:
            ConfigError: a row with neither image nor text, or a duplicate id.
        """
        repeated = [key for key, count in Counter(map(str, corpus["id"])).items() if count > 1]
        if repeated:  # the second of two equal pages would be left out, and mteb would count a page that is missing
            raise ConfigError(f"corpus: the id {repeated[0]!r} comes twice")
        self._remove_index()
        self._n_indexes += 1
        self._index = PageIndex.open(self._index_folder, self._encoder, images="none")
        self._index.add(
            _pages(corpus),
            batch_size=int(encode_kwargs.get("batch_size", 16)),
            show_progress=bool(encode_kwargs.get("show_progress_bar", False)),
            cache=self._cache,
        )

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        encode_kwargs: Mapping[str, Any],
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        num_proc: int | None = None,
        **kwargs: Any,  # mteb's signature
    ) -> dict[str, dict[str, float]]:
        """Search the corpus for each query.

        Of mteb's arguments, ``queries`` (rows with ``id``, and ``text`` or ``image``), ``top_k``, ``top_ranked`` (of
        reranking tasks: query id -> ids of the pages to rank) and the ``batch_size`` of ``encode_kwargs`` are used.

        Returns:
            Query id -> page id -> score.

        Raises:
            ConfigError: nothing was indexed, or a query with neither text nor image.
        """
        index = self._index
        if index is None:
            raise ConfigError("search: mteb has given no corpus yet")
        by_id = {str(row["id"]): _query(row) for row in queries}
        if len(by_id) != len(queries):
            raise ConfigError("queries: an id comes twice")
        k, size = min(top_k, max(1, len(index))), int(encode_kwargs.get("batch_size", 32))
        ids, questions = list(by_id), list(by_id.values())
        if top_ranked is not None:
            candidates = ({"id": {"$in": list(top_ranked.get(key, ()))}} for key in ids)
            hits = [
                index.search(question, k, where=where, exact=True)
                for question, where in zip(questions, candidates, strict=True)
            ]
        else:
            hits = [
                row
                for at in range(0, len(ids), size)
                for row in index.search_many(questions[at : at + size], k, exact=self._exact)
            ]
        return {key: {hit.page.id: float(hit.score) for hit in row} for key, row in zip(ids, hits, strict=True)}

    @property
    def mteb_model_meta(self) -> Any:
        """The model and the settings of its multi-vectors, which mteb files results under."""
        meta = require("mteb", "mteb.models.model_meta").ModelMeta
        info = self._encoder.info
        name = info.model if info.model.count("/") == 1 else f"local/{Path(info.model).name or 'model'}"
        settings = {
            "dim": info.dim, "pool_factor": info.pool_factor, "pool_method": info.pool_method,
            "max_visual_tokens": info.max_visual_tokens, "include_text": info.include_text, "exact": self._exact,
            **encoder_settings(self._encoder),
        }  # fmt: skip
        return meta.create_empty(
            {
                "name": name, "revision": info.revision or info.fingerprint[:12], "modalities": ["text", "image"],
                "embed_dim": info.dim, "model_type": ["late-interaction"], "similarity_fn_name": "MaxSim",
                "experiment_kwargs": settings,
            }
        )  # fmt: skip

    def close(self) -> None:
        """Remove the index and the cache; the encoder stays open."""
        self._remove_index()
        self._cache.close()
        self._folder.cleanup()

    @property
    def _index_folder(self) -> Path:
        return Path(self._folder.name) / str(self._n_indexes)

    def _remove_index(self) -> None:
        if self._index is not None:
            self._index.close()
            self._index = None
            shutil.rmtree(self._index_folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class MtebRun:
    """Scores of tasks.

    Attributes:
        scores: task -> subset and split -> its main score, 0 to 1.
        failed: task -> the reason that it has none.
        means: benchmark -> mean of its tasks, each the mean of its parts, as mteb's "Mean (Task)"; None if a task
            failed.
    """

    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    means: dict[str, float | None] = field(default_factory=dict)


Report = Callable[[str, MtebRun], None]
"""Called with the name of each finished task and all scores so far."""


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

    A task whose data cannot be loaded, or that fails, is recorded with its error, and the others are run.

    Args:
        encoder: encodes pages and queries.
        names: benchmarks, as ``"ViDoRe(v2)"``, or tasks, as ``"VidoreDocVQARetrieval"``.
        exact: whether to score every page.
        batch_size: pages committed together, and queries searched together.
        results: folder for mteb's own result files, by model and settings. Tasks that have one are not run again, so
            that an interrupted run resumes. None keeps none.
        report: called after each task.

    Raises:
        ConfigError: an unknown name, or a folder that cannot be made.
        CheckpointError: the model cannot be loaded.
        MissingExtraError: mteb is not installed (extra ``mteb``), or a dependency of the engine.

    >>> run_mteb(ColQwen3Encoder("tiny"), ["ViDoRe(v2)"]).means                            # doctest: +SKIP
    {'ViDoRe(v2)': 0.41}
    """
    mteb = require("mteb", "mteb")
    benchmarks = {name: _tasks(mteb, name) for name in names}
    try:
        cache = mteb.ResultCache(user_path(results)) if results is not None else None
    except OSError as exc:
        raise ConfigError(f"results {results}: cannot be made: {exc.strerror or exc}") from exc
    run = MtebRun()
    means: dict[Any, float] = {}
    with MtebSearch(encoder, exact=exact) as search:
        _ = encoder.info  # a model that cannot be loaded fails here, and not once for each task
        for key, task in {_key(task): task for tasks in benchmarks.values() for task in tasks}.items():
            name = str(task.metadata.name)
            try:
                scores = _scores(mteb, search, task, cache, batch_size)
            except (CheckpointError, MissingExtraError):
                raise
            except Exception as exc:  # a data set, its loading script and the hub may raise anything
                kind = "" if isinstance(exc, ColQwen3Error) else f"{type(exc).__name__}: "
                run.failed[name] = f"{kind}{' '.join(str(exc).split())[:500]}"
            else:
                means[key] = statistics.fmean(scores.values())
                run.scores[name] = run.scores.get(name, {}) | scores
            if report is not None:
                report(name, run)
    for name, tasks in benchmarks.items():
        scored = [means[_key(task)] for task in tasks if _key(task) in means]
        run.means[name] = statistics.fmean(scored) if len(scored) == len(tasks) else None
    return run


def _tasks(mteb: Any, name: str) -> list[Any]:
    try:
        return list(mteb.get_benchmark(name).tasks)
    except (KeyError, ValueError):
        try:
            return [mteb.get_task(name)]
        except (KeyError, ValueError) as exc:
            raise ConfigError(f"mteb: knows no benchmark or task {name!r}") from exc


def _key(task: Any) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    return str(task.metadata.name), tuple(task.hf_subsets), tuple(task.eval_splits)


def _scores(mteb: Any, search: MtebSearch, task: Any, cache: Any, batch_size: int) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dataset for private task")  # reported as a failed task
        result = mteb.evaluate(
            search, task, cache=cache, encode_kwargs={"batch_size": batch_size}, show_progress_bar=False
        )
    if result.exceptions:  # mteb only warns of a private data set
        raise ConfigError(f"its data set is private, or there is none: {result.exceptions[0].exception}")
    scores = {
        f"{row['hf_subset']} {split}": float(row["main_score"])
        for task_result in result.task_results
        for split, rows in task_result.scores.items()
        for row in rows
        if split in task.eval_splits and row["hf_subset"] in task.hf_subsets  # a result file may hold others too
    }
    if not scores:
        raise ConfigError("mteb gave no scores")
    return scores


def _pages(corpus: Any) -> Iterator[Page]:
    for row in corpus:
        image = row.get("image")
        text = " ".join(part for part in (row.get("title"), row.get("text")) if part).strip()
        if image is None and not text:
            raise ConfigError(f"corpus: row {row['id']!r} has neither image nor text")
        yield Page(id=str(row["id"]), image=image, text=text)


def _query(row: Mapping[str, Any]) -> Query:
    text = row.get("text")
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"queries: row {row['id']!r} is a conversation; a query is one text")
    instruction = row.get("instruction")
    return Query(f"{text} {instruction}" if text and instruction else text or None, row.get("image"))
