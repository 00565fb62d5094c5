"""Where multi-vectors live: the store protocol, the filter language, and the stores."""

from __future__ import annotations

import os
import re
from pathlib import Path

from colqwen3_retrievers.datatypes import EncoderInfo
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.stores.protocol import Match, MultiVectorStore, Record
from colqwen3_retrievers.stores.where import Filter, Where, matches, parse

__all__ = ["Filter", "Match", "MultiVectorStore", "Record", "Where", "matches", "open_store", "parse"]


def open_store(
    location: str | os.PathLike[str], *, info: EncoderInfo | None = None, read_only: bool = False
) -> MultiVectorStore:
    """Open a store by its location, making it when it is new and ``info`` is given.

    Args:
        location: a folder.
        info: what makes the multi-vectors: ``encoder.info``. Needed for a new store, compared with an existing one.
        read_only: opens beside another writer; nothing is made and nothing can be added or deleted.

    Raises:
        ConfigError: a location that names no kind of store.
        StoreError: see :class:`~colqwen3_retrievers.stores.embedded.EmbeddedStore`.

    >>> open_store("redis://host/collection")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: 'redis://host/collection': no such store; a location is a folder
    """
    from colqwen3_retrievers.stores.embedded import EmbeddedStore

    if not isinstance(location, str | Path | os.PathLike) or not os.fspath(location):
        raise ConfigError(f"location: expected a folder, got {location!r}")
    text = os.fspath(location)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):  # one slash: a Path folds "//" into "/"; one letter is a drive
        shown = re.sub(r"//?[^/@]*@", "//…@", text)  # a password has no place in a message
        raise ConfigError(f"{shown!r}: no such store; a location is a folder")
    return EmbeddedStore(text, info=info, read_only=read_only)
