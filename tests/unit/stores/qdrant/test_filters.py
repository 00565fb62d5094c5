"""Filters over Qdrant: they mean what `matches` says, by Qdrant's real engine and by the client's imitation."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
from qdrant_client import QdrantClient, models

from colqwen3_retrievers import Page
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.stores.qdrant.collection import vectors_config
from colqwen3_retrievers.stores.qdrant.filters import compile_filter, filter_payload, index_paths, point_id
from colqwen3_retrievers.stores.where import Condition, Filter, Value, matches, parse
from tests.contracts.qdrant_edge_engine import EdgeEngine
from tests.unit.stores.test_where import any_filter, any_page

CREATE = models.CreateCollection(vectors=vectors_config(2, pool=0, graph=0), metadata={})
EDGES = [
    2**53 - 1, 2**53, 2**53 + 1, 2**53 + 2, float(2**53), 2**60 + 1, 2**60 - 1, -(2**53) - 1, -(2**53), -(2**53) + 1,
    2**63 - 1, -(2**63), 2**63, 2**64, 1e300, sys.float_info.max, -sys.float_info.max, 10**400, -(10**400), 0, -0.0,
    0.1, 5e-324, -0.5, 0.5, 1, 1.5, 2, -1, -1.5, -5e-324, 3.141592653589793, 3.1415926535897927, 3, 4503599627370495.5,
]  # fmt: skip


def points_of(pages: list[Page]) -> list[models.PointStruct]:
    return [
        models.PointStruct(id=point_id(page.id), vector={}, payload={"id": page.id, **filter_payload(page)})
        for page in pages
    ]


def as_filter(condition: Any) -> Any:
    return condition if condition is None or isinstance(condition, models.Filter) else models.Filter(must=[condition])


class Engine:
    """The real engine, with an index on some of the names."""

    def __init__(self, folder: Path, pages: list[Page], *, indexed: tuple[str, ...] = ()) -> None:
        self.engine = EdgeEngine(folder)
        self.engine.create_collection("pages", CREATE)
        for path, kind in index_paths(indexed).items() if indexed else ():
            self.engine.create_payload_index("pages", path, kind)
        self.engine.upsert("pages", points_of(pages))

    def ids(self, condition: Any) -> list[str]:
        found, _ = self.engine.scroll("pages", as_filter(condition), 10_000, offset=None, with_payload=["id"])
        return sorted(point["payload"]["id"] for point in found)


class Imitation:
    """The client's own."""

    def __init__(self, pages: list[Page]) -> None:
        self.client = QdrantClient(":memory:")
        self.client.create_collection("pages", vectors_config=CREATE.vectors)
        self.client.upsert("pages", points_of(pages))

    def ids(self, condition: Any) -> list[str]:
        found, _ = self.client.scroll("pages", as_filter(condition), 10_000, with_payload=["id"])
        return sorted(point.payload["id"] for point in found)


def check(engine: Engine | Imitation, tree: Filter | None, pages: list[Page], *, substrings: bool = True) -> bool:
    """Compare with the meaning; give whether the filter told pages apart and was said exactly."""
    expected = sorted(page.id for page in pages if matches(tree, page))
    compiled = compile_filter(tree, substrings=substrings)
    found = engine.ids(compiled.filter)
    if compiled.exact:
        assert found == expected, tree
    else:
        assert set(found) >= set(expected), tree
    return compiled.exact and 0 < len(expected) < len(pages)


def trees(seed: int, count: int) -> list[Filter | None]:
    rng, made = random.Random(seed), []
    while len(made) < count:
        try:
            made.append(parse(any_filter(rng)))
        except ConfigError:
            continue
    return made


@pytest.mark.parametrize(
    "indexed", [(), ("year", "name", "tags", "deep.key", "q'uo\"te", "Ünï")], ids=["plain", "indexed"]
)
def test_generated_filters_mean_the_same_in_the_engine(tmp_path: Path, indexed: tuple[str, ...]) -> None:
    rng = random.Random(21)
    pages = [any_page(rng, n) for n in range(120)]
    engine = Engine(tmp_path, pages, indexed=indexed)
    told_apart = sum(check(engine, tree, pages) for tree in trees(22, 300))
    assert told_apart > 90


def test_generated_filters_mean_the_same_in_the_imitation() -> None:
    rng = random.Random(23)
    pages = [any_page(rng, n) for n in range(60)]
    imitation = Imitation(pages)
    assert sum(check(imitation, tree, pages) for tree in trees(24, 150)) > 45


