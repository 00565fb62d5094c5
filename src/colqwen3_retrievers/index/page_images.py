"""Page images beside an index: kept as files named by their content, or pointed to where they lie."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from colqwen3_retrievers.errors import ConfigError, StoreError
from colqwen3_retrievers.pages.images import ImageSource, open_image
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.stores.embedded.row_files import sync_folder
from colqwen3_retrievers.stores.protocol import Record

ImageMode = Literal["store", "reference", "none"]
"""What becomes of a page's image: a copy in the index, the path of the original, or nothing."""

_STORED = re.compile(r"[0-9a-f]{64}\.png\Z")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KeptImage:
    """An image about to be kept.

    Attributes:
        reference: what the store will hold: the name of a stored file, or the absolute path of an original.
        data: the file's bytes, or None when nothing is to be written.
    """

    reference: str
    data: bytes | None


class PageImages:
    """Images of an index's pages.

    A stored image is the page's upright RGB pixels as a PNG file, ``ab/ab12….png`` by the sha256 of the file: equal
    images are one file, and a damaged file is told by its name.

    Args:
        folder: where stored images lie; made when the first is written. None when there is no such place.
        mode: what becomes of the images of pages added from now on. Pages whose image lies in memory are stored in
            ``"reference"`` mode too, for there is no file to point to.

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
        self._told = False

    def prepare(self, page: Page) -> KeptImage | None:
        """Say how a page's image will be kept and make the file's bytes; nothing is written yet.

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
        picture = open_image(source, name=page.id if isinstance(source, bytes) else None)
        picture.info = {}  # colour profiles and the like belong to the original's encoding, not to these pixels
        file = io.BytesIO()
        picture.save(file, "PNG")
        data = file.getvalue()
        return KeptImage(f"{hashlib.sha256(data).hexdigest()}.png", data)

    def satisfied(self, page: Page, reference: str | None) -> bool:
        """Whether what is already kept for a page of the same content is what would be kept now."""
        if page.image_source is None or self.mode == "none":
            return True
        if reference is None:
            return False
        if self.mode == "reference" and page.image_path is not None:
            return reference == str(page.image_path.absolute())
        path = self.path(reference) if _STORED.match(reference) else None
        return path is not None and path.exists()

    def write(self, kept: Iterable[KeptImage | None]) -> list[str]:
        """Write the files that are not there yet, each whole or not at all, and wait until they are on disk.

        Returns:
            The references of the files that are new, so that they can be removed when the pages are not added.

        Raises:
            StoreError: the disk is full, or another fault of it; what this call wrote is removed.
        """
        new: list[str] = []
        try:
            for image in kept:
                path = None if image is None else self.path(image.reference)
                if image is None or image.data is None or path is None or _has_size(path, len(image.data)):
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
                try:
                    with partial.open("wb") as file:
                        file.write(image.data)
                        file.flush()
                        os.fsync(file.fileno())
                    partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)
                new.append(image.reference)
            for folder in {path.parent for reference in new if (path := self.path(reference))}:
                sync_folder(folder)
        except OSError as exc:
            self.remove(new)
            raise StoreError(f"{self.folder}: a page image cannot be written: {exc.strerror or exc}") from exc
        return new

    def path(self, reference: str | None) -> Path | None:
        """Give the file a reference stands for, or None when there is none or its folder is not known."""
        if reference is None:
            return None
        if _STORED.match(reference):
            return None if self.folder is None else self.folder / reference[:2] / reference
        return Path(reference)

    def remove(self, references: Iterable[str]) -> None:
        """Remove stored files; originals are never touched, and a file that cannot be removed is left."""
        for reference in references:
            path = self.path(reference) if _STORED.match(reference) else None
            if path is not None:
                with contextlib.suppress(OSError):
                    path.unlink()

    def with_image(self, record: Record) -> Page:
        """Give a record's page with its image, to be opened when it is asked for.

        Where an image is recorded and its folder is not known, the page has none, and says so in the log once an index
        when it is first asked for it.
        """
        page, path = record.page, self.path(record.image)
        if path is not None:
            return page.replace(image=path, sha256=page.sha256)
        return page if record.image is None else _PageOutOfReach(page, self)

    def tell_out_of_reach(self, page: Page) -> None:
        """Warn, the first time, that a page's image is recorded and cannot be found."""
        if not self._told:
            self._told = True
            _log.warning(
                "page %r: its image is recorded, but the index was opened without images_dir, the folder it lies in "
                "(--images-dir on the command line); no image of this index can be shown", page.id
            )  # fmt: skip


class _PageOutOfReach(Page):
    """A page whose image lies in a folder nobody named: it has none, and tells why when it is asked for."""

    __slots__ = ("_images",)

    def __init__(self, page: Page, images: PageImages) -> None:
        super().__init__(
            page.id, page.source, page.number, page.label, None, page.text, page.metadata, page.sha256, page.video
        )
        self._images = images

    @property
    def image(self) -> Image.Image | None:
        self._images.tell_out_of_reach(self)
        return None

    @property
    def image_path(self) -> Path | None:
        self._images.tell_out_of_reach(self)
        return None

    @property
    def image_source(self) -> ImageSource | None:
        self._images.tell_out_of_reach(self)
        return None


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False
