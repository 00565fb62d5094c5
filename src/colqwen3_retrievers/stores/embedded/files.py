"""The token and code files of an embedded store: verified reads and scores."""

from __future__ import annotations

import contextlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from colqwen3_retrievers.errors import StoreError
from colqwen3_retrievers.stores.embedded.catalogue import Extents, Int64, Segment
from colqwen3_retrievers.stores.embedded.row_files import CODE_TYPE, ROW_TYPE, Float16, RowFiles, chunks
from colqwen3_retrievers.stores.embedded.rows import Place
from colqwen3_retrievers.stores.protocol import GroupBy
from colqwen3_retrievers.vectors.codes import QueryCodes, code_row_bytes
from colqwen3_retrievers.vectors.kernels import default_kernel, default_scan
from colqwen3_retrievers.vectors.kernels.scan import CodeScan, bit_scan
from colqwen3_retrievers.vectors.late_interaction import Kernel, maxsim
from colqwen3_retrievers.vectors.multi_vector import Float32, MultiVector, PackedEmbeddings

DAMAGED: Final = "are not what was written (their checksum differs): the disk or a copy of the folder is at fault"

_FILE = re.compile(r"tokens-\d{6}(-\d+)?\.f16|codes-\d{6}(-\d+)?\.i8")


def file_names(segment: int, turn: int = 0) -> tuple[str, str]:
    """Return the names of a segment's token file and code file.

    Args:
        segment: its number.
        turn: distinguishes the files of a rewritten segment from those before.

    >>> file_names(1), file_names(1, 7)
    (('tokens-000001.f16', 'codes-000001.i8'), ('tokens-000001-7.f16', 'codes-000001-7.i8'))
    """
    stem = f"{segment:06d}-{turn}" if turn else f"{segment:06d}"
    return f"tokens-{stem}.f16", f"codes-{stem}.i8"


class StoreFiles:
    """The token and code files of one store.

    A page's bytes are compared with their checksum when they are first read, and not again while the files stay as they
    are, so that a scan of everything pays for it once.

    Args:
        folder: the store's.
        dim: components of a token embedding.
        kernel: computes MaxSim; None takes the default when it is first needed.
        scan: scans codes; None takes the default.
        code_bits: of a component of the codes, 8 or 1.
    """

    def __init__(self, folder: Path, dim: int, kernel: Kernel | None, scan: CodeScan | None, code_bits: int) -> None:
        self.folder = folder
        self.tokens = RowFiles(folder, dim, ROW_TYPE)
        self.codes = RowFiles(folder, code_row_bytes(dim, code_bits), CODE_TYPE)
        self._dim, self.code_bits = dim, code_bits
        self._kernel = kernel
        self._scan = scan
        self._verified: dict[str, NDArray[np.bool_]] = {}  # by file and key; entries only ever become true

    def check(self, segments: Mapping[int, Segment]) -> None:
        """Check that the committed rows exist; a missing code file is no error.

        Raises:
            StoreError: a file is cut, or a token file is missing.
        """
        for segment in segments.values():
            self.tokens.check(segment.name, segment.rows)
            if self.codes.exists(segment.codes):
                self.codes.check(segment.codes, segment.code_rows)

    def discard_uncommitted(self, segments: Mapping[int, Segment]) -> None:
        """Cut off uncommitted rows and remove files that no segment names."""
        for segment in segments.values():
            self.tokens.truncate(segment.name, segment.rows)
            if self.codes.exists(segment.codes):
                self.codes.truncate(segment.codes, segment.code_rows)
        names = _names(segments)
        for path in self.folder.iterdir():
            if _FILE.fullmatch(path.name) and path.name not in names:
                with contextlib.suppress(OSError):  # where the system refuses, the file stays until next time
                    path.unlink()

    def keep_maps(self, segments: Mapping[int, Segment]) -> None:
        """Drop the maps of files other than those of these segments."""
        names = _names(segments)
        self.tokens.keep_maps(names)
        self.codes.keep_maps(names)
        for name in [name for name in self._verified if name not in names]:
            self._verified.pop(name, None)

    def close(self) -> None:
        """Drop all maps."""
        self.keep_maps({})

    def multi_vector(self, page_id: str, place: Place, segments: Mapping[int, Segment]) -> MultiVector:
        """Return a page's multi-vector, its vectors compared with their checksum.

        Raises:
            StoreError: they are not what was written; it names the file and the page.
        """
        segment = segments[place.segment]
        rows: Float16 = self.tokens.rows(segment.name, segment.rows)[place.start : place.start + place.rows]
        if zlib.crc32(rows.data) != place.crc32:
            raise self._damaged(segment.name, "token embeddings", page_id)
        return MultiVector.from_layout(rows, json.loads(place.shape))

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
        for number, inside in _by_segment(extents):
            segment = segments[number]
            mapped = self.tokens.rows(segment.name, segment.rows)
            starts, rows = extents.starts[inside], extents.rows[inside]
            self._verify(connection, segment.name, mapped, extents.keys[inside], starts, rows, extents.crc32[inside])
            for part, packed in chunks(mapped, starts, rows):
                scores[:, inside[part]] = maxsim(queries, packed, kernel=kernel)
        return scores

    def code_scores(
        self, connection: Connection, queries: QueryCodes, extents: Extents, segments: Mapping[int, Segment]
    ) -> Float32:
        """Estimate the score of each page of ``extents`` and query, from codes.

        Returns:
            float32 (n_queries, n_pages).

        Raises:
            StoreError: codes are not what was written.
        """
        scores = np.empty((len(queries.offsets) - 1, len(extents.keys)), dtype=np.float32)
        scan = self._scan or default_scan()
        if self.code_bits == 1:
            scan = bit_scan(scan, self._dim)
        for number, inside in _by_segment(extents):
            segment = segments[number]
            mapped = self.codes.rows(segment.codes, segment.code_rows)
            starts, rows = extents.code_starts[inside], extents.code_rows[inside]
            crc32 = extents.code_crc32[inside]
            self._verify(connection, segment.codes, mapped, extents.keys[inside], starts, rows, crc32)
            scores[:, inside] = scan(queries, mapped, starts, rows, extents.code_scales[inside].astype(np.float32))
        return scores

    def count_damaged_codes(self, extents: Extents, segments: Mapping[int, Segment]) -> int:
        """Count the pages of ``extents`` whose codes are missing or not what was written."""
        count = 0
        for number, inside in _by_segment(extents):
            segment = segments[number]
            if not self.codes.exists(segment.codes):
                count += len(inside)
                continue
            mapped = self.codes.rows(segment.codes, segment.code_rows)
            starts, rows, crc32 = extents.code_starts[inside], extents.code_rows[inside], extents.code_crc32[inside]
            count += sum(1 for _ in _damaged(mapped, starts, rows, crc32))
        return count

    def _verify(
        self,
        connection: Connection,
        name: str,
        mapped: NDArray[Any],
        keys: Int64,
        starts: Int64,
        rows: Int64,
        crc32: Int64,
    ) -> None:
        """Compare pages with their checksums, each page of a file once."""
        verified = self._verified.get(name, np.zeros(0, dtype=bool))
        if len(verified) <= keys[-1]:  # when two threads do this, the later array stays, and pages are compared again
            more = np.zeros(int(keys[-1]) * 2 + 64 - len(verified), dtype=bool)
            verified = self._verified[name] = np.concatenate([verified, more])
        new = np.flatnonzero(~verified[keys])
        if not len(new):
            return
        for i in _damaged(mapped, starts[new], rows[new], crc32[new]):
            (page_id,) = connection.execute("SELECT id FROM pages WHERE key = ?", (int(keys[new[i]]),)).fetchone()
            raise self._damaged(name, "codes" if mapped.dtype == CODE_TYPE else "token embeddings", page_id)
        verified[keys[new]] = True

    def _damaged(self, name: str, what: str, page_id: str) -> StoreError:
        remedy = "compact() makes them again, and exact=True needs none" if what == "codes" else "add the page again"
        return StoreError(f"{self.folder / name}: the {what} of {page_id!r} {DAMAGED}; {remedy}")


