"""Engines: rendered inputs in, token embeddings out; one file each, alike from outside.

An engine has two methods and one number, see :class:`Engine`. It neither renders nor normalises: that is done once,
above it, for all engines alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from colqwen3_retrievers.models.rendering import EncoderInput
    from colqwen3_retrievers.vectors.multi_vector import Float32


class Engine(Protocol):
    """What every engine does.

    Attributes:
        batch_tokens: tokens it likes to be handed at once; a hint for whoever gathers callers.
    """

    batch_tokens: int

    def embed(self, inputs: Sequence[EncoderInput]) -> list[Float32]:
        """Encode rendered inputs.

        Args:
            inputs: queries and documents of any lengths, mixed.

        Returns:
            For each input in order, float32 (n_tokens, full dim), one row a token, no padding; rows may be unit.

        Raises:
            EngineError: it could not compute.
        """
        ...

    def close(self) -> None:
        """Give back what it holds; further calls are errors."""
        ...


@runtime_checkable
class ConcurrentEngine(Engine, Protocol):
    """An engine that waits for other machines, and is kept busy by several calls of :meth:`embed` at once.

    Attributes:
        concurrency: calls under way at once, each from a thread of its own.
    """

    concurrency: int

    def goes_alone(self, item: EncoderInput) -> bool:
        """Say whether an input has a call of its own, instead of sharing one with others up to ``batch_tokens``."""
        ...
