"""The index: what is added is found again, with its picture, after everything that may happen in between."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from colqwen3_retrievers import Hit, Page, PageIndex, Query, open_store
from colqwen3_retrievers.errors import (
    CheckpointError,
    ConfigError,
    EncodeError,
    InputTooLongError,
    PageError,
    StoreError,
    StoreMismatchError,
)
from colqwen3_retrievers.index.page_adder import Added
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore
from colqwen3_retrievers.stores.protocol import Record
from tests.hashing import INFO, HashingEncoder, picture


def text_page(text: str, **fields: Any) -> Page:
    return Page(**{"source": "a.pdf", "text": text, **fields})


def ids_of(hits: list[Hit]) -> list[str]:
    return [hit.page.id for hit in hits]


def stored_images(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "images").rglob("*") if path.is_file())


@pytest.fixture
def folder(index: PageIndex) -> Path:
    return Path(index.location)


# -- searching ---------------------------------------------------------------------------------------------------------


def test_what_was_added_is_found(index: PageIndex) -> None:
    done = index.add(
        text_page(f"page {n} about {word}", number=n + 1) for n, word in enumerate(("tax", "rent", "wine"))
    )
    assert (done.added, done.updated, done.unchanged, len(index)) == (3, 0, 0, 3)
    hits = index.search("about wine", k=2)
    assert hits[0].page.id == "a.pdf#page=3" and hits[0].score == pytest.approx(2, abs=0.01)
    assert hits[0].page.text == "page 2 about wine" and len(hits) == 2 and "a.pdf#page=1" in index
    assert index.ids() == [f"a.pdf#page={n}" for n in (1, 2, 3)]


def test_an_empty_index_answers_without_its_encoder(index: PageIndex, encoder: HashingEncoder) -> None:
    encoder.hold.clear()
    assert index.search("anything") == [] and index.search_many(["a", "b"]) == [[], []]
    assert asyncio.run(index.asearch("anything")) == []
    assert index.search_many([]) == []
    encoder.hold.set()


def test_a_search_counts_no_pages(tmp_path: Path, encoder: HashingEncoder) -> None:
    class Uncounted(EmbeddedStore):
        def __len__(self) -> int:
            raise AssertionError("an exact count before each search is slow on a remote store")

    with Uncounted(tmp_path / "store", info=INFO) as store, PageIndex.open(store, encoder) as index:
        assert index.search("wine") == []
        index.add([text_page("red wine", id="r")])
        assert ids_of(index.search("wine")) == ids_of(asyncio.run(index.asearch("wine"))) == ["r"]


def test_questions_of_every_kind(index: PageIndex, encoder: HashingEncoder, tmp_path: Path) -> None:
    index.add([text_page("red wine", id="t"), Page(id="i", image=picture(1)), Page(id="j", image=picture(2))])
    picture(2).save(tmp_path / "two.png")
    content = (tmp_path / "two.png").read_bytes()
    for question in (picture(2), tmp_path / "two.png", content, Query(image=picture(2)), Query("see", picture(2))):
        assert ids_of(index.search(question, k=1)) == ["j"]
    made = encoder.multi_vector("red wine", None)
    found = index.search_many([picture(1), "red", made], k=1)
    assert [ids_of(hits) for hits in found] == [["i"], ["t"], ["t"]]
    assert found[2][0].score == pytest.approx(2, abs=0.01)


def test_bad_questions_are_refused_before_anything_is_encoded(index: PageIndex, encoder: HashingEncoder) -> None:
    index.add(text_page("x"))
    encoder.hold.clear()
    for call, says in (
        (lambda: index.search("x", k=0), "k: expected a whole number from 1, got 0"),
        (lambda: index.search("x", where={"a": {"$near": 1}}), "unknown operator"),
        (lambda: index.search("x", group_by="label"), "group_by"),
        (lambda: index.search("x", window=-1), "window: expected a whole number from 0, got -1"),
        (lambda: index.search(3), "expected a text, a Query, an image"),
        (lambda: index.search_many("x"), "queries: expected a list, got str"),
        (lambda: asyncio.run(index.asearch("x", k=0)), "k: expected"),
    ):
        with pytest.raises(ConfigError, match=says):
            call()
    encoder.hold.set()


def test_where_on_search_and_ids(index: PageIndex) -> None:
    index.add(text_page("tax", id=f"p{n}", number=n + 1, metadata={"year": 2015 + n}) for n in range(10))
    assert ids_of(index.search("tax", where={"year": {"$gte": 2020}, "number": {"$lt": 8}})) == ["p5", "p6"]
    assert index.ids({"year": 2017}) == ["p2"]


def test_the_best_page_of_each_source_and_the_pages_beside_it(index: PageIndex) -> None:
    index.add(
        text_page("tax" if (source, n) in (("a", 5), ("b", 1), ("b", 9)) else f"other{n}", source=source, number=n)
        for source in "abc"
        for n in range(1, 10)
    )
    hits = index.search("tax", k=2, group_by="source", window=1)
    assert ids_of(hits) == ["a#page=5", "b#page=1"]
    assert [[page.number for page in hit.neighbours] for hit in hits] == [[4, 6], [2]]
    assert index.search("tax", k=1, window=2, where={"number": 9})[0].neighbours[0].id == "b#page=7"
    index.add(Page(id=f"lone{n}", text=f"lone lonely{n}") for n in range(3))
    assert [hit.neighbours for hit in index.search("lone", k=3, window=1)] == [(), (), ()]


def test_asearch_leaves_the_event_loop_free(index: PageIndex, encoder: HashingEncoder) -> None:
    index.add([text_page("red wine", id="r"), text_page("white wine", id="w")])
    encoder.hold.clear()

    async def main() -> tuple[list[list[Hit]], int]:
        searches = [asyncio.create_task(index.asearch(f"{word} wine", k=1)) for word in ("red", "white", "red")]
        ticks = 0
        while ticks < 20:
            await asyncio.sleep(0.001)
            ticks += 1
        assert not any(task.done() for task in searches)
        encoder.hold.set()
        return await asyncio.gather(*searches), ticks

    found, ticks = asyncio.run(main())
    assert [ids_of(hits) for hits in found] == [["r"], ["w"], ["r"]] and ticks == 20


# -- adding ------------------------------------------------------------------------------------------------------------


def test_a_page_that_is_there_is_not_encoded_again(index: PageIndex, encoder: HashingEncoder) -> None:
    pages = [Page(source="a.pdf", number=n, image=picture(n), text=f"t{n}", metadata={"v": 1}) for n in (1, 2, 3)]
    index.add(pages)
    assert index.add(pages) == Added(unchanged=3)
    assert len(encoder.encoded) == 3
    changed = [pages[0].replace(metadata={"v": True}), pages[1].replace(text="other"), pages[2]]
    assert index.add(changed) == Added(0, 2, 1)
    assert encoder.encoded[3:] == ["a.pdf#page=2"]  # new metadata need no new multi-vector
    assert index.ids({"v": True}) == ["a.pdf#page=1"] and index.get(["a.pdf#page=2"])[0].page.text == "other"
    assert ids_of(index.search(picture(1), k=1)) == ["a.pdf#page=1"]


def test_going_on_after_an_interruption_encodes_only_the_rest(index: PageIndex, encoder: HashingEncoder) -> None:
    pages = [text_page(f"t{n}", number=n) for n in range(1, 11)]

    def broken() -> Iterator[Page]:
        yield from pages[:7]
        raise PageError("broken", source="b.pdf", page=8)

    with pytest.raises(PageError, match=r"b\.pdf, page 8: broken"):
        index.add(broken(), batch_size=3)
    assert len(index) == 7  # the batch begun before it too
    assert index.add(pages, batch_size=3) == Added(3, 0, 7)
    assert encoder.encoded == [page.id for page in pages]


def test_a_page_that_cannot_be_encoded_is_named_and_its_batch_left_out(index: PageIndex) -> None:
    pages = [text_page("unreadable" if n == 6 else "fine", number=n) for n in range(1, 10)]
    with pytest.raises(EncodeError, match=r"^page 'a\.pdf#page=6': it cannot be read$") as caught:
        index.add(pages, batch_size=4)
    assert caught.value.index == 5 and index.ids() == [f"a.pdf#page={n}" for n in range(1, 5)]
    with pytest.raises(InputTooLongError, match=r"page 'a\.pdf#page=1': the text") as too_long:
        index.add([text_page("endless")])
    assert (too_long.value.limit, too_long.value.actual, too_long.value.index) == (10, 99, 0)
    assert index.get(["a.pdf#page=1"])[0].page.text == "fine"


def test_two_contents_under_one_id_are_refused_and_the_same_twice_is_not(index: PageIndex) -> None:
    with pytest.raises(ConfigError, match="page 'x': given at 0 and, with another content, at 2; one would be lost"):
        index.add([text_page("one", id="x"), text_page("two", id="y"), text_page("three", id="x")])
    assert index.ids() == ["x", "y"] and index.get(["x"])[0].page.text == "one"
    assert index.add([text_page("z", id="z"), text_page("z", id="z")]) == Added(1, 0, 1)


def test_odd_ids_and_sources(index: PageIndex) -> None:
    odd = ["ü", "日本", "a'b\"c", "a\nb", "%_", "../../etc", "\U0001f600", " ", "x" * 5_000, "a\0b"]
    index.add(Page(id=name, source=name, text=f"word{n}") for n, name in enumerate(odd))
    assert index.ids() == sorted(odd)
    for n, name in enumerate(odd):
        assert ids_of(index.search(f"word{n}", k=1, where={"source": name})) == [name]
        assert index.get([name])[0].page.id == name and name in index
    assert index.delete(odd) == len(odd) and len(index) == 0


def test_what_is_no_page_is_refused(index: PageIndex) -> None:
    for pages, says in (
        ("a.pdf", "got str; load_pages reads files"),
        (3, "got int"),
        (["a.pdf"], "a Page at 0, got str"),
    ):
        with pytest.raises(ConfigError, match=says):
            index.add(pages)
    with pytest.raises(ConfigError, match="batch_size: expected a whole number from 1, got 0"):
        index.add([], batch_size=0)


def test_a_thousand_pages_of_one_source_go_quickly(index: PageIndex) -> None:
    began = time.monotonic()
    index.add((text_page(f"page w{n}", number=n, metadata={"n": n}) for n in range(1, 1_001)), batch_size=100)
    assert ids_of(index.search("w777", k=1)) == ["a.pdf#page=777"]
    assert index.delete(where={"source": "a.pdf"}) == 1_000
    assert time.monotonic() - began < 10


# -- images ------------------------------------------------------------------------------------------------------------


def test_images_out_of_reach_are_told_of_once(
    tmp_path: Path, encoder: HashingEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("qdrant_client")
    place = f"qdrant+path:{tmp_path}/qdrant/pages"
    with PageIndex.open(place, encoder, images_dir=tmp_path / "images") as index:
        assert index.images_dir == tmp_path / "images"
        index.add([Page(id="i", image=picture(1)), Page(id="j", image=picture(2)), text_page("red wine", id="t")])
    with PageIndex.open(place, encoder) as index:
        hits = index.search(picture(1), k=3)
        assert not caplog.records, "nobody asked for a picture"
        assert next(hit for hit in hits if hit.page.id == "t").page.image is None
        assert not caplog.records, "it has none"
        assert [hit.page.image for hit in hits] == [None, None, None]
        page = pickle.loads(pickle.dumps(index.get(["j"])[0].page))
        assert (page.id, page.image, page.image_path, page.image_source) == ("j", None, None, None)
        assert index.get(["i"])[0].page.image_path is None
    [told] = {record.getMessage() for record in caplog.records if "'i'" in record.getMessage()}
    assert "images_dir" in told and sum("'i'" in record.getMessage() for record in caplog.records) == 1
    with PageIndex.open(place, encoder, images_dir=tmp_path / "images") as index:
        assert index.search(picture(1), k=1)[0].page.image is not None


@pytest.mark.parametrize("name", ["qdrant:host/pages", "qdrants:host", ":memory:", "QDRANT:x"])
def test_a_misspelt_address_makes_no_folder(
    name: str, tmp_path: Path, encoder: HashingEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"(qdrant://host:6333/collection|a folder)"):
        PageIndex.open(name, encoder)
    assert list(tmp_path.iterdir()) == []
    PageIndex.open(f"./{name}", encoder).close()
    PageIndex.open("C:pages", encoder).close()  # one letter is a drive, or here a folder
    assert len(list(tmp_path.iterdir())) == 2


def test_images_survive_the_originals(index: PageIndex, folder: Path, tmp_path: Path) -> None:
    picture(1).save(tmp_path / "one.png")
    picture(2).save(tmp_path / "two.jpg", quality=80)
    pages = [Page(id="png", image=tmp_path / "one.png"), Page(id="jpg", image=tmp_path / "two.jpg")]
    wanted = {page.id: np.asarray(page.image) for page in pages}
    index.add([*pages, Page(id="pil", image=picture(3)), text_page("no picture", id="text")])
    wanted["pil"] = np.asarray(picture(3))
    (tmp_path / "one.png").unlink()
    (tmp_path / "two.jpg").unlink()
    for page in [record.page for record in index.get(["png", "jpg", "pil"])]:
        assert page.image_path is not None and page.image_path.suffix == ".png" and page.image is not None
        np.testing.assert_array_equal(np.asarray(page.image), wanted[page.id])
        assert hashlib.sha256(page.image_path.read_bytes()).hexdigest() == page.image_path.stem
        assert page.image_path.parent.name == page.image_path.stem[:2]
    assert index.get(["text"])[0].page.image is None
    assert len(stored_images(folder)) == 3


def test_an_image_goes_with_the_last_page_that_has_it(index: PageIndex, folder: Path) -> None:
    index.add([Page(id="a", image=picture(1), text="a"), Page(id="b", image=picture(1), text="b")])
    index.add([Page(id="c", image=picture(2))])
    assert len(stored_images(folder)) == 2
    index.delete(["a"])
    assert len(stored_images(folder)) == 2
    assert index.delete(where={"text": "b"}) == 1
    assert len(stored_images(folder)) == 1
    index.add([Page(id="c", image=picture(9))])  # replaced: the picture before it goes
    assert len(stored_images(folder)) == 1
    np.testing.assert_array_equal(np.asarray(index.get(["c"])[0].page.image), np.asarray(picture(9)))
    index.delete(["c"])
    assert stored_images(folder) == []


def test_a_failed_batch_leaves_no_image_behind(index: PageIndex, folder: Path) -> None:
    index.add([Page(id="kept", image=picture(1))])
    with pytest.raises(EncodeError):
        index.add([Page(id="good", image=picture(2)), Page(id="bad", image=picture(3), text="unreadable")])
    with pytest.raises(ConfigError, match="not valid Unicode"):
        index.add([Page(id="fine", image=picture(1), text="x"), Page(id="half\ud800", image=picture(4))])
    assert len(stored_images(folder)) == 1 and index.ids() == ["kept"]


def test_a_lost_image_is_written_again_without_encoding(
    index: PageIndex, folder: Path, encoder: HashingEncoder
) -> None:
    index.add([Page(id="a", image=picture(1))])
    (path,) = (path for path in (folder / "images").rglob("*.png"))
    path.unlink()
    assert index.search(picture(1))[0].page.id == "a"
    with pytest.raises(PageError, match=r"\.png: cannot be read"):
        _ = index.get(["a"])[0].page.image
    assert index.add([Page(id="a", image=picture(1))]) == Added(0, 1, 0)
    assert path.exists() and encoder.encoded == ["a"]


def test_images_by_reference_and_none(tmp_path: Path, encoder: HashingEncoder) -> None:
    picture(1).save(tmp_path / "one.png")
    pages = [Page(id="file", image=tmp_path / "one.png"), Page(id="memory", image=picture(2))]
    with PageIndex.open(tmp_path / "r", encoder, images="reference") as index:
        index.add(pages)
        assert index.get(["file"])[0].page.image_path == tmp_path / "one.png"
        assert len(stored_images(tmp_path / "r")) == 1
        index.delete(["file", "memory"])
    assert (tmp_path / "one.png").exists() and stored_images(tmp_path / "r") == []
    with PageIndex.open(tmp_path / "n", encoder, images="none") as index:
        index.add(pages)
        assert [record.page.image for record in index.get(["file", "memory"])] == [None, None]
        assert not (tmp_path / "n" / "images").exists()
    with PageIndex.open(tmp_path / "n", encoder) as index:  # another mind about images needs no new multi-vectors
        before = len(encoder.encoded)
        assert index.add(pages) == Added(0, 2, 0) and len(encoder.encoded) == before
        assert len(stored_images(tmp_path / "n")) == 2
    with pytest.raises(ConfigError, match="images: expected 'store', 'reference' or 'none', got 'all'"):
        PageIndex.open(tmp_path / "x", encoder, images="all")
    assert not (tmp_path / "x").exists()


# -- opening and closing -----------------------------------------------------------------------------------------------


def test_reopening_elsewhere_without_an_encoder(index: PageIndex, folder: Path, encoder: HashingEncoder) -> None:
    index.add([Page(source="a.pdf", number=n, image=picture(n), metadata={"n": n}) for n in (1, 2, 3)])
    page = index.get(["a.pdf#page=2"], vectors=True)[0].multi_vector
    assert page is not None
    np.save(folder.parent / "query.npy", np.asarray(page))
    index.close()
    moved = folder.rename(folder.parent / "moved")
    code = """