def test_a_server_that_finds_no_substrings_is_asked_for_more_and_never_for_less(tmp_path: Path) -> None:
    rng = random.Random(25)
    pages = [any_page(rng, n) for n in range(80)]
    engine = Engine(tmp_path, pages)
    for tree in trees(26, 150):
        check(engine, tree, pages, substrings=False)
        assert "substring" not in str(compile_filter(tree, substrings=False).filter)


def test_numbers_are_ordered_exactly_beyond_what_floats_tell_apart(tmp_path: Path) -> None:
    pages = [Page(id=f"p{n:02}", sha256="0", metadata={"x": value}) for n, value in enumerate(EDGES)]
    engine, imitation = Engine(tmp_path, pages), Imitation(pages)
    for value in [*EDGES, float("inf"), float("-inf"), 2**53 + 3, 2**63 + 1]:
        for operator in ("$gt", "$gte", "$lt", "$lte", "$eq", "$ne"):
            tree = parse({"x": {operator: value}})
            assert compile_filter(tree, substrings=True).exact
            check(engine, tree, pages)
            check(imitation, tree, pages)


def test_what_qdrant_cannot_say_is_told_apart_from_what_it_can() -> None:
    exact = [
        {"year": {"$gte": 2020}}, {"tags": {"$all": ["a", 1, True]}}, {"name": {"$itext": "Straße"}}, {"x": None},
        {"$not": {"$or": [{"a": {"$empty": True}}, {"b": {"$exists": False}}]}}, {"text": {"$text": ""}},
        {"id": {"$in": ["a", "b"]}}, {"$and": [{"$or": [{"x": {"$in": []}}]}]},
    ]  # fmt: skip
    wider = [
        {"name": {"$gt": "m"}}, {"$not": {"name": {"$lte": "m"}}}, {"$or": [{"year": 1}, {"date": {"$lt": "2024"}}]},
        {"name": {"$text": "\U0010ffff"}},
    ]  # fmt: skip
    assert all(compile_filter(parse(where), substrings=True).exact for where in exact)
    assert not any(compile_filter(parse(where), substrings=True).exact for where in wider)
    assert compile_filter(None, substrings=True).filter is None


def test_half_a_surrogate_pair_is_never_sent_and_never_found_by_its_stand_in(tmp_path: Path) -> None:
    pages = [
        Page(id="half", sha256="0", text="a\ud800B", metadata={"name": "N\udfff", "k\ud800": 1, "tags": ["\ud800"]}),
        Page(id="whole", sha256="0", text="a\U0010ffffB", metadata={"name": "N\U0010ffff", "tags": ["\U0010ffff"]}),
    ]
    engine = Engine(tmp_path, pages)
    for where in (
        {"name": "N\U0010ffff"}, {"tags": {"$contains": "\U0010ffff"}}, {"text": {"$text": "B"}},
        {"text": {"$itext": "b"}}, {"text": {"$text": "\U0010ffff"}}, {"name": {"$exists": True}},
    ):  # fmt: skip
        check(engine, parse(where), pages)
    for page in pages:
        str(filter_payload(page)).encode()


def test_a_long_text_is_a_short_keyword(tmp_path: Path) -> None:
    pages = [Page(id=f"p{n}", sha256="0", metadata={"x": "x" * 5000 + str(n)}) for n in range(3)]
    assert len(filter_payload(pages[0])["equal"]["m_x"]) < 100
    engine = Engine(tmp_path, pages)
    assert check(engine, parse({"x": "x" * 5000 + "1"}), pages)
    assert check(engine, parse({"x": {"$text": "x2"}}), pages)


def test_a_filter_of_the_most_values_and_of_the_deepest_nesting(tmp_path: Path) -> None:
    pages = [Page(id=f"p{n}", sha256="0", metadata={"x": n}) for n in range(4)]
    engine = Engine(tmp_path, pages)
    assert check(engine, parse({"x": {"$in": list(range(2, 9_000))}}), pages)
    deep: dict[str, Any] = {"x": {"$gt": 1}}
    for _ in range(31):
        deep = {"$not": deep}
    assert check(engine, parse(deep), pages)


def test_names_that_could_be_taken_for_one_another_are_not(tmp_path: Path) -> None:
    names = ["a.b", "a-2e-b", "a_b", "a b", "a-b", "a[0]", 'a"b', "ä", "source", "f_source", ""]
    pages = [Page(id=f"p{n}", source="s", sha256="0", metadata={name: 1}) for n, name in enumerate(names)]
    engine = Engine(tmp_path, pages)
    for name in names:
        check(engine, Condition(name, False, "in", (Value("number", 1),)), pages)
        check(engine, Condition(name, False, "exists"), pages)


def test_point_ids_never_change() -> None:
    assert point_id("a.pdf#page=1") == "dbe5be8b-af8c-59b1-a531-2515d7e60c1e"
