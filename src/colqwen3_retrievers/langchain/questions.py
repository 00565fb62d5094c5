"""What the retriever is asked, one question or a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.runnables import RunnableConfig

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.pages.page import Query

Outcome = list[Document] | Exception
"""What came of a question."""


def model_name(model: str) -> str:
    """Name a model for tracing; of a folder its last part, as paths are nobody else's business.

    >>> model_name("/home/ada/models/tiny"), model_name("TomoroAI/tomoro-colqwen3-embed-4b")
    ('tiny', 'TomoroAI/tomoro-colqwen3-embed-4b')
    """
    return Path(model).name if Path(model).is_absolute() else model


def checked_query(query: str | Query) -> str | Query:
    """Refuse what is no question, before anything is loaded.

    Raises:
        ConfigError: an empty text, or another type.

    >>> checked_query("revenue")
    'revenue'
    """
    if not isinstance(query, str | Query):
        raise ConfigError(f"query: expected a text or a Query, got {type(query).__name__}")
    if isinstance(query, str):
        Query(query)  # refuses an empty one before anything is loaded
    return query


def shown_query(query: object) -> str:
    """Give what callbacks and traces see of a query: never its pixels.

    >>> shown_query(Query("which year?", image=b"..."))
    '[image] which year?'
    """
    if not isinstance(query, Query):
        return query if isinstance(query, str) else repr(query)
    return " ".join(part for part in ("[image]" if query.image is not None else "", query.text or "") if part)


def in_parts(inputs: Sequence[Any], config: RunnableConfig) -> list[Sequence[Any]]:
    """Cut questions by the ``max_concurrency`` of a config.

    >>> in_parts(["a", "b", "c"], {"max_concurrency": 2})
    [['a', 'b'], ['c']]
    """
    size = config.get("max_concurrency") or len(inputs)
    return [inputs[first : first + size] for first in range(0, len(inputs), size)]


def sorted_out(queries: Sequence[str | Query]) -> tuple[dict[int, Outcome], dict[int, str | Query]]:
    """Tell the queries that cannot be asked, by place, from those that can.

    >>> sorted_out(["revenue"])
    ({0: []}, {0: 'revenue'})
    """
    outcomes: dict[int, Outcome] = {}
    asked: dict[int, str | Query] = {}
    for place, query in enumerate(queries):
        try:
            asked[place] = checked_query(query)
        except ConfigError as exc:
            outcomes[place] = exc
        else:
            outcomes[place] = []
    return outcomes, asked


def results_of(outcomes: list[Outcome], return_exceptions: bool) -> list[list[Document]]:
    """Give what came of a batch, or raise the first error.

    Raises:
        Exception: the first outcome that is one, unless they are to be given back.

    >>> results_of([[]], False)
    [[]]
    """
    failed = next((outcome for outcome in outcomes if isinstance(outcome, Exception)), None)
    if failed is not None and not return_exceptions:
        raise failed
    return outcomes  # type: ignore[return-value]  # LangChain types exceptions in place of results so, too
