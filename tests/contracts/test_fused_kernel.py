"""The fused kernel in Triton's interpreter, which needs no GPU: it must find what NumPy finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_fused_kernel_in_the_interpreter() -> None:
    """Triton reads its variable when it is imported, hence another process."""
    code = """
import numpy as np
from colqwen3_retrievers.kernels.gpu_scan import DeviceScan
from colqwen3_retrievers.kernels.scan import numpy_scan
from tests.contracts.test_scans import codes, queries

scan = DeviceScan("cpu", fused=True)
shapes = (1, [1], [1]), (16, [3, 1, 7], [1, 4, 2, 9]), (128, [25, 40], [5, 1, 12]), (320, [33], [2, 8])
for dim, asked, pages in shapes:
    made, given = queries(dim, asked, dim), codes(dim, pages, dim)
    np.testing.assert_allclose(scan(made, *given), numpy_scan(made, *given), rtol=1e-6)
    some = [given[0], *(array[::2] for array in given[1:])]
    np.testing.assert_allclose(scan(made, *some), numpy_scan(made, *some), rtol=1e-6)
print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200,
        cwd=Path(__file__).parents[2], env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "."},
    )  # fmt: skip
    assert done.stdout == "same\n", done.stderr[-2000:]
