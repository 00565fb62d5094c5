"""Keys for ``langchain_core.indexing.index()`` that tell pages by what stands on them."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

from langchain_core.documents import Document

from colqwen3_retrievers.langchain.documents import EVIDENCE, STALE, document_image
from colqwen3_retrievers.pages.images import open_image, read_image_bytes
from colqwen3_retrievers.pages.page import json_object
from colqwen3_retrievers.pages.remote_images import AllowRemote


def page_key_encoder(document: Document, *, allow_remote: AllowRemote = False) -> str:
    """Give a key that is the same for the same page and another for any other: ``index(..., key_encoder=this)``.

    LangChain's own keys digest text and metadata. Pages without text are then all alike and silently left out, a page
    whose picture has changed is taken for known, and bytes in the metadata are an error.

    The key digests the id, the text, the metadata (without the place of the image file and scores of a search) and
    the image itself: the bytes of its file, or of an image in memory its pixels. It becomes the document's id in the
    store, which is why it begins with the one it had.

    Args:
        document: of :class:`~colqwen3_retrievers.langchain.page_loader.PageLoader` or any other maker.
        allow_remote: whether the web address of an image block is fetched, to tell whether the image has changed; give
            ``functools.partial(page_key_encoder, allow_remote=True)``, and the same to the store by
            ``upsert_kwargs={"allow_remote": True}``.

    Raises:
        ConfigError: metadata that is not JSON, or an image that is none.
        PageError: the image cannot be read or fetched.

    Example:
        >>> from langchain_core.indexing import InMemoryRecordManager, index
        >>> index(PageLoader("reports/"), InMemoryRecordManager("reports"), store,             # doctest: +SKIP
        ...       key_encoder=page_key_encoder, cleanup="incremental", source_id_key="source")
        {'num_added': 12, 'num_updated': 0, 'num_skipped': 0, 'num_deleted': 0}
        >>> page_key_encoder(Document("x", id="a.pdf#page=1"))
        'a.pdf#page=1@898ad8c1931b1ef492422f9643ed75e8'
    """
    image = document_image(document, allow_remote)
    away = {*STALE, *EVIDENCE} | ({"image"} if image is not None else set())
    metadata = {key: value for key, value in document.metadata.items() if key not in away}
    known = json_object(metadata, f"document {document.id!r}")
    described = json.dumps([document.id, document.page_content, known], sort_keys=True)
    digest = hashlib.sha256(described.encode("utf-8", "surrogatepass"))
    if image is not None:
        name = document.id or "a document's image"
        if isinstance(image, str | Path | bytes):
            data = read_image_bytes(image, name=name if isinstance(image, bytes) else None)
        else:
            file = io.BytesIO()
            open_image(image, name=name).save(file, "PPM")  # size and pixels
            data = file.getvalue()
        digest.update(b"\0image\0" + data)
    return f"{document.id}@{digest.hexdigest()[:32]}" if document.id else digest.hexdigest()
