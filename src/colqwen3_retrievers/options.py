"""Options of the engines, frozen: what differs between machines and never changes an embedding's meaning."""

from __future__ import annotations

from dataclasses import dataclass

from colqwen3_retrievers.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TorchOptions:
    """Options of the in-process PyTorch engine.

    Attributes:
        attn_implementation: ``"sdpa"``, ``"flash_attention_2"`` (needs its package and a GPU) or ``"eager"``.
        batch_tokens: most tokens, padding included, in one forward pass; None chooses by device. Less memory when
            lower. Out of memory halves a batch and goes on.

    Raises:
        ConfigError: a number below 1.

    >>> TorchOptions(batch_tokens=8192).batch_tokens
    8192
    """

    attn_implementation: str = "sdpa"
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.attn_implementation not in ("sdpa", "flash_attention_2", "eager"):
            raise ConfigError(
                f"attn_implementation {self.attn_implementation!r}: expected sdpa, flash_attention_2 or eager"
            )
        value = self.batch_tokens
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"batch_tokens: expected an integer from 1, got {value!r}")
