"""What is left of an embedded store after its process was killed, its disk was full, or its ground was read-only.

Run as a script, this file is the killer: it forks a process that adds, replaces, deletes and compacts, kills it at a
random moment, and compares what is on disk with what was acknowledged. COLQWEN3_CRASH_KILLS says how many are killed.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from colqwen3_retrievers import EncoderInfo, MultiVector, Page
from colqwen3_retrievers.stores.embedded import compaction
from colqwen3_retrievers.stores.embedded import store as embedded
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore
from colqwen3_retrievers.stores.protocol import Record
from colqwen3_retrievers.vectors.kernels.scan import numpy_scan
from colqwen3_retrievers.vectors.late_interaction import numpy_kernel

ROOT = Path(__file__).parents[2]
DIM = 16
INFO = EncoderInfo("ab12", "test", "tomoro", DIM, 1, 1280, False, 1)
IDS = [f"page {n}" for n in range(60)]
NUMPY: dict[str, Any] = {"kernel": numpy_kernel, "scan": numpy_scan}  # so that no forked process imports torch
Model = dict[str, int]  # id -> the seed of its content


def content(seed: int) -> np.ndarray:
    """Unit rows that float16 holds exactly, of 1 to 40 tokens."""
    rows = np.random.default_rng(seed).standard_normal((1 + seed * 7 % 40, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def record(page_id: str, seed: int) -> Record:
    page = Page(
        page_id, f"s{seed % 5}.pdf", 1 + seed % 9, text=f"text {seed}", metadata={"seed": seed}, sha256=f"{seed:x}"
    )
    return Record(page, MultiVector(content(seed)), f"image {seed}")


def operation(number: int) -> tuple[str, list[str]]:
    """What is done at a turn: the same whoever asks."""
    rng = random.Random(number)
    kind = rng.choices(["add", "delete", "delete where", "compact"], [6, 2, 2, 4])[0]
    return kind, rng.sample(IDS, rng.randint(1, 12))


def done(model: Model, number: int) -> Model:
    """What a store holds after a turn."""
    kind, ids = operation(number)
    if kind == "add":
        return model | {page_id: 1000 * number + i for i, page_id in enumerate(ids)}
    if kind == "delete":
        return {page_id: seed for page_id, seed in model.items() if page_id not in ids}
    if kind == "delete where":
        return {page_id: seed for page_id, seed in model.items() if not seed % 1000 < 2}
    return model


def do(store: EmbeddedStore, number: int) -> None:
    kind, ids = operation(number)
    if kind == "add":
        store.add([record(page_id, 1000 * number + i) for i, page_id in enumerate(ids)])
    elif kind == "delete":
        store.delete(ids)
    elif kind == "delete where":
        store.delete([i for i in store.ids() if store.get([i])[0].page.metadata["seed"] % 1000 < 2])
    else:
        store.compact()


def held(store: EmbeddedStore) -> Model:
    """What a store holds, every byte of it compared with what was once written."""
    found = {}
    for back in store.get(store.ids(), vectors=True):
        seed = back.page.metadata["seed"]
        wanted = record(back.page.id, seed)
        assert np.asarray(back.multi_vector).tobytes() == content(seed).tobytes(), (back.page.id, seed)
        for name in ("source", "number", "text", "metadata", "sha256"):
            assert getattr(back.page, name) == getattr(wanted.page, name)
        assert back.image == wanted.image
        assert store.ids({"seed": seed}) == [back.page.id]
        found[back.page.id] = seed
    if found:
        for exact in (True, False):  # reads every token embedding and every code, and compares them
            hits = store.search([content(3)], len(IDS), exact=exact)[0]
            assert {hit.record.page.id for hit in hits} == set(found)
    return found


def small_files() -> None:
    """Let files be rewritten and begun anew within a few turns."""
    compaction.DEAD_BYTES, compaction.SEGMENT_BYTES, embedded.EXACT_PAGES = 2000, 12_000, 10


def child(folder: Path, first: int, said: int, inside: mmap.mmap) -> None:
    """Do turn after turn and acknowledge each, until killed."""
    store = EmbeddedStore(folder, info=INFO, **NUMPY)
    inside[1] = 1
    for number in range(first, first + 100_000):
        inside[0] = 1 + ["add", "delete", "delete where", "compact"].index(operation(number)[0])
        do(store, number)
        inside[0] = 0
        os.write(said, f"{number}\n".encode())


def killer(folder: Path, kills: int) -> None:
    """Kill so many processes, and compare after each; print how often each kind of write was hit."""
    small_files()
    rng = random.Random(5)
    inside = mmap.mmap(-1, 2)  # what the child is at, and whether its store is open
    hit = [0] * 5
    model: Model = {}
    turn = turns_lost = rewritten = 0
    for _ in range(kills):
        inside[0] = inside[1] = 0
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            try:
                child(folder, turn, writing, inside)
            finally:
                os._exit(1)
        os.close(writing)
        if rng.random() < 0.9:  # the others may be killed while they open
            until = time.monotonic() + 20
            while not inside[1] and time.monotonic() < until:
                time.sleep(0.0005)
        time.sleep(rng.expovariate(1 / 0.03))
        os.kill(pid, signal.SIGKILL)
        with open(reading, "rb") as pipe:  # noqa: PTH123 - a descriptor
            acknowledged = [int(line) for line in pipe.read().split()]
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "a writer ended by itself"
        hit[inside[0]] += 1
        assert acknowledged == list(range(turn, turn + len(acknowledged)))
        for number in acknowledged:
            model = done(model, number)
        turn += len(acknowledged)
        if not (folder / "catalogue.sqlite").exists():
            assert not acknowledged
            continue
        with EmbeddedStore(folder, **NUMPY) as store:
            now = held(store)
            names = {path.name for path in folder.iterdir()}
            segments = [name for name in names if name.startswith("tokens-")]
            rewritten += any(name.count("-") == 2 for name in segments)
            assert len(segments) == len([name for name in names if name.startswith("codes-")])  # nothing left lying
        if now != model:  # then the turn that was under way came to its commit, wholly
            model = done(model, turn)
            assert now == model
            turn += 1
            turns_lost += 1
    sys.stdout.write(
        json.dumps({"turns": turn, "hit": hit, "committed unacknowledged": turns_lost, "rewritten": rewritten})
    )


def test_killed_writers_lose_nothing_they_acknowledged(tmp_path: Path) -> None:
    kills = int(os.environ.get("COLQWEN3_CRASH_KILLS", "200"))
    seen = json.loads(run_script("kill", tmp_path / "index", kills))
    outside, *by_kind = seen["hit"]
    assert sum(by_kind) > 0.6 * kills > 1.5 * outside, seen  # most were killed within a write
    assert all((by_kind[0], by_kind[1] + by_kind[2], by_kind[3])), seen  # within each kind of write
    assert seen["turns"] > kills / 10 and seen["rewritten"] > kills / 4, seen


# -- no room, no right -------------------------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    where = tmp_path / "disk"
    where.mkdir()
    mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(where))
    yield where
    subprocess.run(["umount", "-l", str(where)], check=False, capture_output=True)


def mount(*arguments: str) -> None:
    if shutil.which("mount") is None:
        pytest.skip("no mount here")
    made = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"mounting is not allowed here: {made.stderr.strip()}")


def big(number: int, tokens: int = 400) -> Record:
    rows = np.random.default_rng(number).standard_normal((tokens, DIM))
    unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return Record(Page(f"big {number}"), MultiVector(unit))


def test_a_full_disk_is_an_error_that_costs_nothing(mounted: Path) -> None:
    from colqwen3_retrievers.errors import StoreError

    folder = mounted / "index"
    (mounted / "ballast").write_bytes(b"x" * 500_000)
    with EmbeddedStore(folder, info=INFO, **NUMPY) as store:
        store.add([record(page_id, n) for n, page_id in enumerate(IDS)])
        before = held(store)
        added = 0
        with pytest.raises(StoreError, match=r"No space left|disk is full"):
            for batch in range(1000):
                store.add([big(batch * 4 + n) for n in range(4)])
                added += 1
        assert added > 3 and len(store) == len(IDS) + 4 * added
        assert {page_id for page_id in store.ids() if page_id in before} == set(before)
        with pytest.raises(StoreError):  # no room for a copy, and the copy it began is gone again
            store.delete([f"big {n}" for n in range(2)])
            store.compact()
        names = sorted(path.name for path in folder.glob("*-0*"))
        assert names == ["codes-000001.i8", "tokens-000001.f16"]
    with EmbeddedStore(folder, **NUMPY) as store:
        assert len(store.get(store.ids(), vectors=True)) == len(store)  # compared with their checksums
        (mounted / "ballast").unlink()
        store.delete([i for i in store.ids() if i.startswith("big")])
        assert held(store) == before
        assert store.compact() > 0
        store.add([big(1)])
        assert len(store) == len(IDS) + 1


def test_a_full_disk_while_an_index_is_made(mounted: Path) -> None:
    from colqwen3_retrievers.errors import StoreError

    (mounted / "ballast").write_bytes(b"x" * (2**21 - 4096 * 4))
    with pytest.raises(StoreError, match="index"):
        EmbeddedStore(mounted / "index", info=INFO)
    (mounted / "ballast").unlink()
    with EmbeddedStore(mounted / "index", info=INFO, **NUMPY) as store:
        store.add([record("a", 1)])


@pytest.mark.parametrize("left_open", [False, True], ids=["closed", "killed"])
def test_reading_on_a_read_only_mount(tmp_path: Path, left_open: bool) -> None:
    from colqwen3_retrievers.errors import StoreError

    folder, elsewhere = tmp_path / "index", tmp_path / "mounted"
    elsewhere.mkdir()
    if left_open:  # a writer killed leaves a log beside the catalogue, which a reader must read too
        code = """
        store = EmbeddedStore(sys.argv[1], info=INFO)
        store.add([record(page_id, n) for n, page_id in enumerate(IDS)])
        os.kill(os.getpid(), 9)
        """
        prelude = "import os, sys; sys.path.insert(0, os.getcwd())\nfrom tests.integration.test_store_crash import *\n"
        subprocess.run([sys.executable, "-c", prelude + textwrap.dedent(code), str(folder)], check=False, cwd=ROOT)
    else:
        with EmbeddedStore(folder, info=INFO, **NUMPY) as store:
            store.add([record(page_id, n) for n, page_id in enumerate(IDS)])
    mount("--bind", str(folder), str(elsewhere))
    try:
        mount("-o", "remount,bind,ro", str(elsewhere))
        with pytest.raises(StoreError, match="Read-only file system"):
            EmbeddedStore(elsewhere, info=INFO)
        with EmbeddedStore(elsewhere, read_only=True, **NUMPY) as store:
            assert held(store) == {page_id: n for n, page_id in enumerate(IDS)}
            with pytest.raises(StoreError, match="read_only=True"):
                store.add([record("x", 1)])
            with pytest.raises(StoreError, match="read_only=True"):
                store.compact()
    finally:
        subprocess.run(["umount", "-l", str(elsewhere)], check=False, capture_output=True)
    with EmbeddedStore(folder, **NUMPY) as store:
        assert held(store) == {page_id: n for n, page_id in enumerate(IDS)}


# -- many readers beside a writer --------------------------------------------------------------------------------------


def reader(folder: Path, stop: mmap.mmap) -> None:
    """Read until told to stop; whatever is not as it was written is an error."""
    with EmbeddedStore(folder, read_only=True, **NUMPY) as store:
        turns, seen = 0, set()
        while not stop[0]:
            query = content(5)
            matches = store.search([query], len(IDS) * 2, exact=bool(turns % 2))[0]
            for match in matches:
                rows = content(match.record.page.metadata["seed"]).astype(np.float64)
                wanted = (query @ rows.T).max(axis=1).sum()
                assert abs(match.score - wanted) < 1e-4, (match.record.page.id, match.score, wanted)
            batch = {m.record.page.metadata["turn"] for m in matches if "turn" in m.record.page.metadata}
            assert len(batch) <= 1, batch  # a batch is replaced as a whole
            seen |= batch
            for back in store.get([f"batch {n}" for n in range(10)], vectors=True):
                assert np.asarray(back.multi_vector).tobytes() == content(back.page.metadata["seed"]).tobytes()
            turns += 1
            stop[1 + turns % 50] = 1
            time.sleep(0.005)
        assert turns > 3 and len(seen) > 2, (turns, seen)


def crowd(folder: Path, seconds: float) -> None:
    """Fork eight readers, and replace a batch as a whole again and again, delete, and compact meanwhile."""
    small_files()
    stop = mmap.mmap(-1, 100)
    with EmbeddedStore(folder, info=INFO, **NUMPY) as store:
        store.add([record(page_id, n) for n, page_id in enumerate(IDS)])
    readers = []
    for _ in range(8):
        readers.append(os.fork())
        if readers[-1] == 0:
            try:
                reader(folder, stop)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    turns, names = 0, set()
    until = time.monotonic() + seconds
    with EmbeddedStore(folder, **NUMPY) as store:
        while time.monotonic() < until:
            batch = []
            for n in range(10):
                made = record(f"batch {n}", turns * 10 + n)
                page = made.page.replace(metadata={"seed": turns * 10 + n, "turn": turns})
                batch.append(dataclasses.replace(made, page=page))
            store.add(batch)
            store.delete([IDS[turns % len(IDS)]])
            if turns % 5 == 4:
                store.compact()
            names |= {path.name for path in folder.glob("tokens-*")}
            turns += 1
            time.sleep(0.01)
    stop[0] = 1
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in readers]
    assert ends == [0] * 8, ends
    sys.stdout.write(json.dumps({"turns": turns, "files": len(names)}))


def test_eight_readers_beside_a_writer(tmp_path: Path) -> None:
    seconds = float(os.environ.get("COLQWEN3_READERS_SECONDS", "10"))
    seen = json.loads(run_script("crowd", tmp_path / "index", seconds))
    assert seen["turns"] > 10 and seen["files"] > 3, seen


def run_script(*arguments: object) -> str:
    told = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=280,
    )
    assert told.returncode == 0, told.stderr[-3000:]
    return told.stdout


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        killer(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        crowd(Path(sys.argv[2]), float(sys.argv[3]))
