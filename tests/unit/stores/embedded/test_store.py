"""The embedded store beyond its contract: candidates, codes, compaction, damage."""

from __future__ import annotations

import dataclasses
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from colqwen3_retrievers import EncoderInfo, MultiVector, Page
from colqwen3_retrievers.errors import ConfigError, StoreError, StoreMismatchError
from colqwen3_retrievers.stores.embedded import compaction
from colqwen3_retrievers.stores.embedded import store as embedded
from colqwen3_retrievers.stores.embedded.store import FIRST_CODES, FIRST_SEGMENT, EmbeddedStore
from colqwen3_retrievers.stores.protocol import Record
from colqwen3_retrievers.vectors.late_interaction import numpy_kernel
from colqwen3_retrievers.vectors.multi_vector import Float32, PackedEmbeddings

DIM = 24
INFO = EncoderInfo("ab12", "test", "tomoro", DIM, 1, 1280, False, 1)
CENTRES = np.random.default_rng(0).standard_normal((30, DIM))


def unit(rows: np.ndarray) -> Float32:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def content(seed: int, n: int = 30) -> Float32:
    """Token embeddings that gather around some of the centres that all pages share."""
    rng = np.random.default_rng(seed)
    mine = CENTRES[rng.choice(30, 6)] + 0.3 * rng.standard_normal((6, DIM))
    return unit(mine[rng.integers(6, size=n)] + 0.25 * rng.standard_normal((n, DIM)))


