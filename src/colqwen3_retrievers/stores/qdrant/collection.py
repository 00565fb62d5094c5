"""The Qdrant collection of an index: its configuration, its checks and its limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, StoreError, StoreMismatchError, require
from colqwen3_retrievers.stores.qdrant.connection import Connection
from colqwen3_retrievers.stores.qdrant.filters import index_paths
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo

FORMAT_VERSION: Final = 1
MAX_FLOATS: Final = 1_048_576
"""Qdrant refuses a multi-vector of so many floats or more, whatever their type (1,024 x 1,024)."""

FULL: Final = "full"
"""The vector for scores: all token embeddings in float16, without a graph."""

POOLED: Final = "pooled"
"""The vector for candidates: pooled token embeddings, searched as int8."""

_KEY = "colqwen3_retrievers"
_PROMPT_TOKENS = 64  # more than any family's prompt around an image
_TOKENS_A_CANDIDATE = 3  # original tokens for each pooled one: the most that lost nothing in our measurements


@dataclass(frozen=True, slots=True)
class QdrantOptions:
    """How an index is stored in Qdrant and accessed.

    ``shards`` to ``graph`` are fixed when a collection is created; to give another value for an existing one is an
    error.

    Attributes:
        shards: parts of the collection, which nodes search in parallel; None leaves it to the server.
        replicas: copies of each shard; None leaves it to the server (1).
        write_consistency: replicas that must have a write before it is acknowledged; None leaves it to the server (1).
        pool: original tokens for each pooled one of the vector for candidates; 0 stores no such vector, so that every
            search scores every page. None takes 3, less what the encoder pools already.
        graph: links a page in an HNSW graph over the pooled vectors; 0 scans them all, which misses nothing.
        metadata: metadata names to index, so that filters on them are fast.
        timeout: seconds a call may take.
        attempts: how often a call is tried when the server cannot be reached or is too busy.
        candidates: pages scored exactly for each requested one, and never fewer than twenty times that.

    Raises:
        ConfigError: a number out of range, or wrong names; it is named.

    >>> QdrantOptions(shards=0)
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: shards: expected a whole number from 1, got 0
    """

    shards: int | None = None
    replicas: int | None = None
    write_consistency: int | None = None
    pool: int | None = None
    graph: int | None = None
    metadata: Sequence[str] = ()
    timeout: int = 60
    attempts: int = 4
    candidates: int = 5

    def __post_init__(self) -> None:
        for name in ("shards", "replicas", "write_consistency", "pool", "graph", "timeout", "attempts", "candidates"):
            value, optional = getattr(self, name), name not in ("timeout", "attempts", "candidates")
            if value is not None or not optional:
                whole_number(value, name, least=0 if name in ("pool", "graph") else 1)
        if isinstance(self.metadata, str) or not all(isinstance(name, str) and name for name in self.metadata):
            raise ConfigError(f"metadata: expected a list of metadata names, got {self.metadata!r}")
        object.__setattr__(self, "metadata", tuple(self.metadata))


@dataclass(frozen=True, slots=True)
class Collection:
    """An open collection.

    Attributes:
        info: what shaped the multi-vectors.
        pool: original tokens for each pooled one; 0 when there is no pooled vector.
        substrings: whether the server can match parts of texts.
    """

    info: EncoderInfo
    pool: int
    substrings: bool


def open_collection(
    connection: Connection, name: str, info: EncoderInfo | None, options: QdrantOptions, *, read_only: bool
) -> Collection:
    """Open a collection, creating it when it does not exist.

    Two processes may create it at once: one of them does, the other opens it.

    Raises:
        StoreMismatchError: it is not configured as by this library; the field is named.
        StoreError: it does not exist and cannot be created, or is another program's, or the server is too old.
    """
    if info is not None:
        check_width(info, connection.location)
    description = _describe(connection, name)
    if description is None:
        if read_only or info is None:
            remedy = "" if read_only else "; to make one, say what encodes its pages (encoder= or info=)"
            raise StoreError(f"{connection.location}: no index there{remedy}", absent=True)
        _create(connection, name, info, options)
        description = _describe(connection, name)
        if description is None:
            raise StoreError(f"{connection.location}: deleted by another program as soon as it was created")
    collection = _check(connection, description, options)
    if not read_only:
        _index(connection, name, description, options)
    return collection


def vectors_config(dim: int, *, pool: int, graph: int) -> dict[str, Any]:
    """Return the configuration of the named vectors, as ``qdrant_client.models``.

    Both compare by the dot product, which for unit rows is the cosine; Qdrant's cosine would normalise once more on
    writing and change the stored numbers.

    Args:
        dim: components of each token embedding.
        pool: 0 for no vector for candidates.
        graph: links a page in the graph over the vectors for candidates, 0 for none.
    """
    models = require("qdrant", "qdrant_client.models", "qdrant-client")

    def vector(**more: Any) -> Any:
        return models.VectorParams(
            size=dim,
            distance=models.Distance.DOT,
            multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
            datatype=models.Datatype.FLOAT16,
            on_disk=True,
            **more,
        )

    vectors = {FULL: vector(hnsw_config=models.HnswConfigDiff(m=0))}
    if pool:
        int8 = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
        quantization = models.ScalarQuantization(scalar=int8)
        vectors[POOLED] = vector(hnsw_config=models.HnswConfigDiff(m=graph), quantization_config=quantization)
    return vectors


def pool_of(info: EncoderInfo, options: QdrantOptions) -> int:
    """Return how many token embeddings are pooled into one for candidates.

    >>> info = EncoderInfo("ab12", "tiny", "tomoro", 128, 1, 1280, False, 1)
    >>> pool_of(info, QdrantOptions()), pool_of(info, QdrantOptions(pool=6))
    (3, 6)
    """
    if options.pool is not None:
        return options.pool
    return max(1, round(_TOKENS_A_CANDIDATE / info.pool_factor))


def check_width(info: EncoderInfo, location: str) -> None:
    """Check that an encoder's largest pages fit into a multi-vector of Qdrant.

    Raises:
        ConfigError: it gives the figures and what would fit.

    >>> check_width(EncoderInfo("ab12", "ops", "ops", 2560, 1, 1280, False, 1), "qdrant://host:6333/pages")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: qdrant://host:6333/pages: a page of up to 1,344 tokens of dim 2560 is ...
    """
    tokens = math.ceil((info.max_visual_tokens + _PROMPT_TOKENS) / info.pool_factor)
    if tokens * info.dim < MAX_FLOATS:
        return
    most = (MAX_FLOATS - 1) // info.dim
    dim = (MAX_FLOATS - 1) // tokens
    factor = math.ceil((info.max_visual_tokens + _PROMPT_TOKENS) / max(1, most))
    bound = most * info.pool_factor - _PROMPT_TOKENS
    remedies = [f"dim={dim} or less (where the checkpoint is a Matryoshka one)", f"pool_factor={factor} or more"]
    if bound >= 1:
        remedies.append(f"max_visual_tokens={bound} or less")
    raise ConfigError(
        f"{location}: a page of up to {tokens:,} tokens of dim {info.dim} is {tokens * info.dim:,} floats, and Qdrant "
        f"takes fewer than {MAX_FLOATS:,}; make the encoder with {', '.join(remedies)}"
    )


def _describe(connection: Connection, name: str) -> Any:
    try:
        return connection("get_collection", collection_name=name)
    except StoreError as exc:
        if connection.missing(exc):
            return None
        raise


def _create(connection: Connection, name: str, info: EncoderInfo, options: QdrantOptions) -> None:
    pool, graph = pool_of(info, options), options.graph or 0
    models = require("qdrant", "qdrant_client.models", "qdrant-client")
    try:
        connection(
            "create_collection",
            collection_name=name,
            vectors_config=vectors_config(info.dim, pool=pool, graph=graph),
            shard_number=options.shards,
            replication_factor=options.replicas,
            write_consistency_factor=options.write_consistency,
            on_disk_payload=True,
            # `where` takes any name, and hosted servers refuse filters on names without an index by default.
            strict_mode_config=models.StrictModeConfig(
                unindexed_filtering_retrieve=True, unindexed_filtering_update=True
            ),
            metadata={_KEY: {"format": FORMAT_VERSION, "info": info.to_dict(), "pool": pool, "graph": graph}},
        )
    except StoreError as exc:
        if not connection.exists_already(exc):  # another process was first: it is opened and checked like any other
            raise


def _check(connection: Connection, description: Any, options: QdrantOptions) -> Collection:
    location, config = connection.location, description.config
    own = (config.metadata or {}).get(_KEY)
    if not isinstance(own, dict):
        raise StoreError(
            f"{location}: a collection, but not made by this library, or by a server before Qdrant 1.16, which forgets "
            "what made it; give another name"
        )
    if own.get("format") != FORMAT_VERSION:
        raise StoreError(f"{location}: format version {own.get('format')}; this release reads version {FORMAT_VERSION}")
    try:
        info, pool, graph = EncoderInfo.from_dict(own["info"]), int(own["pool"]), int(own["graph"])
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as exc:
        raise StoreError(f"{location}: the note of what made it cannot be read: {exc!r}") from exc
    expected = vectors_config(info.dim, pool=pool, graph=graph)
    vectors = config.params.vectors
    if not isinstance(vectors, dict):
        raise StoreMismatchError(
            f"{location}: vectors: expected named ones ({', '.join(expected)}), found one without a name"
        )
    for name, config_of_vector in expected.items():
        if name not in vectors:
            raise StoreMismatchError(f"{location}: vector {name!r} is missing")
        _compare(location, f"vector {name!r}: ", config_of_vector, vectors[name])
    for name, given, stored in (
        ("pool", options.pool, pool),
        ("graph", options.graph, graph),
        ("shards", options.shards, config.params.shard_number),
        ("replicas", options.replicas, config.params.replication_factor),
        ("write_consistency", options.write_consistency, config.params.write_consistency_factor),
    ):
        if given not in (None, stored) and stored is not None and not (connection.local and name in _IGNORED):
            raise StoreMismatchError(f"{location}: {name} is {stored} in the collection, {given} in the options")
    return Collection(info, pool, _finds_substrings(connection))


_PLACEMENT = ("on_disk", "always_ram")  # operators may change where data is; newer servers have other names for these
_IGNORED = ("shards", "replicas", "write_consistency")  # the client's local mode always has one of each


def _compare(location: str, label: str, expected: Any, actual: Any) -> None:
    """Compare configurations by field; None in the expected one matches anything."""
    for name in type(expected).model_fields:
        value, stored = getattr(expected, name), getattr(actual, name, None)
        if value is None or name in _PLACEMENT:
            continue
        if hasattr(type(value), "model_fields"):
            if stored is None:
                raise StoreMismatchError(f"{location}: {label}{name} is missing")
            _compare(location, f"{label}{name}: ", value, stored)
        elif value != stored:
            shown, wanted = (repr(getattr(item, "value", item)) for item in (stored, value))
            raise StoreMismatchError(f"{location}: {label}{name} is {shown} in the collection, expected {wanted}")


def _index(connection: Connection, name: str, description: Any, options: QdrantOptions) -> None:
    """Create the payload indexes that are missing; to create one twice is no error."""
    if connection.local:  # it has none, and warns of each
        return
    for path, kind in index_paths(options.metadata).items():
        if path not in (description.payload_schema or {}):
            connection("create_payload_index", collection_name=name, field_name=path, field_schema=kind, wait=True)


def _finds_substrings(connection: Connection) -> bool:
    if not hasattr(require("qdrant", "qdrant_client.models", "qdrant-client"), "MatchSubstring"):
        return False
    if connection.local:
        return True
    try:
        major, minor = connection("info").version.split(".")[:2]
        return (int(major), int(minor)) >= (1, 20)
    except (StoreError, ValueError):
        return False
