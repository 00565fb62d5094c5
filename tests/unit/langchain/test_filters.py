"""Filters on the metadata that documents show, in every way of asking."""

from __future__ import annotations

import json
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
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


def test_dates_and_times_in_filters_of_documents(store: ColQwen3VectorStore) -> None:
    moment = datetime(2024, 5, 1, 1, tzinfo=timezone(timedelta(hours=2)))
    store.add_documents([
        Document("wine", id="day", metadata={"when": date(2024, 5, 1), "page": np.int64(4), "source": Path("a.pdf")}),
        Document("wine", id="moment", metadata={"when": moment, "source": "2024-04-30T23:00:00Z"}),
        Document("wine", id="text", metadata={"when": "2024-04-30T23:00:00Z"}),
    ])  # fmt: skip
    for where, wanted in (
        ({"when": {"$gte": date(2024, 5, 1)}}, {"day"}),
        ({"when": moment}, {"moment", "text"}),
        ({"when": {"$lt": "2024-05-01T00:00Z"}}, {"day", "moment", "text"}),
        ({"when": {"$in": [date(2024, 5, 1), "2024-05-01T01:00:00+02:00"]}}, {"day", "moment", "text"}),
        ({"page": np.int64(4), "source": "a.pdf"}, {"day"}),
        ({"source": "2024-04-30T23:00:00Z"}, {"moment"}),
        ({"source": "2024-05-01T01:00:00+02:00"}, set()),
    ):
        assert set(ids(store.similarity_search("wine", filter=where))) == wanted, where
        retriever = ColQwen3Retriever(index=store.index, filter=where)
        assert set(ids(retriever.invoke("wine"))) == wanted, where
        again = ColQwen3Retriever(index=store.index, filter=json.loads(retriever.model_dump_json())["filter"])
        assert set(ids(again.invoke("wine"))) == wanted, where
    assert store.get_by_ids(["moment"])[0].metadata["when"] == "2024-04-30T23:00:00+00:00"
    assert store.index.get(["day"])[0].page.number == 5, "counted from 0, as in every loader"


def test_keys_of_documents_are_not_reported_as_misspelt(
    words: ColQwen3VectorStore, caplog: pytest.LogCaptureFixture
) -> None:
    words.index.delete(["wine"])
    words.similarity_search("wine", filter={"page": 1, "source": "a.pdf", "page_label": "i", "page_id": "x", "yeer": 1})
    assert [message[:29] for message in caplog.messages] == ["where: no page has 'yeer' in "]


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
