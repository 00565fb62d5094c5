"""Filters as Qdrant conditions, and the payload that they match.

Qdrant matches keywords, ranges of 64-bit floats and parts of texts, and may lose the last bit of a float it stores (its
engine read 9007199254740991.0 back as ...990.0). The language of :mod:`~colqwen3_retrievers.stores.where` has three
kinds of values, exact 64-bit integers, an order of texts, and names with any character. So every page has its metadata
in a form for which Qdrant's conditions are exact::

    names    ["m_year", "m_author", "m_author:text"]   what is present, and which of it is text
    full     ["m_year", "m_author"]                     what is present and not empty
    equal    {"m_year": "n:2020", "m_author": "t:Ada"}  one keyword a value, its kind in front
    items    {"m_tags": ["t:tax", "n:3"]}               the same of the elements of a list
    number   {"m_year": 2020}                           the whole number at or below it, within 2**53
    rest     {"m_ratio": {"a": ..., "b": ..., "c": 0}}  where that is not all: its place among all numbers
    text     {"m_author": "Ada"}, folded {...}          as it is, and casefolded; of a time both its forms

Keys are names with every character but letters, digits and the underscore written as ``-hex-``, after ``f_`` for the
page's own fields and ``m_`` for metadata. What Qdrant cannot express (the order of texts; parts of texts before server
1.20) is compiled to a wider filter, marked as such, and its pages are filtered again by the store.
"""

from __future__ import annotations

import hashlib
import math
import struct
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from colqwen3_retrievers.errors import require
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.stores.where import (
    FIELDS,
    ORDER,
    And,
    Condition,
    Filter,
    Not,
    Value,
    facts,
    is_unicode,
    scalar,
)

_NAMESPACE: Final = uuid.UUID("6e1fd1b6-7f6c-5a3c-9d0e-5b8f0c3c1d52")
_NO_POINT: Final = "00000000-0000-0000-0000-000000000000"  # no uuid5 is all zeros
_STAND_IN: Final = "\U0010ffff"  # for half a surrogate pair, which JSON cannot carry
_LONGEST_KEYWORD: Final = 200
_EXACT_FLOATS: Final = 2**53


@dataclass(frozen=True, slots=True)
class Compiled:
    """A filter for Qdrant.

    Attributes:
        filter: a ``Filter`` of ``qdrant_client.models``, or None for every page.
        exact: whether it holds for exactly the matching pages; otherwise it may hold for others too.
    """

    filter: Any
    exact: bool


def point_id(page_id: str) -> str:
    """Return the id of a page's point, a UUID of version 5.

    Raises:
        UnicodeEncodeError: half a surrogate pair, which no stored id has.

    >>> point_id("a.pdf#page=1") == point_id("a.pdf#page=1") != point_id("a.pdf#page=2")
    True
    """
    return str(uuid.uuid5(_NAMESPACE, page_id))


def compile_filter(tree: Filter | None, *, substrings: bool) -> Compiled:
    """Compile a parsed filter to a Qdrant condition.

    Args:
        tree: of :func:`~colqwen3_retrievers.stores.where.parse`.
        substrings: whether the server can match parts of texts (``MatchSubstring``, Qdrant 1.20).

    Raises:
        MissingExtraError: qdrant-client is not installed.

    >>> from colqwen3_retrievers.stores.where import parse
    >>> compile_filter(parse({"year": 2020}), substrings=True).filter.must[0].match.any
    ['n:2020']
    >>> compile_filter(parse({"name": {"$gt": "m"}}), substrings=True).exact   # texts have no order in Qdrant
    False
    """
    compiled, models = _Compiler(substrings).compile(tree), require("qdrant", "qdrant_client.models", "qdrant-client")
    if compiled.filter is None or isinstance(compiled.filter, models.Filter):
        return compiled
    return Compiled(models.Filter(must=[compiled.filter]), compiled.exact)


