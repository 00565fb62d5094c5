"""Token embeddings and codes in append-only files, read through memory maps.

A file is rows of one width and nothing else: row ``n`` starts at byte ``n * row_bytes``. The catalogue records how many
rows are committed; whatever follows them was never committed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colqwen3_retrievers.errors import StoreError
from colqwen3_retrievers.fork import ForkSafeLock, after_fork
from colqwen3_retrievers.vectors.multi_vector import PackedEmbeddings

ROW_TYPE = np.dtype("<f2")
"""Type of a component on disk."""

CODE_TYPE = np.dtype("i1")
"""Type of a code's component on disk."""

CHUNK_BYTES = 32 * 2**20
"""Most bytes of token embeddings handed to a kernel at once, unless one page is larger; kernels cut further."""

Float16 = NDArray[np.float16]


class FileGoneError(StoreError):
    """A file that the catalogue names is missing: damaged or compacted."""


class RowFiles:
    """The files of one folder that hold rows of one kind, by name.

    Many threads may read, one may write.

    Args:
        folder: where they are.
        width: components of a row.
        dtype: of a component.
    """

    def __init__(self, folder: Path, width: int, dtype: np.dtype[Any]) -> None:
        self._folder = folder
        self._width = width
        self._dtype = dtype
        self.row_bytes = dtype.itemsize * width
        self._maps: dict[str, NDArray[Any]] = {}
        self._lock = ForkSafeLock()
        after_fork(self._drop_maps)

    def create(self, name: str) -> None:
        """Create an empty file, durably.

        Raises:
            StoreError: it cannot be created.
        """
        with self._naming(name):
            descriptor = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(self._folder)

    def exists(self, name: str) -> bool:
        """Return whether there is such a file."""
        return (self._folder / name).exists()

    def remove(self, name: str) -> None:
        """Remove a file, whose maps stay readable; where the system refuses, it stays."""
        with self._lock:
            self._maps.pop(name, None)
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()

    def append(self, name: str, start: int, rows: NDArray[Any]) -> None:
        """Write rows from row ``start`` on and wait until they are on disk.

        Args:
            name: the file.
            start: the first row that is not committed; whatever is there is overwritten.
            rows: (n, width).

        Raises:
            StoreError: the disk is full, or another fault of it.
        """
        pending = np.ascontiguousarray(rows, dtype=self._dtype).data.cast("B")
        offset = start * self.row_bytes
        with self._naming(name), open(self._folder / name, "r+b", buffering=0) as file:  # noqa: PTH123 - Path.open buffers
            file.seek(offset)
            while pending:
                pending = pending[file.write(pending) :]
            getattr(os, "fdatasync", os.fsync)(file.fileno())

    def truncate(self, name: str, rows: int) -> None:
        """Cut off what lies beyond ``rows``.

        Raises:
            StoreError: it cannot be cut.
        """
        with self._naming(name):
            if (self._folder / name).stat().st_size > rows * self.row_bytes:
                os.truncate(self._folder / name, rows * self.row_bytes)

    def check(self, name: str, rows: int) -> None:
        """Check that the committed rows are there.

        Raises:
            StoreError: the file is missing or shorter than ``rows``.
        """
        with self._naming(name):
            size = (self._folder / name).stat().st_size
        if size < rows * self.row_bytes:
            raise StoreError(
                f"{self._folder / name}: {size:,} bytes, but the catalogue counts {rows * self.row_bytes:,}: the file "
                "was cut or replaced; restore it from a copy, or build the index anew"
            )

    def rows(self, name: str, count: int) -> NDArray[Any]:
        """Map the first rows of a file: (at least ``count``, width), read-only.

        Raises:
            StoreError: the file is missing or shorter.
        """
        with self._lock:
            mapped = self._maps.get(name)
            self.check(name, count)  # a map past the end of a file that was cut kills the process when it is read
            if mapped is None or len(mapped) < count:
                if count == 0:
                    return np.empty((0, self._width), dtype=self._dtype)
                with self._naming(name), (self._folder / name).open("rb") as file:
                    whole = mmap.mmap(file.fileno(), count * self.row_bytes, access=mmap.ACCESS_READ)
                mapped = np.frombuffer(whole, dtype=self._dtype).reshape(count, self._width)
                self._maps[name] = mapped
            return mapped

    def keep_maps(self, names: Container[str]) -> None:
        """Drop the maps of all other files; arrays of them stay valid."""
        with self._lock:
            for name in [name for name in self._maps if name not in names]:
                del self._maps[name]

    def _drop_maps(self) -> None:
        self._maps.clear()

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as exc:
            raise FileGoneError(f"{self._folder / name}: {exc.strerror or exc}") from exc
        except OSError as exc:
            raise StoreError(f"{self._folder / name}: {exc.strerror or exc}") from exc


def chunks(
    rows: Float16, starts: NDArray[np.int64], lengths: NDArray[np.int64], *, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[slice, PackedEmbeddings]]:
    """Pack pages of one file into chunks a kernel can work on.

    Adjacent pages are passed on without a copy; others are gathered.

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


def sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on disk, where the system can wait for it."""
    if os.name != "posix":  # pragma: no cover - a folder cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
