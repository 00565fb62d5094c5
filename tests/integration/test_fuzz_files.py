"""A sample of damaged files of every format; `python -m tests.fuzz_files` reads more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each file is read in a forked process")
def test_damaged_files_give_pages_or_page_errors() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz_files", "60", "--seed", "1", "--workers", "2"],
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "60 of them damaged" in done.stdout
    assert " 0 foreign errors, 0 hangs, 0 dead processes, 0 above" in done.stdout


READERS = """
import os, sys, time
from tests import fuzz_files

def read(path, number):
    kind = path.name.split("-")[-1]
    if kind == "hangs":
        time.sleep(60)
    if kind == "dies":
        os.abort()
    if kind == "swells":
        b"x" * 2**28
    return 1, 0, "KeyError" if kind == "errs" else ""

fuzz_files._read, fuzz_files.MOST_RSS = read, 2**27
fuzz_files.whole_files = lambda: dict.fromkeys(["hangs", "dies", "swells", "errs", "fine"], b"x")
sys.exit(fuzz_files.main(["0", "--seconds", "3"]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each file is read in a forked process")
def test_what_is_worse_than_a_page_error_is_noticed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", READERS], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 foreign errors, 1 hangs, 1 dead processes, 1 above" in done.stdout
