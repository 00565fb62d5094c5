"""LangChain's structured queries, which language models write, translated to filters of the vector store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from langchain_core.structured_query import Comparator, Comparison, Operation, Operator, StructuredQuery, Visitor

_COMPARATORS: Final = {
    Comparator.EQ: "$eq", Comparator.NE: "$ne", Comparator.GT: "$gt", Comparator.GTE: "$gte", Comparator.LT: "$lt",
    Comparator.LTE: "$lte", Comparator.CONTAIN: "$contains", Comparator.LIKE: "$itext", Comparator.IN: "$in",
    Comparator.NIN: "$nin",
}  # fmt: skip


class ColQwen3Translator(Visitor):
    """Translates structured queries for a ``SelfQueryRetriever`` over a :class:`ColQwen3VectorStore`.

    Every comparator and operator is supported. Attributes are keys of the documents' metadata, a dot leading into
    nested objects; dates and times compare as :mod:`colqwen3_retrievers.stores.where` describes. ``like`` looks for a
    part of a text whatever the case, ``%`` at its ends meaning nothing; ``contain`` for an element of a list or a part
    of a text.

    Where a question is all filter ("reports of 2024"), the model leaves no words to search by, which is an error of the
    store; ``use_original_query=True`` searches by the question itself.

    Example:
        >>> from langchain_classic.retrievers import SelfQueryRetriever                        # doctest: +SKIP
        >>> retriever = SelfQueryRetriever.from_llm(                                           # doctest: +SKIP
        ...     llm, store, "annual reports", metadata_field_info=fields,
        ...     structured_query_translator=ColQwen3Translator(), use_original_query=True)
        >>> since = Comparison(Comparator.GTE, "day", {"type": "date", "date": "2024-05-01"})
        >>> ColQwen3Translator().visit_structured_query(StructuredQuery("revenue", since))
        ('revenue', {'filter': {'day': {'$gte': '2024-05-01'}}})
    """

    allowed_comparators: ClassVar[list[Comparator]] = list(Comparator)  # type: ignore[misc]  # the base has a default
    allowed_operators: ClassVar[list[Operator]] = list(Operator)  # type: ignore[misc]

    def visit_operation(self, operation: Operation) -> dict[str, Any]:
        """Return the filter of an operation; a negation of several holds where none of them does."""
        parts = [argument.accept(self) for argument in operation.arguments]
        if operation.operator is not Operator.NOT:
            return {f"${operation.operator.value}": parts}
        return {"$not": parts[0] if len(parts) == 1 else {"$or": parts}}

    def visit_comparison(self, comparison: Comparison) -> dict[str, Any]:
        """Return the filter of a comparison."""
        comparator, value = comparison.comparator, comparison.value
        if comparator in (Comparator.IN, Comparator.NIN):
            value = [_plain(item) for item in (value if isinstance(value, list | tuple) else [value])]
        elif comparator is Comparator.LIKE and isinstance(value, str):
            value = value.strip("%")
        return {comparison.attribute: {_COMPARATORS[comparator]: _plain(value)}}

    def visit_structured_query(self, structured_query: StructuredQuery) -> tuple[str, dict[str, Any]]:
        """Return the words to search by, and the arguments of the search; LangChain adds a limit as ``k``."""
        tree = structured_query.filter
        return structured_query.query, {} if tree is None else {"filter": tree.accept(self)}


def _plain(value: Any) -> Any:
    """Return the ISO text of a date or time, which LangChain's parser wraps, and any other value unchanged."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    return value.get(kind, value) if kind in ("date", "datetime") else value
