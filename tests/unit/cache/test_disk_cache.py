"""Page embeddings on disk: given back bit by bit, bounded, shared by processes, and never a reason to stop."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from colqwen3_retrievers import EncoderInfo, MultiVector, Page
from colqwen3_retrievers.cache import disk_cache, page_cache
from colqwen3_retrievers.cache.disk_cache import DiskCache
from colqwen3_retrievers.cache.page_cache import PageEmbeddingCache
from colqwen3_retrievers.errors import ConfigError, EncodeError, StoreError
from tests.hashing import INFO, HashingEncoder, picture

ROOT = Path(__file__).parents[3]


@pytest.fixture
def encoder() -> Iterator[HashingEncoder]:
    made = HashingEncoder()
    yield made
    made.threads.shutdown()


def some(seed: int, rows: int = 4, dim: int = 8, **fields: Any) -> MultiVector:
    made = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return MultiVector(made / np.linalg.norm(made, axis=1, keepdims=True), **fields)


SIZE = some(0).vectors.nbytes


def same(one: MultiVector | None, other: MultiVector) -> bool:
    return (
        one is not None
        and np.array_equal(one.vectors, other.vectors)
        and (one.content, one.visual, one.tokens, one.grid) == (other.content, other.visual, other.tokens, other.grid)
        and (one.clusters is None) == (other.clusters is None)
        and (one.clusters is None or np.array_equal(one.clusters, other.clusters))
    )


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made",
    [
        some(1),
        some(2, content=slice(1, 3), visual=slice(0, 4), grid=(2, 2)),
        some(3, tokens=("a", "\u00e9", "", "d")),
        some(4, tokens=None, clusters=np.array([0, 1, 2, 3, 3, 0], dtype=np.int32), visual=slice(0, 6), grid=(2, 3)),
        some(5, content=slice(0, None, 2)),
    ],
    ids=["plain", "visual", "tokens", "pooled", "step"],
)
def test_what_comes_out_is_what_went_in(tmp_path: Path, made: MultiVector) -> None:
    with closing(DiskCache(tmp_path, 2**20)) as cache:
        cache.put("a", made)
        assert same(cache.get("a"), made)
    with closing(DiskCache(tmp_path, 2**20)) as again:
        assert same(again.get("a"), made)
        assert again.get("b") is None
        assert not again.get("a").vectors.flags.writeable


def test_the_least_recently_used_go_beyond_the_bound(tmp_path: Path) -> None:
    with closing(DiskCache(tmp_path, 3 * SIZE)) as cache:
        for name in "abc":
            cache.put(name, some(ord(name)))
        assert cache.get("a") is not None
        cache.put("d", some(4))
        assert [name for name in "abcd" if cache.get(name) is not None] == ["a", "c", "d"]
        assert (len(cache), cache.nbytes) == (3, 3 * SIZE)
        cache.put("large", some(5, rows=13))
        assert cache.get("large") is None
        assert len(cache) == 3
    with closing(DiskCache(tmp_path, SIZE)) as smaller:
        assert [name for name in "acd" if smaller.get(name) is not None] == ["d"]


def test_the_file_stays_near_the_bound(tmp_path: Path) -> None:
    with closing(DiskCache(tmp_path, 2**20)) as cache:
        for seed in range(60):
            cache.put(str(seed), some(seed, rows=200, dim=128))  # 6 MB in all
        assert cache.nbytes <= 2**20
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 20 * 2**20  # the log of changes has its own 16
        cache.clear()
        assert (len(cache), cache.nbytes) == (0, 0)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2**18


def test_a_damaged_entry_is_forgotten_and_the_others_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(DiskCache(tmp_path, 2**20)) as cache:
        cache.put("a", some(1))
        cache.put("b", some(2))
        with closing(sqlite3.connect(cache.file, isolation_level=None)) as other:
            (vectors,) = other.execute("SELECT vectors FROM contents WHERE number = 1").fetchone()
            flipped = bytes([vectors[0] ^ 1]) + vectors[1:]
            other.execute("UPDATE contents SET vectors = ? WHERE number = 1", (flipped,))
        assert cache.get("a") is None
        assert "damaged" in caplog.text
        assert same(cache.get("b"), some(2))
        cache.put("a", some(1))
        assert same(cache.get("a"), some(1))


@pytest.mark.parametrize("what", ["damaged", "another program's", "later", "a file in the way", "a folder in the way"])
def test_a_place_that_cannot_be_used_is_named(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "cache"
    if what == "a file in the way":
        folder.write_text("x")
    elif what == "a folder in the way":
        (folder / "embeddings.sqlite").mkdir(parents=True)
    elif what == "damaged":
        folder.mkdir()
        (folder / "embeddings.sqlite").write_bytes(b"no database at all, but long enough to be one" * 99)
    else:
        DiskCache(folder, 100).close()
        with closing(sqlite3.connect(folder / "embeddings.sqlite", isolation_level=None)) as other:
            pragma = "application_id = 1" if what == "another program's" else "user_version = 99"
            other.execute(f"PRAGMA {pragma}")
    with pytest.raises(StoreError, match="cache" if "way" in what else r"embeddings\.sqlite"):
        DiskCache(folder, 100)


def test_another_programs_database_is_left_as_it_is(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "embeddings.sqlite", isolation_level=None)) as other:
        other.execute("CREATE TABLE theirs (x)")
    before = (tmp_path / "embeddings.sqlite").read_bytes()
    with pytest.raises(StoreError, match="another program"):
        DiskCache(tmp_path, 100)
    assert (tmp_path / "embeddings.sqlite").read_bytes() == before


def test_a_fault_while_in_use_is_logged_and_work_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, encoder: HashingEncoder
) -> None:
    cache = PageEmbeddingCache(encoder, folder=tmp_path)
    page = Page(id="a", text="revenue rose")
    first = cache.get_or_encode([page])[0]
    cache.flush()
    with closing(sqlite3.connect(tmp_path / "embeddings.sqlite", isolation_level=None)) as other:
        other.execute("DROP TABLE contents")  # as good as any fault of a disk
    assert same(cache.get_or_encode([page])[0], first)
    assert same(cache.get_or_encode([Page(id="b", text="costs fell")])[0], encoder.multi_vector("costs fell", None))
    cache.close()
    assert "could not be read" in caplog.text
    assert "could not be written" in caplog.text


def _put_some(folder: Path, first: int) -> None:
    cache = DiskCache(folder, 40 * SIZE)
    for seed in range(first, first + 30):
        cache.put(str(seed), some(seed))
        for known in range(0, 80, 7):
            found = cache.get(str(known))
            if found is not None and not same(found, some(known)):
                os._exit(3)
    os._exit(0 if cache.nbytes <= 40 * SIZE else 4)


def test_a_new_file_that_another_one_is_making_is_waited_for(tmp_path: Path) -> None:
    """SQLite gives up at once where a journal's mode has to be changed and another connection holds a lock."""
    with closing(
        sqlite3.connect(tmp_path / "embeddings.sqlite", isolation_level=None, check_same_thread=False)
    ) as other:
        other.execute("BEGIN IMMEDIATE")
        release = threading.Timer(0.3, other.execute, ["ROLLBACK"])
        release.start()
        with closing(DiskCache(tmp_path, 10 * SIZE)) as cache:
            cache.put("a", some(1))
            assert same(cache.get("a"), some(1))
        release.join()


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_put_some, args=(tmp_path, first)) for first in (0, 15, 30, 45)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    with closing(DiskCache(tmp_path, 40 * SIZE)) as cache:
        assert len(cache) == 40
        assert all(same(found, some(n)) for n in range(75) if (found := cache.get(str(n))) is not None)


