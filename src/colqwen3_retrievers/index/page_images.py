"""Page images beside an index: stored as files named by their content, or referred to by path."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from colqwen3_retrievers.atomic_files import write_atomically
from colqwen3_retrievers.errors import ConfigError, StoreError
from colqwen3_retrievers.pages.files import user_path
from colqwen3_retrievers.pages.images import PlainImage, open_image
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.stores.embedded.row_files import sync_folder
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore
from colqwen3_retrievers.stores.protocol import MultiVectorStore, Record

ImageMode = Literal["store", "reference", "none"]
"""How a page's image is kept: as a copy in the index, as the path of the original, or not at all."""

_STORED = re.compile(r"[0-9a-f]{64}\.png\Z")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KeptImage:
    """An image ready to be kept.

    Attributes:
        reference: the text for the store: the name of a stored file, or the absolute path of an original.
        data: the bytes of the file, or None when none is to be written.
    """

    reference: str
    data: bytes | None


class PageImages:
    """The images of an index's pages.

    A stored image is the page's upright RGB pixels as a PNG file, ``ab/ab12….png`` by the sha256 of the file: equal
    images share one file, and a damaged file is recognised by its name.

    Args:
        folder: holds stored images; made with the first one. None when there is no such folder.
        mode: for images of pages added from now on. An image in memory is stored in ``"reference"`` mode too.

    Raises:
        ConfigError: an unknown mode.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     images = PageImages(Path(folder), "store")
    ...     kept = images.prepare(Page(id="a", image=Image.new("RGB", (4, 3))))
    ...     _ = images.write([kept])
    ...     images.path(kept.reference).relative_to(folder).parts[0] == kept.reference[:2]
    True
    """

    def __init__(self, folder: Path | None, mode: ImageMode) -> None:
        if mode not in ("store", "reference", "none"):
            raise ConfigError(f"images: expected 'store', 'reference' or 'none', got {mode!r}")
        self.folder = folder
        self.mode = mode
        self._warned = False

    def prepare(self, page: Page) -> KeptImage | None:
        """Encode a page's image as it will be kept; nothing is written yet.

        Returns:
            None for a page without image, and in mode ``"none"``.

        Raises:
            PageError: the image cannot be read.
            ConfigError: it must be stored and there is no folder for it.
        """
        source = page.image_source
        if source is None or self.mode == "none":
            return None
        if self.mode == "reference" and page.image_path is not None:
            return KeptImage(str(page.image_path.absolute()), None)
        if self.folder is None:
            raise ConfigError(f"page {page.id!r}: no folder for its image; give images_dir= or images='none'")
        image = open_image(source, name=page.id if isinstance(source, bytes) else None)
        image.info = {}  # colour profiles and the like describe the original's encoding, not these pixels
        file = io.BytesIO()
        image.save(file, "PNG")
        data = file.getvalue()
        return KeptImage(f"{hashlib.sha256(data).hexdigest()}.png", data)

    def satisfied(self, page: Page, reference: str | None) -> bool:
        """Return whether the image stored for a page of the same content is kept as the mode asks."""
        if page.image_source is None or self.mode == "none":
            return True
        if reference is None:
            return False
        if self.mode == "reference" and page.image_path is not None:
            return reference == str(page.image_path.absolute())
        path = self.path(reference) if _STORED.match(reference) else None
        return path is not None and path.exists()

    def write(self, images: Iterable[KeptImage | None]) -> list[str]:
        """Write the files that are missing, each whole or not at all, and wait until they are on disk.

        Returns:
            The references of the files written.

        Raises:
            StoreError: the disk is full or fails; the files written by this call are removed.
        """
        written: list[str] = []
        folders: set[Path] = set()
        try:
            for image in images:
                path = None if image is None else self.path(image.reference)
                if image is None or image.data is None or path is None or _has_size(path, len(image.data)):
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, image.data, durable=True)
                written.append(image.reference)
                folders.add(path.parent)
            for folder in folders:
                sync_folder(folder)
        except OSError as exc:
            self.remove(written)
            raise StoreError(f"{self.folder}: a page image cannot be written: {exc.strerror or exc}") from exc
        return written

    def path(self, reference: str | None) -> Path | None:
        """Return the file of a reference, or None when there is none or its folder is unknown."""
        if reference is None:
            return None
        if _STORED.match(reference):
            return None if self.folder is None else self.folder / reference[:2] / reference
        return Path(reference)

    def remove(self, references: Iterable[str]) -> None:
        """Remove stored files where possible; originals are never touched."""
        for reference in references:
            path = self.path(reference) if _STORED.match(reference) else None
            if path is not None:
                with contextlib.suppress(OSError):
                    path.unlink()

    def with_image(self, record: Record) -> Page:
        """Return a record's page with its image, which is opened on access.

        A page whose image is recorded in an unknown folder has none; the first access logs a warning, once an index.
        """
        page, path = record.page, self.path(record.image)
        if path is not None:
            return page.replace(image=path, sha256=page.sha256)
        return page if record.image is None else _PageOutOfReach(page, self)

    def warn_out_of_reach(self, page: Page) -> None:
        """Log, the first time, that a page's image is recorded in an unknown folder."""
        if not self._warned:
            self._warned = True
            _log.warning(
                "page %r: its image is recorded, but the index was opened without images_dir, the folder of its images "
                "(--images-dir on the command line); no image of this index can be shown", page.id
            )  # fmt: skip


class _PageOutOfReach(Page):
    """A page whose image is in an unknown folder: it has none, and logs why when one is accessed."""

    __slots__ = ("_images",)

    def __init__(self, page: Page, images: PageImages) -> None:
        super().__init__(
            page.id, page.source, page.number, page.label, None, page.text, page.metadata, page.sha256, page.video
        )
        self._images = images

    @property
    def image(self) -> Image.Image | None:
        self._images.warn_out_of_reach(self)
        return None

    @property
    def image_path(self) -> Path | None:
        self._images.warn_out_of_reach(self)
        return None

    @property
    def image_source(self) -> PlainImage | None:
        self._images.warn_out_of_reach(self)
        return None


def images_folder(store: MultiVectorStore, folder: str | os.PathLike[str] | None) -> Path | None:
    """Return the absolute folder of a store's images: the given one, or ``images`` in an index's own folder."""
    if folder is not None:
        return user_path(folder).absolute()
    return store.folder / "images" if isinstance(store, EmbeddedStore) else None


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False
