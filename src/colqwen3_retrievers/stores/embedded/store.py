"""The embedded store: a folder on a local disk.

::

    my-index/
      catalogue.sqlite       what is committed: ids, metadata, where token embeddings are (and its -wal and -shm)
      tokens-000001.f16      token embeddings, appended, float16
      codes-000001.i8        pages' codes, which find candidates, appended; made again when missing or damaged
      writer.lock            who writes
      images/                page images, kept by PageIndex

**Commit.** Token embeddings and codes are appended and synced first, then one SQLite transaction commits them. A
process that dies in between leaves uncommitted bytes, which the next writer cuts off. Replaced and deleted pages leave
their bytes until 30 % of a file are dead, and then it is rewritten: see
:mod:`~colqwen3_retrievers.stores.embedded.compaction`.

Tokens, codes and what the catalogue records of a page have checksums, which are compared when they are read.

**Search.** Up to 500 pages, or with ``exact=True``, every page is scored; beyond, see
:mod:`~colqwen3_retrievers.stores.embedded.two_stage`. A filter is applied first: only pages it holds for are read.

**Concurrency.** One writer, held by a lock the system drops when the process ends; any number of readers, in this
process and others, each seeing one consistent state per call. In a forked child a store opens itself again, for reading
only: the right to write stays with the parent.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from sqlite3 import Connection
from typing import Final, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, StoreError, StoreMismatchError
from colqwen3_retrievers.fork import ForkSafeLock, after_fork
from colqwen3_retrievers.pages.files import user_path
from colqwen3_retrievers.stores.embedded import compaction
from colqwen3_retrievers.stores.embedded import rows as table
from colqwen3_retrievers.stores.embedded.catalogue import (
    FILE_NAME,
    Catalogue,
    Segment,
    add_segment,
    create,
    read_segments,
    select_keys,
)
from colqwen3_retrievers.stores.embedded.files import StoreFiles, best, file_names
from colqwen3_retrievers.stores.embedded.lock import WriterLock
from colqwen3_retrievers.stores.embedded.row_files import ROW_TYPE, FileGoneError
from colqwen3_retrievers.stores.embedded.two_stage import EXACT_PAGES, two_stage
from colqwen3_retrievers.stores.protocol import (
    GroupBy,
    Match,
    Record,
    check_addable,
    check_deletion,
    check_ids,
    check_info,
    check_records,
    check_search,
    pack_queries,
)
from colqwen3_retrievers.stores.where import Filter, Where, parse
from colqwen3_retrievers.vectors.codes import CODE_BITS, page_code
from colqwen3_retrievers.vectors.kernels.scan import CodeScan
from colqwen3_retrievers.vectors.late_interaction import Kernel
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo, MultiVector, PackedEmbeddings

FIRST_SEGMENT, FIRST_CODES = file_names(1)
CODE_FACTOR: Final = 3
"""Default number of original tokens for each row of a page's code."""

_MAX_SCORES = 2**24  # scores in memory at once, 64 MB: more queries than that allows are searched for in turns
_ATTEMPTS = 8  # readings that may find a file removed by a compaction before it is an error
_log = logging.getLogger(__name__)
T = TypeVar("T")


