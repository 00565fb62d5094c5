"""The filter language of every store, with a reference evaluation in Python.

::

    {"source": "a.pdf"}                                       equality
    {"year": {"$gte": 2020, "$lt": 2024}}                     several operators on one name: all must hold
    {"source": "a.pdf", "year": 2020}                         several names: all must hold
    {"$or": [{"tags": {"$contains": "tax"}}, {"$not": {"author.name": "Ada"}}]}

**Names.** ``id``, ``source``, ``number``, ``label``, ``sha256`` and ``text`` are the page's own fields; ``page`` is
``number`` under the name that results and both frameworks use. Any other name is a metadata key, a dot going into
nested objects (``author.name``). ``metadata.`` in front always means metadata, so ``metadata.page`` reaches a metadata
key called ``page``. When a key itself contains a dot, the key nearest to the surface wins.

**Values.** Texts, numbers and booleans are three kinds that never equal each other and are never ordered against each
other: ``True`` is not ``1`` and ``"3"`` is not ``3``. Integers beyond 64 bits are compared as floats. Texts are ordered
by code point. ``None`` and a missing name are the same thing. Whatever
:func:`~colqwen3_retrievers.pages.page.json_value` converts for metadata may stand in a filter too: dates, datetimes,
numpy's numbers, UUIDs and so on.

**Times.** A metadata text that is a whole ISO 8601 time, as ``2024-05-01T01:00:00+02:00``, ``2024-04-30T23:00:00Z`` or
``2024-04-30 23:00``, is compared as that moment, in UTC: these three are equal. One without an offset is taken for UTC,
as stored in most databases; convert local times before. A date, ``2024-05-01``, comes just before the first moment of
its day and after the last of the day before: ``{"$gte": date(2024, 5, 1), "$lt": date(2024, 6, 1)}`` is all of May.
``$contains`` and ``$text`` look into a time as it is written, and as it is in UTC (``2024-04-30T23:00:00+00:00``).

=================  ===========================================================================  ======================
operator           holds when                                                                   LlamaIndex
=================  ===========================================================================  ======================
``$eq`` ``$ne``    the value is (not) this one; ``None`` matches a missing one                  EQ, NE
``$gt`` ``$gte``
``$lt`` ``$lte``   it is of the same kind and so ordered; numbers and texts only                GT, GTE, LT, LTE
``$in`` ``$nin``   it is (not) one of these                                                     IN, NIN
``$contains``      the list has this element, or the text has this text inside                  CONTAINS
``$any`` ``$all``  it ``$contains`` at least one, every one of these                            ANY, ALL
``$text``          it is a text with this text inside                                           TEXT_MATCH
``$itext``         the same, whatever the case                                                  TEXT_MATCH_INSENSITIVE
``$empty``         (``True``) it is missing, ``""``, ``[]`` or ``{}``; ``False`` the contrary   IS_EMPTY
``$exists``        (``True``) it is present and not null; ``False`` the contrary
``$not``           ``{"$not": filter}`` or ``{name: {"$not": {operator: ...}}}``                NOT: ``$not``, ``$or``
``$and`` ``$or``   all, at least one, of a list of filters                                      AND, OR
=================  ===========================================================================  ======================

Every filter is true or false of a page, never unknown: ``$ne`` and ``$nin`` hold where the name is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

import numpy as np

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.pages.page import Page, json_value

Where = Mapping[str, Any]
"""A filter as users write it."""

FIELDS: Final = {"id": "text", "source": "text", "number": "number", "label": "text", "sha256": "text", "text": "text"}
"""The page's own fields a filter can name, and the kind of each."""

ALIASES: Final = {"page": "number"}
"""Other names of these fields."""

OPERATORS: Final = ("$eq", "$ne", "$gt", "$gte", "$lt", "$lte", "$in", "$nin", "$contains", "$any", "$all", "$text",
                    "$itext", "$empty", "$exists", "$not")  # fmt: skip
"""Operators on a name."""

MAX_DEPTH: Final = 32
"""Deepest nesting of ``$and``, ``$or`` and ``$not``."""

MAX_VALUES: Final = 10_000
"""Most values in one filter, all operators together."""

Test = Literal["in", "gt", "gte", "lt", "lte", "contains", "text", "itext", "empty", "exists"]
Kind = Literal["text", "number", "boolean", "list", "object"]

_INT64 = 2**63
_TIME: Final = re.compile(
    r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d)(?::(\d\d)(?:[.,](\d+))?)? ?([Zz]|[+-]\d\d(?::?\d\d)?)?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Value:
    """One value of a known kind.

    ``payload`` is a str, int, float or bool, the scalar elements of a list, or None for an object. ``size`` counts all
    items of a list or an object, including those that filters cannot match. ``written`` is the text of a time whose
    ``payload`` is its moment in UTC.
    """

    kind: Kind
    payload: Any
    size: int = 0
    written: str | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def texts(self) -> tuple[str, ...]:
        """A text's forms, as compared and as written if that differs; parts are looked for in both."""
        return (self.payload,) if self.written is None else (self.payload, self.written)


