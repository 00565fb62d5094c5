"""What every kernel of MaxSim must do, as one class that each kernel subclasses."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.vectors.kernels import torch_kernel
from colqwen3_retrievers.vectors.late_interaction import Kernel, maxsim, numpy_kernel
from colqwen3_retrievers.vectors.multi_vector import PackedEmbeddings


def unit_rows(rng: np.random.Generator, n: int, dim: int) -> np.ndarray:
    rows = rng.standard_normal((n, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def pack(rng: np.random.Generator, lengths: list[int], dim: int, dtype: str = "float32") -> PackedEmbeddings:
    return PackedEmbeddings.pack([unit_rows(rng, n, dim) for n in lengths], dtype=dtype)


def triple_loop(queries: PackedEmbeddings, documents: PackedEmbeddings) -> np.ndarray:
    """Query by query, token by token, document token by document token, in float64."""
    scores = np.zeros((len(queries), len(documents)))
    for i, query in enumerate(queries):
        for j, document in enumerate(documents):
            for token in query.astype(np.float64):
                best = -np.inf
                for other in document.astype(np.float64):
                    best = max(best, float(token @ other))
                scores[i, j] += best
    return scores


SHAPES = [  # dim, query lengths, document lengths
    (1, [1], [1]),
    (16, [1], [300]),
    (16, [7, 1, 12], [1, 1, 1]),
    (128, [25, 3], [1, 300, 2, 64]),
    (320, [5], [40, 1, 121]),
]


class KernelContract:
    """Subclass it with a fixture ``kernel``."""

    @pytest.mark.parametrize(("dim", "queries", "documents"), SHAPES, ids=[f"dim{shape[0]}" for shape in SHAPES])
    @pytest.mark.parametrize("query_dtype", ["float32", "float16"])
    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_equals_the_triple_loop(self, kernel: Kernel, dim, queries, documents, query_dtype, dtype) -> None:
        rng = np.random.default_rng(dim)
        packed_queries, packed = pack(rng, queries, dim, query_dtype), pack(rng, documents, dim, dtype)
        scores = kernel(packed_queries, packed)
        assert scores.dtype == np.float32
        assert scores.shape == (len(queries), len(documents))
        expected = triple_loop(packed_queries, packed)
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6 * max(queries))
        for mode, divisor in (("sum", 1), ("mean", np.array(queries)[:, None])):
            got = maxsim(packed_queries, packed, mode=mode, kernel=kernel)
            np.testing.assert_allclose(got, expected / divisor, rtol=0, atol=1e-6 * max(queries))

    def test_negative_similarities_stay_negative(self, kernel: Kernel) -> None:
        query = PackedEmbeddings.pack([[[1.0, 0.0]]])
        documents = PackedEmbeddings.pack([[[-0.5, 0.3]], [[-0.4, 0.1], [-0.9, 0.0], [-0.7, 0.0]]])
        np.testing.assert_allclose(kernel(query, documents), [[-0.5, -0.4]], atol=1e-7)

    @pytest.mark.parametrize("length", [1, 1023, 1024, 1025, 5000])
    def test_chunk_boundaries(self, kernel: Kernel, length: int) -> None:
        """Documents of about a chunk: a chunk at dim 512 is 1024 tokens on the CPU."""
        rng = np.random.default_rng(length)
        queries, documents = pack(rng, [3, 2], 512), pack(rng, [length, 1, length, 2, 1022], 512)
        one_by_one = [kernel(queries, PackedEmbeddings.pack([document])) for document in documents]
        np.testing.assert_allclose(kernel(queries, documents), np.concatenate(one_by_one, axis=1), rtol=1e-6, atol=1e-6)
        plain = [[(q @ d.T).max(axis=1).sum() for d in documents] for q in queries]
        np.testing.assert_allclose(kernel(queries, documents), plain, rtol=1e-5, atol=1e-5)

    def test_more_query_tokens_than_a_tile_holds(self, kernel: Kernel) -> None:
        rng = np.random.default_rng(0)
        lengths = [700, 1, 900, 30, 2000, 5]
        queries, documents = pack(rng, lengths, 16), pack(rng, [3000, 1, 700, 9000], 16)
        expected = [[(q.astype(float) @ d.T.astype(float)).max(axis=1).sum() for d in documents] for q in queries]
        np.testing.assert_allclose(kernel(queries, documents), expected, rtol=1e-6)

    def test_many_documents(self, kernel: Kernel) -> None:
        rng = np.random.default_rng(1)
        queries, documents = pack(rng, [4, 9], 64), pack(rng, rng.integers(1, 400, 500).tolist(), 64, "float16")
        expected = [[(q @ d.T.astype(np.float32)).max(axis=1).sum() for d in documents] for q in queries]
        np.testing.assert_allclose(kernel(queries, documents), expected, rtol=1e-5, atol=1e-6)

    def test_float16_is_compared_in_float32(self, kernel: Kernel) -> None:
        """The sum of 2048 and 1 is 2048 in float16."""
        query = PackedEmbeddings.pack([[[1.0, 1.0]]], dtype=np.float16)
        document = PackedEmbeddings.pack([[[2048.0, 1.0]]], dtype=np.float16)
        assert kernel(query, document).tolist() == [[2049.0]]

    def test_same_scores_however_documents_are_packed(self, kernel: Kernel) -> None:
        rng = np.random.default_rng(2)
        queries, documents = pack(rng, [20, 11], 128), pack(rng, rng.integers(1, 300, 60).tolist(), 128)
        whole = maxsim(queries, documents, kernel=kernel)
        for size in (1, 7, 59):
            groups = [list(documents)[i : i + size] for i in range(0, 60, size)]
            parts = [maxsim(queries, PackedEmbeddings.pack(group), kernel=kernel) for group in groups]
            np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-6, atol=1e-6)

    def test_read_only_memory_mapped_and_strided_documents(self, kernel: Kernel, tmp_path: Path) -> None:
        rng = np.random.default_rng(4)
        queries, documents = pack(rng, [20], 32), pack(rng, [5, 1, 30], 32, "float16")
        documents.vectors.tofile(tmp_path / "tokens")
        mapped = np.memmap(tmp_path / "tokens", dtype=np.float16, mode="r", shape=documents.vectors.shape)
        expected = kernel(queries, documents)
        assert np.array_equal(kernel(queries, PackedEmbeddings(mapped, documents.offsets)), expected)
        wide = np.repeat(documents.vectors, 2, axis=1)[:, ::2]
        assert np.array_equal(kernel(queries, PackedEmbeddings(wide, documents.offsets)), expected)
        backwards = documents.vectors[:, ::-1].copy()[:, ::-1]
        assert np.array_equal(kernel(queries, PackedEmbeddings(backwards, documents.offsets)), expected)

    def test_inputs_are_not_changed(self, kernel: Kernel) -> None:
        rng = np.random.default_rng(5)
        queries, documents = pack(rng, [20], 32), pack(rng, [5, 1, 30], 32)
        before = queries.vectors.copy(), documents.vectors.copy()
        kernel(queries, documents)
        assert np.array_equal(queries.vectors, before[0])
        assert np.array_equal(documents.vectors, before[1])

    def test_nan_is_refused(self, kernel: Kernel) -> None:
        vectors = np.ones((6, 4), dtype=np.float32)
        vectors[3, 1] = np.nan
        documents = PackedEmbeddings(vectors, [0, 1, 2, 5, 6])
        with pytest.raises(ConfigError, match="query 0 against document 2: NaN or infinity"):
            maxsim(np.ones((1, 4), dtype=np.float32), documents, kernel=kernel)

    def test_shared_between_threads(self, kernel: Kernel) -> None:
        rng = np.random.default_rng(6)
        queries = [pack(rng, [n], 64) for n in range(1, 9)]
        documents = pack(rng, rng.integers(1, 400, 60).tolist(), 64)
        alone = [kernel(query, documents) for query in queries]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda query: kernel(query, documents), queries))
        for one, other in zip(alone, together, strict=True):
            assert np.array_equal(one, other)


class TestNumpyKernel(KernelContract):
    @pytest.fixture
    def kernel(self) -> Kernel:
        return numpy_kernel


class TorchContract(KernelContract):
    """What concerns torch's settings; a subclass names the device."""

    device = "cpu"

    @pytest.fixture
    def kernel(self) -> Kernel:
        pytest.importorskip("torch")
        return torch_kernel(self.device)

    @pytest.fixture
    def exact(self) -> tuple[PackedEmbeddings, PackedEmbeddings, np.ndarray]:
        rng = np.random.default_rng(7)
        queries, documents = pack(rng, [64], 128), pack(rng, [700] * 8, 128)
        expected = [[(q.astype(float) @ d.T.astype(float)).max(axis=1).sum() for d in documents] for q in queries]
        return queries, documents, np.array(expected)

    @pytest.mark.parametrize("precision", ["high", "medium"])
    def test_exact_where_reduced_products_are_allowed(self, kernel: Kernel, exact, precision: str) -> None:
        import torch

        queries, documents, expected = exact
        torch.set_float32_matmul_precision(precision)
        try:
            np.testing.assert_allclose(kernel(queries, documents), expected, rtol=1e-6)
            assert torch.get_float32_matmul_precision() == precision
        finally:
            torch.set_float32_matmul_precision("highest")

    def test_exact_where_the_newer_interface_allows_reduced_products(self, kernel: Kernel, exact) -> None:
        import torch

        backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
        if not all(hasattr(backend, "fp32_precision") for backend in backends):
            pytest.skip("this torch has the older interface only")
        queries, documents, expected = exact
        try:
            for backend, value in zip(backends, ("tf32", "bf16"), strict=True):
                backend.fp32_precision = value
            np.testing.assert_allclose(kernel(queries, documents), expected, rtol=1e-6)
            assert [backend.fp32_precision for backend in backends] == ["tf32", "bf16"]
        finally:
            for backend in backends:
                backend.fp32_precision = "ieee"
            torch.set_float32_matmul_precision("highest")

    def test_precision_is_put_back_after_an_error(self, kernel: Kernel, exact) -> None:
        import torch

        queries, _, _ = exact
        torch.set_float32_matmul_precision("high")
        try:
            with pytest.raises(RuntimeError):
                kernel(queries, PackedEmbeddings.pack([[[1.0]]]))
            assert torch.get_float32_matmul_precision() == "high"
        finally:
            torch.set_float32_matmul_precision("highest")

    def test_exact_inside_autocast(self, kernel: Kernel, exact) -> None:
        import torch

        queries, documents, expected = exact
        before = torch.get_num_threads()
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                with torch.autocast(self.device, dtype=torch.bfloat16):
                    np.testing.assert_allclose(kernel(queries, documents), expected, rtol=1e-6)
        finally:
            torch.set_num_threads(before)

    def test_leaves_thread_numbers_alone(self, exact) -> None:
        torch = pytest.importorskip("torch")
        queries, documents, expected = exact
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            seen: list[int] = []
            for _ in range(20):
                np.testing.assert_allclose(torch_kernel(self.device)(queries, documents), expected, rtol=1e-6)
                thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
                thread.start()
                thread.join()
            assert seen == [3] * 20
            assert torch.get_num_threads() == 3
        finally:
            torch.set_num_threads(before)