def filter_payload(page: Page) -> dict[str, Any]:
    """Return the part of a page's payload that filters are evaluated on.

    >>> payload = filter_payload(Page(source="a.pdf", metadata={"year": 2020, "tags": ["x"]}))
    >>> payload["equal"]["f_source"], payload["equal"]["m_year"], payload["number"]["m_year"], payload["items"]
    ('t:a.pdf', 'n:2020', 2020, {'m_tags': ['t:x']})
    """
    values = {_key(name, field=True): scalar(getattr(page, name)) for name in FIELDS}
    values |= {_key(name, field=False): value for name, value in facts(page.metadata).items() if is_unicode(name)}
    payload: dict[str, Any] = {part: {} for part in ("equal", "items", "number", "rest", "text", "folded")}
    payload |= {"names": [], "full": []}
    for key, value in values.items():
        if value is None:
            continue
        payload["names"].append(key)
        if value.payload != "" and not (value.kind in ("list", "object") and value.size == 0):
            payload["full"].append(key)
        if value.kind == "list":
            payload["items"][key] = list(dict.fromkeys(_token(element) for element in value.payload))
        elif value.kind != "object":
            payload["equal"][key] = _token(value)
        if value.kind == "text":
            payload["names"].append(f"{key}:text")
            texts = [_replace_surrogates(text) for text in value.texts]
            payload["text"][key] = texts if len(texts) > 1 else texts[0]
            payload["folded"][key] = [text.casefold() for text in texts] if len(texts) > 1 else texts[0].casefold()
        elif value.kind == "number":
            payload["number"][key], rest = _split(value.payload)
            if rest is not None:
                payload["rest"][key] = dict(zip("abc", rest, strict=True))
    return {part: value for part, value in payload.items() if value}


def index_paths(names: Iterable[str]) -> dict[str, str]:
    """Return the payload indexes of a collection, as kinds by path.

    >>> index_paths(["year"])["number.m_year"]
    'integer'
    """
    kinds = {"names": "keyword", "full": "keyword", "image": "keyword"}
    for key in (_key("source", field=True), _key("sha256", field=True)):
        kinds[f"equal.{key}"] = "keyword"
    kinds[f"number.{_key('number', field=True)}"] = "integer"
    for name in names:
        key = _key(name.removeprefix("metadata."), field=False)
        kinds |= {f"equal.{key}": "keyword", f"items.{key}": "keyword", f"number.{key}": "integer"}
    return kinds


def has_ids(points: Sequence[str]) -> Any:
    """Return the filter that holds for these points only."""
    models = require("qdrant", "qdrant_client.models", "qdrant-client")
    return models.Filter(must=[models.HasIdCondition(has_id=list(points) or [_NO_POINT])])


class _Compiler:
    def __init__(self, substrings: bool) -> None:
        self._models = require("qdrant", "qdrant_client.models", "qdrant-client")
        self._substrings = substrings

    def compile(self, tree: Filter | None) -> Compiled:
        if tree is None:
            return Compiled(None, True)
        if isinstance(tree, Condition):
            return self._condition(tree)
        if isinstance(tree, Not):
            inner = self.compile(tree.part)
            if not inner.exact:  # the negation of a wider filter is too narrow, so this may be any page
                return Compiled(None, False)
            return Compiled(self._points([]) if inner.filter is None else self._none_of(inner.filter), True)
        parts = [self.compile(part) for part in tree.parts]
        exact = all(part.exact for part in parts)
        if isinstance(tree, And):
            conditions = [part.filter for part in parts if part.filter is not None]
            return Compiled(self._models.Filter(must=conditions) if conditions else None, exact)
        if any(part.filter is None for part in parts):
            return Compiled(None, exact)
        return Compiled(self._any_of([part.filter for part in parts]) if parts else self._points([]), exact)

    def _condition(self, condition: Condition) -> Compiled:
        key, test, values = _key(condition.name, field=condition.field), condition.test, condition.values
        if test == "exists":
            return Compiled(self._match("names", key), True)
        if test == "empty":
            return Compiled(self._none_of(self._match("full", key)), True)
        if test == "in":
            if condition.field and condition.name == "id":
                return Compiled(self._points([point_id(value.payload) for value in values]), True)
            if not values:
                return Compiled(self._points([]), True)
            tokens = [_token(value) for value in values]
            return Compiled(self._field(f"equal.{key}", match=self._models.MatchAny(any=tokens)), True)
        operand = values[0]
        if test == "contains":
            element = self._field(f"items.{key}", match=self._models.MatchAny(any=[_token(operand)]))
            if operand.kind != "text":
                return Compiled(element, True)
            inside = self._inside(key, "text", operand.texts)
            return Compiled(self._any_of([element, inside.filter]), inside.exact)
        if test == "text":
            return self._inside(key, "text", operand.texts)
        if test == "itext":
            return self._inside(key, "folded", tuple(text.casefold() for text in operand.texts))
        if operand.kind == "number":
            return Compiled(self._ordered(key, test, operand.payload), True)
        return Compiled(self._match("names", f"{key}:text"), False)

    def _inside(self, key: str, part: str, wanted: tuple[str, ...]) -> Compiled:
        """Compile the test for texts with one of ``wanted`` inside."""
        if not wanted[0] or not self._substrings or _STAND_IN in wanted[0]:
            return Compiled(self._match("names", f"{key}:text"), not wanted[0])
        fields = [self._field(f"{part}.{key}", match=self._models.MatchSubstring(substring=text)) for text in wanted]
        return Compiled(fields[0] if len(fields) == 1 else self._any_of(fields), True)

    def _ordered(self, key: str, test: str, value: float) -> Any:
        """Compare whole parts, then the rests; a page without a rest is whole."""
        whole, rest = _split(value)
        strict = "gt" if test.startswith("g") else "lt"
        path = f"rest.{key}"
        some = self._range(f"{path}.a", {"gte": -(2**32)})
        if rest is None:  # pages with a rest lie just above this whole number
            among = {"gt": some, "gte": None, "lt": self._points([]), "lte": self._none_of(some)}[test]
        else:
            a, b, c = rest
            same_a, same_b = ({"gte": n, "lte": n} for n in (a, b))
            last = self._both(self._range(f"{path}.b", same_b), self._range(f"{path}.c", {test: c}))
            later = self._any_of([self._range(f"{path}.b", {strict: b}), last])
            among = self._any_of(
                [self._range(f"{path}.a", {strict: a}), self._both(self._range(f"{path}.a", same_a), later)]
            )
            if ORDER[test](whole, value):
                among = self._any_of([among, self._none_of(some)])
        equal = self._range(f"number.{key}", {"gte": whole, "lte": whole})
        beyond = self._range(f"number.{key}", {strict: whole})
        return self._any_of([beyond, equal if among is None else self._both(equal, among)])

    def _both(self, one: Any, other: Any) -> Any:
        return self._models.Filter(must=[one, other])

    def _range(self, path: str, bounds: Mapping[str, float]) -> Any:
        return self._field(path, range=self._models.Range(**bounds))

    def _match(self, path: str, value: str) -> Any:
        return self._field(path, match=self._models.MatchValue(value=value))

    def _field(self, path: str, *, match: Any = None, range: Any = None) -> Any:
        return self._models.FieldCondition(key=path, match=match, range=range)

    def _any_of(self, parts: list[Any]) -> Any:
        return self._models.Filter(should=parts)

    def _none_of(self, part: Any) -> Any:
        return self._models.Filter(must_not=[part])

    def _points(self, points: list[str]) -> Any:
        return self._models.HasIdCondition(has_id=points or [_NO_POINT])


