"""Keys for ``langchain_core.indexing.index()`` that identify pages by their content."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

from langchain_core.documents import Document

from colqwen3_retrievers.langchain.documents import EVIDENCE, TRANSIENT, document_image
from colqwen3_retrievers.pages.images import open_image, read_image_bytes
from colqwen3_retrievers.pages.page import json_object
from colqwen3_retrievers.pages.remote_images import AllowRemote


def page_key_encoder(document: Document, *, allow_remote: AllowRemote = False) -> str:
    """Return a key that identifies a page by its content, for ``index(..., key_encoder=page_key_encoder)``.

    LangChain's own keys digest text and metadata: pages without text are then all equal and silently left out, a page
    whose image has changed counts as known, and bytes in the metadata are an error.

    This key digests the id, the text, the metadata (without the path of the image file and the scores of a search) and
    the image: the bytes of its file, or the pixels of an image in memory. It becomes the document's id in the store,
    and therefore begins with the id the document had.

    Args:
        document: of :class:`~colqwen3_retrievers.langchain.page_loader.PageLoader` or any other maker.
        allow_remote: whether the web address of an image block is fetched, to detect a changed image; pass
            ``functools.partial(page_key_encoder, allow_remote=True)``, and the same to the store by
            ``upsert_kwargs={"allow_remote": True}``.

    Raises:
        ConfigError: metadata that is not JSON, or a bad image.
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
    ignored = {*TRANSIENT, *EVIDENCE} | ({"image"} if image is not None else set())
    metadata = {key: value for key, value in document.metadata.items() if key not in ignored}
    fields = [document.id, document.page_content, json_object(metadata, f"document {document.id!r}")]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode("utf-8", "surrogatepass"))
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