@dataclass(frozen=True, slots=True)
class Condition:
    """One test of one name; ``field`` tells the page's own fields from metadata names.

    ``required`` is false for a name that no page need have, since nobody wrote it: see :func:`metadata_names`.
    """

    name: str
    field: bool
    test: Test
    values: tuple[Value, ...] = ()
    required: bool = dataclasses.field(default=True, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class And:
    """Every part holds; true without parts."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """At least one part holds; false without parts."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """The part does not hold."""

    part: Filter


Filter = Condition | And | Or | Not
"""A parsed filter, which stores compile."""


def parse(where: Where | Filter | None) -> Filter | None:
    """Parse a filter.

    Args:
        where: as in this module's table; an already parsed tree is returned as it is; None and ``{}`` mean every page.

    Returns:
        The tree, or None for every page.

    Raises:
        ConfigError: an unknown operator, a value of a kind the operator cannot take, too deep or too long; it names
            the key, the operator and the value.

    >>> parse({"year": {"$gte": 2020}})
    Condition(name='year', field=False, test='gte', values=(Value(kind='number', payload=2020, size=0),))
    >>> parse({"year": {"$above": 2020}})
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: where: 'year': unknown operator '$above'; known: $eq, $ne, ...
    """
    if where is None or isinstance(where, Condition | And | Or | Not):
        return where
    tree = _filter(where, 0)
    if (count := _count(tree)) > MAX_VALUES:
        raise ConfigError(f"where: {count:,} values in one filter, at most {MAX_VALUES:,}")
    return None if tree == And(()) else tree


def matches(where: Where | Filter | None, page: Page) -> bool:
    """Return whether a filter holds for a page: the reference for every store.

    >>> page = Page(source="a.pdf", number=3, metadata={"year": 2021, "tags": ["tax"], "author": {"name": "Ada"}})
    >>> matches({"year": {"$gte": 2020}, "tags": {"$contains": "tax"}, "author.name": "Ada"}, page)
    True
    >>> matches({"$or": [{"number": {"$lt": 3}}, {"year": True}]}, page)
    False
    """
    tree = parse(where)
    return tree is None or _holds(tree, page, facts(page.metadata))


def _filter(where: object, depth: int) -> Filter:
    if depth > MAX_DEPTH:
        raise ConfigError(f"where: nested deeper than {MAX_DEPTH}")
    if not isinstance(where, Mapping):
        raise ConfigError(f"where: expected a filter {{name: value}}, got {_short(where)}")
    parts: list[Filter] = []
    for key, value in where.items():
        if not isinstance(key, str):
            raise ConfigError(f"where: names are strings, got {_short(key)}")
        if key in ("$and", "$or"):
            if not isinstance(value, list | tuple) or not value:
                raise ConfigError(f"where: {key}: expected a list of at least one filter, got {_short(value)}")
            branches = tuple(_filter(item, depth + 1) for item in value)
            parts.append(And(branches) if key == "$and" else Or(branches))
        elif key == "$not":
            parts.append(Not(_filter(value, depth + 1)))
        elif key.startswith("$"):
            raise ConfigError(f"where: unknown operator {key!r}; known here: $and, $or, $not, or a name")
        else:
            parts.append(_named(key, value, depth))
    return parts[0] if len(parts) == 1 else And(tuple(parts))


def _named(key: str, value: object, depth: int) -> Filter:
    """Parse the value or operators of one name."""
    _check_text(key, f"where: {_short(key)}")
    if not isinstance(value, Mapping):
        return _operator(key, "$eq", value, depth)
    if not value:
        raise ConfigError(f"where: {key!r}: an empty object; give a value or operators such as $eq")
    for name in value:
        if name not in OPERATORS:
            hint = "" if str(name).startswith("$") else f"; a nested key is written {f'{key}.{name}'!r}"
            raise ConfigError(f"where: {key!r}: unknown operator {name!r}; known: {', '.join(OPERATORS)}{hint}")
    parts = tuple(_operator(key, name, item, depth) for name, item in value.items())
    return parts[0] if len(parts) == 1 else And(parts)


def _operator(key: str, operator: str, value: object, depth: int) -> Filter:
    label = f"where: {key!r}: {operator}"
    if operator == "$not":
        if not isinstance(value, Mapping):
            raise ConfigError(f"{label}: expected operators such as {{'$gt': 3}}, got {_short(value)}")
        if depth >= MAX_DEPTH:
            raise ConfigError(f"where: nested deeper than {MAX_DEPTH}")
        return Not(_named(key, value, depth + 1))
    if operator in ("$empty", "$exists"):
        if not isinstance(value, bool):
            raise ConfigError(f"{label}: expected True or False, got {_short(value)}")
        condition = _condition(key, "empty" if operator == "$empty" else "exists")
        return condition if value else Not(condition)
    if operator in ("$in", "$nin", "$any", "$all"):
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            raise ConfigError(f"{label}: expected a list, got {_short(value)}")
        if operator in ("$in", "$nin"):
            return _among(key, label, tuple(value)) if operator == "$in" else Not(_among(key, label, tuple(value)))
        each = tuple(_condition(key, "contains", _value(item, label, key, contains=True)) for item in value)
        return Or(each) if operator == "$any" else And(each)
    if operator == "$eq":
        return _among(key, label, (value,))
    if operator == "$ne":
        return Not(_among(key, label, (value,)))
    if operator == "$contains":
        return _condition(key, "contains", _value(value, label, key, contains=True))
    given = _value(value, label, key)
    if operator in ("$text", "$itext"):
        if given.kind != "text" or FIELDS.get(ALIASES.get(key, key)) == "number":
            raise ConfigError(f"{label}: a text is looked for in texts, got {_short(value)}")
        return _condition(key, "text" if operator == "$text" else "itext", given)
    if given.kind == "boolean":
        raise ConfigError(f"{label}: a boolean has no order, got {_short(value)}")
    return _condition(key, operator[1:], given)


def _among(key: str, label: str, items: tuple[object, ...]) -> Filter:
    """Return the filter for one of ``items``, where null matches a missing name."""
    values = tuple(_value(item, label, key) for item in items if item is not None)
    tree: Filter = _condition(key, "in", *values)
    if len(values) == len(items):
        return tree
    missing = Not(_condition(key, "exists"))
    return Or((missing, tree)) if values else missing


def _condition(key: str, test: str, *values: Value) -> Condition:
    own = ALIASES.get(key, key)
    field = own in FIELDS
    name = own if field else key.removeprefix("metadata.")
    return Condition(name, field, test, values)  # type: ignore[arg-type]  # callers pass the literals of Test


def _value(item: object, label: str, key: str, *, contains: bool = False) -> Value:
    if isinstance(item, list | tuple | set | Mapping):
        raise ConfigError(f"{label}: expected one text, number or boolean, got {_short(item)}; use $in, $any or $all")
    kind = FIELDS.get(ALIASES.get(key, key))
    value = scalar(item)
    if value is None:
        with contextlib.suppress(TypeError, ValueError, ArithmeticError):
            value = scalar(json_value(item))
    if value is None:
        raise ConfigError(f"{label}: expected a text, a number, a boolean, a date or a time, got {_short(item)}")
    if value.kind == "text":
        _check_text(value.payload, label)
        value = value if kind is not None else moment(value)
    if kind is not None and (value.kind != kind or (contains and kind != "text")):
        raise ConfigError(f"{label}: {key} is a {kind}, got {_short(item)}")
    return value


def _check_text(text: str, label: str) -> None:
    if not is_unicode(text):
        raise ConfigError(f"{label}: not valid Unicode: {_short(text)}")


def _short(item: object) -> str:
    shown = repr(item)
    return shown if len(shown) <= 80 else f"{shown[:79]}…"


def _count(tree: Filter) -> int:
    if isinstance(tree, Condition):
        return max(1, len(tree.values))
    return _count(tree.part) if isinstance(tree, Not) else sum(map(_count, tree.parts))


def optional(where: Where | Filter) -> Filter:
    """Parse a filter whose names no page need have: those of :func:`metadata_names` are none of them.

    >>> metadata_names(optional({"$or": [{"year": 2020}, {"$not": {"name": "Ada"}}]}))
    []
    """
    tree = parse(where) or And(())
    if isinstance(tree, Condition):
        return dataclasses.replace(tree, required=False)
    if isinstance(tree, Not):
        return Not(optional(tree.part))
    return type(tree)(tuple(map(optional, tree.parts)))


def metadata_names(where: Where | Filter | None) -> list[str]:
    """Return the metadata names that the author of a filter wrote, sorted, to find misspelt ones.

    >>> metadata_names({"page": 3, "$or": [{"yeer": 2020}, {"metadata.page": 1}, {"yeer": 2021}]})
    ['page', 'yeer']
    """
    tree = parse(where)
    names: set[str] = set()
    parts = [] if tree is None else [tree]
    while parts:
        part = parts.pop()
        if isinstance(part, Condition):
            names |= {part.name} if part.required and not part.field else set()
        else:
            parts.extend((part.part,) if isinstance(part, Not) else part.parts)
    return sorted(names)


ORDER: Final = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
"""Tests of order, as functions of a value and a bound."""


def _holds(tree: Filter, page: Page, known: Mapping[str, Value]) -> bool:
    if isinstance(tree, And):
        return all(_holds(part, page, known) for part in tree.parts)
    if isinstance(tree, Or):
        return any(_holds(part, page, known) for part in tree.parts)
    if isinstance(tree, Not):
        return not _holds(tree.part, page, known)
    value = scalar(getattr(page, tree.name)) if tree.field else known.get(tree.name)
    return _passes(tree, value)


def _passes(condition: Condition, value: Value | None) -> bool:
    test = condition.test
    if test == "empty":
        return value is None or value.payload == "" or (value.kind in ("list", "object") and value.size == 0)
    if test == "exists" or value is None:
        return value is not None
    if test == "in":
        return value in condition.values
    operand = condition.values[0]
    if test == "contains" and value.kind == "list":
        return operand in value.payload
    if value.kind != operand.kind:
        return False
    if test in ORDER:
        return bool(ORDER[test](value.payload, operand.payload))
    if value.kind != "text":  # $contains of a number or boolean that is not a list
        return False
    if test == "itext":
        return any(part.casefold() in text.casefold() for part in operand.texts for text in value.texts)
    return any(part in text for part in operand.texts for text in value.texts)


def rename_fields(where: object, names: Mapping[str, str]) -> Any:
    """Return a filter with its fields renamed.

    Args:
        where: a filter, checked later; operators and values stay.
        names: by each name in the filter, the field's name here; a name with ``metadata.`` in front stays.

    >>> rename_fields({"page": 2, "$or": [{"page": {"$gt": 5}}, {"metadata.page": 1}]}, {"page": "number"})
    {'number': 2, '$or': [{'number': {'$gt': 5}}, {'metadata.page': 1}]}
    """
    if not isinstance(where, Mapping):
        return where
    renamed: dict[Any, Any] = {}
    for key, value in where.items():
        if key in ("$and", "$or") and isinstance(value, list | tuple):
            renamed[key] = [rename_fields(part, names) for part in value]
        elif key == "$not":
            renamed[key] = rename_fields(value, names)
        else:
            renamed[names.get(key, key)] = value
    return renamed


def facts(metadata: Mapping[str, Any]) -> dict[str, Value]:
    """Flatten metadata to values by dotted name, nothing for null.

    Stores index them, and :func:`matches` reads them. A list has its texts, numbers and booleans; an object has its
    size, and its members have dotted names.

    >>> facts({"a": {"b": 1, "c": None}, "d": ["x", None]})["d"].payload
    (Value(kind='text', payload='x', size=0),)
    >>> sorted(facts({"a": {"b": 1, "c": None}, "a.b": 2}).items())[1]
    ('a.b', Value(kind='number', payload=2, size=0))
    """
    values: dict[str, Value] = {}
    level = [("", metadata)]
    while level:  # level by level, so that the key nearest to the surface is met first
        deeper = []
        for prefix, mapping in level:
            for key, item in mapping.items():
                name = prefix + key
                if isinstance(item, Mapping):
                    deeper.append((f"{name}.", item))
                    values.setdefault(name, Value("object", None, len(item)))
                elif isinstance(item, list | tuple):
                    elements = tuple(moment(value) for element in item if (value := scalar(element)) is not None)
                    values.setdefault(name, Value("list", elements, len(item)))
                elif (value := scalar(item)) is not None:
                    values.setdefault(name, moment(value))
        level = deeper
    return values


def scalar(item: object) -> Value | None:
    """Return a text, number or boolean with its kind, None for anything else.

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


def moment(value: Value) -> Value:
    """Return the text of a whole ISO time as its moment in UTC, and any other value unchanged.

    >>> moment(Value("text", "2024-05-01T01:00+02:00")).payload, moment(Value("text", "2024-05-01")).payload
    ('2024-04-30T23:00:00+00:00', '2024-05-01')
    """
    time = _TIME.fullmatch(value.payload) if value.kind == "text" else None
    if time is None:
        return value
    day, minute, second, fraction, offset = time.groups()
    try:
        instant = datetime.fromisoformat(f"{day}T{minute}:{second or '00'}{(offset or 'Z').upper()}").astimezone(UTC)
    except (ValueError, OverflowError):  # no such day or minute, or none within the years of UTC
        return value
    digits = (fraction or "").rstrip("0")  # as many as there are: pandas has nanoseconds
    text = f"{instant:%H:%M:%S}{'.' if digits else ''}{digits}+00:00"
    utc = f"{instant.date().isoformat()}T{text}"
    return value if utc == value.payload else Value("text", utc, written=value.payload)


def is_unicode(text: str) -> bool:
    """Return whether a text is valid, without half of a surrogate pair.

    >>> is_unicode("日本"), is_unicode(chr(0xD800))
    (True, False)
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
