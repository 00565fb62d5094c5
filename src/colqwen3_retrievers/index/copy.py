"""Moving an index from one store to another without encoding anything again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colqwen3_retrievers.errors import ConfigError, StoreError
from colqwen3_retrievers.index.page_adder import progress_bar
from colqwen3_retrievers.index.page_images import KeptImage, PageImages
from colqwen3_retrievers.pages.files import user_path
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore
from colqwen3_retrievers.stores.location import is_qdrant, open_store
from colqwen3_retrievers.stores.protocol import MultiVectorStore, Record, check_addable, check_info

if TYPE_CHECKING:
    from colqwen3_retrievers.stores.qdrant.collection import QdrantOptions

_LOOKED_AT = 256  # records compared at a time, without their token embeddings


@dataclass(frozen=True, slots=True)
class Copied:
    """What became of the pages of one copy.

    Attributes:
        added: pages the destination did not have.
        updated: pages it had otherwise under the same id.
        unchanged: pages it had just so; their token embeddings were not sent again.
        images: image files written.
        missing_images: pages whose image file was not there any more; they were copied without it.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    images: int = 0
    missing_images: int = 0


def copy_index(
    src: str | os.PathLike[str] | MultiVectorStore,
    dst: str | os.PathLike[str] | MultiVectorStore,
    *,
    batch_size: int = 64,
    show_progress: bool = False,
    images: bool = True,
    src_images_dir: str | os.PathLike[str] | None = None,
    dst_images_dir: str | os.PathLike[str] | None = None,
    options: QdrantOptions | None = None,
) -> Copied:
    """Copy every page of an index into another, making it when it is new: token embeddings, metadata and images.

    Nothing is encoded, and no model is needed. Token embeddings arrive byte for byte as float16. Pages are copied
    ``batch_size`` at a time in the order of their ids; a copy that was interrupted goes on where it stopped, for pages
    whose content, metadata and image are there already are passed over. Pages that only the destination has stay.

    Args:
        src: where from: a folder, the address of a Qdrant collection, or an open store.
        dst: where to, likewise.
        batch_size: pages written together, at least 1; their token embeddings are in memory at once.
        show_progress: whether to draw a progress bar (on a terminal).
        images: whether to copy stored image files too. Paths of originals are copied in any case, as paths.
        src_images_dir: where the source's images lie; a folder's own ``images`` by default.
        dst_images_dir: where the destination's are to lie; a folder's own ``images`` by default.
        options: how a new Qdrant collection is made.

    Returns:
        How many pages were new, updated and unchanged.

    Raises:
        ConfigError: both are one, stored images have no place to come from or to go to, or a bad ``batch_size``.
        StoreMismatchError: the destination was made by another model, dim, pooling, rendering or ``max_visual_tokens``.
        StoreError: one of them cannot be opened or fails, or what is read is not what was written.

    >>> copy_index("my-index", "qdrant://host:6333/pages", dst_images_dir="/srv/page-images")     # doctest: +SKIP
    Copied(added=12000, updated=0, unchanged=0, images=12000, missing_images=0)
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size: expected a whole number from 1, got {batch_size!r}")
    with contextlib.ExitStack() as opened:
        source = _opened(src, opened)
        if isinstance(dst, str | os.PathLike):
            if not is_qdrant(dst) and isinstance(source, EmbeddedStore) and source.folder == _absolute(dst):
                raise ConfigError(f"{source.location}: source and destination are the same")  # before it is locked
            target = open_store(dst, info=source.info, options=options if is_qdrant(dst) else None)
            opened.callback(target.close)
        else:
            target = dst
            check_info(target.info, source.info, target.location)
        if target is source or (_place(target) is not None and _place(target) == _place(source)):
            raise ConfigError(f"{source.location}: source and destination are the same")
        check_addable(target.info, source.info, target.location)
        files = _Files(source, target, src_images_dir, dst_images_dir) if images else None
        ids = source.ids()
        with progress_bar(show_progress, len(ids), " pages") as bar:
            copier = _Copier(source, target, files, batch_size)
            for first in range(0, len(ids), _LOOKED_AT):
                copier.copy(ids[first : first + _LOOKED_AT])
                if bar is not None:
                    bar.update(len(ids[first : first + _LOOKED_AT]))
        return copier.done


class _Files:
    """Image files of the source, written where the destination looks for them."""

    def __init__(
        self,
        source: MultiVectorStore,
        target: MultiVectorStore,
        src_images_dir: str | os.PathLike[str] | None,
        dst_images_dir: str | os.PathLike[str] | None,
    ) -> None:
        self._from = PageImages(_images_dir(source, src_images_dir), "store")
        self.to = PageImages(_images_dir(target, dst_images_dir), "store")
        self._together = self._from.folder is not None and self._from.folder == self.to.folder

    def copy(self, records: Iterable[Record]) -> tuple[int, int]:
        """Write the stored images of records that are not there yet; give how many, and how many were gone."""
        written = missing = 0
        for record in records:
            reference = record.image
            if reference is None or Path(reference).is_absolute() or self._together:
                continue
            for images, name in ((self.to, "dst_images_dir"), (self._from, "src_images_dir")):
                if images.folder is None:
                    raise ConfigError(f"page {record.page.id!r} has a stored image: give {name}=, or images=False")
            path, goal = self._from.path(reference), self.to.path(reference)
            if path is None or goal is None or goal.exists():
                continue
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                missing += 1
                continue
            except OSError as exc:
                raise StoreError(
                    f"{path}: the image of page {record.page.id!r} cannot be read: {exc.strerror}"
                ) from exc
            if f"{hashlib.sha256(data).hexdigest()}.png" != reference:
                raise StoreError(
                    f"{path}: the image of page {record.page.id!r} is not what was written: the disk is at fault"
                )
            written += len(self.to.write([KeptImage(reference, data)]))
        return written, missing


class _Copier:
    """Copies pages and counts them."""

    def __init__(
        self, source: MultiVectorStore, target: MultiVectorStore, files: _Files | None, batch_size: int
    ) -> None:
        self._source = source
        self._target = target
        self._files = files
        self._batch_size = batch_size
        self.done = Copied()

    def copy(self, ids: list[str]) -> None:
        """Copy these pages, those that are there just so aside."""
        there = {record.page.id: record for record in self._target.get(ids)}
        records = self._source.get(ids)  # ids deleted meanwhile are left out
        written, missing = self._files.copy(records) if self._files is not None else (0, 0)
        changed = [record.page.id for record in records if not _same(record, there.get(record.page.id))]
        added = 0
        for first in range(0, len(changed), self._batch_size):
            batch = self._source.get(changed[first : first + self._batch_size], vectors=True)
            self._target.add(batch)
            added += sum(record.page.id not in there for record in batch)
        self._release(there[page_id].image for page_id in changed if page_id in there)
        self.done = Copied(
            self.done.added + added,
            self.done.updated + sum(page_id in there for page_id in changed),
            self.done.unchanged + len(records) - len(changed),
            self.done.images + written,
            self.done.missing_images + missing,
        )

    def _release(self, images: Iterable[str | None]) -> None:
        """Remove images that the pages before this copy had and no page has now."""
        held = {image for image in images if image is not None}
        if held and self._files is not None:
            self._files.to.remove(held - self._target.images(held))


def _opened(location: str | os.PathLike[str] | MultiVectorStore, opened: contextlib.ExitStack) -> MultiVectorStore:
    if not isinstance(location, str | os.PathLike):
        return location
    store = open_store(location, read_only=True)
    opened.callback(store.close)
    return store


def _images_dir(store: MultiVectorStore, given: str | os.PathLike[str] | None) -> Path | None:
    if given is not None:
        return _absolute(given)
    return store.folder / "images" if isinstance(store, EmbeddedStore) else None


def _place(store: MultiVectorStore) -> str | None:
    """Say where a store is, or None when that cannot be told: two clients may each have a collection of one name."""
    if isinstance(store, EmbeddedStore):
        return store.location
    address = getattr(store, "address", None)
    return None if address is None else f"{address.host}:{address.port}{address.path or ''}/{address.collection}"


def _absolute(path: str | os.PathLike[str]) -> Path:
    return user_path(path).absolute()


def _same(record: Record, there: Record | None) -> bool:
    """Whether a page is there just so: its token embeddings follow from its content, the infos being the same."""
    if there is None or record.image != there.image:
        return False
    return _description(record) == _description(there)


def _description(record: Record) -> tuple[str, str, int, str | None, str, str]:
    page = record.page
    metadata = json.dumps(page.metadata, sort_keys=True)  # True == 1 in Python, and not here
    return page.sha256, page.source, page.number, page.label, page.text, metadata
