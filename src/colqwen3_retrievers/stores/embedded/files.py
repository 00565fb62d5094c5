"""Reading what an embedded store's files hold: checked against their checksums, scored, and cut to the best."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from colqwen3_retrievers.errors import StoreError
from colqwen3_retrievers.stores.embedded.catalogue import Segment
from colqwen3_retrievers.stores.embedded.extents import Extents
from colqwen3_retrievers.stores.embedded.row_files import CODE_TYPE, ROW_TYPE, Float16, RowFiles, chunks
from colqwen3_retrievers.stores.embedded.rows import Place
from colqwen3_retrievers.stores.protocol import GroupBy
from colqwen3_retrievers.vectors.codes import QueryCodes, code_row_bytes
from colqwen3_retrievers.vectors.kernels import default_kernel, default_scan
from colqwen3_retrievers.vectors.kernels.scan import CodeScan, bit_scan
from colqwen3_retrievers.vectors.late_interaction import Kernel, maxsim
from colqwen3_retrievers.vectors.multi_vector import Float32, PackedEmbeddings

DAMAGED: Final = "are not what was written (their checksum differs): the disk or a copy of the folder is at fault"


class StoreFiles:
    """The token and code files of one store, read with care.

    A page's bytes are compared with their checksum when they are first read, and not again while the files stay as they
    are: so a scan of everything pays for it once.

    Args:
        folder: the store's.
        dim: components of a token embedding.
        kernel: what computes MaxSim; None takes the default when it is first needed.
        scan: what scans codes; None takes the default.
        code_bits: of a component of the codes, 8 or 1.
    """

    def __init__(
        self, folder: Path, dim: int, kernel: Kernel | None, scan: CodeScan | None, code_bits: int = 8
    ) -> None:
        self.folder = folder
        self.tokens = RowFiles(folder, dim, ROW_TYPE)
        self.codes = RowFiles(folder, code_row_bytes(dim, code_bits), CODE_TYPE)
        self._dim, self.code_bits = dim, code_bits
        self._kernel = kernel
        self._scan = scan
        self._seen: dict[str, NDArray[np.bool_]] = {}  # by file: which keys were compared; it only ever gains

    def check(self, segment: Segment) -> None:
        """Make sure that the committed rows are there; a missing code file is no fault, for codes can be made again.

        Raises:
            StoreError: a file is cut, or the token file is missing.
        """
        self.tokens.check(segment.name, segment.rows)
        if segment.codes and self.codes.exists(segment.codes):
            self.codes.check(segment.codes, segment.code_rows)

    def truncate(self, segments: Mapping[int, Segment]) -> None:
        """Cut off what was never committed."""
        for segment in segments.values():
            self.tokens.truncate(segment.name, segment.rows)
            if segment.codes and self.codes.exists(segment.codes):
                self.codes.truncate(segment.codes, segment.code_rows)

    def keep(self, segments: Mapping[int, Segment]) -> None:
        """Let go of maps of files that are no longer of the store."""
        names = {name for segment in segments.values() for name in (segment.name, segment.codes)}
        self.tokens.keep(names)
        self.codes.keep(names)
        for name in [name for name in self._seen if name not in names]:
            self._seen.pop(name, None)

    def close(self) -> None:
        """Let go of all maps."""
        self.tokens.close()
        self.codes.close()

    def page(self, page_id: str, place: Place, segments: Mapping[int, Segment]) -> Float16:
        """Give a page's token embeddings, compared with their checksum.

        Raises:
            StoreError: they are not what was written; it names the file and the page.
        """
        segment = segments[place.segment]
        stored: Float16 = self.tokens.rows(segment.name, segment.rows)[place.start : place.start + place.rows]
        if zlib.crc32(stored.data) != place.crc32:
            raise self._damaged(segment.name, "token embeddings", page_id)
        return stored

    def scores(
        self, connection: Connection, queries: PackedEmbeddings, extents: Extents, segments: Mapping[int, Segment]
    ) -> Float32:
        """Score every page of ``extents`` against every query, from its token embeddings.

        Returns:
            float32 (n_queries, n_pages).

        Raises:
            StoreError: token embeddings are not what was written.
        """
        scores = np.empty((len(queries), len(extents.keys)), dtype=np.float32)
        kernel = self._kernel or default_kernel()
        for number, inside in by_segment(extents):
            segment = segments[number]
            mapped = self.tokens.rows(segment.name, segment.rows)
            starts, rows = extents.starts[inside], extents.rows[inside]
            self._compare(connection, segment.name, mapped, extents.keys[inside], starts, rows, extents.crc32[inside])
            for part, packed in chunks(mapped, starts, rows):
                scores[:, inside[part]] = maxsim(queries, packed, kernel=kernel)
        return scores

    def code_scores(
        self, connection: Connection, queries: QueryCodes, extents: Extents, segments: Mapping[int, Segment]
    ) -> Float32:
        """Score every page of ``extents`` against every query, from its code; each must have one.

        Returns:
            float32 (n_queries, n_pages), estimates of the scores.

        Raises:
            StoreError: codes are not what was written.
        """
        scores = np.empty((len(queries.offsets) - 1, len(extents.keys)), dtype=np.float32)
        scan = self._scan or default_scan()
        if self.code_bits == 1:
            scan = bit_scan(scan, self._dim)
        for number, inside in by_segment(extents):
            segment = segments[number]
            mapped = self.codes.rows(segment.codes, segment.code_rows)
            starts, rows = extents.code_starts[inside], extents.code_rows[inside]
            crc32 = extents.code_crc32[inside]
            self._compare(connection, segment.codes, mapped, extents.keys[inside], starts, rows, crc32)
            scales = extents.code_scales[inside].astype(np.float32)
            order = np.argsort(starts, kind="stable")  # codes made later for older pages lie behind those of newer ones
            scores[:, inside[order]] = scan(queries, mapped, starts[order], rows[order], scales[order])
        return scores

    def _compare(
        self,
        connection: Connection,
        name: str,
        mapped: NDArray[Any],
        keys: NDArray[np.int64],
        starts: NDArray[np.int64],
        rows: NDArray[np.int64],
        crc32: NDArray[np.int64],
    ) -> None:
        """Compare pages with their checksums, each page of a file once."""
        seen = self._seen.get(name, np.zeros(0, dtype=bool))
        if len(seen) <= keys[-1]:  # another thread may do the same: the later one wins, and pages are compared again
            seen = self._seen[name] = np.concatenate([seen, np.zeros(int(keys[-1]) * 2 + 64 - len(seen), dtype=bool)])
        new = np.flatnonzero(~seen[keys])
        if not len(new):
            return
        for i, start, count, wanted in zip(
            new.tolist(), starts[new].tolist(), rows[new].tolist(), crc32[new].tolist(), strict=True
        ):
            if zlib.crc32(mapped[start : start + count].data) != wanted:
                (page_id,) = connection.execute("SELECT id FROM pages WHERE key = ?", (int(keys[i]),)).fetchone()
                raise self._damaged(name, "codes" if mapped.dtype == CODE_TYPE else "token embeddings", page_id)
        seen[keys[new]] = True

    def _damaged(self, name: str, what: str, page_id: str) -> StoreError:
        remedy = "compact() makes them again, and exact=True needs none" if what == "codes" else "add the page again"
        return StoreError(f"{self.folder / name}: the {what} of {page_id!r} {DAMAGED}; {remedy}")


def by_segment(extents: Extents) -> list[tuple[int, NDArray[np.intp]]]:
    """Give the segments pages lie in, and the positions of each one's pages."""
    return [(int(number), np.flatnonzero(extents.segments == number)) for number in np.unique(extents.segments)]


