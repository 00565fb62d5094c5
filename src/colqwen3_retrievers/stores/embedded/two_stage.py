"""Two-stage search: all codes are scanned, and likely pages scored exactly.

The first stage estimates MaxSim from codes (:mod:`~colqwen3_retrievers.vectors.codes`). The second scores the
candidates from their token embeddings, which also measures how far the estimates of this query are off. While the best
page left out could still enter the ``k`` best with such an error, the number of candidates is doubled: near ties are
examined as far as needed, and a clear answer costs little. A score is always MaxSim of token embeddings; a page may be
missed.
"""

from __future__ import annotations

from collections.abc import Mapping
from sqlite3 import Connection
from typing import Final

import numpy as np

from colqwen3_retrievers.stores.embedded.catalogue import Extents, Segment
from colqwen3_retrievers.stores.embedded.files import StoreFiles, best
from colqwen3_retrievers.stores.protocol import GroupBy
from colqwen3_retrievers.vectors.codes import query_codes
from colqwen3_retrievers.vectors.multi_vector import Float32, PackedEmbeddings

EXACT_PAGES: Final = 500
"""Up to so many pages are all scored exactly, which takes no longer."""

FEWEST_CANDIDATES: Final = 50
CANDIDATES_PER_HIT: Final = 5
MARGINS: Final = {8: 2.5, 1: 3.25}
"""Standard deviations by which an estimate may be off, beyond the mean error, for each number of bits of the codes. On
2,000 crops by the tiny checkpoint, with 2, 2.5 and 3 recall@10 by int8 is .992, .997 and 1.000, and 72, 108 and 167
pages are scored; by single bits, a row a token, with 2.5, 3.25 and 4 it is .981, .996 and .998, and 249, 496 and 752
pages are scored."""

MOST_DOUBLINGS: Final = 4
"""After which the search ends, with 800 candidates for ten hits. Where all pages are alike, as random ones are, no
number of candidates would be enough."""


def two_stage(
    connection: Connection,
    files: StoreFiles,
    queries: PackedEmbeddings,
    extents: Extents,
    segments: Mapping[int, Segment],
    k: int,
    group_by: GroupBy | None,
) -> list[list[tuple[float, int]]]:
    """Search among the pages of ``extents``.

    Returns:
        For each query at most ``k`` scores and keys, as :func:`~colqwen3_retrievers.stores.embedded.files.best`.

    Raises:
        StoreError: codes or token embeddings are not what was written.
    """

    def search(query: Float32, estimates: Float32) -> list[tuple[float, int]]:
        packed = PackedEmbeddings(query, [0, len(query)])
        scores = np.full(len(estimates), np.nan, dtype=np.float32)  # NaN: no candidate yet
        at_first = count = max(FEWEST_CANDIDATES, CANDIDATES_PER_HIT * k)
        while True:
            count = min(count, len(estimates))
            highest = np.argpartition(estimates, -count)[-count:]
            new = np.sort(highest[np.isnan(scores[highest])])
            if len(new):
                scores[new] = files.scores(connection, packed, extents.take(new), segments)[0]
            left_out = np.isnan(scores)
            candidates = np.flatnonzero(~left_out)
            hits = best(connection, extents.keys[candidates], scores[candidates], k, group_by)
            if count == len(estimates):
                return hits
            if len(hits) == k:
                errors = scores[candidates] - estimates[candidates]
                highest_left_out = estimates[left_out].max() + errors.mean() + MARGINS[files.code_bits] * errors.std()
                if count >= at_first << MOST_DOUBLINGS or highest_left_out < hits[-1][0]:
                    return hits
            count *= 2

    estimates = files.code_scores(connection, query_codes(queries), extents, segments)
    return [search(queries[i].astype(np.float32), row) for i, row in enumerate(estimates)]
