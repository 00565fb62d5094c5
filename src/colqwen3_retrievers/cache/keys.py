"""Keys of pages in a cache, equal for pages that an encoder would see alike."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

from colqwen3_retrievers.cache.disk_cache import DiskCache
from colqwen3_retrievers.pages.images import read_image_bytes
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.vectors.multi_vector import COMPARED, EncoderInfo

SHAPING: Final = (*COMPARED, "max_visual_tokens", "revision")
"""Fields of an :class:`EncoderInfo` that shape a multi-vector."""

_DECODING = b"\0decoding 2"  # part of the names of files whose pixels are known; raised when decoding changes


def content_key(page: Page, include_text: bool) -> str:
    """Return a digest of what an encoder sees of a page. A file is read, not decoded: its bytes suffice.

    Digests are computed here, whatever ``page.sha256`` a caller gave: one for a whole file would give all its pages the
    same token embeddings.

    Raises:
        PageError: its image cannot be read.

    >>> content_key(Page(id="a", image=b"...", text="x"), False) == content_key(Page(id="b", image=b"..."), False)
    True
    """
    source = page.image_source
    if page.video is not None or not isinstance(source, str | Path | bytes):
        return f"content:{_computed(page)}"
    digest = hashlib.sha256(read_image_bytes(source, name=page.id if isinstance(source, bytes) else None))
    if include_text:
        digest.update(b"\0text\0" + page.text.encode("utf-8", "surrogatepass"))
    return f"file:{digest.hexdigest()}"


def pixel_key(page: Page, include_text: bool, names: DiskCache) -> str:
    """Return a digest of what an encoder sees of a page, an image by its pixels: the same in any file format.

    An image file is decoded once; after that ``names`` maps a digest of its bytes to that of its pixels. Digests are
    computed, as for :func:`content_key`.

    Raises:
        PageError: its image cannot be read.
    """
    source = page.image_source
    if page.video is not None or source is None:
        return f"content:{_computed(page)}"
    text = hashlib.sha256(page.text.encode("utf-8", "surrogatepass")).hexdigest() if include_text else ""
    if not isinstance(source, str | Path | bytes):
        return f"pixels:{Page(id=page.id, image=source).sha256}:{text}"
    data = read_image_bytes(source, name=page.id if isinstance(source, bytes) else None)
    digest = hashlib.sha256(data)
    digest.update(_DECODING)
    name = digest.hexdigest()
    pixels = names.content_of(name)
    if pixels is None:
        pixels = Page(id=page.id, image=data).sha256
        names.put_name(name, pixels)
    return f"pixels:{pixels}:{text}"


def settings_key(info: EncoderInfo) -> str:
    """Return a digest of the settings that shape a multi-vector: encoders that agree in them may share entries.

    >>> a = EncoderInfo("ab12", "tiny", "tomoro", 128, 1, 1280, False, 1)
    >>> settings_key(a) == settings_key(EncoderInfo("ab12", "/models/tiny", "tomoro", 128, 1, 1280, False, 1))
    True
    """
    values = {name: getattr(info, name) for name in SHAPING}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _computed(page: Page) -> str:
    return Page(id=page.id, text=page.text, image=page.image_source, video=page.video).sha256
