"""Open a store by its location: a folder or a Qdrant address."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.stores.protocol import MultiVectorStore
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo

if TYPE_CHECKING:
    from colqwen3_retrievers.stores.qdrant.collection import QdrantOptions

_SPELLING = "qdrant://host:6333/collection, or qdrant+path:folder/collection to try without a server"
_QDRANT = re.compile(r"qdrants?:/|qdrant\+path:")


def open_store(
    location: str | os.PathLike[str],
    *,
    info: EncoderInfo | None = None,
    read_only: bool = False,
    api_key: str | None = None,
    options: QdrantOptions | None = None,
) -> MultiVectorStore:
    """Open a store by its location, creating it when it is new and ``info`` is given.

    Args:
        location: a folder; ``qdrant://host:6333/collection``, or ``qdrants://`` over TLS; or
            ``qdrant+path:folder/collection`` to try Qdrant without a server.
        info: of the encoder that makes the multi-vectors, ``encoder.info``. Required for a new store; compared with an
            existing one.
        read_only: nothing is created, added or deleted. A folder is then opened beside another writer; Qdrant has many
            writers anyway.
        api_key: of a Qdrant server; None reads ``QDRANT_API_KEY``.
        options: :class:`~colqwen3_retrievers.stores.qdrant.collection.QdrantOptions`: shards, replicas, timeouts.

    Raises:
        ConfigError: a location of no known store, a misspelt address (``./`` in front makes it a folder), or
            ``api_key`` or ``options`` for a folder.
        StoreError: see :class:`~colqwen3_retrievers.stores.embedded.store.EmbeddedStore` and
            :class:`~colqwen3_retrievers.stores.qdrant.store.QdrantStore`.

    >>> open_store("redis://host/collection")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: 'redis://host/collection': no such store; a location is a folder or ...
    """
    if not isinstance(location, str | Path | os.PathLike) or not os.fspath(location):
        raise ConfigError(f"location: expected a folder or an address, got {location!r}")
    text = os.fspath(location)
    if is_qdrant(text):
        from colqwen3_retrievers.stores.qdrant.store import QdrantStore

        return QdrantStore(text, info=info, read_only=read_only, api_key=api_key, options=options)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):  # one slash: a Path folds "//" into "/"; one letter is a drive
        shown = re.sub(r"//?[^/@]*@", "//…@", text)  # no password in a message
        raise ConfigError(f"{shown!r}: no such store; a location is a folder or qdrant://host:6333/collection")
    if text == ":memory:":  # this and the next would quietly become folders of that name
        raise ConfigError(
            f"{text!r}: no folder's name; nothing is kept in memory; give a folder, a temporary one perhaps"
        )
    if re.match(r"qdrants?(\+\w+)?:", text, re.IGNORECASE):
        raise ConfigError(f"{text!r}: no folder's name; write {_SPELLING}")
    if api_key is not None or options is not None:
        raise ConfigError(f"{text}: api_key and options are for Qdrant; this is a folder")
    from colqwen3_retrievers.stores.embedded.store import EmbeddedStore

    return EmbeddedStore(text, info=info, read_only=read_only)


def is_qdrant(location: object) -> bool:
    """Return whether a location is that of a Qdrant collection.

    >>> is_qdrant("qdrant://host:6333/pages"), is_qdrant("my-index")
    (True, False)
    """
    return isinstance(location, str | os.PathLike) and _QDRANT.match(os.fspath(location)) is not None
