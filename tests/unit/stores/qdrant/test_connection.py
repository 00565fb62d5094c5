"""Addresses, keys, and what becomes of a server that is away, busy, slow or of another opinion."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from qdrant_client import QdrantClient

from colqwen3_retrievers import open_store
from colqwen3_retrievers.errors import ConfigError, StoreError, StoreUnavailableError
from colqwen3_retrievers.stores.qdrant import connection as qdrant_connection
from colqwen3_retrievers.stores.qdrant.collection import QdrantOptions
from colqwen3_retrievers.stores.qdrant.connection import Address, Connection, parse_address
from colqwen3_retrievers.stores.qdrant.store import QdrantStore
from tests.contracts.qdrant_grpc import serving_grpc
from tests.contracts.qdrant_server import QdrantServer, serving
from tests.contracts.store_contract import INFO, record, tokens

KEY = "s3cret-key"


@pytest.fixture(autouse=True)
def no_key_and_no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QDRANT_API_KEY", raising=False)
    monkeypatch.setattr(qdrant_connection, "_PAUSES", (0.01,))


@pytest.fixture
def server() -> Iterator[QdrantServer]:
    with serving() as server:
        yield server


@pytest.mark.parametrize(
    ("location", "address"),
    [
        ("qdrant://host/pages", Address("pages", "host", 6333)),
        ("qdrant://host:7000/pages/", None),
        ("qdrants://host:443/my%20pages", Address("my pages", "host", 443, tls=True)),
        ("qdrant://127.0.0.1:1/p?grpc=6334&timeout=5", Address("p", "127.0.0.1", 1, False, 6334, 5)),
        ("qdrant://[::1]:6333/p", Address("p", "::1", 6333)),
        ("qdrant:/host/p", Address("p", "host", 6333)),  # what a Path makes of it
        ("qdrant+path:/data/q/p", Address("p", path="/data/q")),
    ],
)
def test_addresses(location: str, address: Address | None) -> None:
    if address is None:
        with pytest.raises(ConfigError, match="expected qdrant://host:6333/collection"):
            parse_address(location)
        return
    assert parse_address(location) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("qdrant://host", "expected qdrant://host:6333/collection"),
        ("qdrant:///pages", "expected qdrant://host:6333/collection"),
        ("qdrant://host/a/b", "expected qdrant://host:6333/collection"),
        ("qdrant://host/pages#part", "expected qdrant://host:6333/collection"),
        ("qdrant://host:99999/pages", "cannot be read: Port out of range"),
        ("qdrant://host/pages?shards=3", r"\?shards=…: known are grpc=PORT and timeout=SECONDS"),
        ("qdrant://host/pages?timeout=0", r"\?timeout=…"),
        ("qdrant+path:pages", "expected qdrant\\+path:folder/collection"),
        (f"qdrant://:{KEY}@host/pages", "a key has no place in an address; use api_key= or QDRANT_API_KEY"),
        (f"qdrant://{KEY}@host:99999/pages", "cannot be read"),
    ],
)
def test_bad_addresses_are_refused_without_telling_a_key(location: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        open_store(location, info=INFO)
    assert KEY not in str(caught.value)


def test_a_relative_folder_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(parse_address("qdrant+path:q/pages")) == f"qdrant+path:{tmp_path}/q/pages"


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(
        StoreUnavailableError, match=rf"qdrant://127\.0\.0\.1:{port}/pages: cannot be reached: .*refused"
    ):
        open_store(f"qdrant://127.0.0.1:{port}/pages", info=INFO)
    assert time.monotonic() - started < 5


def test_one_who_listens_and_never_answers() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"qdrant://127.0.0.1:{silent.getsockname()[1]}/pages?timeout=1"
        with pytest.raises(StoreUnavailableError, match="no answer in time"):
            open_store(address, info=INFO, options=QdrantOptions(attempts=2))


def test_a_server_without_tls(server: QdrantServer) -> None:
    with pytest.raises(StoreUnavailableError, match=r"qdrants://.*cannot be reached: .*SSL"):
        open_store(server.address().replace("qdrant:", "qdrants:"), info=INFO, options=QdrantOptions(attempts=1))


@pytest.mark.parametrize("fault", [503, 429, 500, "drop"])
def test_what_passes_is_waited_out(server: QdrantServer, fault: int | str) -> None:
    server.faults = [fault, fault]
    with open_store(server.address(), info=INFO) as store:
        server.faults = [fault] * 3
        store.add([record(1, "p1")])
        assert not server.faults
        server.faults = [fault]
        assert [m.record.page.id for m in store.search([tokens(1)], 1)[0]] == ["p1"]
        server.faults = [fault]
        assert store.delete(["p1"]) == 1 and len(store) == 0


def test_what_does_not_pass_is_given_up_and_told(server: QdrantServer) -> None:
    store = open_store(server.address(), info=INFO, options=QdrantOptions(attempts=3))
    before = len(server.requests)
    server.faults = [503] * 9
    with pytest.raises(StoreUnavailableError, match="the server answered 503: fault 503"):
        store.add([record(1)])
    assert len(server.requests) - before == 3
    server.faults = []
    store.add([record(1)])
    assert len(store) == 1


def test_what_will_not_change_is_not_tried_again(server: QdrantServer) -> None:
    store = open_store(server.address(), info=INFO)
    before = len(server.requests)
    server.faults = [400]
    with pytest.raises(StoreError, match="the server answered 400: fault 400") as caught:
        len(store)
    assert not isinstance(caught.value, StoreUnavailableError) and len(server.requests) - before == 1


def test_an_add_cut_short_says_what_is_kept_and_goes_on_the_next_time(server: QdrantServer) -> None:
    store = open_store(server.address(), info=INFO, options=QdrantOptions(attempts=2))
    records = [record(n, f"p{n:03}") for n in range(300)]
    server.faults_at, server.faults = "/points?", [None, 503, 503]
    with pytest.raises(StoreUnavailableError, match=r"503.*; 256 of 300 pages of this call are kept: add them again"):
        store.add(records)
    assert store.ids() == [f"p{n:03}" for n in range(256)]
    assert all(r.multi_vector is not None for r in store.get(store.ids()[-3:], vectors=True))  # no half page
    store.add(records)
    assert len(store) == 300


def test_keys_are_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(api_key=KEY) as server:
        with pytest.raises(StoreError, match=r"the API key was refused \(403\): Forbidden") as caught:
            open_store(server.address(), info=INFO)
        assert not isinstance(caught.value, StoreUnavailableError) and server.keys == [None]
        monkeypatch.setenv("QDRANT_API_KEY", "another")
        with pytest.raises(StoreError, match="refused"), pytest.warns(UserWarning, match="insecure connection"):
            open_store(server.address(), info=INFO)
        with pytest.warns(UserWarning, match="insecure connection"):
            store = open_store(server.address(), info=INFO, api_key=KEY)  # an argument beats the environment
        assert server.keys[1:] == ["another"] + [KEY] * (len(server.keys) - 2)
        for shown in (repr(store), store.location, str(vars(store)), str(vars(store)["_call"])):
            assert KEY not in shown
        monkeypatch.setenv("QDRANT_API_KEY", KEY)
        with pytest.warns(UserWarning, match="insecure connection"):
            assert len(open_store(server.address())) == 0


@pytest.mark.parametrize("wrong", [f"{KEY}\n", f" {KEY}", f"{KEY}é", 7])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="api_key: expected printable ASCII") as caught:
        open_store("qdrant://127.0.0.1:1/pages", info=INFO, api_key=wrong)
    assert KEY not in str(caught.value) and caught.value.__context__ is None
    if isinstance(wrong, str):
        monkeypatch.setenv("QDRANT_API_KEY", wrong)
        with pytest.raises(ConfigError, match="QDRANT_API_KEY: expected printable ASCII") as caught:
            open_store("qdrant://127.0.0.1:1/pages", info=INFO)
        assert KEY not in str(caught.value)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_tls_with_a_certificate_and_without_one_that_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    with serving(api_key=KEY, tls=(certificate, key)) as server:
        address = server.address().replace("qdrant:", "qdrants:")
        with pytest.raises(StoreUnavailableError, match="certificate verify failed") as caught:
            open_store(address, info=INFO, api_key=KEY, options=QdrantOptions(attempts=1))
        assert KEY not in str(caught.value)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with open_store(address, info=INFO, api_key=KEY) as store:  # and no warning: the key is encrypted
            store.add([record(1, "p1")])
            assert store.ids() == ["p1"] and store.location == address


def test_what_was_done_and_not_answered_is_done_once(server: QdrantServer) -> None:
    server.faults = [None, "after"]  # it is not there; it is made, and the answer is lost
    with open_store(server.address(), info=INFO) as store:
        server.faults = ["after"]
        store.add([record(n, f"p{n}") for n in range(5)])
        assert len(store) == 5
        server.faults = [None, "after"]
        assert store.delete(["p0", "p1", "nobody"]) == 2 and store.ids() == ["p2", "p3", "p4"]
        assert not server.faults


def test_a_write_that_waits_its_turn_is_told_as_such(server: QdrantServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(server.address(), info=INFO)
    monkeypatch.setattr(server, "_upsert", lambda *_: {"operation_id": 1, "status": "wait_timeout"})
    with pytest.raises(StoreUnavailableError, match="wait_timeout"):
        store.add([record(1)])


def test_closing_ends_the_waiting_for_a_server(server: QdrantServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(server.address(), info=INFO)
    monkeypatch.setattr(qdrant_connection, "_PAUSES", (60.0,))
    server.faults = [503]
    told: list[Exception] = []

    def count() -> None:
        try:
            len(store)
        except StoreError as exc:
            told.append(exc)

    thread = threading.Thread(target=count)
    thread.start()
    while server.faults:
        time.sleep(0.01)
    store.close()
    thread.join(10)
    assert not thread.is_alive() and isinstance(told[0], StoreUnavailableError)


def test_an_answer_of_something_else(server: QdrantServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "answer", lambda *_: {"surprise": 1})
    with pytest.raises(StoreError, match="an answer that cannot be read"):
        open_store(server.address(), info=INFO)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the client leaves its lock file open
def test_two_processes_cannot_have_one_folder_of_the_imitation(tmp_path: Path) -> None:
    store = open_store(f"qdrant+path:{tmp_path}/pages", info=INFO)
    with pytest.raises(StoreUnavailableError, match="is open already, in this process or another"):
        open_store(f"qdrant+path:{tmp_path}/pages")
    store.close()
    open_store(f"qdrant+path:{tmp_path}/pages").close()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be opened"):
        open_store(f"qdrant+path:{tmp_path}/file/pages", info=INFO)
    for file in tmp_path.rglob("*.sqlite"):
        file.write_bytes(b"damaged" * 999)
    with pytest.raises(StoreError, match=r"cannot be opened: .*not a database"):
        open_store(f"qdrant+path:{tmp_path}/pages")


def test_a_client_that_was_handed_in_stays_open() -> None:
    client = QdrantClient(":memory:")
    with QdrantStore("pages", info=INFO, client=client) as store:
        assert repr(store) == "QdrantStore(\"Qdrant collection 'pages'\")" and store.address is None
    assert client.collection_exists("pages")
    other: Any = object()
    with pytest.raises(ConfigError, match=r"client: expected a qdrant_client\.QdrantClient, got object"):
        QdrantStore("pages", info=INFO, client=other)
    client.close()


def test_grpc_where_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = parse_address(f"qdrant://127.0.0.1:1/pages?grpc={port}&timeout=1")
    call = Connection(qdrant_connection.connect(address), str(address), attempts=2, owned=True)
    with pytest.raises(StoreUnavailableError, match=f"UNAVAILABLE: .*{port}"):
        call("get_collection", collection_name="pages")
    call.close()


def test_faults_over_grpc(server: QdrantServer) -> None:
    with serving_grpc(server) as (port, services):
        services.faults = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED]
        with open_store(server.address(f"?grpc={port}"), info=INFO) as store:
            services.faults = [grpc.StatusCode.DEADLINE_EXCEEDED] * 3
            store.add([record(1, "p1")])
            assert store.ids() == ["p1"] and not services.faults
            services.faults = [grpc.StatusCode.INVALID_ARGUMENT]
            with pytest.raises(StoreError, match="INVALID_ARGUMENT: a fault") as caught:
                len(store)
            assert not isinstance(caught.value, StoreUnavailableError)
            services.faults = [grpc.StatusCode.UNAVAILABLE] * 9
            with pytest.raises(StoreUnavailableError, match="UNAVAILABLE: a fault"):
                len(store)
            assert len(services.faults) == 5


def test_keys_over_grpc() -> None:
    with serving(api_key=KEY) as server, serving_grpc(server) as (port, _):
        address = server.address(f"?grpc={port}")
        with pytest.raises(StoreError, match="the API key was refused: Invalid API key"):
            open_store(address, info=INFO)
        with pytest.warns(UserWarning, match="insecure connection"):
            store = open_store(address, info=INFO, api_key=KEY)
        assert len(store) == 0 and KEY not in repr(store)
        store.close()


def test_folders_take_neither_keys_nor_options(tmp_path: Path) -> None:
    for wrong in ({"api_key": KEY}, {"options": QdrantOptions()}):
        with pytest.raises(ConfigError, match="are for Qdrant; this is a folder") as caught:
            open_store(tmp_path / "index", info=INFO, **wrong)
        assert KEY not in str(caught.value)
    assert not (tmp_path / "index").exists()
