"""Quality against bytes a page for every pooling factor, dim and code: a short table and ``docs/quality.png``.

    python benchmarks/quality.py                  # from the rows of benchmarks/compression.md
    python benchmarks/quality.py --cache DIR      # measures them anew first, and writes benchmarks/compression.md

Prints the table that the README shows. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
MARKERS = {"float16": "o", "int8": "s", "1 bit": "^"}
COLOURS = {128: "#1b4f8a", 64: "#c4621b", 32: "#3a7d44"}


class Row(NamedTuple):
    """One setting of the table in ``compression.md``; ``kilobytes`` are of 1,024 bytes, a page."""

    factor: int
    dim: int
    code: str
    kilobytes: float
    success_1: float
    ndcg_5: float


def read_rows(path: Path) -> list[Row]:
    """Read the rows without pooling and of hierarchical pooling, the method the encoder uses by default."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in ("none", "hierarchical"):
            factor, dim, code, size = int(cells[1]), int(cells[2]), cells[3], float(cells[4])
            rows.append(Row(factor, dim, code, size, float(cells[6]), float(cells[7])))
    if not rows:
        raise SystemExit(f"{path}: no rows")
    return rows


def table(rows: list[Row]) -> str:
    """Lay out: a line for each dim and code, a column for each factor."""
    factors = sorted({row.factor for row in rows})
    lines = [
        f"| dim, code | {' | '.join('not pooled' if factor == 1 else f'factor {factor}' for factor in factors)} |",
        "|---|" + "---|" * len(factors),
    ]
    found = {(row.dim, row.code, row.factor): row for row in rows}
    for dim, code in dict.fromkeys((row.dim, row.code) for row in rows):
        cells = [
            f"{row.kilobytes:.1f} KB · {row.ndcg_5:.3f} · {row.success_1:.3f}"
            for factor in factors
            if (row := found[dim, code, factor])
        ]
        lines.append(f"| {dim}, {code} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Draw nDCG@5 and success@1 against bytes a page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharex=True, sharey=True, layout="constrained")
    for axis, name, title in zip(axes, ("ndcg_5", "success_1"), ("nDCG@5", "success@1"), strict=True):
        for dim, colour in COLOURS.items():
            for code, marker in MARKERS.items():
                line = sorted((r for r in rows if (r.dim, r.code) == (dim, code)), key=lambda r: r.kilobytes)
                axis.plot(
                    [row.kilobytes for row in line], [getattr(row, name) for row in line], color=colour, marker=marker,
                    markersize=5, linewidth=1.2, label=f"dim {dim}, {code}",
                )  # fmt: skip
        axis.set(xscale="log", title=title, xlabel="KB a page (log)")
        axis.set_xticks([0.5, 1, 2, 5, 10, 20, 50, 100, 200], ["0.5", "1", "2", "5", "10", "20", "50", "100", "200"])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[1].legend(fontsize=8, frameon=False, loc="lower right")
    figure.suptitle("tiny, 300 held-out pages; along a line the pooling factor is 6, 4, 3, 2, 1", fontsize=10)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    """Print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, help="folder of encoded held-out pages: measures anew")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "quality.png")
    options = parser.parse_args()
    if options.cache:
        command = [sys.executable, str(HERE / "compression.py"), "--cache", str(options.cache), "--write"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = read_rows(HERE / "compression.md")
    draw(rows, options.out)
    print("KB a page · nDCG@5 · success@1\n")
    print(table(rows))


if __name__ == "__main__":
    main()
