"""The LangChain document loader of page images."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from typing import cast

from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document

from colqwen3_retrievers.atomic_files import write_atomically
from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.langchain.documents import page_to_document
from colqwen3_retrievers.pages.files import OnError, PageInput, PagePath, is_data, user_path
from colqwen3_retrievers.pages.images import open_image
from colqwen3_retrievers.pages.loading import DEFAULT_MAX_PIXELS, load_pages
from colqwen3_retrievers.pages.page import Page


class PageLoader(BaseLoader):
    """Loads PDFs and images page by page, each page a document with its image.

    Documents are those of :func:`~colqwen3_retrievers.langchain.documents.page_to_document`: ``page_content`` is the
    citation and the text layer, ``metadata`` has source, page (from 1), page_count, sha256 and so on. The image of a
    single image file is that file, ``metadata["image_path"]``. A rendered page is written to ``images_dir``, or by
    default kept in ``metadata["image"]`` as base64, which survives JSON and ``index()``; chat models and other
    embedders see neither, because they receive ``page_content``. One page is held in memory at a time.

    Args:
        paths: files, folders or patterns, file objects or named bytes, as for
            :func:`~colqwen3_retrievers.pages.loading.load_pages`.
        root: the folder that sources are relative to; by default a folder itself, and a file's folder.
        max_pixels: most pixels of a rendered page.
        on_error: ``"raise"``; ``"skip"``, which logs a warning and continues; or a function called with the PageError.
        password: opens encrypted PDFs; it is neither shown nor pickled.
        images_dir: the folder for images of rendered pages, named by the digest of their content; made when needed.

    Raises:
        ConfigError: a wrong argument; while loading, also two files of one source.
        PageError: while loading: a file that does not exist or cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> from PIL import Image
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (40, 30), "white").save(folder / "scan.png")
        >>> for document in PageLoader(folder).lazy_load():
        ...     print(document.id, document.page_content, pathlib.Path(document.metadata["image_path"]).name)
        scan.png#page=1 scan.png, page 1 scan.png
    """

    def __init__(
        self,
        paths: PageInput | Iterable[PageInput],
        *,
        root: PagePath | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        on_error: OnError = "raise",
        password: str | None = None,
        images_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(paths, str | os.PathLike | Iterable) or isinstance(paths, bytes):
            raise ConfigError(f"paths: expected a path or a list of paths, got {type(paths).__name__}")
        single = isinstance(paths, str | os.PathLike) or is_data(paths)
        self.paths = paths if single else list(cast("Iterable[PageInput]", paths))
        self.root = root
        self.max_pixels = max_pixels
        self.on_error = on_error
        self.images_dir = None if images_dir is None else user_path(images_dir).absolute()
        self._password = password

    def lazy_load(self) -> Iterator[Document]:
        """Return an iterator over pages; paths are resolved now, files are opened when their pages are needed."""
        pages = load_pages(
            self.paths, root=self.root, max_pixels=self.max_pixels, on_error=self.on_error, password=self._password
        )
        return map(self._document, pages)

    def _document(self, page: Page) -> Document:
        document = page_to_document(page)
        if page.image_source is None or page.image_path is not None:
            return document
        file = io.BytesIO()
        open_image(page.image_source, name=page.id).save(file, "PNG")
        data = file.getvalue()
        if self.images_dir is None:
            document.metadata["image"] = base64.b64encode(data).decode("ascii")
            return document
        path = self.images_dir / f"{hashlib.sha256(data).hexdigest()}.png"
        try:
            if not path.exists():
                self.images_dir.mkdir(parents=True, exist_ok=True)
                write_atomically(path, data)
        except OSError as exc:
            reason = f"its image cannot be written to {self.images_dir}: {exc.strerror or exc}"
            raise PageError(reason, source=page.source, page=page.number) from exc
        document.metadata["image_path"] = str(path)
        return document

    def __getstate__(self) -> dict[str, object]:
        """Pickle and copy without the password."""
        return {**self.__dict__, "_password": None}

    def __repr__(self) -> str:
        return f"PageLoader({self.paths!r})"
