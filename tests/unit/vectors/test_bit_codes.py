"""Codes of single bits: what they hold, how they are scanned, and a store that finds candidates by them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from colqwen3_retrievers import EncoderInfo, MultiVector, Page
from colqwen3_retrievers.errors import ConfigError, StoreMismatchError
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore
from colqwen3_retrievers.stores.protocol import Record
from colqwen3_retrievers.vectors.codes import BLOCK, code_row_bytes, page_code, query_codes, unpacked_code
from colqwen3_retrievers.vectors.compression import l2_normalise
from colqwen3_retrievers.vectors.kernels import default_scan
from colqwen3_retrievers.vectors.kernels.scan import bit_scan, numpy_scan
from colqwen3_retrievers.vectors.late_interaction import maxsim
from colqwen3_retrievers.vectors.multi_vector import PackedEmbeddings

DIM = 48
INFO = EncoderInfo("ab12", "tiny", "tomoro", DIM, 1, 1280, False, 1)


def tokens(seed: int, count: int = 30, dim: int = DIM) -> np.ndarray:
    """A page about something: tokens near one of a few topics."""
    rng = np.random.default_rng(seed)
    topics = np.random.default_rng(seed % 40).standard_normal((6, dim))
    return l2_normalise(topics[rng.integers(0, 6, count)] + 0.7 * rng.standard_normal((count, dim)))


def record(seed: int) -> Record:
    return Record(Page(id=f"p{seed:04d}", source=f"s{seed % 7}.pdf", text="x"), MultiVector(tokens(seed)))


@pytest.mark.parametrize("dim", [2, 24, 128, 320, 2560])
@pytest.mark.parametrize("factor", [1, 3])
def test_a_code_says_signs_and_spread(dim: int, factor: int) -> None:
    rows = tokens(1, 20, dim)
    wide, narrow = page_code(rows, factor), page_code(rows, factor, bits=1)
    assert narrow.rows.shape == (len(wide.rows), code_row_bytes(dim, 1))
    assert len(narrow.rows) % BLOCK == 0
    unpacked = unpacked_code(narrow.rows, dim)
    assert unpacked.shape == wide.rows.shape
    told = wide.rows[:, :dim] != 0  # int8 rounds the smallest to zero
    assert (np.sign(unpacked[:, :dim]) == np.sign(wide.rows[:, :dim]))[told].all()
    assert np.allclose(np.abs(unpacked[:, :dim] * narrow.scale), dim**-0.5, rtol=1e-3)
    assert np.abs(unpacked[:, dim] * narrow.scale - wide.rows[:, dim] * wide.scale).max() < 0.05
    assert not unpacked[:, dim + 1 :].any()


def test_bits_are_eight_or_one() -> None:
    with pytest.raises(ConfigError, match="bits: expected 8 or 1, got 4"):
        page_code(tokens(1), 3, bits=4)
    with pytest.raises(ConfigError, match="code_bits: expected 8 or 1, got 2"):
        EmbeddedStore("nowhere", info=INFO, code_bits=2)


@pytest.mark.parametrize("scan", [numpy_scan, default_scan()], ids=["numpy", "default"])
def test_a_scan_of_bits_is_maxsim_over_what_they_stand_for(scan) -> None:  # type: ignore[no-untyped-def]
    codes = [page_code(tokens(seed, 8 + seed % 90), 2, bits=1) for seed in range(300)]
    lengths = np.asarray([len(code.rows) for code in codes], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    rows = np.concatenate([code.rows for code in codes])
    queries = query_codes(PackedEmbeddings.pack([tokens(900, 12), tokens(901, 3)]))
    asked = [queries.rows[a:b] * queries.scales[a:b, None] for a, b in ((0, 12), (12, 15))]
    some = np.sort(np.random.default_rng(0).permutation(300)[:70])
    scales = np.asarray([code.scale for code in codes], dtype=np.float32)
    found = bit_scan(scan, DIM)(queries, rows, starts[some], lengths[some], scales[some])
    for column, place in enumerate(some):
        stands_for = unpacked_code(codes[place].rows, DIM) * np.float32(codes[place].scale)
        right = [(each @ stands_for.T).max(axis=1).sum() for each in asked]
        assert np.allclose(found[:, column], right, rtol=1e-3, atol=1e-3)


def test_a_store_of_bits_finds_and_lasts(tmp_path: Path) -> None:
    folder = tmp_path / "bits"
    with EmbeddedStore(folder, info=INFO, code_bits=1) as store:
        store.add(record(seed) for seed in range(900))
        size = (folder / "codes-000001.i8").stat().st_size
    with EmbeddedStore(tmp_path / "bytes", info=INFO, code_factor=1) as wide:
        wide.add(record(seed) for seed in range(900))
        assert size * code_row_bytes(DIM, 8) == (tmp_path / "bytes" / "codes-000001.i8").stat().st_size * 7
    with EmbeddedStore(folder, info=INFO) as store:  # known from the catalogue
        assert (store.code_factor, store.code_bits) == (1, 1)
        queries = [tokens(seed, 6) for seed in range(2000, 2020)]
        kept = [{id_ for id_, _ in hits} for hits in names(store, queries)]
        exact = [{id_ for id_, _ in hits} for hits in names(store, queries, exact=True)]
        assert np.mean([len(a & b) / 10 for a, b in zip(kept, exact, strict=True)]) >= 0.95
        for found in names(store, queries):
            for id_, score in found:
                right = maxsim([queries[0]], [tokens(int(id_[1:])).astype(np.float16).astype(np.float32)])[0, 0]
                assert score == pytest.approx(float(right), abs=1e-4)
            break
        store.delete([f"p{seed:04d}" for seed in range(500)])
        assert store.compact() > 0
        assert {id_ for id_, _ in names(store, [tokens(700)])[0]} == {
            id_ for id_, _ in names(store, [tokens(700)], exact=True)[0]
        }
        assert (folder / "catalogue.sqlite").exists()
    for path in folder.glob("codes-*.i8"):
        path.unlink()
    with EmbeddedStore(folder) as store:  # codes that are gone are made again, of the same kind
        store.compact()
        (made,) = folder.glob("codes-*.i8")
        assert made.stat().st_size == 400 * 32 * code_row_bytes(DIM, 1)
        assert len(names(store, [tokens(700)])[0]) == 10


def names(store: EmbeddedStore, queries: list[np.ndarray], exact: bool = False) -> list[list[tuple[str, float]]]:
    return [
        [(match.record.page.id, match.score) for match in found] for found in store.search(queries, 10, exact=exact)
    ]


def test_kinds_are_never_mixed(tmp_path: Path) -> None:
    EmbeddedStore(tmp_path / "bits", info=INFO, code_bits=1).close()
    EmbeddedStore(tmp_path / "bits", code_bits=1).close()
    with pytest.raises(StoreMismatchError, match="code_bits is 1 in the index, 8 asked for"):
        EmbeddedStore(tmp_path / "bits", code_bits=8)
    EmbeddedStore(tmp_path / "bytes", info=INFO).close()
    with pytest.raises(StoreMismatchError, match="code_bits is 8 in the index, 1 asked for"):
        EmbeddedStore(tmp_path / "bytes", code_bits=1)