def record(seed: int, page_id: str | None = None, **metadata: Any) -> Record:
    page = Page(page_id or f"p{seed:04d}", f"s{seed % 40}.pdf", 1 + seed // 40, text=f"t{seed}", metadata=metadata)
    return Record(page.replace(sha256=f"{seed:x}"), MultiVector(content(seed)))


class Counting:
    """A kernel that counts the pages it scores."""

    def __init__(self) -> None:
        self.pages = 0

    def __call__(self, queries: PackedEmbeddings, documents: PackedEmbeddings, /) -> Float32:
        self.pages += len(documents)
        return numpy_kernel(queries, documents)


def ids(matches: list[Any]) -> list[str]:
    return [match.record.page.id for match in matches]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    """A store of 1,500 pages: three times what is scored exactly."""
    with EmbeddedStore(tmp_path_factory.mktemp("large") / "index", info=INFO, kernel=Counting()) as store:
        store.add([record(n, year=2000 + n % 30, even=n % 2 == 0) for n in range(1500)])
        yield store


def counted(store: EmbeddedStore) -> int:
    """Pages scored since the last call."""
    kernel = store._files._kernel
    assert isinstance(kernel, Counting)
    pages, kernel.pages = kernel.pages, 0
    return pages


# -- two stages --------------------------------------------------------------------------------------------------------


def test_few_pages_are_scored_and_the_best_are_found(large: EmbeddedStore) -> None:
    queries = [content(10_000 + n, 12) for n in range(40)]
    counted(large)
    found = large.search(queries, 10)
    looked_at = counted(large) / len(queries)
    exact = large.search(queries, 10, exact=True)
    assert counted(large) == 1500  # a batch of queries is one scan
    shared = [len(set(ids(a)) & set(ids(b))) / 10 for a, b in zip(found, exact, strict=True)]
    assert np.mean(shared) >= 0.99 and looked_at < 700
    for some, all_of_them in zip(found, exact, strict=True):
        right = {m.record.page.id: m.score for m in all_of_them}
        for match in some:
            assert match.score == pytest.approx(right.get(match.record.page.id, match.score), abs=1e-5)
        assert [m.score for m in some] == sorted((m.score for m in some), reverse=True)
    assert [ids(large.search([q], 10)[0]) for q in queries[:5]] == [ids(some) for some in found[:5]]


def test_a_clear_answer_takes_few_candidates_and_near_ties_take_more(tmp_path: Path) -> None:
    query = content(77, 10)
    with EmbeddedStore(tmp_path, info=INFO, kernel=Counting()) as store:
        store.add([record(n) for n in range(1200)] + [Record(Page(f"it {n}"), MultiVector(query)) for n in range(3)])
        assert ids(store.search([query], 3)[0]) == ["it 0", "it 1", "it 2"]
        assert counted(store) == 50
        alike = np.random.default_rng(1).standard_normal((400, 30, DIM)) * 0.02 + content(5)
        store.add([Record(Page(f"alike {n:03d}"), MultiVector(unit(rows))) for n, rows in enumerate(alike)])
        hits = store.search([content(5)], 10)[0]
        assert counted(store) > 100
        assert all(hit.record.page.id.startswith(("alike", "p0005")) for hit in hits)


def test_many_hits_are_many_candidates(large: EmbeddedStore) -> None:
    query = content(5, 10)
    for k in (400, 1500, 2000):
        assert ids(large.search([query], k)[0])[:100] == ids(large.search([query], k, exact=True)[0])[:100]
    assert len(large.search([query], 2000)[0]) == 1500


def test_the_best_of_each_source_among_candidates(large: EmbeddedStore) -> None:
    for n in range(8):
        query = content(20_000 + n, 8)
        for k in (5, 40, 60):
            found = large.search([query], k, group_by="source")[0]
            exact = large.search([query], k, group_by="source", exact=True)[0]
            assert len(found) == min(k, 40) and len({m.record.page.source for m in found}) == len(found)
            assert len(set(ids(found)) & set(ids(exact))) >= 0.95 * len(exact)


def test_a_filter_is_applied_before_anything_is_read(large: EmbeddedStore) -> None:
    query = content(6, 10)
    counted(large)
    hits = large.search([query], 5, where={"year": 2003})[0]
    assert counted(large) == 50 == len(large.ids({"year": 2003}))  # few enough to be scored at once
    assert all(hit.record.page.metadata["year"] == 2003 for hit in hits)
    everything = large.search([query], 1500, exact=True)[0]
    assert ids(hits) == [m.record.page.id for m in everything if m.record.page.metadata["year"] == 2003][:5]
    counted(large)
    hits = large.search([query], 5, where={"even": True})[0]  # 750 pages: candidates among them
    assert counted(large) < 400
    assert ids(hits) == [m.record.page.id for m in everything if m.record.page.metadata["even"]][:5]
    assert large.search([query], 5, where={"year": 1900}) == [[]]


@pytest.mark.parametrize("where", [{"year": 2003}, {"year": {"$gte": 2020, "$lt": 2022}}, {"source": "s3.pdf"}])
def test_metadata_is_found_through_an_index(large: EmbeddedStore, where: dict[str, Any]) -> None:
    from colqwen3_retrievers.stores.embedded.filters import compile_filter
    from colqwen3_retrievers.stores.where import parse

    condition, parameters = compile_filter(parse(where))
    with large._catalogue.reading() as connection:
        plan = connection.execute(f"EXPLAIN QUERY PLAN SELECT p.key FROM pages AS p WHERE {condition}", parameters)
        steps = " | ".join(row[3] for row in plan)
    assert "SCAN" not in steps.replace("SCAN facts USING COVERING INDEX", "SCAN"), steps
    assert "facts_value" in steps or "pages_source" in steps, steps


# -- compaction --------------------------------------------------------------------------------------------------------


def everything(store: EmbeddedStore) -> dict[str, bytes]:
    return {back.page.id: np.asarray(back.multi_vector).tobytes() for back in store.get(store.ids(), vectors=True)}


def expected(seeds: dict[str, int]) -> dict[str, bytes]:
    return {page_id: content(seed).tobytes() for page_id, seed in seeds.items()}


def test_compaction_gives_room_back_and_changes_nothing_else(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path, info=INFO) as store:
        store.add([record(n) for n in range(60)])
        store.delete([f"p{n:04d}" for n in range(0, 60, 3)])
        store.add([record(100 + n, f"p{n:04d}") for n in range(1, 10, 3)])
        before, hits = everything(store), store.search([content(3)], 99)[0]
        size = (tmp_path / FIRST_SEGMENT).stat().st_size
        assert store.compact() == 23 * 30 * DIM * 2
        assert not (tmp_path / FIRST_SEGMENT).exists() and not (tmp_path / FIRST_CODES).exists()
        (tokens,) = tmp_path.glob("tokens-*")
        assert tokens.stat().st_size == size - 23 * 30 * DIM * 2 == 40 * 30 * DIM * 2
        assert everything(store) == before and len(before) == 40
        assert [(m.record.page.id, m.score) for m in store.search([content(3)], 99)[0]] == [
            (m.record.page.id, m.score) for m in hits
        ]
        assert store.compact() == 0 and tokens.exists()  # nothing to do
        store.add([record(500)])
        store.delete(["p0001"])
    with EmbeddedStore(tmp_path) as store:
        assert everything(store) == {k: v for k, v in before.items() if k != "p0001"} | expected({"p0500": 500})
        with store._catalogue.reading() as connection:
            places = connection.execute("SELECT segment, start FROM pages ORDER BY key").fetchall()
            assert places == sorted(places)
            (last,) = connection.execute("SELECT max(key) FROM pages").fetchone()
            assert last == 64  # keys go on where they were


def test_compaction_happens_by_itself_past_30_per_cent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "DEAD_BYTES", 1)
    with EmbeddedStore(tmp_path, info=INFO) as store:
        store.add([record(n) for n in range(10)])
        store.delete(["p0000", "p0001", "p0002"])  # 30 per cent, and no more
        assert (tmp_path / FIRST_SEGMENT).exists()
        store.delete(["p0003"])
        assert not (tmp_path / FIRST_SEGMENT).exists()
        assert everything(store) == expected({f"p{n:04d}": n for n in range(4, 10)})
        store.delete(where={"id": {"$exists": True}})
        (tokens,) = tmp_path.glob("tokens-*")
        assert tokens.stat().st_size == 0 and len(store) == 0
        store.add([record(3)])
        assert everything(store) == expected({"p0003": 3})


