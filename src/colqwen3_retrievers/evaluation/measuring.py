"""Searches an index for every query of a judged set, and judges the results."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError, EncodeError
from colqwen3_retrievers.evaluation.judged import JudgedSet
from colqwen3_retrievers.evaluation.measures import DEFAULT_CUTOFFS, parse_measures
from colqwen3_retrievers.evaluation.results import Evaluation, judge
from colqwen3_retrievers.index.page_adder import PageEncoder
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.pages.page import Query
from colqwen3_retrievers.vectors.multi_vector import MultiVector


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
    """Search an index for every query and judge the results.

    Args:
        index: searched as a user would search it, with its encoder, pooling, codes and store.
        judged: queries and judgements.
        k: cutoffs of nDCG, recall (``R``), success and MRR (``RR``).
        measures: further measures by their ir-measures names, as ``"AP@100"``.
        depth: pages to retrieve, at least the largest cutoff; by default that, or 100 if a measure has none. A deeper
            search also scores more candidates.
        exact: whether to score every page; False measures the default search.
        allow_unknown_pages: whether relevant pages that the index does not hold count as not found. By default they are
            an error, as they usually mean that ids are written in another way.
        batch_size: queries searched together.

    Returns:
        Means, values of each query, the run, and times.

    Raises:
        ConfigError: an argument that cannot be used, or judgements of pages that the index does not hold.
        MissingExtraError: ir-measures is not installed (extra ``eval``).

    >>> evaluate(PageIndex.open("my-index"), read_judged_set("my-queries")).measures       # doctest: +SKIP
    {'nDCG@1': 0.91, 'nDCG@5': 0.94, ...}
    """
    depth = parse_measures(k, measures).depth(depth)
    batch_size = whole_number(batch_size, "batch_size", least=1)
    ids = set(index.ids())
    unknown = sorted({page for query in judged.qrels for page in judged.relevant(query)} - ids)
    if unknown and not allow_unknown_pages:
        example = f"; it holds {min(ids)!r}" if ids else ""
        raise ConfigError(
            f"{index.location}: {len(unknown)} relevant pages are not in the index: {', '.join(unknown[:3])}{example}"
        )
    clock = time.perf_counter
    start = clock()
    encode_queries(index.encoder, dict(itertools.islice(judged.queries.items(), 1)))  # loads the model, timed apart
    loaded = clock()
    queries = encode_queries(index.encoder, judged.queries)
    encoded = clock()
    results = [
        hits
        for at in range(0, len(queries), batch_size)
        for hits in index.search_many(queries[at : at + batch_size], depth, exact=exact)
    ]
    searched = clock()
    rankings = ({hit.page.id: float(hit.score) for hit in hits} for hits in results)
    run = dict(zip(judged.queries, rankings, strict=True))
    settings = {
        "set": judged.name, "index": index.location, "pages": len(ids), "queries": len(queries), "depth": depth,
        "exact": exact, **encoder_settings(index.encoder), "encoder": index.info.to_dict(),
    }  # fmt: skip
    seconds = {"load": loaded - start, "encode": encoded - loaded, "search": searched - encoded}
    evaluation = judge(run, judged.qrels, k=k, measures=measures)
    return dataclasses.replace(evaluation, unknown_pages=tuple(unknown), settings=settings, seconds=seconds)


def encoder_settings(encoder: PageEncoder) -> dict[str, Any]:
    """Return an encoder's settings that affect scores and are not stored in an index.

    >>> encoder_settings(ColQwen3Encoder("tiny", engine="torch", dtype="bfloat16"))["dtype"]
    'bfloat16'
    """
    if not isinstance(encoder, ColQwen3Encoder):
        return {}
    return {name: value for name, value in encoder.to_dict().items() if name in ("engine", "device", "dtype")}


def encode_queries(encoder: PageEncoder, queries: Mapping[str, Query | str]) -> list[MultiVector]:
    """Encode queries by id.

    Returns:
        A multi-vector (n_tokens, dim) for each, in order.

    Raises:
        EncodeError: a query that cannot be encoded, named by its id.
    """
    try:
        return encoder.submit_queries(list(queries.values())).result()
    except EncodeError as exc:
        if exc.index is None:
            raise
        raise exc.at(exc.index, f"query {list(queries)[exc.index]!r}") from exc
