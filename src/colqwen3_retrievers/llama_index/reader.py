"""LlamaIndex reader: PDFs and images as documents, one a page, each with its image."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from fsspec import AbstractFileSystem  # type: ignore[import-untyped]  # ships no types
from llama_index.core.bridge.pydantic import ConfigDict, Field
from llama_index.core.readers.base import BasePydanticReader
from llama_index.core.schema import Document, ImageDocument, MediaResource

from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.index.page_images import PageImages
from colqwen3_retrievers.llama_index.node_records import PAGE_ID
from colqwen3_retrievers.llama_index.nodes import DEFAULT_CHAT_IMAGES, image_fields, page_fields, text_with_id
from colqwen3_retrievers.llama_index.pydantic_fields import config_errors
from colqwen3_retrievers.pages.files import PagePath, user_path
from colqwen3_retrievers.pages.loading import DEFAULT_MAX_PIXELS, load_pages
from colqwen3_retrievers.pages.page import Page, json_object

# Metadata that a directory reader must not replace, because pipeline caches and citations rely on it; and metadata of
# its own that models need not see.
_PAGE_KEYS: Final = (PAGE_ID, "page", "page_label", "sha256")
_FILE_KEYS: Final = ("file_path", "file_size", "creation_date", "last_modified_date", "last_accessed_date")


class PageReader(BasePydanticReader):
    """Reads PDFs and images, one :class:`ImageDocument` a page, alone or inside a ``SimpleDirectoryReader``.

    A document's id is stable (``reports/a.pdf#page=3``), its text is the id followed by the page's text layer, and its
    metadata is JSON: ``source`` (the file), ``file_name``, ``page``, ``page_label`` (when known), ``page_count``,
    ``sha256`` and so on. So no cache, hash or fusion confuses two pages. PDF pages are rendered into files of
    ``image_dir`` named by their content; an image file is used as it is, with a copy in base64 for chat models where
    they may not read it.

    Each page is a document of its own: LlamaIndex's upserts, ``refresh_ref_docs`` and ``delete_ref_doc`` use its id. A
    whole file is deleted by ``source``: ``retriever.delete_ref_doc("reports/a.pdf")`` of a
    :class:`~colqwen3_retrievers.llama_index.ColQwen3Retriever`, or a filter in other vector stores (see
    :class:`~colqwen3_retrievers.llama_index.PageNodes`).

    Index documents with :meth:`ColQwen3Retriever.from_documents`, or, for other vector stores, with the transformations
    :class:`~colqwen3_retrievers.llama_index.PageNodes` and :class:`~colqwen3_retrievers.llama_index.ColQwen3Embedding`;
    a sentence splitter would cut the text layer and copy the image to every part.

    Args:
        image_dir: folder of rendered pages; None takes ``colqwen3-retrievers/pages`` in the user's cache folder
            (``XDG_CACHE_HOME``, else ``~/.cache``).
        root: folder that sources and ids are relative to. None takes the folder that is read, and in a
            ``SimpleDirectoryReader`` the paths as it gives them.
        max_pixels: maximum number of pixels of a rendered page.
        on_error: for a page or file that cannot be read: ``"raise"``, or ``"skip"`` it and log a warning.
        password: opens encrypted PDFs. No repr, dict or pickle contains it, so a worker process does not get it.

    Raises:
        ConfigError: an invalid argument.

    Example:
        >>> from llama_index.core import SimpleDirectoryReader
        >>> documents = PageReader().load_data("reports/")                                          # doctest: +SKIP
        >>> SimpleDirectoryReader("reports/", file_extractor={".pdf": PageReader()}).load_data()    # doctest: +SKIP
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", validate_assignment=True)

    image_dir: str | None = None
    root: str | None = None
    max_pixels: int = Field(default=DEFAULT_MAX_PIXELS, strict=True)
    on_error: Literal["raise", "skip"] = "raise"
    password: str | None = Field(default=None, exclude=True, repr=False)

    def __init__(
        self,
        *,
        image_dir: str | os.PathLike[str] | None = None,
        root: str | os.PathLike[str] | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        on_error: Literal["raise", "skip"] = "raise",
        password: str | None = None,
        is_remote: bool = False,
    ) -> None:
        fields: dict[str, Any] = {
            "image_dir": None if image_dir is None else os.fspath(image_dir),
            "root": None if root is None else os.fspath(root),
            "max_pixels": max_pixels, "on_error": on_error, "password": password, "is_remote": is_remote,
        }  # fmt: skip
        with config_errors(show_input=False):  # it may be the password
            super().__init__(**fields)

    @classmethod
    def class_name(cls) -> str:
        """Return the name it is serialised under."""
        return "PageReader"

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {**state, "__dict__": {**state["__dict__"], "password": None}}

    def load_data(
        self,
        file: PagePath | Sequence[PagePath],
        extra_info: dict[str, Any] | None = None,
        fs: AbstractFileSystem | None = None,
    ) -> list[Document]:
        """Read the pages of files and folders.

        Args:
            file: as for :func:`colqwen3_retrievers.load_pages`: a file, folder or pattern, or a list of them.
            extra_info: metadata for all of them, as from a ``SimpleDirectoryReader``; it replaces ours except id,
                number, label and digest of the page, and its technical keys are hidden from models too. Dates and the
                like become JSON values.
            fs: a file system to read a single file from; None is the local one.

        Raises:
            PageError: with ``on_error="raise"``, a file or page that cannot be read.
            ConfigError: an invalid argument; two files that would have the same source.
        """
        return list(self.lazy_load_data(file, extra_info, fs))

    def lazy_load_data(
        self,
        file: PagePath | Sequence[PagePath],
        extra_info: dict[str, Any] | None = None,
        fs: AbstractFileSystem | None = None,
    ) -> Iterator[Document]:
        """Read pages one at a time; see :meth:`load_data`."""
        path = os.fspath(file) if isinstance(file, str | os.PathLike) else None
        if fs is None:
            pages = load_pages(
                file, root=self.root, max_pixels=self.max_pixels, on_error=self.on_error, password=self.password
            )  # fmt: skip
            source = path if self.root is None and extra_info is not None else None
            yield from self._documents(pages, source, extra_info or {}, PageImages(self._image_folder(), "reference"))
            return
        if path is None:
            raise ConfigError("file: with fs=, a single file")
        with tempfile.TemporaryDirectory(prefix="colqwen3-") as folder:
            copy = Path(folder) / Path(path).name
            try:
                with fs.open(path, "rb") as remote, copy.open("wb") as local:
                    shutil.copyfileobj(remote, local)
            except OSError as exc:
                raise PageError(f"cannot be read: {exc}", source=path) from exc
            pages = load_pages(copy, max_pixels=self.max_pixels, on_error=self.on_error, password=self.password)
            # The copy is temporary, so that its images are stored too.
            yield from self._documents(pages, path, extra_info or {}, PageImages(self._image_folder(), "store"))

    def _documents(
        self, pages: Iterable[Page], source: str | None, extra_info: dict[str, Any], images: PageImages
    ) -> Iterator[Document]:
        """Convert pages to documents, with another source where one is given."""
        name = None if source is None else Path(source).as_posix()
        extra_info = json_object(extra_info, "extra_info")
        for page in pages:
            if name is not None:
                page = page.replace(id=f"{name}#page={page.number}", source=name)
            image = images.prepare(page)
            images.write([image])
            yield _document(page, None if image is None else images.path(image.reference), extra_info)

    def _image_folder(self) -> Path:
        if self.image_dir is not None:
            return user_path(self.image_dir).absolute()
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return user_path(cache).absolute() / "colqwen3-retrievers" / "pages"


def _document(page: Page, image_path: Path | None, extra_info: dict[str, Any]) -> Document:
    fields = page_fields(page, None)
    del fields["relationships"]  # upserts would use SOURCE and consider all pages of a file one document
    metadata = {**fields["metadata"], **extra_info}
    metadata |= {key: value for key, value in fields["metadata"].items() if key in _PAGE_KEYS}
    if extra_info:  # a directory reader hides file_name from models, so that the source has to be the citation
        hidden = [key for key in fields["excluded_llm_metadata_keys"] if key != "source"]
        fields["excluded_llm_metadata_keys"] = hidden + [key for key in _FILE_KEYS if key in metadata]
    image = {} if image_path is None else image_fields(image_path, DEFAULT_CHAT_IMAGES)
    return ImageDocument(
        text_resource=MediaResource(text=text_with_id(page.id, page.text)),
        image_resource=None
        if image_path is None
        else MediaResource(
            path=image_path, data=image.get("image", "").encode() or None, mimetype=image["image_mimetype"]
        ),
        **{**fields, "metadata": metadata, "excluded_embed_metadata_keys": sorted(metadata)},
    )
