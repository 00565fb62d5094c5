"""A retriever's settings as a file: written, and opened again."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Final, Self

from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError, StoreError
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.pages.files import user_path

SETTINGS_FILE: Final = "llama_index_retriever.json"
"""The file :meth:`ColQwen3Retriever.persist` writes."""

_FORMAT = 1


class Persisting(ABC):
    """What :class:`~colqwen3_retrievers.llama_index.ColQwen3Retriever` can write of itself."""

    _index: PageIndex
    _owns_index: bool
    _images_dir: Path | None

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Give the constructor's arguments that are plain data."""

    def persist(self, persist_dir: str | os.PathLike[str]) -> Path:
        """Write the retriever's settings and where its index lies into ``llama_index_retriever.json``.

        The index itself is on disk at any time; nothing of it is copied. When it, and ``images_dir`` where one was
        given, lie inside ``persist_dir``, that folder may be moved. Callbacks and what index nodes refer to are not
        written.

        Returns:
            The file.

        Raises:
            StoreError: it cannot be written.
        """
        return write_settings(persist_dir, self._index.location, self._settings(), self._images_dir)

    @classmethod
    def from_persist_dir(
        cls,
        persist_dir: str | os.PathLike[str],
        *,
        encoder: ColQwen3Encoder | None = None,
        images_dir: str | os.PathLike[str] | None = None,
        read_only: bool = True,
    ) -> Self:
        """Reopen a retriever that :meth:`persist` wrote.

        Args:
            persist_dir: as given there.
            encoder: what encodes; None rebuilds it from what the index knows, when the first question comes.
            images_dir: where the pages' images lie now; None takes what was written.
            read_only: whether the index is opened beside another writer; False to add to it.

        Raises:
            StoreError: nothing was written there, or the index is gone.
        """
        location, settings = read_settings(persist_dir)
        written = settings.pop("images_dir", None)
        images_dir = written if images_dir is None else images_dir
        index = PageIndex.open(location, encoder, images_dir=images_dir, read_only=read_only)
        try:
            return cls._over(index, images_dir, settings)
        except (TypeError, ConfigError) as exc:
            raise StoreError(f"{persist_dir}: not the settings of a retriever: {exc}") from exc

    @classmethod
    def _over(cls, index: PageIndex, images_dir: str | os.PathLike[str] | None, settings: dict[str, Any]) -> Self:
        """Make a retriever that closes the index; a failure closes it too."""
        try:
            made = cls(index, **settings)  # type: ignore[call-arg]  # the constructor of the retriever
        except BaseException:
            index.close()
            raise
        made._owns_index = True
        made._images_dir = None if images_dir is None else user_path(images_dir).absolute()
        return made


def write_settings(
    folder: str | os.PathLike[str], location: str, settings: dict[str, Any], images_dir: Path | None = None
) -> Path:
    """Write a retriever's settings, whole or not at all, and where its index and its images lie.

    Raises:
        StoreError: the file cannot be written.
    """
    target = Path(folder).absolute() / SETTINGS_FILE
    places = {"index": _from(location, target.parent)}
    if images_dir is not None:
        places["images_dir"] = _from(str(images_dir), target.parent)
    written = json.dumps({"format": _FORMAT, **places, **settings}, indent=2)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(written, encoding="utf-8")
        partial.replace(target)
    except OSError as exc:
        partial.unlink(missing_ok=True)
        raise StoreError(f"{target}: cannot be written: {exc.strerror or exc}") from exc
    return target


def _from(location: str, folder: Path) -> str:
    """Name a place inside a folder by its way from there, so that the folder can be moved."""
    place = Path(location)
    inside = place.is_absolute() and place.is_relative_to(folder)
    return place.relative_to(folder).as_posix() or "." if inside else location


def read_settings(folder: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Read what :func:`write_settings` wrote.

    Returns:
        The index's location, and the settings, ``images_dir`` among them where one was written.

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
    for name, place in (("index", location), ("images_dir", settings.get("images_dir", ""))):
        if not isinstance(place, str):
            raise StoreError(f"{path}: not the settings of a retriever: {name} is {place!r}")
    if "images_dir" in settings:
        settings["images_dir"] = str(path.parent / settings["images_dir"])
    return (location if "://" in location else str(path.parent / location)), settings
