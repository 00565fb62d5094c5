"""The writing half of the LlamaIndex retriever: nodes and documents in, and out again."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Literal

from llama_index.core.ingestion import run_transformations
from llama_index.core.schema import BaseNode, Document, IndexNode, NodeWithScore, TransformComponent
from llama_index.core.settings import Settings

from colqwen3_retrievers.errors import ConfigError, EncodeError, PageError
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.llama_index.document_nodes import with_steady_ids
from colqwen3_retrievers.llama_index.node_records import NODE_RECORD, PAGE_ID, page_with_record, source_of
from colqwen3_retrievers.llama_index.nodes import has_image, page_from_node, plain_text
from colqwen3_retrievers.pages.page import Page, json_object
from colqwen3_retrievers.pages.remote_images import AllowRemote, checked_remote

_log = logging.getLogger(__name__)

_IDS_A_FILTER = 1000


class _BadNode(Exception):  # noqa: N818 - never leaves this module: it tells our errors from those of the index
    def __init__(self, error: EncodeError) -> None:
        super().__init__(str(error))
        self.error = error


class Writing:
    """What :class:`~colqwen3_retrievers.llama_index.ColQwen3Retriever` does to its index."""

    _index: PageIndex
    object_map: dict[str, Any]

    def add(
        self,
        nodes: Iterable[BaseNode | NodeWithScore],
        *,
        on_error: Literal["raise", "skip"] = "raise",
        allow_remote: AllowRemote = False,
        show_progress: bool = False,
        batch_size: int = 16,
    ) -> list[str]:
        """Index nodes of any kind, each in place of the one with its id; what is there just so is not encoded again.

        A picture is encoded from the picture alone, a text with the metadata meant for embedding models; metadata,
        relationships and templates are kept whole. ``page`` in the metadata is the page's number, for filters and for
        ``window``; nodes without one are numbered as they come within their source. Dates are kept as ISO text.

        Args:
            nodes: ``ImageNode``, ``ImageDocument``, ``Node``, ``TextNode``, ``IndexNode`` and so on. What an
                ``IndexNode`` refers to stays in this retriever's ``object_map``; it is not written.
            on_error: a node that cannot be read or encoded: ``"raise"``, or ``"skip"`` it with a warning in the log.
            allow_remote: whether a picture known by a web address only is fetched, and kept in the index; see
                :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.
            show_progress: whether to draw a progress bar (on a terminal).
            batch_size: nodes encoded and committed together.

        Returns:
            The ids of the nodes that are indexed now, in order.

        Raises:
            EncodeError: with ``"raise"``, a node that cannot be read or encoded; ``.index`` is its position.
            ConfigError: not nodes; two of one id and different content.
            StoreError: the index was opened for reading, and the like.
        """
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error: expected 'raise' or 'skip', got {on_error!r}")
        if isinstance(nodes, str | bytes | BaseNode | NodeWithScore) or not isinstance(nodes, Iterable):
            raise ConfigError(f"nodes: expected a list of nodes, got {type(nodes).__name__}")
        given = list(_plain(nodes))
        self._remember_objects(given)
        ready = _pages(
            given, on_error, checked_remote(allow_remote)
        )  # read as it is encoded: what came before a bad node is kept
        again: list[tuple[int, Page]] = []
        done: list[str] = []
        while True:
            taken: list[tuple[int, Page]] = []
            try:
                self._index.add(
                    _taken(itertools.chain(again, ready), taken), show_progress=show_progress, batch_size=batch_size
                )
            except _BadNode as bad:
                raise bad.error from bad.error.__cause__
            except EncodeError as exc:
                if exc.index is None or not 0 <= exc.index < len(taken):
                    raise
                position, page = taken[exc.index]
                if on_error == "raise":
                    raise exc.at(position) from exc
                _log.warning("node %r is skipped: %s", page.id, exc)
                kept = max(0, exc.index - batch_size)  # what lies further back is committed
                done += [earlier.id for _, earlier in taken[:kept]]
                again = [pair for pair in taken[kept:] if pair[1] is not page]
            else:
                return done + [page.id for _, page in taken]

    async def aadd(
        self,
        nodes: Iterable[BaseNode | NodeWithScore],
        *,
        on_error: Literal["raise", "skip"] = "raise",
        allow_remote: AllowRemote = False,
        show_progress: bool = False,
        batch_size: int = 16,
    ) -> list[str]:
        """Index nodes without blocking the event loop; see :meth:`add`."""
        given = list(nodes)
        return await asyncio.to_thread(
            lambda: self.add(
                given,
                on_error=on_error,
                allow_remote=allow_remote,
                show_progress=show_progress,
                batch_size=batch_size,
            )
        )

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
        """Index documents: those with a picture whole, a page each, and texts split into nodes.

        A document takes the place of the one with its id: what is unchanged is not encoded again, and nodes that an
        earlier version left (by their ``ref_doc_id``) are forgotten once the new ones are there. So adding all
        documents again is a refresh; only those no longer given have to be deleted (:meth:`delete_ref_doc`). Pieces of
        a text are named by document and place (``d#text=2``), unless a transformation chose their ids: random ones
        would make each piece new every time. Give texts an ``id_``, for LlamaIndex's default is random too.

        Args:
            documents: of :class:`~colqwen3_retrievers.llama_index.PageReader` or any other reader.
            transformations: what texts go through first; None takes LlamaIndex's ``Settings.transformations`` (a
                sentence splitter), an empty list leaves them whole. Pictures go through none: splitters lose them.
            on_error: as for :meth:`add`.
            allow_remote: as for :meth:`add`.
            show_progress: as for :meth:`add`.
            batch_size: as for :meth:`add`.

        Returns:
            The ids of the nodes that are indexed now.

        Raises:
            EncodeError, ConfigError, StoreError: see :meth:`add`; ``.index`` counts pictures first, then text nodes.
                Nothing is forgotten then.

        Example:
            >>> retriever.add_documents([Document(id_="d", text="Revenue rose.")])                  # doctest: +SKIP
            ['d#text=1']
            >>> retriever.add_documents([Document(id_="d", text="Revenue fell.")])  # in its place    # doctest: +SKIP
            ['d#text=1']
        """
        if not all(isinstance(document, BaseNode) for document in documents):
            raise ConfigError("documents: expected a list of LlamaIndex documents")
        pictures = [document for document in documents if has_image(document)]
        texts = [document for document in documents if not has_image(document)]
        steps = Settings.transformations if transformations is None else list(transformations)
        made = run_transformations(texts, steps, show_progress=show_progress) if texts else []
        ids = {document.node_id for document in documents}
        nodes = [*pictures, *with_steady_ids(made, ids)]
        done = self.add(
            nodes,
            on_error=on_error,
            allow_remote=allow_remote,
            show_progress=show_progress,
            batch_size=batch_size,
        )
        self._forget_others(ids, {node.node_id for node in nodes})
        return done

    def delete(self, node_ids: Iterable[str]) -> int:
        """Forget nodes by id; ids that are not there are no error.

        Returns:
            How many there were.

        Raises:
            StoreError: the index was opened for reading.
        """
        return self._index.delete(node_ids)

    async def adelete(self, node_ids: Iterable[str]) -> int:
        """Forget nodes without blocking the event loop; see :meth:`delete`."""
        return await asyncio.to_thread(self.delete, list(node_ids))

    def delete_ref_doc(self, ref_doc_id: str) -> int:
        """Forget all nodes of a document, as their ``ref_doc_id`` names it.

        Args:
            ref_doc_id: the id of the document they are from, or the ``source`` of the file, for pages of files: those
                added to the index, and documents of a :class:`~colqwen3_retrievers.llama_index.PageReader`. A document
                that was indexed whole goes by its own id too.

        Returns:
            How many nodes there were.

        Raises:
            ConfigError: an empty id.
            StoreError: the index was opened for reading.
        """
        if not isinstance(ref_doc_id, str) or not ref_doc_id:
            raise ConfigError(f"ref_doc_id: expected a document's id, got {ref_doc_id!r}")
        added = {f"{NODE_RECORD}.node": {"$exists": False}}
        read = {PAGE_ID: {"$exists": True}, "metadata.sha256": {"$exists": True}}
        from_files = {"source": ref_doc_id, "$or": [added, read]}
        return self._index.delete(
            where={"$or": [{"id": ref_doc_id}, {f"{NODE_RECORD}.ref_doc_id": ref_doc_id}, from_files]}
        )

    async def adelete_ref_doc(self, ref_doc_id: str) -> int:
        """Forget a document's nodes without blocking the event loop; see :meth:`delete_ref_doc`."""
        return await asyncio.to_thread(self.delete_ref_doc, ref_doc_id)

    def _forget_others(self, ref_doc_ids: Iterable[str], kept: Collection[str]) -> None:
        """Forget the nodes of documents but for those to keep, one that could not be encoded this time among them."""
        ids = sorted(ref_doc_ids)
        for start in range(0, len(ids), _IDS_A_FILTER):
            theirs = {f"{NODE_RECORD}.ref_doc_id": {"$in": ids[start : start + _IDS_A_FILTER]}}
            if stale := [id_ for id_ in self._index.ids(theirs) if id_ not in kept]:
                self._index.delete(stale)

    def _remember_objects(self, nodes: Sequence[BaseNode]) -> None:
        for node in nodes:
            if isinstance(node, IndexNode) and node.obj is not None:
                self.object_map[node.index_id] = node.obj


