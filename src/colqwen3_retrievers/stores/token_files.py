"""Token embeddings on disk: append-only float16 files, read through memory maps.

A file is rows of ``dim`` little-endian float16 components and nothing else, so row ``n`` lies at byte ``2 * dim * n``.
How many rows count is written in the catalogue; what lies beyond was never committed.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from colqwen3_retrievers.datatypes import PackedEmbeddings
from colqwen3_retrievers.errors import StoreError

ROW_TYPE = np.dtype("<f2")
"""What a component is on disk."""

CHUNK_BYTES = 32 * 2**20
"""Most bytes of token embeddings handed to a kernel at once, unless one page is larger; kernels cut further."""

Float16 = NDArray[np.float16]


class TokenFiles:
    """The token files of one folder, by name. Reading is safe from several threads; only one may write.

    Args:
        folder: where they lie.
        dim: components of a row.
    """

    def __init__(self, folder: Path, dim: int) -> None:
        self._folder = folder
        self._dim = dim
        self._row_bytes = ROW_TYPE.itemsize * dim
        self._maps: dict[str, Float16] = {}
        self._lock = threading.Lock()

    def create(self, name: str) -> None:
        """Make an empty file, durably.

        Raises:
            StoreError: it cannot be made.
        """
        with self._naming(name):
            descriptor = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(self._folder)

    def append(self, name: str, start: int, rows: Float16) -> None:
        """Write rows from row ``start`` on and wait until they are on disk.

        Args:
            name: the file.
            start: the first row that is not committed; whatever lies there is overwritten.
            rows: float16 (n, dim).

        Raises:
            StoreError: the disk is full, or another fault of it.
        """
        left = np.ascontiguousarray(rows, dtype=ROW_TYPE).data.cast("B")
        offset = start * self._row_bytes
        with self._naming(name), open(self._folder / name, "r+b", buffering=0) as file:  # noqa: PTH123 - Path.open buffers
            file.seek(offset)
            while left:
                left = left[file.write(left) :]
            data_sync(file.fileno())

    def truncate(self, name: str, rows: int) -> None:
        """Cut off what lies beyond ``rows``.

        Raises:
            StoreError: it cannot be cut.
        """
        with self._naming(name):
            if (self._folder / name).stat().st_size > rows * self._row_bytes:
                os.truncate(self._folder / name, rows * self._row_bytes)

    def check(self, name: str, rows: int) -> None:
        """Make sure that the committed rows are there.

        Raises:
            StoreError: the file is missing or shorter than ``rows``.
        """
        with self._naming(name):
            size = (self._folder / name).stat().st_size
        if size < rows * self._row_bytes:
            raise StoreError(
                f"{self._folder / name}: {size:,} bytes, but the catalogue counts {rows * self._row_bytes:,}: the file "
                "was cut or replaced; restore it from a copy, or build the index anew"
            )

    def rows(self, name: str, count: int) -> Float16:
        """Give the first rows of a file without reading them: float16 (at least ``count``, dim), read-only.

        Raises:
            StoreError: the file is missing or shorter.
        """
        with self._lock:
            mapped = self._maps.get(name)
            self.check(name, count)  # a map past the end of a file that was cut kills the process when it is read
            if mapped is None or len(mapped) < count:
                if count == 0:
                    return np.empty((0, self._dim), dtype=ROW_TYPE)
                with self._naming(name), (self._folder / name).open("rb") as file:
                    whole = mmap.mmap(file.fileno(), count * self._row_bytes, access=mmap.ACCESS_READ)
                mapped = np.frombuffer(whole, dtype=ROW_TYPE).reshape(count, self._dim)
                self._maps[name] = mapped
            return mapped

    def close(self) -> None:
        """Let go of the maps; each lives on until the last array of it is gone."""
        with self._lock:
            self._maps.clear()

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise StoreError(f"{self._folder / name}: {exc.strerror or exc}") from exc


def chunks(
    rows: Float16, starts: NDArray[np.int64], lengths: NDArray[np.int64], *, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[slice, PackedEmbeddings]]:
    """Pack pages of one file into chunks a kernel can work on.

    Pages that lie side by side are handed on where they lie; others are gathered.

    Args:
        rows: float16 (n_rows, dim).
        starts: first row of each page, increasing.
        lengths: rows of each page, at least 1.
        chunk_bytes: most bytes a chunk, unless a single page is larger.

    Yields:
        Which of the pages, and their token embeddings.

    >>> rows = np.zeros((9, 4), dtype=np.float16)
    >>> parts = chunks(rows, np.asarray([0, 2, 6]), np.asarray([2, 3, 3]), chunk_bytes=40)
    >>> [(part.start, part.stop, packed.lengths.tolist()) for part, packed in parts]
    [(0, 2, [2, 3]), (2, 3, [3])]
    """
    most = max(1, chunk_bytes // (rows.itemsize * rows.shape[1]))
    ends = np.cumsum(lengths)
    first = 0
    while first < len(starts):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + most, side="right")))
        offsets = np.concatenate([[0], ends[first:last] - before])
        begin, end = int(starts[first]), int(starts[last - 1] + lengths[last - 1])
        if end - begin == offsets[-1]:
            packed = rows[begin:end]
        else:
            stops = starts[first:last] + lengths[first:last]
            packed = np.concatenate([rows[a:b] for a, b in zip(starts[first:last], stops, strict=True)])
        yield slice(first, last), PackedEmbeddings(packed, offsets)
        first = last


def data_sync(descriptor: int) -> None:
    """Wait until a file's bytes are on disk."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on disk, where the system can say so."""
    if os.name != "posix":  # pragma: no cover - a folder cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
