"""Benchmarks that need no peers run at a small size: what they print there means nothing, that they print does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SAYS = {
    "gpu": [
        "share of the floor",
        "first seen",
        "image preparation",
        "copy to the host",
        "queries a second",
        "share of the bandwidth",
    ],
    "maxsim": ["of memory bandwidth", "of arithmetic peak", "padded einsum"],
    "encoding": ["| small | float32 |", "**ours**"],
    "encoding_time": ["| checkpoint | precision | attention |"],
    "queries": ["from 64 threads", "**ours**"],
    "growth": ["recall@10", "| embedded |"],
}


@pytest.mark.parametrize("name", SAYS)
def test_a_benchmark_runs_at_a_small_size(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), "--quick"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for expected in SAYS[name]:
        assert expected in done.stdout, done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("|") and any(c.isdigit() for c in line)]
    assert rows, done.stdout


@pytest.fixture
def modules(monkeypatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.syspath_prepend(FOLDER.parent / "scripts")


@pytest.mark.usefixtures("modules")
def test_the_parts_of_a_forward_pass_are_told_apart(tmp_path: Path) -> None:
    from forward_time import PARTS, TEXT, VISION, Clock, split
    from gpu import mixed
    from random_checkpoint import write_checkpoint

    from colqwen3_retrievers.engines.torch import attention, model
    from colqwen3_retrievers.engines.torch.engine import TorchEngine
    from colqwen3_retrievers.models.checkpoint import open_checkpoint

    write_checkpoint(tmp_path, "small")
    checkpoint = open_checkpoint(tmp_path)
    engine = TorchEngine(checkpoint, device="cpu", dtype="float32")
    inputs = mixed(checkpoint, 80, 3)
    assert len({item.grid for item in inputs}) == 3
    start = time.perf_counter()
    spent = split(engine, inputs, "cpu", 1)
    total = time.perf_counter() - start
    assert list(spent) == list(PARTS)
    assert all(seconds > 0 for seconds in spent.values()), spent
    assert sum(spent.values()) < total
    assert model.to_device is attention.to_device  # put back
    assert "forward" not in vars(engine._model)

    clock = Clock("cpu")
    inner = clock.around(VISION, lambda: time.sleep(0.05))
    clock.around(TEXT, lambda: (time.sleep(0.02), inner()))()
    told = clock.seconds()
    assert told[VISION] >= 0.05
    assert 0.02 <= told[TEXT] < 0.05


@pytest.mark.usefixtures("modules")
def test_a_batch_that_was_halved_says_so() -> None:
    from gpu import Pages, config_of

    from colqwen3_retrievers.models.rendering import EncoderInput, VisualSpan

    class Engine:
        n_halvings = 0
        batch_tokens = 0

        def embed(self, inputs: list[EncoderInput]) -> None:
            self.n_halvings += len(inputs) > 1

    pages = Pages(config_of("small"), Engine(), "cpu", 1e9, quick=True)
    page = EncoderInput(False, "", np.zeros(9, dtype=np.int64), slice(0, 9), (VisualSpan(0, 3, 3),))
    assert pages(9, [page])[1]
    assert not pages(9, [page, page])[1]
    assert [row[:2] for row in pages.rows] == [[9, "1"], [9, "2, halved: out of memory"]]


@pytest.mark.usefixtures("modules")
def test_the_check_of_a_gpu_compares_scans_with_numpy(monkeypatch) -> None:
    import check_cuda

    rows = list(check_cuda.scans("cpu"))
    assert len(rows) == 5
    assert all(row.holds for row in rows), rows
    right = check_cuda.DeviceScan._sums
    monkeypatch.setattr(check_cuda.DeviceScan, "_sums", lambda *given: right(*given) * 1.001)
    assert [row.holds for row in check_cuda.scans("cpu")] == [True] + 4 * [False]