def test_small_stores_are_left_alone(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path, info=INFO) as store:
        for _ in range(5):
            store.add([record(1)])
        assert (tmp_path / FIRST_SEGMENT).stat().st_size == 5 * 30 * DIM * 2


def test_files_are_begun_anew_when_they_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "SEGMENT_BYTES", 10 * 30 * DIM * 2)
    with EmbeddedStore(tmp_path, info=INFO) as store:
        for n in range(35):
            store.add([record(n)])
        assert len(list(tmp_path.glob("tokens-*"))) == 4 == len(list(tmp_path.glob("codes-*")))
        store.delete([f"p{n:04d}" for n in range(10, 15)])
        assert store.compact() == 5 * 30 * DIM * 2
        assert (tmp_path / FIRST_SEGMENT).exists() and not (tmp_path / "tokens-000002.f16").exists()
        wanted = expected({f"p{n:04d}": n for n in range(35) if not 10 <= n < 15})
        assert everything(store) == wanted
        assert len(store.search([content(1)], 99)[0]) == 30
    with EmbeddedStore(tmp_path) as store:
        assert everything(store) == wanted


def test_readers_go_on_while_files_are_replaced(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path, info=INFO) as store:
        store.add([record(n) for n in range(20)])
        with (
            EmbeddedStore(tmp_path, read_only=True) as early,
            EmbeddedStore(tmp_path, read_only=True) as late,
        ):
            early.search([content(1)], 3)  # has the files mapped; the other opens them when they are gone
            for turn in range(3):
                store.delete([f"p{turn:04d}"])
                store.compact()
                for reader in (early, late):
                    assert len(reader.search([content(1)], 99)[0]) == 19 - turn
                    assert everything(reader) == expected({f"p{n:04d}": n for n in range(turn + 1, 20)})
            assert len(early._files.tokens._maps) == 1  # maps of files that are gone are let go


def test_a_file_that_goes_between_two_steps_of_a_search_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedStore(tmp_path, info=INFO) as store, EmbeddedStore(tmp_path, read_only=True) as reader:
        store.add([record(n) for n in range(20)])
        original = embedded.read_segments

        def compacted_meanwhile(connection: sqlite3.Connection) -> Any:
            segments = original(connection)
            store.delete([store.ids()[0]])
            monkeypatch.setattr(embedded, "read_segments", original)
            store.compact()
            return segments

        monkeypatch.setattr(embedded, "read_segments", compacted_meanwhile)
        assert len(reader.search([content(1)], 99)[0]) == 19


