"""Frozen options of the engines: settings of a machine, which never change what an embedding means."""

from __future__ import annotations

from dataclasses import dataclass

from colqwen3_retrievers.checks import seconds, whole_number
from colqwen3_retrievers.errors import ConfigError

_PROMPT_TOKENS = 32  # more than any family's prompt around a page
_ROOM_FOR_TEXT = 8_192


@dataclass(frozen=True, slots=True)
class TorchOptions:
    """Options of the in-process PyTorch engine.

    Attributes:
        attn_implementation: ``"sdpa"``, ``"flash_attention_2"`` (needs its package and a GPU) or ``"eager"``.
        batch_tokens: most tokens, padding included, in one forward pass; None chooses by device. Lower values take less
            memory; when memory runs out, the batch is halved.

    Raises:
        ConfigError: a number below 1.

    >>> TorchOptions(batch_tokens=8192).batch_tokens
    8192
    """

    attn_implementation: str = "sdpa"
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.attn_implementation not in ("sdpa", "flash_attention_2", "eager"):
            raise ConfigError(
                f"attn_implementation {self.attn_implementation!r}: expected sdpa, flash_attention_2 or eager"
            )
        if self.batch_tokens is not None:
            whole_number(self.batch_tokens, "batch_tokens", least=1)


@dataclass(frozen=True, slots=True)
class VLLMOptions:
    """Options of vLLM in this process.

    Attributes:
        gpu_memory_utilization: share of a GPU's memory that vLLM may take, above 0 and at most 1.
        tensor_parallel_size: GPUs the model is split over.
        max_model_len: most tokens of one input; None takes what the largest page needs, and room for a text of about
            8,000 tokens, beside it or alone.
        enforce_eager: whether to disable CUDA graphs, which take time and memory to capture.
        batch_tokens: tokens passed to vLLM at once, a hint for batching; vLLM schedules them itself.

    Raises:
        ConfigError: a number out of its range.

    >>> VLLMOptions(gpu_memory_utilization=0.5).tensor_parallel_size
    1
    """

    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    enforce_eager: bool = False
    batch_tokens: int = 32_768

    def __post_init__(self) -> None:
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization: expected a number above 0 and at most 1, got {share!r}")
        if self.max_model_len is not None:
            whole_number(self.max_model_len, "max_model_len", least=1)
        for name in ("tensor_parallel_size", "batch_tokens"):
            whole_number(getattr(self, name), name, least=1)

    def context_length(self, native: int, visual_tokens: int) -> int:
        """Return the most tokens of one input; vLLM reserves memory for that many, so it is rarely the model's limit.

        Args:
            native: most tokens of the checkpoint.
            visual_tokens: most visual tokens of a page.

        Raises:
            ConfigError: ``max_model_len`` is beyond the checkpoint, or too small for a page.

        >>> VLLMOptions().context_length(262_144, 1280)
        9472
        """
        page = visual_tokens + _PROMPT_TOKENS
        if self.max_model_len is None:
            return min(native, visual_tokens + _ROOM_FOR_TEXT)
        if self.max_model_len > native:
            raise ConfigError(f"max_model_len {self.max_model_len}: the model reads at most {native} tokens")
        if self.max_model_len < page:
            raise ConfigError(
                f"max_model_len {self.max_model_len}: a page takes up to {page} tokens; raise it, or lower "
                "max_visual_tokens"
            )
        return self.max_model_len


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Options of the client of vLLM servers.

    Attributes:
        timeout: seconds a request may take in all: connecting, sending, the last byte, and all further attempts.
        connect_timeout: seconds of one attempt to reach a server.
        concurrency: concurrent requests, over all servers; a quarter of them are reserved for queries.
        retries: further attempts after connection errors, 429 and 5xx; other responses are not retried.
        served_model: the server's name of the model; None takes the only one it serves.
        embed_dtype: of token embeddings on the wire: ``"float16"``, or ``"float32"`` at twice the bytes.
        check_weights: whether one token's embedding is computed from the checkpoint's own weights and compared, which
            detects a dropped bias and another model. None does it when that reads at most 1 GiB, and warns otherwise;
            True at any size (a second or two a GB); False does neither.

    Raises:
        ConfigError: a value out of its range.

    >>> ServerOptions(timeout=30).retries
    4
    """

    timeout: float = 120.0
    connect_timeout: float = 5.0
    concurrency: int = 32
    retries: int = 4
    served_model: str | None = None
    embed_dtype: str = "float16"
    check_weights: bool | None = None

    def __post_init__(self) -> None:
        seconds(self.timeout, "timeout")
        seconds(self.connect_timeout, "connect_timeout")
        whole_number(self.concurrency, "concurrency", least=1)
        whole_number(self.retries, "retries")
        if not isinstance(self.served_model, str | None) or self.served_model == "":
            raise ConfigError(f"served_model: expected a name, got {self.served_model!r}")
        if self.embed_dtype not in ("float16", "float32"):
            raise ConfigError(f"embed_dtype {self.embed_dtype!r}: expected float16 or float32")
        if not isinstance(self.check_weights, bool | None):
            raise ConfigError(f"check_weights: expected True, False or None, got {self.check_weights!r}")


EngineOptions = TorchOptions | VLLMOptions | ServerOptions
"""Options of any engine."""
