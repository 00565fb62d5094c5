"""Packages whose names are loaded when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, where: Mapping[str, str], before: Callable[[], object] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make a package's ``__getattr__`` and ``__dir__``.

    Args:
        package: its ``__name__``.
        where: public name -> module of the package that defines it.
        before: called before the first load, to say what is not installed.

    Returns:
        The two functions (PEP 562).

    >>> get, names = lazy_names("colqwen3_retrievers", {"ColQwen3Error": "errors"})
    >>> names(), get("ColQwen3Error").__name__
    (['ColQwen3Error'], 'ColQwen3Error')
    >>> get("nothing")
    Traceback (most recent call last):
    AttributeError: module 'colqwen3_retrievers' has no attribute 'nothing'
    """

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if before is not None:
            before()
        value = getattr(importlib.import_module(f"{package}.{where[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted(where)
