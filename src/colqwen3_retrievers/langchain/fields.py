"""Parts the LangChain classes share: pydantic fields, opening an index, checking a query, and pickling as settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, PlainSerializer

from colqwen3_retrievers.cache.page_cache import PageEmbeddingCache
from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.pages.files import user_path
from colqwen3_retrievers.pages.page import Query, json_object
from colqwen3_retrievers.pages.remote_images import checked_remote
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore


def _location(index: PageIndex | str | Path | None) -> str | None:
    if isinstance(index, PageIndex):
        return index.location
    return index if isinstance(index, str) and "://" in index else _absolute(index)


def _folder(cache: PageEmbeddingCache | str | Path | None) -> str | None:
    return _absolute(cache.folder if isinstance(cache, PageEmbeddingCache) else cache)


def _absolute(path: str | Path | None) -> str | None:
    return None if path is None else str(user_path(path).absolute())


def _settings(encoder: ColQwen3Encoder | None) -> dict[str, Any] | None:
    return None if encoder is None else encoder.to_dict()


def _json_filter(where: dict[str, Any]) -> dict[str, Any]:
    return json_object(where, "filter")


IndexField: TypeAlias = Annotated[PageIndex | str | Path, PlainSerializer(_location, when_used="json")]
"""An open index or its location; in JSON its location."""

OptionalIndexField: TypeAlias = Annotated[PageIndex | str | Path | None, PlainSerializer(_location, when_used="json")]
"""The same, or None."""

EncoderField: TypeAlias = Annotated[ColQwen3Encoder | None, PlainSerializer(_settings, when_used="json")]
"""An encoder or None; in JSON its settings, which hold no secret."""

CacheField: TypeAlias = Annotated[PageEmbeddingCache | str | Path | None, PlainSerializer(_folder, when_used="json")]
"""A cache of page embeddings, its folder, or None; in JSON its folder."""

FilterField: TypeAlias = Annotated[dict[str, Any] | None, PlainSerializer(_json_filter, when_used="json-unless-none")]
"""A filter; in JSON its dates and numbers of numpy are JSON values, which mean the same."""

RemoteField: TypeAlias = Annotated[bool | tuple[str, ...], BeforeValidator(checked_remote)]
"""Which web addresses may be fetched: see :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`."""


def checked_query(query: str | Query) -> Query:
    """Return a query that can be encoded, before anything is loaded.

    Raises:
        ConfigError: an empty text, or another type.

    >>> checked_query("revenue").text
    'revenue'
    """
    if not isinstance(query, str | Query):
        raise ConfigError(f"query: expected a non-empty text or a Query, got {query!r}")
    return Query(query) if isinstance(query, str) else query


def pickled(model: BaseModel, *dropped: str) -> tuple[Any, ...]:
    """Return what pickles a model with an index or an encoder: its settings and the index's location.

    Args:
        model: the model; its ``index`` and ``encoder`` fields may hold live objects.
        dropped: fields to leave out.

    Raises:
        TypeError: the index is in a store that its location alone cannot open again.
    """
    fields = {name: getattr(model, name) for name in model.model_fields_set if name not in dropped}
    index = fields.get("index")
    if isinstance(index, PageIndex):
        if not isinstance(index.store, EmbeddedStore):
            raise TypeError(f"{type(model).__name__}: cannot pickle an index at {index.location}; give its location")
        if fields.get("encoder") is None and isinstance(index.encoder, ColQwen3Encoder):
            fields["encoder"] = index.encoder
    if index is not None:
        fields["index"] = _location(index)
    return _rebuild, (type(model), fields)


def _rebuild(kind: type[BaseModel], fields: dict[str, Any]) -> BaseModel:
    return kind(**fields)
