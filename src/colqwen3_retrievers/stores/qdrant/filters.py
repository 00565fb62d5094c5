"""Filters as Qdrant's own, and what each page's payload holds so that they mean the same there.

Qdrant matches keywords, ranges of 64-bit floats and parts of texts, and may lose the last bit of a float it keeps (its
engine read 9007199254740991.0 back as ...990.0). The language of :mod:`.where` has three kinds of values, exact 64-bit
integers, an order of texts, and names that may hold any character. So every page carries its facts in a shape in which
Qdrant's conditions say exactly what is meant::

    names    ["m_year", "m_author", "m_author:text"]   what is there, and which of it is text
    full     ["m_year", "m_author"]                     what is there and not empty
    equal    {"m_year": "n:2020", "m_author": "t:Ada"}  one keyword a value, its kind in front
    items    {"m_tags": ["t:tax", "n:3"]}               the same of the elements of a list
    number   {"m_year": 2020}                           the whole number at or below it, within 2**53
    rest     {"m_ratio": {"a": ..., "b": ..., "c": 0}}  where that is not all: its place among all numbers
    text     {"m_author": "Ada"}, folded {...}          as it is, and casefolded

Keys are names with every character but letters, digits and the underscore written as ``-hex-``, behind ``f_`` for the
page's own fields and ``m_`` for metadata. What Qdrant cannot say (the order of texts; parts of texts before server
1.20) is compiled to a wider filter, marked as such, and the pages it finds are filtered again here.
"""

from __future__ import annotations

import hashlib
import math
import operator
import struct
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from colqwen3_retrievers.errors import require
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.stores.values import Value, facts, scalar
from colqwen3_retrievers.stores.where import FIELDS, And, Condition, Filter, Not

_NAMESPACE: Final = uuid.UUID("6e1fd1b6-7f6c-5a3c-9d0e-5b8f0c3c1d52")
_NOBODY: Final = "00000000-0000-0000-0000-000000000000"  # no uuid5 is all zeros, so no point has this id
_STAND_IN: Final = "\U0010ffff"  # for half a surrogate pair, which JSON cannot carry
_LONGEST_KEYWORD: Final = 200
_EXACT_FLOATS: Final = 2**53


@dataclass(frozen=True, slots=True)
class Compiled:
    """A filter as Qdrant takes it.

    Attributes:
        filter: a condition of ``qdrant_client.models``, or None for every page.
        exact: whether it holds for just the pages that are meant; otherwise for these and perhaps for others.
    """

    filter: Any
    exact: bool


def point_id(page_id: str) -> str:
    """Give the id of a page's point: a UUID of version 5, always the same for the same page.

    Raises:
        UnicodeEncodeError: half a surrogate pair, which no stored id has.

    >>> point_id("a.pdf#page=1") == point_id("a.pdf#page=1") != point_id("a.pdf#page=2")
    True
    """
    return str(uuid.uuid5(_NAMESPACE, page_id))


def compile_filter(tree: Filter | None, *, substrings: bool) -> Compiled:
    """Compile a parsed filter.

    Args:
        tree: of :func:`~colqwen3_retrievers.stores.where.parse`.
        substrings: whether the server can look for parts of texts (``MatchSubstring``, Qdrant 1.20).

    Raises:
        MissingExtraError: qdrant-client is not installed.

    >>> from colqwen3_retrievers.stores.where import parse
    >>> compile_filter(parse({"year": 2020}), substrings=True).filter.match.any
    ['n:2020']
    >>> compile_filter(parse({"name": {"$gt": "m"}}), substrings=True).exact   # texts have no order in Qdrant
    False
    """
    return _Compiler(substrings).compile(tree)


def filter_payload(page: Page) -> dict[str, Any]:
    """Give the part of a page's payload that filters are evaluated on.

    >>> made = filter_payload(Page(source="a.pdf", metadata={"year": 2020, "tags": ["x"]}))
    >>> made["equal"]["f_source"], made["equal"]["m_year"], made["number"]["m_year"], made["items"]
    ('t:a.pdf', 'n:2020', 2020, {'m_tags': ['t:x']})
    """
    known = {_key(name, field=True): scalar(getattr(page, name)) for name in FIELDS}
    known |= {_key(name, field=False): value for name, value in facts(page.metadata).items() if _valid(name)}
    made: dict[str, Any] = {part: {} for part in ("equal", "items", "number", "rest", "text", "folded")}
    made |= {"names": [], "full": []}
    for key, value in known.items():
        if value is None:
            continue
        made["names"].append(key)
        if value.payload != "" and not (value.kind in ("list", "object") and value.size == 0):
            made["full"].append(key)
        if value.kind == "list":
            made["items"][key] = list(dict.fromkeys(_token(element) for element in value.payload))
        elif value.kind != "object":
            made["equal"][key] = _token(value)
        if value.kind == "text":
            made["names"].append(f"{key}:text")
            made["text"][key] = _valid_text(value.payload)
            made["folded"][key] = _valid_text(value.payload.casefold())
        elif value.kind == "number":
            made["number"][key], rest = _split(value.payload)
            if rest is not None:
                made["rest"][key] = dict(zip("abc", rest, strict=True))
    return {part: value for part, value in made.items() if value}


