"""The torch engine under the engine contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from colqwen3_retrievers import ColQwen3Encoder
from tests.contracts.engine_contract import EngineContract


@pytest.fixture(scope="module")
def open_encoder() -> Iterator[Callable[..., ColQwen3Encoder]]:
    opened: list[ColQwen3Encoder] = []

    def make(folder: object, **settings: object) -> ColQwen3Encoder:
        opened.append(ColQwen3Encoder(folder, engine="torch", device="cpu", **settings))
        return opened[-1]

    yield make
    for encoder in opened:
        encoder.close()


class TestTorchEngine(EngineContract):
    pass
