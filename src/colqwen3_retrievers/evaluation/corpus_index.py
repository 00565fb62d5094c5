"""The index of a judged set's corpus: created, completed, or only searched. Pages it holds are never changed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet

from colqwen3_retrievers.errors import ConfigError, StoreError
from colqwen3_retrievers.evaluation.judged import JudgedSet
from colqwen3_retrievers.evaluation.measuring import encode_queries
from colqwen3_retrievers.index.page_adder import PageEncoder
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.stores.location import is_qdrant
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo

_BATCH = 64

MakeEncoder = Callable[[EncoderInfo | None], PageEncoder]
"""Makes the encoder of an existing index, given its info, or of a new one, given None."""


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
        ConfigError: the index holds a page that is not of the corpus, or one with other content under the same id.
            Neither adding to such an index nor judging it would be right.
        EncodeError: a query or a page cannot be encoded; queries are encoded before pages are added.
        PageError: a file of the corpus cannot be read.
        StoreError: see :meth:`~colqwen3_retrievers.index.page_index.PageIndex.open`.
    """
    info: EncoderInfo | None = None
    missing: set[str] | None = None  # None: all pages of the corpus
    try:
        with PageIndex.open(place, read_only=True) as index:
            info, ids = index.info, index.ids()
            missing = set() if as_is else _missing_pages(index, judged)
    except StoreError as exc:
        if as_is or not exc.absent:
            raise
    encoder = make_encoder(info)
    with contextlib.ExitStack() as stack:
        if hasattr(encoder, "close"):
            stack.callback(encoder.close)
        if missing is None or missing:
            images = "store" if keep_images and not is_qdrant(place) else "none"
            with PageIndex.open(place, encoder, images=images) as index:  # type: ignore[arg-type]
                encode_queries(encoder, judged.queries)  # an unreadable query fails before all pages are encoded
                if missing is not None and index.ids() != ids:  # only now does this writer hold the lock
                    raise ConfigError(f"{index.location}: another process changes it; run again when it is done")
                pages = (page for page in judged.pages() if missing is None or page.id in missing)
                index.add(pages, show_progress=True)
        yield stack.enter_context(PageIndex.open(place, encoder, read_only=True))


def _missing_pages(index: PageIndex, judged: JudgedSet) -> set[str]:
    """Return the ids of the corpus that an index lacks; every page it holds must be as in the corpus."""
    listed = judged.listed_ids()
    if listed is not None:
        _refuse_others(index, listed)  # before any page is read
    corpus: set[str] = set()
    missing: set[str] = set()
    pages = judged.pages()
    while batch := list(itertools.islice(pages, _BATCH)):
        held = {record.page.id: record.page for record in index.get([page.id for page in batch])}
        for page in batch:
            corpus.add(page.id)
            if page.id not in held:
                missing.add(page.id)
            elif (page.sha256, page.text) != (held[page.id].sha256, held[page.id].text):
                raise ConfigError(
                    f"{index.location}: the page {page.id!r} has another content there than in {judged.name}; "
                    "--as-is searches the index as it is"
                )
    _refuse_others(index, corpus)
    return missing


def _refuse_others(index: PageIndex, corpus: AbstractSet[str]) -> None:
    others = sorted(set(index.ids()) - corpus)
    if others:
        raise ConfigError(
            f"{index.location}: holds {len(others)} pages that are not of the corpus: {others[0]}; "
            "--as-is searches it as it is"
        )
