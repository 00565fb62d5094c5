"""LlamaIndex retriever: a question in, page nodes out, best first by MaxSim."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import (
    BaseNode,
    Document,
    IndexNode,
    NodeWithScore,
    QueryBundle,
    QueryType,
    TransformComponent,
)
from llama_index.core.vector_stores.types import MetadataFilters

from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.llama_index.filters import where_of
from colqwen3_retrievers.llama_index.nodes import node_from_hit, node_from_page, query_from_bundle, with_technical
from colqwen3_retrievers.llama_index.retriever_settings import Persisting
from colqwen3_retrievers.llama_index.retriever_writing import Writing
from colqwen3_retrievers.pages.files import user_path
from colqwen3_retrievers.pages.page import Hit, Query
from colqwen3_retrievers.pages.remote_images import AllowRemote
from colqwen3_retrievers.retrieval.evidence import Evidence
from colqwen3_retrievers.stores.protocol import GroupBy


class ColQwen3Retriever(Writing, Persisting, BaseRetriever):
    """Finds the pages of an index that answer a question, by late interaction.

    Nodes come as described at :func:`~colqwen3_retrievers.llama_index.nodes.node_from_hit`: page images reach a
    multimodal LLM through ``multimodal=True``, and survive evaluation, fusion and storing. A question may be an image:
    ``QueryBundle("", image_path="chart.png")``, or with a text beside it. Scores are MaxSim sums over query tokens, for
    which no cutoff holds from one question to another; ``ColQwen3Reranker(score_mode="mean")`` gives -1..1.

    Made over an index that is there, or with :meth:`from_nodes` and :meth:`from_documents`. What is added is on disk
    when the call returns.

    Args:
        index: a :class:`PageIndex`, or the location of one, which is then opened for reading.
        similarity_top_k: most nodes, at least 1.
        encoder: what encodes the questions of an index given by location; None rebuilds it from what the index knows,
            when the first question comes.
        images_dir: with a location: where the pages' images lie, for an index elsewhere than in a folder (Qdrant); see
            :meth:`PageIndex.open`. Without it such pages come as texts.
        filters: only pages these hold for; every operator, nested too.
        where: the same in the language of :mod:`colqwen3_retrievers.stores.where` (``page``, ``page_label`` and
            ``page_id`` are the nodes' own); with both, both must hold.
        exact: whether to score every page; False lets a store score candidates only.
        group_by: ``"source"`` gives the best page of each file.
        window: pages before and after each result that follow it in the list, in their order and without a score.
        inline_images: whether nodes carry the picture in base64 too, for whoever cannot read the index's files.
        boxes: most regions that answered, a node: ``metadata["boxes"]``, best first, in shares of the page; see
            :class:`~colqwen3_retrievers.retrieval.evidence.Evidence`. Neighbours have theirs too, texts have none.
        heatmaps: a folder for pictures of them: ``metadata["heatmap"]`` is the file of a node's page with the map over
            it. Neither key is shown to language or embedding models.
        callback_manager: LlamaIndex's.
        object_map: LlamaIndex's, for index nodes.
        objects: LlamaIndex's, for index nodes.
        verbose: LlamaIndex's.

    Raises:
        ConfigError: an argument that cannot be used; a question without text and image.
        StoreError: the location holds no index that can be read.
        StoreMismatchError: the encoder is not the one that made the index.

    Example:
        >>> from llama_index.core.query_engine import RetrieverQueryEngine
        >>> from colqwen3_retrievers import ColQwen3Encoder, PageIndex, load_pages
        >>> with PageIndex.open("my-index", ColQwen3Encoder("tiny")) as index:                      # doctest: +SKIP
        ...     index.add(load_pages("reports/"))
        ...     retriever = ColQwen3Retriever(index, similarity_top_k=3)
        ...     for found in retriever.retrieve("what was the revenue?"):
        ...         print(found.score, found.metadata["file_name"], found.metadata["page"])
        ...     engine = RetrieverQueryEngine.from_args(retriever, llm=multimodal_llm, multimodal=True)
        ...     print(engine.query("what was the revenue?"))
    """

    def __init__(
        self,
        index: PageIndex | str | os.PathLike[str],
        *,
        similarity_top_k: int = 2,
        encoder: ColQwen3Encoder | None = None,
        images_dir: str | os.PathLike[str] | None = None,
        filters: MetadataFilters | None = None,
        where: Mapping[str, Any] | None = None,
        exact: bool = False,
        group_by: GroupBy | None = None,
        window: int = 0,
        inline_images: bool = False,
        boxes: int = 0,
        heatmaps: str | os.PathLike[str] | None = None,
        callback_manager: CallbackManager | None = None,
        object_map: dict[str, Any] | None = None,
        objects: list[IndexNode] | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(callback_manager=callback_manager, object_map=object_map, objects=objects, verbose=verbose)
        self.similarity_top_k = similarity_top_k
        self._where = where_of(filters, where)
        if group_by not in (None, "source"):
            raise ConfigError(f"group_by: expected None or 'source', got {group_by!r}")
        if isinstance(window, bool) or not isinstance(window, int) or window < 0:
            raise ConfigError(f"window: expected a whole number from 0, got {window!r}")
        self._exact = exact
        self._group_by: GroupBy | None = group_by
        self._window = window
        self._inline_images = inline_images
        self._evidence = Evidence(boxes, heatmaps)
        self._owns_index = not isinstance(index, PageIndex)
        self._images_dir = None if images_dir is None else user_path(images_dir).absolute()
        if isinstance(index, PageIndex):
            for name, given in (("encoder", encoder), ("images_dir", images_dir)):
                if given is not None:
                    raise ConfigError(f"{name}: an index that is open has one; give it to PageIndex.open")
            self._index = index
        elif isinstance(index, str | os.PathLike):
            self._index = PageIndex.open(index, encoder, images_dir=images_dir, read_only=True)
        else:
            raise ConfigError(f"index: expected a PageIndex or a location, got {type(index).__name__}")

    @classmethod
    def from_nodes(
        cls,
        nodes: Iterable[BaseNode | NodeWithScore],
        index: PageIndex | str | os.PathLike[str],
        *,
        encoder: ColQwen3Encoder | None = None,
        images_dir: str | os.PathLike[str] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        allow_remote: AllowRemote = False,
        show_progress: bool = False,
        similarity_top_k: int = 2,
        filters: MetadataFilters | None = None,
        group_by: GroupBy | None = None,
        window: int = 0,
        callback_manager: CallbackManager | None = None,
    ) -> Self:
        """Index nodes and give a retriever over them.

        Args:
            nodes: of any kind; see :meth:`add`.
            index: an open index, or the place of one, which is made where there is none and opened for writing.
            encoder: what encodes, for an index given by its place; None is right where the index is there already.
            images_dir: where images are kept, for a place that is no folder.
            on_error: a node that cannot be read or encoded: ``"raise"``, or ``"skip"`` it with a warning in the log.
            allow_remote: whether a picture known by a web address only is fetched; see :meth:`add`.
            show_progress: whether to draw a progress bar (on a terminal).
            similarity_top_k: as for the constructor, like what follows.
            filters: which nodes are searched; all are indexed.
            group_by: see above.
            window: see above.
            callback_manager: LlamaIndex's.

        Raises:
            EncodeError: a node that cannot be read or encoded; those before it may be indexed already.
            ConfigError, StoreError: see :meth:`add` and :meth:`PageIndex.open`.

        Example:
            >>> retriever = ColQwen3Retriever.from_nodes(nodes, "my-index", encoder=encoder)        # doctest: +SKIP
        """
        options = {
            "similarity_top_k": similarity_top_k, "filters": filters, "group_by": group_by, "window": window,
            "callback_manager": callback_manager,
        }  # fmt: skip
        with cls._writer(index, encoder, images_dir, options)._closed_on_error() as made:
            made.add(nodes, on_error=on_error, allow_remote=allow_remote, show_progress=show_progress)
        return made

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[Document],
        index: PageIndex | str | os.PathLike[str],
        *,
        encoder: ColQwen3Encoder | None = None,
        images_dir: str | os.PathLike[str] | None = None,
        transformations: Sequence[TransformComponent] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        allow_remote: AllowRemote = False,
        show_progress: bool = False,
        similarity_top_k: int = 2,
        filters: MetadataFilters | None = None,
        group_by: GroupBy | None = None,
        window: int = 0,
        callback_manager: CallbackManager | None = None,
    ) -> Self:
        """Index documents, pictures whole and texts split, and give a retriever over them.

        Args:
            documents: of :class:`~colqwen3_retrievers.llama_index.PageReader` or any other reader.
            index: as for :meth:`from_nodes`, like what is not named here.
            encoder: see there.
            images_dir: see there.
            transformations: what texts go through; see :meth:`add_documents`.
            on_error: see there.
            allow_remote: see there.
            show_progress: see there.
            similarity_top_k: see there.
            filters: see there.
            group_by: see there.
            window: see there.
            callback_manager: LlamaIndex's.

        Raises:
            EncodeError, ConfigError, StoreError: see :meth:`from_nodes`.

        Example:
            >>> documents = PageReader().load_data("reports/")                                      # doctest: +SKIP
            >>> retriever = ColQwen3Retriever.from_documents(documents, "my-index", encoder=encoder)  # doctest: +SKIP
        """
        options = {
            "similarity_top_k": similarity_top_k, "filters": filters, "group_by": group_by, "window": window,
            "callback_manager": callback_manager,
        }  # fmt: skip
        with cls._writer(index, encoder, images_dir, options)._closed_on_error() as made:
            made.add_documents(
                documents,
                transformations=transformations,
                on_error=on_error,
                allow_remote=allow_remote,
                show_progress=show_progress,
            )
        return made

    @classmethod
    def _writer(
        cls, index: PageIndex | str | os.PathLike[str], encoder: ColQwen3Encoder | None,
        images_dir: str | os.PathLike[str] | None, options: dict[str, Any],
    ) -> Self:  # fmt: skip
        if isinstance(index, PageIndex) or not isinstance(index, str | os.PathLike):
            return cls(index, encoder=encoder, images_dir=images_dir, **options)  # which refuses what is no index
        return cls._over(PageIndex.open(index, encoder, images_dir=images_dir), images_dir, options)

    @contextmanager
    def _closed_on_error(self) -> Iterator[Self]:
        try:
            yield self
        except BaseException:
            self.close()
            raise

    @property
    def index(self) -> PageIndex:
        """The index that is searched."""
        return self._index

    @property
    def similarity_top_k(self) -> int:
        """Most nodes a question gets; may be set."""
        return self._similarity_top_k

    @similarity_top_k.setter
    def similarity_top_k(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"similarity_top_k: expected a whole number from 1, got {value!r}")
        self._similarity_top_k = value

    def close(self) -> None:
        """Close the index if it was opened here by its location; one that was handed in stays open."""
        if self._owns_index:
            self._index.close()

    def retrieve(self, str_or_query_bundle: QueryType | Query) -> list[NodeWithScore]:
        """Retrieve nodes for a text, a QueryBundle, or a Query whose image lies in a file.

        Raises:
            ConfigError: a question without text and image, or a Query with an image in memory.
        """
        return super().retrieve(_bundle(str_or_query_bundle))

    async def aretrieve(self, str_or_query_bundle: QueryType | Query) -> list[NodeWithScore]:
        """Retrieve without blocking the event loop; see :meth:`retrieve`."""
        return await super().aretrieve(_bundle(str_or_query_bundle))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as settings and the index's location; a copy opens the index for reading."""
        return _copy, (type(self), self._index, self._images_dir, self._settings())

    def __deepcopy__(self, memo: dict[int, Any]) -> ColQwen3Retriever:
        """Give a copy that shares the index."""
        return _copy(type(self), self._index, self._images_dir, self._settings())

    def _settings(self) -> dict[str, Any]:
        return {
            "similarity_top_k": self._similarity_top_k,
            "where": self._where,
            "exact": self._exact,
            "group_by": self._group_by,
            "window": self._window,
            "inline_images": self._inline_images,
            "boxes": self._evidence.boxes,
            "heatmaps": self._evidence.heatmaps,
        }

    def __repr__(self) -> str:
        """Name the index."""
        return f"ColQwen3Retriever({self._index.location!r}, similarity_top_k={self.similarity_top_k})"

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._nodes(*self._evidence.search(self._index, _question(query_bundle), self._how()))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = await self._evidence.asearch(self._index, _question(query_bundle), self._how())
        return await asyncio.to_thread(self._nodes, *found)  # it opens the pictures' headers

    def _how(self) -> dict[str, Any]:
        return {
            "k": self._similarity_top_k, "where": self._where, "exact": self._exact, "group_by": self._group_by,
            "window": self._window,
        }  # fmt: skip

    def _nodes(self, hits: list[Hit], evidence: Mapping[str, Mapping[str, Any]]) -> list[NodeWithScore]:
        """Nodes of hits; a neighbour follows the first hit it belongs to, and none stands there twice."""
        seen = {hit.page.id for hit in hits}
        nodes: list[NodeWithScore] = []
        for hit in hits:
            nodes.append(node_from_hit(hit, inline_image=self._inline_images))
            beside = [page for page in hit.neighbours if page.id not in seen]
            seen.update(page.id for page in beside)
            nodes += [NodeWithScore(node=node_from_page(page, inline_image=self._inline_images)) for page in beside]
        for given in nodes:
            given.node = with_technical(given.node, evidence.get(given.node_id, {}))
        return nodes


def _bundle(asked: QueryType | Query) -> QueryType:
    """LlamaIndex's own kind of question for ours."""
    if not isinstance(asked, Query):
        return asked
    if asked.image is not None and not isinstance(asked.image, str | Path):
        raise ConfigError("query: LlamaIndex carries an image by its path; save it and give Query(image=path)")
    return QueryBundle(asked.text or "", image_path=None if asked.image is None else str(asked.image))


def _copy(
    kind: type[ColQwen3Retriever], index: PageIndex, images_dir: Path | None, settings: dict[str, Any]
) -> ColQwen3Retriever:
    made = kind(index, **settings)
    made._images_dir = images_dir  # for persist alone: the index has its own
    return made


def _question(bundle: QueryBundle) -> Query:
    # Query transforms (HyDE and the like) put what is to be embedded beside the query; MaxSim of texts laid end to end
    # is the sum of theirs.
    return query_from_bundle(bundle, text="\n".join(bundle.embedding_strs))