import sys
import numpy as np
from colqwen3_retrievers import MultiVector, PageIndex
with PageIndex.open(sys.argv[1]) as index:
    hit = index.search(MultiVector(np.load(sys.argv[2])), k=1)[0]
    print(hit.page.id, hit.page.image.size, len(index), index.ids({"n": 3}), index.info.model)
    record = index.get([hit.page.id], vectors=True)[0]
    print(record.multi_vector.grid, record.multi_vector.visual, index.delete(["a.pdf#page=1"]))
    assert "transformers" not in sys.modules  # torch compares
    assert "colqwen3_retrievers.engines.torch.model" not in sys.modules
"""
    arguments = [sys.executable, "-c", code, str(moved), str(folder.parent / "query.npy")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "a.pdf#page=2 (24, 16) 3 ['a.pdf#page=3'] hashing",
        "(2, 3) slice(0, 6, None) 1",
    ]


def test_another_model_is_refused_at_once(index: PageIndex, folder: Path) -> None:
    index.add([text_page("x")])
    index.close()
    other = HashingEncoder(dataclasses.replace(INFO, fingerprint="cd34"))
    with pytest.raises(StoreMismatchError, match="fingerprint is 'ab12' in the index, 'cd34' in the encoder"):
        PageIndex.open(folder, other)
    finer = HashingEncoder(dataclasses.replace(INFO, max_visual_tokens=2560))
    with PageIndex.open(folder, finer) as reopened:
        assert len(reopened.search("x")) == 1
        with pytest.raises(StoreMismatchError, match="max_visual_tokens is 1280"):
            reopened.add([text_page("y", id="y")])
        assert finer.encoded == []
    for made in (other, finer):
        made.threads.shutdown()


def test_opening_a_store(tmp_path: Path, encoder: HashingEncoder) -> None:
    with pytest.raises(StoreError, match="no index there; to make one"):
        PageIndex.open(tmp_path / "new")
    store = open_store(tmp_path / "s", info=INFO)
    with PageIndex.open(store, encoder) as index:
        index.add([Page(id="a", image=picture(1))])
        assert len(stored_images(tmp_path / "s")) == 1
    with pytest.raises(StoreError, match="the index is closed"):
        len(index)
    assert len(store) == 1  # the store was handed in: it stays open
    with pytest.raises(StoreMismatchError):
        PageIndex.open(store, HashingEncoder(dataclasses.replace(INFO, dim=64)))
    store.close()


def test_a_reader_beside_the_writer(index: PageIndex, folder: Path, encoder: HashingEncoder) -> None:
    index.add([text_page("red wine")])
    with PageIndex.open(folder, encoder, read_only=True) as reader:
        assert len(reader.search("wine")) == 1
        index.add([text_page("white wine", id="w")])
        assert len(reader.search("wine")) == 2
        for change in (lambda: reader.add([text_page("x")]), lambda: reader.delete(["w"])):
            with pytest.raises(StoreError, match="opened with read_only=True"):
                change()


def test_a_closed_index_says_so(index: PageIndex) -> None:
    index.close()
    index.close()
    calls: list[Callable[[], object]] = [
        lambda: len(index), lambda: index.search("x"), lambda: index.add([text_page("x")]), lambda: index.delete(["x"]),
        lambda: index.get(["x"]), lambda: "x" in index, lambda: index.ids(), lambda: index.info, lambda: index.encoder,
        lambda: asyncio.run(index.asearch("x")),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(StoreError, match="the index is closed"):
            call()


def test_deleting_needs_a_reason(index: PageIndex) -> None:
    index.add([text_page("x", number=n) for n in (1, 2, 3)])
    for nothing in ({}, {"where": {}}):
        with pytest.raises(ConfigError, match="would mean all of them"):
            index.delete(**nothing)
    with pytest.raises(ConfigError, match="expected a list of ids, got the text"):
        index.delete("a.pdf#page=1")
    assert index.delete(["a.pdf#page=1", "a.pdf#page=2"], where={"number": {"$gt": 1}}) == 1
    assert index.delete(["a.pdf#page=1", "nobody"], where={}) == 1 and index.ids() == ["a.pdf#page=3"]


def test_compacting_gives_back_the_room_of_deleted_pages(index: PageIndex) -> None:
    index.add(text_page(f"page {n} about wine", number=n + 1) for n in range(20))
    before = index.search("wine", k=3)
    index.delete(where={"number": {"$gt": 10}})
    assert index.compact() > 0
    assert index.compact() == 0
    assert [hit for hit in ids_of(index.search("wine", k=20)) if hit in ids_of(before)]
    assert len(index) == len(index.search("wine", k=20)) == 10


def test_threads_add_delete_and_search_at_once(index: PageIndex, folder: Path) -> None:
    failed: list[BaseException] = []

    def work(worker: int) -> None:
        rng = random.Random(worker)
        try:
            for n in range(15):
                index.add([Page(id=f"{worker}.{n}", image=picture(n % 4), text=f"t{worker} {n}")])
                assert index.search(f"t{worker}", k=1)[0].page.image is not None
                if rng.random() < 0.5:
                    assert index.delete([f"{worker}.{n}"]) == 1
        except BaseException as exc:
            failed.append(exc)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lone = [f for f in failed if not isinstance(f, PageError | IndexError)]  # another thread may delete what was found
    assert lone == []
    held = {record.page.image_path.name for record in index.get(index.ids()) if record.page.image_path}
    assert held == set(stored_images(folder))


def test_deleting_a_page_spares_the_image_another_is_about_to_hold(tmp_path: Path, encoder: HashingEncoder) -> None:
    begun = threading.Event()

    class SlowStore(EmbeddedStore):
        def add(self, records: Iterable[Record]) -> None:
            begun.set()
            time.sleep(0.2)
            super().add(records)

    with SlowStore(tmp_path / "index", info=INFO) as store, PageIndex.open(store, encoder) as index:
        index.add([Page(id="a", image=picture(1))])
        begun.clear()
        adding = threading.Thread(target=index.add, args=([Page(id="b", image=picture(1))],))
        adding.start()
        assert begun.wait(10)
        assert index.delete(["a"]) == 1
        adding.join()
        np.testing.assert_array_equal(np.asarray(index.get(["b"])[0].page.image), np.asarray(picture(1)))


def test_the_real_encoder_is_rebuilt_from_what_the_index_knows(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from colqwen3_retrievers import ColQwen3Encoder
    from tests.checkpoints import make_checkpoint

    model = make_checkpoint(tmp_path / "model", "tomoro").folder
    with ColQwen3Encoder(model, device="cpu", max_visual_tokens=128, pool_factor=2) as encoder:
        with PageIndex.open(tmp_path / "index", encoder) as index:
            index.add([Page(id="a", image=picture(1, 96, 64)), text_page("hello there", id="b")])
            wanted = [(hit.page.id, hit.score) for hit in index.search("hello")]
        with PageIndex.open(tmp_path / "index") as index:
            found = [(hit.page.id, pytest.approx(hit.score, abs=1e-4)) for hit in index.search("hello")]
            assert found == wanted and index.encoder.info == encoder.info
    other = make_checkpoint(tmp_path / "other", "ops").folder
    (tmp_path / "model").rename(tmp_path / "gone")
    other.rename(tmp_path / "model")
    with PageIndex.open(tmp_path / "index") as index:
        assert len(index) == 2  # no model is needed for that
        with pytest.raises((CheckpointError, StoreMismatchError), match=r"tomoro|fingerprint"):
            index.search("hello")


def test_a_name_in_a_filter_that_no_page_has_is_logged_once(
    index: PageIndex, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert index.search("tax", where={"yeer": 2020}) == [] and index.ids({"yeer": 2020}) == []
    assert caplog.messages == [], "an empty index has no name at all"
    index.add([text_page("tax", metadata={"year": 2020, "author": {"name": "Ada"}})])
    calls = (
        lambda where: index.search("tax", where=where),
        lambda where: asyncio.run(index.asearch("tax", where=where)),
        lambda where: index.ids(where),
        lambda where: index.delete(["nobody"], where=where),
        lambda where: list(index.candidate_rows(2, where=where)),
    )
    for n, call in enumerate(calls):
        for _ in range(2):
            call({"year": 2020, "author.name": "Ada", "page": 1, "$not": {f"yeer{n}": 2020}})
        (message,) = caplog.messages
        assert message.startswith(f"where: no page has 'yeer{n}' in its metadata; a page's own fields are id, source, ")
        caplog.clear()
    monkeypatch.delattr(EmbeddedStore, "has_name")
    assert len(index.search("tax", where={"year": 2020, "yeer0": {"$exists": False}})) == 1, "names are looked up once"