WRITING = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.unit.cache.test_disk_cache import DiskCache, some
cache = DiskCache(Path({folder!r}), 2**28)
for seed in range(10**6):
    cache.put(str(seed), some(seed, rows=2000, dim=128))
    print(seed, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_process_leaves_whole_entries(tmp_path: Path) -> None:
    for more in (3, 2):
        code = WRITING.format(root=str(ROOT), folder=str(tmp_path))
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                if int(line) >= more:
                    process.kill()
                    break
            process.wait()
        assert process.returncode == -signal.SIGKILL
        with closing(DiskCache(tmp_path, 2**28)) as cache:
            assert len(cache) > more
            for seed in range(len(cache)):
                assert same(cache.get(str(seed)), some(seed, rows=2000, dim=128))


def test_what_can_be_read_is_given_where_nothing_can_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(DiskCache(tmp_path, 2**20)) as cache:
        cache.put("a", some(1))
        cache.put("b", some(2))
        cache._connections[0].execute("PRAGMA query_only = ON")  # as on a full disk: reading goes on, writing does not
        assert same(cache.get("a"), some(1))
        assert "could not be marked as used" in caplog.text


def test_a_file_that_another_process_holds_locked_can_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(DiskCache(tmp_path, 2**20)) as cache, closing(sqlite3.connect(cache.file)) as other:
        cache.put("a", some(1))
        cache._connections[0].execute("PRAGMA busy_timeout = 50")  # not half a minute
        other.execute("BEGIN IMMEDIATE")
        cache.put("b", some(2))
        cache.put_name("x", "y")
        assert same(cache.get("a"), some(1))
        assert cache.content_of("x") is None
        other.rollback()
        cache.put("b", some(2))
        assert same(cache.get("b"), some(2))
    assert caplog.text.count("could not be written") == 2


def test_a_creation_that_failed_does_not_stand_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "_SCHEMA", "CREATE TABLE entries (x); CREATE NOTHING")
    with pytest.raises(StoreError, match="cannot be used"):
        DiskCache(tmp_path, 2**20)
    monkeypatch.undo()
    with closing(DiskCache(tmp_path, 2**20)) as cache:
        cache.put("a", some(1))
        assert same(cache.get("a"), some(1))


