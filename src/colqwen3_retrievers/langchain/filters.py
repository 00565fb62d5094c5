"""Filters on the metadata of documents, translated to filters on the stored pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.langchain.documents import ORIGIN
from colqwen3_retrievers.stores.where import FIELDS, And, Condition, Filter, Not, Or, Value, parse, rename_fields

DOCUMENT_KEYS: Final = {
    "source": "source", "page": "number", "page_label": "label", "page_id": "id", "sha256": "sha256",
    "id": "id", "number": "number", "label": "label", "text": "text",
}  # fmt: skip
"""Names that mean a page's own field, unless the page was a document with metadata of that name."""

_MARK: Final = "_document."  # prefix of such a name while it is parsed: its values need not fit the field's type
_MIRRORED: Final = ("source", "page_label")  # texts under these names are always also the page's own
_NOTHING: Final = Or(())


def document_filter(where: Mapping[str, Any] | None) -> Filter | None:
    """Parse a filter whose names are the keys of documents' metadata.

    Args:
        where: in the language of :mod:`~colqwen3_retrievers.stores.where`. ``source``, ``page``, ``page_label`` and
            ``sha256`` mean what documents show; ``page_id`` is their id; ``metadata.page`` is always a key of yours.

    Raises:
        ConfigError: as for :func:`~colqwen3_retrievers.stores.where.parse`.

    >>> document_filter({"source": "a.pdf"})
    Condition(name='source', field=True, test='in', values=(Value(kind='text', payload='a.pdf', size=0),))
    >>> document_filter({"page": {"$near": 3}})
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: where: 'page': unknown operator '$near'; known: $eq, $ne, ...
    """
    try:
        tree = parse(rename_fields(where, {name: f"{_MARK}{name}" for name in DOCUMENT_KEYS}))
    except ConfigError as exc:
        raise ConfigError(str(exc).replace(_MARK, "")) from None
    return None if tree is None else _translated(tree)


def _translated(tree: Filter) -> Filter:
    if isinstance(tree, And):
        return And(tuple(map(_translated, tree.parts)))
    if isinstance(tree, Or):
        return Or(tuple(map(_translated, tree.parts)))
    if isinstance(tree, Not):
        return Not(_translated(tree.part))
    name = tree.name.removeprefix(_MARK)
    if name == tree.name:
        return tree
    field = _on_field(tree, DOCUMENT_KEYS[name])
    if name in _MIRRORED and tree.test == "in" and all(value.kind == "text" for value in tree.values):
        return field
    was_document = Condition(ORIGIN, False, "exists", required=False)
    own = Condition(name, False, tree.test, tree.values, required=False)
    return Or((And((was_document, own)), And((Not(was_document), field))))


def _on_field(condition: Condition, field: str) -> Filter:
    """The same condition on a page's own field, which never holds a value of another kind."""
    # A page's own texts are compared as they are written, times too.
    values = tuple(Value(value.kind, value.payload if value.written is None else value.written)
                   for value in condition.values if value.kind == FIELDS[field])  # fmt: skip
    if condition.values and not values:
        return _NOTHING
    if condition.test in ("contains", "text", "itext") and FIELDS[field] != "text":
        return _NOTHING
    return Condition(field, True, condition.test, values)
