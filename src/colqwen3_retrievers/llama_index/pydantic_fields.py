"""Fields and errors shared by the adapters that are pydantic models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from llama_index.core.bridge.pydantic import BeforeValidator, ValidationError

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.pages.remote_images import checked_remote

RemoteHosts = Annotated[bool | tuple[str, ...], BeforeValidator(checked_remote)]
"""Type of an ``allow_remote`` field."""


@contextmanager
def config_errors(*, show_input: bool = True) -> Iterator[None]:
    """Raise a pydantic ValidationError as a ConfigError that names the first invalid argument.

    Args:
        show_input: whether the message contains the value; False for a model with secrets.

    >>> from llama_index.core.bridge.pydantic import TypeAdapter
    >>> with config_errors():
    ...     TypeAdapter(dict[str, int]).validate_python({"top_n": "x"})
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: top_n: Input should be a valid integer, unable to parse string as an ...
    """
    try:
        yield
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            raise cause from None  # raised by a validator of ours: it names the argument
        message = str(cause or error["msg"])
        if show_input:
            message += f", got {error['input']!r}"
        raise ConfigError(f"{error['loc'][0]}: {message}") from None
