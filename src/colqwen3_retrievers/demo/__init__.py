"""The demo: PDFs that come with the package, questions about them, and a report of the answers.

The companies and people in the documents are invented; ``examples/demo_documents`` in the repository draws them.
"""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

__all__ = ["DEMO_QUESTIONS", "write_demo_documents"]

DEMO_QUESTIONS: tuple[tuple[str, str, int], ...] = (
    ("Registered number 00417726", "report.pdf", 1),
    ("Brandt Prize", "report.pdf", 2),
    ("Norwegian dairy cooperative", "report.pdf", 3),
    ("Marguerite Oduya", "report.pdf", 3),
    ("17.4 pence", "report.pdf", 3),
    ("Gross profit", "report.pdf", 4),
    ("revolving credit", "report.pdf", 4),
    ("Uppsala sales office", "report.pdf", 5),
    ("Italian pharmacies", "report.pdf", 5),
    ("phishing message", "report.pdf", 6),
    ("nickel alloy", "report.pdf", 6),
    ("Scarborough", "report.pdf", 7),
    ("Kestrel", "report.pdf", 7),
    ("Ingrid Castellanos", "slides.pdf", 1),
    ("118 kilometres", "slides.pdf", 2),
    ("transformer", "slides.pdf", 2),
    ("Gloves and toys", "slides.pdf", 3),
    ("Watt-hours per kilometre", "slides.pdf", 4),
    ("Windscreen fogged", "slides.pdf", 5),
    ("Regenerative braking", "slides.pdf", 5),
    ("£4.35 million", "slides.pdf", 6),
    ("Volthaven", "slides.pdf", 6),
    ("burgundy leather", "invoice.pdf", 1),
    ("Dr Priya Raghunathan", "invoice.pdf", 1),
    ("Total payable", "invoice.pdf", 1),
    ("restocking fee", "invoice.pdf", 2),
    ("Desmond Achterberg", "invoice.pdf", 2),
    ("schooner Albatross", "scan.pdf", 1),
    ("shipworm", "scan.pdf", 1),
    ("11 October 1987", "scan.pdf", 1),
    ("lighthouse stairs", "scan.pdf", 2),
    ("£212,000", "scan.pdf", 2),
    ("Winifred Hosking", "scan.pdf", 2),
)
"""(question, source, page number): that page, and no other, has the question's words in this order."""


def write_demo_documents(folder: str | os.PathLike[str]) -> list[Path]:
    """Copy the demo's PDFs into a folder.

    Args:
        folder: the destination; made if it is missing. Files of the same names are replaced.

    Returns:
        Paths of ``invoice.pdf`` (2 pages), ``report.pdf`` (7), ``scan.pdf`` (2, no text layer) and ``slides.pdf`` (6).

    Raises:
        OSError: the folder or a file cannot be written.

    >>> import tempfile
    >>> [path.name for path in write_demo_documents(tempfile.mkdtemp())]
    ['invoice.pdf', 'report.pdf', 'scan.pdf', 'slides.pdf']
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    documents = importlib.resources.files(__name__) / "documents"
    for document in sorted(documents.iterdir(), key=lambda document: document.name):
        path = target / document.name
        path.write_bytes(document.read_bytes())
        paths.append(path)
    return paths
