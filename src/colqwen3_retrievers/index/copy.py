"""Copying an index from one store to another without encoding anything again."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, StoreError
from colqwen3_retrievers.index.page_images import KeptImage, PageImages, images_folder
from colqwen3_retrievers.index.page_records import BATCH, PageRecords, batches, same_content, same_description
from colqwen3_retrievers.pages.files import reason_of, user_path
from colqwen3_retrievers.progress import progress_bar
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore
from colqwen3_retrievers.stores.location import is_qdrant, open_store
from colqwen3_retrievers.stores.protocol import MultiVectorStore, Record, check_addable, check_info

if TYPE_CHECKING:
    from colqwen3_retrievers.stores.qdrant.collection import QdrantOptions


@dataclass(frozen=True, slots=True)
class Copied:
    """Counts of the pages of one copy.

    Attributes:
        added: pages the destination did not have.
        updated: pages it had with other content, metadata or another image under the same id.
        unchanged: pages it had as they are; their token embeddings were not sent again.
        images: image files written.
        missing_images: pages whose image file no longer exists; they were copied without it.
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
    """Copy every page of an index, with its image, into a new or existing one.

    Nothing is encoded, and no model is needed. Token embeddings arrive byte for byte as float16. Pages are copied
    ``batch_size`` at a time in the order of their ids; pages whose content, metadata and image the destination already
    has are skipped, so an interrupted copy resumes when it is run again. Pages that only the destination has stay.

    Args:
        src: a folder, the address of a Qdrant collection, or an open store.
        dst: likewise; made when it is new.
        batch_size: pages written together, at least 1; their token embeddings are in memory at once.
        show_progress: whether to draw a progress bar (on a terminal).
        images: whether to copy stored image files too. Paths of originals are copied in any case, as paths.
        src_images_dir: the folder of the source's images; ``images`` in a folder by default.
        dst_images_dir: the folder for the destination's images; ``images`` in a folder by default.
        options: how a new Qdrant collection is made.

    Returns:
        How many pages were new, updated and unchanged.

    Raises:
        ConfigError: both are the same, a folder of stored images is unknown, or a bad ``batch_size``.
        StoreMismatchError: the destination was made by another model, dim, pooling, rendering or ``max_visual_tokens``.
        StoreError: one of them cannot be opened or fails, or what is read is not what was written.

    >>> copy_index("my-index", "qdrant://host:6333/pages", dst_images_dir="/srv/page-images")     # doctest: +SKIP
    Copied(added=12000, updated=0, unchanged=0, images=12000, missing_images=0)
    """
    batch_size = whole_number(batch_size, "batch_size", least=1)
    with contextlib.ExitStack() as stack:
        source = src
        if isinstance(source, str | os.PathLike):
            source = stack.enter_context(contextlib.closing(open_store(source, read_only=True)))
        target = dst
        if isinstance(target, str | os.PathLike):
            remote = is_qdrant(target)
            if not remote and isinstance(source, EmbeddedStore) and source.folder == user_path(target).absolute():
                raise ConfigError(f"{source.location}: source and destination are the same")  # before it is locked
            target = open_store(target, info=source.info, options=options if remote else None)
            stack.enter_context(contextlib.closing(target))
        else:
            check_info(target.info, source.info, target.location)
        if target is source or (_place(target) is not None and _place(target) == _place(source)):
            raise ConfigError(f"{source.location}: source and destination are the same")
        check_addable(target.info, source.info, target.location)
        from_records = PageRecords(source, PageImages(images_folder(source, src_images_dir), "store"))
        to_records = PageRecords(target, PageImages(images_folder(target, dst_images_dir), "store"))
        ids = source.ids()
        counts: Counter[str] = Counter()
        with progress_bar(show_progress, len(ids), "pages") as bar:
            for batch in batches(ids, BATCH):
                counts += _copy_pages(from_records, to_records, batch, batch_size, images)
                bar.update(len(batch))
        return Copied(**counts)


def _copy_pages(
    source: PageRecords, target: PageRecords, ids: Sequence[str], batch_size: int, with_images: bool
) -> Counter[str]:
    """Copy those of these pages that the target does not have as they are, and return the counts of them all."""
    existing = {record.page.id: record for record in target.store.get(ids)}
    records = source.store.get(ids)  # without ids deleted meanwhile
    outcomes = [_copy_image(record, source.images, target.images) for record in records if with_images]
    changed = [record.page.id for record in records if not _same(record, existing.get(record.page.id))]
    added = 0
    for batch in batches(changed, batch_size):
        copies = source.store.get(batch, vectors=True)
        target.store.add(copies)
        added += sum(record.page.id not in existing for record in copies)
    updated = [existing[page_id] for page_id in changed if page_id in existing]
    if with_images:
        target.remove_unused(record.image for record in updated)
    counts = Counter(outcome for outcome in outcomes if outcome is not None)
    counts.update(added=added, updated=len(updated), unchanged=len(records) - len(changed))
    return counts


def _copy_image(record: Record, source: PageImages, target: PageImages) -> str | None:
    """Copy a record's stored image unless the target has it, and return the count of :class:`Copied` to raise."""
    reference = record.image
    if reference is None or Path(reference).is_absolute():
        return None
    if source.folder is not None and source.folder == target.folder:
        return None
    for images, name in ((target, "dst_images_dir"), (source, "src_images_dir")):
        if images.folder is None:
            raise ConfigError(f"page {record.page.id!r} has a stored image: give {name}=, or images=False")
    path, copy = source.path(reference), target.path(reference)
    if path is None or copy is None or copy.exists():
        return None
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return "missing_images"
    except OSError as exc:
        raise StoreError(f"{path}: the image of page {record.page.id!r} cannot be read: {reason_of(exc)}") from exc
    if f"{hashlib.sha256(data).hexdigest()}.png" != reference:
        raise StoreError(f"{path}: the image of page {record.page.id!r} is not what was written: the disk is at fault")
    return "images" if target.write([KeptImage(reference, data)]) else None


def _place(store: MultiVectorStore) -> str | None:
    """Return where a store is, or None when unknown: two clients may each have a collection of one name."""
    if isinstance(store, EmbeddedStore):
        return store.location
    address = getattr(store, "address", None)
    return None if address is None else f"{address.host}:{address.port}{address.path or ''}/{address.collection}"


def _same(record: Record, other: Record | None) -> bool:
    """Return whether the target has a record as it is; token embeddings follow from the content."""
    return (
        other is not None
        and record.image == other.image
        and same_content(record.page, other.page)
        and same_description(record.page, other.page)
    )
