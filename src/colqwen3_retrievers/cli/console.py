"""What the commands have in common: telling on standard error, and filters from the command line."""

from __future__ import annotations

import json
import sys
from typing import Any

from colqwen3_retrievers.errors import ConfigError


def tell(what: object) -> None:
    """Tell something on standard error, on one line whatever is in it.

    >>> tell(ConfigError("k: expected a whole number"))
    """
    print(f"colqwen3: {' '.join(str(what).split())}", file=sys.stderr)


def json_filter(text: str) -> dict[str, Any]:
    """Read what was given as ``--where``; what it asks for is checked later.

    Raises:
        ConfigError: not a JSON object.

    >>> json_filter('{"page": {"$lte": 9}}')
    {'page': {'$lte': 9}}
    """
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise ConfigError(f"--where: not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ConfigError("--where: expected a JSON object")
    return value
