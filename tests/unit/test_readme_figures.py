"""The README's figures of speed are those of the committed tables, rounded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows(name: str) -> list[list[str]]:
    """Cells of a benchmark's table."""
    text = (ROOT / "benchmarks" / f"{name}.md").read_text(encoding="utf-8")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def shown(who: str, marker: str) -> list[str]:
    """Cells of the README's row of somebody, in the table after a marker."""
    after = README[README.index(marker) :]
    [line] = re.findall(rf"^\| {re.escape(who)} \|(.*)\|$", after[: after.index("\n\n", after.index("\n|") + 2)], re.M)
    return [cell.strip() for cell in line.split("|")]


@pytest.mark.parametrize("who", ["transformers", "colpali-engine", "sentence-transformers"])
def test_encoding(who: str) -> None:
    pages = [row for row in rows("encoding") if row[3].startswith(f"{who} ")]
    assert shown(pages[0][3], "Encoding pages") == [row[6].split()[0].strip("*") for row in pages]
    queries = [row for row in rows("queries") if row[2].startswith(f"{who} ")]
    for row, cell in zip(queries, shown(queries[0][2], "Encoding 64 queries"), strict=True):
        ratios = [float(found) for cell in row[3:6] for found in re.findall(r"\*\*(.*)x\*\*", cell)]
        parts = [part.removesuffix("x") for part in cell.split(" · ")]
        assert [f"{ratio:.2f}" if place == 0 else f"{ratio:.1f}" for place, ratio in enumerate(ratios)] == parts


@pytest.mark.parametrize(
    ("who", "kernel"),
    [
        ("ours over float16, as stores keep it", "ours, torch, over float16"),
        ("maxsim-cpu 0.1.0, a list", "maxsim-cpu, a list"),
        ("padded einsum (torch)", "padded einsum (torch)"),
        ("sentence-transformers 6.2.0, padded", "sentence-transformers maxsim, padded"),
        ("sentence-transformers 6.2.0, a list", "sentence-transformers maxsim, a list"),
        ("colpali-engine 0.3.18", "colpali-engine score_multi_vector"),
    ],
)
def test_maxsim(who: str, kernel: str) -> None:
    measured = [float(row[3].removesuffix("x")) for row in rows("maxsim") if row[1] == kernel]
    cells = shown(who, "MaxSim of one query")
    assert cells == [f"{ratio:.1f}x" for ratio in measured[: len(cells)]]


def told(*pattern: str) -> list[float]:
    """Numbers in a sentence of the README, by a pattern in pieces."""
    found = re.search(" ".join(pattern).replace(" ", r"\s+"), README)
    assert found is not None, pattern
    return [float(number) for number in found.groups()]


def test_reranking() -> None:
    [times] = told(r"encoding them for each query takes some (\d+) times as long")
    measured = next(float(row[1]) for row in rows("rerank") if row[0] == "encoding every page for every query")
    assert times == pytest.approx(measured, rel=0.1)


def test_growth() -> None:
    pattern = [
        r"A folder of 4,000 pages of 256 tokens, dim 128, takes (\d+) KB a page, (\d\.\d) times the bare float16;",
        r"a search takes some (\d+) ms, and finds all of the ten best of 60 queries whose best are near ties",
        r"\(at 1,000 pages (\.\d+) of them\)\. In Qdrant's engine, run in this process, it is (\d+) KB and (\d+) ms",
    ]
    measured = {(row[0], row[1]): row[2:] for row in rows("growth")}
    folder, qdrant = measured["embedded", "4,000"], measured["distributed", "4,000"]
    assert float(folder[7]) == 1
    fewer = float(measured["embedded", "1,000"][7])
    folder_told = [round(float(folder[0])), round(float(folder[1]), 1), round(float(folder[5])), fewer]
    assert told(*pattern) == [*folder_told, round(float(qdrant[0])), round(float(qdrant[5]))]


def test_quality_against_bytes() -> None:
    """Each cell of the README stands, with more digits or as many, in a row of the measurements."""
    measured = {
        (row[2], row[3], row[1]): f"{float(row[4]):.1f} KB · {float(row[7]):.3f} · {float(row[6]):.3f}"
        for row in rows("compression")
        if row[0] in ("none", "hierarchical")
    }
    assert len(measured) == 45
    for dim in ("128", "64", "32"):
        for code in ("float16", "int8", "1 bit"):
            cells = shown(f"{dim}, {code}", "What pooling, fewer dims and codes cost")
            assert cells == [measured[dim, code, factor] for factor in "12346"]
