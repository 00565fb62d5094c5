"""The in-process PyTorch engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
import torch

from colqwen3_retrievers.engines import first_line
from colqwen3_retrievers.engines.options import TorchOptions
from colqwen3_retrievers.engines.torch.model import ColQwen3Model, load_model
from colqwen3_retrievers.engines.torch.packed_linear import pack_linears, rounded
from colqwen3_retrievers.errors import ConfigError, EngineError
from colqwen3_retrievers.models.checkpoint import Checkpoint
from colqwen3_retrievers.models.rendering import EncoderInput
from colqwen3_retrievers.vectors.multi_vector import Float32

_BATCH_TOKENS = {"cuda": 16_384, "mps": 4_096, "cpu": 4_096}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class TorchEngine:
    """A checkpoint on one device of this process.

    Args:
        checkpoint: an opened checkpoint.
        device: ``"cuda"``, ``"cuda:1"``, ``"mps"``, ``"cpu"``; None takes the first available of cuda, mps, cpu.
        dtype: the backbone's; ``"auto"`` is bfloat16 on CUDA (float16 before Ampere) and float32 elsewhere.
        options: see :class:`TorchOptions`.

    Raises:
        ConfigError: no such device or dtype, or flash attention without its package, a CUDA device and 16 bits.
        CheckpointError: the weights do not fill the model.
        EngineError: the device does not work in this process.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, device: str | None, dtype: str = "auto", options: TorchOptions | None = None
    ) -> None:
        options = options or TorchOptions()
        self.device = torch.device(settle_device(device))
        self.dtype = _DTYPES[settle_dtype(dtype, str(self.device))]
        self.batch_tokens = options.batch_tokens or _BATCH_TOKENS.get(self.device.type, 4_096)
        self.n_halvings = 0
        self._model: ColQwen3Model | None = None
        _check_attention(options.attn_implementation, self.device, self.dtype)
        try:
            self._model = load_model(
                checkpoint, device=self.device, dtype=self.dtype, attention=options.attn_implementation
            )
        except ImportError as exc:
            raise ConfigError(f"attn_implementation {options.attn_implementation!r} is not available: {exc}") from exc
        except RuntimeError as exc:
            raise EngineError(f"{checkpoint.model} cannot be loaded on {self.device}: {first_line(exc)}") from exc
        self._rounds = self.device.type == "cpu" and pack_linears(self._model)

    def embed(self, inputs: Sequence[EncoderInput]) -> list[Float32]:
        """Encode rendered inputs; see :class:`colqwen3_retrievers.engines.Engine`.

        Inputs of similar length are batched together, and a batch with its padding stays within ``batch_tokens``. When
        memory runs out the batch is halved, and later ones start at the size that fit.

        Raises:
            EngineError: a single input does not fit, or the device failed.
        """
        results: list[Float32 | None] = [None] * len(inputs)
        by_length = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        while by_length:
            batch = self._take(by_length, inputs)
            for index, rows in zip(batch, self._forward([inputs[i] for i in batch]), strict=True):
                results[index] = rows
        return [rows for rows in results if rows is not None]

    def close(self) -> None:
        """Drop the weights."""
        self._model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _take(self, waiting: list[int], inputs: Sequence[EncoderInput]) -> list[int]:
        """Take the next batch, longest inputs first, so that memory runs out early if it does."""
        longest = len(inputs[waiting[-1]])
        count = max(1, self.batch_tokens // longest)
        batch = waiting[-count:]
        del waiting[-count:]
        return batch

    def _forward(self, inputs: list[EncoderInput]) -> list[Float32]:
        if self._model is None:
            raise EngineError("the engine is closed")
        try:
            with torch.inference_mode():
                rows = self._model([*inputs, *self._filling(inputs)]).cpu().numpy()  # one copy, one wait
            return np.split(rows, np.cumsum([len(item) for item in inputs]))[: len(inputs)]
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as exc:
            if not _is_out_of_memory(exc):
                raise EngineError(f"the model failed on {self.device}: {first_line(exc)}") from exc
            if len(inputs) == 1:
                raise EngineError(
                    f"out of memory on {self.device} with a single input of {len(inputs[0])} tokens; "
                    "lower max_visual_tokens, or choose a smaller dtype or model"
                ) from exc
        # outside the handler: the exception's traceback keeps the failed tensors alive
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(inputs) // 2
        self.n_halvings += 1
        self.batch_tokens = max(1, min(self.batch_tokens, half * max(len(item) for item in inputs)))
        return self._forward(inputs[:half]) + self._forward(inputs[half:])

    def _filling(self, inputs: list[EncoderInput]) -> list[EncoderInput]:
        """Return an extra input that rounds up the number of rows for packed layers, once for all of them."""
        count = sum(len(item) for item in inputs)
        more = rounded(count) - count if self._rounds else 0
        return [EncoderInput(True, "", np.zeros(more, dtype=np.int64), slice(0, 0))] if more else []


def settle_device(device: str | None) -> str:
    """Return the device for a requested ``device``: ``"cpu"``, ``"mps"`` or ``"cuda:N"``.

    Args:
        device: as in torch; None takes the first available of cuda, mps, cpu.

    Raises:
        ConfigError: torch has no such device.

    >>> settle_device("cpu")
    'cpu'
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        picked = torch.device(device)
    except (RuntimeError, TypeError) as exc:
        raise ConfigError(f"device {device!r}: {first_line(exc)}") from exc
    if picked.type not in _BATCH_TOKENS:
        raise ConfigError(f"device {device!r}: expected cuda, mps or cpu")
    if picked.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device {device!r}: this torch ({torch.__version__}) sees no CUDA device")
        number = torch.cuda.current_device() if picked.index is None else picked.index
        if number >= torch.cuda.device_count():
            raise ConfigError(f"device {device!r}: torch sees {torch.cuda.device_count()} CUDA devices")
        return f"cuda:{number}"
    if picked.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device {device!r}: this torch sees no MPS device")
    return picked.type


def settle_dtype(dtype: str, device: str) -> str:
    """Return the dtype of a backbone on a settled device, for a requested ``dtype``.

    Args:
        dtype: ``"auto"`` is bfloat16 on CUDA (float16 where that is emulated) and float32 elsewhere.
        device: of :func:`settle_device`.

    >>> settle_dtype("auto", "cpu")
    'float32'
    """
    if dtype != "auto":
        return dtype
    if not device.startswith("cuda"):
        return "float32"
    with torch.cuda.device(device):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def _check_attention(implementation: str, device: torch.device, dtype: torch.dtype) -> None:
    if implementation != "flash_attention_2":
        return
    wanting = [
        what
        for what, there in (
            ("the package flash-attn", importlib.util.find_spec("flash_attn") is not None),
            ("a CUDA device", device.type == "cuda"),
            ("dtype bfloat16 or float16", dtype != torch.float32),
        )
        if not there
    ]
    if wanting:
        raise ConfigError(f"attn_implementation {implementation!r} requires {', '.join(wanting)}")


def _is_out_of_memory(exc: BaseException) -> bool:
    if isinstance(exc, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(exc)  # the CPU and MPS allocators raise a bare RuntimeError
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
