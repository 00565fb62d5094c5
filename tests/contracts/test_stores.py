"""What every store promises, as a class to subclass, and what the embedded one promises of its files."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from colqwen3_retrievers import EncoderInfo, MultiVector, Page, open_store
from colqwen3_retrievers.errors import (
    ConfigError,
    DimensionError,
    StoreError,
    StoreMismatchError,
    StoreUnavailableError,
)
from colqwen3_retrievers.stores import MultiVectorStore, Record
from colqwen3_retrievers.stores.embedded import FIRST_SEGMENT, EmbeddedStore

DIM = 16
INFO = EncoderInfo("ab12", "test", "tomoro", DIM, 1, 1280, False, 1)


def tokens(seed: int, n_tokens: int = 5) -> np.ndarray:
    """Unit rows that float16 can hold, so that what comes back can be compared bit by bit."""
    rows = np.random.default_rng(seed).standard_normal((n_tokens, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def record(seed: int, id: str | None = None, **page: Any) -> Record:
    source, number = page.pop("source", "a.pdf"), page.pop("number", seed + 1)
    made = Page(id=id, source=source, number=number, sha256=f"{seed:064x}", **page)
    return Record(made, MultiVector(tokens(seed, 1 + seed % 7)))


def by_loops(query: np.ndarray, document: np.ndarray) -> float:
    """MaxSim as its definition reads."""
    return sum(max(float(np.dot(q, d)) for d in document.astype(np.float64)) for q in query.astype(np.float64))


def ids_of(found: list[Any]) -> list[str]:
    return [match.record.page.id for match in found]


class StoreContract:
    """Subclass it with a fixture ``reopen``: a function that opens the one store of the test, always the same."""

    @pytest.fixture
    def store(self, reopen: Callable[..., MultiVectorStore]) -> MultiVectorStore:
        return reopen()

    def test_it_is_a_store(self, store: MultiVectorStore) -> None:
        assert isinstance(store, MultiVectorStore)
        assert (len(store), store.ids(), store.info, store.read_only) == (0, [], INFO, False)
        assert store.search([tokens(0)], 3) == [[]]
        assert store.search([], 3) == []

    def test_scores_are_maxsim_of_what_it_holds(self, store: MultiVectorStore) -> None:
        records = [record(n) for n in range(40)]
        store.add(records)
        queries = [tokens(100 + n, 1 + n) for n in range(6)]
        for query, matches in zip(queries, store.search(queries, 40), strict=True):
            expected = {r.page.id: by_loops(query, np.asarray(r.multi_vector)) for r in records}
            assert {m.record.page.id: m.score for m in matches} == pytest.approx(expected, abs=1e-5)
            assert [m.score for m in matches] == sorted((m.score for m in matches), reverse=True)
            assert all(isinstance(m.score, float) and m.record.multi_vector is None for m in matches)

    def test_negative_similarities_rank_as_they_are(self, store: MultiVectorStore) -> None:
        query = tokens(1, 1)
        away = -query
        side = -0.8 * query + 0.6 * np.linalg.svd(query)[2][-1:]
        store.add([Record(Page(id=n, source=n), MultiVector(v)) for n, v in (("away", away), ("side", side))])
        best, worst = store.search([query], 2)[0]
        assert (best.record.page.id, worst.record.page.id) == ("side", "away")
        assert (best.score, worst.score) == pytest.approx((-0.8, -1.0), abs=2e-3)

    def test_equal_scores_are_ordered_by_id(self, store: MultiVectorStore) -> None:
        for name in ("b", "a", "ä", "Z", "\U0001f600", "\uffff", "a1"):
            store.add([Record(Page(id=name), MultiVector(tokens(0)))])
        in_order = sorted(["b", "a", "ä", "Z", "\U0001f600", "\uffff", "a1"])
        for k in range(1, 9):
            assert ids_of(store.search([tokens(9)], k)[0]) == in_order[:k]

    def test_everything_about_a_record_comes_back(self, store: MultiVectorStore) -> None:
        pooled = MultiVector(
            tokens(3, 4),
            content=slice(2, -1),
            visual=slice(1, 7),
            tokens=("<s>", "a", "b", "c", "d", "e", "f", "</s>"),
            grid=(2, 3),
            clusters=np.asarray([0, 0, 1, 1, 2, 2, 3, 3]),
        )
        page = Page(
            "i'd\n\"?", "d/ü.pdf", 7, "iv", None, "text\0日本", {"a": {"b": [1, None, 2.5]}, "big": 2**70}, "ff"
        )
        store.add([Record(page, pooled, "image reference"), record(1)])
        (back,) = store.get([page.id], vectors=True)
        for name in ("id", "source", "number", "label", "text", "metadata", "sha256"):
            assert getattr(back.page, name) == getattr(page, name)
        assert back.image == "image reference" and back.multi_vector is not None
        assert np.asarray(back.multi_vector).tobytes() == np.asarray(pooled).tobytes()
        assert back.multi_vector.vectors.dtype == np.float32
        for name in ("content", "visual", "tokens", "grid"):
            assert getattr(back.multi_vector, name) == getattr(pooled, name)
        np.testing.assert_array_equal(back.multi_vector.clusters, pooled.clusters)
        assert store.get([page.id])[0].multi_vector is None

    def test_get_keeps_order_and_leaves_out_what_is_not_there(self, store: MultiVectorStore) -> None:
        store.add([record(n, f"p{n}") for n in range(3)])
        asked = ["p2", "nobody", "p0", "p2", "\ud800"]
        assert [r.page.id for r in store.get(asked)] == ["p2", "p0", "p2"]
        assert "p1" in store and "nobody" not in store and 3 not in store
        with pytest.raises(ConfigError, match="got the text 'p1'"):
            store.get("p1")

    def test_adding_an_id_again_replaces_it(self, store: MultiVectorStore) -> None:
        store.add([record(n, f"p{n}", metadata={"v": 1}) for n in range(3)])
        store.add([record(50, "p1", metadata={"w": 2}), record(51, "p9")])
        assert len(store) == 4 and store.ids({"v": 1}) == ["p0", "p2"] and store.ids({"w": 2}) == ["p1"]
        assert np.asarray(store.get(["p1"], vectors=True)[0].multi_vector).tobytes() == tokens(50, 2).tobytes()
        found = store.search([tokens(50, 2)], 9)[0]
        assert sorted(ids_of(found)) == ["p0", "p1", "p2", "p9"]
        assert found[0].record.page.id == "p1" and found[0].score == pytest.approx(2, abs=1e-2)

    def test_delete(self, store: MultiVectorStore) -> None:
        store.add([record(n, f"p{n}", metadata={"even": n % 2 == 0}) for n in range(10)])
        assert store.delete(["p1", "nobody", "p1"]) == 1
        assert store.delete(where={"even": True, "number": {"$gt": 5}}) == 2
        assert store.delete(["p0", "p3"], where={"even": True}) == 1
        assert store.ids() == ["p2", "p3", "p4", "p5", "p7", "p9"] == sorted(ids_of(store.search([tokens(0)], 99)[0]))
        assert store.delete([]) == 0 and len(store) == 6
        for nothing in ({}, {"where": {}}):
            with pytest.raises(ConfigError, match="would mean all of them"):
                store.delete(**nothing)
        with pytest.raises(ConfigError, match="got the text 'p2'"):
            store.delete("p2")
        assert store.delete(where={"id": {"$exists": True}}) == 6
        assert (len(store), store.search([tokens(0)], 1)) == (0, [[]])

    def test_search_within_a_filter(self, store: MultiVectorStore) -> None:
        store.add([record(n, f"p{n:02d}", metadata={"third": n % 3}) for n in range(30)])
        query = tokens(200)
        everything = store.search([query], 30)[0]
        for where in ({"third": 1}, {"id": {"$in": ["p03", "p28"]}}, {"number": {"$gt": 7, "$lte": 12}}, {"third": 9}):
            allowed = set(store.ids(where))
            found = store.search([query], 5, where=where)[0]
            assert [(m.record.page.id, m.score) for m in found] == [
                (m.record.page.id, pytest.approx(m.score, abs=1e-6)) for m in everything if m.record.page.id in allowed
            ][:5]
        with pytest.raises(ConfigError, match="unknown operator"):
            store.search([query], 5, where={"third": {"$near": 1}})

    def test_the_best_record_of_each_source(self, store: MultiVectorStore) -> None:
        store.add([record(n, f"p{n:03d}", source=f"s{n % 4}") for n in range(60)])
        store.add([Record(Page(id=f"alone{n}"), MultiVector(tokens(300 + n))) for n in range(2)])
        query = tokens(400)
        best: dict[str, tuple[str, float]] = {}
        for match in store.search([query], 99)[0]:
            page = match.record.page
            best.setdefault(page.source or page.id, (page.id, match.score))
        for k in (1, 3, 6, 50):
            found = store.search([query], k, group_by="source")[0]
            assert [(m.record.page.id, m.score) for m in found] == list(best.values())[:k]
        assert len(best) == 6
        with pytest.raises(ConfigError, match="group_by: expected None or 'source', got 'number'"):
            store.search([query], 1, group_by="number")

    def test_bad_arguments_are_named(self, store: MultiVectorStore) -> None:
        for k in (0, -1, 1.5, True, None):
            with pytest.raises(ConfigError, match="k: expected a whole number from 1"):
                store.search([tokens(0)], k)
        with pytest.raises(DimensionError, match="expected dim 16, got 2"):
            store.search([[[1.0, 0.0]]], 1)
        with pytest.raises(DimensionError, match="page 'x': expected dim 16, got 2"):
            store.add([Record(Page(id="x"), MultiVector(np.eye(2, dtype=np.float32)))])
        for bad, says in (
            ([record(1, "x"), record(2, "x")], "two records with the id 'x'"),
            ([Record(Page(id="x"))], "page 'x': no multi-vector"),
            ([record(1, "\ud800")], "id: not valid Unicode"),
            ([record(1, "x", number=2**63)], "does not fit in 64 bits"),
        ):
            with pytest.raises(ConfigError, match=says):
                store.add([record(7, "good"), *bad])
        assert len(store) == 0

    def test_images_are_those_records_hold(self, store: MultiVectorStore) -> None:
        store.add([dataclasses.replace(record(n, f"p{n}"), image=f"i{n // 2}") for n in range(4)])
        store.add([record(9)])
        assert store.images() == {"i0", "i1"} and store.images(["i1", "i7"]) == {"i1"}
        store.delete(["p2", "p3"])
        assert store.images() == {"i0"}

    def test_reopening_finds_all_of_it(self, reopen: Callable[..., MultiVectorStore]) -> None:
        store = reopen()
        store.add([record(n, f"p{n}") for n in range(5)])
        store.delete(["p0"])
        store.add([record(77, "p1")])
        before = [(m.record.page.id, m.score) for m in store.search([tokens(5)], 9)[0]]
        store.close()
        for info in (INFO, None):
            again = reopen(info=info)
            assert again.info == INFO
            assert [(m.record.page.id, m.score) for m in again.search([tokens(5)], 9)[0]] == before
            again.close()

    def test_a_closed_store_says_so(self, store: MultiVectorStore) -> None:
        store.close()
        store.close()
        for call in (
            lambda: len(store),
            lambda: store.search([tokens(0)], 1),
            lambda: store.add([record(1)]),
            lambda: store.delete(["x"]),
            lambda: store.get(["x"]),
        ):
            with pytest.raises(StoreError, match="closed"):
                call()

    @pytest.mark.parametrize(
        ("field", "value"),
        [("fingerprint", "cd34"), ("family", "ops"), ("dim", 8), ("pool_factor", 3), ("include_text", True),
         ("rendering_version", 2)],
    )  # fmt: skip
    def test_what_cannot_be_compared_is_refused(
        self, reopen: Callable[..., MultiVectorStore], field: str, value: Any
    ) -> None:
        reopen().close()
        other = dataclasses.replace(INFO, model="renamed", **{field: value})
        says = (
            f"{field} is {getattr(INFO, field)!r} in the index, {value!r} in the encoder .model 'test' wrote it, 'rena"
        )
        with pytest.raises(StoreMismatchError, match=says):
            reopen(info=other)
        reopen(info=dataclasses.replace(INFO, model="renamed", verified=False)).close()

    def test_another_resolution_may_search_but_not_add(self, reopen: Callable[..., MultiVectorStore]) -> None:
        store = reopen()
        store.add([record(1)])
        store.close()
        store = reopen(info=dataclasses.replace(INFO, max_visual_tokens=512))
        assert len(store.search([tokens(0)], 1)[0]) == 1
        with pytest.raises(StoreMismatchError, match="max_visual_tokens is 1280 in the index, 512 in the encoder"):
            store.add([record(2)])
        assert len(store) == 1 and store.info.max_visual_tokens == 1280

    def test_threads_search_while_one_adds_and_deletes(self, store: MultiVectorStore) -> None:
        store.add([record(n, f"keep{n}") for n in range(20)])
        wrong: list[str] = []
        stop = threading.Event()

        def search() -> None:
            while not stop.is_set():
                found = store.search([tokens(5)], 99)[0]
                kept = sum(m.record.page.id.startswith("keep") for m in found)
                batch = [m.record.page.id for m in found if m.record.page.id.startswith("new")]
                if kept != 20 or len(batch) not in (0, 8) or any(m.record.page.sha256 == "" for m in found):
                    wrong.append(f"{kept} kept, {len(batch)} of a batch of 8")

        searchers = [threading.Thread(target=search) for _ in range(3)]
        for thread in searchers:
            thread.start()
        for turn in range(30):
            store.add([record(turn * 8 + n, f"new{n}") for n in range(8)])
            if turn % 3 == 2:
                assert store.delete(where={"id": {"$text": "new"}}) == 8
        stop.set()
        for thread in searchers:
            thread.join()
        assert wrong == []


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
from colqwen3_retrievers.stores.embedded import EmbeddedStore
from tests.contracts.test_stores import INFO, record, tokens
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
            connection, extents = catalogue.extents(connection)
            keys = [row[0] for row in connection.execute("SELECT key FROM pages ORDER BY key")]
            assert extents.keys.tolist() == keys == [1, 3, 4, 5, 6, 7]


def test_a_store_that_was_forgotten_lets_go_of_the_lock(tmp_path: Path) -> None:
    store: Any = EmbeddedStore(tmp_path, info=INFO)
    store.add([record(1)])
    del store
    EmbeddedStore(tmp_path).close()


def test_a_forked_child_is_told_to_open_again_and_harms_nothing(tmp_path: Path) -> None:
    code = """
    import warnings; warnings.simplefilter("ignore")
    store = EmbeddedStore(sys.argv[1], info=INFO)
    store.add([record(1)])
    child = os.fork()
    if child == 0:
        try:
            len(store)
        except Exception as exc:
            print(exc, flush=True)
        store.close()
        os._exit(0)
    os.waitpid(child, 0)
    store.add([record(2)])
    try:
        EmbeddedStore(sys.argv[1])
    except Exception as exc:
        print(type(exc).__name__, len(store))
    """
    done = run_python(code, tmp_path / "index")
    assert "opened before a fork; open it again in the new process" in done.stdout, done.stderr
    assert "StoreUnavailableError 2" in done.stdout


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
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(StoreError, match="format version 2; this release reads version 1"):
        EmbeddedStore(folder)
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
        from colqwen3_retrievers.late_interaction import numpy_kernel
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
        ("qdrant://user:secret@host/c", "'qdrant://…@host/c': no such store; a location is a folder"),
        (Path("redis://h/c"), "no such store"),
        ("", "expected a folder, got ''"),
        (3, "expected a folder, got 3"),
    ):
        with pytest.raises(ConfigError, match=shown) as caught:
            open_store(location, info=INFO)
        assert "secret" not in str(caught.value)
    store = open_store(str(tmp_path / "with space # and ?.d"), info=INFO)
    store.add([record(1)])
    store.close()
