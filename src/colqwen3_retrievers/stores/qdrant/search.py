"""One search in Qdrant: what is asked, and what the answers say."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from colqwen3_retrievers.errors import require
from colqwen3_retrievers.stores.protocol import GroupBy, Match
from colqwen3_retrievers.stores.qdrant.collection import FULL, POOLED
from colqwen3_retrievers.stores.qdrant.points import BRIEF, BYTES_A_FLOAT, read_record

FEWEST_CANDIDATES: Final = 100


def make_request(rows: NDArray[np.floating[Any]], chosen: Any, limit: int, *, prefetch: int | None, plain: bool) -> Any:
    """Ask for the best pages in one call: candidates by their pooled vectors, then MaxSim of these.

    Args:
        rows: the query, (n_tokens, dim).
        chosen: a filter of Qdrant's, or None.
        limit: most points.
        prefetch: how many candidates, at least ``limit``; None scores every page.
        plain: whether it is for the client's imitation of a server, which scans everything and warns of settings.

    Returns:
        A ``QueryRequest`` of ``qdrant_client.models``.
    """
    models = require("qdrant", "qdrant_client.models", "qdrant-client")
    # In JSON a float32 takes twenty characters. Nine decimals are half as long, and off by a hundredth of what the
    # server's own rounding of queries to float16 changes.
    query = np.round(np.asarray(rows, dtype=np.float64), 9).tolist()
    first = None
    if prefetch is not None:
        # The codes alone find candidates: scoring these once more by unquantised pooled vectors would read the disk for
        # an order that the full vectors are about to make anyway.
        codes = models.SearchParams(quantization=models.QuantizationSearchParams(rescore=False))
        first = models.Prefetch(
            query=query,
            using=POOLED,
            filter=chosen,
            limit=max(limit, prefetch),
            params=None if plain else codes,
        )
    return models.QueryRequest(
        query=query,
        using=FULL,
        prefetch=first,
        filter=chosen,
        limit=limit,
        params=models.SearchParams(exact=True) if first is None and not plain else None,
        with_payload=BRIEF,
    )


def weigh(asked: Any) -> int:
    """Say what a request of :func:`make_request` weighs, counted as floats; see :func:`~.qdrant_points.requests`."""
    rows, chosen = asked.query, asked.filter
    floats = len(rows) * len(rows[0]) + (0 if chosen is None else len(chosen.model_dump_json()) // BYTES_A_FLOAT)
    return floats if asked.prefetch is None else 2 * floats


def best(parts: list[list[Any]], limit: int, k: int, group_by: GroupBy | None) -> list[Match] | None:
    """Pick the ``k`` best of the answers to one query, or tell by None that more has to be seen.

    What an answer leaves out scores no more than its last point, and may score as much: equal scores are ordered by id,
    so that all of them have to be seen before one is picked.

    Args:
        parts: points, best first, of requests whose filters share no page.
        limit: how many each request asked for; an answer of fewer left nothing out.
        k: most matches.
        group_by: ``"source"`` picks the best point of each group.
    """
    unseen = max((part[-1].score for part in parts if len(part) >= limit), default=None)
    ordered = sorted(
        (-point.score, point.payload["id"], n, i) for n, part in enumerate(parts) for i, point in enumerate(part)
    )
    picked: dict[str, Any] = {}
    for _, page_id, n, i in ordered:
        point = parts[n][i]
        picked.setdefault(point.payload["group"] if group_by else page_id, point)
        if len(picked) == k:
            break
    chosen = list(picked.values())
    if unseen is not None and (len(chosen) < k or chosen[-1].score <= unseen):
        return None
    return [Match(read_record(point.payload), float(point.score)) for point in chosen]
