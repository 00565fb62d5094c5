"""The distributed store: a Qdrant collection, for many writers and readers.

One point a page, with two named vectors: all token embeddings in float16 without a graph, which give the scores, and
pooled ones searched as int8, which find the candidates. A search is one request: candidates first, then MaxSim of these
over all their token embeddings, both inside the server.

**Differences from a folder.** Qdrant has no transactions. A point is written whole or not at all, so there is never
half a page; but a call that adds many pages sends several requests, each effective once it is acknowledged, and a
search meanwhile may see the first pages and not the last. An ``add`` that is killed, or that loses its server for good,
leaves some of its pages; adding the same pages again completes it. Of two writers of one page the later one wins,
whole. What :meth:`QdrantStore.add` acknowledged is in the write-ahead log of as many replicas as ``write_consistency``
requires; whether it survives a power cut depends on the server's disk and on replicas.

**Scores** are MaxSim of the stored float16 token embeddings, summed in float32, by the server, which rounds the query
to float16 too: each query token's part is exact within 2**-11, and the sum of 25 such tokens was within 3.4e-4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from colqwen3_retrievers.errors import StoreError, StoreUnavailableError, require
from colqwen3_retrievers.stores.protocol import (
    GroupBy,
    Match,
    Record,
    check_addable,
    check_deletion,
    check_ids,
    check_info,
    check_records,
    check_search,
    pack_queries,
)
from colqwen3_retrievers.stores.qdrant.collection import FULL, POOLED, QdrantOptions, open_collection
from colqwen3_retrievers.stores.qdrant.connection import Connection, connect, parse_address
from colqwen3_retrievers.stores.qdrant.filters import compile_filter, has_ids, point_id
from colqwen3_retrievers.stores.qdrant.points import (
    BRIEF,
    BYTES_A_FLOAT,
    NAMED,
    WHOLE,
    check_origin,
    check_size,
    make_point,
    read_multi_vector,
    read_record,
    requests,
)
from colqwen3_retrievers.stores.where import Condition, Filter, Where, is_unicode, matches, parse
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo, MultiVector

FEWEST_CANDIDATES: Final = 100

_PAGE: Final = 1_000  # points a scroll or a retrieval brings at once
_PAGE_OF_VECTORS: Final = 8
_IDS_A_FILTER: Final = 20_000  # 0.8 MB of JSON
_QUERIES_A_REQUEST: Final = 32


class QdrantStore:
    """Multi-vectors in a Qdrant collection.

    A :class:`~colqwen3_retrievers.stores.protocol.MultiVectorStore`.

    Args:
        location: an address as :func:`~colqwen3_retrievers.stores.qdrant.connection.parse_address` reads it, or the
            name of a collection when a ``client`` is given.
        info: of the encoder that makes the multi-vectors. Required to create a collection; compared with an existing
            one.
        read_only: nothing is created, added or deleted through this handle.
        api_key: the server's key; None reads ``QDRANT_API_KEY``. It is sent to the server and shown nowhere.
        options: how the collection is created and accessed.
        client: an open ``qdrant_client.QdrantClient``, which stays open when the store is closed.

    Attributes:
        info: what shaped the multi-vectors.
        location: the address, without any key.
        address: the address to open it by again, or None when it was given a client.
        read_only: whether it was opened for reading only.

    Raises:
        ConfigError: a bad address, or an encoder whose pages would not fit into a multi-vector of Qdrant (fewer than
            1,048,576 floats); the message says what would.
        StoreMismatchError: the collection was made by another model, dim, pooling or rendering, or with other options.
        StoreUnavailableError: the server cannot be reached, is too busy, or does not answer in time.
        StoreError: no such collection and no ``info`` to create it; a collection of another program; the API key was
            refused.
        MissingExtraError: qdrant-client is not installed.

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
        self.read_only = read_only
        self._given = info
        self._has_records = False  # known to have some: only then is_empty sends nothing
        self.address = None if client is not None else parse_address(location)
        if self.address is None:
            self._name, self.location = location, f"Qdrant collection {location!r}"
        else:
            self._name, self.location = self.address.collection, str(self.address)
            client = connect(self.address, api_key=api_key, timeout=self._options.timeout)
        attempts, owned = self._options.attempts, self.address is not None
        self._call = Connection(client, self.location, attempts=attempts, owned=owned)
        self._models = require("qdrant", "qdrant_client.models", "qdrant-client")
        try:
            self._collection = open_collection(self._call, self._name, info, self._options, read_only=read_only)
            self.info = self._collection.info
            if info is not None:
                check_info(self.info, info, self.location)
        except BaseException:
            self._call.close()
            raise

    def add(self, records: Iterable[Record]) -> None:
        """Store records, each in place of the one with its id; see the protocol.

        A point is written whole; see this module for what else is atomic.

        Raises:
            InputTooLongError: one with more floats than Qdrant takes; ``.index`` is its position, and none is stored.
            StoreUnavailableError: the server was lost on the way; the message says how many records are stored.
        """
        self._check_writable()
        check_addable(self.info, self._given, self.location)
        checked = check_records(records, self.info.dim)
        for position, record in enumerate(checked):
            check_size(record.multi_vector, f"page {record.page.id!r}", position)
        points = (make_point(record, pool=self._collection.pool) for record in checked)
        stored = 0
        for batch in requests(points):
            try:
                self._update("upsert", points=batch)
            except StoreError as exc:
                if stored:
                    exc.args = (f"{exc}; {stored} of {len(checked)} pages of this call are kept: add them again",)
                raise
            stored += len(batch)

    def delete(self, ids: Iterable[str] | None = None, *, where: Where | Filter | None = None) -> int:
        """Delete records; see the protocol. The count is of the moment before."""
        self._check_writable()
        named, tree = check_deletion(ids, where)
        if tree is None:
            points = [str(point.id) for point in self._retrieve(_point_ids(named or []), NAMED)]
        else:
            points = [point for point, _ in self._matching(tree)]
            if named is not None:
                meant = set(_point_ids(named))
                points = [point for point in points if point in meant]
        for first in range(0, len(points), _IDS_A_FILTER):
            selector = self._models.PointIdsList(points=points[first : first + _IDS_A_FILTER])
            self._update("delete", points_selector=selector)
            self._has_records = False
        return len(points)

    def get(self, ids: Iterable[str], *, vectors: bool = False) -> list[Record]:
        """Return records by id; see the protocol."""
        names = check_ids(ids)
        records: dict[str, Record] = {}
        for point in self._retrieve(_point_ids(names), WHOLE if vectors else BRIEF, vectors=vectors):
            record = read_record(point.payload)
            if vectors:
                multi_vector = read_multi_vector(point.payload, point.vector, self.location)
                record = Record(record.page, multi_vector, record.image)
            records[record.page.id] = record
        return [records[page_id] for page_id in names if page_id in records]

    def search(
        self,
        queries: Sequence[MultiVector | ArrayLike],
        k: int,
        *,
        where: Where | Filter | None = None,
        exact: bool = False,
        group_by: GroupBy | None = None,
    ) -> list[list[Match]]:
        """Return the ``k`` best records for each query; see the protocol.

        Without ``exact``, the records scored are the best by their pooled token embeddings, at least a hundred.
        """
        k = check_search(k, group_by)
        tree = parse(where)
        self._call.check_open()
        if len(queries) == 0:
            return []
        packed = pack_queries(queries, self.info.dim, self.location)
        for rows in packed:
            check_size(rows, "query")
        filters, candidates = self._filters(tree), self._collection.pool > 0 and not exact
        results: list[list[Match]] = [[] for _ in queries]
        limit = (k if group_by is None else 4 * k) + 1
        pending = list(range(len(packed))) if filters else []
        while pending:
            prefetch = max(FEWEST_CANDIDATES, self._options.candidates * limit) if candidates else None
            searches = [
                make_request(packed[i], condition, limit, prefetch=prefetch, plain=self._call.local)
                for i in pending
                for condition in filters
            ]
            answers = self._query(searches)
            unsettled = []
            for position, i in enumerate(pending):
                hits = best(answers[position * len(filters) : (position + 1) * len(filters)], limit, k, group_by)
                if hits is None:
                    unsettled.append(i)
                else:
                    results[i] = hits
            pending = unsettled
            limit *= 4
        return results

    def ids(self, where: Where | Filter | None = None) -> list[str]:
        """Return ids in code point order; see the protocol."""
        return sorted(page_id for _, page_id in self._matching(parse(where)))

    def images(self, among: Iterable[str] | None = None) -> set[str]:
        """Return the image references in use; see the protocol."""
        models = self._models
        if among is None:
            empty = models.IsEmptyCondition(is_empty=models.PayloadField(key="image"))
            filters = [models.Filter(must_not=[empty])]
        else:
            names = sorted(set(among))
            batches = [models.MatchAny(any=names[first : first + _PAGE]) for first in range(0, len(names), _PAGE)]
            filters = [models.Filter(must=[models.FieldCondition(key="image", match=batch)]) for batch in batches]
        self._call.check_open()
        return {point.payload["image"] for condition in filters for point in self._scroll(condition, ["image"])}

    def has_name(self, name: str) -> bool:
        """Return whether any metadata has a name, with one request; see the protocol."""
        compiled = compile_filter(Condition(name, False, "exists"), substrings=self._collection.substrings)
        points, _ = self._call(
            "scroll", collection_name=self._name, scroll_filter=compiled.filter, limit=1,
            with_payload=False, with_vectors=False,
        )  # fmt: skip
        return bool(points)

    def is_empty(self) -> bool:
        """Return whether there are no records, with one request at most.

        Nothing is sent once it is known to have some. Records that another handle deletes afterwards go unnoticed; see
        the protocol.
        """
        self._call.check_open()
        if not self._has_records:
            points, _ = self._call(
                "scroll", collection_name=self._name, limit=1, with_payload=False, with_vectors=False
            )
            self._has_records = bool(points)
        return not self._has_records

    def close(self) -> None:
        """Close the connection, unless the client was given; a second call does nothing."""
        self._call.close()

    def __len__(self) -> int:
        return int(self._call("count", collection_name=self._name, exact=True).count)

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and bool(list(self._retrieve(_point_ids([id]), NAMED)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"QdrantStore({self.location!r}{', read_only=True' if self.read_only else ''})"

    def _check_writable(self) -> None:
        self._call.check_open()
        if self.read_only:
            raise StoreError(f"{self.location}: opened with read_only=True")

    def _update(self, method: str, **arguments: Any) -> None:
        """Write and wait; with ``medium`` one replica orders the writers of a page."""
        result = self._call(
            method, collection_name=self._name, wait=True, ordering=self._models.WriteOrdering.MEDIUM, **arguments
        )
        status = str(getattr(result.status, "value", result.status))
        if status not in ("completed", "acknowledged"):  # "wait_timeout": accepted, and not yet effective
            kind = StoreUnavailableError if status == "wait_timeout" else StoreError
            raise kind(f"{self.location}: {method}: the server answered {status}")

    def _filters(self, tree: Filter | None) -> list[Any]:
        """Return Qdrant filters that together hold for exactly the matching pages.

        ``[None]`` holds for all pages, an empty list for none.
        """
        compiled = compile_filter(tree, substrings=self._collection.substrings)
        if compiled.exact:
            return [compiled.filter]
        points = [point for point, _ in self._matching(tree)]
        return [has_ids(points[first : first + _IDS_A_FILTER]) for first in range(0, len(points), _IDS_A_FILTER)]

    def _matching(self, tree: Filter | None) -> Iterator[tuple[str, str]]:
        """Iterate over the pages a filter holds for, as point id and page id."""
        compiled = compile_filter(tree, substrings=self._collection.substrings)
        for point in self._scroll(compiled.filter, NAMED if compiled.exact else BRIEF):
            if compiled.exact or matches(tree, read_record(point.payload).page):
                yield str(point.id), point.payload["id"]

    def _scroll(self, condition: Any, parts: list[str]) -> Iterator[Any]:
        offset = None
        while True:
            points, offset = self._call(
                "scroll", collection_name=self._name, scroll_filter=condition, limit=_PAGE, offset=offset,
                with_payload=parts, with_vectors=False,
            )  # fmt: skip
            yield from points if parts == ["image"] else check_origin(points, self.location)
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

    def _query(self, searches: list[Any]) -> list[list[Any]]:
        answers: list[list[Any]] = []
        for batch in requests(((search, weigh(search)) for search in searches), _QUERIES_A_REQUEST):
            responses = self._call("query_batch_points", collection_name=self._name, requests=batch)
            answers.extend(check_origin(response.points, self.location) for response in responses)
        return answers


def make_request(
    rows: NDArray[np.floating[Any]], condition: Any, limit: int, *, prefetch: int | None, plain: bool
) -> Any:
    """Return the request for candidates by pooled vectors, then MaxSim of these.

    Args:
        rows: the query, (n_tokens, dim).
        condition: a Qdrant filter, or None.
        limit: most points.
        prefetch: how many candidates, at least ``limit``; None scores every page.
        plain: whether it is for the client's local mode, which scans everything and warns of settings.

    Returns:
        A ``QueryRequest`` of ``qdrant_client.models``.
    """
    models = require("qdrant", "qdrant_client.models", "qdrant-client")
    # In JSON a float32 takes twenty characters. Nine decimals are half as long, and off by a hundredth of what the
    # server's own rounding of queries to float16 changes.
    query = np.round(np.asarray(rows, dtype=np.float64), 9).tolist()
    first = None
    if prefetch is not None:
        # The codes alone find candidates: scoring these once more by unquantised pooled vectors would read the disk for
        # an order that the full vectors are about to make anyway.
        codes = models.SearchParams(quantization=models.QuantizationSearchParams(rescore=False))
        first = models.Prefetch(
            query=query, using=POOLED, filter=condition, limit=max(limit, prefetch), params=None if plain else codes
        )
    return models.QueryRequest(
        query=query,
        using=FULL,
        prefetch=first,
        filter=condition,
        limit=limit,
        params=models.SearchParams(exact=True) if first is None and not plain else None,
        with_payload=BRIEF,
    )


def weigh(search: Any) -> int:
    """Return the size of a request of :func:`make_request` as a number of floats."""
    rows, condition = search.query, search.filter
    floats = len(rows) * len(rows[0]) + (0 if condition is None else len(condition.model_dump_json()) // BYTES_A_FLOAT)
    return floats if search.prefetch is None else 2 * floats


def best(answers: list[list[Any]], limit: int, k: int, group_by: GroupBy | None) -> list[Match] | None:
    """Return the ``k`` best answers to one query, or None when it needs more.

    What an answer leaves out scores no more than its last point, and may score as much: equal scores are ordered by id,
    so all of them are needed before one is chosen.

    Args:
        answers: points, best first, of requests whose filters share no page.
        limit: of each request; an answer of fewer points left nothing out.
        k: most matches.
        group_by: ``"source"`` takes the best point of each group.
    """
    left_out = max((points[-1].score for points in answers if len(points) >= limit), default=None)
    winners: dict[str, Any] = {}
    for point in sorted(
        (point for points in answers for point in points), key=lambda point: (-point.score, point.payload["id"])
    ):
        winners.setdefault(point.payload["group" if group_by else "id"], point)
        if len(winners) == k:
            break
    hits = list(winners.values())
    if left_out is not None and (len(hits) < k or hits[-1].score <= left_out):
        return None
    return [Match(read_record(point.payload), float(point.score)) for point in hits]


def _point_ids(ids: Iterable[str]) -> list[str]:
    """Return point ids, each once; an id that no page can have is left out."""
    return list(dict.fromkeys(point_id(page_id) for page_id in ids if is_unicode(page_id)))
