"""The embedded store: a folder on a local disk, with nothing to install and nothing to run.

::

    my-index/
      catalogue.sqlite       what is committed: ids, metadata, where token embeddings lie (and its -wal and -shm)
      tokens-000001.f16      token embeddings, appended, float16
      codes-000001.i8        pages' codes, by which candidates are found, appended; made again when missing
      writer.lock            who writes
      images/                page images, kept by PageIndex

**Commit.** Token embeddings and codes are appended and synced first, then one SQLite transaction makes them count. A
process that dies in between leaves bytes nobody counts; the next writer cuts them off. Replaced and deleted pages leave
their bytes behind until 30 % of a file are dead, and then it is rewritten: see
:mod:`~colqwen3_retrievers.stores.embedded.compaction`.

**Search.** Up to 500 pages, or with ``exact=True``, every page is scored; beyond, see
:mod:`~colqwen3_retrievers.stores.embedded.two_stage`. A filter is applied first: only pages it holds for are read.

**Who may do what.** One writer, held by a lock the system drops when the process ends; any number of readers, in this
process and others, each seeing one consistent state per call.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from sqlite3 import Connection
from typing import Final, Self

import numpy as np

from colqwen3_retrievers.errors import ConfigError, StoreError, StoreMismatchError
from colqwen3_retrievers.pages.files import user_path
from colqwen3_retrievers.stores.embedded import compaction
from colqwen3_retrievers.stores.embedded import rows as table
from colqwen3_retrievers.stores.embedded.catalogue import (
    FILE_NAME,
    Catalogue,
    Segment,
    create,
    read_segments,
    select_keys,
)
from colqwen3_retrievers.stores.embedded.files import StoreFiles
from colqwen3_retrievers.stores.embedded.lock import WriterLock
from colqwen3_retrievers.stores.embedded.reader import EmbeddedReader
from colqwen3_retrievers.stores.embedded.row_files import ROW_TYPE
from colqwen3_retrievers.stores.protocol import (
    Record,
    check_addable,
    check_ids,
    check_info,
    check_records,
)
from colqwen3_retrievers.stores.where import Filter, Where, parse
from colqwen3_retrievers.vectors.codes import CODE_BITS, page_code
from colqwen3_retrievers.vectors.kernels.scan import CodeScan
from colqwen3_retrievers.vectors.late_interaction import Kernel
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo

FIRST_SEGMENT, FIRST_CODES = compaction.file_names(1)
CODE_FACTOR: Final = 3
"""Original tokens for each row of a page's code, where nothing else is asked for."""

_CODED_WITH_A_WRITE = 64  # pages without codes that get one with every write: a second or two
_log = logging.getLogger(__name__)


