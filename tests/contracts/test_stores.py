"""The embedded store: the contract of every store, and what it promises of its files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from colqwen3_retrievers import EncoderInfo, open_store
from colqwen3_retrievers.errors import (
    ConfigError,
    StoreError,
    StoreUnavailableError,
)
from colqwen3_retrievers.stores.embedded.store import FIRST_SEGMENT, EmbeddedStore
from colqwen3_retrievers.stores.protocol import MultiVectorStore
from tests.contracts.store_contract import DIM, INFO, StoreContract, record, tokens


class TestEmbedded(StoreContract):
    """The contract over a folder."""

    @pytest.fixture
    def reopen(self, tmp_path: Path) -> Iterator[Callable[..., MultiVectorStore]]:
        opened: list[MultiVectorStore] = []

        def reopen(info: EncoderInfo | None = INFO) -> MultiVectorStore:
            opened.append(open_store(tmp_path / "index", info=info))
            return opened[-1]

        yield reopen
        for store in opened:
            store.close()


def filled(folder: Path, n: int = 6) -> Path:
    with EmbeddedStore(folder, info=INFO) as store:
        store.add([record(i, f"p{i}") for i in range(n)])
    return folder


def run_python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[2], **options,
    )  # fmt: skip


PRELUDE = """
import os, sys; sys.path.insert(0, os.getcwd())
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore
from tests.contracts.store_contract import INFO, record, tokens
"""


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    folder = filled(tmp_path / "index")
    with EmbeddedStore(folder) as store:
        with pytest.raises(StoreUnavailableError, match=rf"process {os.getpid()} \(this one\)"):
            EmbeddedStore(folder)
        with EmbeddedStore(folder, read_only=True) as reader:
            assert len(reader) == 6
            for change in (lambda: reader.add([record(1)]), lambda: reader.delete(["p1"])):
                with pytest.raises(StoreError, match="read_only=True"):
                    change()
        done = run_python("EmbeddedStore(sys.argv[1])", folder)
        assert f"another writer has it open: process {os.getpid()} on " in done.stderr
        store.add([record(9)])
    EmbeddedStore(folder).close()


def test_where_pages_lie_and_what_the_catalogue_says_are_of_one_moment(tmp_path: Path) -> None:
    with EmbeddedStore(filled(tmp_path / "index")) as store:
        catalogue = store._catalogue
        with catalogue.reading() as connection:
            connection.execute("SELECT generation FROM state").fetchone()  # from here on it sees this moment only
            store.delete(["p1"])
            store.add([record(20, "new")])
            store.search([tokens(0)], 1)  # another reader learns of the change first
            extents = catalogue.extents(connection)
            keys = [row[0] for row in connection.execute("SELECT key FROM pages ORDER BY key")]
            assert extents.keys.tolist() == keys == [1, 3, 4, 5, 6, 7]


def test_a_store_that_was_forgotten_lets_go_of_the_lock(tmp_path: Path) -> None:
    store: Any = EmbeddedStore(tmp_path, info=INFO)
    store.add([record(1)])
    with pytest.raises(StoreUnavailableError, match="another writer has it open"):
        EmbeddedStore(tmp_path)
    del store
    with EmbeddedStore(tmp_path) as next_writer:
        next_writer.add([record(2)])
        assert len(next_writer) == 2


def test_reading_in_another_process_while_one_writes(tmp_path: Path) -> None:
    folder = filled(tmp_path / "index")
    code = """
    import time
    seen = set()
    with EmbeddedStore(sys.argv[1], read_only=True) as reader:
        print("open", flush=True)
        until = time.monotonic() + 30
        while time.monotonic() < until and max(seen, default=0) < 6 + 25 * 4:
            found = reader.search([tokens(3)], 10_000)[0]
            assert (len(found) - 6) % 4 == 0, len(found)
            assert all(reader.get([m.record.page.id], vectors=True) for m in found[:3])
            seen.add(len(found))
    print(len(seen), max(seen))
    """
    arguments = [sys.executable, "-c", PRELUDE + textwrap.dedent(code), str(folder)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as reader:
        assert reader.stdout is not None and reader.stdout.readline() == "open\n"
        with EmbeddedStore(folder) as store:
            for batch in range(25):
                store.add([record(n, f"new{batch}.{n}") for n in range(4)])
                time.sleep(0.005)
        states, most = map(int, reader.stdout.read().split())
    assert most == 106 and states >= 2


def test_a_killed_writer_loses_nothing_it_acknowledged(tmp_path: Path) -> None:
    code = """
    store = EmbeddedStore(sys.argv[1], info=INFO)
    first = int(sys.argv[2])
    for batch in range(first, first + 10_000):
        store.add([record(batch * 5 + n, f"b{batch}.{n}") for n in range(4)] + [record(batch, "same")])
        print(batch, flush=True)
    """
    folder = tmp_path / "index"
    next_batch = 0
    acknowledged: set[int] = set()
    for trial in range(12):
        arguments = [sys.executable, "-c", PRELUDE + textwrap.dedent(code), str(folder), str(next_batch)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline()]
            time.sleep(0.003 * trial)
            writer.send_signal(signal.SIGKILL)
            lines += writer.stdout.read().splitlines()
        told = [int(line) for line in lines if line.strip().isdigit()]
        acknowledged.update(told)
        with EmbeddedStore(folder) as store:
            batches = sorted({int(i[1:].partition(".")[0]) for i in store.ids() if i != "same"})
            assert acknowledged <= set(batches)
            assert len(store) == 4 * len(batches) + 1  # no half batch
            next_batch = batches[-1] + 1
            assert batches == list(range(next_batch)) and next_batch - 1 - max(told) <= 1
            rows = sum(1 + seed % 7 for b in batches for seed in [*range(b * 5, b * 5 + 4), b])
            assert (folder / FIRST_SEGMENT).stat().st_size == rows * DIM * 2
    with EmbeddedStore(folder, read_only=True) as store:
        for batch in range(next_batch):
            for n, back in enumerate(store.get([f"b{batch}.{n}" for n in range(4)], vectors=True)):
                wanted = record(batch * 5 + n).multi_vector
                assert np.asarray(back.multi_vector).tobytes() == np.asarray(wanted).tobytes()
        assert (
            np.asarray(store.get(["same"], vectors=True)[0].multi_vector).tobytes()
            == np.asarray(record(next_batch - 1).multi_vector).tobytes()
        )


def test_bytes_nobody_committed_are_ignored_by_readers_and_cut_by_the_writer(tmp_path: Path) -> None:
    folder = filled(tmp_path / "index")
    size = (folder / FIRST_SEGMENT).stat().st_size
    with (folder / FIRST_SEGMENT).open("ab") as file:
        file.write(b"\xff" * 1001)
    with EmbeddedStore(folder, read_only=True) as reader:
        assert len(reader.search([tokens(0)], 99)[0]) == 6
    assert (folder / FIRST_SEGMENT).stat().st_size == size + 1001
    with EmbeddedStore(folder) as store:
        assert (folder / FIRST_SEGMENT).stat().st_size == size
        store.add([record(8, "p8")])
        assert np.asarray(store.get(["p8"], vectors=True)[0].multi_vector).tobytes() == tokens(8, 2).tobytes()


def test_a_cut_or_missing_token_file_is_named(tmp_path: Path) -> None:
    folder = filled(tmp_path / "index")
    path = folder / FIRST_SEGMENT
    with EmbeddedStore(folder, read_only=True) as reader:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(StoreError, match=rf"{FIRST_SEGMENT}: \d+ bytes, but the catalogue counts \d+"):
            reader.search([tokens(0)], 1)
    for read_only in (True, False):
        with pytest.raises(StoreError, match="was cut or replaced"):
            EmbeddedStore(folder, read_only=read_only)
    path.unlink()
    with pytest.raises(StoreError, match=f"{FIRST_SEGMENT}: No such file"):
        EmbeddedStore(folder)


def test_a_flipped_bit_is_found_when_vectors_are_read(tmp_path: Path) -> None:
    folder = filled(tmp_path / "index")
    damaged = bytearray((folder / FIRST_SEGMENT).read_bytes())
    damaged[-3] ^= 4
    (folder / FIRST_SEGMENT).write_bytes(damaged)
    with EmbeddedStore(folder) as store:
        assert len(store.get(["p0", "p4"], vectors=True)) == 2
        with pytest.raises(StoreError, match="embeddings of 'p5' are not what was written"):
            store.get(["p5"], vectors=True)
        store.add([record(5, "p5")])
        assert store.get(["p5"], vectors=True)


def test_only_an_index_or_an_empty_folder_is_opened(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no index there; to make one, say what encodes"):
        EmbeddedStore(tmp_path / "new")
    with pytest.raises(StoreError, match="no index there"):
        EmbeddedStore(tmp_path / "new", info=INFO, read_only=True)
    assert not (tmp_path / "new").exists()
    EmbeddedStore(tmp_path / "deep" / "er", info=INFO).close()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"not an index, and not empty \(it holds 'cat.jpg'"):
        EmbeddedStore(tmp_path / "photos", info=INFO)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    with pytest.raises(StoreError, match="cannot be opened as a folder"):
        EmbeddedStore(tmp_path / "photos" / "cat.jpg", info=INFO)
    folder = filled(tmp_path / "index")
    (folder / "catalogue.sqlite").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"holds token embeddings, but 'catalogue\.sqlite' is missing"):
        EmbeddedStore(folder, info=INFO)


def test_a_catalogue_of_another_kind_or_version_is_refused(tmp_path: Path) -> None:
    folder = filled(tmp_path / "index")
    path = folder / "catalogue.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 3")
    connection.close()
    for read_only in (True, False):
        with pytest.raises(StoreError, match="format version 3; this release reads version 1"):
            EmbeddedStore(folder, read_only=read_only)
    path.write_bytes(b"something else entirely" * 300)
    with pytest.raises(StoreError, match="not a catalogue of token embeddings"):
        EmbeddedStore(folder)
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE state (x)")
    connection.close()
    for read_only in (True, False):
        with pytest.raises(StoreError, match="not a catalogue of token embeddings"):
            EmbeddedStore(folder, read_only=read_only)


def test_a_creation_that_was_killed_does_not_stand_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "writer.lock").write_text("{half")
    (tmp_path / "catalogue.sqlite.new").write_bytes(b"half")
    (tmp_path / FIRST_SEGMENT).touch()
    with EmbeddedStore(tmp_path, info=INFO) as store:
        store.add([record(1)])
        assert json.loads((tmp_path / "writer.lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "catalogue.sqlite.new").exists()


def test_a_full_disk_is_an_error_that_costs_nothing(tmp_path: Path) -> None:
    folder = filled(tmp_path / "index")
    code = """
    import resource
    from colqwen3_retrievers.errors import StoreError
    store = EmbeddedStore(sys.argv[1])
    before, size = len(store), os.path.getsize(sys.argv[1] + "/tokens-000001.f16")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), limits[1]))
    try:
        store.add([record(n, f"big{n}", text="x" * 100) for n in range(3000)])
    except StoreError as exc:
        print(exc)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.path.getsize(sys.argv[1] + "/tokens-000001.f16") == size
    assert len(store) == before == len(store.search([tokens(1)], 99)[0])
    store.add([record(1, "after")])
    store.close()
    """
    for limit, names in ((50_000, FIRST_SEGMENT), (600_000, "catalogue.sqlite")):  # while appending, while committing
        done = run_python(code, folder, limit)
        assert done.returncode == 0 and names in done.stdout, (done.stdout, done.stderr[-2000:])
    with EmbeddedStore(folder) as store:
        assert store.ids() == ["after", *(f"p{n}" for n in range(6))]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody without rights")
def test_reading_where_nothing_can_be_written(tmp_path: Path) -> None:
    folder = Path("/tmp") / f"colqwen3-read-only-{os.getpid()}"  # somebody without rights cannot enter tmp_path
    try:
        filled(folder)
        for path in [folder, *folder.iterdir()]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        code = """
        from colqwen3_retrievers.vectors.late_interaction import numpy_kernel
        query = tokens(0)  # imports what it needs while that can still be read
        os.setuid(65534)
        with EmbeddedStore(sys.argv[1], read_only=True, kernel=numpy_kernel) as store:
            print(len(store.search([query], 99)[0]))
        try:
            EmbeddedStore(sys.argv[1])
        except Exception as exc:
            print(type(exc).__name__, exc)
        """
        done = run_python(code, folder)
        assert done.stdout.startswith("6\nStoreError"), (done.stdout, done.stderr)
        assert "cannot be written to: Permission denied" in done.stdout
    finally:
        shutil.rmtree(folder)


def test_locations(tmp_path: Path) -> None:
    for location, shown in (
        ("redis://user:secret@host/c", "'redis://…@host/c': no such store; a location is a folder"),
        (Path("redis://h/c"), "no such store"),
        ("", "expected a folder or an address, got ''"),
        (3, "expected a folder or an address, got 3"),
    ):
        with pytest.raises(ConfigError, match=shown) as caught:
            open_store(location, info=INFO)
        assert "secret" not in str(caught.value)
    store = open_store(str(tmp_path / "with space # and ?.d"), info=INFO)
    store.add([record(1)])
    store.close()
