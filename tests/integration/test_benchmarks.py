"""Benchmarks that need no peers run at a small size: what they print there means nothing, that they print does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SAYS = {
    "gpu": ["share of the floor", "image preparation", "queries a second", "share of the bandwidth"],
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
