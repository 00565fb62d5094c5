"""An encoder without a model, for tests of what is built around one."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from colqwen3_retrievers import EncoderInfo, MultiVector, Page, PageIndex, Query
from colqwen3_retrievers.errors import EncodeError, InputTooLongError

DIM, BLOCK = 32, 8
INFO = EncoderInfo("ab12", "hashing", "tomoro", DIM, 1, 1280, False, 1)


class HashingEncoder:
    """Late interaction without a model: a unit vector for each word and for each block of pixels, by their hash.

    Equal words and blocks have similarity 1 and different ones about 0, so a score counts what query and page share.
    """

    def __init__(self, info: EncoderInfo = INFO) -> None:
        self.info = info
        self.encoded: list[str] = []
        self.threads = ThreadPoolExecutor(1)
        self.hold = threading.Event()
        self.hold.set()
        self.before: Callable[[list[Page]], object] = lambda pages: None  # called with the pages about to be encoded

    def encode_pages(self, pages: Iterable[Page]) -> list[MultiVector]:
        made = []
        pages = list(pages)
        self.before(pages)
        for index, page in enumerate(pages):
            if "unreadable" in page.text:
                raise EncodeError("it cannot be read", index=index)
            if "endless" in page.text:
                raise InputTooLongError("the text", limit=10, actual=99, index=index)
            made.append(self.multi_vector(page.text, page.image))
            self.encoded.append(page.id)
        return made

    def submit_pages(self, pages: Iterable[Page]) -> Future[list[MultiVector]]:
        return self.threads.submit(self.encode_pages, list(pages))

    def submit_queries(self, queries: Iterable[str | Query]) -> Future[list[MultiVector]]:
        asked = [Query(query) if isinstance(query, str) else query for query in queries]

        def encode() -> list[MultiVector]:
            self.hold.wait(10)
            pages = [Page(id="query", image=query.image) for query in asked]
            return [self.multi_vector(q.text or "", page.image) for q, page in zip(asked, pages, strict=True)]

        return self.threads.submit(encode)

    def multi_vector(self, text: str, image: Image.Image | None) -> MultiVector:
        parts = [word.encode() for word in text.lower().split()]
        grid = None
        if image is not None:
            columns, rows = image.width // BLOCK, image.height // BLOCK
            grid = (rows, columns)
            blocks = np.asarray(image)[: rows * BLOCK, : columns * BLOCK].reshape(rows, BLOCK, columns, BLOCK, 3)
            parts = [block.tobytes() for row in blocks.transpose(0, 2, 1, 3, 4) for block in row] + parts
        rows_of = [self.unit(part) for part in parts]
        visual = slice(0, grid[0] * grid[1]) if grid else None
        return MultiVector(np.stack(rows_of), visual=visual, grid=grid)

    @staticmethod
    def unit(part: bytes) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(part).digest()[:8], "big")
        row = np.random.default_rng(seed).standard_normal(DIM)
        return (row / np.linalg.norm(row)).astype(np.float32)


def picture(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def qdrant_index(encoder: HashingEncoder, **options: Any) -> PageIndex:
    """An index in a Qdrant collection in memory; skips the test where there is no client."""
    import pytest  # this module is also used outside tests

    client = pytest.importorskip("qdrant_client").QdrantClient(":memory:")
    from colqwen3_retrievers.stores.qdrant.store import QdrantStore

    return PageIndex.open(QdrantStore("pages", client=client, info=INFO), encoder, **options)