class TestTorchCPUKernel(TorchContract):
    def test_workers_use_one_thread_each(self) -> None:
        torch = pytest.importorskip("torch")
        from colqwen3_retrievers.vectors.kernels.torch_maxsim import shared_workers

        before = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            pool = shared_workers(3)
            assert shared_workers(2) is shared_workers(3) is pool
            barrier = threading.Barrier(3, timeout=60)

            def seen() -> int:
                barrier.wait()
                return torch.get_num_threads()

            assert [future.result() for future in [pool.submit(seen) for _ in range(3)]] == [1, 1, 1]
        finally:
            torch.set_num_threads(before)

    @pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", ""])
    def test_device_it_does_not_have(self, device: str) -> None:
        pytest.importorskip("torch")
        with pytest.raises(ConfigError, match="device: "):
            torch_kernel(device)

    def test_says_where_it_computes(self) -> None:
        pytest.importorskip("torch")
        assert repr(torch_kernel("cpu")) == "TorchKernel('cpu')"


class TestTorchCPUKernelWithWorkers(TorchContract):
    """The same, shared out between three worker threads whatever the machine."""

    @pytest.fixture(autouse=True)
    def three_threads(self) -> Iterator[None]:
        torch = pytest.importorskip("torch")
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        yield
        torch.set_num_threads(before)

    def test_an_error_of_a_worker_is_raised(self, kernel: Kernel) -> None:
        with pytest.raises(RuntimeError, match="shape"):
            kernel(PackedEmbeddings.pack([np.ones((1, 2))]), PackedEmbeddings.pack([np.ones((5000, 3))] * 200))

    def test_a_forked_child_gets_its_own_workers(self) -> None:
        code = """
import os, warnings
import numpy as np, torch
from colqwen3_retrievers.vectors.multi_vector import PackedEmbeddings
from colqwen3_retrievers.vectors.kernels import torch_kernel
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork beside threads
torch.set_num_threads(2)
kernel, documents = torch_kernel("cpu"), PackedEmbeddings.pack([np.eye(4)] * 9)
kernel(documents, documents)
child = os.fork()
if child == 0:
    os._exit(7 if (kernel(documents, documents) == 4).all() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
        if not hasattr(os, "fork"):
            pytest.skip("no fork here")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout.strip() == "7", done.stderr


def _has_cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


@pytest.mark.skipif(not _has_cuda(), reason="no CUDA device")
class TestTorchCUDAKernel(TorchContract):
    device = "cuda"
