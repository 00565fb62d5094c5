"""LangChain's standard suites, one at a time: importing them all asks for plugins that only some of them need."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any


def standard_suite(module: str, name: str) -> Any:
    """Give a suite of ``langchain_tests`` by its module, such as ``integration_tests.retrievers``, and its class."""
    package = importlib.util.find_spec("langchain_tests")
    assert package is not None
    assert package.submodule_search_locations is not None
    folder = Path(package.submodule_search_locations[0])
    for part in ("unit_tests", "integration_tests"):
        bare = types.ModuleType(f"langchain_tests.{part}")  # its modules can be found, its __init__ does not run
        bare.__path__ = [str(folder / part)]
        sys.modules.setdefault(bare.__name__, bare)
    return getattr(importlib.import_module(f"langchain_tests.{module}"), name)
