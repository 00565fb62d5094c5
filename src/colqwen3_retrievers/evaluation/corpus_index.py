"""The index of a judged set's corpus: created, completed, or only searched. Pages it holds are never changed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from colqwen3_retrievers.errors import ConfigError, StoreError, StoreMismatchError, StoreUnavailableError
from colqwen3_retrievers.evaluation.judged import JudgedSet
from colqwen3_retrievers.evaluation.measuring import encode_queries
from colqwen3_retrievers.index.page_adder import PageEncoder
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.pages.paths import user_path
from colqwen3_retrievers.stores.embedded.catalogue import FILE_NAME
from colqwen3_retrievers.stores.location import is_qdrant
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo

_BATCH = 64

MakeEncoder = Callable[[EncoderInfo | None], PageEncoder]
"""Makes the encoder of an existing index, given its info, or of a new one, given None."""


@dataclass(frozen=True, slots=True)
class CorpusState:
    """A comparison of an index with a corpus.

    Attributes:
        corpus: ids of the corpus.
        missing: ids that the index does not hold.
    """

    corpus: frozenset[str]
    missing: frozenset[str]


def is_there(place: str) -> bool:
    """Return whether there is an index at a place; an empty folder is none.

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
    """Compare an index with the corpus; nothing is encoded or written.

    Raises:
        ConfigError: the index holds a page that is not of the corpus, or one with other content under the same id.
            Neither adding to such an index nor judging it would be right.
        PageError: a file of the corpus cannot be read.
    """
    listed = judged.listed_ids()
    if listed is not None:
        _refuse_others(index, listed)  # before any page is read
    corpus: set[str] = set()
    missing: set[str] = set()
    pages = judged.pages()
    while batch := list(itertools.islice(pages, _BATCH)):
        known = {record.page.id: record.page for record in index.get([page.id for page in batch])}
        for page in batch:
            corpus.add(page.id)
            if page.id not in known:
                missing.add(page.id)
            elif (page.sha256, page.text) != (known[page.id].sha256, known[page.id].text):
                raise ConfigError(
                    f"{index.location}: the page {page.id!r} has another content there than in {judged.name}; "
                    "--as-is searches the index as it is"
                )
    _refuse_others(index, corpus)
    return CorpusState(frozenset(corpus), frozenset(missing))


@contextlib.contextmanager
def corpus_index(
    place: str, judged: JudgedSet, make_encoder: MakeEncoder, *, as_is: bool, keep_images: bool
) -> Iterator[PageIndex]:
    """Open the index of a corpus for searching, after creating or completing it if necessary.

    Args:
        place: a folder or address. The corpus is encoded into a new or empty one; an existing index is compared with
            the corpus, and only missing pages are added.
        judged: with the corpus.
        make_encoder: see :data:`MakeEncoder`.
        as_is: whether to search an existing index without comparing it.
        keep_images: whether page images are stored in the index; only in a folder's.

    Raises:
        ConfigError: see :func:`compare_with_corpus`.
        EncodeError: a query or a page cannot be encoded; queries are encoded before pages are added.
        StoreError: see :meth:`~colqwen3_retrievers.index.page_index.PageIndex.open`.
    """
    info = None
    state: CorpusState | None = None
    if as_is or is_there(place):
        with PageIndex.open(place, read_only=True) as index:
            info = index.info
            if not as_is:
                state = compare_with_corpus(index, judged)
    encoder = make_encoder(info)
    with contextlib.ExitStack() as stack:
        if hasattr(encoder, "close"):
            stack.callback(encoder.close)
        images = "store" if keep_images and not is_qdrant(place) else "none"
        if not as_is and (state is None or state.missing):
            with PageIndex.open(place, encoder, images=images) as index:  # type: ignore[arg-type]
                encode_queries(
                    encoder, judged.queries
                )  # a query that cannot be read fails before all pages are encoded
                if state is not None:
                    _check_unchanged(index, state)
                index.add(
                    (page for page in judged.pages() if state is None or page.id in state.missing), show_progress=True
                )
        yield stack.enter_context(PageIndex.open(place, encoder, read_only=True))


def _check_unchanged(index: PageIndex, state: CorpusState) -> None:
    """Refuse pages that another writer added before this one took the lock."""
    _refuse_others(index, state.corpus)
    added = state.missing.intersection(index.ids())
    if added:
        raise ConfigError(f"{index.location}: another process adds to it, as {min(added)!r}; run again when it is done")


def _refuse_others(index: PageIndex, corpus: AbstractSet[str]) -> None:
    others = sorted(set(index.ids()) - corpus)
    if others:
        raise ConfigError(
            f"{index.location}: holds {len(others)} pages that are not of the corpus: {others[0]}; "
            "--as-is searches it as it is"
        )
