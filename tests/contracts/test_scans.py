"""What every scan of codes must do, as one class that each scan subclasses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from colqwen3_retrievers import EncoderInfo, MultiVector, Page
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore
from colqwen3_retrievers.stores.protocol import Record
from colqwen3_retrievers.vectors.codes import BLOCK, QueryCodes, code_width, page_code, query_codes, unpacked_code
from colqwen3_retrievers.vectors.compression import l2_normalise
from colqwen3_retrievers.vectors.kernels import default_scan, device_scan
from colqwen3_retrievers.vectors.kernels.scan import CodeScan, bit_scan, numpy_scan
from colqwen3_retrievers.vectors.multi_vector import PackedEmbeddings


def queries(seed: int, lengths: list[int], dim: int) -> QueryCodes:
    rng = np.random.default_rng(seed)
    rows = [rng.standard_normal((n, dim)) for n in lengths]
    return query_codes(PackedEmbeddings.pack([r / np.linalg.norm(r, axis=1, keepdims=True) for r in rows]))


def codes(seed: int, lengths: list[int], dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = np.asarray(lengths) * BLOCK
    rows = rng.integers(-127, 128, (int(sizes.sum()), code_width(dim)), dtype=np.int8)
    return rows, np.cumsum(sizes) - sizes, sizes, rng.random(len(sizes)).astype(np.float32) / 100


def bit_codes(seed: int, lengths: list[int], dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The same as codes(), of single bits."""
    rng = np.random.default_rng(seed)
    made = [page_code(rng.standard_normal((length * BLOCK, dim)), 1, bits=1) for length in lengths]
    sizes = np.asarray([len(code.rows) for code in made])
    scales = np.asarray([code.scale for code in made], dtype=np.float32)
    return np.concatenate([code.rows for code in made]), np.cumsum(sizes) - sizes, sizes, scales


def most_held(work: Callable[[], object]) -> int:
    """Bytes of tensors made and not yet let go, at the worst moment of a call."""
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Counting(TorchDispatchMode):
        held: dict[int, tuple[StorageWeakRef, int]] = {}  # noqa: RUF012 - made anew with the class
        known: set[int] = set()  # noqa: RUF012
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            inputs = [tensor.untyped_storage() for tensor in tree_leaves((args, kwargs)) if hasattr(tensor, "storage")]
            self.known |= {storage._cdata for storage in inputs} - set(self.held)  # were there before
            found = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(found):
                if hasattr(tensor, "storage") and tensor.untyped_storage()._cdata not in self.known:
                    storage = tensor.untyped_storage()
                    self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.held = {key: kept for key, kept in self.held.items() if not kept[0].expired()}
            self.most = max(self.most, sum(size for _, size in self.held.values()))
            return found

    with Counting() as counting:
        work()
    return counting.most


def by_loops(asked: QueryCodes, rows, starts, lengths, scales) -> np.ndarray:
    found = np.zeros((len(asked.offsets) - 1, len(starts)))
    for i in range(len(found)):
        for t in range(asked.offsets[i], asked.offsets[i + 1]):
            for j, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                products = [
                    int(np.dot(asked.rows[t].astype(int), row.astype(int))) for row in rows[start : start + length]
                ]
                found[i, j] += max(products) * float(asked.scales[t]) * float(scales[j])
    return found