class EmbeddedStore(EmbeddedReader):
    """Multi-vectors in a folder; a :class:`~colqwen3_retrievers.stores.protocol.MultiVectorStore`.

    Scores are MaxSim in float32 over the stored float16 token embeddings. Beyond 500 pages a search looks for
    candidates first and may miss a page; ``exact=True`` never does.

    Args:
        folder: a store's folder, or a new or empty one.
        info: what made the multi-vectors. Needed for a new store; compared with an existing one.
        read_only: opens beside another writer, and on ground that cannot be written to.
        kernel: what computes MaxSim; None takes :func:`colqwen3_retrievers.vectors.kernels.default_kernel` when
            searching.
        scan: what scans codes; None takes :func:`colqwen3_retrievers.vectors.kernels.default_scan` when searching.
        code_factor: tokens for each row of the codes of a new store: 3 by default, less where pages come pooled
            already; 6 halves the memory a search needs and looks at more candidates. None takes what the store has.
        code_bits: of a component of the codes of a new store: 8, or 1, whose rows take an eighth of the memory, come
            one a token unless ``code_factor`` says otherwise, and find less (``benchmarks/store.md``). None takes what
            the store has, 8 for a new one.

    Raises:
        StoreMismatchError: the store was made by another model, dim, pooling or rendering, or with another
            ``code_factor`` or ``code_bits``.
        StoreUnavailableError: another writer has it open; the message says who.
        StoreError: not a store, a format this release does not know, or a token file that was cut.

    Example:
        >>> import tempfile
        >>> from colqwen3_retrievers import MultiVector, Page
        >>> info = EncoderInfo("ab12", "tiny", "tomoro", 2, 1, 1280, False, 1)
        >>> folder = tempfile.TemporaryDirectory()
        >>> with EmbeddedStore(folder.name, info=info) as store:
        ...     store.add([Record(Page(source="a.pdf"), MultiVector(np.eye(2, dtype=np.float32)))])
        ...     [(match.record.page.id, match.score) for match in store.search([[[0.6, 0.8]]], k=1)[0]]
        [('a.pdf#page=1', 0.80...)]
        >>> folder.cleanup()
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        info: EncoderInfo | None = None,
        read_only: bool = False,
        kernel: Kernel | None = None,
        scan: CodeScan | None = None,
        code_factor: int | None = None,
        code_bits: int | None = None,
    ) -> None:
        if code_bits not in (None, *CODE_BITS):
            raise ConfigError(f"code_bits: expected 8 or 1, got {code_bits!r}")
        if code_factor is not None and (isinstance(code_factor, bool) or code_factor < 1):
            raise ConfigError(f"code_factor: expected a whole number from 1, got {code_factor!r}")
        self._folder = user_path(folder).absolute()  # the process may change its folder, the store may not
        self._read_only = read_only
        self._given = info
        self._write_lock = threading.RLock()
        with contextlib.ExitStack() as opened:
            if not read_only:
                _make_room(self._folder, info)
                opened.callback(WriterLock(self._folder).release)
                if info is not None and not (self._folder / FILE_NAME).exists():
                    self._create(info, code_factor or default_code_factor(info, code_bits or 8), code_bits or 8)
            if not (self._folder / FILE_NAME).is_file():
                raise StoreError(f"{self._folder}: no index there", absent=True)
            self._catalogue = Catalogue(self._folder, read_only=read_only)
            opened.callback(self._catalogue.close)
            self._info, factor, bits = self._read_state()
            if info is not None:
                check_info(self._info, info, self.location)
            for name, asked, stored in (("code_factor", code_factor, factor), ("code_bits", code_bits, bits)):
                if asked not in (None, stored):
                    raise StoreMismatchError(f"{self.location}: {name} is {stored} in the index, {asked} asked for")
            self._code_factor, self._code_bits = factor, bits
            self._files = StoreFiles(self._folder, self._info.dim, kernel, scan, bits)
            opened.callback(self._files.close)
            segments = self._reading(self._checked_segments)
            self._compactor = compaction.Compactor(self._catalogue, self._files, factor, bits)
            if not read_only:
                with self._naming():
                    self._files.truncate(segments)
                    compaction.remove_orphans(self._folder, list(segments.values()))
                self._compactor.forget_missing_codes()
            self._finalizer = weakref.finalize(self, opened.pop_all().close)

    def add(self, records: Iterable[Record]) -> None:
        """Keep records, each in place of the one with its id; see the protocol."""
        check_addable(self._info, self._given, self.location)
        checked = check_records(records, self._info.dim)
        arrays = [np.asarray(record.multi_vector).astype(ROW_TYPE) for record in checked]
        if not arrays:
            return
        if self._read_only:
            raise StoreError(f"{self._folder}: opened with read_only=True")
        codes = [page_code(array, self._code_factor, self._code_bits) for array in arrays]
        with self._undoing_files(), self._catalogue.writing() as connection:
            segment = self._last_segment(connection)
            self._files.tokens.append(segment.name, segment.rows, np.concatenate(arrays))
            self._files.codes.append(segment.codes, segment.code_rows, np.concatenate([code.rows for code in codes]))
            table.remove(connection, table.keys_of(connection, [record.page.id for record in checked]))
            start, at = segment.rows, segment.code_rows
            for record, array, code in zip(checked, arrays, codes, strict=True):
                table.insert(connection, record, segment.number, start, array, code, at)
                start, at = start + len(array), at + len(code.rows)
            sql = "UPDATE segments SET rows = ?, code_rows = ? WHERE segment = ?"
            connection.execute(sql, (start, at, segment.number))
        self._tidy()

    def delete(self, ids: Iterable[str] | None = None, *, where: Where | Filter | None = None) -> int:
        """Forget records; see the protocol."""
        named = None if ids is None else check_ids(ids)
        tree = parse(where)
        if named is None and tree is None:
            raise ConfigError("delete: give ids, or a where that says which pages; an empty one would mean all of them")
        with self._write_lock, self._catalogue.writing() as connection:
            keys = select_keys(connection, tree).tolist() if tree is not None else None
            if named is not None:
                meant = table.keys_of(connection, named)
                among = None if keys is None else set(keys)
                keys = [key for key in meant if among is None or key in among]
            assert keys is not None  # noqa: S101 - one of the two was given
            table.remove(connection, keys)
        self._tidy()
        return len(keys)

    def compact(self) -> int:
        """Rewrite the files without what replaced and deleted pages left behind, and make codes that are missing.

        It happens by itself when 30 % of a file, and 8 MB, are dead. Readers may go on reading meanwhile. The room for
        a second copy of a segment (at most 1 GB) is needed while it lasts.

        Returns:
            The bytes of token embeddings that became free.

        Raises:
            StoreError: read-only, closed, or the disk is full; what was there is there.

        >>> EmbeddedStore("my-index").compact()                                               # doctest: +SKIP
        104857600
        """
        if self._read_only:
            raise StoreError(f"{self._folder}: opened with read_only=True")
        with self._write_lock:
            freed = sum(self._compactor.rewrite(segment) for segment in self._compactor.wasteful())
            self._catalogue.vacuum()
        return freed

    def close(self) -> None:
        """Let go of the files and of the right to write; calls under way finish first or fail cleanly."""
        with self._write_lock:
            self._finalizer()

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _create(self, info: EncoderInfo, code_factor: int, code_bits: int) -> None:
        files = StoreFiles(self._folder, info.dim, None, None, code_bits)
        files.tokens.create(FIRST_SEGMENT)
        files.codes.create(FIRST_CODES)
        told = json.dumps(info.to_dict())
        create(self._folder, told, ROW_TYPE.str, (FIRST_SEGMENT, FIRST_CODES), (code_factor, code_bits))

    def _last_segment(self, connection: Connection) -> Segment:
        """Give the segment to append to, a new one when the last is full."""
        last = list(read_segments(connection).values())[-1]
        if last.rows * self._files.tokens.row_bytes >= compaction.SEGMENT_BYTES:
            tokens, codes = compaction.file_names(last.number + 1)
            self._files.tokens.create(tokens)
            self._files.codes.create(codes)
            last = Segment(last.number + 1, tokens, 0, 0, codes, 0)
            sql = "INSERT INTO segments (segment, name, rows, codes) VALUES (?, ?, 0, ?)"
            connection.execute(sql, (last.number, tokens, codes))
        elif not self._files.codes.exists(last.codes):
            self._files.codes.create(last.codes)
        return last

    def _tidy(self) -> None:
        """Do what a write may leave to do. The write has come to its commit: what fails here waits for the next one."""
        with self._write_lock:
            try:
                for segment in self._compactor.due():
                    self._compactor.rewrite(segment)
                self._compactor.code_some(_CODED_WITH_A_WRITE)
            except StoreError as exc:
                _log.warning("%s: not compacted, which will be tried again: %s", self._folder, exc)

    @contextlib.contextmanager
    def _undoing_files(self) -> Iterator[None]:
        """Be the only thread that writes, and cut off what was appended when it does not come to a commit."""
        with self._write_lock:
            try:
                yield
            except BaseException:
                with contextlib.suppress(Exception):  # the error that brought us here says more
                    with self._catalogue.reading() as connection:
                        segments = read_segments(connection)
                    self._files.truncate(segments)
                    compaction.remove_orphans(self._folder, list(segments.values()))
                raise

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise StoreError(f"{self._folder}: {exc.strerror or exc}") from exc


def default_code_factor(info: EncoderInfo, code_bits: int = 8) -> int:
    """Tokens for each row of a code, so that pooled pages are not pooled beyond what finds them.

    >>> info = EncoderInfo("ab12", "tiny", "tomoro", 128, 1, 1280, False, 1)
    >>> import dataclasses
    >>> [default_code_factor(dataclasses.replace(info, pool_factor=factor)) for factor in (1, 2, 3, 6)]
    [3, 1, 1, 1]
    >>> default_code_factor(info, code_bits=1)
    1
    """
    return max(1, CODE_FACTOR // info.pool_factor) if code_bits == 8 else 1


def _make_room(folder: Path, info: EncoderInfo | None) -> None:
    """Make sure that a store is there, or that one may be made there."""
    if (folder / FILE_NAME).exists():
        return
    try:
        entries = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    except OSError as exc:
        raise StoreError(f"{folder}: cannot be opened as a folder: {exc.strerror}") from exc
    own = ("writer.lock", FIRST_SEGMENT, FIRST_CODES, f"{FILE_NAME}.new")  # of a creation that was killed
    foreign = [name for name in entries if not name.startswith(own)]
    if foreign:
        raise StoreError(f"{folder}: not an index, and not empty (it holds {foreign[0]!r}); give a new or empty folder")
    if FIRST_SEGMENT in entries and (folder / FIRST_SEGMENT).stat().st_size:
        raise StoreError(f"{folder}: it holds token embeddings, but {FILE_NAME!r} is missing")
    if info is None:
        raise StoreError(
            f"{folder}: no index there; to make one, say what encodes its pages (encoder= or info=)", absent=True
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StoreError(f"{folder}: cannot be made: {exc.strerror}") from exc
