"""What the retriever and the reranker share: an index by folder or in hand, and copies that carry settings only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, PlainSerializer

from colqwen3_retrievers.cache.page_cache import PageEmbeddingCache
from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.pages.files import user_path
from colqwen3_retrievers.pages.remote_images import checked_remote
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore


def _location(index: PageIndex | str | Path | None) -> str | None:
    if index is None or isinstance(index, PageIndex):
        return None if index is None else index.location
    if isinstance(index, str) and "://" in index:
        return index
    return str(user_path(index).absolute())


def _settings(encoder: ColQwen3Encoder | None) -> dict[str, Any] | None:
    return None if encoder is None else encoder.to_dict()


def _folder(cache: PageEmbeddingCache | str | Path | None) -> str | None:
    folder = cache.folder if isinstance(cache, PageEmbeddingCache) else cache
    return None if folder is None else str(user_path(folder).absolute())


IndexField: TypeAlias = Annotated[PageIndex | str | Path, PlainSerializer(_location, when_used="json")]
"""An open index, or where one lies; in JSON its location."""

OptionalIndexField: TypeAlias = Annotated[PageIndex | str | Path | None, PlainSerializer(_location, when_used="json")]
"""The same, or none."""

EncoderField: TypeAlias = Annotated[ColQwen3Encoder | None, PlainSerializer(_settings, when_used="json")]
"""An encoder or none; in JSON its settings, which hold no secret."""

CacheField: TypeAlias = Annotated[PageEmbeddingCache | str | Path | None, PlainSerializer(_folder, when_used="json")]
"""A cache of page embeddings, the folder of one, or none; in JSON its folder."""


RemoteField: TypeAlias = Annotated[bool | tuple[str, ...], BeforeValidator(checked_remote)]
"""Which web addresses may be fetched: see :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`."""


def open_index(
    index: PageIndex | str | Path, encoder: ColQwen3Encoder | None, images_dir: str | Path | None = None
) -> PageIndex:
    """Give an open index; one named by its place is opened for reading, beside whoever writes it.

    Args:
        index: the index, or its place.
        encoder: with a place: what encodes.
        images_dir: with a place that is no folder: where its images lie.

    Raises:
        ConfigError: an open index together with an encoder or ``images_dir`` that is not its own.
        StoreError: no index there.
        StoreMismatchError: the index was made by another model than the encoder's.
    """
    if not isinstance(index, PageIndex):
        return PageIndex.open(os.fspath(index), encoder, images_dir=images_dir, read_only=True)
    # A copy of ours with other settings is made with the index that was opened here and the arguments it was opened by.
    if images_dir is not None and user_path(images_dir).absolute() != index.images_dir:
        raise ConfigError("images_dir: the index is open and has its own; give its location, or no images_dir")
    if encoder is not None and encoder is not index.encoder:
        raise ConfigError("encoder: the index is open and has its own; give the index's folder, or no encoder")
    return index


def pickled(model: BaseModel, *dropped: str) -> tuple[Any, ...]:
    """Say how to pickle a model that holds an index or an encoder: as settings and the index's location.

    Args:
        model: the model; its ``index`` and ``encoder`` fields may hold live objects.
        dropped: fields that are not carried.

    Raises:
        TypeError: the index lies in a store that cannot be opened again by its location alone.
    """
    fields = {name: getattr(model, name) for name in model.model_fields_set if name not in dropped}
    index = fields.get("index")
    if isinstance(index, PageIndex):
        if not isinstance(index.store, EmbeddedStore):
            raise TypeError(f"{type(model).__name__}: cannot pickle an index at {index.location}; give its location")
        fields["index"] = index.location
        if fields.get("encoder") is None and isinstance(index.encoder, ColQwen3Encoder):
            fields["encoder"] = index.encoder
    elif index is not None:
        fields["index"] = _location(index)
    return _rebuild, (type(model), fields)


def _rebuild(kind: type[BaseModel], fields: dict[str, Any]) -> BaseModel:
    return kind(**fields)
