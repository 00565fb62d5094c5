"""The distributed engine: multi-vectors in a Qdrant collection, for many pages, many writers and many readers.

One point a page, with two named vectors: all token embeddings in float16 without a graph, which give the scores, and
pooled ones searched as int8, which find the candidates. A search is one call: candidates first, then MaxSim of these
over all their token embeddings, both inside the server.

**What differs from a folder.** Qdrant has no transactions. A point is written whole or not at all, so there is never
half a page; but a call that adds many pages sends several requests, each of them is in force once it is acknowledged,
and a search meanwhile may see the first pages and not the last. An ``add`` that is killed, or that loses its server for
good, leaves some of its pages; adding the same pages again goes on from there. Two writers of one page: the later one
wins, whole. What :meth:`QdrantStore.add` acknowledged is in the write-ahead log of as many replicas as
``write_consistency`` asks for; a power cut is a matter of the server's disk and of replicas.

**Scores** are MaxSim of the stored float16 token embeddings, summed in float32, by the server, which rounds the query
to float16 too: each query token's part is right within 2**-11, and the sum of 25 such tokens was, within 3.4e-4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Self

from numpy.typing import ArrayLike

from colqwen3_retrievers.errors import ConfigError, DimensionError, StoreError, StoreUnavailableError, require
from colqwen3_retrievers.stores.protocol import (
    GroupBy,
    Match,
    Record,
    check_addable,
    check_ids,
    check_info,
    check_records,
    check_search,
)
from colqwen3_retrievers.stores.qdrant.collection import FULL, QdrantOptions, open_collection
from colqwen3_retrievers.stores.qdrant.connection import Address, Connection, connect, parse_address
from colqwen3_retrievers.stores.qdrant.filters import compile_filter, has_ids, point_id
from colqwen3_retrievers.stores.qdrant.points import (
    BRIEF,
    NAMED,
    WHOLE,
    check_ours,
    check_size,
    make_point,
    read_multi_vector,
    read_record,
    requests,
)
from colqwen3_retrievers.stores.qdrant.search import FEWEST_CANDIDATES, best, make_request, weigh
from colqwen3_retrievers.stores.where import Filter, Where, matches, parse
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo, MultiVector, PackedEmbeddings

_PAGE: Final = 1_000  # points a scroll or a retrieval brings at once
_PAGE_OF_VECTORS: Final = 8
_IDS_A_FILTER: Final = 20_000  # 0.8 MB of JSON
_QUERIES_A_REQUEST: Final = 32


class QdrantStore:
    """Multi-vectors in a Qdrant collection; a :class:`~colqwen3_retrievers.stores.protocol.MultiVectorStore`.

    Args:
        location: an address as :func:`~.qdrant_connection.parse_address` reads it, or the name of a collection when a
            ``client`` is given.
        info: what made the multi-vectors. Needed to make a collection; compared with an existing one.
        read_only: nothing is made, added or deleted through this handle.
        api_key: the server's key; None reads ``QDRANT_API_KEY``. It is sent to the server and shown nowhere.
        options: how the collection is made and talked to.
        client: a ready ``qdrant_client.QdrantClient``, which stays open when the store is closed.

    Raises:
        ConfigError: a bad address, or an encoder whose pages would not fit into a multi-vector of Qdrant's (fewer than
            1,048,576 floats); the message says what would.
        StoreMismatchError: the collection was made by another model, dim, pooling or rendering, or with other options.
        StoreUnavailableError: the server cannot be reached, is too busy, or does not answer in time.
        StoreError: no such collection and no ``info`` to make it; not one of ours; the API key was refused.
        MissingExtraError: qdrant-client is not installed, or scipy, which pools pages for finding candidates.

    Example:
        >>> import numpy as np
        >>> from qdrant_client import QdrantClient
        >>> from colqwen3_retrievers.pages.page import Page
        >>> info = EncoderInfo("ab12", "tiny", "tomoro", 2, 1, 1280, False, 1)
        >>> with QdrantStore("pages", info=info, client=QdrantClient(":memory:")) as store:
        ...     store.add([Record(Page(source="a.pdf"), MultiVector(np.eye(2, dtype=np.float32)))])
        ...     [(match.record.page.id, round(match.score, 3)) for match in store.search([[[0.6, 0.8]]], k=1)[0]]
        [('a.pdf#page=1', 0.8)]
    """

    def __init__(
        self,
        location: str,
        *,
        info: EncoderInfo | None = None,
        read_only: bool = False,
        api_key: str | None = None,
        options: QdrantOptions | None = None,
        client: Any = None,
    ) -> None:
        self._options = options or QdrantOptions()
        self._read_only = read_only
        self._given = info
        self._has_records = False  # known to have some: only then is_empty need not ask
        self._address: Address | None = None
        if client is None:
            self._address = parse_address(location)
            self._name = self._address.collection
            client = connect(self._address, api_key=api_key, timeout=self._options.timeout)
        else:
            self._name = location
        shown = str(self._address) if self._address is not None else f"Qdrant collection {location!r}"
        self._call = Connection(client, shown, attempts=self._options.attempts, owned=self._address is not None)
        self._models = require("qdrant", "qdrant_client.models", "qdrant-client")
        try:
            self._collection = open_collection(self._call, self._name, info, self._options, read_only=read_only)
            if info is not None:
                check_info(self._collection.info, info, self.location)
        except BaseException:
            self._call.close()
            raise

    @property
    def info(self) -> EncoderInfo:
        """What shaped the multi-vectors."""
        return self._collection.info

    @property
    def location(self) -> str:
        """The address, without any key."""
        return self._call.location

    @property
    def address(self) -> Address | None:
        """The address to open it by again, or None when it was given a client."""
        return self._address

    @property
    def read_only(self) -> bool:
        """Whether it was opened for reading only."""
        return self._read_only

    def add(self, records: Iterable[Record]) -> None:
        """Keep records, each in place of the one with its id; see the protocol, and this module for what is atomic.

        Raises:
            InputTooLongError: one with more floats than Qdrant takes; ``.index`` is its position, and none is kept.
            StoreUnavailableError: the server was lost on the way; the message says how many records it has.
        """
        self._writable()
        check_addable(self.info, self._given, self.location)
        checked = check_records(records, self.info.dim)
        for position, record in enumerate(checked):
            check_size(record.multi_vector, f"page {record.page.id!r}", position)
        points = (make_point(record, pool=self._collection.pool) for record in checked)
        kept = 0
        for batch in requests(points):
            try:
                self._update("upsert", points=batch)
            except StoreError as exc:
                if kept:
                    exc.args = (f"{exc}; {kept} of {len(checked)} pages of this call are kept: add them again",)
                raise
            kept += len(batch)

    def delete(self, ids: Iterable[str] | None = None, *, where: Where | Filter | None = None) -> int:
        """Forget records; see the protocol. The count is of the moment just before, others may delete them too."""
        self._writable()
        named = None if ids is None else check_ids(ids)
        tree = parse(where)
        if named is None and tree is None:
            raise ConfigError("delete: give ids, or a where that says which pages; an empty one would mean all of them")
        if tree is not None:
            points = [point for point, _ in self._matching(tree)]
            if named is not None:
                meant = set(_points(named))
                points = [point for point in points if point in meant]
        else:
            points = [str(found.id) for found in self._retrieve(_points(named or []), NAMED)]
        for first in range(0, len(points), _IDS_A_FILTER):
            chosen = self._models.PointIdsList(points=points[first : first + _IDS_A_FILTER])
            self._update("delete", points_selector=chosen)
            self._has_records = False
        return len(points)

    def get(self, ids: Iterable[str], *, vectors: bool = False) -> list[Record]:
        """Give records by id; see the protocol."""
        asked = check_ids(ids)
        found: dict[str, Record] = {}
        for point in self._retrieve(_points(asked), WHOLE if vectors else BRIEF, vectors=vectors):
            record = read_record(point.payload)
            if vectors:
                multi_vector = read_multi_vector(point.payload, point.vector, self.location)
                record = Record(record.page, multi_vector, record.image)
            found[record.page.id] = record
        return [found[page_id] for page_id in asked if page_id in found]

    def search(
        self,
        queries: Sequence[MultiVector | ArrayLike],
        k: int,
        *,
        where: Where | Filter | None = None,
        exact: bool = False,
        group_by: GroupBy | None = None,
    ) -> list[list[Match]]:
        """Find the ``k`` best records for each query; see the protocol.

        Without ``exact``, the records scored are the best by their pooled token embeddings, at least a hundred.
        """
        wanted = check_search(k, group_by)
        tree = parse(where)
        self._call.check_open()
        if len(queries) == 0:
            return []
        packed = PackedEmbeddings.pack(queries)
        if packed.dim != self.info.dim:
            raise DimensionError(f"{self.location}: query", expected=self.info.dim, actual=packed.dim)
        for rows in packed:
            check_size(rows, "query")
        filters, candidates = self._filters(tree), self._collection.pool > 0 and not exact
        found: list[list[Match]] = [[] for _ in queries]
        limit = (wanted if group_by is None else 4 * wanted) + 1
        left = list(range(len(packed))) if filters else []
        while left:
            prefetch = max(FEWEST_CANDIDATES, self._options.candidates * limit) if candidates else None
            asked = [
                make_request(packed[i], chosen, limit, prefetch=prefetch, plain=self._call.local)
                for i in left
                for chosen in filters
            ]
            answers = self._query(asked)
            unsettled = []
            for position, i in enumerate(left):
                parts = answers[position * len(filters) : (position + 1) * len(filters)]
                settled = best(parts, limit, wanted, group_by)
                if settled is None:
                    unsettled.append(i)
                else:
                    found[i] = settled
            left = unsettled
            limit *= 4
        return found

    def ids(self, where: Where | Filter | None = None) -> list[str]:
        """Give ids in code point order; see the protocol."""
        return sorted(page_id for _, page_id in self._matching(parse(where)))

    def images(self, among: Iterable[str] | None = None) -> set[str]:
        """Give the image references records hold; see the protocol."""
        models = self._models
        empty = models.IsEmptyCondition(is_empty=models.PayloadField(key="image"))
        filters = [models.Filter(must_not=[empty])]
        if among is not None:
            names = sorted(set(among))
            filters = [
                models.Filter(
                    must=[models.FieldCondition(key="image", match=models.MatchAny(any=names[first : first + _PAGE]))]
                )
                for first in range(0, len(names), _PAGE)
            ]
        self._call.check_open()
        return {point.payload["image"] for chosen in filters for point in self._scroll(chosen, ["image"])}

    def is_empty(self) -> bool:
        """Return whether there are no records; one request at most, and none once records are known of.

        Records that another handle deletes afterwards go unnoticed; see the protocol.
        """
        self._call.check_open()
        if not self._has_records:
            points, _ = self._call(
                "scroll", collection_name=self._name, limit=1, with_payload=False, with_vectors=False
            )
            self._has_records = bool(points)
        return not self._has_records

    def __len__(self) -> int:
        """Count the records."""
        return int(self._call("count", collection_name=self._name, exact=True).count)

    def __contains__(self, id: object) -> bool:
        """Whether there is a record with this id."""
        return isinstance(id, str) and bool(list(self._retrieve(_points([id]), NAMED)))

    def close(self) -> None:
        """Let go of the connection, unless the client was handed in; a second call does nothing."""
        self._call.close()

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def __repr__(self) -> str:
        """Name the address; never the key."""
        return f"QdrantStore({self.location!r}{', read_only=True' if self._read_only else ''})"

    # -- inside --------------------------------------------------------------------------------------------------------

    def _writable(self) -> None:
        self._call.check_open()
        if self._read_only:
            raise StoreError(f"{self.location}: opened with read_only=True")

    def _update(self, method: str, **arguments: Any) -> None:
        """Write and wait until it is done. ``medium``: one replica decides the order of two writers of one page."""
        done = self._call(
            method, collection_name=self._name, wait=True, ordering=self._models.WriteOrdering.MEDIUM, **arguments
        )
        status = str(getattr(done.status, "value", done.status))
        if status not in ("completed", "acknowledged"):  # "wait_timeout": noted, and not yet in force
            kind = StoreUnavailableError if status == "wait_timeout" else StoreError
            raise kind(f"{self.location}: {method}: the server answered {status}")

    def _filters(self, tree: Filter | None) -> list[Any]:
        """Give filters of Qdrant's that together hold for just the pages meant: None for all, no filter for none."""
        compiled = compile_filter(tree, substrings=self._collection.substrings)
        if compiled.exact:
            return [_as_filter(self._models, compiled.filter)]
        points = [point for point, _ in self._matching(tree)]
        return [has_ids(points[first : first + _IDS_A_FILTER]) for first in range(0, len(points), _IDS_A_FILTER)]

    def _matching(self, tree: Filter | None) -> Iterator[tuple[str, str]]:
        """Go through the pages a filter holds for: point id and page id."""
        compiled = compile_filter(tree, substrings=self._collection.substrings)
        chosen = _as_filter(self._models, compiled.filter)
        if compiled.exact:
            yield from ((str(point.id), point.payload["id"]) for point in self._scroll(chosen, NAMED))
            return
        for point in self._scroll(chosen, BRIEF):
            if matches(tree, read_record(point.payload).page):
                yield str(point.id), point.payload["id"]

    def _scroll(self, chosen: Any, parts: list[str]) -> Iterator[Any]:
        offset = None
        while True:
            points, offset = self._call(
                "scroll", collection_name=self._name, scroll_filter=chosen, limit=_PAGE, offset=offset,
                with_payload=parts, with_vectors=False,
            )  # fmt: skip
            yield from points if parts == ["image"] else check_ours(points, self.location)
            if offset is None:
                return

    def _retrieve(self, points: list[str], parts: list[str], *, vectors: bool = False) -> Iterator[Any]:
        self._call.check_open()
        size = _PAGE_OF_VECTORS if vectors else _PAGE
        for first in range(0, len(points), size):
            yield from self._call(
                "retrieve", collection_name=self._name, ids=points[first : first + size],
                with_payload=parts, with_vectors=[FULL] if vectors else False,
            )  # fmt: skip

    def _query(self, asked: list[Any]) -> list[list[Any]]:
        answers: list[list[Any]] = []
        for some in requests(((request, weigh(request)) for request in asked), _QUERIES_A_REQUEST):
            made = self._call("query_batch_points", collection_name=self._name, requests=some)
            answers.extend(check_ours(answer.points, self.location) for answer in made)
        return answers


def _points(ids: Iterable[str]) -> list[str]:
    """Point ids, each once; an id that no page can have has none."""
    points: dict[str, None] = {}
    for page_id in ids:
        try:
            points[point_id(page_id)] = None
        except UnicodeEncodeError:
            continue
    return list(points)


def _as_filter(models: Any, condition: Any) -> Any:
    return condition if condition is None or isinstance(condition, models.Filter) else models.Filter(must=[condition])
