"""LlamaIndex reader: PDFs and images as documents, one a page, each with its picture."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from fsspec import AbstractFileSystem  # type: ignore[import-untyped]  # ships no types
from llama_index.core.bridge.pydantic import ConfigDict, Field, ValidationError
from llama_index.core.readers.base import BasePydanticReader
from llama_index.core.schema import Document, ImageDocument, MediaResource

from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.index.page_images import PageImages
from colqwen3_retrievers.llama_index.node_records import PAGE_ID
from colqwen3_retrievers.llama_index.nodes import page_fields
from colqwen3_retrievers.pages.files import PagePath, user_path
from colqwen3_retrievers.pages.loading import DEFAULT_MAX_PIXELS, load_pages
from colqwen3_retrievers.pages.page import Page

_OURS = (PAGE_ID, "page", "page_label", "sha256")
"""Metadata that a directory reader's may not replace: the pipeline's caches and the citations stand on them."""


class PageReader(BasePydanticReader):
    """Reads PDFs and images, one :class:`ImageDocument` a page, alone or inside a ``SimpleDirectoryReader``.

    A document's id is stable (``reports/a.pdf#page=3``), its text the id and, below it, the page's text layer, its
    metadata JSON: ``source`` (the file), ``file_name``, ``page``, ``page_label`` (when known), ``page_count``,
    ``sha256`` and so on. So no cache, hash or fusion takes one page for another. What a PDF page looks like is rendered
    into ``image_dir``, a file named by its content; an image file is its own picture.

    Each page is a document of its own: LlamaIndex's upserts, ``refresh_ref_docs`` and ``delete_ref_doc`` go by its id.
    A whole file is deleted by ``source``: ``retriever.delete_ref_doc("reports/a.pdf")`` of a
    :class:`~colqwen3_retrievers.llama_index.ColQwen3Retriever`, or a filter on it in other vector stores (see
    :class:`~colqwen3_retrievers.llama_index.PageNodes`).

    Index them with :meth:`ColQwen3Retriever.from_documents`, or, for other vector stores, let
    :class:`~colqwen3_retrievers.llama_index.PageNodes` and :class:`~colqwen3_retrievers.llama_index.ColQwen3Embedding`
    be the transformations; a sentence splitter would cut the text layer and copy the picture to every piece.

    Args:
        image_dir: where pictures of rendered pages are kept; None takes ``colqwen3-retrievers/pages`` in the user's
            cache folder (``XDG_CACHE_HOME``, else ``~/.cache``).
        root: what sources and ids are relative to. None: a folder that is read; in a ``SimpleDirectoryReader``, nothing
            (sources are the paths it gives).
        max_pixels: most pixels of a rendered page.
        on_error: a page or file that cannot be read: ``"raise"``, or ``"skip"`` it with a warning in the log.
        password: opens encrypted PDFs. It is in no repr, dict or pickle: a worker process does not get it.

    Raises:
        ConfigError: an argument that cannot be used.

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
        try:
            super().__init__(**fields)
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_input=False)[0]  # the input may be the password
            raise ConfigError(f"{first['loc'][0]}: {first['msg']}") from None

    @classmethod
    def class_name(cls) -> str:
        """Give the name it is stored under."""
        return "PageReader"

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the password."""
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
            file: as :func:`colqwen3_retrievers.load_pages` takes it: a file, folder or pattern, or a list of them.
            extra_info: metadata for all of them, as a ``SimpleDirectoryReader`` gives it; it comes before our own but
                for the page's id, number, label and digest, and is kept from models like our own technical ones.
            fs: a file system to read a single file from; None is the local one.

        Raises:
            PageError: with ``on_error="raise"``, a file or page that cannot be read.
            ConfigError: a wrong argument; two files that would have the same source.
        """
        return list(self.lazy_load_data(file, extra_info, fs))

    def lazy_load_data(
        self,
        file: PagePath | Sequence[PagePath],
        extra_info: dict[str, Any] | None = None,
        fs: AbstractFileSystem | None = None,
    ) -> Iterator[Document]:
        """Read pages one at a time; see :meth:`load_data`."""
        images = PageImages(self._folder(), "reference")
        if fs is not None:
            yield from self._remote(file, extra_info or {}, fs)
            return
        given = self.root is None and extra_info is not None and isinstance(file, str | os.PathLike)
        name = Path(file).as_posix() if given and isinstance(file, str | os.PathLike) else None
        pages = load_pages(
            file, root=self.root, max_pixels=self.max_pixels, on_error=self.on_error, password=self.password
        )  # fmt: skip
        yield from self._documents(pages, name, extra_info or {}, images)

    def _remote(self, file: object, extra_info: dict[str, Any], fs: AbstractFileSystem) -> Iterator[Document]:
        """Read a file of another file system through a copy; all its pictures are kept, as the copy goes away."""
        if not isinstance(file, str | os.PathLike):
            raise ConfigError("file: with fs=, a single file")
        path = os.fspath(file)
        with tempfile.TemporaryDirectory(prefix="colqwen3-") as folder:
            copy = Path(folder) / Path(path).name
            try:
                with fs.open(path, "rb") as source, copy.open("wb") as target:
                    shutil.copyfileobj(source, target)
            except OSError as exc:
                raise PageError(f"cannot be read: {exc}", source=path) from exc
            pages = load_pages(copy, max_pixels=self.max_pixels, on_error=self.on_error, password=self.password)
            yield from self._documents(pages, Path(path).as_posix(), extra_info, PageImages(self._folder(), "store"))

    def _documents(
        self, pages: Iterable[Page], name: str | None, extra_info: dict[str, Any], images: PageImages
    ) -> Iterator[Document]:
        for page in pages:
            named = page if name is None else page.replace(id=f"{name}#page={page.number}", source=name)
            kept = images.prepare(named)
            images.write([kept])
            path = images.path(kept.reference) if kept is not None else None
            yield _document(named, path, extra_info)

    def _folder(self) -> Path:
        if self.image_dir is not None:
            return user_path(self.image_dir).absolute()
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return user_path(cache).absolute() / "colqwen3-retrievers" / "pages"


def _document(page: Page, path: Path | None, extra_info: dict[str, Any]) -> Document:
    fields = page_fields(page, None)
    del fields["relationships"]  # upserts go by SOURCE where there is one, and would take a file for one document
    ours = fields["metadata"]
    metadata = {**ours, **extra_info, **{key: ours[key] for key in _OURS if key in ours}}
    # A directory reader hides the file's name from models, so what is cited has to be the source.
    hidden = [key for key in fields["excluded_llm_metadata_keys"] if key != "source"] if extra_info else None
    fields |= {"metadata": metadata, "excluded_embed_metadata_keys": sorted(metadata)}
    if hidden is not None:
        fields["excluded_llm_metadata_keys"] = [*hidden, *(key for key in _PATHS if key in metadata)]
    text = f"{page.id}\n\n{page.text}" if page.text else page.id
    return ImageDocument(
        text_resource=MediaResource(text=text),
        image_resource=None if path is None else MediaResource(path=path),
        **fields,
    )


_PATHS = ("file_path", "file_size", "creation_date", "last_modified_date", "last_accessed_date")
