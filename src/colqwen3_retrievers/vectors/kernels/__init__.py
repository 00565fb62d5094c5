"""Faster kernels of late interaction, with the scores of ``numpy_kernel``, and scans of candidates' codes.

Each function returns a kernel for ``maxsim``, or a scan for a store; only these calls import torch.
"""

from __future__ import annotations

import functools
import importlib.util

from colqwen3_retrievers.errors import require
from colqwen3_retrievers.vectors.kernels.scan import CodeScan, numpy_scan
from colqwen3_retrievers.vectors.late_interaction import Kernel, numpy_kernel


def torch_kernel(device: str = "cpu") -> Kernel:
    """Return the torch kernel for a device.

    Args:
        device: "cpu", "cuda", or "cuda:1" and so on.

    Returns:
        A kernel that may be shared between threads. On the CPU it uses ``torch.get_num_threads()`` worker threads.

    Raises:
        ConfigError: torch has no such device, or it is of another kind.
        MissingExtraError: torch is not installed.

    >>> from colqwen3_retrievers.vectors.late_interaction import maxsim
    >>> maxsim([[1.0, 0.0]], [[-0.5, 0.0]], kernel=torch_kernel("cpu")).tolist()
    [[-0.5]]
    """
    require("torch", "torch")
    from colqwen3_retrievers.vectors.kernels.torch_maxsim import TorchKernel

    return TorchKernel(device)


@functools.cache
def default_kernel() -> Kernel:
    """Return the default kernel: torch's on the CPU, or numpy's without torch.

    Besides being faster, the torch kernel does not stall when another process occupies a core, as numpy's BLAS does.

    >>> from colqwen3_retrievers.vectors.late_interaction import maxsim
    >>> maxsim([[1.0, 0.0]], [[-0.5, 0.0]], kernel=default_kernel()).tolist()
    [[-0.5]]
    """
    return torch_kernel("cpu") if importlib.util.find_spec("torch") is not None else numpy_kernel


@functools.cache
def default_scan() -> CodeScan:
    """Return the default scan of candidates' codes: torch's on the CPU, or numpy's without torch.

    >>> callable(default_scan())
    True
    """
    if importlib.util.find_spec("torch") is None:
        return numpy_scan
    from colqwen3_retrievers.vectors.kernels.torch_scan import torch_scan

    return torch_scan


def device_scan(device: str = "cuda") -> CodeScan:
    """Return a scan that keeps candidates' codes on a GPU, as they are stored: int8 or single bits.

    Uses a fused kernel where Triton is installed (``pip install "colqwen3-retrievers[gpu]"``) and finds a C compiler;
    torch's products otherwise, after a warning where Triton is installed and fails. Pass it to a store together with
    the kernel that scores candidates::

        EmbeddedStore(folder, scan=device_scan("cuda"), kernel=torch_kernel("cuda"))

    Args:
        device: "cuda", which is torch's current one, or "cuda:1" and so on.

    Raises:
        ConfigError: torch has no such device.
        MissingExtraError: torch is not installed.

    >>> device_scan("cuda:99")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: device: 'cuda:99' requested, torch sees ...
    """
    require("torch", "torch")
    from colqwen3_retrievers.vectors.kernels.gpu_scan import DeviceScan

    return DeviceScan(device)