def test_opening_while_a_file_goes_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedStore(tmp_path, info=INFO) as store:
        store.add([record(n) for n in range(20)])
        original = embedded.read_segments

        def compacted_meanwhile(connection: sqlite3.Connection) -> Any:
            segments = original(connection)
            monkeypatch.setattr(embedded, "read_segments", original)
            store.delete(["p0003"])
            store.compact()
            return segments

        monkeypatch.setattr(embedded, "read_segments", compacted_meanwhile)
        with EmbeddedStore(tmp_path, read_only=True) as reader:
            assert len(reader.search([content(1)], 99)[0]) == 19


def test_what_a_killed_compaction_left_is_removed(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path, info=INFO) as store:
        store.add([record(1)])
    for name in ("tokens-000001-9.f16", "codes-000001-9.i8", "tokens-000002.f16"):
        (tmp_path / name).write_bytes(b"x" * 100)
    (tmp_path / "tokens-of-mine.f16").touch()
    EmbeddedStore(tmp_path, read_only=True).close()
    assert (tmp_path / "tokens-000001-9.f16").exists()
    EmbeddedStore(tmp_path).close()
    assert sorted(path.name for path in tmp_path.glob("*-*.*")) == [FIRST_CODES, FIRST_SEGMENT, "tokens-of-mine.f16"]


def test_a_compaction_that_fails_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compaction, "DEAD_BYTES", 1)
    with EmbeddedStore(tmp_path, info=INFO) as store:
        store.add([record(n) for n in range(10)])

        def full(*_: object) -> None:
            raise StoreError("No space left on device")

        with monkeypatch.context() as context, caplog.at_level(logging.WARNING):
            context.setattr(store._files.codes, "append", full)
            store.delete([f"p{n:04d}" for n in range(5)])  # has come to its commit, so it is no error
            assert "not compacted, which will be tried again: No space left" in caplog.text
            with pytest.raises(StoreError, match="No space left"):
                store.compact()
        assert sorted(path.name for path in tmp_path.glob("*-*.*")) == [FIRST_CODES, FIRST_SEGMENT]
        assert everything(store) == expected({f"p{n:04d}": n for n in range(5, 10)})
        store.delete(["p0005"])
        assert not (tmp_path / FIRST_SEGMENT).exists()


# -- codes -------------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)


@pytest.fixture
def always_two_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "EXACT_PAGES", 0)


@pytest.mark.usefixtures("always_two_stages")
def test_a_damaged_code_is_named_and_made_again(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path, info=INFO) as store:
        store.add([record(n) for n in range(20)])
        right = ids(store.search([content(2)], 20)[0])
        assert store.count_damaged_codes() == 0
    flip(tmp_path / FIRST_CODES, -3)
    with EmbeddedStore(tmp_path) as store:
        assert store.count_damaged_codes() == 1
        for _ in range(2):
            with pytest.raises(StoreError, match=rf"{FIRST_CODES}: the codes of 'p0019' are not .*compact"):
                store.search([content(2)], 20)
        assert ids(store.search([content(2)], 20, exact=True)[0]) == right
        store.compact()
        assert ids(store.search([content(2)], 20)[0]) == right and store.count_damaged_codes() == 0


@pytest.mark.usefixtures("always_two_stages")
def test_a_code_file_may_be_removed_but_not_cut(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path, info=INFO) as store:
        store.add([record(n) for n in range(20)])
        right = ids(store.search([content(2)], 20)[0])
    codes = tmp_path / FIRST_CODES
    codes.write_bytes(codes.read_bytes()[:-1])
    for read_only in (True, False):
        with pytest.raises(StoreError, match=rf"{FIRST_CODES}: \d[\d,]* bytes, but the catalogue counts"):
            EmbeddedStore(tmp_path, read_only=read_only)
    codes.unlink()
    with EmbeddedStore(tmp_path, read_only=True) as store:
        assert ids(store.search([content(2)], 20)[0]) == right
    with EmbeddedStore(tmp_path) as store:
        assert ids(store.search([content(2)], 20)[0]) == right
        store.add([record(50)])
        assert len(store.search([content(2)], 99)[0]) == 21
        with store._catalogue.reading() as connection:
            assert connection.execute("SELECT count(*) FROM pages WHERE code_rows = 0").fetchone() == (0,)
    EmbeddedStore(tmp_path).close()


