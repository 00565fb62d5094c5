"""The demo's documents: an annual report, slides, an invoice and a scanned letter, drawn when asked for.

The companies and people in them are invented.
"""

from __future__ import annotations

import os
from pathlib import Path

from colqwen3_retrievers.demo.questions import DEMO_QUESTIONS
from colqwen3_retrievers.errors import require

__all__ = ["DEMO_QUESTIONS", "write_demo_documents"]


def write_demo_documents(folder: str | os.PathLike[str]) -> list[Path]:
    """Write the demo's PDFs.

    The same versions of reportlab, PDFium and Pillow write the same bytes. The scan, and any rendering of the others,
    shows the machine's own Helvetica and Times, which PDFium takes from the system where it finds them.

    Args:
        folder: where to; made if it is missing. Files of the same names are replaced.

    Returns:
        Paths of ``invoice.pdf`` (2 pages), ``report.pdf`` (7), ``scan.pdf`` (2, no text layer) and ``slides.pdf`` (6).

    Raises:
        MissingExtraError: reportlab (extra ``demo``) or pypdfium2 (extra ``pdf``) is not installed.

    >>> import tempfile
    >>> [path.name for path in write_demo_documents(tempfile.mkdtemp())]
    ['invoice.pdf', 'report.pdf', 'scan.pdf', 'slides.pdf']
    """
    require("demo", "reportlab")
    require("pdf", "pypdfium2")
    from colqwen3_retrievers.demo import invoice, report, scan, slides

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for module in (invoice, report, scan, slides):
        path = target / f"{module.__name__.rpartition('.')[2]}.pdf"
        module.write(path)
        written.append(path)
    return written
