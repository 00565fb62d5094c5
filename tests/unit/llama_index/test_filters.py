"""LlamaIndex's filters in the language of the stores: every operator means what it means in LlamaIndex's own store."""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters
from llama_index.core.vector_stores.utils import build_metadata_filter_fn

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.llama_index import filters_to_where
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.stores.where import matches

AND, OR, NOT = FilterCondition.AND, FilterCondition.OR, FilterCondition.NOT

PAGES = [
    Page(source="a.pdf", number=3, label="iii", metadata={"year": 2021, "tags": ["tax", "law"], "title": "The Report"}),
    Page(source="b.pdf", number=4, metadata={"year": 2019, "tags": [], "title": ""}),
    Page(source="c.pdf", number=5, metadata={"year": 2021, "title": "report of 2021"}),
    Page(source="d.pdf", number=6),
]  # fmt: skip


def one(key: str, operator: FilterOperator, value: Any = None) -> MetadataFilter:
    return MetadataFilter(key=key, operator=operator, value=value)


def group(*filters: MetadataFilter | MetadataFilters, condition: FilterCondition | None = AND) -> MetadataFilters:
    return MetadataFilters(filters=list(filters), condition=condition)


def found(filters: MetadataFilters | None) -> list[int]:
    return [page.number for page in PAGES if matches(filters_to_where(filters), page)]


SINGLE = [
    (one("year", FilterOperator.EQ, 2021), [3, 5]),
    (one("year", FilterOperator.NE, 2021), [4, 6]),
    (one("year", FilterOperator.GT, 2019), [3, 5]),
    (one("year", FilterOperator.GTE, 2019), [3, 4, 5]),
    (one("year", FilterOperator.LT, 2021), [4]),
    (one("year", FilterOperator.LTE, 2021), [3, 4, 5]),
    (one("year", FilterOperator.IN, [2019, 2030]), [4]),
    (one("year", FilterOperator.NIN, [2019, 2030]), [3, 5, 6]),
    (one("tags", FilterOperator.ANY, ["law", "art"]), [3]),
    (one("tags", FilterOperator.ALL, ["law", "tax"]), [3]),
    (one("tags", FilterOperator.ALL, ["law", "art"]), []),
    (one("tags", FilterOperator.CONTAINS, "tax"), [3]),
    (one("title", FilterOperator.TEXT_MATCH, "Report"), [3]),
    (one("title", FilterOperator.TEXT_MATCH_INSENSITIVE, "REPORT"), [3, 5]),
    (one("title", FilterOperator.IS_EMPTY), [4, 6]),
    (one("tags", FilterOperator.IS_EMPTY), [4, 5, 6]),
]


def test_every_operator_is_tried() -> None:
    assert {item.operator for item, _ in SINGLE} == set(FilterOperator)


@pytest.mark.parametrize(("item", "expected"), SINGLE, ids=lambda value: getattr(value, "operator", None))
def test_an_operator_finds_what_it_says(item: MetadataFilter, expected: list[int]) -> None:
    assert found(group(item)) == expected
    assert found(group(item, condition=NOT)) == [page.number for page in PAGES if page.number not in expected]


@pytest.mark.parametrize(("item", "expected"), SINGLE, ids=lambda value: getattr(value, "operator", None))
def test_an_operator_means_what_it_means_in_llama_index(item: MetadataFilter, expected: list[int]) -> None:
    metadata = {str(page.number): page.metadata for page in PAGES}
    holds = build_metadata_filter_fn(metadata.__getitem__, group(item))
    assert [page.number for page in PAGES if holds(str(page.number))] == expected


def test_conditions_nest() -> None:
    recent, taxes = one("year", FilterOperator.GTE, 2020), one("tags", FilterOperator.CONTAINS, "tax")
    assert found(group(recent, taxes)) == [3]
    assert found(group(recent, taxes, condition=None)) == [3]
    assert found(group(recent, one("year", FilterOperator.LT, 2020), condition=OR)) == [3, 4, 5]
    assert found(group(recent, one("page", FilterOperator.EQ, 4), condition=NOT)) == [6], "NOT: none of them holds"
    assert found(group(recent, group(taxes, condition=NOT))) == [5]
    assert found(group(group(taxes, one("page", FilterOperator.EQ, 6), condition=OR), recent)) == [3]
    assert found(group(group(group(taxes, condition=NOT), condition=NOT))) == [3]


def test_keys_are_those_of_the_nodes() -> None:
    assert found(group(one("page", FilterOperator.LTE, 4))) == [3, 4]
    assert found(group(one("page", FilterOperator.EQ, "4"))) == [4], "as language models write it"
    assert found(group(one("page", FilterOperator.IN, ["4", "6"]))) == [4, 6]
    assert found(group(one("page_label", FilterOperator.EQ, "iii"))) == [3]
    assert found(group(one("page_id", FilterOperator.IN, ["a.pdf#page=3", "d.pdf#page=6"]))) == [3, 6]
    assert found(group(one("source", FilterOperator.EQ, "b.pdf"))) == [4]


@pytest.mark.parametrize("filters", [None, group(), group(condition=NOT), group(condition=OR), group(group(), group())])
def test_no_filter_is_every_page(filters: MetadataFilters | None) -> None:
    assert filters_to_where(filters) is None
    assert found(filters) == [3, 4, 5, 6]


def test_what_cannot_be_asked_is_told_with_its_key() -> None:
    with pytest.raises(ConfigError, match=r"'tags'.*\$in.*list"):
        filters_to_where(group(one("tags", FilterOperator.IN, "tax")))
    with pytest.raises(ConfigError, match=r"'page'.*number is a number, got 'iii'"):
        filters_to_where(group(group(one("page", FilterOperator.EQ, "iii"))))
    with pytest.raises(ConfigError, match="expected MetadataFilters, got dict"):
        filters_to_where({"year": 2021})  # type: ignore[arg-type]
