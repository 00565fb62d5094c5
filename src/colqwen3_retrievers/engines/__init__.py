"""Engines: from rendered inputs to token embeddings; one folder each, with an ``engine.py``.

An engine neither renders nor normalises: both are done once, above it, for all engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from colqwen3_retrievers.errors import InputTooLongError

if TYPE_CHECKING:
    from colqwen3_retrievers.models.rendering import EncoderInput
    from colqwen3_retrievers.vectors.multi_vector import Float32


class Engine(Protocol):
    """The interface of every engine.

    Attributes:
        batch_tokens: preferred number of tokens of a call; a hint for batching.
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
        """Free its resources; further calls are errors."""
        ...


@runtime_checkable
class ConcurrentEngine(Engine, Protocol):
    """An engine that waits for other machines, so that concurrent calls of :meth:`embed` are faster.

    Attributes:
        concurrency: most calls at once, each from its own thread.
    """

    concurrency: int

    def goes_alone(self, item: EncoderInput) -> bool:
        """Return whether an input has its own call, instead of sharing one up to ``batch_tokens``."""
        ...


def check_length(item: EncoderInput, limit: int, engine: str) -> None:
    """Check that an engine accepts the length of an input.

    Args:
        item: a rendered input.
        limit: most tokens it accepts.
        engine: who accepts how many and by which option, for the error.

    Raises:
        InputTooLongError: the input has more tokens.
    """
    if len(item) > limit:
        raise InputTooLongError(f"an input has {len(item):,} tokens, {engine}", limit=limit, actual=len(item))


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's message, or its type's name without one.

    >>> first_line(ValueError("bad\nworse")), first_line(ValueError())
    ('bad', 'ValueError')
    """
    return str(error).strip().partition("\n")[0] or type(error).__name__