def index_paths(names: Iterable[str]) -> dict[str, str]:
    """Give the payload indexes a collection has: path -> kind, for the page's own fields and these metadata names.

    >>> index_paths(["year"])["number.m_year"]
    'integer'
    """
    kept = {"names": "keyword", "full": "keyword", "image": "keyword"}
    for key in (_key("source", field=True), _key("sha256", field=True)):
        kept[f"equal.{key}"] = "keyword"
    kept[f"number.{_key('number', field=True)}"] = "integer"
    for name in names:
        key = _key(name.removeprefix("metadata."), field=False)
        kept |= {f"equal.{key}": "keyword", f"items.{key}": "keyword", f"number.{key}": "integer"}
    return kept


def has_ids(points: Sequence[str]) -> Any:
    """Give the filter that holds for these points only."""
    models = require("qdrant", "qdrant_client.models", "qdrant-client")
    return models.Filter(must=[models.HasIdCondition(has_id=list(points) or [_NOBODY])])


_ORDER: Final = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}


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
            if not inner.exact:  # what is wider does not get narrower by being negated: all that is known is "any page"
                return Compiled(None, False)
            return Compiled(self._nobody() if inner.filter is None else self._none_of(inner.filter), True)
        parts = [self.compile(part) for part in tree.parts]
        exact = all(part.exact for part in parts)
        if isinstance(tree, And):
            known = [part.filter for part in parts if part.filter is not None]
            return Compiled(self._models.Filter(must=known) if known else None, exact)
        if any(part.filter is None for part in parts):
            return Compiled(None, exact)
        return Compiled(self._any_of([part.filter for part in parts]) if parts else self._nobody(), exact)

    def _condition(self, condition: Condition) -> Compiled:
        key, test, values = _key(condition.name, field=condition.field), condition.test, condition.values
        if test == "exists":
            return Compiled(self._match("names", key), True)
        if test == "empty":
            return Compiled(self._none_of(self._match("full", key)), True)
        if test == "in":
            if condition.field and condition.name == "id":
                points = [point_id(value.payload) for value in values]
                return Compiled(self._models.HasIdCondition(has_id=points or [_NOBODY]), True)
            if not values:
                return Compiled(self._nobody(), True)
            tokens = [_token(value) for value in values]
            return Compiled(self._field(f"equal.{key}", match=self._models.MatchAny(any=tokens)), True)
        asked = values[0]
        if test == "contains":
            element = self._field(f"items.{key}", match=self._models.MatchAny(any=[_token(asked)]))
            if asked.kind != "text":
                return Compiled(element, True)
            inside = self._inside(key, "text", asked.payload)
            return Compiled(self._any_of([element, inside.filter]), inside.exact)
        if test in ("text", "itext"):
            folded = test == "itext"
            return self._inside(
                key, "folded" if folded else "text", asked.payload.casefold() if folded else asked.payload
            )
        if asked.kind == "number":
            return Compiled(self._ordered(key, test, asked.payload), True)
        return Compiled(self._match("names", f"{key}:text"), False)

    def _inside(self, key: str, part: str, wanted: str) -> Compiled:
        """Texts with ``wanted`` inside."""
        if not wanted or not self._substrings or _STAND_IN in wanted:
            return Compiled(self._match("names", f"{key}:text"), not wanted)
        return Compiled(self._field(f"{part}.{key}", match=self._models.MatchSubstring(substring=wanted)), True)

    def _ordered(self, key: str, test: str, value: float) -> Any:
        """Compare whole parts, and the rest where they are equal. A page without a rest is a whole number."""
        whole, rest = _split(value)
        strict = "gt" if test.startswith("g") else "lt"
        path = f"rest.{key}"
        some = self._range(f"{path}.a", {"gte": -(2**32)})
        if rest is None:  # pages with a rest lie just above this whole number
            among = {"gt": some, "gte": None, "lt": self._nobody(), "lte": self._none_of(some)}[test]
        else:
            a, b, c = rest
            same_a, same_b = ({"gte": n, "lte": n} for n in (a, b))
            last = self._both(self._range(f"{path}.b", same_b), self._range(f"{path}.c", {test: c}))
            later = self._any_of([self._range(f"{path}.b", {strict: b}), last])
            among = self._any_of(
                [self._range(f"{path}.a", {strict: a}), self._both(self._range(f"{path}.a", same_a), later)]
            )
            if _ORDER[test](whole, value):
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

    def _nobody(self) -> Any:
        return self._models.HasIdCondition(has_id=[_NOBODY])


def _key(name: str, *, field: bool) -> str:
    """Write a name so that it is one step of a JSON path, whatever it holds.

    >>> _key("author.name", field=False), _key("source", field=True)
    ('m_author-2e-name', 'f_source')
    """
    safe = "".join(c if (c.isascii() and c.isalnum()) or c == "_" else f"-{ord(c):x}-" for c in name)
    return f"{'f' if field else 'm'}_{safe}"


def _token(value: Value) -> str:
    """Write a scalar as a keyword: equal values alike, others never."""
    if value.kind == "text":
        text: str = value.payload
        if len(text) <= _LONGEST_KEYWORD and _valid(text):
            return f"t:{text}"
        return f"h:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"
    if value.kind == "boolean":
        return f"b:{'true' if value.payload else 'false'}"
    number = value.payload
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    return f"n:{number!r}"


def _split(number: float) -> tuple[int, tuple[int, int, int] | None]:
    """Split a number into a whole one and the rest, each part an integer that a float holds, in the order of numbers.

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


def _valid(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _valid_text(text: str) -> str:
    return text if _valid(text) else "".join(_STAND_IN if 0xD800 <= ord(c) <= 0xDFFF else c for c in text)
