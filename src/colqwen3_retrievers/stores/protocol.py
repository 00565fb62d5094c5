"""The interface of a store of multi-vectors, and what every store guarantees.

A store holds what the encoder produced and returns final MaxSim scores of it; it opens no image and needs no model.
:class:`~colqwen3_retrievers.index.page_index.PageIndex` adds an encoder and page images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from numpy.typing import ArrayLike

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, DimensionError, StoreMismatchError
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.stores.where import Filter, Where, is_unicode, parse
from colqwen3_retrievers.vectors.multi_vector import COMPARED, EncoderInfo, MultiVector, PackedEmbeddings

GroupBy = Literal["source"]
"""Names of what hits may be grouped by."""


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One page as a store holds it.

    Attributes:
        page: id, source, number, label, text, metadata and sha256; an image it may have is not stored.
        multi_vector: its token embeddings, with slices, grid and clusters; None where they were not requested.
        image: a reference to the page's image, which the store returns as it is; None when there is none.
    """

    page: Page
    multi_vector: MultiVector | None = None
    image: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """One result of a store's search.

    Attributes:
        record: the page, without its multi-vector.
        score: MaxSim, the float32 sum over query tokens.
    """

    record: Record
    score: float


@runtime_checkable
class MultiVectorStore(Protocol):
    """What every store does. Several threads may call it at once.

    Every method but :meth:`close` raises StoreError once the store is closed, and StoreUnavailableError when its server
    or folder cannot be reached.
    """

    @property
    def info(self) -> EncoderInfo:
        """What shaped the multi-vectors it holds, as of the creation of the store."""
        ...

    @property
    def location(self) -> str:
        """The folder or address to open it again, without any secret."""
        ...

    @property
    def read_only(self) -> bool:
        """Whether nothing can be added or deleted through this handle."""
        ...

    def add(self, records: Iterable[Record]) -> None:
        """Store records durably, each in place of the one with its id.

        All or nothing: after an error, a crash or a kill, none of these records is stored and those they would have
        replaced still are.

        Raises:
            ConfigError: two records with one id, or one without multi-vector.
            DimensionError: a multi-vector of another dim.
            StoreMismatchError: the store was opened with another ``max_visual_tokens``.
            StoreError: read-only, the disk is full, and the like.
        """
        ...

    def delete(self, ids: Iterable[str] | None = None, *, where: Where | Filter | None = None) -> int:
        """Delete the records that have these ids, match a filter, or both where both are given.

        Unknown ids are no error. Atomic like :meth:`add`.

        Returns:
            The number of records deleted.

        Raises:
            ConfigError: neither is given, or a filter that holds for every page.
        """
        ...

    def get(self, ids: Iterable[str], *, vectors: bool = False) -> list[Record]:
        """Return records by id, in the order of ``ids``; unknown ids are left out.

        Args:
            ids: an id listed twice gives its record twice.
            vectors: whether to read the multi-vectors too.

        Raises:
            StoreError: token embeddings are not what was written (a checksum differs).
        """
        ...

    def search(
        self,
        queries: Sequence[MultiVector | ArrayLike],
        k: int,
        *,
        where: Where | Filter | None = None,
        exact: bool = False,
        group_by: GroupBy | None = None,
    ) -> list[list[Match]]:
        """Return the ``k`` best records for each query.

        Args:
            queries: multi-vectors or float arrays (n_tokens, dim).
            k: most matches a query, at least 1.
            where: searches only among these records.
            exact: False allows a store to score candidates only: it may miss a record, and never changes a score.
            group_by: ``"source"`` keeps the best record of each source; records without a source stand alone.

        Returns:
            The matches of each query, best first, equal scores by id.

        Raises:
            ConfigError: ``k`` below 1, an unknown ``group_by``, or a bad filter.
            DimensionError: a query of another dim.
        """
        ...

    def ids(self, where: Where | Filter | None = None) -> list[str]:
        """Return the ids of all or of matching records, in code point order."""
        ...

    def images(self, among: Iterable[str] | None = None) -> set[str]:
        """Return the image references in use, all or only those ``among`` some."""
        ...

    def has_name(self, name: str) -> bool:
        """Return whether the metadata of any record has a dotted name, without listing the records."""
        ...

    def is_empty(self) -> bool:
        """Return whether there are no records, without counting them.

        Meant to be asked before every search. A store shared with other writers may remember that it had records, and
        miss that another handle has deleted the last one since; a search then finds nothing.
        """
        ...

    def __len__(self) -> int:
        """Return the number of records."""
        ...

    def __contains__(self, id: object) -> bool:
        """Return whether there is a record with this id."""
        ...

    def close(self) -> None:
        """Release files and connections; a second call does nothing."""
        ...