def test_a_file_that_cannot_be_opened_again_is_tried_at_each_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(DiskCache(tmp_path, 2**20)) as cache:
        cache.put("a", some(1))
        cache._close_before_fork()
        monkeypatch.setattr(cache, "file", tmp_path / "gone" / "embeddings.sqlite")
        for _ in range(2):  # the second time too
            with pytest.raises(StoreError, match="cannot be opened"):
                cache.get("a")
        monkeypatch.undo()
        assert same(cache.get("a"), some(1))


# -- the cache over it -------------------------------------------------------------------------------------------------


def test_another_run_encodes_nothing(tmp_path: Path, encoder: HashingEncoder) -> None:
    picture(1).save(tmp_path / "a.png")
    pages = [Page(id="a", image=tmp_path / "a.png"), Page(id="b", image=picture(2)), Page(id="c", text="revenue")]
    with PageEmbeddingCache(encoder, folder=tmp_path / "cache") as cache:
        first = cache.get_or_encode(pages)
        assert len(encoder.encoded) == 3
        assert cache.nbytes == sum(made.vectors.nbytes for made in first)
        assert len(cache) == 3
    with PageEmbeddingCache(encoder, folder=tmp_path / "cache") as again:
        assert all(same(made, known) for made, known in zip(again.get_or_encode(pages), first, strict=True))
    assert len(encoder.encoded) == 3


def test_a_picture_is_known_by_what_it_shows(tmp_path: Path, encoder: HashingEncoder) -> None:
    shown = picture(3)
    for name in ("a.png", "b.bmp", "c.tif"):
        shown.save(tmp_path / name)
    with PageEmbeddingCache(encoder, folder=tmp_path / "cache") as cache:
        cache.get_or_encode([Page(id="rendered", image=shown, text="its text layer")])
        for name in ("a.png", "b.bmp", "c.tif", "a.png"):
            cache.get_or_encode([Page(id=name, image=tmp_path / name)])
        cache.get_or_encode([Page(id="bytes", image=(tmp_path / "a.png").read_bytes())])
        assert encoder.encoded == ["rendered"]
        picture(4).save(tmp_path / "a.png")
        cache.get_or_encode([Page(id="changed", image=tmp_path / "a.png")])
        assert encoder.encoded == ["rendered", "changed"]


