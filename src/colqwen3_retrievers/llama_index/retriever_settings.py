"""A retriever's settings as a file: written, and opened again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final, Self

from colqwen3_retrievers.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError, StoreError
from colqwen3_retrievers.index import PageIndex

SETTINGS_FILE: Final = "llama_index_retriever.json"
"""The file :meth:`ColQwen3Retriever.persist` writes."""

_FORMAT = 1


class Persisting:
    """What :class:`~colqwen3_retrievers.llama_index.ColQwen3Retriever` can write of itself."""

    _index: PageIndex
    _owns_index: bool

    def _settings(self) -> dict[str, Any]:
        """Give the constructor's arguments that are plain data."""
        raise NotImplementedError

    def persist(self, persist_dir: str | os.PathLike[str]) -> Path:
        """Write the retriever's settings and where its index lies into ``llama_index_retriever.json``.

        The index itself is on disk at any time; nothing of it is copied. When it lies inside ``persist_dir``, that
        folder may be moved. Callbacks and what index nodes refer to are not written.

        Returns:
            The file.

        Raises:
            StoreError: it cannot be written.
        """
        return write_settings(persist_dir, self._index.location, self._settings())

    @classmethod
    def from_persist_dir(
        cls, persist_dir: str | os.PathLike[str], *, encoder: ColQwen3Encoder | None = None, read_only: bool = True
    ) -> Self:
        """Reopen a retriever that :meth:`persist` wrote.

        Args:
            persist_dir: as given there.
            encoder: what encodes; None rebuilds it from what the index knows, when the first question comes.
            read_only: whether the index is opened beside another writer; False to add to it.

        Raises:
            StoreError: nothing was written there, or the index is gone.
        """
        location, settings = read_settings(persist_dir)
        index = PageIndex.open(location, encoder, read_only=read_only)
        try:
            made = cls(index, **settings)  # type: ignore[call-arg]  # the constructor of the retriever
        except (TypeError, ConfigError) as exc:
            index.close()
            raise StoreError(f"{persist_dir}: not the settings of a retriever: {exc}") from exc
        made._owns_index = True
        return made


def write_settings(folder: str | os.PathLike[str], location: str, settings: dict[str, Any]) -> Path:
    """Write a retriever's settings, whole or not at all, and where its index lies.

    Raises:
        StoreError: the file cannot be written.
    """
    target = Path(folder).absolute() / SETTINGS_FILE
    place = Path(location)
    if place.is_absolute() and place.is_relative_to(target.parent):
        location = place.relative_to(target.parent).as_posix() or "."  # so that the folder can be moved
    written = json.dumps({"format": _FORMAT, "index": location, **settings}, indent=2)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(written, encoding="utf-8")
        partial.replace(target)
    except OSError as exc:
        partial.unlink(missing_ok=True)
        raise StoreError(f"{target}: cannot be written: {exc.strerror or exc}") from exc
    return target


def read_settings(folder: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Read what :func:`write_settings` wrote.

    Returns:
        The index's location, and the settings.

    Raises:
        StoreError: no such file, or not one of ours.
    """
    path = Path(folder).absolute() / SETTINGS_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.pop("format") != _FORMAT:
            raise ValueError("of another format")
        location = settings.pop("index")
    except OSError as exc:
        raise StoreError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    except (ValueError, KeyError, AttributeError, TypeError) as exc:
        raise StoreError(f"{path}: not the settings of a retriever: {exc}") from exc
    if not isinstance(location, str):
        raise StoreError(f"{path}: not the settings of a retriever: index is {location!r}")
    return (location if "://" in location else str(path.parent / location)), settings