def _taken(pairs: Iterable[tuple[int, Page]], taken: list[tuple[int, Page]]) -> Iterator[Page]:
    for pair in pairs:
        taken.append(pair)
        yield pair[1]


def _plain(nodes: Iterable[object]) -> Iterator[BaseNode]:
    for position, given in enumerate(nodes):
        node = given.node if isinstance(given, NodeWithScore) else given
        if not isinstance(node, BaseNode):
            raise ConfigError(f"nodes: expected a node at {position}, got {type(given).__name__}")
        yield node


def _pages(nodes: Sequence[BaseNode], on_error: str, allow_remote: AllowRemote) -> Iterator[tuple[int, Page]]:
    """Pages to index, with the position of the node each is of."""
    of_source: Counter[str] = Counter()
    for position, node in enumerate(nodes):
        source = source_of(node)
        of_source[source] += 1
        try:
            # A date is indexed as it comes back, ISO text: what is encoded of a text holds the metadata.
            node = node.model_copy(update={"metadata": json_object(node.metadata, f"node {node.node_id!r}")})
            made = page_from_node(node, allow_remote)
            page = page_with_record(node, made, plain_text(node), of_source[source] if source else 1)
            _ = page.sha256  # opens the picture: now, while its node is at hand
            yield position, page
        except (PageError, ConfigError) as exc:
            if on_error == "raise":
                raise _BadNode(EncodeError.of(exc, position)) from exc
            _log.warning("node %r is skipped: %s", node.node_id, exc)
