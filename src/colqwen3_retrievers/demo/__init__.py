"""The demo: PDFs that come with the package, questions about them, and a report of the answers.

The companies and people in the documents are invented; ``examples/demo_documents`` in the repository draws them.
"""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

from colqwen3_retrievers.demo.questions import DEMO_QUESTIONS

__all__ = ["DEMO_QUESTIONS", "write_demo_documents"]


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
