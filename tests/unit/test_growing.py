"""The figures of docs/growing.md are those its script computes."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from colqwen3_retrievers.models.families import get_family
from colqwen3_retrievers.stores.qdrant.collection import MAX_FLOATS, QdrantOptions
from colqwen3_retrievers.stores.qdrant.store import FEWEST_CANDIDATES

SCRIPT = Path(__file__).parents[2] / "scripts" / "growing.py"


@pytest.fixture(scope="module")
def growing() -> Any:
    spec = importlib.util.spec_from_file_location("growing", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["growing"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_figures_of_the_script(growing: Any) -> None:
    page = growing.PAGE.read_text(encoding="utf-8")
    assert growing.tables() in page
    assert growing.page_with_tables(page) == page


def test_bytes_of_a_page(growing: Any) -> None:
    given = growing.Assumptions()
    assert growing.page_bytes(128, given) == (331_776, 110_592, 55_296)
    assert growing.page_bytes(320, given) == (829_440, 276_480, 138_240)


def test_figures_by_hand(growing: Any) -> None:
    given = growing.Assumptions(gpu_flops=1e15, gpu_share=0.5, gpus=10)
    made = growing.figures(1_000_000, 128, given)
    assert made.full == 331_776e6 and made.pooled_ram == 55_296e6
    assert made.disk == pytest.approx(1e6 * (331_776 + 110_592 + 12_000))
    operations = 2 * 4.0e9 * 1296 + 2 * 0.4e9 * 4 * 1296
    assert made.encode == pytest.approx(1e6 * operations / 0.5e15 / 10)
    assert made.scan_core_seconds == pytest.approx(1e6 * 42e-6 * 432 / 234)
    rescoring = 105 * (331_776 / 3e9 + 176e-6 * 1296 / 700 / 22.4)
    assert made.nodes == 1 and made.search == pytest.approx(made.scan_core_seconds / 22.4 + rescoring)


def test_figures_move_the_right_way(growing: Any) -> None:
    given = growing.Assumptions()
    one = growing.figures(10_000_000, 320, given)
    two = growing.figures(10_000_000, 320, dataclasses.replace(given, replicas=2))
    assert (two.disk, two.ram) == (2 * one.disk, 2 * one.ram) and two.nodes >= 2 * one.nodes - 1
    assert two.scan_core_seconds == one.scan_core_seconds
    for pages in growing.SIZES:
        for dim in growing.DIMS:
            made = growing.figures(pages, dim)
            assert made.nodes_for_a_second >= made.nodes and made.graph_search < made.search
            assert made.nodes * given.node_ram * given.filled >= made.ram
            assert made.nodes * given.node_disk * given.filled >= made.disk


def test_what_the_page_says_of_this_library_is_so(growing: Any) -> None:
    page, given = growing.PAGE.read_text(encoding="utf-8"), growing.Assumptions()
    limits = [(MAX_FLOATS - 1) // dim for dim in (128, 320, 2560)]
    assert "{:,} tokens at dim 128, {:,} at 320, {:,} at 2,560".format(*limits) in page
    assert given.candidates == max(FEWEST_CANDIDATES, QdrantOptions().candidates * (20 + 1))
    assert given.tokens == get_family("tomoro").max_pixels // 32**2 + 16