class EmbeddedStore:
    """Multi-vectors in a folder.

    A :class:`~colqwen3_retrievers.stores.protocol.MultiVectorStore`. Scores are MaxSim in float32 over the stored
    float16 token embeddings. Beyond 500 pages a search looks for candidates first and may miss a page; ``exact=True``
    never does.

    Args:
        folder: a store's folder, or a new or empty one.
        info: of the encoder that makes the multi-vectors. Required for a new store; compared with an existing one.
        read_only: opens beside another writer, and where nothing can be written.
        kernel: computes MaxSim; None takes :func:`colqwen3_retrievers.vectors.kernels.default_kernel` when searching.
        scan: scans codes; None takes :func:`colqwen3_retrievers.vectors.kernels.default_scan` when searching.
        code_factor: tokens for each row of the codes of a new store: 3 by default, less where pages are already
            pooled; 6 halves the memory of a search and takes more candidates. None takes what the store has.
        code_bits: of a component of the codes of a new store: 8, or 1, whose rows take an eighth of the memory, come
            one a token unless ``code_factor`` says otherwise, and find less (``benchmarks/store.md``). None takes what
            the store has, 8 for a new one.

    Attributes:
        folder: absolute, for the process may change its working directory.
        info: what shaped the multi-vectors.
        read_only: whether it was opened for reading only, or before a fork.
        code_factor: tokens for each row of a page's code.
        code_bits: bits of a component of a page's code, 8 or 1.

    Raises:
        StoreMismatchError: the store was made by another model, dim, pooling or rendering, or with another
            ``code_factor`` or ``code_bits``.
        StoreUnavailableError: another writer has it open; the message names it.
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
        if code_factor is not None:
            code_factor = whole_number(code_factor, "code_factor", least=1)
        self.folder = user_path(folder).absolute()
        self.read_only = read_only
        self._given = info
        self._right_lost = False  # to the parent process
        self._write_lock = ForkSafeLock()
        with contextlib.ExitStack() as resources:
            if not read_only:
                _prepare_folder(self.folder, info)
                resources.callback(WriterLock(self.folder).release)
                if info is not None and not (self.folder / FILE_NAME).exists():
                    self._create(info, code_factor or default_code_factor(info, code_bits or 8), code_bits or 8)
            if not (self.folder / FILE_NAME).is_file():
                raise StoreError(f"{self.folder}: no index there", absent=True)
            self._catalogue = Catalogue(self.folder, read_only=read_only)
            resources.callback(self._catalogue.close)
            self.info, self.code_factor, self.code_bits = self._read_state()
            if info is not None:
                check_info(self.info, info, self.location)
            for name, given in (("code_factor", code_factor), ("code_bits", code_bits)):
                if given not in (None, stored := getattr(self, name)):
                    raise StoreMismatchError(f"{self.location}: {name} is {stored} in the index, {given} asked for")
            self._files = StoreFiles(self.folder, self.info.dim, kernel, scan, self.code_bits)
            resources.callback(self._files.close)
            self._reading(lambda connection: self._files.check(read_segments(connection)))
            self._compactor = compaction.Compactor(self._catalogue, self._files, self.code_factor)
            if not read_only:
                self._discard_uncommitted()
            self._finalizer = weakref.finalize(self, resources.pop_all().close)
        after_fork(self._become_reader)

    @property
    def location(self) -> str:
        """The folder as a text."""
        return str(self.folder)

    def add(self, records: Iterable[Record]) -> None:
        """Store records, each in place of the one with its id; see the protocol."""
        check_addable(self.info, self._given, self.location)
        checked = check_records(records, self.info.dim)
        arrays = [np.asarray(record.multi_vector).astype(ROW_TYPE) for record in checked]
        if not arrays:
            return
        self.check_writable()
        codes = [page_code(array, self.code_factor, self.code_bits) for array in arrays]
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
        """Delete records; see the protocol."""
        named, tree = check_deletion(ids, where)
        self.check_writable()
        with self._write_lock, self._catalogue.writing() as connection:
            if named is None:
                keys = select_keys(connection, tree).tolist()
            else:
                keys = table.keys_of(connection, named)
                matching = None if tree is None else set(select_keys(connection, tree).tolist())
                keys = [key for key in keys if matching is None or key in matching]
            table.remove(connection, keys)
        self._tidy()
        return len(keys)

    def check_writable(self) -> None:
        """Check that records may be added and deleted.

        Raises:
            StoreError: it was opened for reading only, or before a fork.
        """
        if self._right_lost:
            raise StoreError(
                f"{self.folder}: opened for writing before a fork: the parent process keeps the right to write; write "
                "there, or close it there and open it here"
            )
        if self.read_only:
            raise StoreError(f"{self.folder}: opened with read_only=True")

    def compact(self) -> int:
        """Rewrite the files without the bytes of replaced and deleted pages.

        It happens automatically when 30 % of a file, and 8 MB, are dead. Readers may go on reading meanwhile. It needs
        room for a second copy of a segment (at most 1 GB).

        Returns:
            The bytes of token embeddings freed.

        Raises:
            StoreError: read-only, closed, or the disk is full; everything is as before.

        >>> EmbeddedStore("my-index").compact()                                               # doctest: +SKIP
        104857600
        """
        self.check_writable()
        with self._write_lock:
            freed = self._compactor.rewrite_wasteful()
            self._catalogue.vacuum()
        return freed

    def get(self, ids: Iterable[str], *, vectors: bool = False) -> list[Record]:
        """Return records by id; see the protocol."""
        names = check_ids(ids)

        def read(connection: Connection) -> list[Record]:
            rows = table.by_id(connection, names)
            if not vectors:
                return [record for record, _ in rows]
            segments = self._segments(connection)
            return [
                Record(record.page, self._files.multi_vector(record.page.id, place, segments), record.image)
                for record, place in rows
            ]

        return self._reading(read)

    def search(
        self,
        queries: Sequence[MultiVector | ArrayLike],
        k: int,
        *,
        where: Where | Filter | None = None,
        exact: bool = False,
        group_by: GroupBy | None = None,
    ) -> list[list[Match]]:
        """Return the ``k`` best records for each query; see the protocol."""
        k = check_search(k, group_by)
        tree = parse(where)
        if len(queries) == 0:
            return []
        packed = pack_queries(queries, self.info.dim, self.location)

        def find(connection: Connection, exact: bool) -> list[list[Match]]:
            extents = self._catalogue.extents(connection)
            if tree is not None:
                extents = extents.take(np.searchsorted(extents.keys, select_keys(connection, tree)))
            if not len(extents.keys):
                return [[] for _ in queries]
            segments = self._segments(connection)
            turn = max(1, _MAX_SCORES // len(extents.keys))
            matches: list[list[Match]] = []
            for first in range(0, len(packed), turn):
                part = PackedEmbeddings.pack([packed[i] for i in range(first, min(first + turn, len(packed)))])
                if exact or len(extents.keys) <= EXACT_PAGES:
                    scores = self._files.scores(connection, part, extents, segments)
                    hits = [best(connection, extents.keys, row, k, group_by) for row in scores]
                else:
                    hits = two_stage(connection, self._files, part, extents, segments, k, group_by)
                matches += [[Match(table.by_key(connection, key), score) for score, key in row] for row in hits]
            return matches

        try:
            return self._reading(lambda connection: find(connection, exact))
        except FileGoneError:  # a code file was removed: token embeddings are enough
            return self._reading(lambda connection: find(connection, True))

    def ids(self, where: Where | Filter | None = None) -> list[str]:
        """Return ids in code point order; see the protocol."""
        tree = parse(where)
        with self._catalogue.reading() as connection:
            if tree is None:
                return [row[0] for row in connection.execute("SELECT id FROM pages ORDER BY id")]
            keys = select_keys(connection, tree).tolist()
            sql = "SELECT id FROM pages WHERE key = ?"
            return sorted(connection.execute(sql, (key,)).fetchone()[0] for key in keys)

    def images(self, among: Iterable[str] | None = None) -> set[str]:
        """Return the image references in use; see the protocol."""
        with self._catalogue.reading() as connection:
            if among is None:
                return {row[0] for row in connection.execute("SELECT image FROM pages WHERE image IS NOT NULL")}
            sql = "SELECT 1 FROM pages WHERE image = ?"
            return {item for item in set(among) if connection.execute(sql, (item,)).fetchone()}

    def has_name(self, name: str) -> bool:
        """Return whether any metadata has a name; see the protocol."""
        with self._catalogue.reading() as connection:
            return connection.execute("SELECT 1 FROM facts WHERE name = ? LIMIT 1", (name,)).fetchone() is not None

    def count_damaged_codes(self) -> int:
        """Compare the codes of all pages with their checksums, which reads every code file once.

        A search finds a damaged code only when it reads it, which an exact one never does.

        Returns:
            The number of pages whose codes are missing or not what was written; :meth:`compact` makes these again.

        >>> EmbeddedStore("my-index").count_damaged_codes()                                   # doctest: +SKIP
        0
        """

        def count(connection: Connection) -> int:
            return self._files.count_damaged_codes(self._catalogue.extents(connection), self._segments(connection))

        return self._reading(count)

    def is_empty(self) -> bool:
        """Return whether there are no records."""
        with self._catalogue.reading() as connection:
            return connection.execute("SELECT 1 FROM pages LIMIT 1").fetchone() is None

    def close(self) -> None:
        """Release the files and the right to write; running calls finish or fail."""
        with self._write_lock:
            self._finalizer()

    def __len__(self) -> int:
        with self._catalogue.reading() as connection:
            return int(connection.execute("SELECT count(*) FROM pages").fetchone()[0])

    def __contains__(self, id: object) -> bool:
        with self._catalogue.reading() as connection:
            return isinstance(id, str) and bool(table.keys_of(connection, [id]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"EmbeddedStore({self.location!r}{', read_only=True' if self.read_only else ''})"

    def _create(self, info: EncoderInfo, code_factor: int, code_bits: int) -> None:
        files = StoreFiles(self.folder, info.dim, None, None, code_bits)
        files.tokens.create(FIRST_SEGMENT)
        files.codes.create(FIRST_CODES)
        encoder = json.dumps(info.to_dict())
        create(self.folder, encoder, ROW_TYPE.str, (FIRST_SEGMENT, FIRST_CODES), (code_factor, code_bits))

    def _read_state(self) -> tuple[EncoderInfo, int, int]:
        with self._catalogue.reading() as connection:
            sql = "SELECT info, token_type, code_factor, code_bits FROM state"
            info, token_type, code_factor, code_bits = connection.execute(sql).fetchone()
        if token_type != ROW_TYPE.str:
            raise StoreError(
                f"{self.folder}: token embeddings of type {token_type!r}; this release reads {ROW_TYPE.str!r}"
            )
        return EncoderInfo.from_dict(json.loads(info)), code_factor, code_bits

    def _reading(self, read: Callable[[Connection], T]) -> T:
        """Read in one transaction, and again when a compaction removed a file."""
        layouts: set[int] = set()
        while True:
            with self._catalogue.reading() as connection:
                try:
                    return read(connection)
                except FileGoneError:
                    (layout,) = connection.execute("SELECT layout FROM state").fetchone()
                    if layout in layouts or len(layouts) == _ATTEMPTS:
                        raise
                    layouts.add(layout)

    def _segments(self, connection: Connection) -> dict[int, Segment]:
        segments = read_segments(connection)
        self._files.keep_maps(segments)
        return segments

    def _become_reader(self) -> None:
        self._right_lost = not self.read_only
        self.read_only = True

    def _last_segment(self, connection: Connection) -> Segment:
        """Return the last segment, or a new one when it is full or has no code file."""
        last = list(read_segments(connection).values())[-1]
        full = last.rows * self._files.tokens.row_bytes >= compaction.SEGMENT_BYTES
        if not full and self._files.codes.exists(last.codes):
            return last
        names = file_names(last.number + 1)
        self._files.tokens.create(names[0])
        self._files.codes.create(names[1])
        return add_segment(connection, last.number + 1, names)

    def _tidy(self) -> None:
        """Compact what is due after a committed write; log a failure."""
        with self._write_lock:
            try:
                self._compactor.rewrite_due()
            except StoreError as exc:
                _log.warning("%s: not compacted, which will be tried again: %s", self.folder, exc)

    @contextlib.contextmanager
    def _undoing_files(self) -> Iterator[None]:
        """Hold the write lock, and cut off appended rows on an error."""
        with self._write_lock:
            try:
                yield
            except BaseException:
                with contextlib.suppress(Exception):  # the first error says more
                    self._discard_uncommitted()
                raise

    def _discard_uncommitted(self) -> None:
        with self._catalogue.reading() as connection:
            segments = read_segments(connection)
        self._files.discard_uncommitted(segments)


def default_code_factor(info: EncoderInfo, code_bits: int = 8) -> int:
    """Return the tokens for each row of a code, fewer for pooled pages.

    >>> info = EncoderInfo("ab12", "tiny", "tomoro", 128, 1, 1280, False, 1)
    >>> import dataclasses
    >>> [default_code_factor(dataclasses.replace(info, pool_factor=factor)) for factor in (1, 2, 3, 6)]
    [3, 1, 1, 1]
    >>> default_code_factor(info, code_bits=1)
    1
    """
    return max(1, CODE_FACTOR // info.pool_factor) if code_bits == 8 else 1


def _prepare_folder(folder: Path, info: EncoderInfo | None) -> None:
    """Check that there is a store, or make the folder of a new one."""
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
