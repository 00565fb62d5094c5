"""Which regions of the pages found answered: boxes and overlays for whoever shows results.

The one way from a query and pages to plain data: both frameworks and the command line take it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from PIL import Image

from colqwen3_retrievers.errors import ConfigError, PageError, StoreError
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.pages.files import user_path
from colqwen3_retrievers.pages.images import read_image_bytes
from colqwen3_retrievers.pages.page import Hit, Query
from colqwen3_retrievers.retrieval.similarity_maps import SimilarityMap, similarity_map
from colqwen3_retrievers.stores.protocol import Record
from colqwen3_retrievers.vectors.multi_vector import MultiVector

_log = logging.getLogger(__name__)

BOXES: Final = "boxes"
"""Metadata key of the regions that answered, best first: ``left, top, right, bottom`` in shares of the page (0 to 1,
from its top left corner) and ``score``, the question against the region alone, a token on average, -1 to 1."""

HEATMAP: Final = "heatmap"
"""Metadata key of the overlay: the absolute path of a PNG file of the page's size."""

POOLED: Final = "pooled"
"""Metadata key beside them: whether the page was pooled, so that the cells of a cluster share one value."""

_UNFIT: Final = re.compile(r"[^\w.-]+")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def without_evidence(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what a search told of the regions that answered it: it says nothing of another one.

    Args:
        metadata: of a node or document.

    Returns:
        A copy without :data:`BOXES`, :data:`HEATMAP` and :data:`POOLED`, where the last, which is always beside the
        others, tells that they are ours; a page's own keys of these names stay.

    >>> without_evidence({"year": 2024, "boxes": [], "pooled": False}), without_evidence({"boxes": 3})
    ({'year': 2024}, {'boxes': 3})
    """
    ours = isinstance(metadata.get(POOLED), bool) and (BOXES in metadata or HEATMAP in metadata)
    return {key: value for key, value in metadata.items() if not ours or key not in (BOXES, HEATMAP, POOLED)}


def picture_folder(given: str | os.PathLike[str], name: str) -> Path:
    """Give the absolute path of a folder for pictures.

    Args:
        given: by a user; ``~`` is the home folder.
        name: of the argument, for errors.

    Raises:
        ConfigError: it can be no folder's.

    >>> picture_folder("", "heatmaps")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: heatmaps: expected a folder, got ''
    """
    if not isinstance(given, str | os.PathLike) or not isinstance(os.fspath(given), str) or not os.fspath(given):
        raise ConfigError(f"{name}: expected a folder, got {given!r}")
    if "\0" in os.fspath(given):
        raise ConfigError(f"{name}: a path has no NUL: {os.fspath(given)!r}")
    return user_path(given).absolute()


def page_map(query: MultiVector, page: MultiVector | None) -> SimilarityMap | None:
    """Compare a query with a page, if the page has regions.

    Args:
        query: from ``encode_queries``.
        page: from ``encode_pages`` or an index, pooled or not.

    Returns:
        The map; None for a text, a video, and a page that is not there.

    >>> import numpy as np
    >>> page_map(MultiVector(np.eye(1, 4, dtype=np.float32)), MultiVector(np.eye(2, 4, dtype=np.float32))) is None
    True
    """
    if page is None or page.grid is None or page.visual is None:
        return None
    return similarity_map(query, page)


def indexed_picture(record: Record) -> Image.Image | None:
    """Open the picture of an indexed page, if it is still the one that was encoded.

    A picture that the index stores is named by its content. An original it only points to may have changed since, and
    then the page's map is of another picture.

    Args:
        record: of ``index.get``.

    Returns:
        The upright picture; None when the index keeps none.

    Raises:
        PageError: the file is gone or broken, or has changed since the page was indexed.

    >>> indexed_picture(index.get(["notes.txt#page=1"])[0]) is None                      # doctest: +SKIP
    True
    """
    page, path = record.page, record.page.image_path
    picture = page.image
    if picture is None or path is None or record.image is None or not Path(record.image).is_absolute():
        return picture
    if not _DIGEST.fullmatch(page.sha256) or page.replace(image=picture).sha256 == page.sha256:
        return picture  # or its maker's own mark, which tells nothing
    if hashlib.sha256(read_image_bytes(path)).hexdigest() == page.sha256:
        return picture  # its maker gave it the digest of the file
    raise PageError("the file has changed since the page was indexed", source=str(path))


@dataclasses.dataclass(frozen=True, slots=True)
class Evidence:
    """What is to be told of the regions that answered, under :data:`BOXES`, :data:`HEATMAP` and :data:`POOLED`.

    Args:
        boxes: most boxes a page, from 0 (none).
        heatmaps: a folder for overlays, made when needed; None draws none. Files are named by the page and by what the
            map shows, so that asking again writes the same files; none is ever removed.

    Raises:
        ConfigError: an argument that cannot be used.

    >>> Evidence(boxes=3).wanted, Evidence().wanted
    (True, False)
    """

    boxes: int = 0
    heatmaps: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        """Check."""
        if isinstance(self.boxes, bool) or not isinstance(self.boxes, int) or self.boxes < 0:
            raise ConfigError(f"boxes: expected a whole number from 0, got {self.boxes!r}")
        if self.heatmaps is not None:
            picture_folder(self.heatmaps, "heatmaps")
            object.__setattr__(self, "heatmaps", os.fspath(self.heatmaps))  # plain data, for settings

    @property
    def wanted(self) -> bool:
        """Whether anything is."""
        return self.boxes > 0 or self.heatmaps is not None

    def of_page(
        self, query: MultiVector, page: MultiVector | None, picture: Callable[[], Image.Image | None], name: str
    ) -> dict[str, Any]:
        """Give a page's evidence as metadata.

        Args:
            query: the question's multi-vector.
            page: the page's, or None when it is not known.
            picture: opens the page's image, of any size, for the overlay; None when there is none at hand.
            name: the page's id, which names the overlay's file.

        Returns:
            JSON values under :data:`BOXES` and :data:`HEATMAP`, as far as they are wanted, and :data:`POOLED` beside
            them; nothing at all for a page without regions (a text, a video). A picture that cannot be opened leaves
            the overlay out, with a warning; so does an original that has changed since it was indexed.

        Raises:
            StoreError: the overlay cannot be written.

        >>> import numpy as np
        >>> unit = np.eye(4, dtype=np.float32)
        >>> page = MultiVector(unit, visual=slice(0, 4), grid=(2, 2))
        >>> Evidence(boxes=1).of_page(MultiVector(unit[3:]), page, lambda: None, "a.png#page=1")
        {'boxes': [{'left': 0.5, 'top': 0.5, 'right': 1.0, 'bottom': 1.0, 'score': 1.0}], 'pooled': False}
        """
        found = page_map(query, page) if self.wanted else None
        return {} if found is None else self._told(found, picture, name)

    def of_hits(self, index: PageIndex, query: MultiVector, hits: Sequence[Hit]) -> dict[str, dict[str, Any]]:
        """Give the evidence of a search's hits and of their neighbours, by page id.

        Args:
            index: that was searched.
            query: the question's multi-vector.
            hits: of ``index.search``.

        Returns:
            What :meth:`of_page` gives for each page that has regions.

        Raises:
            StoreError: token embeddings are not what was written, or as for :meth:`of_page`.
        """
        if not self.wanted or not hits:
            return {}
        ids = dict.fromkeys(page.id for hit in hits for page in (hit.page, *hit.neighbours))
        told: dict[str, dict[str, Any]] = {}
        for record in index.get(ids, vectors=True):
            found = page_map(query, record.multi_vector)
            if found is not None:
                told[record.page.id] = self._told(found, partial(indexed_picture, record), record.page.id)
        return told

    def search(
        self, index: PageIndex, question: str | Query, how: Mapping[str, Any]
    ) -> tuple[list[Hit], dict[str, dict[str, Any]]]:
        """Search an index and give the evidence with the hits; the question is encoded once.

        Args:
            index: what is searched.
            question: a text or a query.
            how: the other arguments of :meth:`PageIndex.search`.

        Returns:
            The hits, and :meth:`of_hits` of them.
        """
        if not self.wanted or not len(index):
            return index.search(question, **how), {}
        [asked] = index.encoder.submit_queries([question]).result()
        hits = index.search(asked, **how)
        return hits, self.of_hits(index, asked, hits)

    async def asearch(
        self, index: PageIndex, question: str | Query, how: Mapping[str, Any]
    ) -> tuple[list[Hit], dict[str, dict[str, Any]]]:
        """Search without blocking the event loop; cancelling it cancels the encoding. See :meth:`search`."""
        if not self.wanted or not await asyncio.to_thread(len, index):
            return await index.asearch(question, **how), {}
        future = await asyncio.to_thread(lambda: index.encoder.submit_queries([question]))
        [asked] = await asyncio.wrap_future(future)
        hits = await index.asearch(asked, **how)
        return hits, await asyncio.to_thread(self.of_hits, index, asked, hits)

    def _told(self, found: SimilarityMap, picture: Callable[[], Image.Image | None], name: str) -> dict[str, Any]:
        told: dict[str, Any] = {}
        if self.boxes:
            told[BOXES] = [dataclasses.asdict(box) for box in found.boxes(top=self.boxes)]
        if self.heatmaps is not None:
            try:
                page = picture()
            except (PageError, ConfigError) as exc:  # ConfigError: an address that may not be fetched
                _log.warning("page %r is given without an overlay: %s", name, exc)
                page = None
            if page is not None:
                told[HEATMAP] = str(self._written(found, page, name, picture_folder(self.heatmaps, "heatmaps")))
        return {**told, POOLED: found.pooled} if told else {}

    def _written(self, found: SimilarityMap, page: Image.Image, name: str, folder: Path) -> Path:
        digest = hashlib.sha256(f"{name}\0{self.boxes}\0{page.size}\0".encode("utf-8", "surrogatepass"))
        digest.update(found.values.tobytes())
        drawn = found.overlay(page, boxes=self.boxes)
        return write_picture(drawn, folder / f"{file_stem(name)}-{digest.hexdigest()[:16]}.png")


def write_picture(picture: Image.Image, path: Path) -> Path:
    """Write a picture whole or not at all; its folder is made when needed.

    Returns:
        ``path``.

    Raises:
        StoreError: it cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_picture(Image.new("RGB", (4, 3)), Path(folder) / "overlays" / "a.png").name
    'a.png'
    """
    unfinished = path.with_name(f".{uuid.uuid4().hex}.partial")  # threads may write the same; never a longer name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            picture.save(unfinished, "PNG", compress_level=1)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as exc:
        raise StoreError(f"{path}: the overlay cannot be written: {exc.strerror or exc}") from exc
    return path


def file_stem(name: str, most: int = 72) -> str:
    """Give letters, digits, dots and dashes of a text for a file's name: its end, and not always another for another.

    Args:
        name: any text.
        most: most bytes as UTF-8, from 4: file systems take 255, and some spell letter and accent apart.

    >>> file_stem("reports/a b.pdf#page=1"), file_stem("報告書" * 99, 12), file_stem("../")
    ('reports-a-b.pdf-page-1', '書報告書', 'page')
    """
    spelled = _UNFIT.sub("-", name).encode()[-most:].decode("utf-8", "ignore")
    return spelled.strip("-.") or "page"