def test_code_files_that_are_gone_are_made_again_one_with_each_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "SEGMENT_BYTES", 10 * 30 * DIM * 2)
    monkeypatch.setattr(embedded, "EXACT_PAGES", 0)
    with EmbeddedStore(tmp_path, info=INFO) as store:
        for n in range(35):
            store.add([record(n)])
        right = ids(store.search([content(2)], 9, exact=True)[0])
    for path in tmp_path.glob("codes-*"):
        path.unlink()
    with EmbeddedStore(tmp_path) as store:
        for n in range(3):
            assert ids(store.search([content(2)], 9)[0]) == right
            store.add([record(n)])
            names = sorted(path.name for path in tmp_path.glob("codes-*"))
            assert len(names) == 2 + n and names[-1] == "codes-000005.i8"  # a segment of its own, beside those made
        store.compact()
        assert len(list(tmp_path.glob("codes-*"))) == 5
        assert set(ids(store.search([content(2)], 35)[0])) == {f"p{n:04d}" for n in range(35)}
        assert everything(store) == expected({f"p{n:04d}": n for n in range(35)})


def test_damaged_token_embeddings_are_named_by_a_search(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path, info=INFO) as store:
        store.add([record(n) for n in range(20)])
    flip(tmp_path / FIRST_SEGMENT, 5)
    with EmbeddedStore(tmp_path) as store:
        with pytest.raises(StoreError, match=f"{FIRST_SEGMENT}: the token embeddings of 'p0000' are not"):
            store.search([content(2)], 3)
        assert len(store.search([content(2)], 3, where={"number": {"$gte": 1}, "id": {"$ne": "p0000"}})[0]) == 3
        store.add([record(0)])
        assert len(store.search([content(2)], 30)[0]) == 20


def test_what_the_catalogue_says_is_checked_too(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path, info=INFO) as store:
        store.add([record(n, author="Ada Lovelace") for n in range(3)])
    raw = (tmp_path / "catalogue.sqlite").read_bytes()
    at = raw.index(b"Ada Lovelace") if b"Ada Lovelace" in raw else -1
    assert at > 0
    while at > 0:  # in the page's own text and in the index of filters
        raw = raw[:at] + b"Bda" + raw[at + 3 :]
        at = raw.find(b"Ada Lovelace")
    (tmp_path / "catalogue.sqlite").write_bytes(raw)
    with (
        EmbeddedStore(tmp_path) as store,
        pytest.raises(StoreError, match="the catalogue says of 'p0001' is not what was"),
    ):
        store.get(["p0001"])


def test_the_factor_of_codes_is_fixed_when_a_store_is_made(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path / "six", info=INFO, code_factor=6) as store:
        store.add([record(1)])
        assert (tmp_path / "six" / FIRST_CODES).stat().st_size == 8 * 32
    EmbeddedStore(tmp_path / "six").close()
    EmbeddedStore(tmp_path / "six", code_factor=6).close()
    with pytest.raises(StoreMismatchError, match="code_factor is 6 in the index, 3 asked for"):
        EmbeddedStore(tmp_path / "six", code_factor=3)
    for bad in (0, -1, True):
        with pytest.raises(ConfigError, match="code_factor: expected a whole number from 1"):
            EmbeddedStore(tmp_path / "new", info=INFO, code_factor=bad)
    pooled = dataclasses.replace(INFO, pool_factor=3)
    with EmbeddedStore(tmp_path / "pooled", info=pooled) as store:  # what comes pooled is not pooled again
        store.add([record(1)])
        assert (tmp_path / "pooled" / FIRST_CODES).stat().st_size == 32 * 32
