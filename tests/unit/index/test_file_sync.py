"""Syncing: only what changed is read and encoded, only what is gone for sure is forgotten, whatever files may do."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from colqwen3_retrievers import MultiVector, Page, PageIndex, load_pages
from colqwen3_retrievers.cache.page_cache import PageEmbeddingCache
from colqwen3_retrievers.errors import (
    ConfigError,
    EncodeError,
    EngineError,
    InputTooLongError,
    PageError,
    StoreError,
    StoreMismatchError,
)
from colqwen3_retrievers.index.file_ledger import FileLedger, file_stamp, hash_file
from colqwen3_retrievers.index.file_sync import Synced
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore
from tests.hashing import INFO, HashingEncoder, picture, qdrant_index

ROOT = Path(__file__).parents[3]


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """Two pictures, one in a folder of its own, and a TIFF of three pages."""
    folder = tmp_path / "reports"
    draw(folder / "a.png", 1)
    draw(folder / "2024" / "b.png", 2)
    stack(folder / "c.tif", 3, 4, 5)
    return folder


@pytest.fixture
def synced(index: PageIndex, reports: Path, encoder: HashingEncoder) -> PageIndex:
    """The index after a sync of the reports, which the encoder has forgotten."""
    assert index.sync(reports) == Synced(added=5)
    encoder.encoded.clear()
    return index


ALL = ["2024/b.png#page=1", "a.png#page=1", "c.tif#page=1", "c.tif#page=2", "c.tif#page=3"]


def draw(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, compress_level=0) if path.suffix == ".png" else picture(seed).save(path)
    return path


def stack(path: Path, *seeds: int) -> Path:
    first, *others = (picture(seed) for seed in seeds)
    first.save(path, save_all=True, append_images=others)
    return path


_opened: list[str] = []
_watching = threading.Event()


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watching.is_set() and isinstance(arguments[0], str | bytes | os.PathLike):
        _opened.append(Path(os.fsdecode(arguments[0])).name)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Names of the page files that Python opens from now on, told by the interpreter itself."""
    if not getattr(sys, "_watched_by_sync_tests", False):
        sys.addaudithook(_watch)  # it cannot be taken away again
        sys._watched_by_sync_tests = True
    _opened.clear()
    _watching.set()
    yield _opened
    _watching.clear()


def pages_among(opened: list[str]) -> list[str]:
    names = sorted({name for name in opened if Path(name).suffix in (".png", ".tif", ".bmp")})
    opened.clear()
    return names


# -- what changed ------------------------------------------------------------------------------------------------------


def test_a_file_that_did_not_change_is_not_even_opened(
    index: PageIndex, reports: Path, encoder: HashingEncoder, opened: list[str]
) -> None:
    assert index.sync([reports]) == Synced(added=5)
    assert index.ids() == ALL
    assert pages_among(opened) != []
    encoder.encoded.clear()
    assert index.sync(reports) == Synced(unchanged=5)
    assert pages_among(opened) == []
    assert encoder.encoded == []
    assert index.search(Path(reports / "2024" / "b.png"), k=1)[0].page.id == "2024/b.png#page=1"


def test_only_what_changed_is_encoded(synced: PageIndex, reports: Path, encoder: HashingEncoder) -> None:
    draw(reports / "a.png", 11)
    draw(reports / "new.png", 12)
    stack(reports / "c.tif", 3, 14, 5)
    assert synced.sync(reports) == Synced(added=1, updated=2, unchanged=3)
    assert encoder.encoded == ["a.png#page=1", "c.tif#page=2", "new.png#page=1"]
    assert synced.search(picture(14), k=1)[0].page.id == "c.tif#page=2"


