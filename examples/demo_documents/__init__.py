"""Draws the demo's documents: an annual report, slides, an invoice and a scanned letter.

The companies and people in them are invented. The package carries the PDFs that this code drew.
"""

from __future__ import annotations

from pathlib import Path

from reportlab import rl_config

from examples.demo_documents import invoice, report, scan, slides

rl_config.useA85 = 0  # binary streams: pictures take a fifth less room


def draw_demo_documents(folder: Path) -> list[Path]:
    """Draw the demo's PDFs.

    The same versions of reportlab, PDFium and Pillow draw the same bytes. The scan shows the Times that PDFium finds on
    the machine.

    Args:
        folder: the folder to write to, which must exist; files of the same names are replaced.

    Returns:
        Paths of ``invoice.pdf`` (2 pages), ``report.pdf`` (7), ``scan.pdf`` (2, no text layer) and ``slides.pdf`` (6).
    """
    paths = []
    for module in (invoice, report, scan, slides):
        path = folder / f"{module.__name__.rpartition('.')[2]}.pdf"
        module.write(path)
        paths.append(path)
    return paths
