"""Qdrant's real engine in this process (qdrant-edge-py), spoken to by the models of its REST interface.

The same configuration, filters and queries that a server is sent, said once more in the engine's own words; so that
what they mean is told by Qdrant's code and not by an imitation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import qdrant_edge as edge
from qdrant_client import models


class EdgeEngine:
    """As much of a ``QdrantClient`` as the store needs, over one shard for each collection.

    Args:
        folder: where shards go.
        indexing_threshold: kilobytes from which a segment gets its codes; see :meth:`optimize`.
    """

    def __init__(self, folder: Path, *, indexing_threshold: int = 20_000) -> None:
        self._folder = folder
        self._threshold = indexing_threshold
        self._shards: dict[str, edge.EdgeShard] = {}
        self._asked: dict[str, models.CreateCollection] = {}

    def collection_exists(self, name: str) -> bool:
        return name in self._shards

    def create_collection(self, name: str, asked: models.CreateCollection) -> bool:
        config = edge.EdgeConfig(
            vectors={vector: _vector(params) for vector, params in asked.vectors.items()},
            on_disk_payload=asked.on_disk_payload,
            optimizers=edge.EdgeOptimizersConfig(indexing_threshold=self._threshold),
        )
        (self._folder / name).mkdir()
        self._shards[name] = edge.EdgeShard.create(str(self._folder / name), config)
        self._asked[name] = asked
        return True

    def get_collection(self, name: str) -> dict[str, Any]:
        asked = self._asked[name].model_dump(mode="json")
        params = {"vectors": asked["vectors"], "shard_number": 1, "replication_factor": 1}
        unused: dict[str, Any] = {
            "hnsw_config": {"m": 16, "ef_construct": 100, "full_scan_threshold": 10_000},
            "optimizer_config": {
                "deleted_threshold": 0.2, "vacuum_min_vector_number": 1000, "default_segment_number": 0,
                "flush_interval_sec": 5,
            },
        }  # fmt: skip
        schema = {
            path: {"data_type": str(index.data_type).rpartition(".")[2].lower(), "points": 0}
            for path, index in self._shards[name].info().payload_schema.items()
        }
        return {
            "status": "green", "optimizer_status": "ok", "segments_count": 1, "payload_schema": schema,
            "config": {"params": params, "metadata": asked["metadata"], **unused},
        }  # fmt: skip

    def create_payload_index(self, name: str, path: str, kind: str) -> None:
        schema = {"keyword": edge.PayloadSchemaType.Keyword, "integer": edge.PayloadSchemaType.Integer}[kind]
        self._shards[name].update(edge.UpdateOperation.create_field_index(path, schema))

    def upsert(self, name: str, points: list[models.PointStruct]) -> dict[str, Any]:
        made = [edge.Point(id=str(point.id), vector=point.vector, payload=point.payload) for point in points]
        self._shards[name].update(edge.UpdateOperation.upsert_points(made))
        return {"operation_id": 0, "status": "completed"}

    def delete(self, name: str, asked: models.PointIdsList) -> dict[str, Any]:
        self._shards[name].update(edge.UpdateOperation.delete_points([str(point) for point in asked.points]))
        return {"operation_id": 0, "status": "completed"}

    def retrieve(self, name: str, ids: list[Any], with_payload: Any, with_vectors: Any) -> list[dict[str, Any]]:
        found = self._shards[name].retrieve([str(point) for point in ids], with_payload, with_vectors or False)
        return [{"id": str(point.id), "payload": point.payload, "vector": point.vector} for point in found]

    def scroll(
        self, name: str, chosen: Any, limit: int | None, *, offset: Any, with_payload: Any
    ) -> tuple[list[dict[str, Any]], Any]:
        asked = edge.ScrollRequest(
            offset=None if offset is None else str(offset), limit=limit, filter=to_filter(chosen),
            with_payload=with_payload, with_vector=False,
        )  # fmt: skip
        points, after = self._shards[name].scroll(asked)
        found = [{"id": str(point.id), "payload": point.payload} for point in points]
        return found, None if after is None else str(after)

    def count(self, name: str, chosen: Any) -> dict[str, int]:
        return {"count": self._shards[name].count(edge.CountRequest(exact=True, filter=to_filter(chosen)))}

    def query_batch_points(self, name: str, asked: list[models.QueryRequest]) -> list[dict[str, Any]]:
        return [{"points": [_scored(p) for p in self._shards[name].query(to_query(search))]} for search in asked]

    def optimize(self, name: str) -> int:
        """Build codes and graphs as a server does by itself in the background; give how many vectors have them."""
        shard = self._shards[name]
        shard.optimize()
        return int(shard.info().indexed_vectors_count)

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()


def to_query(asked: models.QueryRequest) -> edge.QueryRequest:
    """Say a search in the engine's words."""
    prefetch = asked.prefetch
    first = None
    if prefetch is not None:
        assert isinstance(prefetch, models.Prefetch)
        first = [
            edge.Prefetch(
                limit=prefetch.limit, query=edge.Query.Nearest(_vectors(prefetch.query), using=prefetch.using),
                params=_params(prefetch.params), filter=to_filter(prefetch.filter),
            )
        ]  # fmt: skip
    return edge.QueryRequest(
        limit=asked.limit, query=edge.Query.Nearest(_vectors(asked.query), using=asked.using), prefetches=first,
        with_payload=asked.with_payload, filter=to_filter(asked.filter), params=_params(asked.params),
    )  # fmt: skip


