"""Qdrant's REST interface on this machine, answered by the client's imitation of a server or by the real engine.

Bodies are read by the client's own models, which refuse a field they do not know. Faults are put in the way one by one.
"""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from qdrant_client import QdrantClient, models

Fault = int | float | str | None
"""A status to answer, seconds to be late by, ``"drop"`` to hang up, ``"after"`` to do it and hang up, or None."""

MOST_BYTES = 32 * 2**20
"""Of a request: a server's own bound unless told otherwise."""


class RefusedError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class QdrantServer:
    """What a test sees: the port, the requests that came, and the faults still to come."""

    def __init__(
        self, *, version: str = "1.20.0", api_key: str | None = None, engine: Any = None, tls: Any = None
    ) -> None:
        self.client: Any = QdrantClient(":memory:")
        self.engine = engine
        self.version = version
        self.api_key = api_key
        self.lock = threading.Lock()
        self.requests: list[tuple[str, str, Any]] = []
        self.keys: list[str | None] = []
        self.faults: list[Fault] = []
        self.faults_at = ""
        self.indexes: dict[str, dict[str, str]] = {}
        self.created: dict[str, Any] = {}
        self.forgets_metadata = False
        handler = type("Handler", (_Handler,), {"server_of_test": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        self.port = self.http.server_address[1]

    def address(self, more: str = "") -> str:
        return f"qdrant://127.0.0.1:{self.port}/pages{more}"

    def answer(self, method: str, path: str, body: Any) -> Any:
        parts = [part for part in path.partition("?")[0].split("/") if part]
        if not parts:
            return {"title": "qdrant", "version": self.version}
        name, rest = parts[1], "/".join(parts[2:])
        if not (self.engine or self.client).collection_exists(name) and not (method == "PUT" and not rest):
            raise RefusedError(404, f"Not found: Collection `{name}` doesn't exist!")
        return getattr(self, f"_{_ROUTES[method, rest]}")(name, body)

    def _describe(self, name: str, _: Any) -> Any:
        if self.engine is not None:
            return self.engine.get_collection(name)
        found = self.client.get_collection(name).model_dump(mode="json")
        found["payload_schema"] = {
            path: {"data_type": kind, "points": 0} for path, kind in self.indexes.get(name, {}).items()
        }
        found["config"]["params"] |= {
            name: self.created.get(name) or 1
            for name in ("shard_number", "replication_factor", "write_consistency_factor")
        }
        if self.forgets_metadata:
            found["config"]["metadata"] = None
        return found

    def _create(self, name: str, body: Any) -> Any:
        if (self.engine or self.client).collection_exists(name):
            raise RefusedError(409, f"Wrong input: Collection `{name}` already exists!")
        asked = models.CreateCollection.model_validate(body)
        self.created = body
        if self.engine is not None:
            return self.engine.create_collection(name, asked)
        return self.client.create_collection(name, vectors_config=asked.vectors, metadata=asked.metadata)

    def _index(self, name: str, body: Any) -> Any:
        asked = models.CreateFieldIndex.model_validate(body)
        if self.engine is not None:
            self.engine.create_payload_index(name, asked.field_name, asked.field_schema.value)
        self.indexes.setdefault(name, {})[asked.field_name] = str(asked.field_schema.value)
        return {"operation_id": 0, "status": "completed"}

    def _upsert(self, name: str, body: Any) -> Any:
        return (self.engine or self.client).upsert(name, models.PointsList.model_validate(body).points)

    def _retrieve(self, name: str, body: Any) -> Any:
        asked = models.PointRequest.model_validate(body)
        return (self.engine or self.client).retrieve(
            name, asked.ids, with_payload=asked.with_payload, with_vectors=asked.with_vector
        )

    def _scroll(self, name: str, body: Any) -> Any:
        asked = models.ScrollRequest.model_validate(body)
        points, after = (self.engine or self.client).scroll(
            name, asked.filter, asked.limit, offset=asked.offset, with_payload=asked.with_payload
        )
        return {"points": plain(points), "next_page_offset": after}

    def _count(self, name: str, body: Any) -> Any:
        return (self.engine or self.client).count(name, models.CountRequest.model_validate(body).filter)

    def _delete(self, name: str, body: Any) -> Any:
        return (self.engine or self.client).delete(name, models.PointIdsList.model_validate(body))

    def _query(self, name: str, body: Any) -> Any:
        asked = models.QueryRequestBatch.model_validate(body).searches
        if self.engine is not None:
            return self.engine.query_batch_points(name, asked)
        for search in asked:  # the imitation warns of settings it has no use for
            search.params = None
            if search.prefetch is not None:
                search.prefetch.params = None
        return self.client.query_batch_points(name, asked)


_ROUTES = {
    ("GET", ""): "describe", ("PUT", ""): "create", ("PUT", "index"): "index", ("PUT", "points"): "upsert",
    ("POST", "points"): "retrieve", ("POST", "points/scroll"): "scroll", ("POST", "points/count"): "count",
    ("POST", "points/delete"): "delete", ("POST", "points/query/batch"): "query",
}  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server_of_test: QdrantServer

    def _serve(self) -> None:
        test = self.server_of_test
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        body = json.loads(raw) if raw else None
        test.requests.append((self.command, self.path, body))
        test.keys.append(self.headers.get("api-key"))
        fault = test.faults.pop(0) if test.faults and test.faults_at in self.path else None
        if len(raw) > MOST_BYTES:
            self._send(413, {"status": {"error": f"payload of {len(raw)} bytes is too large"}})
            return
        if fault is not None:
            if fault == "drop":
                self.close_connection = True
                return
            if isinstance(fault, int):
                self._send(fault, {"status": {"error": f"fault {fault}"}})
                return
            time.sleep(0 if isinstance(fault, str) else fault)
        if test.api_key is not None and self.headers.get("api-key") != test.api_key:
            self._send(403, {"status": {"error": "Forbidden: Invalid API key"}})
            return
        try:
            with test.lock:
                made = test.answer(self.command, self.path, body)
        except RefusedError as exc:
            self._send(exc.status, {"status": {"error": str(exc)}})
        except Exception as exc:  # what the imitation does not take
            self._send(400, {"status": {"error": f"{type(exc).__name__}: {exc}"}})
        else:
            if fault == "after":
                self.close_connection = True
                return
            shown = made if self.path == "/" else {"result": plain(made), "status": "ok", "time": 0.0}
            self._send(200, shown)

    def _send(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client had enough
            self.close_connection = True

    do_GET = do_PUT = do_POST = _serve  # noqa: N815 - the names are http.server's

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def plain(made: Any) -> Any:
    if hasattr(made, "model_dump"):
        return made.model_dump(mode="json")
    return [plain(item) for item in made] if isinstance(made, list) else made


@contextmanager
def serving(**settings: Any) -> Iterator[QdrantServer]:
    """Serve until the block ends."""
    server = QdrantServer(**settings)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
        server.client.close()