def check_info(stored: EncoderInfo, given: EncoderInfo, location: str) -> None:
    """Check that an encoder's multi-vectors can be compared with the stored ones.

    Raises:
        StoreMismatchError: naming each field of :data:`~colqwen3_retrievers.vectors.multi_vector.COMPARED` that
            differs, with both values.

    >>> a = EncoderInfo("ab12", "tiny", "tomoro", 128, 1, 1280, False, 1)
    >>> check_info(a, EncoderInfo("ab12", "/models/tiny", "tomoro", 64, 1, 1280, False, 1), "my-index")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.StoreMismatchError: my-index: dim is 128 in the index, 64 in the encoder (model ...
    """
    differing = [
        f"{name} is {getattr(stored, name)!r} in the index, {getattr(given, name)!r} in the encoder"
        for name in COMPARED
        if getattr(stored, name) != getattr(given, name)
    ]
    if differing:
        models = f"(model {stored.model!r} wrote it, {given.model!r} opens it)"
        raise StoreMismatchError(f"{location}: {'; '.join(differing)} {models}")


def check_addable(stored: EncoderInfo, given: EncoderInfo | None, location: str) -> None:
    """Check that pages are added with the stored bound of visual tokens.

    An encoder with another bound may search, but pages of different resolutions are not mixed.

    Raises:
        StoreMismatchError: naming both bounds.
    """
    if given is not None and given.max_visual_tokens != stored.max_visual_tokens:
        raise StoreMismatchError(
            f"{location}: max_visual_tokens is {stored.max_visual_tokens} in the index, {given.max_visual_tokens} in "
            "the encoder: it can be searched, but pages added now would be of another resolution"
        )


def check_records(records: Iterable[Record], dim: int) -> list[Record]:
    """Return the records to add as a list, checked before anything is written.

    Raises:
        ConfigError: an id twice, an id, source or label that is not valid Unicode, a number beyond 64 bits, or no
            multi-vector.
        DimensionError: a multi-vector whose dim is not ``dim``.
    """
    checked = list(records)
    seen: set[str] = set()
    for record in checked:
        page = record.page
        if page.id in seen:
            raise ConfigError(f"add: two records with the id {page.id!r} in one call")
        seen.add(page.id)
        for name in ("id", "source", "label", "sha256"):
            check_text(getattr(page, name), f"page {page.id!r}: {name}")
        check_text(record.image, f"page {page.id!r}: image")
        if page.number >= 2**63:
            raise ConfigError(f"page {page.id!r}: number {page.number} does not fit in 64 bits")
        if record.multi_vector is None:
            raise ConfigError(f"page {page.id!r}: no multi-vector")
        if record.multi_vector.dim != dim:
            raise DimensionError(f"page {page.id!r}", expected=dim, actual=record.multi_vector.dim)
    return checked


def check_text(value: Any, label: str) -> None:
    """Check that a value is None or a text that can be written as UTF-8.

    Raises:
        ConfigError: it names ``label``.
    """
    if value is None:
        return
    if not isinstance(value, str):
        raise ConfigError(f"{label}: expected a text, got {type(value).__name__}")
    if not is_unicode(value):
        raise ConfigError(f"{label}: not valid Unicode: {value!r}")


def check_ids(ids: Iterable[str]) -> list[str]:
    """Return ids as a list; a single text is an error, not a list of letters.

    Raises:
        ConfigError: not a list of texts.

    >>> check_ids("a.pdf#page=1")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: ids: expected a list of ids, got the text 'a.pdf#page=1'
    """
    if isinstance(ids, str | bytes):
        raise ConfigError(f"ids: expected a list of ids, got the text {ids!r}")
    try:
        checked = list(ids)
    except TypeError as exc:
        raise ConfigError(f"ids: expected a list of ids, got {type(ids).__name__}") from exc
    for item in checked:
        if not isinstance(item, str):
            raise ConfigError(f"ids: expected texts, got {item!r}")
    return checked


def check_search(k: object, group_by: object) -> int:
    """Check ``k`` and ``group_by``, and return ``k`` as an int.

    Raises:
        ConfigError: it names the wrong one.

    >>> check_search(0, None)
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: k: expected a whole number from 1, got 0
    """
    if group_by not in (None, "source"):
        raise ConfigError(f"group_by: expected None or 'source', got {group_by!r}")
    return whole_number(k, "k", least=1)


def check_deletion(ids: Iterable[str] | None, where: Where | Filter | None) -> tuple[list[str] | None, Filter | None]:
    """Return the ids and the parsed filter of a deletion; each may be None, not both.

    Raises:
        ConfigError: neither is given, or one is wrong.
    """
    names, tree = None if ids is None else check_ids(ids), parse(where)
    if names is None and tree is None:
        raise ConfigError("delete: give ids, or a where that says which pages; an empty one would mean all of them")
    return names, tree


def pack_queries(queries: Sequence[MultiVector | ArrayLike], dim: int, location: str) -> PackedEmbeddings:
    """Pack queries for a store whose token embeddings have ``dim`` components.

    Raises:
        ConfigError: one is not a multi-vector, or there is none.
        DimensionError: they have another dim.
    """
    packed = PackedEmbeddings.pack(queries)
    if packed.dim != dim:
        raise DimensionError(f"{location}: query", expected=dim, actual=packed.dim)
    return packed
