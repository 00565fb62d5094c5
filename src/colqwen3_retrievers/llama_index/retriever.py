"""LlamaIndex retriever over a page index: questions in, nodes out; nodes and documents added and deleted."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, Self

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.ingestion import run_transformations
from llama_index.core.schema import (
    BaseNode,
    Document,
    IndexNode,
    NodeWithScore,
    QueryBundle,
    QueryType,
    TransformComponent,
)
from llama_index.core.settings import Settings
from llama_index.core.vector_stores.types import MetadataFilters

from colqwen3_retrievers.atomic_files import write_atomically
from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError, EncodeError, PageError, StoreError
from colqwen3_retrievers.index.page_index import PageIndex, opened_index
from colqwen3_retrievers.llama_index.filters import where_of
from colqwen3_retrievers.llama_index.node_records import (
    NODE_RECORD,
    PAGE_ID,
    page_with_record,
    source_of,
    with_stable_ids,
)
from colqwen3_retrievers.llama_index.nodes import (
    has_image,
    node_from_hit,
    page_from_node,
    plain_text,
    query_from_bundle,
    with_technical,
)
from colqwen3_retrievers.pages.files import user_path
from colqwen3_retrievers.pages.page import Hit, Page, Query, json_object, json_value
from colqwen3_retrievers.pages.remote_images import AllowRemote, checked_remote
from colqwen3_retrievers.retrieval.chat_images import MAX_BYTES, MAX_SIDE, ChatImages
from colqwen3_retrievers.retrieval.evidence import Evidence
from colqwen3_retrievers.stores.protocol import GroupBy
from colqwen3_retrievers.stores.where import optional

_log = logging.getLogger(__name__)

SETTINGS_FILE: Final = "llama_index_retriever.json"
"""Name of the file that :meth:`ColQwen3Retriever.persist` writes."""

_SETTINGS_FORMAT: Final = 1
_IDS_PER_FILTER: Final = 1000


class ColQwen3Retriever(BaseRetriever):
    """Retrieves the pages of an index that answer a question, by late interaction.

    Nodes are described at :func:`~colqwen3_retrievers.llama_index.nodes.node_from_hit`: with ``multimodal=True`` a
    query engine's LLM gets their page images, and they survive evaluation, fusion and storage.
    ``MultiModalContextChatEngine`` and :class:`~colqwen3_retrievers.llama_index.tool.PageRetrieverTool` pass images on,
    too; LlamaIndex's ``ContextChatEngine`` and ``CondensePlusContextChatEngine`` pass on only text, so that a page
    without a text layer is no more than its id. A question may be an image, ``QueryBundle("",
    image_path="chart.png")``, alone or with a text. Scores are MaxSim sums over query tokens, which no cutoff compares
    from one question to another; ``ColQwen3Reranker(score_mode="mean")`` returns -1..1.

    Create one over an existing index, or with :meth:`from_nodes` or :meth:`from_documents`. Nodes are on disk when the
    call that added them returns.

    Args:
        index: a :class:`PageIndex`, or the location of one, which is then opened.
        similarity_top_k: maximum number of nodes, at least 1.
        encoder: encoder of the questions, for an index given by its location; None rebuilds it from the index at the
            first question.
        images_dir: for a location that is not a folder (Qdrant): folder of the page images, see
            :meth:`PageIndex.open`. Without it such pages are returned as texts.
        read_only: whether an index given by its location is opened beside another writer; False to add to it, or to
            create it with ``encoder``.
        filters: restricts the search to matching pages; every operator, nested too.
        where: the same in the language of :mod:`colqwen3_retrievers.stores.where`, with the metadata keys of nodes
            (``page``, ``page_label``, ``page_id``); with ``filters``, both must match.
        exact: whether to score every page; False lets a store score candidates only.
        group_by: ``"source"`` returns the best page of each file.
        window: number of pages before and after each result that follow it, in their order, each with its own score.
        inline_images: whether all nodes carry their image in base64, for readers without access to the index's files;
            otherwise only those whose file a chat model may not read.
        max_side: longest side in pixels of an image in base64; larger ones are reduced.
        max_bytes: maximum number of bytes of an image, before base64; see
            :class:`~colqwen3_retrievers.retrieval.chat_images.ChatImages`.
        boxes: maximum number of answering regions a node, best first, as ``metadata["boxes"]`` in fractions of the
            page; see :class:`~colqwen3_retrievers.retrieval.evidence.Evidence`. Neighbours have them too, texts do not.
        heatmaps: a folder for heatmap images: ``metadata["heatmap"]`` is the file with the map over the node's page.
            Neither key is shown to language or embedding models.
        callback_manager: LlamaIndex's.
        object_map: LlamaIndex's, for index nodes.
        objects: LlamaIndex's, for index nodes.
        verbose: LlamaIndex's.

    Raises:
        ConfigError: an invalid argument; a question without text and image.
        StoreError: the location holds no readable index.
        StoreMismatchError: the index was created by another encoder.

    Example:
        >>> from llama_index.core.query_engine import RetrieverQueryEngine
        >>> from colqwen3_retrievers import ColQwen3Encoder, PageIndex, load_pages
        >>> with PageIndex.open("my-index", ColQwen3Encoder("tiny")) as index:                      # doctest: +SKIP
        ...     index.add(load_pages("reports/"))
        ...     retriever = ColQwen3Retriever(index, similarity_top_k=3)
        ...     for node in retriever.retrieve("what was the revenue?"):
        ...         print(node.score, node.metadata["file_name"], node.metadata["page"])
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
        read_only: bool = True,
        filters: MetadataFilters | None = None,
        where: Mapping[str, Any] | None = None,
        exact: bool = False,
        group_by: GroupBy | None = None,
        window: int = 0,
        inline_images: bool = False,
        max_side: int = MAX_SIDE,
        max_bytes: int = MAX_BYTES,
        boxes: int = 0,
        heatmaps: str | os.PathLike[str] | None = None,
        callback_manager: CallbackManager | None = None,
        object_map: dict[str, Any] | None = None,
        objects: list[IndexNode] | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(callback_manager=callback_manager, object_map=object_map, objects=objects, verbose=verbose)
        self.similarity_top_k = similarity_top_k
        if group_by not in (None, "source"):
            raise ConfigError(f"group_by: expected None or 'source', got {group_by!r}")
        self._search_options: dict[str, Any] = {
            "where": where_of(filters, where), "exact": exact, "group_by": group_by,
            "window": whole_number(window, "window"),
        }  # fmt: skip
        self._inline_images = inline_images
        self._chat_images = ChatImages(max_side, max_bytes)
        self._evidence = Evidence(boxes, heatmaps)
        self._owns_index = not isinstance(index, PageIndex)
        self._images_dir = None if images_dir is None else user_path(images_dir).absolute()
        self._index = opened_index(index, encoder, images_dir, read_only=read_only)

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
        """Add nodes to an index and return a retriever over it.

        The arguments are those of :meth:`add` and of the constructor. An index given by its location is opened for
        writing, and created with ``encoder`` when it is new.

        Raises:
            EncodeError: a node that cannot be read or encoded; those before it may be in the index.
            ConfigError, StoreError: see :meth:`add` and :meth:`PageIndex.open`.

        Example:
            >>> retriever = ColQwen3Retriever.from_nodes(nodes, "my-index", encoder=encoder)        # doctest: +SKIP
        """
        retriever = cls(
            index, encoder=encoder, images_dir=images_dir, read_only=False, similarity_top_k=similarity_top_k,
            filters=filters, group_by=group_by, window=window, callback_manager=callback_manager,
        )  # fmt: skip
        try:
            retriever.add(nodes, on_error=on_error, allow_remote=allow_remote, show_progress=show_progress)
        except BaseException:
            retriever.close()
            raise
        return retriever

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
        """Add documents to an index, images whole and texts split, and return a retriever over it.

        The arguments are those of :meth:`add_documents` and of :meth:`from_nodes`, like the errors.

        Example:
            >>> documents = PageReader().load_data("reports/")                                      # doctest: +SKIP
            >>> retriever = ColQwen3Retriever.from_documents(documents, "my-index", encoder=encoder)  # doctest: +SKIP
        """
        retriever = cls(
            index, encoder=encoder, images_dir=images_dir, read_only=False, similarity_top_k=similarity_top_k,
            filters=filters, group_by=group_by, window=window, callback_manager=callback_manager,
        )  # fmt: skip
        try:
            retriever.add_documents(
                documents, transformations=transformations, on_error=on_error, allow_remote=allow_remote,
                show_progress=show_progress,
            )  # fmt: skip
        except BaseException:
            retriever.close()
            raise
        return retriever

    # -- retrieving ----------------------------------------------------------------------------------------------------

    @property
    def index(self) -> PageIndex:
        """The index that is searched."""
        return self._index

    @property
    def similarity_top_k(self) -> int:
        """Maximum number of nodes a question; may be set."""
        return self._similarity_top_k

    @similarity_top_k.setter
    def similarity_top_k(self, value: int) -> None:
        self._similarity_top_k = whole_number(value, "similarity_top_k", least=1)

    def retrieve(self, str_or_query_bundle: QueryType | Query) -> list[NodeWithScore]:
        """Retrieve nodes for a text, a QueryBundle, or a Query whose image is a file.

        Raises:
            ConfigError: a question without text and image, or a Query with an image in memory.
        """
        return super().retrieve(_query_bundle(str_or_query_bundle))

    async def aretrieve(self, str_or_query_bundle: QueryType | Query) -> list[NodeWithScore]:
        """Retrieve nodes without blocking the event loop; see :meth:`retrieve`."""
        return await super().aretrieve(_query_bundle(str_or_query_bundle))

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._nodes(*self._evidence.search(self._index, _query(query_bundle), self._search_arguments()))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        results = await self._evidence.asearch(self._index, _query(query_bundle), self._search_arguments())
        return await asyncio.to_thread(self._nodes, *results)  # reads the headers of image files

    def _search_arguments(self) -> dict[str, Any]:
        return {"k": self._similarity_top_k, **self._search_options}

    def _nodes(
        self, hits: list[Hit], evidence: Mapping[str, Mapping[str, Any]], neighbour_scores: Mapping[str, float]
    ) -> list[NodeWithScore]:
        """Convert hits to nodes, each followed by its neighbours that are not listed yet."""
        listed = {hit.page.id for hit in hits}
        nodes: list[NodeWithScore] = []
        for hit in hits:
            neighbours = [  # without one that was deleted meanwhile
                page for page in hit.neighbours if page.id not in listed and page.id in neighbour_scores
            ]
            listed.update(page.id for page in neighbours)
            for each in (hit, *(Hit(page, neighbour_scores[page.id]) for page in neighbours)):
                nodes.append(node_from_hit(each, inline_image=self._inline_images, chat_images=self._chat_images))
        for node in nodes:
            node.node = with_technical(node.node, evidence.get(node.node_id, {}))
        return nodes

    # -- adding and deleting -------------------------------------------------------------------------------------------

    def add(
        self,
        nodes: Iterable[BaseNode | NodeWithScore],
        *,
        on_error: Literal["raise", "skip"] = "raise",
        allow_remote: AllowRemote = False,
        show_progress: bool = False,
        batch_size: int = 16,
    ) -> list[str]:
        """Add nodes of any kind, replacing those of the same id; unchanged ones are not encoded again.

        An image is encoded from the image alone, a text with the metadata meant for embedding models. Metadata,
        relationships and templates are preserved. ``page`` in the metadata is the page number, for filters and
        ``window``; nodes without one are numbered in the order of their source. Dates become ISO texts.

        Args:
            nodes: ``ImageNode``, ``ImageDocument``, ``Node``, ``TextNode``, ``IndexNode`` and so on. The object of an
                ``IndexNode`` is put into this retriever's ``object_map``; it is not written.
            on_error: for a node that cannot be read or encoded: ``"raise"``, or ``"skip"`` it and log a warning.
            allow_remote: whether images given only by a web address are fetched and stored in the index; see
                :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.
            show_progress: whether to draw a progress bar (on a terminal).
            batch_size: number of nodes encoded and committed together.

        Returns:
            The ids of these nodes in the index, in order.

        Raises:
            EncodeError: with ``"raise"``, a node that cannot be read or encoded; ``.index`` is its position. Those
                before it may be in the index.
            ConfigError: not nodes; two nodes of one id and different content.
            StoreError: the index is read-only, and the like.
        """
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error: expected 'raise' or 'skip', got {on_error!r}")
        if isinstance(nodes, str | bytes | BaseNode | NodeWithScore) or not isinstance(nodes, Iterable):
            raise ConfigError(f"nodes: expected a list of nodes, got {type(nodes).__name__}")
        plain_nodes = list(_plain_nodes(nodes))
        for node in plain_nodes:
            if isinstance(node, IndexNode) and node.obj is not None:
                self.object_map[node.index_id] = node.obj
        ids: list[str] = []
        skipped: set[str] = set()

        def pages() -> Iterator[Page]:
            for page in _pages(plain_nodes, on_error, checked_remote(allow_remote)):
                ids.append(page.id)
                yield page

        def skip(failure: EncodeError | PageError) -> None:
            if not isinstance(failure, EncodeError) or failure.index is None:
                raise failure
            skipped.add(ids[failure.index])
            _log.warning("node %r is skipped: %s", ids[failure.index], failure.message)

        self._index.add(
            pages(), on_error="raise" if on_error == "raise" else skip, show_progress=show_progress,
            batch_size=batch_size,
        )  # fmt: skip
        return [id_ for id_ in ids if id_ not in skipped]

    async def aadd(
        self,
        nodes: Iterable[BaseNode | NodeWithScore],
        *,
        on_error: Literal["raise", "skip"] = "raise",
        allow_remote: AllowRemote = False,
        show_progress: bool = False,
        batch_size: int = 16,
    ) -> list[str]:
        """Add nodes without blocking the event loop; see :meth:`add`."""
        add = partial(
            self.add, list(nodes), on_error=on_error, allow_remote=allow_remote, show_progress=show_progress,
            batch_size=batch_size,
        )  # fmt: skip
        return await asyncio.to_thread(add)

    def add_documents(
        self,
        documents: Sequence[Document],
        *,
        transformations: Sequence[TransformComponent] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        allow_remote: AllowRemote = False,
        show_progress: bool = False,
        batch_size: int = 16,
    ) -> list[str]:
        """Add documents: those with an image whole, as one page each, and texts split into nodes.

        A document replaces the one with its id: unchanged nodes are not encoded again, and nodes of an earlier version
        (by their ``ref_doc_id``) are deleted once the new ones are stored. So adding all documents again refreshes the
        index; only documents that are no longer given have to be deleted (:meth:`delete_ref_doc`). Nodes of a text are
        named by document and position (``d#text=2``), unless a transformation chose their ids: random ids would make
        each node new every time. Give texts an ``id_``, because LlamaIndex's default is random too.

        Args:
            documents: documents of :class:`~colqwen3_retrievers.llama_index.PageReader` or any other reader.
            transformations: transformations of texts; None takes LlamaIndex's ``Settings.transformations`` (a sentence
                splitter), an empty list leaves texts whole. Images are never transformed: splitters would lose them.
            on_error: as for :meth:`add`.
            allow_remote: as for :meth:`add`.
            show_progress: as for :meth:`add`.
            batch_size: as for :meth:`add`.

        Returns:
            The ids of the nodes in the index.

        Raises:
            EncodeError, ConfigError, StoreError: see :meth:`add`; ``.index`` counts images first, then text nodes. No
                node is deleted then.

        Example:
            >>> retriever.add_documents([Document(id_="d", text="Revenue rose.")])                  # doctest: +SKIP
            ['d#text=1']
            >>> retriever.add_documents([Document(id_="d", text="Revenue fell.")])  # replaces it   # doctest: +SKIP
            ['d#text=1']
        """
        if not all(isinstance(document, BaseNode) for document in documents):
            raise ConfigError("documents: expected a list of LlamaIndex documents")
        images = [document for document in documents if has_image(document)]
        texts = [document for document in documents if not has_image(document)]
        steps = Settings.transformations if transformations is None else list(transformations)
        pieces = run_transformations(texts, steps, show_progress=show_progress) if texts else []
        document_ids = {document.node_id for document in documents}
        nodes = [*images, *with_stable_ids(pieces, document_ids)]
        added = self.add(
            nodes, on_error=on_error, allow_remote=allow_remote, show_progress=show_progress, batch_size=batch_size
        )
        self._delete_others(document_ids, {node.node_id for node in nodes})
        return added

    def delete(self, node_ids: Iterable[str]) -> int:
        """Delete nodes by id; unknown ids are ignored.

        Returns:
            The number of deleted nodes.

        Raises:
            StoreError: the index is read-only.
        """
        return self._index.delete(node_ids)

    async def adelete(self, node_ids: Iterable[str]) -> int:
        """Delete nodes without blocking the event loop; see :meth:`delete`."""
        return await asyncio.to_thread(self.delete, list(node_ids))

    def delete_ref_doc(self, ref_doc_id: str) -> int:
        """Delete all nodes of a document, named by their ``ref_doc_id``.

        Args:
            ref_doc_id: the id of the nodes' document; or the file's ``source``, for pages of files and documents of a
                :class:`~colqwen3_retrievers.llama_index.PageReader`; or the id of a document that was added whole.

        Returns:
            The number of deleted nodes.

        Raises:
            ConfigError: an empty id.
            StoreError: the index is read-only.
        """
        if not isinstance(ref_doc_id, str) or not ref_doc_id:
            raise ConfigError(f"ref_doc_id: expected a document's id, got {ref_doc_id!r}")
        added_as_page = {f"{NODE_RECORD}.node": {"$exists": False}}
        from_reader = {PAGE_ID: {"$exists": True}, "metadata.sha256": {"$exists": True}}
        from_file = {"source": ref_doc_id, "$or": [added_as_page, from_reader]}
        where = {"$or": [{"id": ref_doc_id}, {f"{NODE_RECORD}.ref_doc_id": ref_doc_id}, from_file]}
        return self._index.delete(where=optional(where))

    async def adelete_ref_doc(self, ref_doc_id: str) -> int:
        """Delete a document's nodes without blocking the event loop; see :meth:`delete_ref_doc`."""
        return await asyncio.to_thread(self.delete_ref_doc, ref_doc_id)

    def _delete_others(self, document_ids: Iterable[str], node_ids: Collection[str]) -> None:
        """Delete the nodes of documents except those given, also where one could not be encoded this time."""
        ids = sorted(document_ids)
        for start in range(0, len(ids), _IDS_PER_FILTER):
            of_documents = {f"{NODE_RECORD}.ref_doc_id": {"$in": ids[start : start + _IDS_PER_FILTER]}}
            if stale := [id_ for id_ in self._index.ids(optional(of_documents)) if id_ not in node_ids]:
                self._index.delete(stale)

    # -- persisting and copying ----------------------------------------------------------------------------------------

    def persist(self, persist_dir: str | os.PathLike[str]) -> Path:
        """Write the retriever's settings and the location of its index into ``llama_index_retriever.json``.

        The index itself is always on disk and is not copied. If the index, and ``images_dir`` where one was given, are
        inside ``persist_dir``, that folder can be moved. Callbacks and the objects of index nodes are not written.

        Returns:
            The path of the file.

        Raises:
            StoreError: it cannot be written.
        """
        path = Path(persist_dir).absolute() / SETTINGS_FILE
        settings = {"format": _SETTINGS_FORMAT, "index": _relative(self._index.location, path.parent)}
        if self._images_dir is not None:
            settings["images_dir"] = _relative(str(self._images_dir), path.parent)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({**settings, **self._settings()}, indent=2, default=json_value).encode())
        except OSError as exc:
            raise StoreError(f"{path}: cannot be written: {exc.strerror or exc}") from exc
        return path

    @classmethod
    def from_persist_dir(
        cls,
        persist_dir: str | os.PathLike[str],
        *,
        encoder: ColQwen3Encoder | None = None,
        images_dir: str | os.PathLike[str] | None = None,
        read_only: bool = True,
    ) -> Self:
        """Reopen a retriever that :meth:`persist` wrote.

        Args:
            persist_dir: as for :meth:`persist`.
            encoder: encoder of the questions; None rebuilds it from the index at the first question.
            images_dir: the present folder of the page images; None takes the written one.
            read_only: whether to open the index beside another writer; False to add to it.

        Raises:
            StoreError: no settings in this folder, or no index at its location.
        """
        path = Path(persist_dir).absolute() / SETTINGS_FILE
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            if settings.pop("format") != _SETTINGS_FORMAT:
                raise ValueError("unknown format")
            location, written_images_dir = settings.pop("index"), settings.pop("images_dir", None)
            if not isinstance(location, str) or not isinstance(written_images_dir, str | None):
                raise TypeError("index and images_dir must be texts")
        except OSError as exc:
            raise StoreError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
        except (ValueError, KeyError, AttributeError, TypeError) as exc:
            raise StoreError(f"{path}: not the settings of a retriever: {exc}") from exc
        if "://" not in location:
            location = str(path.parent / location)
        if images_dir is None and written_images_dir is not None:
            images_dir = path.parent / written_images_dir
        try:
            return cls(location, encoder=encoder, images_dir=images_dir, read_only=read_only, **settings)
        except (TypeError, ConfigError) as exc:
            raise StoreError(f"{path}: not the settings of a retriever: {exc}") from exc

    def _settings(self) -> dict[str, Any]:
        """Return the constructor's arguments that are plain data."""
        return {
            "similarity_top_k": self._similarity_top_k, **self._search_options, "inline_images": self._inline_images,
            "max_side": self._chat_images.max_side, "max_bytes": self._chat_images.max_bytes,
            "boxes": self._evidence.boxes, "heatmaps": self._evidence.heatmaps,
        }  # fmt: skip

    def close(self) -> None:
        """Close the index if it was opened here by its location; one that was passed in stays open."""
        if self._owns_index:
            self._index.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle settings and index: copies in this process share the index, others open it read-only."""
        return partial(type(self), images_dir=self._images_dir, **self._settings()), (self._index,)

    def __repr__(self) -> str:
        return f"ColQwen3Retriever({self._index.location!r}, similarity_top_k={self.similarity_top_k})"


def _query_bundle(question: QueryType | Query) -> QueryType:
    if not isinstance(question, Query):
        return question
    if question.image is not None and not isinstance(question.image, str | Path):
        raise ConfigError("query: LlamaIndex refers to images by path; save the image and pass Query(image=path)")
    return QueryBundle(question.text or "", image_path=None if question.image is None else str(question.image))


def _query(bundle: QueryBundle) -> Query:
    # Query transforms such as HyDE put the texts to embed beside the query; MaxSim of concatenated texts is the sum of
    # theirs.
    return query_from_bundle(bundle, text="\n".join(bundle.embedding_strs))


def _plain_nodes(nodes: Iterable[object]) -> Iterator[BaseNode]:
    for position, item in enumerate(nodes):
        node = item.node if isinstance(item, NodeWithScore) else item
        if not isinstance(node, BaseNode):
            raise ConfigError(f"nodes: expected a node at {position}, got {type(item).__name__}")
        yield node


def _pages(nodes: Sequence[BaseNode], on_error: str, allow_remote: AllowRemote) -> Iterator[Page]:
    """Convert nodes to pages with records, one at a time, so that pages before a bad node are stored."""
    counts: Counter[str] = Counter()
    for position, node in enumerate(nodes):
        try:
            # The text that is encoded contains the metadata: dates have to be the ISO texts that will come back.
            node = node.model_copy(update={"metadata": json_object(node.metadata, f"node {node.node_id!r}")})
            source = source_of(node)
            counts[source] += 1
            content = page_from_node(node, allow_remote)
            page = page_with_record(node, content, plain_text(node), counts[source] if source else 1)
            _ = page.sha256  # opens the image now, while it is known which node it belongs to
        except (PageError, ConfigError) as exc:
            if on_error == "raise":
                name = f"node {node.node_id!r}" if isinstance(exc, PageError) else None  # a ConfigError names it
                raise EncodeError.of(exc, position, name) from exc
            _log.warning("node %r is skipped: %s", node.node_id, exc)
        else:
            yield page


def _relative(location: str, folder: Path) -> str:
    """Return a location inside a folder relative to it, so that the folder can be moved, and others unchanged."""
    path = Path(location)
    inside = path.is_absolute() and path.is_relative_to(folder)
    return path.relative_to(folder).as_posix() or "." if inside else location