def best(
    connection: Connection, keys: NDArray[np.int64], scores: NDArray[np.float32], k: int, group_by: GroupBy | None
) -> list[tuple[float, int]]:
    """Pick the ``k`` highest scores, equal ones by id, looking names up only for those that may be among them.

    Args:
        connection: in a transaction.
        keys: int64 (n,), of pages.
        scores: float32 (n,), n >= 1.
        k: how many.
        group_by: ``"source"`` keeps the best of each source.

    Returns:
        At most ``k`` scores and keys, best first.
    """
    total = len(scores)
    looked_at = k if group_by is None else 4 * k
    while True:
        looked_at = min(looked_at, total)
        least = np.partition(scores, total - looked_at)[total - looked_at]
        at_least = np.flatnonzero(scores >= least)
        named = ((-float(scores[i]), *_name(connection, int(keys[i])), int(keys[i])) for i in at_least)
        picked: dict[str, tuple[float, int]] = {}
        for negative, page_id, source, key in sorted(named):
            group = page_id if group_by is None else f"source {source}" if source else f"id {page_id}"
            if group not in picked:
                picked[group] = (-negative, key)
            if len(picked) == k:
                break
        if len(picked) == k or len(at_least) == total:
            return list(picked.values())
        looked_at *= 4


def _name(connection: Connection, key: int) -> tuple[str, str]:
    found: tuple[str, str] = connection.execute("SELECT id, source FROM pages WHERE key = ?", (key,)).fetchone()
    return found
