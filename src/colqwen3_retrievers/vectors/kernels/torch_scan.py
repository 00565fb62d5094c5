"""The candidate scan in torch on the CPU: int8 products by ``torch._int_mm``, a piece of the codes for each core.

Without AVX-512 VNNI and AMX, or without ``_int_mm`` in torch, products are float32.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray

from colqwen3_retrievers.vectors.codes import BLOCK, Int8, QueryCodes
from colqwen3_retrievers.vectors.kernels.scan import cut_out, pieces, sum_up
from colqwen3_retrievers.vectors.kernels.torch_maxsim import as_tensor, run_in_workers
from colqwen3_retrievers.vectors.multi_vector import Float32

_MOST_TOKENS = 256  # query tokens compared at a time: more would evict the codes from the cache


def torch_scan(
    queries: QueryCodes, rows: Int8, starts: NDArray[np.int64], lengths: NDArray[np.int64], scales: Float32, /
) -> Float32:
    """Scan on the CPU; see :class:`~colqwen3_retrievers.vectors.kernels.scan.CodeScan`.

    Works in as many threads as ``torch.get_num_threads()``, one intra-op thread each.

    >>> from colqwen3_retrievers.vectors.codes import page_code, query_codes
    >>> from colqwen3_retrievers.vectors.multi_vector import PackedEmbeddings
    >>> code = page_code([[1.0, 0.0]], 3)
    >>> query = query_codes(PackedEmbeddings.pack([[[0.8, 0.6]]]))
    >>> one = np.asarray([0]), np.asarray([8]), np.asarray([code.scale], dtype=np.float32)
    >>> torch_scan(query, code.rows, *one).round(2).tolist()
    [[0.800000011920929]]
    """
    scores = np.empty((len(queries.offsets) - 1, len(starts)), dtype=np.float32)
    integers = hasattr(torch, "_int_mm") and torch.cpu._is_vnni_supported()
    multiply = torch._int_mm if integers else torch.mm
    tokens = as_tensor(queries.rows) if integers else as_tensor(queries.rows).float()
    columns = [tokens[at : at + _MOST_TOKENS].T.contiguous() for at in range(0, len(tokens), _MOST_TOKENS)]
    work = list(pieces(lengths, rows.shape[1], min(len(tokens), _MOST_TOKENS)))
    cursor = itertools.count()

    def scan() -> None:
        while (turn := next(cursor)) < len(work):
            first, last = work[turn]
            chunk, begins, ends = cut_out(rows, starts[first:last], lengths[first:last])
            tensor = as_tensor(chunk) if integers else as_tensor(chunk).float()
            blocks = [multiply(tensor, part).view(-1, BLOCK, part.shape[1]).amax(1) for part in columns]
            joined = (blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)).numpy()
            scores[:, first:last] = sum_up(joined, begins, ends, queries, scales[first:last])

    if min(torch.get_num_threads(), len(work)) > 1:
        run_in_workers(scan, len(work))
    else:
        scan()
    return scores
