"""The store contract over Qdrant: the client's imitation of a server, in process and over HTTP, and a real server.

A server is tested against when ``QDRANT_URL`` names one, as ``qdrant://host:6333`` (and ``QDRANT_API_KEY`` its key).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from qdrant_client import QdrantClient

from colqwen3_retrievers import EncoderInfo, open_store
from colqwen3_retrievers.stores.protocol import MultiVectorStore
from colqwen3_retrievers.stores.qdrant.connection import connect, parse_address
from colqwen3_retrievers.stores.qdrant.store import QdrantStore
from tests.contracts.qdrant_edge_engine import EdgeEngine
from tests.contracts.qdrant_grpc import serving_grpc
from tests.contracts.qdrant_server import serving
from tests.contracts.store_contract import INFO, StoreContract

TOLERANCE = 1e-3
"""What may lie between the scores of two stores; a server rounds the query to float16."""


class TestQdrantInMemory(StoreContract):
    """The contract over ``QdrantClient(":memory:")``."""

    score_tolerance = TOLERANCE

    @pytest.fixture
    def reopen(self) -> Iterator[Callable[..., MultiVectorStore]]:
        client = QdrantClient(":memory:")

        def reopen(info: EncoderInfo | None = INFO) -> MultiVectorStore:
            return QdrantStore("pages", info=info, client=client)

        yield reopen
        client.close()


class TestQdrantInAFolder(StoreContract):
    """The contract over ``QdrantClient(path=...)``, opened by its address."""

    score_tolerance = TOLERANCE

    @pytest.fixture
    def reopen(self, tmp_path: Path) -> Iterator[Callable[..., MultiVectorStore]]:
        opened: list[MultiVectorStore] = []

        def reopen(info: EncoderInfo | None = INFO) -> MultiVectorStore:
            opened.append(open_store(f"qdrant+path:{tmp_path}/pages", info=info))
            return opened[-1]

        yield reopen
        for store in opened:
            store.close()


class TestQdrantOverHTTP(StoreContract):
    """The contract with everything sent as JSON over a socket of this machine."""

    score_tolerance = TOLERANCE

    @pytest.fixture
    def reopen(self) -> Iterator[Callable[..., MultiVectorStore]]:
        opened: list[MultiVectorStore] = []
        with serving() as server:

            def reopen(info: EncoderInfo | None = INFO) -> MultiVectorStore:
                opened.append(open_store(server.address(), info=info))
                return opened[-1]

            yield reopen
            for store in opened:
                store.close()


class TestQdrantOverGRPC(StoreContract):
    """The contract with everything sent by gRPC over a socket of this machine."""

    score_tolerance = TOLERANCE

    @pytest.fixture
    def reopen(self) -> Iterator[Callable[..., MultiVectorStore]]:
        opened: list[MultiVectorStore] = []
        with serving() as server, serving_grpc(server) as (port, services):

            def reopen(info: EncoderInfo | None = INFO) -> MultiVectorStore:
                opened.append(open_store(server.address(f"?grpc={port}"), info=info))
                return opened[-1]

            yield reopen
            for store in opened:
                store.close()
            assert services.calls and not server.requests  # nothing went the other way


class TestQdrantEngine(StoreContract):
    """The contract over the real engine, in this process behind a socket."""

    score_tolerance = TOLERANCE

    @pytest.fixture
    def reopen(self, tmp_path: Path) -> Iterator[Callable[..., MultiVectorStore]]:
        opened: list[MultiVectorStore] = []
        engine = EdgeEngine(tmp_path)
        with serving(engine=engine) as server:

            def reopen(info: EncoderInfo | None = INFO) -> MultiVectorStore:
                opened.append(open_store(server.address(), info=info))
                return opened[-1]

            yield reopen
            for store in opened:
                store.close()
        engine.close()


@pytest.mark.skipif("QDRANT_URL" not in os.environ, reason="QDRANT_URL names no server")
@pytest.mark.enable_socket
class TestQdrantServer(StoreContract):
    """The contract over the server that ``QDRANT_URL`` names, in a collection that is removed afterwards."""

    score_tolerance = TOLERANCE
    whole_batches = False

    @pytest.fixture
    def reopen(self) -> Iterator[Callable[..., MultiVectorStore]]:
        collection = f"colqwen3-test-{uuid.uuid4().hex}"
        opened: list[QdrantStore] = []

        def reopen(info: EncoderInfo | None = INFO) -> MultiVectorStore:
            opened.append(QdrantStore(f"{os.environ['QDRANT_URL'].rstrip('/')}/{collection}", info=info))
            return opened[-1]

        yield reopen
        for store in opened:
            store.close()
        address = parse_address(f"{os.environ['QDRANT_URL'].rstrip('/')}/{collection}")
        connect(address).delete_collection(collection)
