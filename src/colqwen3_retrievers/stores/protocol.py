"""What a store of multi-vectors is: the records it keeps and what it promises, whatever engine lies behind.

A store holds what the encoder made and gives back final MaxSim scores of what it holds; it opens no picture and needs
no model. :class:`~colqwen3_retrievers.index.page_index.PageIndex` puts an encoder and page images around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from numpy.typing import ArrayLike

from colqwen3_retrievers.errors import ConfigError, DimensionError, StoreMismatchError
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.stores.where import Filter, Where
from colqwen3_retrievers.vectors.multi_vector import COMPARED, EncoderInfo, MultiVector

GroupBy = Literal["source"]
"""What hits may be grouped by."""


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One page as a store keeps it.

    Attributes:
        page: id, source, number, label, text, metadata and sha256; a picture it may carry is not kept by the store.
        multi_vector: its token embeddings, with slices, grid and clusters; None where they were not asked for.
        image: where the page's picture is kept: a text the store hands back unread; None when there is none.
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
    """What every store does. Calls may come from several threads at once.

    Every method but :meth:`close` raises StoreError once the store is closed, and StoreUnavailableError when whatever
    lies behind cannot be reached.
    """

    @property
    def info(self) -> EncoderInfo:
        """What shaped the multi-vectors it holds, as it was when the store was made."""
        ...

    @property
    def location(self) -> str:
        """The folder or address, for messages and for opening it again; it holds no secret."""
        ...

    @property
    def read_only(self) -> bool:
        """Whether nothing can be added or deleted through this handle."""
        ...

    def add(self, records: Iterable[Record]) -> None:
        """Keep records, each in place of the one with its id; when this returns they are durable.

        All of the call or nothing of it: after an error, a crash or a kill, none of these records is there and the ones
        they would have replaced still are.

        Raises:
            ConfigError: two records with one id, or one without multi-vector.
            DimensionError: a multi-vector of another dim.
            StoreMismatchError: the store was opened with another ``max_visual_tokens``.
            StoreError: read-only, the disk is full, and the like.
        """
        ...

    def delete(self, ids: Iterable[str] | None = None, *, where: Where | Filter | None = None) -> int:
        """Forget the records with these ids, or those a filter holds for; with both, those that meet both.

        Ids that are not there are no error. Atomic like :meth:`add`.

        Returns:
            How many records there were.

        Raises:
            ConfigError: neither is given, or a filter that holds for every page.
        """
        ...

    def get(self, ids: Iterable[str], *, vectors: bool = False) -> list[Record]:
        """Give records by id, in the order asked for; ids that are not there are left out.

        Args:
            ids: as often as they are listed.
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
        """Find the ``k`` best records for each query.

        Args:
            queries: multi-vectors or float arrays (n_tokens, dim).
            k: most matches a query, at least 1.
            where: only among these.
            exact: False allows a store to score candidates only: it may miss a record, and never changes a score.
            group_by: ``"source"`` keeps the best record of each source; records without a source stand alone.

        Returns:
            For each query its matches, best first, equal scores by id.

        Raises:
            ConfigError: ``k`` below 1, an unknown ``group_by``, or a bad filter.
            DimensionError: a query of another dim.
        """
        ...

    def ids(self, where: Where | Filter | None = None) -> list[str]:
        """Give the ids of all records, or of those a filter holds for, in code point order."""
        ...

    def images(self, among: Iterable[str] | None = None) -> set[str]:
        """Give the image references records hold, all or only those among some: what may not be removed."""
        ...

    def is_empty(self) -> bool:
        """Return whether there are no records, without counting them.

        Meant to be asked before every search. A store shared with other writers may remember that it had records, and
        miss that another handle has deleted the last one since; a search then finds nothing.
        """
        ...

    def __len__(self) -> int:
        """Count the records."""
        ...

    def __contains__(self, id: object) -> bool:
        """Whether there is a record with this id."""
        ...

    def close(self) -> None:
        """Let go of files and connections; a second call does nothing."""
        ...


def check_info(stored: EncoderInfo, given: EncoderInfo, location: str) -> None:
    """Refuse an encoder whose multi-vectors cannot be compared with the stored ones. The model's name does not matter.

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
    """Refuse adding with another bound of visual tokens: such pages can be searched, but not mixed.

    Raises:
        StoreMismatchError: naming both bounds.
    """
    if given is not None and given.max_visual_tokens != stored.max_visual_tokens:
        raise StoreMismatchError(
            f"{location}: max_visual_tokens is {stored.max_visual_tokens} in the index, {given.max_visual_tokens} in "
            "the encoder: it can be searched, but pages added now would be of another resolution"
        )


def check_records(records: Iterable[Record], dim: int) -> list[Record]:
    """Check what is about to be added, before anything is written.

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
    """Refuse what is not a text that can be written as UTF-8; None passes.

    Raises:
        ConfigError: it names ``label``.
    """
    if value is None:
        return
    if not isinstance(value, str):
        raise ConfigError(f"{label}: expected a text, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise ConfigError(f"{label}: not valid Unicode: {value!r}") from exc


def check_ids(ids: Iterable[str]) -> list[str]:
    """Check a list of ids; a single text is refused, for its letters would be taken for ids.

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
    """Check ``k`` and ``group_by``.

    Raises:
        ConfigError: it names the one at fault.

    >>> check_search(0, None)
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: k: expected a whole number from 1, got 0
    """
    if isinstance(k, bool) or not hasattr(k, "__index__") or k.__index__() < 1:
        raise ConfigError(f"k: expected a whole number from 1, got {k!r}")
    if group_by not in (None, "source"):
        raise ConfigError(f"group_by: expected None or 'source', got {group_by!r}")
    return int(k.__index__())
