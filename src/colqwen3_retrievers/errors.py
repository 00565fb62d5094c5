"""Every error this library raises on purpose, and the one way to ask for an optional dependency.

The tree (built-in bases in brackets, so that ``except ValueError`` keeps working)::

    ColQwen3Error
    ├─ ConfigError [ValueError]            an argument, a setting or an input that cannot be used
    │  └─ DimensionError                   .expected .actual
    ├─ MissingExtraError [ImportError]     .extra; the message is the pip line
    ├─ CheckpointError                     .missing .unexpected
    ├─ EncodeError                         .index and .name of the bad input, .message
    │  └─ InputTooLongError                .limit .actual, in tokens
    ├─ EngineError                         .retryable
    │  ├─ EngineTimeoutError
    │  └─ EngineResponseError              .status_code
    ├─ StoreError                          .absent: nothing is stored there yet
    │  ├─ StoreMismatchError
    │  └─ StoreUnavailableError
    └─ PageError                           .source .page .message

Errors of other libraries are mapped at the border with ``raise ... from exc``; their text stays in ``__cause__``.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Self


class ColQwen3Error(Exception):
    """Base of every error of this library.

    >>> issubclass(ConfigError, ColQwen3Error) and issubclass(ConfigError, ValueError)
    True
    """

    def copy(self) -> Self:
        """Return the same error as a new object, so that two who wait for one thing do not share a traceback.

        >>> EngineError("gone", retryable=True).copy().retryable
        True
        """
        copy = _rebuild(type(self), self.args, self.__dict__)
        copy.__cause__ = self.__cause__
        assert isinstance(copy, type(self))  # noqa: S101 - narrows the type for the checker
        return copy


class ConfigError(ColQwen3Error, ValueError):
    """An argument or a setting that cannot be used; the message names it and what would be accepted."""


class DimensionError(ConfigError):
    """Two widths that must agree do not.

    Args:
        message: what was compared.
        expected: the width asked for, in components a vector.
        actual: the width found.

    >>> error = DimensionError("query against page", expected=320, actual=128)
    >>> str(error), error.expected, error.actual
    ('query against page: expected dim 320, got 128', 320, 128)
    """

    def __init__(self, message: str, *, expected: int, actual: int) -> None:
        super().__init__(f"{message}: expected dim {expected}, got {actual}")
        self.expected = expected
        self.actual = actual

    def __reduce__(self) -> tuple[object, ...]:
        """Keep keyword arguments across processes."""
        return _rebuild, (type(self), self.args, self.__dict__)


class MissingExtraError(ColQwen3Error, ImportError):
    """An optional dependency is not installed; the message is the line that installs it.

    >>> print(MissingExtraError("pdf", "pypdfium2"))
    pypdfium2 is not installed: pip install "colqwen3-retrievers[pdf]"
    """

    def __init__(self, extra: str, package: str) -> None:
        super().__init__(f'{package} is not installed: pip install "colqwen3-retrievers[{extra}]"')
        self.extra = extra

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the attributes across processes."""
        return _rebuild, (type(self), self.args, self.__dict__)


class CheckpointError(ColQwen3Error):
    """A checkpoint that cannot be found, read, told apart or filled without gaps.

    Args:
        message: what is wrong, with the folder or hub name.
        missing: names of tensors the model needs and the files lack.
        unexpected: names of tensors the files hold and the model has no place for.
    """

    def __init__(self, message: str, *, missing: Sequence[str] = (), unexpected: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)