def _damaged(mapped: NDArray[Any], starts: Int64, rows: Int64, crc32: Int64) -> Iterator[int]:
    """Iterate over the positions of pages whose bytes do not have their checksum."""
    for i, (start, count, checksum) in enumerate(zip(starts.tolist(), rows.tolist(), crc32.tolist(), strict=True)):
        if zlib.crc32(mapped[start : start + count].data) != checksum:
            yield i


def _names(segments: Mapping[int, Segment]) -> set[str]:
    return {name for segment in segments.values() for name in (segment.name, segment.codes)}


def _by_segment(extents: Extents) -> list[tuple[int, NDArray[np.intp]]]:
    """Return each segment that has some of the pages, with the positions of these."""
    return [(int(number), np.flatnonzero(extents.segments == number)) for number in np.unique(extents.segments)]


def best(
    connection: Connection, keys: Int64, scores: Float32, k: int, group_by: GroupBy | None
) -> list[tuple[float, int]]:
    """Return the ``k`` highest scores with their keys, best first, equal scores by id.

    Only the names of pages that may be among them are looked up.

    Args:
        connection: in a transaction.
        keys: int64 (n,), of pages.
        scores: float32 (n,), n >= 1.
        k: how many.
        group_by: ``"source"`` keeps the best of each source.
    """
    total = len(scores)
    count = k if group_by is None else 4 * k
    while True:
        count = min(count, total)
        least = np.partition(scores, total - count)[total - count]
        candidates = np.flatnonzero(scores >= least)
        named = ((-float(scores[i]), *_name(connection, int(keys[i])), int(keys[i])) for i in candidates)
        winners: dict[str, tuple[float, int]] = {}
        for negative, page_id, source, key in sorted(named):
            group = page_id if group_by is None else f"source {source}" if source else f"id {page_id}"
            if group not in winners:
                winners[group] = (-negative, key)
            if len(winners) == k:
                break
        if len(winners) == k or len(candidates) == total:
            return list(winners.values())
        count *= 4


def _name(connection: Connection, key: int) -> tuple[str, str]:
    name: tuple[str, str] = connection.execute("SELECT id, source FROM pages WHERE key = ?", (key,)).fetchone()
    return name
