"""Which regions of a page answered a query, as plain data: boxes, and overlays in files.

Both frameworks and the command line use it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from PIL import Image

from colqwen3_retrievers.atomic_files import write_atomically
from colqwen3_retrievers.checks import whole_number
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
"""Metadata key of the answering regions, best first: ``left, top, right, bottom`` as shares of the page (0 to 1, from
its top left corner) and ``score``, mean MaxSim of the query against the region alone, -1 to 1."""

HEATMAP: Final = "heatmap"
"""Metadata key of the overlay: the absolute path of a PNG file of the page's size."""

POOLED: Final = "pooled"
"""Metadata key set with either: whether the page was pooled, so that the cells of a cluster share one value."""

_UNFIT: Final = re.compile(r"[^\w.-]+")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def without_evidence(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata without the evidence of an earlier query.

    Args:
        metadata: of a node or document.

    Returns:
        A copy without :data:`BOXES`, :data:`HEATMAP` and :data:`POOLED`. The last is always set with the others, which
        marks them as ours; a page's own keys of these names stay.

    >>> without_evidence({"year": 2024, "boxes": [], "pooled": False}), without_evidence({"boxes": 3})
    ({'year': 2024}, {'boxes': 3})
    """
    evidence = isinstance(metadata.get(POOLED), bool) and (BOXES in metadata or HEATMAP in metadata)
    return {key: value for key, value in metadata.items() if not evidence or key not in (BOXES, HEATMAP, POOLED)}


def picture_folder(path: str | os.PathLike[str], name: str) -> Path:
    """Return the absolute path of a folder for pictures.

    Args:
        path: from a user; ``~`` is the home folder.
        name: of the argument, for errors.

    Raises:
        ConfigError: it cannot be the path of a folder.

    >>> picture_folder("", "heatmaps")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: heatmaps: expected a folder, got ''
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or not os.fspath(path):
        raise ConfigError(f"{name}: expected a folder, got {path!r}")
    if "\0" in os.fspath(path):
        raise ConfigError(f"{name}: a path has no NUL: {os.fspath(path)!r}")
    return user_path(path).absolute()


def page_map(query: MultiVector, page: MultiVector | None) -> SimilarityMap | None:
    """Return the similarity map of a query and a page, if the page has regions.

    Args:
        query: from ``encode_queries``.
        page: from ``encode_pages`` or an index, pooled or not.

    Returns:
        The map; None for a text, a video, and a missing page.

    >>> import numpy as np
    >>> page_map(MultiVector(np.eye(1, 4, dtype=np.float32)), MultiVector(np.eye(2, 4, dtype=np.float32))) is None
    True
    """
    if page is None or page.grid is None or page.visual is None:
        return None
    return similarity_map(query, page)


def indexed_picture(record: Record) -> Image.Image | None:
    """Return the picture of an indexed page, if it is still the one that was encoded.

    A picture stored in the index is named by its content. An original that the index only refers to may have changed
    since, and then the page's map would be of another picture.

    Args:
        record: from ``index.get``.

    Returns:
        The upright picture; None when the index has none.

    Raises:
        PageError: the file is missing or broken, or has changed since the page was indexed.

    >>> indexed_picture(index.get(["notes.txt#page=1"])[0]) is None                      # doctest: +SKIP
    True
    """
    page, path = record.page, record.page.image_path
    picture = page.image
    if picture is None or path is None or record.image is None or not Path(record.image).is_absolute():
        return picture
    if not _DIGEST.fullmatch(page.sha256) or page.replace(image=picture).sha256 == page.sha256:
        return picture  # unchanged, or the digest is the caller's own mark and proves nothing
    if hashlib.sha256(read_image_bytes(path)).hexdigest() == page.sha256:
        return picture  # the caller gave the digest of the file
    raise PageError("the file has changed since the page was indexed", source=str(path))


@dataclasses.dataclass(frozen=True, slots=True)
class Evidence:
    """What to report of the answering regions, under :data:`BOXES`, :data:`HEATMAP` and :data:`POOLED`.

    Args:
        boxes: most boxes per page, from 0 (none).
        heatmaps: a folder for overlays, created when needed; None draws none. Files are named by the page and the
            content of the map, so that asking again writes the same files; none is ever removed.

    Raises:
        ConfigError: an argument that cannot be used.

    >>> Evidence(boxes=3).wanted, Evidence().wanted
    (True, False)
    """

    boxes: int = 0
    heatmaps: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        whole_number(self.boxes, "boxes")
        if self.heatmaps is not None:
            picture_folder(self.heatmaps, "heatmaps")
            object.__setattr__(self, "heatmaps", os.fspath(self.heatmaps))  # plain data, for settings

    @property
    def wanted(self) -> bool:
        """Whether anything is to be reported."""
        return self.boxes > 0 or self.heatmaps is not None

    def of_page(
        self, query: MultiVector, page: MultiVector | None, picture: Callable[[], Image.Image | None], name: str
    ) -> dict[str, Any]:
        """Return a page's evidence as metadata.

        Args:
            query: the multi-vector of the query.
            page: that of the page, or None when it is not known.
            picture: opens the page's image, of any size, for the overlay; None when there is none.
            name: the page's id, which names the overlay's file.

        Returns:
            JSON values under :data:`BOXES` and :data:`HEATMAP`, as far as they are wanted, with :data:`POOLED`; empty
            for a page without regions (a text, a video). A picture that cannot be opened leaves the overlay out, with
            a warning; so does an original that has changed since it was indexed.

        Raises:
            StoreError: the overlay cannot be written.

        >>> import numpy as np
        >>> unit = np.eye(4, dtype=np.float32)
        >>> page = MultiVector(unit, visual=slice(0, 4), grid=(2, 2))
        >>> Evidence(boxes=1).of_page(MultiVector(unit[3:]), page, lambda: None, "a.png#page=1")
        {'boxes': [{'left': 0.5, 'top': 0.5, 'right': 1.0, 'bottom': 1.0, 'score': 1.0}], 'pooled': False}
        """
        regions = page_map(query, page) if self.wanted else None
        if regions is None:
            return {}
        metadata: dict[str, Any] = {}
        if self.boxes:
            metadata[BOXES] = [dataclasses.asdict(box) for box in regions.boxes(top=self.boxes)]
        if self.heatmaps is not None:
            try:
                image = picture()
            except (PageError, ConfigError) as exc:  # ConfigError: an address that may not be fetched
                _log.warning("page %r is returned without an overlay: %s", name, exc)
                image = None
            if image is not None:
                folder = picture_folder(self.heatmaps, "heatmaps")
                metadata[HEATMAP] = str(self._write_overlay(regions, image, name, folder))
        return {**metadata, POOLED: regions.pooled} if metadata else {}

    def of_hits(self, index: PageIndex, query: MultiVector, hits: Sequence[Hit]) -> dict[str, dict[str, Any]]:
        """Return the evidence of a search's hits and of their neighbours, by page id.

        Args:
            index: that was searched.
            query: the multi-vector of the query.
            hits: from ``index.search``.

        Returns:
            What :meth:`of_page` returns for each page that has regions.

        Raises:
            StoreError: token embeddings are not what was written, or as for :meth:`of_page`.
        """
        if not self.wanted or not hits:
            return {}
        ids = dict.fromkeys(page.id for hit in hits for page in (hit.page, *hit.neighbours))
        evidence = {
            record.page.id: self.of_page(query, record.multi_vector, partial(indexed_picture, record), record.page.id)
            for record in index.get(ids, vectors=True)
        }
        return {name: metadata for name, metadata in evidence.items() if metadata}

    def search(
        self, index: PageIndex, query: str | Query, how: Mapping[str, Any]
    ) -> tuple[list[Hit], dict[str, dict[str, Any]], dict[str, float]]:
        """Search an index, and return the hits, their evidence, and their neighbours' scores.

        The query is encoded once.

        Args:
            index: to search.
            query: a text, an image, or both.
            how: the other arguments of :meth:`PageIndex.search`.

        Returns:
            The hits, their :meth:`of_hits`, and their :func:`neighbour_scores`.
        """
        if not (self.wanted or how.get("window")) or index.store.is_empty():
            return index.search(query, **how), {}, {}
        [vectors] = index.encoder.submit_queries([query]).result()
        return self._with_neighbours(index, vectors, index.search(vectors, **how))

    async def asearch(
        self, index: PageIndex, query: str | Query, how: Mapping[str, Any]
    ) -> tuple[list[Hit], dict[str, dict[str, Any]], dict[str, float]]:
        """Search without blocking the event loop; cancelling it cancels the encoding. See :meth:`search`."""
        if not (self.wanted or how.get("window")) or await asyncio.to_thread(lambda: index.store.is_empty()):
            return await index.asearch(query, **how), {}, {}
        pending = await asyncio.to_thread(lambda: index.encoder.submit_queries([query]))
        [vectors] = await asyncio.wrap_future(pending)
        hits = await index.asearch(vectors, **how)
        return await asyncio.to_thread(self._with_neighbours, index, vectors, hits)

    def _with_neighbours(
        self, index: PageIndex, query: MultiVector, hits: list[Hit]
    ) -> tuple[list[Hit], dict[str, dict[str, Any]], dict[str, float]]:
        return hits, self.of_hits(index, query, hits), neighbour_scores(index, query, hits)

    def _write_overlay(self, regions: SimilarityMap, image: Image.Image, name: str, folder: Path) -> Path:
        digest = hashlib.sha256(f"{name}\0{self.boxes}\0{image.size}\0".encode("utf-8", "surrogatepass"))
        digest.update(regions.values.tobytes())
        overlay = regions.overlay(image, boxes=self.boxes)
        return write_picture(overlay, folder / f"{file_stem(name)}-{digest.hexdigest()[:16]}.png")


def neighbour_scores(index: PageIndex, query: MultiVector, hits: Sequence[Hit]) -> dict[str, float]:
    """Return the MaxSim sums of the neighbours of hits, by page id.

    Args:
        index: that was searched.
        query: the multi-vector of the query.
        hits: from ``index.search``.

    >>> neighbour_scores(index, query, index.search(query, window=1))                    # doctest: +SKIP
    {'a.pdf#page=6': 11.4, 'a.pdf#page=8': 9.2}
    """
    ids = list(dict.fromkeys(page.id for hit in hits for page in hit.neighbours))
    return {hit.page.id: float(hit.score) for hit in index.rescore(query, ids, k=max(1, len(ids)))}


def write_picture(picture: Image.Image, path: Path) -> Path:
    """Write a picture atomically; its folder is created when needed.

    Returns:
        ``path``.

    Raises:
        StoreError: it cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_picture(Image.new("RGB", (4, 3)), Path(folder) / "overlays" / "a.png").name
    'a.png'
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, partial(picture.save, format="PNG", compress_level=1))
    except OSError as exc:
        raise StoreError(f"{path}: the overlay cannot be written: {exc.strerror or exc}") from exc
    return path


def file_stem(name: str, most: int = 72) -> str:
    """Return the end of a text as a part of a file name: letters, digits, dots and dashes.

    Args:
        name: any text; two texts may have the same stem.
        most: most bytes as UTF-8, from 4: file systems take 255, and some store letter and accent apart.

    >>> file_stem("reports/a b.pdf#page=1"), file_stem("報告書" * 99, 12), file_stem("../")
    ('reports-a-b.pdf-page-1', '書報告書', 'page')
    """
    spelled = _UNFIT.sub("-", name).encode()[-most:].decode("utf-8", "ignore")
    return spelled.strip("-.") or "page"