def test_times_that_lie_are_seen_through(synced: PageIndex, reports: Path) -> None:
    before = (reports / "a.png").stat()
    data = bytearray((reports / "a.png").read_bytes())
    draw(reports / "a.png", 11)
    os.utime(reports / "a.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    after = (reports / "a.png").stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert data != (reports / "a.png").read_bytes()
    assert synced.sync(reports) == Synced(updated=1, unchanged=4)
    draw(reports / "other.png", 13)  # another file put in its place, of the same size and time
    os.utime(reports / "other.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    (reports / "other.png").replace(reports / "a.png")
    assert synced.sync(reports) == Synced(updated=1, unchanged=4)


def test_a_change_within_the_same_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for n in range(10):
        path.write_bytes(b"before %d" % n)
        digest, stamp = hash_file(path, source="a.png")
        assert time.time_ns() - path.stat().st_ctime_ns >= 20_000_000, "the clock of times may not have ticked"
        with path.open("r+b") as file:  # at once: the same inode, the same size, perhaps the same tick
            file.write(b"after. %d" % n)
        assert stamp is not None
        assert file_stamp(path.stat()) != stamp
        assert hash_file(path, source="a.png")[0] != digest


@pytest.mark.parametrize("how", ["no change time", "ahead of the clock", "whole seconds"])
def test_times_that_prove_nothing_are_not_trusted(
    index: PageIndex, reports: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str], how: str
) -> None:
    if how == "no change time":
        monkeypatch.setattr("colqwen3_retrievers.index.file_ledger._KEEPS_CHANGE_TIME", False)
    else:
        now = time.time_ns() - 3_600_000_000_000 if how == "ahead of the clock" else 0
        clock = (lambda: now) if now else time.time_ns
        monkeypatch.setattr("colqwen3_retrievers.index.file_ledger.time.time_ns", clock)
    if how == "whole seconds":
        # every time is a whole number of these
        monkeypatch.setattr("colqwen3_retrievers.index.file_ledger._COARSE_UNIT", 1)
    assert index.sync(reports) == Synced(added=5)
    pages_among(opened)
    assert index.sync(reports) == Synced(unchanged=5)
    assert pages_among(opened) == ["a.png", "b.png", "c.tif"]


def test_a_touched_file_is_hashed_once_and_not_encoded(
    synced: PageIndex, reports: Path, encoder: HashingEncoder, opened: list[str]
) -> None:
    os.utime(reports / "c.tif", (1, 1))
    pages_among(opened)
    assert synced.sync(reports) == Synced(unchanged=5)
    assert pages_among(opened) == ["c.tif"]
    assert synced.sync(reports) == Synced(unchanged=5)
    assert pages_among(opened) == []
    assert encoder.encoded == []


def test_verify_opens_every_file(synced: PageIndex, reports: Path, opened: list[str]) -> None:
    assert synced.sync(reports, verify=True) == Synced(unchanged=5)
    assert pages_among(opened) == ["a.png", "b.png", "c.tif"]


def test_a_renamed_file_is_not_encoded_again(synced: PageIndex, reports: Path, encoder: HashingEncoder) -> None:
    (reports / "c.tif").rename(reports / "2024" / "d.tif")
    assert synced.sync(reports) == Synced(added=3, unchanged=2, removed=3)
    assert encoder.encoded == []
    assert synced.search(picture(4), k=1)[0].page.id == "2024/d.tif#page=2"
    assert synced.get(["2024/d.tif#page=2"])[0].page.image.tobytes() == picture(4).tobytes()


def test_a_shorter_file_loses_its_last_pages(synced: PageIndex, reports: Path, encoder: HashingEncoder) -> None:
    synced.add(Page(id="c.tif#table=1", source="c.tif", number=9, text="made by a caller"))
    encoder.encoded.clear()
    stack(reports / "c.tif", 3, 4)
    assert synced.sync(reports) == Synced(updated=2, unchanged=2, removed=1)  # their metadata tells the page count
    assert encoder.encoded == []
    assert "c.tif#page=3" not in synced
    assert "c.tif#table=1" in synced


def test_another_bound_of_pixels_reads_anew(synced: PageIndex, reports: Path, opened: list[str]) -> None:
    made = synced.sync(reports, max_pixels=200)  # for a TIFF's pages; other pictures go to the encoder as they are
    assert made == Synced(updated=3, unchanged=2)
    assert pages_among(opened) == ["a.png", "b.png", "c.tif"]


def test_a_file_that_changes_while_it_is_encoded_is_read_again(
    index: PageIndex, reports: Path, encoder: HashingEncoder
) -> None:
    plain = encoder.encode_pages

    def encode_pages(pages: Any) -> Any:
        made = plain(pages)
        draw(reports.parent / "new.png", 99).replace(reports / "a.png")  # at once: its image may be read right now
        encoder.encode_pages = plain  # type: ignore[method-assign]
        return made

    encoder.encode_pages = encode_pages  # type: ignore[method-assign]
    assert index.sync(reports).added == 5
    assert index.sync(reports) == Synced(updated=1, unchanged=4)
    assert index.search(picture(99), k=1)[0].page.id == "a.png#page=1"


@pytest.mark.parametrize("trusted", [True, False])
def test_a_file_that_changes_while_it_is_read_and_back_again(
    index: PageIndex, reports: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    monkeypatch.setattr("colqwen3_retrievers.index.file_ledger._KEEPS_CHANGE_TIME", trusted)

    def other_pages(path: Path, **options: Any) -> list[Page]:
        before = path.read_bytes()
        if path.suffix == ".tif":
            stack(path, 70, 71, 72)
        pages = list(load_pages(path, **options))
        if trusted:  # without change times nobody could tell
            path.write_bytes(before)
        return pages

    monkeypatch.setattr("colqwen3_retrievers.index.file_sync.load_pages", other_pages)
    assert index.sync(reports).added == 5
    monkeypatch.undo()
    monkeypatch.setattr("colqwen3_retrievers.index.file_ledger._KEEPS_CHANGE_TIME", trusted)
    assert index.search(picture(71), k=1)[0].page.id == "c.tif#page=2"
    if not trusted:
        stack(reports / "c.tif", 3, 4, 5)
    assert index.sync(reports) == Synced(updated=3, unchanged=2)
    assert index.search(picture(4), k=1)[0].page.id == "c.tif#page=2"


def test_pages_of_many_files_are_encoded_together(tmp_path: Path, index: PageIndex, encoder: HashingEncoder) -> None:
    sizes: list[int] = []
    encoder.before = lambda pages: sizes.append(len(pages))
    for seed in range(20):
        draw(tmp_path / "scans" / f"{seed:02}.png", seed)
    assert index.sync(tmp_path / "scans", batch_size=8) == Synced(added=20)
    assert sizes == [8, 8, 4]


# -- what is gone ------------------------------------------------------------------------------------------------------


def test_what_is_gone_is_forgotten_under_these_paths_only(index: PageIndex, reports: Path, tmp_path: Path) -> None:
    draw(tmp_path / "scans" / "s.png", 7)
    draw(tmp_path / "scans" / "t.png", 8)
    index.sync([reports, tmp_path / "scans"])
    index.add(Page(source="by-hand.pdf", text="no file at all"))
    (reports / "2024" / "b.png").unlink()
    (tmp_path / "scans" / "s.png").unlink()
    assert index.sync(reports) == Synced(unchanged=4, removed=1)
    assert index.ids() == ["a.png#page=1", "by-hand.pdf#page=1", *ALL[2:], "s.png#page=1", "t.png#page=1"]
    assert index.sync(tmp_path / "scans") == Synced(unchanged=1, removed=1)
    assert {"by-hand.pdf#page=1", "a.png#page=1"} <= set(index.ids())


def test_the_images_of_what_is_gone_go_too(synced: PageIndex, reports: Path) -> None:
    images = Path(synced.location) / "images"
    assert len(list(images.rglob("*.png"))) == 5
    (reports / "c.tif").unlink()
    synced.sync(reports)
    assert len(list(images.rglob("*.png"))) == 2


def test_pages_added_before_are_taken_over_and_not_encoded(
    index: PageIndex, reports: Path, encoder: HashingEncoder
) -> None:
    index.add(load_pages(reports))
    encoder.encoded.clear()
    (reports / "2024" / "b.png").unlink()  # gone before any sync saw it: nobody knows that it was here
    assert index.sync(reports) == Synced(unchanged=4)
    assert encoder.encoded == []
    (reports / "a.png").unlink()
    assert index.sync(reports) == Synced(unchanged=3, removed=1)


def test_a_file_that_became_a_folder_is_gone(synced: PageIndex, reports: Path) -> None:
    (reports / "a.png").unlink()
    draw(reports / "a.png" / "inside.png", 60)
    assert synced.sync(reports) == Synced(added=1, unchanged=4, removed=1)
    assert "a.png/inside.png#page=1" in synced


@pytest.mark.parametrize("allow_empty", [False, True])
@pytest.mark.parametrize("how", ["missing", "empty", "no page file", "a link to nothing"])
def test_a_root_that_lost_everything_is_refused(
    index: PageIndex, reports: Path, how: str, allow_empty: bool, tmp_path: Path
) -> None:
    draw(tmp_path / "scans" / "s.png", 7)
    index.sync([reports, tmp_path / "scans"])
    draw(tmp_path / "scans" / "t.png", 8)
    shutil.rmtree(reports)
    if how == "a link to nothing":
        reports.symlink_to(tmp_path / "nothing")
    elif how != "missing":
        reports.mkdir()
    if how == "no page file":
        (reports / ".keep").write_text("")
    if allow_empty:
        assert index.sync([reports, tmp_path / "scans"], allow_empty=True) == Synced(added=1, unchanged=1, removed=5)
        return
    with pytest.raises(PageError, match=r"reports: .*allow_empty=True forgets the 5 pages"):
        index.sync([tmp_path / "scans", reports])
    assert len(index) == 6  # nothing was changed, not even where all is well


def test_an_empty_folder_that_never_held_anything_is_no_error(index: PageIndex, tmp_path: Path) -> None:
    (tmp_path / "inbox").mkdir()
    assert index.sync(tmp_path / "inbox") == Synced()
    with pytest.raises(PageError, match=r"outbox: no such file or folder$"):
        index.sync(tmp_path / "outbox")
    assert index.sync([]) == Synced()


def other_disk(index: PageIndex) -> None:
    """Make the ledger believe that the files lay on another file system."""
    with closing(sqlite3.connect(Path(index.location) / "files.sqlite", isolation_level=None)) as ledger:
        ledger.execute("UPDATE files SET device = device + 1")


def test_an_empty_subfolder_counts_as_gone_unless_it_was_a_disk(synced: PageIndex, reports: Path) -> None:
    (reports / "2024" / "b.png").unlink()
    assert synced.sync(reports) == Synced(unchanged=4, removed=1)
    draw(reports / "2024" / "b.png", 2)
    synced.sync(reports)
    other_disk(synced)
    (reports / "2024" / "b.png").unlink()
    made = synced.sync(reports)
    assert (made.unchanged, made.removed) == (4, 0)
    assert [(item.source, item.page) for item in made.failed] == [("2024/b.png", None)]
    assert "disk" in made.failed[0].reason
    assert "2024/b.png#page=1" in synced
    assert synced.sync(reports, allow_empty=True) == Synced(unchanged=4, removed=1)


def test_another_disk_in_a_roots_place_is_refused(synced: PageIndex, reports: Path) -> None:
    other_disk(synced)
    shutil.rmtree(reports)
    draw(reports / "holiday.png", 50)
    with pytest.raises(PageError, match="another disk"):
        synced.sync(reports)
    assert len(synced) == 5
    assert synced.sync(reports, allow_empty=True) == Synced(added=1, removed=5)


def test_one_file_as_a_root(index: PageIndex, reports: Path) -> None:
    assert index.sync([reports / "a.png", reports / "c.tif"]) == Synced(added=4)
    (reports / "a.png").unlink()
    with pytest.raises(PageError, match="no such file"):
        index.sync([reports / "a.png"])
    assert index.sync([reports / "c.tif"]) == Synced(unchanged=3)  # not under this path
    assert index.sync([reports / "a.png"], allow_empty=True) == Synced(removed=1)


# -- what cannot be read -----------------------------------------------------------------------------------------------


def test_an_unreadable_file_is_not_gone(synced: PageIndex, reports: Path) -> None:
    (reports / "a.png").write_bytes(b"torn")
    (reports / "c.tif").write_bytes(b"")
    for _ in range(2):  # reported as long as it is so
        made = synced.sync(reports)
        assert (made.added, made.updated, made.unchanged, made.removed) == (0, 0, 1, 0)
        assert [(item.source, item.page) for item in made.failed] == [("a.png", None), ("c.tif", None)]
        assert "empty" in made.failed[1].reason
        assert synced.ids() == ALL
    assert synced.search(picture(1), k=1)[0].page.id == "a.png#page=1"
    draw(reports / "a.png", 1)
    stack(reports / "c.tif", 3, 4, 5)
    assert synced.sync(reports) == Synced(unchanged=5)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_does_not_block(index: PageIndex, reports: Path) -> None:
    os.mkfifo(reports / "pipe.png")
    made = index.sync(reports)
    assert made.added == 5
    assert [str(item) for item in made.failed] == ["pipe.png: not a regular file"]


def test_a_folder_that_cannot_be_listed_keeps_its_pages(
    synced: PageIndex, reports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if Path(path).name == "2024":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    (reports / "2024" / "b.png").unlink()  # which nobody can know for sure
    monkeypatch.setattr("colqwen3_retrievers.pages.files.os.scandir", refusing)
    made = synced.sync(reports)
    assert (made.unchanged, made.removed) == (4, 0)
    assert [item.source for item in made.failed] == [str(reports / "2024")]
    assert synced.ids() == ALL


def test_a_page_that_cannot_be_encoded_is_reported_and_the_others_kept(
    index: PageIndex, reports: Path, encoder: HashingEncoder
) -> None:
    def refuse(pages: list[Page]) -> None:
        for place, page in enumerate(pages):
            if page.id == "c.tif#page=2":
                raise EncodeError("too wide", index=place)

    encoder.before = refuse
    made = index.sync(reports)
    assert made.added == 4
    assert [(item.source, item.page, item.reason) for item in made.failed] == [("c.tif", 2, "too wide")]
    assert index.ids() == [page for page in ALL if page != "c.tif#page=2"]
    encoder.before = len
    assert index.sync(reports) == Synced(added=1, unchanged=4)


def test_a_fault_that_is_no_files_ends_the_sync_and_the_next_goes_on(
    index: PageIndex, reports: Path, encoder: HashingEncoder
) -> None:
    def fail_the_second_time(_: list[Page]) -> None:
        if encoder.encoded:
            raise EngineError("out of memory")

    encoder.before = fail_the_second_time
    with pytest.raises(EngineError):
        index.sync(reports, batch_size=2)
    assert len(index) == 2
    encoder.before = len
    encoder.encoded.clear()
    assert index.sync(reports) == Synced(added=3, unchanged=2)
    assert len(encoder.encoded) == 3


def test_pages_kept_by_a_run_that_ended_before_it_noted_them_are_known(
    index: PageIndex, reports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = FileLedger.put

    def full(ledger: FileLedger, entry: Any) -> None:
        if entry.digest is not None:  # what is noted once the pages are kept
            raise StoreError("the disk is full")
        plain(ledger, entry)

    monkeypatch.setattr(FileLedger, "put", full)
    with pytest.raises(StoreError, match="full"):
        index.sync(reports)
    assert index.ids() == ALL
    monkeypatch.undo()
    (reports / "a.png").unlink()
    assert index.sync(reports) == Synced(unchanged=4, removed=1)


# -- names -------------------------------------------------------------------------------------------------------------


def test_two_roots_with_the_same_names_are_refused(index: PageIndex, reports: Path, tmp_path: Path) -> None:
    draw(tmp_path / "other" / "a.png", 9)
    with pytest.raises(ConfigError, match=r"a\.png.*root="):
        index.sync([reports, tmp_path / "other"])
    assert len(index) == 0
    index.sync(reports)
    with pytest.raises(ConfigError, match=r"a\.png, which is in the index, and .*root="):  # in a later call too
        index.sync(tmp_path / "other")
    assert index.search(picture(1), k=1)[0].page.id == "a.png#page=1"
    assert index.sync([reports, tmp_path / "other"], root=tmp_path) == Synced(added=6, removed=5)
    assert "other/a.png#page=1" in index


def test_a_file_reached_by_two_roots_has_the_name_of_the_last(
    synced: PageIndex, reports: Path, encoder: HashingEncoder
) -> None:
    assert synced.sync(reports / "2024") == Synced(added=1, removed=1)
    assert synced.ids() == ["a.png#page=1", "b.png#page=1", *ALL[2:]]
    assert synced.sync(reports) == Synced(added=1, unchanged=4, removed=1)
    assert synced.ids() == ALL and encoder.encoded == []
    (reports / "2024" / "b.png").write_bytes(b"torn")
    made = synced.sync(reports / "2024")
    assert (made.added, made.removed, len(made.failed)) == (0, 0, 1)
    assert synced.ids() == ALL  # what cannot be read keeps its name


def test_many_files_named_one_by_one_are_looked_up_at_once(index: PageIndex, tmp_path: Path) -> None:
    files = [tmp_path / "many" / f"{n:04}.png" for n in range(600)]
    files[0].parent.mkdir()
    picture(1, 8, 8).save(files[0])
    for file in files[1:]:
        file.write_bytes(files[0].read_bytes())
    index.sync(files, batch_size=300)
    calls = [0]

    def count(frame: Any, event: str, _: Any) -> None:
        calls[0] += event == "call"

    sys.setprofile(count)
    try:
        assert index.sync(files) == Synced(unchanged=600)
    finally:
        sys.setprofile(None)
    assert calls[0] < 600 * 600  # a path compared with every other one is many calls each


def test_a_path_that_cannot_be_looked_at_is_named(index: PageIndex) -> None:
    with pytest.raises(PageError, match="cannot be read: File name too long"):
        index.sync("x" * 300)


def test_a_page_that_the_store_cannot_take_is_reported_and_the_others_kept(tmp_path: Path, reports: Path) -> None:
    class Dense(HashingEncoder):
        def multi_vector(self, text: str, image: Any) -> Any:
            made = super().multi_vector(text, image)
            if image is not None and np.array_equal(np.asarray(image), np.asarray(picture(4))):
                return MultiVector(np.tile(made.vectors, (6_000, 1)))
            return made

    encoder = Dense()
    index = qdrant_index(encoder, images_dir=tmp_path / "images")
    made = index.sync(reports)
    assert made.added == 4 and index.ids() == [page for page in ALL if page != "c.tif#page=2"]
    assert [(item.source, item.page) for item in made.failed] == [("c.tif", 2)]
    assert made.failed[0].reason.startswith("36,000 tokens of dim 32 are")
    with pytest.raises(InputTooLongError, match="page 'dense': 36,000") as caught:
        index.add([Page(id="good", image=picture(9)), Page(id="dense", image=picture(4))])
    assert caught.value.index == 1 and "good" not in index
    encoder.threads.shutdown()


def test_a_collection_by_another_spelling_of_its_address_has_the_same_ledger(
    tmp_path: Path, reports: Path, encoder: HashingEncoder
) -> None:
    pytest.importorskip("qdrant_client")
    from tests.contracts.qdrant_server import serving

    with serving() as server:
        with PageIndex.open(server.address(), encoder, images_dir=tmp_path / "images") as index:
            assert index.sync(reports).added == 5
        (reports / "a.png").unlink()
        with PageIndex.open(server.address("?timeout=9"), encoder, images_dir=tmp_path / "images") as index:
            assert index.sync(reports) == Synced(unchanged=4, removed=1)


def test_a_moved_folder_is_followed(synced: PageIndex, reports: Path, tmp_path: Path, encoder: HashingEncoder) -> None:
    moved = reports.rename(tmp_path / "moved")
    draw(moved / "a.png", 21)
    made = synced.sync(moved)
    assert (made.added, made.updated, made.unchanged, made.removed) == (0, 0, 4, 0)
    assert [item.source for item in made.failed] == ["a.png"]  # it may be another one: the old may lie on a lost disk
    assert synced.delete(where={"source": "a.png"}) == 1
    assert synced.sync(moved) == Synced(added=1, unchanged=4)
    assert encoder.encoded == ["a.png#page=1"]
    (moved / "2024" / "b.png").unlink()
    assert synced.sync(moved) == Synced(unchanged=4, removed=1)


def test_a_name_may_pass_from_one_root_to_another_of_the_same_call(
    index: PageIndex, reports: Path, tmp_path: Path
) -> None:
    draw(tmp_path / "other" / "z.png", 30)
    index.sync([reports, tmp_path / "other"])
    (reports / "a.png").unlink()
    draw(tmp_path / "other" / "a.png", 31)
    assert index.sync([reports, tmp_path / "other"]) == Synced(updated=1, unchanged=5)
    assert index.search(picture(31), k=1)[0].page.id == "a.png#page=1"


def test_a_root_by_a_link_is_the_same_root(synced: PageIndex, reports: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(reports, target_is_directory=True)
    assert synced.sync(tmp_path / "link") == Synced(unchanged=5)
    (reports / "a.png").unlink()
    assert synced.sync(reports) == Synced(unchanged=4)  # known by the other path now
    assert synced.sync(tmp_path / "link") == Synced(unchanged=4, removed=1)


@pytest.mark.parametrize("wrong", [3, None, "https://host/a.pdf", "", [b"a"], ("a.pdf", b"a"), io.BytesIO()])
def test_what_is_no_path_is_refused(index: PageIndex, wrong: Any) -> None:
    for method in (index.sync, index.add_files):
        with pytest.raises(ConfigError, match=r"path|URL"):
            method(wrong)


def test_patterns_and_bad_arguments_are_refused(index: PageIndex, reports: Path) -> None:
    with pytest.raises(ConfigError, match="patterns"):
        index.sync(f"{reports}/*.png")
    with pytest.raises(ConfigError, match="max_pixels"):
        index.sync(reports, max_pixels=0)
    with pytest.raises(ConfigError, match="batch_size"):
        index.sync(reports, batch_size=0)
    (reports / "notes.txt").write_text("x")
    with pytest.raises(PageError, match="not a page file"):
        index.sync(reports / "notes.txt")
    with pytest.raises(ConfigError, match="cache"):
        index.sync(reports, cache=7)  # type: ignore[arg-type]


# -- the index and its ledger ------------------------------------------------------------------------------------------


def test_what_the_index_lost_is_brought_back(synced: PageIndex, reports: Path) -> None:
    synced.delete(["c.tif#page=2"])
    synced.add(Page(source="a.png", text="overwritten by hand"))
    assert synced.sync(reports) == Synced(added=1, updated=1, unchanged=3)
    (image,) = (Path(synced.location) / "images").rglob(synced.store.get(["a.png#page=1"])[0].image)
    image.unlink()
    synced.sync(reports)
    assert image.exists()


def test_an_index_inside_the_folder_it_indexes(tmp_path: Path, encoder: HashingEncoder, reports: Path) -> None:
    with PageIndex.open(reports / "index", encoder) as index:
        assert index.sync(reports) == Synced(added=5)
        assert index.sync(reports) == Synced(unchanged=5)


def test_without_its_ledger_nothing_is_encoded_or_forgotten(
    synced: PageIndex, reports: Path, encoder: HashingEncoder
) -> None:
    ledger = Path(synced.location) / "files.sqlite"
    ledger.unlink()
    (reports / "a.png").unlink()
    assert synced.sync(reports) == Synced(unchanged=4)
    assert encoder.encoded == []
    assert synced.ids() == ALL


@pytest.mark.parametrize("what", ["damaged", "another program's", "later"])
def test_a_ledger_that_cannot_be_used_is_named(synced: PageIndex, reports: Path, what: str) -> None:
    ledger = Path(synced.location) / "files.sqlite"
    if what == "damaged":
        ledger.write_bytes(b"not a database, though it is long enough to be one" * 99)
    else:
        with closing(sqlite3.connect(ledger, isolation_level=None)) as connection:
            pragma = "application_id = 1" if what == "another program's" else "user_version = 99"
            connection.execute(f"PRAGMA {pragma}")
    with pytest.raises(StoreError, match=rf"files\.sqlite: .*{what}"):
        synced.sync(reports)
    assert len(synced) == 5


def test_a_moved_index_takes_its_ledger_along(tmp_path: Path, reports: Path, opened: list[str]) -> None:
    with PageIndex.open(tmp_path / "index", HashingEncoder()) as index:
        index.sync(reports)
    (tmp_path / "index").rename(tmp_path / "elsewhere")
    pages_among(opened)
    with PageIndex.open(tmp_path / "elsewhere", HashingEncoder()) as index:
        assert index.sync(reports) == Synced(unchanged=5)
    assert pages_among(opened) == []


class Elsewhere:
    """A store that is no folder: what it is to an index, with the embedded one behind it."""

    def __init__(self, store: EmbeddedStore) -> None:
        self._store = store

    location = "far://away/pages"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __len__(self) -> int:
        return len(self._store)

    def __contains__(self, id: object) -> bool:
        return id in self._store


def test_a_store_that_is_no_folder(tmp_path: Path, reports: Path, opened: list[str]) -> None:
    with EmbeddedStore(tmp_path / "store", info=INFO) as store:
        with pytest.raises(ConfigError, match="ledger="):
            PageIndex.open(Elsewhere(store), HashingEncoder(), images="none").sync(reports)
        index = PageIndex.open(Elsewhere(store), HashingEncoder(), images_dir=tmp_path / "images")
        assert index.sync(reports) == Synced(added=5)
        pages_among(opened)
        assert index.sync(reports) == Synced(unchanged=5)
        assert pages_among(opened) == []
        assert (tmp_path / "images" / "files.sqlite").exists()
        assert index.sync(reports, ledger=tmp_path / "own.sqlite") == Synced(unchanged=5)
        (reports / "a.png").unlink()
        assert index.sync(reports, ledger=tmp_path / "own.sqlite") == Synced(unchanged=4, removed=1)


def test_a_qdrant_collection(tmp_path: Path, reports: Path, encoder: HashingEncoder) -> None:
    index = qdrant_index(encoder, images_dir=tmp_path / "images")
    assert index.sync(reports) == Synced(added=5)
    encoder.encoded.clear()
    (reports / "a.png").unlink()
    (reports / "c.tif").rename(reports / "d.tif")
    assert index.sync(reports) == Synced(added=3, unchanged=1, removed=4)
    assert encoder.encoded == []
    assert index.search(picture(4), k=1)[0].page.id == "d.tif#page=2"


def test_read_only_and_closed_say_so(tmp_path: Path, index: PageIndex, reports: Path) -> None:
    with PageIndex.open(index.location, read_only=True) as reader, pytest.raises(StoreError, match="read_only"):
        reader.sync(reports)
    index.close()
    with pytest.raises(StoreError, match="closed"):
        index.sync(reports)


def test_a_reader_sees_whole_pages_at_all_times(synced: PageIndex, reports: Path) -> None:
    done = threading.Event()
    seen: list[object] = []

    def read() -> None:
        with PageIndex.open(synced.location, HashingEncoder(), read_only=True) as reader:
            while not done.is_set():
                try:
                    seen.append(len(reader.search(picture(3), k=9)))
                    reader.get(reader.ids(), vectors=True)
                except Exception as exc:
                    seen.append(exc)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for seed in range(6):
            stack(reports / "c.tif", *range(100 + seed, 102 + seed + seed % 3))
            synced.sync(reports)
    finally:
        done.set()
        thread.join()
    assert seen
    assert set(seen) <= {4, 5, 6}


# -- resuming, caching -------------------------------------------------------------------------------------------------

KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from colqwen3_retrievers import PageIndex
from tests.hashing import HashingEncoder

class Slow(HashingEncoder):
    def encode_pages(self, pages):
        made = super().encode_pages(pages)
        print(len(self.encoded), flush=True)
        time.sleep(0.01)
        return made

PageIndex.open({index!r}, Slow()).sync({reports!r}, batch_size=4)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_run_continues_where_it_stopped(tmp_path: Path, encoder: HashingEncoder) -> None:
    folder = tmp_path / "scans"
    for seed in range(60):
        draw(folder / f"{seed:02}.png", seed)
    code = KILLED.format(root=str(ROOT), index=str(tmp_path / "index"), reports=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if int(line) >= 20:
                process.kill()
                break
        process.wait()
    assert process.returncode == -signal.SIGKILL
    (folder / "00.png").unlink()  # its page was kept by the run that was killed
    with PageIndex.open(tmp_path / "index", encoder) as index:
        before = set(index.ids())
        assert 16 <= len(before) < 60
        assert "00.png#page=1" in before
        assert index.sync(folder) == Synced(added=60 - len(before), unchanged=len(before) - 1, removed=1)
    assert not before & set(encoder.encoded)


def test_a_page_seen_elsewhere_comes_from_the_cache(tmp_path: Path, reports: Path) -> None:
    encoder = HashingEncoder()
    with PageIndex.open(tmp_path / "one", encoder) as index:
        assert index.sync(reports, cache=tmp_path / "cache") == Synced(added=5)
    assert len(encoder.encoded) == 5
    with PageIndex.open(tmp_path / "two", encoder) as other:
        assert other.sync(reports, cache=tmp_path / "cache") == Synced(added=5)
        assert len(encoder.encoded) == 5
        plain = PageIndex.open(tmp_path / "one", encoder).get(ALL, vectors=True)
        for mine, theirs in zip(other.get(ALL, vectors=True), plain, strict=True):
            assert np.array_equal(mine.multi_vector.vectors, theirs.multi_vector.vectors)
            assert mine.multi_vector.grid == theirs.multi_vector.grid
        # The picture that the index keeps of a page is known by what it shows.
        kept = [Page(id=f"copy of {hit.page.id}", image=hit.page.image_path) for hit in other.search(picture(4), k=5)]
        assert other.add(kept, cache=tmp_path / "cache").added == 5
        assert len(encoder.encoded) == 5
    encoder.threads.shutdown()


def test_a_cache_of_another_encoder_is_refused(index: PageIndex, reports: Path) -> None:
    other = HashingEncoder(dataclasses.replace(INFO, fingerprint="other"))
    with pytest.raises(StoreMismatchError, match="fingerprint"):
        index.sync(reports, cache=PageEmbeddingCache(other))
    assert len(index) == 0


def test_a_pdf(tmp_path: Path, index: PageIndex, encoder: HashingEncoder) -> None:
    pytest.importorskip("pypdfium2")
    Image.new("RGB", (24, 16), "red").save(
        tmp_path / "a.pdf", save_all=True, append_images=[Image.new("RGB", (24, 16), "blue")]
    )
    assert index.sync(tmp_path / "a.pdf", max_pixels=384) == Synced(added=2)
    encoder.encoded.clear()
    time.sleep(0.03)
    assert index.sync(tmp_path / "a.pdf", max_pixels=384) == Synced(unchanged=2)
    assert encoder.encoded == []
    Image.new("RGB", (24, 16), "red").save(tmp_path / "a.pdf")
    assert index.sync(tmp_path / "a.pdf", max_pixels=384) == Synced(updated=1, removed=1)
    assert encoder.encoded == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode")
def test_a_name_that_is_no_text_is_told_and_the_others_are_read(
    tmp_path: Path, index: PageIndex, reports: Path
) -> None:
    shutil.copy(os.fsencode(reports / "a.png"), os.fsencode(reports) + b"/caf\xe9.png")
    done = index.sync([reports])
    assert (done.added, len(done.failed)) == (5, 1)
    assert done.failed[0].reason == "the file name is not valid Unicode"
    with pytest.raises(PageError, match="the file name is not valid Unicode"):
        index.add_files([reports])
    assert index.ids() == ALL
