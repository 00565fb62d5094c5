"""LangChain's own SelfQueryRetriever over our vector store: a question becomes a search with a filter."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, date, datetime
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import FakeListLLM
from langchain_core.structured_query import Comparator, Comparison, Operation, Operator, StructuredQuery

from colqwen3_retrievers.langchain import ColQwen3Translator, ColQwen3VectorStore

pytest.importorskip("lark")  # LangChain's parser of filters
retrievers = pytest.importorskip("langchain_classic.retrievers")

FIELDS = [
    {"name": name, "description": name, "type": kind}
    for name, kind in (("year", "integer"), ("day", "date"), ("sent", "datetime"), ("tags", "list[string]"),
                       ("author.name", "string"), ("final", "boolean"), ("page", "integer"), ("price", "float"))
]  # fmt: skip
DOCUMENTS = [
    Document("tax report", id="tax", metadata={
        "year": 2023, "day": date(2023, 5, 1), "sent": datetime(2023, 5, 1, 9, tzinfo=UTC), "tags": ["tax", "law"],
        "author": {"name": "Ada"}, "final": True, "page": 1, "price": 1.5}),
    Document("rent report", id="rent", metadata={
        "year": 2024, "day": date(2024, 5, 1), "sent": "2024-05-01T01:00:00+02:00", "tags": ["rent"],
        "author": {"name": "Grace"}, "final": False, "page": 2}),
    Document("wine list", id="wine", metadata={"year": 2024, "day": date(2024, 6, 1), "author": {"name": "Adam"}}),
]  # fmt: skip


def self_query(store: ColQwen3VectorStore, answer: dict[str, Any], **options: Any) -> Any:
    """The retriever over a language model that always gives one answer."""
    llm = FakeListLLM(responses=[f"```json\n{json.dumps(answer)}\n```"])
    return retrievers.SelfQueryRetriever.from_llm(
        llm, store, "reports", FIELDS, structured_query_translator=ColQwen3Translator(), **options
    )


@pytest.mark.parametrize(
    ("written", "ids"),
    [
        ("NO_FILTER", {"tax", "rent", "wine"}),
        ('eq("year", 2024)', {"rent", "wine"}),
        ('ne("year", 2024)', {"tax"}),
        ('and(gte("year", 2023), lt("year", 2024))', {"tax"}),
        ('or(eq("year", 2023), contain("tags", "rent"))', {"tax", "rent"}),
        ('not(contain("tags", "tax"))', {"rent", "wine"}),
        ('in("author.name", ["Ada", "Grace"])', {"tax", "rent"}),
        ('nin("author.name", ["Ada", "Grace"])', {"wine"}),
        ('in("author.name", "Ada")', {"tax"}),
        ('like("author.name", "%aDa%")', {"tax", "wine"}),
        ('gt("day", "2024-05-01")', {"wine"}),
        ('lte("day", "2024-05-01")', {"tax", "rent"}),
        ('in("day", ["2024-05-01", "2024-06-01"])', {"rent", "wine"}),
        ('lt("sent", "2024-04-30T23:30:00Z")', {"tax", "rent"}),
        ('eq("sent", "2024-04-30T23:00:00Z")', {"rent"}),
        ('and(eq("final", true), lte("price", 1.5))', {"tax"}),
        ('eq("page", 2)', {"rent"}),
    ],
)
def test_a_question_becomes_a_filter(store: ColQwen3VectorStore, written: str, ids: set[str]) -> None:
    store.add_documents(DOCUMENTS)
    retriever = self_query(store, {"query": "report", "filter": written}, search_kwargs={"k": 9})
    assert {document.id for document in retriever.invoke("which reports?")} == ids
    assert {document.id for document in asyncio.run(retriever.ainvoke("which reports?"))} == ids


def test_limits_diversity_and_questions_that_are_all_filter(store: ColQwen3VectorStore) -> None:
    store.add_documents(DOCUMENTS)
    answer = {"query": "", "filter": 'eq("year", 2024)', "limit": 1}
    retriever = self_query(store, answer, enable_limit=True, use_original_query=True, search_type="mmr")
    assert [document.id for document in retriever.invoke("one wine list of 2024")] == ["wine"]


def test_a_negation_of_several_holds_where_none_does() -> None:
    years = [Comparison(Comparator.EQ, "year", year) for year in (2023, 2024)]
    query = StructuredQuery("report", Operation(Operator.NOT, years), limit=2)
    assert ColQwen3Translator().visit_structured_query(query) == (
        "report", {"filter": {"$not": {"$or": [{"year": {"$eq": 2023}}, {"year": {"$eq": 2024}}]}}}
    )  # fmt: skip
