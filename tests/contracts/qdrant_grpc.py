"""The gRPC interface beside the REST one of `qdrant_server`: the same answers in the other clothing."""

# ruff: noqa: N802 - the names are those of the protocol

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from qdrant_client import grpc as wire
from qdrant_client import models
from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc
from qdrant_client.grpc import collections_service_pb2_grpc, points_service_pb2_grpc, qdrant_pb2_grpc

from tests.contracts.qdrant_server import QdrantServer, RefusedError, plain

DONE = wire.PointsOperationResponse(result=wire.UpdateResult(operation_id=0, status=wire.UpdateStatus.Completed))


class _Services(
    points_service_pb2_grpc.PointsServicer,
    collections_service_pb2_grpc.CollectionsServicer,
    qdrant_pb2_grpc.QdrantServicer,
):
    def __init__(self, server: QdrantServer) -> None:
        self._server = server
        self.calls: list[str] = []
        self.faults: list[grpc.StatusCode] = []

    def _ask(self, context: Any, method: str, path: str, body: Any = None) -> Any:
        self.calls.append(f"{method} {path}")
        if self.faults:
            context.abort(self.faults.pop(0), "a fault")
        keys = dict(context.invocation_metadata())
        if self._server.api_key is not None and keys.get("api-key") != self._server.api_key:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Invalid API key")
        try:
            with self._server.lock:
                return plain(self._server.answer(method, path, body))
        except RefusedError as exc:
            known = {404: grpc.StatusCode.NOT_FOUND, 409: grpc.StatusCode.ALREADY_EXISTS}
            context.abort(known[exc.status], str(exc))

    def HealthCheck(self, request: Any, context: Any) -> Any:
        made = self._ask(context, "GET", "/")
        return wire.HealthCheckReply(title=made["title"], version=made["version"])

    def Create(self, request: Any, context: Any) -> Any:
        vectors = GrpcToRest.convert_vectors_config(request.vectors_config)
        body = {
            "vectors": {name: params.model_dump(mode="json") for name, params in vectors.items()},
            "metadata": GrpcToRest.convert_payload(request.metadata),
            "on_disk_payload": request.on_disk_payload,
        }
        for name in ("shard_number", "replication_factor", "write_consistency_factor"):
            body[name] = getattr(request, name) if request.HasField(name) else None
        return wire.CollectionOperationResponse(
            result=bool(self._ask(context, "PUT", f"/collections/{request.collection_name}", body))
        )

    def Get(self, request: Any, context: Any) -> Any:
        if isinstance(request, wire.GetCollectionInfoRequest):
            found = self._ask(context, "GET", f"/collections/{request.collection_name}")
            info = RestToGrpc.convert_collection_info(models.CollectionInfo.model_validate(found))
            return wire.GetCollectionInfoResponse(result=info)
        body = {
            "ids": [GrpcToRest.convert_point_id(point) for point in request.ids],
            **_wanted(request),
            "with_vector": list(request.with_vectors.include.names) or False,
        }
        found = self._ask(context, "POST", f"/collections/{request.collection_name}/points", body)
        return wire.GetResponse(result=[RestToGrpc.convert_record(models.Record(**point)) for point in found])

    def CreateFieldIndex(self, request: Any, context: Any) -> Any:
        kind = {wire.FieldType.FieldTypeKeyword: "keyword", wire.FieldType.FieldTypeInteger: "integer"}
        body = {"field_name": request.field_name, "field_schema": kind[request.field_type]}
        self._ask(context, "PUT", f"/collections/{request.collection_name}/index", body)
        return DONE

    def Upsert(self, request: Any, context: Any) -> Any:
        assert request.wait
        points = [GrpcToRest.convert_point_struct(point).model_dump(mode="json") for point in request.points]
        self._ask(context, "PUT", f"/collections/{request.collection_name}/points", {"points": points})
        return DONE

    def Delete(self, request: Any, context: Any) -> Any:
        chosen = GrpcToRest.convert_points_selector(request.points).model_dump(mode="json")
        self._ask(context, "POST", f"/collections/{request.collection_name}/points/delete", chosen)
        return DONE

    def Scroll(self, request: Any, context: Any) -> Any:
        body = {
            "filter": _filter(request),
            "limit": request.limit,
            "offset": GrpcToRest.convert_point_id(request.offset) if request.HasField("offset") else None,
            **_wanted(request),
        }
        found = self._ask(context, "POST", f"/collections/{request.collection_name}/points/scroll", body)
        after = found["next_page_offset"]
        return wire.ScrollResponse(
            result=[RestToGrpc.convert_record(models.Record(**point)) for point in found["points"]],
            next_page_offset=None if after is None else RestToGrpc.convert_extended_point_id(after),
        )

    def Count(self, request: Any, context: Any) -> Any:
        path = f"/collections/{request.collection_name}/points/count"
        return wire.CountResponse(
            result=wire.CountResult(count=self._ask(context, "POST", path, {"filter": _filter(request)})["count"])
        )

    def QueryBatch(self, request: Any, context: Any) -> Any:
        searches = [
            GrpcToRest.convert_query_points(search).model_dump(mode="json", exclude_none=True)
            for search in request.query_points
        ]
        for search in searches:  # REST takes one prefetch by itself too; gRPC has a list of them
            if "prefetch" in search:
                (search["prefetch"],) = search["prefetch"]
        path = f"/collections/{request.collection_name}/points/query/batch"
        found = self._ask(context, "POST", path, {"searches": searches})
        return wire.QueryBatchResponse(
            result=[
                wire.BatchResult(
                    result=[RestToGrpc.convert_scored_point(models.ScoredPoint(**point)) for point in answer["points"]]
                )
                for answer in found
            ]
        )


def _filter(request: Any) -> Any:
    return GrpcToRest.convert_filter(request.filter).model_dump(mode="json") if request.HasField("filter") else None


def _wanted(request: Any) -> dict[str, Any]:
    return {"with_payload": list(request.with_payload.include.fields) or True}


@contextmanager
def serving_grpc(server: QdrantServer) -> Iterator[tuple[int, _Services]]:
    """Serve by gRPC too until the block ends; gives the port."""
    services = _Services(server)
    with ThreadPoolExecutor(8) as threads:
        made = grpc.server(threads, options=[("grpc.so_reuseport", 0)])
        points_service_pb2_grpc.add_PointsServicer_to_server(services, made)
        collections_service_pb2_grpc.add_CollectionsServicer_to_server(services, made)
        qdrant_pb2_grpc.add_QdrantServicer_to_server(services, made)
        port = made.add_insecure_port("127.0.0.1:0")
        made.start()
        try:
            yield port, services
        finally:
            made.stop(None).wait()
