"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from colqwen3_retrievers.errors import ConfigError


def user_path(given: str | os.PathLike[str]) -> Path:
    """Give a path, with ``~`` and ``~name`` for home folders.

    Args:
        given: absolute or not; nothing is looked up but the home.

    Raises:
        ConfigError: there is no such user.

    >>> user_path("~nobody-at-all/index")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: ~nobody-at-all/index: Could not determine home directory.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError as exc:
        raise ConfigError(f"{os.fspath(given)}: {exc}") from exc
