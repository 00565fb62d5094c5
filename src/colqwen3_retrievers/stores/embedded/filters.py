"""Filters as SQL over the embedded store's catalogue.

Every name and value is a bound parameter. The tables are those of
:mod:`~colqwen3_retrievers.stores.embedded.catalogue`; the statement's page is called ``p``. No expression here can be
NULL, so ``NOT`` means what it means in :func:`~colqwen3_retrievers.stores.where.matches`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from colqwen3_retrievers.stores.where import And, Condition, Filter, Not, Or, Value, facts, is_unicode

KINDS: Final = {"text": "t", "number": "n", "boolean": "b", "list": "l", "object": "o"}
"""Letters of kinds in ``facts``, capital for the elements of a list."""

_WRITTEN: Final = "w"  # the text of a time beside its moment in UTC, where parts of it are looked for

_COMPARISON: Final = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
Sql = tuple[str, list[Any]]
"""An expression and its parameters."""


def compile_filter(tree: Filter | None) -> Sql:
    """Compile a parsed filter to a condition on ``pages AS p``.

    Returns:
        SQL that is 0 or 1 for each page, and its parameters in order.

    >>> from colqwen3_retrievers.stores.where import parse
    >>> compile_filter(parse({"source": "a.pdf"}))
    ('p.source IN (?)', ['a.pdf'])
    """
    if tree is None:
        return "1", []
    if isinstance(tree, Condition):
        return _field(tree) if tree.field else _metadata(tree)
    if isinstance(tree, Not):
        inner, parameters = compile_filter(tree.part)
        return f"NOT ({inner})", parameters
    return _join([compile_filter(part) for part in tree.parts], tree)


def fact_rows(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str, str | int | float | bytes, int]]:
    """Iterate over metadata as rows ``(name, kind, value, place)`` of ``facts``.

    ``place`` is 0 for the value itself, the size of a list or an object; from 1 for a list's elements; and -1 for a
    time as it is written.

    >>> list(fact_rows({"year": 2020, "tags": ["a", True]}))
    [('year', 'n', 2020, 0), ('tags', 'l', 2, 0), ('tags', 'T', 'a', 1), ('tags', 'B', 1, 2)]
    """
    for name, value in facts(metadata).items():
        if not is_unicode(name):
            continue  # no filter can name it
        yield name, KINDS[value.kind], value.size if value.kind in ("list", "object") else _bound(value), 0
        if value.written is not None:
            yield name, _WRITTEN, value.written, -1
        if value.kind == "list":
            for place, element in enumerate(dict.fromkeys(value.payload), start=1):
                yield name, KINDS[element.kind].upper(), _bound(element), place


def register(connection: sqlite3.Connection) -> None:
    """Register the function that compiled SQL calls with a connection."""
    connection.create_function("folded", 1, _folded, deterministic=True)


def text_bytes(text: str) -> str | bytes:
    """Return a text for SQLite: bytes, to be cast, when it is not valid Unicode."""
    return text if is_unicode(text) else text.encode("utf-8", "surrogatepass")


def _join(parts: Sequence[Sql], tree: And | Or) -> Sql:
    """Join in halves, because SQLite limits the depth of an expression."""
    if not parts:
        return ("1" if isinstance(tree, And) else "0"), []
    if len(parts) == 1:
        return parts[0]
    left, left_parameters = _join(parts[: len(parts) // 2], tree)
    right, right_parameters = _join(parts[len(parts) // 2 :], tree)
    return f"({left} {'AND' if isinstance(tree, And) else 'OR'} {right})", left_parameters + right_parameters


def _field(condition: Condition) -> Sql:
    """Compile a test of a column, whose name is from the fixed list of fields."""
    test, values = condition.test, [value.payload for value in condition.values]
    if condition.name == "text":
        if test == "exists":
            return "1", []
        inner, parameters = ("value = ''", []) if test == "empty" else _scalar(condition, "value")
        texts = "SELECT key FROM (SELECT key, text AS value FROM contents)"
        return f"p.key IN ({texts} WHERE {inner})", parameters
    column = f"p.{condition.name}"
    nullable = condition.name == "label"
    if test == "exists":
        return (f"{column} IS NOT NULL" if nullable else "1"), []
    if test == "empty":
        if condition.name == "number":
            return "0", []
        return (f"coalesce({column}, '') = ''" if nullable else f"{column} = ''"), []
    if test == "in" and not values:
        return "0", []
    inner, parameters = _scalar(condition, column)
    return (f"({column} IS NOT NULL AND {inner})" if nullable else inner), parameters


def _scalar(condition: Condition, column: str) -> Sql:
    """Compile a test of a value that is present and of the right kind."""
    test, values = condition.test, [_bound(value) for value in condition.values]
    if test == "in":
        return f"{column} IN ({', '.join('?' * len(values))})", values
    if test in _COMPARISON:
        return f"{column} {_COMPARISON[test]} ?", values
    parts: list[Any] = list(condition.values[0].texts)
    if test == "itext":
        column, parts = f"folded(CAST({column} AS BLOB))", [part.casefold().encode() for part in parts]
    return " OR ".join([f"instr({column}, ?) > 0"] * len(parts)), parts


def _metadata(condition: Condition) -> Sql:
    having = "p.key IN (SELECT key FROM facts WHERE name = ?"
    test = condition.test
    if test == "exists":
        return f"{having} AND place = 0)", [condition.name]
    if test == "empty":
        full = "place = 0 AND NOT (kind = 't' AND value = '') AND NOT (kind IN ('l', 'o') AND value = 0)"
        return f"NOT {having} AND {full})", [condition.name]
    by_kind: dict[str, list[Value]] = {}
    for value in condition.values:
        by_kind.setdefault(KINDS[value.kind], []).append(value)
    options: list[Sql] = []
    for kind, values in by_kind.items():
        if test == "contains":
            options.append(("kind = ? AND value = ?", [kind.upper(), _bound(values[0])]))
        if test != "contains" or kind == "t":
            inner, parameters = _scalar(Condition(condition.name, False, test, tuple(values)), "value")
            kinds = f"IN (?, '{_WRITTEN}')" if test in ("contains", "text", "itext") else "= ?"
            options.append((f"kind {kinds} AND ({inner})", [kind, *parameters]))
    if not options:
        return "0", []
    either = " OR ".join(f"({sql})" for sql, _ in options)
    return f"{having} AND ({either}))", [condition.name, *(item for _, parameters in options for item in parameters)]


def _bound(value: Value) -> str | int | float | bytes:
    if value.kind == "text":
        return text_bytes(value.payload)
    bound: int | float = int(value.payload) if value.kind == "boolean" else value.payload
    return bound


def _folded(raw: bytes) -> bytes:
    return raw.decode("utf-8", "surrogatepass").casefold().encode("utf-8", "surrogatepass")