class EncodeError(ColQwen3Error):
    """One input of a call cannot be encoded.

    The position and the message are fields; the text that names both is composed when the error is shown.

    Args:
        message: what is wrong with it.
        index: its position in the call's list, from 0, or None for a single input.
        name: how its caller knows it, such as ``"page 'a.pdf#page=3'"``; None names it by its position.

    >>> print(EncodeError("the text is empty", index=3), "/", EncodeError("the text is empty", name="query 'q1'"))
    input 3: the text is empty / query 'q1': the text is empty
    """

    def __init__(self, message: str, *, index: int | None = None, name: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.index = index
        self.name = name

    def __str__(self) -> str:
        name = f"input {self.index}" if self.name is None and self.index is not None else self.name
        return self.message if name is None else f"{name}: {self.message}"

    def at(self, index: int, name: str | None = None) -> Self:
        """Return the same error for the input at another position, in place of the one it had.

        >>> print(EncodeError("the text is empty", index=0).at(3), EncodeError("x").at(3).index)
        input 3: the text is empty 3
        """
        copy = self.copy()
        copy.index, copy.name = index, name
        return copy

    @classmethod
    def of(cls, cause: ColQwen3Error, index: int, name: str | None = None) -> EncodeError:
        """Return an error about one input, whatever kind of error said what is wrong with it.

        >>> error = EncodeError.of(ConfigError("no such file"), 2)
        >>> print(error), error.__cause__
        input 2: no such file
        (None, ConfigError('no such file'))
        """
        error = (
            cause.at(index, name) if isinstance(cause, EncodeError) else EncodeError(str(cause), index=index, name=name)
        )
        error.__cause__ = cause
        return error


class InputTooLongError(EncodeError):
    """A text is longer than the model takes.

    Args:
        message: which text.
        limit: the most tokens the whole prompt may have.
        actual: the tokens it has.
        index: its position in the call's list.
        name: how its caller knows it.
    """

    def __init__(
        self, message: str, *, limit: int, actual: int, index: int | None = None, name: str | None = None
    ) -> None:
        super().__init__(message, index=index, name=name)
        self.limit = limit
        self.actual = actual

    def __reduce__(self) -> tuple[object, ...]:
        """Keep keyword arguments across processes."""
        return _rebuild, (type(self), self.args, self.__dict__)


class EngineError(ColQwen3Error):
    """The engine could not compute.

    Args:
        message: what happened.
        retryable: whether the same call may succeed later without any change.
    """

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class EngineTimeoutError(EngineError):
    """The engine did not answer in the time it was given."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=True)


class EngineResponseError(EngineError):
    """A server answered, but not with token embeddings.

    Args:
        message: what it said.
        status_code: the HTTP status, or None when the body was at fault.
        retryable: whether the same call may succeed later.
    """

    def __init__(self, message: str, *, status_code: int | None = None, retryable: bool = False) -> None:
        super().__init__(message, retryable=retryable)
        self.status_code = status_code


class StoreError(ColQwen3Error):
    """A store could not do what it was asked; what it held before, it still holds.

    Args:
        message: what went wrong, with the location.
        absent: whether nothing is stored at the location yet, so that a store may be made there.
    """

    def __init__(self, message: str, *, absent: bool = False) -> None:
        super().__init__(message)
        self.absent = absent


class StoreMismatchError(StoreError):
    """The store was written by another model, dim, pooling or rendering than the one now opening it."""


class StoreUnavailableError(StoreError):
    """The store cannot be reached or is held by another writer."""


class PageError(ColQwen3Error):
    """A file or one of its pages cannot be read.

    Args:
        message: what is wrong.
        source: the file.
        page: the page number, from 1, or None when the whole file is at fault.

    >>> print(PageError("the page has no size", source="a.pdf", page=3))
    a.pdf, page 3: the page has no size
    """

    def __init__(self, message: str, *, source: str, page: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.source = source
        self.page = page

    def __str__(self) -> str:
        return f"{self.source if self.page is None else f'{self.source}, page {self.page}'}: {self.message}"

    def __reduce__(self) -> tuple[object, ...]:
        """Keep keyword arguments across processes."""
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[ColQwen3Error], args: tuple[object, ...], state: dict[str, object]) -> ColQwen3Error:
    """Make an error again from its message and attributes, without running its ``__init__`` on a finished message."""
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


def require(extra: str, module: str, package: str | None = None) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Args:
        extra: the extra of ``colqwen3-retrievers`` that installs it.
        module: the dotted module name to import.
        package: its name on the package index when that differs from the module's first part.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: when it is not installed; the message is the pip line.

    >>> require("torch", "json").__name__
    'json'
    >>> require("pdf", "surely_not_there")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.MissingExtraError: surely_not_there is not installed: pip install ...
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as exc:
        top = module.partition(".")[0]
        if exc.name is None or exc.name.partition(".")[0] != top:
            raise  # something inside the dependency is broken: hiding that would send the user the wrong way
        raise MissingExtraError(extra, package or top) from exc
