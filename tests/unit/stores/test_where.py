"""The filter language: what it refuses, what it means, and that SQL means the same."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from colqwen3_retrievers import EncoderInfo, MultiVector, Page
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore
from colqwen3_retrievers.stores.protocol import Record
from colqwen3_retrievers.stores.where import MAX_VALUES, And, Not, Or, matches, metadata_names, parse

INFO = EncoderInfo("ab12", "test", "tomoro", 2, 1, 1280, False, 1)
PAGE = Page(
    id="a",
    source='Käse\'s "report".pdf',
    number=3,
    label="iv",
    text="Revenue rose. Straße",
    sha256="00ff",
    metadata={
        "year": 2020,
        "ratio": 2.0,
        "flag": True,
        "name": "Ada",
        "none": None,
        "tags": ["tax", "Q1", 7, None, {"x": 1}, date(2024, 5, 1)],
        "nothing": [],
        "blank": "",
        "empty": {},
        "author": {"name": "Grace", "born": {"year": 1906}},
        "dotted.key": "surface",
        "dotted": {"key": "deep"},
        "source": "metadata source",
        "$odd": 1,
        "huge": 2**70,
        "day": date(2024, 5, 1),
        "moment": "2024-05-01T01:00+02:00",
        "zulu": "2024-04-30T23:00:00.5Z",
        "naive": "2024-05-01 10:00",
        "no moment": "2024-13-01T00:00Z",
        "moments": ["2024-05-01T02:00+02:00"],
    },
)


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        (None, True),
        ({}, True),
        ({"id": "a"}, True),
        ({"source": 'Käse\'s "report".pdf'}, True),
        ({"metadata.source": "metadata source"}, True),
        ({"number": 3, "label": "iv", "sha256": "00ff"}, True),
        ({"number": 3.0}, True),
        ({"text": {"$text": "Revenue"}}, True),
        ({"text": {"$itext": "STRASSE"}}, True),
        ({"text": {"$text": "revenue"}}, False),
        ({"year": 2020.0}, True),
        ({"year": "2020"}, False),
        ({"flag": True}, True),
        ({"flag": 1}, False),
        ({"year": {"$gt": 2019, "$lte": 2020}}, True),
        ({"year": {"$gt": "2019"}}, False),
        ({"name": {"$gte": "Ad", "$lt": "Ae"}}, True),
        ({"year": {"$ne": 2020}}, False),
        ({"missing": {"$ne": 1}}, True),
        ({"missing": {"$nin": [1]}}, True),
        ({"missing": None}, True),
        ({"none": None}, True),
        ({"name": None}, False),
        ({"name": {"$ne": None}}, True),
        ({"name": {"$in": ["Bob", "Ada"]}}, True),
        ({"missing": {"$in": [None, 4]}}, True),
        ({"name": {"$in": []}}, False),
        ({"name": {"$nin": []}}, True),
        ({"tags": {"$contains": "tax"}}, True),
        ({"tags": {"$contains": "ta"}}, False),
        ({"tags": {"$contains": 7.0}}, True),
        ({"tags": {"$contains": True}}, False),
        ({"name": {"$contains": "da"}}, True),
        ({"year": {"$contains": 2020}}, False),
        ({"tags": {"$any": ["x", "Q1"]}}, True),
        ({"tags": {"$all": ["tax", "Q1"]}}, True),
        ({"tags": {"$all": ["tax", "x"]}}, False),
        ({"tags": "tax"}, False),
        ({"name": {"$text": "d"}}, True),
        ({"tags": {"$text": "tax"}}, False),
        ({"name": {"$itext": "aDA"}}, True),
        ({"nothing": {"$empty": True}, "blank": {"$empty": True}, "empty": {"$empty": True}}, True),
        ({"none": {"$empty": True}, "missing": {"$empty": True}}, True),
        ({"tags": {"$empty": True}}, False),
        ({"author": {"$exists": True}, "none": {"$exists": False}}, True),
        ({"author.name": "Grace", "author.born.year": {"$lt": 2000}}, True),
        ({"dotted.key": "surface"}, True),
        ({"dotted.key": "deep"}, False),
        ({"metadata.$odd": 1}, True),
        ({"huge": 2**70}, True),
        ({"huge": {"$lt": 10**400}}, True),
        ({"year": {"$lt": math.inf}}, True),
        ({"year": np.int64(2020)}, True),
        ({"year": Decimal("2020.0"), "name": {"$in": {"Ada"}}}, True),
        ({"day": {"$gte": date(2024, 5, 1), "$lt": date(2024, 5, 2)}, "tags": {"$contains": date(2024, 5, 1)}}, True),
        ({"day": date(2024, 5, 1), "$not": {"day": datetime(2024, 5, 1)}}, True),
        ({"moment": {"$lt": "2024-05-01T00:00:00Z"}}, True),
        ({"moment": "2024-04-30T23:00:00Z", "zulu": "2024-04-30T23:00:00.50+00:00"}, True),
        ({"moment": datetime(2024, 4, 30, 23), "zulu": {"$gt": datetime(2024, 4, 30, 23)}}, True),
        ({"moment": {"$in": [datetime(2024, 4, 30, 18, tzinfo=timezone(timedelta(hours=-5)))]}}, True),
        ({"moment": {"$gt": date(2024, 4, 30), "$lt": date(2024, 5, 1)}}, True),
        ({"naive": datetime(2024, 5, 1, 10, tzinfo=UTC), "zulu": {"$lt": "2024-04-30 23:00:01"}}, True),
        ({"naive": {"$text": "-01 10:00"}, "moment": {"$itext": "t01:00+02"}}, True),
        ({"moment": {"$text": "04-30T23:00"}, "zulu": {"$contains": ".5Z"}}, True),
        ({"zulu": {"$text": "2024-05-01T01:00:00.5+02:00"}}, True),
        ({"moments": {"$any": ["2024-05-01T00:00Z", datetime(2024, 1, 1)]}}, True),
        ({"moments": {"$all": ["2024-05-01T00:00Z", datetime(2024, 1, 1)]}}, False),
        ({"moment": {"$empty": False}, "no moment": "2024-13-01T00:00Z"}, True),
        ({"moment": {"$empty": True}}, False),
        ({"label": "2024-04-30T23:00:00Z"}, False),
        ({"$or": [{"year": 1}, {"name": "Ada"}]}, True),
        ({"$and": [{"year": 1}, {"name": "Ada"}]}, False),
        ({"$not": {"$or": [{"year": 1}, {"name": "Bob"}]}}, True),
        ({"year": {"$not": {"$gt": 2020}}}, True),
        ({"$or": [{}, {"year": 1}]}, True),
    ],
)
def test_meaning(where: dict[str, Any] | None, holds: bool, store_of_one: EmbeddedStore) -> None:
    assert matches(where, PAGE) is holds
    assert store_of_one.ids(where) == (["a"] if holds else [])


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("year", "expected a filter {name: value}, got 'year'"),
        ([("year", 1)], "expected a filter"),
        ({1: 2}, "names are strings, got 1"),
        ({"$nor": []}, r"unknown operator '\$nor'"),
        ({"year": {"$above": 1}}, r"'year': unknown operator '\$above'; known: \$eq"),
        ({"author": {"name": "Ada"}}, "a nested key is written 'author.name'"),
        ({"year": {}}, "'year': an empty object"),
        ({"year": [2020]}, r"'year': \$eq: expected one text, number or boolean, got \[2020\]; use \$in"),
        ({"year": {"$in": 2020}}, r"\$in: expected a list, got 2020"),
        ({"year": {"$in": "2020"}}, r"\$in: expected a list"),
        ({"year": {"$in": [[1]]}}, "expected one text"),
        ({"year": float("nan")}, "got nan"),
        ({"year": 1j}, "expected a text, a number, a boolean, a date or a time, got 1j"),
        ({"year": {"$gt": True}}, "a boolean has no order"),
        ({"year": {"$gt": None}}, "expected a text, a number, a boolean, a date or a time, got None"),
        ({"name": {"$text": 3}}, "a text is looked for in texts, got 3"),
        ({"number": {"$text": "3"}}, r"'number': \$text: number is a number"),
        ({"number": "3"}, "number is a number, got '3'"),
        ({"number": {"$contains": 3}}, "number is a number"),
        ({"source": 3}, "source is a text, got 3"),
        ({"source": {"$gt": 3}}, "source is a text, got 3"),
        ({"year": {"$exists": 1}}, "expected True or False, got 1"),
        ({"year": {"$empty": "no"}}, "expected True or False"),
        ({"year": {"$not": 3}}, r"expected operators such as \{'\$gt': 3\}, got 3"),
        ({"$or": []}, r"\$or: expected a list of at least one filter, got \[\]"),
        ({"$and": {"year": 1}}, r"\$and: expected a list"),
        ({"$or": [1]}, "expected a filter"),
        ({"$not": [1]}, "expected a filter"),
        ({"name": "\ud800"}, "'name': .eq: not valid Unicode"),
        ({"\ud800": 1}, "not valid Unicode"),
        ({"year": {"$in": list(range(MAX_VALUES + 1))}}, "10,001 values in one filter, at most 10,000"),
    ],
)
def test_refusals_name_key_operator_and_value(where: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(where)


def test_too_deep_is_refused() -> None:
    where: dict[str, Any] = {"year": 1}
    for _ in range(40):
        where = {"$not": where}
    with pytest.raises(ConfigError, match="nested deeper than 32"):
        parse(where)
    operators: dict[str, Any] = {"$gt": 1}
    for _ in range(40):
        operators = {"$not": operators}
    with pytest.raises(ConfigError, match="nested deeper than 32"):
        parse({"year": operators})


def test_parsing_twice_is_parsing_once() -> None:
    tree = parse({"year": {"$gte": 2020}, "$or": [{"a": 1}, {"b": None}]})
    assert parse(tree) is tree
    assert hash(tree) == hash(parse({"year": {"$gte": 2020}, "$or": [{"a": 1}, {"b": None}]}))


def test_wide_filters_stay_within_the_bounds_of_sql(store_of_one: EmbeddedStore) -> None:
    assert store_of_one.ids({"$or": [{"year": year} for year in range(5_000)]}) == ["a"]
    assert store_of_one.ids({"year": {"$in": list(range(MAX_VALUES))}}) == ["a"]
    assert store_of_one.ids({"tags": {"$all": ["tax"] * 3_000}}) == ["a"]


@pytest.mark.parametrize("evil", ["' OR 1=1 --", '"; DROP TABLE pages; --', "?", "a') OR ('1'='1", "\0", "%", "p.key"])
def test_names_and_values_are_never_sql(evil: str, store_of_one: EmbeddedStore) -> None:
    for where in ({evil: 1}, {"name": evil}, {f"metadata.{evil}": {"$contains": evil}}, {"id": evil}):
        assert store_of_one.ids(where) == []
    assert store_of_one.ids({evil: None}) == ["a"]
    assert len(store_of_one) == 1


NAMES = ["year", "name", "tags", "deep.key", "a.b.c", "odd key", "Ünï", "q'uo\"te", "source", "metadata.source",
         "label", "number", "id", "sha256", "text", "never", "metadata.text"]  # fmt: skip
TEXTS = [
    "",
    "a",
    "A",
    "ä",
    "Ä",
    "ß",
    "SS",
    "a'b",
    'a"b',
    "1",
    "true",
    "null",
    "日本",
    "\U0001f600",
    "\uffff",
    "a\0b",
    "%",
    "_",
    "2024-05-01",
    "2024-05-01T01:00+02:00",
    "2024-04-30T23:00:00Z",
    "2024-04-30 23:00:00.0",
    "2024-04-30T23:00:00+00:00",
    "T23:00:00",
]
NUMBERS = [0, -0.0, 1, 1.0, -1, 2**53, 2**53 + 1, float(2**53), 2**63 - 1, 2**63, -(2**63), 2**70, 0.1, 1e300, 10**400]


def any_scalar(rng: random.Random) -> Any:
    return rng.choice([rng.choice(TEXTS), rng.choice(NUMBERS), rng.choice([True, False])])


def any_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if kind < 0.12:
        return None
    if kind < 0.3:
        return [rng.choice([any_scalar(rng), None, {}, [1]]) for _ in range(rng.randrange(4))]
    if kind < 0.4 and depth < 2:
        return {rng.choice(["key", "b", "c", "b.c"]): any_value(rng, depth + 1) for _ in range(rng.randrange(3))}
    return any_scalar(rng)


def any_page(rng: random.Random, n: int) -> Page:
    keys = ["year", "name", "tags", "deep", "deep.key", "a", "a.b", "odd key", "Ünï", "q'uo\"te", "source", "text"]
    return Page(
        id=f"{rng.choice(TEXTS)}#{n}",
        source=rng.choice(TEXTS),
        number=rng.choice([1, 2, 3, 2**53 + 1]),
        label=rng.choice([None, *TEXTS]),
        text="".join(rng.choices(TEXTS, k=3)),
        metadata={key: any_value(rng) for key in keys if rng.random() < 0.6},
        sha256=f"{n:02x}",
    )


def any_filter(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    if depth < 3 and rng.random() < 0.4:
        kind = rng.choice(["$and", "$or", "$not"])
        if kind == "$not":
            return {"$not": any_filter(rng, depth + 1)}
        return {kind: [any_filter(rng, depth + 1) for _ in range(rng.randrange(1, 4))]}
    operator = rng.choice(["$eq", "$ne", "$gt", "$gte", "$lt", "$lte", "$in", "$nin", "$contains", "$any", "$all",
                           "$text", "$itext", "$empty", "$exists"])  # fmt: skip
    value: Any
    if operator in ("$in", "$nin"):
        value = [rng.choice([any_scalar(rng), None]) for _ in range(rng.randrange(4))]
    elif operator in ("$any", "$all"):
        value = [any_scalar(rng) for _ in range(rng.randrange(3))]
    elif operator in ("$empty", "$exists"):
        value = rng.random() < 0.5
    elif operator in ("$text", "$itext"):
        value = rng.choice(TEXTS)
    else:
        value = any_scalar(rng)
    return {rng.choice(NAMES): {operator: value}}


@pytest.fixture(scope="module")
def store_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    with EmbeddedStore(tmp_path_factory.mktemp("one"), info=INFO) as store:
        store.add([Record(PAGE, MultiVector(np.eye(2, dtype=np.float32)))])
        yield store


def test_sql_and_python_agree_on_generated_filters(tmp_path: Path) -> None:
    rng = random.Random(20)
    pages = [any_page(rng, n) for n in range(120)]
    refused = partial = 0
    with EmbeddedStore(tmp_path, info=INFO) as store:
        store.add(Record(page, MultiVector(np.eye(2, dtype=np.float32))) for page in pages)
        stored = [record.page for record in store.get([page.id for page in pages])]
        assert [page.metadata for page in stored] == [page.metadata for page in pages]
        for _ in range(1_200):
            where = any_filter(rng)
            try:
                tree = parse(where)
            except ConfigError:
                refused += 1
                continue
            expected = sorted(page.id for page in pages if matches(tree, page))
            assert store.ids(where) == expected, where
            partial += 0 < len(expected) < len(pages)
    assert partial > 400 and refused < 600, (partial, refused)  # the filters do tell pages apart


def test_half_a_surrogate_pair_in_text_and_metadata_is_kept(tmp_path: Path) -> None:
    page = Page(id="x", text="a\ud800B", sha256="00", metadata={"k\ud800": 1, "name": "N\udfffa", "tags": ["\ud800"]})
    with EmbeddedStore(tmp_path, info=INFO) as store:
        store.add([Record(page, MultiVector(np.eye(2, dtype=np.float32)))])
        kept = store.get(["x"])[0].page
        assert (kept.text, kept.metadata) == (page.text, page.metadata)
        for where in ({"text": {"$itext": "b"}}, {"name": {"$itext": "n"}}, {"name": {"$text": "N"}}):
            assert store.ids(where) == ["x"] and matches(where, page)


def test_every_llama_index_operator_can_be_said() -> None:
    operators = pytest.importorskip("llama_index.core.vector_stores.types").FilterOperator
    said = {
        "EQ": {"year": 2020}, "NE": {"year": {"$ne": 1}}, "GT": {"year": {"$gt": 1}}, "GTE": {"year": {"$gte": 1}},
        "LT": {"year": {"$lt": 9999}}, "LTE": {"year": {"$lte": 9999}}, "IN": {"year": {"$in": [2020]}},
        "NIN": {"year": {"$nin": [1]}}, "ANY": {"tags": {"$any": ["tax"]}}, "ALL": {"tags": {"$all": ["tax", "Q1"]}},
        "CONTAINS": {"tags": {"$contains": "tax"}}, "TEXT_MATCH": {"name": {"$text": "Ad"}},
        "TEXT_MATCH_INSENSITIVE": {"name": {"$itext": "ad"}}, "IS_EMPTY": {"never": {"$empty": True}},
    }  # fmt: skip
    assert set(said) == {operator.name for operator in operators}
    assert all(matches(where, PAGE) for where in said.values())


def test_the_tree_is_what_stores_compile() -> None:
    tree = parse({"a": {"$ne": 1}, "$or": [{"b": 1}, {"c": 2}]})
    assert isinstance(tree, And) and isinstance(tree.parts[0], Not) and isinstance(tree.parts[1], Or)


def test_page_is_another_name_of_the_number() -> None:
    page = Page(source="a.pdf", number=3, metadata={"page": 7})
    for where in ({"page": 3}, {"page": {"$gte": 3}}, {"metadata.page": 7}, {"$not": {"page": {"$in": [7]}}}):
        assert matches(where, page), where
    assert parse({"page": 3}) == parse({"number": 3})
    for asked in ("3", {"$text": "3"}, {"$in": [3, "3"]}):
        with pytest.raises(ConfigError, match="page is a number, got '3'"):
            parse({"page": asked})


def test_metadata_names_of_a_filter() -> None:
    assert metadata_names(None) == metadata_names({"page": 1, "source": "a"}) == []
    assert metadata_names({"$not": {"$or": [{"a": 1}, {"b.c": {"$ne": None}}]}, "metadata.id": 1}) == ["a", "b.c", "id"]
