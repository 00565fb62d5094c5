"""Checks of arguments that every folder needs, each written once."""

from __future__ import annotations

import operator

from colqwen3_retrievers.errors import ConfigError

_MOST_SECONDS = 10**9


def whole_number(value: object, name: str, *, least: int = 0, most: int | None = None) -> int:
    """Return a whole number within its range.

    Args:
        value: an int, or what acts as one, such as a numpy integer; a bool is none.
        name: of the argument, for the error.
        least: the smallest value allowed.
        most: the largest, or None for no bound.

    Raises:
        ConfigError: it is no whole number, or out of range.

    >>> whole_number(3, "k", least=1)
    3
    >>> whole_number(True, "rows", least=1, most=1024)
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: rows: expected a whole number from 1 to 1,024, got True
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]  # may be anything
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        bounds = f"from {least:,}" if most is None else f"from {least:,} to {most:,}"
        raise ConfigError(f"{name}: expected a whole number {bounds}, got {value!r}")
    return number


def seconds(value: object, name: str) -> float:
    """Return a time limit: above 0, and at most a thousand million seconds, which clocks and sockets take.

    Args:
        value: an int or a float.
        name: of the argument, for the error.

    Raises:
        ConfigError: it is no number, or out of range.

    >>> seconds(30, "timeout")
    30
    >>> seconds(float("inf"), "timeout")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: timeout: expected seconds above 0, at most 1,000,000,000, got inf
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MOST_SECONDS:
        raise ConfigError(f"{name}: expected seconds above 0, at most {_MOST_SECONDS:,}, got {value!r}")
    return value
