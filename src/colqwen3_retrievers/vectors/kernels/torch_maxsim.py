"""MaxSim in torch, on the CPU and on CUDA.

Documents are processed in chunks. On the CPU a chunk fits a core's cache, and chunks go to workers of one intra-op
thread each: OpenMP's own threads wait for one another at every operation, which stretches a 100 ms scan to seconds as
soon as another process occupies a core. On CUDA a chunk is a pinned, asynchronous copy in the stream that
compares it: nothing waits for the device before the scores are read, so the host copies the next chunk into pinned
memory while the device copies and compares this one.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.fork import ForkSafeLock, after_fork
from colqwen3_retrievers.vectors.kernels.torch_settings import exact_matmul
from colqwen3_retrievers.vectors.late_interaction import CPU_CHUNK_BYTES, CPU_TILE, chunk_bounds
from colqwen3_retrievers.vectors.multi_vector import Float32, PackedEmbeddings

_CUDA_CHUNK_BYTES = 1 << 26  # of document tokens in float32: some hundred pages a launch
_CUDA_TILE = 1 << 24  # similarities held at a time, 64 MB


class TorchKernel:
    """Computes MaxSim in torch; see :func:`colqwen3_retrievers.vectors.kernels.torch_kernel`.

    Similarities are float32 from float32 or float16 storage: TF32 and bfloat16 products, which a process may have
    enabled (``torch.set_float32_matmul_precision``, ``torch.autocast``), are disabled during the call.

    Args:
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: torch has no such device, or it is of another kind.

    >>> pack = PackedEmbeddings.pack
    >>> TorchKernel()(pack([[[1.0, 0.0]]]), pack([[[0.5, 0.0]], [[-0.5, 0.0], [-1.0, 0.0]]])).tolist()
    [[0.5, -0.5]]
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = cpu_or_cuda(device)
        cuda = self.device.type == "cuda"
        self._chunk_bytes, self._tile = (_CUDA_CHUNK_BYTES, _CUDA_TILE) if cuda else (CPU_CHUNK_BYTES, CPU_TILE)

    def __repr__(self) -> str:
        return f"TorchKernel({str(self.device)!r})"

    def __call__(self, queries: PackedEmbeddings, documents: PackedEmbeddings, /) -> Float32:
        """Score every query against every document; see :class:`~colqwen3_retrievers.vectors.late_interaction.Kernel`.

        Args:
            queries: at least one, float32 or float16.
            documents: at least one, of the same dim, float32 or float16, in memory or memory-mapped.

        Returns:
            float32 (n_queries, n_documents), sums over query tokens.
        """
        tokens = as_tensor(queries.vectors).to(self.device).float()
        owners = as_tensor(np.repeat(np.arange(len(queries)), queries.lengths)).to(self.device)
        scores = torch.empty((len(documents), len(queries)), dtype=torch.float32, device=self.device)
        vectors = as_tensor(documents.vectors)
        bounds = chunk_bounds(documents.offsets, max(1, self._chunk_bytes // (4 * queries.dim)))
        cursor = itertools.count()

        def work() -> None:
            with torch.autocast(self.device.type, enabled=False):  # a setting of each thread
                while (i := next(cursor)) < len(bounds) - 1:
                    first, last = bounds[i], bounds[i + 1]
                    offsets = documents.offsets[first : last + 1]
                    chunk = self._move(vectors[int(offsets[0]) : int(offsets[-1])]).float()
                    lengths = self._move(torch.from_numpy(np.diff(offsets)))
                    scores[first:last] = self._sums(tokens, owners, len(queries), chunk, lengths)

        with exact_matmul:
            if self.device.type == "cpu" and torch.get_num_threads() > 1:
                run_in_workers(work, len(bounds) - 1)
            else:
                work()
            return np.ascontiguousarray(scores.cpu().numpy().T)

    def _sums(
        self, tokens: torch.Tensor, owners: torch.Tensor, n_queries: int, chunk: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return the scores of one chunk: float64 (documents, queries), on the device, without waiting for it."""
        n_documents = len(lengths)
        documents = torch.arange(n_documents, device=self.device)
        document = torch.repeat_interleave(documents, lengths, output_size=len(chunk))[:, None]
        sums = torch.zeros((n_documents, n_queries), dtype=torch.float64, device=self.device)
        rows = max(1, self._tile // len(chunk))
        for row in range(0, len(tokens), rows):
            tile = tokens[row : row + rows]
            best = torch.full((n_documents, len(tile)), -torch.inf, dtype=torch.float32, device=self.device)
            best.scatter_reduce_(0, document.expand(-1, len(tile)), chunk @ tile.T, "amax")
            sums.index_add_(1, owners[row : row + rows], best.double())
        return sums

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a chunk to the device; on CUDA without waiting, in the stream.

        torch's pinned allocator reuses a buffer only after the copy that reads it has finished.
        """
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


def cpu_or_cuda(device: str) -> torch.device:
    """Return a CPU or CUDA device that torch has.

    Raises:
        ConfigError: torch has no such device, or it is of another kind.

    >>> cpu_or_cuda("cpu")
    device(type='cpu')
    """
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as exc:
        raise ConfigError(f"device: torch knows no {device!r}") from exc
    if parsed.type not in ("cpu", "cuda"):
        raise ConfigError(f'device: expected "cpu" or "cuda", got {device!r}')
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {device!r} requested, torch sees {torch.cuda.device_count()} CUDA devices")
    return parsed


def run_in_workers(work: Callable[[], None], n_pieces: int) -> None:
    """Run ``work`` in one-thread workers at once, as many as torch has threads and there are pieces of work.

    Raises:
        Exception: what ``work`` raised in any of them.
    """
    n_workers = torch.get_num_threads()
    pool = shared_workers(n_workers)
    for future in [pool.submit(work) for _ in range(min(n_workers, n_pieces))]:
        future.result()


_shared_workers: tuple[int, ThreadPoolExecutor] | None = None


@after_fork
def _forget_workers() -> None:
    global _shared_workers
    _shared_workers = None


def shared_workers(n_workers: int) -> ThreadPoolExecutor:
    """Return at least ``n_workers`` one-thread workers, the same for all kernels of the process.

    They are replaced when more are needed, and in a forked child.
    """
    global _shared_workers
    shared = _shared_workers  # no lock: at worst two threads start workers
    if shared is None or shared[0] < n_workers:
        shared = _shared_workers = (n_workers, _one_thread_workers(n_workers))
    return shared[1]


_one_thread_lock = ForkSafeLock()


def _one_thread_workers(n_workers: int) -> ThreadPoolExecutor:
    """Start worker threads of one intra-op thread each; all are ready when this returns."""
    pool = ThreadPoolExecutor(n_workers, thread_name_prefix="maxsim", initializer=_use_one_thread)
    ready = threading.Barrier(n_workers)
    for future in [pool.submit(ready.wait) for _ in range(n_workers)]:
        future.result()
    return pool


def _use_one_thread() -> None:
    """Set one intra-op thread for the calling thread, and for no other.

    ``torch.set_num_threads`` sets the calling thread's number and the default of later threads. A thread started for it
    restores the default at once. torch has no call that sets the first alone: a thread that first uses torch within
    those microseconds has one intra-op thread, too.
    """
    with _one_thread_lock:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        restore = threading.Thread(target=torch.set_num_threads, args=(before,))
        restore.start()
        restore.join()


class _Alias:
    """An array's memory, declared writable.

    torch warns about read-only arrays, such as those of a file mapped for reading; nothing here writes to a document.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self.array = array  # numpy keeps this object, and with it the memory, as the base of the alias


def as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """Return an array as a CPU tensor, on the same memory where it is contiguous."""
    contiguous = np.ascontiguousarray(array)
    return torch.from_numpy(contiguous if contiguous.flags.writeable else np.asarray(_Alias(contiguous)))
