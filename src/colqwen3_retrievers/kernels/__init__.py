"""Faster kernels of late interaction: same scores as :func:`~colqwen3_retrievers.late_interaction.numpy_kernel`.

Each function here makes a :class:`~colqwen3_retrievers.late_interaction.Kernel`, to be handed to ``maxsim`` and
``top_k``; nothing is registered and nothing heavy is imported before one is asked for.
"""

from __future__ import annotations

from colqwen3_retrievers.errors import require
from colqwen3_retrievers.late_interaction import Kernel


def torch_kernel(device: str = "cpu") -> Kernel:
    """Make the torch kernel for a device.

    Args:
        device: "cpu", "cuda", or "cuda:1" and so on.

    Returns:
        A kernel that may be kept and shared between threads. On the CPU it keeps as many worker threads as
        ``torch.get_num_threads()``.

    Raises:
        ConfigError: torch has no such device, or it is of another kind.
        MissingExtraError: torch is not installed.

    >>> from colqwen3_retrievers.late_interaction import maxsim
    >>> maxsim([[1.0, 0.0]], [[-0.5, 0.0]], kernel=torch_kernel("cpu")).tolist()
    [[-0.5]]
    """
    require("torch", "torch")
    from colqwen3_retrievers.kernels.torch import TorchKernel  # torch is imported only when asked for

    return TorchKernel(device)
