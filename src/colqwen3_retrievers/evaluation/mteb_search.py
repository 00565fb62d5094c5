"""mteb's retrieval tasks through the whole pipeline: encoder, pooling, store, search.

mteb gives a corpus and queries, and asks for pages and scores; the means are its own.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

from colqwen3_retrievers.cache.page_cache import PageEmbeddingCache, PageSubmitter
from colqwen3_retrievers.errors import ConfigError, require
from colqwen3_retrievers.evaluation.measuring import how_encoded
from colqwen3_retrievers.index.page_adder import PageEncoder
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.pages.page import Page, Query
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo, MultiVector

_MOST_CACHED = 64 * 2**30  # bytes; and half of what is free where that is less: the index needs the rest


class MtebSearch:
    """An encoder and its store as mteb's ``SearchProtocol``.

    A row of a corpus is its image where it has one (its text joins it with ``include_text`` only), else its title and
    text. Each split and subset has an index of its own, in a temporary folder, which goes when the next one comes. A
    page is encoded once: subsets that ask about the same pages in other languages take token embeddings from a cache.

    Args:
        encoder: what encodes pages and queries.
        folder: where the indexes are made; None takes a temporary folder. :meth:`close` removes what was made.
        exact: whether to score every page; False measures what a search finds by default.

    >>> import mteb                                                                        # doctest: +SKIP
    >>> with MtebSearch(ColQwen3Encoder("tiny")) as search:                                # doctest: +SKIP
    ...     mteb.evaluate(search, mteb.get_tasks(tasks=["VidoreDocVQARetrieval"]))
    """

    def __init__(self, encoder: PageEncoder, *, folder: str | Path | None = None, exact: bool = False) -> None:
        require("mteb", "mteb")
        self._encoder = encoder
        self._exact = exact
        self._folder = tempfile.TemporaryDirectory(prefix="colqwen3-mteb-", dir=folder)
        self._index: PageIndex | None = None
        self._made = 0
        place = Path(self._folder.name)
        most = min(_MOST_CACHED, shutil.disk_usage(place).free // 2)
        submitter = encoder if isinstance(encoder, PageSubmitter) else _AtOnce(encoder)
        self._cache = PageEmbeddingCache(submitter, most, folder=place / "embeddings")

    def index(
        self,
        corpus: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        encode_kwargs: Mapping[str, Any],
        num_proc: int | None = None,
        **kwargs: Any,  # mteb's signature
    ) -> None:
        """Encode a corpus and keep it.

        Args:
            corpus: a data set of rows with ``id`` and ``image`` or ``text`` (and ``title``).
            task_metadata: unused, as all below.
            hf_split: split.
            hf_subset: subset.
            encode_kwargs: ``batch_size`` pages are committed together; ``show_progress_bar``.
            num_proc: processes.
            **kwargs: mteb may give more.

        Raises:
            ConfigError: a row with neither image nor text, or an id that comes twice.
        """
        ids = [str(key) for key in corpus["id"]]
        twice = [key for key, times in Counter(ids).items() if times > 1]
        if twice:  # with the same content it would be passed over, and mteb would count a page that is not there
            raise ConfigError(f"corpus: the id {twice[0]!r} comes twice")
        self._forget()
        self._made += 1
        self._index = PageIndex.open(Path(self._folder.name) / str(self._made), self._encoder, images="none")
        self._index.add(
            _pages(corpus),
            batch_size=int(encode_kwargs.get("batch_size", 16)),
            show_progress=bool(encode_kwargs.get("show_progress_bar", False)),
            cache=self._cache,
        )

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        encode_kwargs: Mapping[str, Any],
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        num_proc: int | None = None,
        **kwargs: Any,  # mteb's signature
    ) -> dict[str, dict[str, float]]:
        """Find the pages of the corpus for each query.

        Args:
            queries: a data set of rows with ``id`` and ``text`` or ``image``.
            task_metadata: unused.
            hf_split: split.
            hf_subset: subset.
            top_k: most pages a query.
            encode_kwargs: ``batch_size`` queries are searched together.
            top_ranked: of reranking tasks: query id -> ids of the pages to rank.
            num_proc: processes.
            **kwargs: mteb may give more.

        Returns:
            Query id -> page id -> score.

        Raises:
            ConfigError: nothing was indexed, or a query with neither text nor image.
        """
        if self._index is None:
            raise ConfigError("search: mteb has given no corpus yet")
        asked = {str(row["id"]): _query(row) for row in queries}
        if len(asked) != len(queries):
            raise ConfigError("queries: an id comes twice")
        k, size = min(top_k, max(1, len(self._index))), int(encode_kwargs.get("batch_size", 32))
        ids, texts = list(asked), list(asked.values())
        if top_ranked is not None:
            return {
                key: self._scores(query, k, {"id": {"$in": list(top_ranked.get(key, ()))}})
                for key, query in asked.items()
            }
        found: dict[str, dict[str, float]] = {}
        for at in range(0, len(ids), size):
            hits = self._index.search_many(texts[at : at + size], k, exact=self._exact)
            for key, row in zip(ids[at : at + size], hits, strict=True):
                found[key] = {hit.page.id: float(hit.score) for hit in row}
        return found

    def _scores(self, query: Query, k: int, where: dict[str, Any]) -> dict[str, float]:
        assert self._index is not None  # noqa: S101 - narrows the type for the checker
        hits = self._index.search(query, k, where=where, exact=True)
        return {hit.page.id: float(hit.score) for hit in hits}

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb files results under: the model, and the settings that shape its multi-vectors."""
        meta = require("mteb", "mteb.models.model_meta").ModelMeta
        info = self._encoder.info
        name = info.model if info.model.count("/") == 1 else f"local/{Path(info.model).name or 'model'}"
        settings = {
            "dim": info.dim, "pool_factor": info.pool_factor, "pool_method": info.pool_method,
            "max_visual_tokens": info.max_visual_tokens, "include_text": info.include_text, "exact": self._exact,
            **how_encoded(self._encoder),
        }  # fmt: skip
        return meta.create_empty(
            {
                "name": name, "revision": info.revision or info.fingerprint[:12], "modalities": ["text", "image"],
                "embed_dim": info.dim, "model_type": ["late-interaction"], "similarity_fn_name": "MaxSim",
                "experiment_kwargs": settings,
            }
        )  # fmt: skip

    def close(self) -> None:
        """Remove what was indexed; the encoder stays open."""
        self._forget()
        self._cache.close()
        self._folder.cleanup()

    def _forget(self) -> None:
        """Remove the index of the corpus before."""
        if self._index is not None:
            self._index.close()
            self._index = None
            shutil.rmtree(Path(self._folder.name) / str(self._made), ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _AtOnce:
    """Lets pages be submitted to an encoder that only encodes."""

    def __init__(self, encoder: PageEncoder) -> None:
        self._encoder = encoder

    @property
    def info(self) -> EncoderInfo:
        return self._encoder.info

    def submit_pages(self, pages: Iterable[Page], /) -> Future[list[MultiVector]]:
        done: Future[list[MultiVector]] = Future()
        try:
            done.set_result(self._encoder.encode_pages(pages))
        except Exception as exc:
            done.set_exception(exc)
        return done


def _pages(corpus: Any) -> Iterator[Page]:
    for row in corpus:
        image = row.get("image")
        text = " ".join(part for part in (row.get("title"), row.get("text")) if part).strip()
        if image is None and not text:
            raise ConfigError(f"corpus: row {row['id']!r} has neither image nor text")
        yield Page(id=str(row["id"]), image=image, text=text)


def _query(row: Mapping[str, Any]) -> Query:
    text = row.get("text")
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"queries: row {row['id']!r} is a conversation, which is no query of one text")
    instruction = row.get("instruction")
    return Query(f"{text} {instruction}" if text and instruction else text or None, row.get("image"))
