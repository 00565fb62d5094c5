"""Fixtures of the contract suites."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from colqwen3_retrievers import ColQwen3Encoder
from tests.checkpoints import FAMILY_NAMES, TinyCheckpoint, make_checkpoint


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """A tiny random checkpoint of each family in turn."""
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def encoder(checkpoint: TinyCheckpoint, open_encoder: Callable[..., ColQwen3Encoder]) -> ColQwen3Encoder:
    """An encoder of the engine under test over that checkpoint, in float32."""
    return open_encoder(checkpoint.folder, dtype="float32")
