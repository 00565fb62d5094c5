"""Two-stage search: every page's code is looked at, and those that may be among the best are scored exactly.

The first stage estimates MaxSim from codes (:mod:`~colqwen3_retrievers.vectors.codes`). The second scores the
candidates from their token embeddings, and knows then by how much the estimates of this query were off; while the best
page that was left out could still belong to the ``k`` best by such an error, the candidates are doubled. So near ties
are looked into as far as needed, and a clear answer costs little. A score is always MaxSim of token embeddings; what
may happen is that a page is missed.
"""

from __future__ import annotations

from collections.abc import Mapping
from sqlite3 import Connection
from typing import Final

import numpy as np
from numpy.typing import NDArray

from colqwen3_retrievers.stores.embedded.catalogue import Segment
from colqwen3_retrievers.stores.embedded.extents import Extents
from colqwen3_retrievers.stores.embedded.files import StoreFiles, best
from colqwen3_retrievers.stores.protocol import GroupBy
from colqwen3_retrievers.vectors.codes import query_codes
from colqwen3_retrievers.vectors.multi_vector import Float32, PackedEmbeddings

EXACT_PAGES: Final = 500
"""Up to so many pages are all scored exactly: that takes no longer."""

FEWEST_CANDIDATES: Final = 50
CANDIDATES_PER_HIT: Final = 5
MARGINS: Final = {8: 2.5, 1: 3.25}
"""Standard deviations by which an estimate may be off, beyond the mean error, for each number of bits of the codes. On
2,000 crops by the tiny checkpoint, with 2, 2.5 and 3 recall@10 by int8 is .992, .997 and 1.000, and 72, 108 and 167
pages are scored; by single bits, a row a token, with 2.5, 3.25 and 4 it is .981, .996 and .998, and 249, 496 and 752
pages are scored."""

MOST_DOUBLINGS: Final = 4
"""Then the candidates are left as they are: 800 for ten hits. Among pages that are all alike, as random ones are, no
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
    """Search among the pages of ``extents``; those without a code are all candidates.

    Returns:
        For each query at most ``k`` scores and keys, best first, as
        :func:`~colqwen3_retrievers.stores.embedded.files.best`.

    Raises:
        StoreError: codes or token embeddings are not what was written.
    """
    coded = extents.code_rows > 0
    bare = extents.take(~coded)
    extents = extents.take(coded)
    estimates = files.code_scores(connection, query_codes(queries), extents, segments)
    surely = files.scores(connection, queries, bare, segments)
    found = []
    for i in range(len(queries)):
        search = _Candidates(connection, files, queries[i].astype(np.float32), extents, segments, estimates[i])
        found.append(search.run(k, group_by, bare.keys, surely[i]))
    return found


class _Candidates:
    """One query's candidates among pages with codes."""

    def __init__(
        self,
        connection: Connection,
        files: StoreFiles,
        query: Float32,
        extents: Extents,
        segments: Mapping[int, Segment],
        estimates: Float32,
    ) -> None:
        self._connection = connection
        self._files = files
        self._query = PackedEmbeddings(query, [0, len(query)])
        self._extents = extents
        self._segments = segments
        self._estimates = estimates
        self._scores = np.full(len(estimates), np.nan, dtype=np.float32)  # NaN: no candidate yet

    def run(
        self, k: int, group_by: GroupBy | None, more_keys: NDArray[np.int64], more_scores: Float32
    ) -> list[tuple[float, int]]:
        """Score candidates until no other page could come in; ``more`` are pages scored already."""
        total, at_first = len(self._estimates), max(FEWEST_CANDIDATES, CANDIDATES_PER_HIT * k)
        count = at_first
        while True:
            count = min(count, total)
            self._add(count)
            inside = np.flatnonzero(~np.isnan(self._scores))
            keys = np.concatenate([self._extents.keys[inside], more_keys])
            scores = np.concatenate([self._scores[inside], more_scores])
            picked = best(self._connection, keys, scores, k, group_by)
            if count == total:
                return picked
            if len(picked) == k and (count >= at_first << MOST_DOUBLINGS or not self._may_enter(inside, picked[-1][0])):
                return picked
            count *= 2

    def _add(self, count: int) -> None:
        """Score those of the ``count`` highest estimates that are not scored yet."""
        if count == len(self._estimates):
            highest = np.arange(count)
        else:
            highest = np.argpartition(self._estimates, -count)[-count:]
        new = np.sort(highest[np.isnan(self._scores[highest])])
        if len(new):
            taken = self._extents.take(new)
            self._scores[new] = self._files.scores(self._connection, self._query, taken, self._segments)[0]

    def _may_enter(self, inside: NDArray[np.intp], last: float) -> bool:
        """Whether the best page left out may score ``last`` or more, its estimate being off as the others' were."""
        errors = self._scores[inside] - self._estimates[inside]
        left_out = np.isnan(self._scores)
        off = errors.mean() + MARGINS[self._files.code_bits] * errors.std()
        return bool(self._estimates[left_out].max() + off >= last)