def test_a_digest_that_a_caller_gave_does_not_mix_pages(tmp_path: Path, encoder: HashingEncoder) -> None:
    pages = [Page(id=str(n), image=picture(n), sha256="of the whole file") for n in (1, 2)]
    pages += [Page(id=f"text {n}", text=f"words {n}", sha256="of the whole file") for n in (1, 2)]
    with PageEmbeddingCache(encoder, folder=tmp_path) as cache:
        cache.get_or_encode(pages)
    assert len(encoder.encoded) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "cd34"}, {"revision": "v2"}, {"dim": 16}, {"pool_factor": 3}, {"pool_method": "sequential"},
        {"max_visual_tokens": 640}, {"include_text": True}, {"rendering_version": 2}, {"family": "ops"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_shaped_an_embedding_keeps_it_apart(tmp_path: Path, change: dict[str, Any]) -> None:
    page = Page(id="a", image=picture(1), text="revenue")
    made = []
    for info in (INFO, dataclasses.replace(INFO, **change), dataclasses.replace(INFO, model="/moved", verified=False)):
        encoder = HashingEncoder(info)
        with PageEmbeddingCache(encoder, folder=tmp_path) as cache:
            cache.get_or_encode([page])
        made.append(len(encoder.encoded))
        encoder.threads.shutdown()
    assert made == [1, 1, 0]


@pytest.mark.parametrize(("include_text", "encodings"), [(False, 1), (True, 2)])
def test_text_beside_a_picture_counts_only_where_it_is_encoded(
    tmp_path: Path, include_text: bool, encodings: int
) -> None:
    encoder = HashingEncoder(dataclasses.replace(INFO, include_text=include_text))
    with PageEmbeddingCache(encoder, folder=tmp_path) as cache:
        cache.get_or_encode([Page(id="a", image=picture(1), text="x")])
        cache.get_or_encode([Page(id="a", image=picture(1), text="y")])
    assert len(encoder.encoded) == encodings
    encoder.threads.shutdown()


def test_a_page_is_found_before_it_is_written(tmp_path: Path, encoder: HashingEncoder) -> None:
    cache = PageEmbeddingCache(encoder, folder=tmp_path)
    go = threading.Event()
    cache._writer.submit(go.wait, 10)  # type: ignore[union-attr]
    page = Page(id="a", text="revenue")
    cache.get_or_encode([page])
    cache.get_or_encode([page])
    assert len(encoder.encoded) == 1
    go.set()
    cache.close()
    with closing(DiskCache(tmp_path, 2**20)) as disk:
        assert len(disk) == 1


def test_a_slow_disk_does_not_fill_the_memory(
    tmp_path: Path, encoder: HashingEncoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    size = encoder.multi_vector("revenue", None).vectors.nbytes
    monkeypatch.setattr(page_cache, "_MOST_UNWRITTEN", 3 * size)
    go = threading.Event()
    with PageEmbeddingCache(encoder, folder=tmp_path) as cache:
        cache._writer.submit(go.wait, 10)  # type: ignore[union-attr]
        cache.get_or_encode([Page(id=str(n), text=f"word{n}") for n in range(9)])
        assert len(cache._kept) == 3
        go.set()
        cache.flush()
        assert (len(cache), len(cache._kept)) == (3, 0)
        assert "slow" in caplog.text
        cache.get_or_encode([Page(id="a", text="later")])
        assert len(cache) == 4


def test_many_threads_encode_each_content_once(tmp_path: Path, encoder: HashingEncoder) -> None:
    barrier = threading.Barrier(6)
    failed: list[Exception] = []

    def ask() -> None:
        barrier.wait(10)
        try:
            made = cache.get_or_encode([Page(id=word, text=word) for word in "abcde"])
            assert all(same(one, encoder.multi_vector(w, None)) for one, w in zip(made, "abcde", strict=True))
        except Exception as exc:
            failed.append(exc)

    with PageEmbeddingCache(encoder, folder=tmp_path) as cache:
        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    assert sorted(encoder.encoded) == list("abcde")


def test_a_page_that_cannot_be_read_is_named_and_nothing_kept(tmp_path: Path, encoder: HashingEncoder) -> None:
    (tmp_path / "torn.png").write_bytes(b"torn")
    pages = [Page(id="good", text="good"), Page(id="torn", image=tmp_path / "torn.png")]
    with PageEmbeddingCache(encoder, folder=tmp_path / "cache") as cache:
        with pytest.raises(EncodeError, match="torn: not an image") as caught:
            cache.get_or_encode(pages)
        assert caught.value.index == 1
        assert len(cache) <= 1


def test_bad_arguments(tmp_path: Path, encoder: HashingEncoder) -> None:
    for wrong in (7, "", b"x"):
        with pytest.raises(ConfigError, match="folder"):
            PageEmbeddingCache(encoder, folder=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_bytes"):
        PageEmbeddingCache(encoder, max_bytes=-1, folder=tmp_path)


def test_it_says_where_it_is(tmp_path: Path, encoder: HashingEncoder) -> None:
    with PageEmbeddingCache(encoder, 2**20, folder=tmp_path) as cache:
        assert str(tmp_path) in repr(cache)
        assert "1,048,576" in repr(cache)


def _ask_in_child(cache: PageEmbeddingCache, answers: Any) -> None:
    try:
        cache.encoder = HashingEncoder()
        made = cache.get_or_encode([Page(id="a", text="known"), Page(id="b", text="of the child")])
        cache.flush()
        answers.put((len(cache.encoder.encoded), len(made)))
    except BaseException as exc:
        answers.put(repr(exc))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_opens_the_file_anew(tmp_path: Path, encoder: HashingEncoder) -> None:
    with PageEmbeddingCache(encoder, folder=tmp_path) as cache:
        cache.get_or_encode([Page(id="a", text="known")])
        cache.flush()
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        child = context.Process(target=_ask_in_child, args=(cache, answers))
        child.start()
        assert answers.get(timeout=30) == (1, 2)
        child.join(10)
        assert len(cache) == 2
        cache.get_or_encode([Page(id="b", text="of the child")])
        assert len(encoder.encoded) == 1


def test_infos_of_older_indexes_read_as_hierarchical() -> None:
    stored = {key: value for key, value in INFO.to_dict().items() if key != "pool_method"}
    assert EncoderInfo.from_dict(stored) == INFO
    assert INFO.pool_method == "hierarchical"
