"""The index of a judged set's corpus: made, gone on with, or only asked; what is in it already is never changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from colqwen3_retrievers.errors import ConfigError, StoreError, StoreMismatchError, StoreUnavailableError
from colqwen3_retrievers.evaluation.judged import JudgedSet
from colqwen3_retrievers.evaluation.measuring import encode_queries
from colqwen3_retrievers.index.page_adder import PageEncoder
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.pages.files import user_path
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.stores.embedded.catalogue import FILE_NAME
from colqwen3_retrievers.stores.location import is_qdrant
from colqwen3_retrievers.stores.protocol import Record
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo

_AT_ONCE = 64

MakeEncoder = Callable[[EncoderInfo | None], PageEncoder]
"""Makes the encoder: of an index that is there, by its info, or for a new one."""


@dataclass(frozen=True, slots=True)
class CorpusState:
    """How an index stands to a corpus.

    Attributes:
        corpus: ids of the corpus.
        missing: those the index does not hold yet.
    """

    corpus: frozenset[str]
    missing: frozenset[str]


def is_there(place: str) -> bool:
    """Whether there is an index at a place; an empty folder is none.

    Raises:
        StoreError: the place cannot be reached.

    >>> import tempfile
    >>> is_there(tempfile.mkdtemp())
    False
    """
    if not is_qdrant(place):
        return (user_path(place) / FILE_NAME).exists()
    try:
        with PageIndex.open(place, read_only=True):
            return True
    except (StoreUnavailableError, StoreMismatchError):
        raise
    except StoreError as exc:
        if not exc.absent:
            raise
        return False


def compare_with_corpus(index: PageIndex, judged: JudgedSet) -> CorpusState:
    """Read the corpus and tell what of it an index holds; nothing is encoded and nothing written.

    Raises:
        ConfigError: the index holds a page that is not of the corpus, or one whose content is another than the
            corpus's under the same id. To add to it, or to judge it so, would be wrong either way.
        PageError: a file of the corpus cannot be read.
    """
    listed = judged.listed_ids()
    if listed is not None:
        _refuse_others(index, listed)  # before any page is read
    corpus: set[str] = set()
    missing: set[str] = set()
    for batch in _batches(judged.pages()):
        known = {record.page.id: record for record in index.get([page.id for page in batch])}
        for page in batch:
            corpus.add(page.id)
            if page.id not in known:
                missing.add(page.id)
            elif not _same(page, known[page.id]):
                raise ConfigError(
                    f"{index.location}: the page {page.id!r} has another content there than in {judged.name}; "
                    "--as-is asks the index as it is"
                )
    _refuse_others(index, corpus)
    return CorpusState(frozenset(corpus), frozenset(missing))


@contextlib.contextmanager
def corpus_index(
    place: str, judged: JudgedSet, make_encoder: MakeEncoder, *, as_is: bool, keep_images: bool
) -> Iterator[PageIndex]:
    """Open the index of a corpus for asking, having made or completed it where that is due.

    Args:
        place: a folder or address. New or empty: the corpus is encoded into it. There: compared with the corpus, and
            only pages that are missing are added.
        judged: with the corpus.
        make_encoder: see :data:`MakeEncoder`.
        as_is: asks what is there, and compares nothing.
        keep_images: whether page images go into the index, for pictures of what answered; only into a folder.

    Raises:
        ConfigError: see :func:`compare_with_corpus`.
        EncodeError: a query or a page cannot be encoded; queries are tried before pages are added.
        StoreError: see :meth:`~colqwen3_retrievers.index.page_index.PageIndex.open`.
    """
    there = is_there(place)
    info = None
    state: CorpusState | None = None
    if there or as_is:
        with PageIndex.open(place, read_only=True) as found:
            info = found.info
            if not as_is:
                state = compare_with_corpus(found, judged)
    encoder = make_encoder(info)
    with contextlib.ExitStack() as stack:
        if hasattr(encoder, "close"):
            stack.callback(encoder.close)
        adds = not as_is and (state is None or bool(state.missing))
        images = "store" if keep_images and not is_qdrant(place) else "none"
        if adds:
            with PageIndex.open(place, encoder, images=images) as index:  # type: ignore[arg-type]
                encode_queries(encoder, judged.queries)  # one that cannot be read fails before all pages are encoded
                if state is not None:
                    _check_unchanged(index, state)
                index.add(
                    (page for page in judged.pages() if state is None or page.id in state.missing), show_progress=True
                )
        yield stack.enter_context(PageIndex.open(place, encoder, read_only=True))


def _check_unchanged(index: PageIndex, state: CorpusState) -> None:
    """Make sure that no other writer came in between: now this one holds the lock."""
    _refuse_others(index, state.corpus)
    come = state.missing.intersection(index.ids())
    if come:
        raise ConfigError(f"{index.location}: another process adds to it, as {min(come)!r}; run again when it is done")


def _refuse_others(index: PageIndex, corpus: AbstractSet[str]) -> None:
    others = sorted(set(index.ids()) - corpus)
    if others:
        raise ConfigError(
            f"{index.location}: holds {len(others)} pages that are not of the corpus: {others[0]}; "
            "--as-is asks it as it is"
        )


def _same(page: Page, record: Record) -> bool:
    return page.sha256 == record.page.sha256 and page.text == record.page.text


def _batches(pages: Iterator[Page]) -> Iterator[list[Page]]:
    batch: list[Page] = []
    for page in pages:
        batch.append(page)
        if len(batch) == _AT_ONCE:
            yield batch
            batch = []
    yield batch
