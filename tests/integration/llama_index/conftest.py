"""Checkpoint, page images and indexes of the tests of LlamaIndex from end to end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_index.core.instrumentation import get_dispatcher

from colqwen3_retrievers import ColQwen3Encoder, PageIndex, load_pages
from tests.contracts.llama_index_contract import Events
from tests.frameworks.page_folder import make_folder


@pytest.fixture(autouse=True)
def _no_loop_left_open() -> None:
    """LlamaIndex makes an event loop of its own where there is none, and never closes it; told so, it uses run()."""
    asyncio.set_event_loop(None)


@pytest.fixture
def events() -> Iterator[Events]:
    handler = Events()
    get_dispatcher().add_event_handler(handler)
    yield handler
    get_dispatcher().event_handlers.remove(handler)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and ``pages/0.png`` to ``pages/4.png``."""
    return make_folder(tmp_path_factory.mktemp("llama_index"), 5)


@pytest.fixture(scope="session")
def encoder(folder: Path) -> Iterator[ColQwen3Encoder]:
    with ColQwen3Encoder(folder / "checkpoint", device="cpu") as encoder:
        yield encoder


@pytest.fixture(scope="session")
def index(folder: Path, encoder: ColQwen3Encoder) -> Iterator[PageIndex]:
    """An index of the images; tests leave it as it is."""
    with PageIndex.open(folder / "index", encoder) as index:
        index.add(load_pages(folder / "pages"))
        yield index
