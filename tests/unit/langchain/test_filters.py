"""Filters on the metadata that documents show, in every way of asking."""

from __future__ import annotations

import pytest
from langchain_core.documents import Document

from colqwen3_retrievers import Page
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.langchain import ColQwen3Retriever, ColQwen3VectorStore

WORDS = {"tax", "rent", "wine", "bread"}


def ids(documents: list[Document]) -> list[str | None]:
    return [document.id for document in documents]


def test_filters_are_over_the_metadata_that_documents_show(words: ColQwen3VectorStore) -> None:
    words.index.add([Page(source="a.pdf", number=1, label="i", text="wine", metadata={"year": 2020})])
    page = "a.pdf#page=1"
    for where, wanted in (
        ({"source": "b.pdf"}, {"wine", "bread"}),
        ({"page": 0}, {"tax"}),
        ({"page": 1}, {"rent", page}),
        ({"metadata.page": 1}, {"rent"}),
        ({"page": {"$gte": 1}, "year": {"$lte": 2021}}, {"rent", page}),
        ({"$or": [{"page": 3}, {"page_label": "i"}]}, {"bread", page}),
        ({"$not": {"source": "a.pdf"}}, {"wine", "bread"}),
        ({"page": {"$ne": 1}}, {"tax", "wine", "bread"}),
        ({"page": {"$in": [0, "1", 3]}}, {"tax", "bread"}),
        ({"page": "1"}, set()),
        ({"page_id": page}, {page}),
        ({"page_label": {"$exists": False}}, WORDS),
        ({"text": {"$contains": "win"}}, {page}),
        ({}, {*WORDS, page}),
    ):  # fmt: skip
        found = words.similarity_search("wine", k=9, filter=where)
        assert set(ids(found)) == wanted, where
        assert set(ids(ColQwen3Retriever(index=words.index, k=9, filter=where).invoke("wine"))) == wanted
        assert set(ids(words.max_marginal_relevance_search("wine", k=9, filter=where))) == wanted
        assert {d.id for d, _ in words.similarity_search_with_score("wine", k=9, filter=where)} == wanted
    with pytest.raises(ConfigError, match=r"where: 'page': unknown operator '\$near'"):
        words.similarity_search("wine", filter={"page": {"$near": 1}})


def test_a_document_without_a_source_has_none_in_filters_either(store: ColQwen3VectorStore) -> None:
    store.add_documents([Document("wine", id="bare"), Document("wine", id="a", metadata={"source": "a.pdf"})])
    for where, wanted in (
        ({"source": {"$exists": False}}, ["bare"]),
        ({"source": {"$empty": False}}, ["a"]),
        ({"source": {"$ne": "a.pdf"}}, ["bare"]),
        ({"source": {"$contains": "a."}}, ["a"]),
        ({"source": {"$in": ["a.pdf", "b.pdf"]}}, ["a"]),
    ):
        assert ids(store.similarity_search("wine", filter=where)) == wanted, where