class ScanContract:
    """Subclass it with a fixture ``scan``."""

    @pytest.mark.parametrize("dim", [1, 16, 128])
    @pytest.mark.parametrize(("asked", "pages"), [([1], [1]), ([3, 1, 7], [1, 4, 2, 9]), ([2], [1] * 30)])
    def test_equals_the_loops(self, scan: CodeScan, dim: int, asked: list[int], pages: list[int]) -> None:
        made, given = queries(dim, asked, dim), codes(dim, pages, dim)
        got = scan(made, *given)
        assert got.dtype == np.float32 and got.shape == (len(asked), len(pages))
        np.testing.assert_allclose(got, by_loops(made, *given), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dim", [3, 64, 100])
    def test_single_bits_are_scanned_as_signs(self, scan: CodeScan, dim: int) -> None:
        rng = np.random.default_rng(dim)
        made = [page_code(rng.standard_normal((count, dim)), 1, bits=1) for count in (5, 1, 40)]
        rows = np.concatenate([code.rows for code in made])
        sizes = np.asarray([len(code.rows) for code in made])
        scales = np.asarray([code.scale for code in made], dtype=np.float32)
        given = np.cumsum(sizes) - sizes, sizes, scales
        asked = queries(dim, [3, 1], dim)
        got = bit_scan(scan, dim)(asked, rows, *given)
        expected = by_loops(asked, unpacked_code(rows, dim), *given)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("bits", [8, 1])
    @pytest.mark.parametrize("dim", [128, 320])
    def test_the_dims_there_are(self, scan: CodeScan, dim: int, bits: int) -> None:
        """Several queries, one beyond a block of tokens, and a filter."""
        asked = queries(dim, [25, 40, 1], dim)
        given = (codes if bits == 8 else bit_codes)(3, [5, 1, 12, 3, 27, 2, 9, 4], dim)
        ours, right = (scan, numpy_scan) if bits == 8 else (bit_scan(scan, dim), bit_scan(numpy_scan, dim))
        for some in (slice(None), slice(1, None, 3), slice(6, 7)):
            chosen = given[0], *(array[some] for array in given[1:])
            np.testing.assert_allclose(ours(asked, *chosen), right(asked, *chosen), rtol=1e-6)

    def test_wide_rows(self, scan: CodeScan) -> None:
        asked, given = queries(12, [9, 2], 640), codes(13, [2, 5], 640)
        np.testing.assert_allclose(scan(asked, *given), numpy_scan(asked, *given), rtol=1e-6)

    def test_negative_products_stay_negative(self, scan: CodeScan) -> None:
        asked = QueryCodes(np.full((1, 8), 3, np.int8), np.ones(1, np.float32), np.asarray([0, 1]))
        rows = np.full((16, 8), -2, np.int8)
        rows[8:] = -5
        one = np.asarray([0, 8]), np.asarray([8, 8]), np.asarray([1, 0.5], np.float32)
        assert scan(asked, rows, *one).tolist() == [[-48.0, -60.0]]

    def test_some_pages_of_many(self, scan: CodeScan) -> None:
        """Most of what lies in a file may be of no interest: dead, or outside a filter."""
        asked = queries(1, [5, 9], 32)
        rows, starts, lengths, scales = codes(2, np.random.default_rng(3).integers(1, 30, 400).tolist(), 32)
        everything = scan(asked, rows, starts, lengths, scales)
        for step in (1, 2, 7, 399):
            some = np.arange(0, 400, step)
            got = scan(asked, rows, starts[some], lengths[some], scales[some])
            np.testing.assert_array_equal(got, everything[:, some])

    @pytest.mark.parametrize("lengths", [[1], [2000], [700, 700, 700], [1] * 5000])
    def test_pieces_of_every_size(self, scan: CodeScan, lengths: list[int]) -> None:
        asked, given = queries(4, [20], 128), codes(5, lengths, 128)
        np.testing.assert_allclose(scan(asked, *given), numpy_scan(asked, *given), rtol=1e-6)

    def test_many_query_tokens(self, scan: CodeScan) -> None:
        asked, given = queries(6, [255, 1, 300, 40], 16), codes(7, [3, 40, 1], 16)
        products = asked.rows.astype(np.float64) @ given[0].astype(np.float64).T
        best = np.maximum.reduceat(products, given[1], axis=1) * asked.scales[:, None] * given[3]
        expected = np.add.reduceat(best, asked.offsets[:-1], axis=0)
        np.testing.assert_allclose(scan(asked, *given), expected, rtol=1e-5)

    def test_codes_in_a_mapped_file(self, scan: CodeScan, tmp_path: Path) -> None:
        asked, (rows, *where) = queries(8, [4], 16), codes(9, [2, 3], 16)
        rows.tofile(tmp_path / "codes")
        mapped = np.memmap(tmp_path / "codes", dtype=np.int8, mode="r", shape=rows.shape)
        np.testing.assert_array_equal(scan(asked, mapped, *where), scan(asked, rows, *where))


class TestNumpyScan(ScanContract):
    @pytest.fixture
    def scan(self) -> CodeScan:
        return numpy_scan


class TestTorchScan(ScanContract):
    @pytest.fixture
    def scan(self) -> CodeScan:
        pytest.importorskip("torch")
        return default_scan()

    def test_products_are_whole_numbers_where_the_processor_has_them(self, scan: CodeScan, monkeypatch) -> None:
        import torch

        asked, given = queries(10, [20, 3], 64), codes(11, [30, 2, 50], 64)
        whole = scan(asked, *given)
        monkeypatch.delattr(torch, "_int_mm")
        np.testing.assert_allclose(scan(asked, *given), whole, rtol=1e-6)


class TestTorchScanWithWorkers(TestTorchScan):
    """The same, shared out between three worker threads."""

    @pytest.fixture(autouse=True)
    def three_threads(self):
        torch = pytest.importorskip("torch")
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        yield
        torch.set_num_threads(before)


class TestDeviceScan(ScanContract):
    """The scan for GPUs, its torch lines, on the CPU."""

    @pytest.fixture
    def scan(self) -> CodeScan:
        pytest.importorskip("torch")
        from colqwen3_retrievers.vectors.kernels.gpu_scan import DeviceScan

        return DeviceScan("cpu", fused=False)

    def test_codes_are_copied_once_and_let_go_with_their_map(self, scan: CodeScan) -> None:
        asked, (rows, *where) = queries(8, [4], 16), codes(9, [2, 3], 16)
        first = scan(asked, rows, *where)
        ((_, kept),) = scan._resident.values()
        scan(asked, rows, *where)
        assert next(iter(scan._resident.values()))[1] is kept
        grown = np.concatenate([rows, rows])
        del rows
        assert not scan._resident
        np.testing.assert_array_equal(scan(asked, grown, *where), first)

    def test_single_bits_stay_packed_and_are_copied_once(self, scan: CodeScan, tmp_path: Path) -> None:
        dim, asked = 48, [np.random.default_rng(0).standard_normal((9, 48), dtype=np.float32) for _ in range(3)]
        info = EncoderInfo("ab12", "tiny", "tomoro", dim, 1, 1280, False, 1)
        rng = np.random.default_rng(1)
        vectors = [l2_normalise(rng.standard_normal((30, dim))) for _ in range(700)]
        records = [Record(Page(id=f"p{i:03d}"), MultiVector(rows)) for i, rows in enumerate(vectors)]
        copies = []

        def found(scan: CodeScan | None) -> list[list[tuple[str, float]]]:
            with EmbeddedStore(tmp_path / "bits", info=info, code_bits=1, scan=scan) as store:
                if not len(store):
                    store.add(records)
                lists = []
                for query in asked:
                    lists += store.search([l2_normalise(query)], 5)
                    copies.extend(kept[1] for kept in getattr(scan, "_resident", {}).values())
                return [[(match.record.page.id, match.score) for match in matches] for matches in lists]

        right = found(None)
        assert found(scan) == right
        assert len(copies) == len(asked) and len(set(map(id, copies))) == 1
        assert copies[0].shape == (700 * 32, dim // 8 + 1)  # packed, as in the file

    @pytest.mark.parametrize("bits", [8, 1])
    def test_memory_stays_within_its_bound(self, scan: CodeScan, bits: int, monkeypatch) -> None:
        """Pages and query tokens without number are scanned in turns."""
        from colqwen3_retrievers.vectors.kernels import gpu_scan

        dim, lengths = 64, [3, 27, 1, 9] * 15
        asked, given = queries(14, [25] * 12, dim), (codes if bits == 8 else bit_codes)(15, lengths, dim)
        ours = scan if bits == 8 else bit_scan(scan, dim)
        for step in (1, 3):  # where they lie, and gathered
            chosen = given[0], *(array[::step] for array in given[1:])
            whole = ours(asked, *chosen)
            assert most_held(lambda chosen=chosen: ours(asked, *chosen)) > 3 << 19  # what a larger bound allows
            with monkeypatch.context() as patched:
                patched.setattr(gpu_scan, "MOST_BYTES", 1 << 20)
                assert most_held(lambda chosen=chosen: ours(asked, *chosen)) <= 1 << 20
                np.testing.assert_array_equal(ours(asked, *chosen), whole)

    def test_without_a_triton_that_works_it_warns_once(self, scan: CodeScan) -> None:
        """On a CPU Triton has no driver, as it has none on a GPU where no C compiler is found."""
        from colqwen3_retrievers.vectors.kernels import gpu_scan

        asked, given = queries(1, [3], 24), codes(2, [4], 24)
        right = scan(asked, *given)
        scan.fused = None  # as where the device is CUDA and Triton is installed
        gpu_scan.fused_works.cache_clear()
        with pytest.warns(RuntimeWarning, match=r"does not work on cpu \(.+\); torch's is used"):
            np.testing.assert_array_equal(scan(asked, *given), right)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(scan(asked, *given), right)

    def test_devices_it_does_not_have(self) -> None:
        pytest.importorskip("torch")
        for device in ("gpu", "cuda:99", "meta"):
            with pytest.raises(ConfigError, match="device: "):
                device_scan(device)


def _has_cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _last_device() -> str:
    import torch

    return f"cuda:{torch.cuda.device_count() - 1}"


@pytest.mark.skipif(not _has_cuda(), reason="no CUDA device")
@pytest.mark.parametrize("fused", [False, True])
class TestCudaScan(ScanContract):
    """Both kernels on a GPU, the last of several, which is not the current one."""

    @pytest.fixture
    def scan(self, fused: bool) -> CodeScan:
        if fused:
            pytest.importorskip("triton")
        from colqwen3_retrievers.vectors.kernels.gpu_scan import DeviceScan

        return DeviceScan(_last_device(), fused=fused)

    def test_memory_stays_within_its_bound(self, scan: CodeScan) -> None:
        import torch

        from colqwen3_retrievers.vectors.kernels import gpu_scan

        asked, given = queries(14, [25] * 64, 128), codes(15, [27] * 20_000, 128)
        scan(asked, *given)
        torch.cuda.reset_peak_memory_stats(scan.device)
        before = torch.cuda.memory_allocated(scan.device)
        scan(asked, *given)
        assert torch.cuda.max_memory_allocated(scan.device) - before <= 1.1 * gpu_scan.MOST_BYTES
