"""Asking an index every query of a judged set, and judging what it finds, with ir-measures."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError, EncodeError
from colqwen3_retrievers.evaluation.judged import JudgedSet
from colqwen3_retrievers.evaluation.measures import DEFAULT_CUTOFFS, Measures, parse_measures
from colqwen3_retrievers.evaluation.results import Evaluation
from colqwen3_retrievers.evaluation.trec import Qrels, Run, check_relevance, check_score
from colqwen3_retrievers.index.page_adder import PageEncoder
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.pages.page import Query
from colqwen3_retrievers.vectors.multi_vector import MultiVector


def judge(run: Run, qrels: Qrels, *, k: Sequence[int] = DEFAULT_CUTOFFS, measures: Sequence[str] = ()) -> Evaluation:
    """Judge a run.

    Ranks are those of the run: pages by score, equal scores by page id, as everywhere in this library (trec_eval by
    itself would take equal scores by id downwards). nDCG takes the relevance as the gain and log2(rank + 1) as the
    discount (Järvelin and Kekäläinen 2002). A query without a relevant page cannot be judged: no mean counts it. A
    judged query for which nothing was found counts 0.

    Args:
        run: query id -> page id -> score, in any order.
        qrels: query id -> page id -> relevance; below 1 is not relevant.
        k: cutoffs of nDCG, recall (``R``), success and MRR (``RR``).
        measures: more of them by their ir-measures names, as ``"AP@100"``.

    Raises:
        ConfigError: an unknown measure, a score that is not finite, a relevance that is no whole number or beyond
            10,000, or no query with a relevant page.
        MissingExtraError: ir-measures is not installed (extra ``eval``).

    >>> judge({"q1": {"a": 1.0, "b": 2.0}}, {"q1": {"a": 1}}, k=[1, 2]).measures["RR@2"]   # needs the extra eval
    0.5
    """
    asked = parse_measures(k, measures)
    for query, pages in qrels.items():
        for page, relevance in pages.items():
            check_relevance(relevance, f"qrels: query {query!r}, page {page!r}")
    judged = {query: pages for query, pages in qrels.items() if any(relevance > 0 for relevance in pages.values())}
    if not judged:
        raise ConfigError("qrels: no query has a relevant page")
    ordered = {query: _ordered(query, pages) for query, pages in run.items()}
    by_rank = {  # scores that say the rank alone: tools order equal scores, and those beyond float32, in their own way
        query: {page: float(len(pages) - rank) for rank, page in enumerate(pages)} for query, pages in ordered.items()
    }
    gains = {query: {page: max(0, rel) for page, rel in pages.items()} for query, pages in judged.items()}
    per_query = asked.calculate(gains, by_rank)
    means = {name: math.fsum(values.values()) / len(values) for name, values in per_query.items()}
    unjudged = tuple(query for query in {**qrels, **run} if query not in judged)
    return Evaluation(means, per_query, ordered, {query: dict(pages) for query, pages in qrels.items()}, unjudged)


def evaluate(
    index: PageIndex,
    judged: JudgedSet,
    *,
    k: Sequence[int] = DEFAULT_CUTOFFS,
    measures: Sequence[str] = (),
    depth: int | None = None,
    exact: bool = False,
    allow_unknown_pages: bool = False,
    batch_size: int = 64,
) -> Evaluation:
    """Search an index for every query and judge what is found.

    Args:
        index: what is searched, as a user would search it: its encoder, pooling, codes and store.
        judged: queries and judgements.
        k: cutoffs of nDCG, recall (``R``), success and MRR (``RR``).
        measures: more of them by their ir-measures names, as ``"AP@100"``.
        depth: how many pages are asked for, at least the largest cutoff; by default just that, or 100 when a measure
            has none. A deeper search also looks at more candidates.
        exact: whether to score every page; False measures what a search finds by default.
        allow_unknown_pages: whether relevant pages that the index does not hold count as not found; otherwise they are
            an error, as they mostly mean that ids are written otherwise.
        batch_size: queries searched together.

    Returns:
        Means, values of each query, the run, and times.

    Raises:
        ConfigError: an argument that cannot be used, or judgements of pages that the index does not hold.
        MissingExtraError: ir-measures is not installed (extra ``eval``).

    >>> evaluate(PageIndex.open("my-index"), read_judged_set("my-queries")).measures       # doctest: +SKIP
    {'nDCG@1': 0.91, 'nDCG@5': 0.94, ...}
    """
    deep = check_depth(parse_measures(k, measures), depth)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size: expected a whole number from 1, got {batch_size!r}")
    held = set(index.ids())
    unknown = sorted({page for query in judged.qrels for page in judged.relevant(query)} - held)
    if unknown and not allow_unknown_pages:
        example = f"; it holds {min(held)!r}" if held else ""
        raise ConfigError(
            f"{index.location}: {len(unknown)} relevant pages are not in the index: {', '.join(unknown[:3])}{example}"
        )
    clock = time.perf_counter
    start = clock()
    encode_queries(index.encoder, dict(itertools.islice(judged.queries.items(), 1)))  # loading is not told as encoding
    loaded = clock()
    made = encode_queries(index.encoder, judged.queries)
    encoded = clock()
    found = [
        hits
        for at in range(0, len(made), batch_size)
        for hits in index.search_many(made[at : at + batch_size], deep, exact=exact)
    ]
    searched = clock()
    run = {
        query: {hit.page.id: float(hit.score) for hit in hits}
        for query, hits in zip(judged.queries, found, strict=True)
    }
    got = judge(run, judged.qrels, k=k, measures=measures)
    settings = {
        "set": judged.name, "index": index.location, "pages": len(held), "queries": len(made), "depth": deep,
        "exact": exact, **how_encoded(index.encoder), "encoder": index.info.to_dict(),
    }  # fmt: skip
    seconds = {"load": loaded - start, "encode": encoded - loaded, "search": searched - encoded}
    return Evaluation(got.measures, got.per_query, got.run, got.qrels, got.unjudged, tuple(unknown), settings, seconds)


def how_encoded(encoder: PageEncoder) -> dict[str, Any]:
    """Give what bears on numbers and is no part of an index's own settings, as far as an encoder tells.

    >>> from colqwen3_retrievers import ColQwen3Encoder
    >>> how_encoded(ColQwen3Encoder("tiny", engine="torch", dtype="bfloat16"))["dtype"]
    'bfloat16'
    """
    if not isinstance(encoder, ColQwen3Encoder):
        return {}
    told = encoder.to_dict()
    return {name: told[name] for name in ("engine", "device", "dtype")}


def encode_queries(encoder: PageEncoder, queries: Mapping[str, Query | str]) -> list[MultiVector]:
    """Encode queries by id.

    Returns:
        A multi-vector (n_tokens, dim) for each, in order.

    Raises:
        EncodeError: one cannot be encoded; it names the query.
    """
    try:
        return encoder.submit_queries(list(queries.values())).result()
    except EncodeError as exc:
        if exc.index is None or not 0 <= exc.index < len(queries):
            raise
        raise exc.at(exc.index, f"query {list(queries)[exc.index]!r}") from exc


def check_depth(measures: Measures, depth: int | None) -> int:
    """Settle how many pages are asked for.

    Raises:
        ConfigError: no whole number from 1, or less than a cutoff: that measure would be of a shorter list, under its
            own name.

    >>> check_depth(parse_measures([10]), None)                                        # needs the extra eval
    10
    """
    if depth is None:
        return measures.depth
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ConfigError(f"depth: expected a whole number from 1, got {depth!r}")
    name, cutoff = measures.cutoff
    if depth < cutoff:
        raise ConfigError(f"depth: {depth} pages are too few for {name}; give at least {cutoff}, or smaller cutoffs")
    return depth


def _ordered(query: str, pages: Mapping[str, float]) -> dict[str, float]:
    scored = {page: check_score(score, f"query {query!r}, page {page!r}") for page, score in pages.items()}
    return dict(sorted(scored.items(), key=lambda item: (-item[1], item[0])))
