"""LlamaIndex's metadata filters in the ``where`` language of every store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.stores.where import parse, rename_fields

NODE_KEYS: Final = {"page_id": "id", "page": "number", "page_label": "label"}
"""Page fields by the metadata keys of our nodes, where the names differ."""

_OPERATORS: Final = {
    FilterOperator.EQ: "$eq", FilterOperator.NE: "$ne", FilterOperator.GT: "$gt", FilterOperator.GTE: "$gte",
    FilterOperator.LT: "$lt", FilterOperator.LTE: "$lte", FilterOperator.IN: "$in", FilterOperator.NIN: "$nin",
    FilterOperator.ANY: "$any", FilterOperator.ALL: "$all", FilterOperator.CONTAINS: "$contains",
    FilterOperator.TEXT_MATCH: "$text", FilterOperator.TEXT_MATCH_INSENSITIVE: "$itext",
    FilterOperator.IS_EMPTY: "$empty",
}  # fmt: skip


def filters_to_where(filters: MetadataFilters | None) -> dict[str, Any] | None:
    """Translate metadata filters: every operator, nested to any depth a store supports.

    Keys are those of the nodes from a :class:`ColQwen3Retriever` (``page`` is the page's number, as a number or, as
    language models tend to write it, as digits; ``page_label`` its printed label); a dot leads into nested metadata.
    NOT matches where none of its filters does, as in LlamaIndex. A MetadataFilter takes dates and times as ISO texts
    only; they are compared as :mod:`colqwen3_retrievers.stores.where` describes.

    Args:
        filters: LlamaIndex's filters; None, or no filter at all, means every page.

    Returns:
        A filter that :func:`colqwen3_retrievers.stores.where.parse` accepts, or None for every page.

    Raises:
        ConfigError: not MetadataFilters, or an invalid value for an operator; it names the key.

    >>> filters_to_where(MetadataFilters(filters=[
    ...     MetadataFilter(key="page", operator=FilterOperator.LTE, value=10),
    ...     MetadataFilter(key="tags", operator=FilterOperator.ANY, value=["tax", "law"])]))
    {'$and': [{'number': {'$lte': 10}}, {'tags': {'$any': ['tax', 'law']}}]}
    """
    if filters is None:
        return None
    if not isinstance(filters, MetadataFilters):
        raise ConfigError(f"filters: expected MetadataFilters, got {type(filters).__name__}")
    where = _group(filters)
    parse(where)  # an invalid value is an error now, not at the first question
    return where


def where_of(filters: MetadataFilters | None, where: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Combine a retriever's two filters; with both, both must match.

    Args:
        filters: see :func:`filters_to_where`.
        where: a filter of :mod:`colqwen3_retrievers.stores.where` with the metadata keys of nodes.

    Raises:
        ConfigError: one of them is invalid.

    >>> where_of(None, {"page": 3})
    {'number': 3}
    """
    translated, renamed = filters_to_where(filters), rename_fields(where, NODE_KEYS)
    if parse(renamed) is None:
        return translated
    return renamed if translated is None else {"$and": [translated, renamed]}


def _group(filters: MetadataFilters) -> dict[str, Any] | None:
    # A group without filters matches everything, whatever its condition, as in LlamaIndex's own stores.
    parts = [part for item in filters.filters if (part := _part(item)) is not None]
    if not parts:
        return None
    if filters.condition == FilterCondition.NOT:
        return {"$not": {"$or": parts}}
    if filters.condition == FilterCondition.OR:
        return {"$or": parts}
    return parts[0] if len(parts) == 1 else {"$and": parts}


def _part(item: MetadataFilter | MetadataFilters) -> dict[str, Any] | None:
    if isinstance(item, MetadataFilters):
        return _group(item)
    operator = _OPERATORS.get(item.operator)
    if operator is None:
        raise ConfigError(f"filters: {item.key!r}: unknown operator {item.operator!r}")
    value: Any = True if item.operator == FilterOperator.IS_EMPTY else item.value
    key = NODE_KEYS.get(item.key, item.key)
    if key == "number":
        value = [_number(element) for element in value] if isinstance(value, list) else _number(value)
    where = {key: {operator: value}}
    try:
        parse(where)
    except ConfigError as exc:
        raise ConfigError(f"filters: {item.key!r}: {exc}") from exc
    return where


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 19 else value
