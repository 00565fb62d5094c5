"""The nodes of one call of a reranker."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Self

from llama_index.core.schema import BaseNode, NodeWithScore

from colqwen3_retrievers.cache.page_cache import PageEmbeddingCache
from colqwen3_retrievers.errors import ColQwen3Error, ConfigError, PageError
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.llama_index.nodes import page_from_node, page_of
from colqwen3_retrievers.llama_index.reranker_tools import Tools
from colqwen3_retrievers.pages.page import Query
from colqwen3_retrievers.pages.remote_images import AllowRemote
from colqwen3_retrievers.stores.protocol import Record
from colqwen3_retrievers.vectors.multi_vector import MultiVector


@dataclass(slots=True, eq=False)
class Candidates:
    """The nodes of one call by position: their multi-vectors, or what they wait for, or what is wrong with them.

    ``kept`` holds the records of those whose multi-vector is the index's.

    With ``allow_remote``, pictures known by a web address are fetched. Leaving the block cancels what is under way.
    """

    vectors: dict[int, MultiVector] = field(default_factory=dict)
    kept: dict[int, Record] = field(default_factory=dict)
    pages: dict[int, Future[MultiVector]] = field(default_factory=dict)
    broken: dict[int, ColQwen3Error] = field(default_factory=dict)
    query: Future[list[MultiVector]] = field(default_factory=Future)
    allow_remote: AllowRemote = False
    left: bool = False
    _cache: PageEmbeddingCache | None = None
    _waiting: deque[tuple[int, BaseNode]] = field(default_factory=deque)
    _at_once: int = 1

    def start(self, nodes: Sequence[NodeWithScore], query: Query, tools: Tools, at_once: int | None = None) -> None:
        """Take what the index holds and start encoding the rest; it reads files, and may open a checkpoint.

        Args:
            nodes: the candidates.
            query: the question.
            tools: what encodes, and where embeddings are known from.
            at_once: most nodes under way; those beyond wait for :meth:`reach`. None starts all.
        """
        self.query = tools.encoder.submit_queries([query])
        if tools.index is not None:
            self._look_up(nodes, tools.index)
        self._cache = tools.cache
        self._waiting.extend((i, given.node) for i, given in enumerate(nodes) if i not in self.vectors)
        self._at_once = at_once or len(nodes)
        self._start_next()

    def is_waiting(self, position: int) -> bool:
        """Whether the node at a position has to be reached first."""
        return bool(self._waiting) and self._waiting[0][0] <= position

    def reach(self, position: int) -> None:
        """Start encoding as far as a position, once those before it are settled; it reads files, like :meth:`start`."""
        while self.is_waiting(position):
            self._start_next()

    def _start_next(self) -> None:
        places, pages = [], []
        for _ in range(min(self._at_once, len(self._waiting))):
            position, node = self._waiting.popleft()
            try:
                pages.append(page_from_node(node, self.allow_remote))
                places.append(position)
            except (PageError, ConfigError) as exc:
                self.broken[position] = exc
        if self._cache is not None:
            self.pages.update(zip(places, self._cache.submit(pages), strict=True))
        if self.left:  # the task that wanted it was cancelled while this thread was at it
            self.cancel()

    def _look_up(self, nodes: Sequence[NodeWithScore], index: PageIndex) -> None:
        names = [(given.node_id, page_of(given.node)) for given in nodes]
        asked = {name for pair in names for name in pair if name}
        stored = {record.page.id: record for record in index.get(asked, vectors=True)}
        for position, given in enumerate(nodes):
            record = next((stored[name] for name in names[position] if name in stored), None)
            if record is None or record.multi_vector is None:
                continue
            if given.node.metadata.get("sha256", record.page.sha256) == record.page.sha256:
                self.vectors[position], self.kept[position] = record.multi_vector, record

    def cancel(self) -> None:
        """Cancel what is still under way."""
        self.query.cancel()
        for future in self.pages.values():
            future.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.left = True
        self.cancel()