def _key(name: str, *, field: bool) -> str:
    """Return a name escaped so that it is one step of a JSON path.

    >>> _key("author.name", field=False), _key("source", field=True)
    ('m_author-2e-name', 'f_source')
    """
    safe = "".join(c if (c.isascii() and c.isalnum()) or c == "_" else f"-{ord(c):x}-" for c in name)
    return f"{'f' if field else 'm'}_{safe}"


def _token(value: Value) -> str:
    """Return a scalar as a keyword, the same for equal values only."""
    if value.kind == "text":
        text: str = value.payload
        if len(text) <= _LONGEST_KEYWORD and is_unicode(text):
            return f"t:{text}"
        return f"h:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"
    if value.kind == "boolean":
        return f"b:{'true' if value.payload else 'false'}"
    number = value.payload
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    return f"n:{number!r}"


def _split(number: float) -> tuple[int, tuple[int, int, int] | None]:
    """Split a number into integers that floats hold and that keep its order.

    Returns:
        The whole number at or below it, within 2**53; and None when that is all of it. Otherwise two halves of its
        bits, arranged so that they rise with the number, and what the nearest float lacks to an integer beyond 2**53.

    >>> _split(2020), _split(2.0), _split(2.5)[0], _split(2**53 + 1)[1][2]
    ((2020, None), (2, None), 2, 1)
    """
    if abs(number) < _EXACT_FLOATS and number == int(number):
        return int(number), None
    lacking = 0
    if isinstance(number, int):
        lacking = number - int(float(number))
    elif math.isinf(number):
        lacking = 1 if number > 0 else -1
    nearest = max(-sys.float_info.max, min(sys.float_info.max, float(number)))
    (bits,) = struct.unpack(">q", struct.pack(">d", nearest))
    rising = bits if bits >= 0 else -(bits & (2**63 - 1))
    whole = max(-_EXACT_FLOATS, min(_EXACT_FLOATS, math.floor(nearest)))
    return whole, (rising >> 32, rising & 0xFFFFFFFF, lacking)


def _replace_surrogates(text: str) -> str:
    return text if is_unicode(text) else "".join(_STAND_IN if 0xD800 <= ord(c) <= 0xDFFF else c for c in text)