def to_filter(condition: Any) -> Any:
    """Say a filter, or any part of one, in the engine's words."""
    if condition is None:
        return None
    if isinstance(condition, models.Filter):
        clauses = {}
        for name in ("must", "should", "must_not"):
            parts = getattr(condition, name)
            parts = parts if isinstance(parts, list) or parts is None else [parts]
            clauses[name] = None if parts is None else [to_filter(part) for part in parts]
        return edge.Filter(**clauses)
    if isinstance(condition, models.HasIdCondition):
        return edge.HasIdCondition({str(point) for point in condition.has_id})
    if isinstance(condition, models.IsEmptyCondition):
        return edge.IsEmptyCondition(condition.is_empty.key)
    assert isinstance(condition, models.FieldCondition), type(condition)
    match, bounds = condition.match, condition.range
    if isinstance(match, models.MatchValue):
        return edge.FieldCondition(condition.key, match=edge.MatchValue(match.value))
    if isinstance(match, models.MatchAny):
        return edge.FieldCondition(condition.key, match=edge.MatchAny(match.any))
    if isinstance(match, models.MatchSubstring):
        return edge.FieldCondition(condition.key, match=edge.MatchSubstring(match.substring))
    assert isinstance(bounds, models.Range) and match is None
    limits = {name: getattr(bounds, name) for name in ("gt", "gte", "lt", "lte")}
    return edge.FieldCondition(condition.key, range=edge.RangeFloat(**limits))


def _vectors(query: Any) -> Any:
    return query.nearest if isinstance(query, models.NearestQuery) else query


def _params(asked: models.SearchParams | None) -> Any:
    if asked is None:
        return None
    codes = asked.quantization
    return edge.SearchParams(
        exact=bool(asked.exact),
        quantization=None if codes is None else edge.QuantizationSearchParams(rescore=codes.rescore),
    )


def _vector(params: models.VectorParams) -> Any:
    codes = params.quantization_config
    return edge.EdgeVectorParams(
        size=params.size,
        distance={models.Distance.DOT: edge.Distance.Dot}[params.distance],
        on_disk=params.on_disk,
        multivector_config=edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim),
        datatype={models.Datatype.FLOAT16: edge.VectorStorageDatatype.Float16}[params.datatype],
        hnsw_config=edge.HnswIndexConfig(m=params.hnsw_config.m, ef_construct=100, full_scan_threshold=10_000),
        quantization_config=None
        if codes is None
        else edge.ScalarQuantizationConfig(type=edge.ScalarType.Int8, always_ram=codes.scalar.always_ram),
    )


def _scored(point: Any) -> dict[str, Any]:
    return {"id": str(point.id), "version": 0, "score": point.score, "payload": point.payload}
