"""Metadata laid flat into values of known kinds: what filters are evaluated on and what stores index."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Kind = Literal["text", "number", "boolean", "list", "object"]
_INT64 = 2**63


@dataclass(frozen=True, slots=True)
class Value:
    """One value of a known kind: str, int or float, bool, the scalar elements of a list, or None for an object.

    ``size`` counts all items of a list or an object, those too that cannot be asked for.
    """

    kind: Kind
    payload: Any
    size: int = 0


def facts(metadata: Mapping[str, Any]) -> dict[str, Value]:
    """Lay metadata out flat: dotted name -> value, nothing for null. What stores index and the evaluator reads.

    A list keeps its texts, numbers and booleans; an object is there as its size, its members under dotted names.

    >>> facts({"a": {"b": 1, "c": None}, "d": ["x", None]})["d"].payload
    (Value(kind='text', payload='x', size=0),)
    >>> sorted(facts({"a": {"b": 1, "c": None}, "a.b": 2}).items())[1]
    ('a.b', Value(kind='number', payload=2, size=0))
    """
    found: dict[str, Value] = {}
    level = [("", metadata)]
    while level:  # level by level, so that the key nearest to the surface is met first
        deeper = []
        for prefix, mapping in level:
            for key, item in mapping.items():
                name = prefix + key
                if isinstance(item, Mapping):
                    deeper.append((f"{name}.", item))
                    found.setdefault(name, Value("object", None, len(item)))
                elif isinstance(item, list | tuple):
                    elements = tuple(value for element in item if (value := scalar(element)) is not None)
                    found.setdefault(name, Value("list", elements, len(item)))
                elif (value := scalar(item)) is not None:
                    found.setdefault(name, value)
        level = deeper
    return found


def scalar(item: object) -> Value | None:
    """Give a text, number or boolean with its kind; None for anything else (null, NaN, objects).

    >>> scalar(True), scalar(2**70).payload, scalar(float("nan"))
    (Value(kind='boolean', payload=True, size=0), 1.1805916207174113e+21, None)
    """
    if isinstance(item, str):
        return Value("text", str(item))
    if isinstance(item, bool):
        return Value("boolean", item)
    if isinstance(item, numbers.Integral):
        whole = int(item)
        if -_INT64 <= whole < _INT64:
            return Value("number", whole)
        try:
            return Value("number", float(whole))
        except OverflowError:
            return Value("number", math.inf if whole > 0 else -math.inf)
    if isinstance(item, float | np.floating) and not math.isnan(item):
        return Value("number", float(item))
    return None
