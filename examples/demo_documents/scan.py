"""The demo's scan: a typed letter of two pages, turned a little, noisy, grey, and without a text layer."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from reportlab.lib.utils import ImageReader
from reportlab.pdfgen.canvas import Canvas

from colqwen3_retrievers.pages.loading import load_pages
from examples.demo_documents.drawing import fill, gap, line_of_text, paragraph

_WIDTH, _HEIGHT, _MARGIN = 595.28, 841.89, 78.0
_PIXELS = 1240 * 1754  # A4 at 150 dots an inch

SCAN_TEXT: tuple[tuple[str, ...], ...] = (
    (
        "St Brannoc's Harbour Trust", "The Old Customs House, Padstow", "11 October 1987",
        "To Captain Rufus Pengelly, Trevose Lodge",
        "Dear Captain Pengelly,",
        "Thank you for your letter concerning the mooring of the schooner Albatross. The trustees considered it on "
        "Tuesday, together with the surveyor's drawings.",
        "The survey shows that the eastern quay has sunk by nine inches since it was last measured. The oak piles are "
        "eaten by shipworm, and the iron bollards can no longer hold a vessel of more than sixty tons in a gale.",
        "We therefore regret that the Albatross cannot lie there this winter. The trustees offer instead the inner "
        "basin behind the lock, at the reduced rate of £14.50 a week, with fresh water included.",
        "A diver, Mr Gwilym Treloar, will inspect the remaining piles in November if the weather allows.",
    ),
    (
        "St Brannoc's Harbour Trust", "Page 2",
        "The repair of the quay is estimated at £212,000. The county council has promised a third of it, on condition "
        "that the lighthouse stairs are mended in the same year.",
        "You were kind enough to ask how members might help. A subscription list lies open at the Lobster Pot inn, and "
        "the vicar has agreed to hold a concert in the chapel on Boxing Day.",
        "The trustees would also be grateful for the loan of your tide tables from 1923 to 1951, which are more "
        "complete than our own. They would be copied in Truro and returned within a month.",
        "Please let me know by telephone (Padstow 4406) whether the inner basin is agreeable to you.",
        "Yours sincerely,", "Winifred Hosking", "Secretary to the trustees",
    ),
)  # fmt: skip
"""The lines printed on each page, in order."""


def write(path: Path) -> None:
    """Write the scan."""
    canvas = Canvas(str(path), pagesize=(_WIDTH, _HEIGHT), invariant=1)
    canvas.setTitle("Letter of 11 October 1987 (scan)")
    with tempfile.TemporaryDirectory() as folder:
        typed = Path(folder) / "letter.pdf"
        _type(typed)
        for jpeg in _scanned(typed):
            canvas.drawImage(ImageReader(io.BytesIO(jpeg)), 0, 0, _WIDTH, _HEIGHT)
            canvas.showPage()
    canvas.save()


def _type(path: Path) -> None:
    """Write the letter as an ordinary PDF."""
    canvas = Canvas(str(path), pagesize=(_WIDTH, _HEIGHT), invariant=1)
    width = _WIDTH - 2 * _MARGIN
    (name, address, date, *body), (again, folio, *rest) = SCAN_TEXT
    line_of_text(canvas, _MARGIN, _HEIGHT - 96, name, 20, font="Times-Bold", colour="#000000")
    line_of_text(canvas, _MARGIN, _HEIGHT - 116, address, 12, font="Times-Italic", colour="#000000")
    line_of_text(canvas, _WIDTH - _MARGIN, _HEIGHT - 160, date, 12, font="Times-Roman", colour="#000000", right=True)
    fill(canvas, _MARGIN, 70, width, _HEIGHT - 190 - 70, _lines(body))
    canvas.showPage()
    line_of_text(canvas, _MARGIN, _HEIGHT - 80, again, 12, font="Times-Italic", colour="#000000")
    line_of_text(canvas, _WIDTH - _MARGIN, _HEIGHT - 80, folio, 12, font="Times-Italic", colour="#000000", right=True)
    fill(canvas, _MARGIN, 70, width, _HEIGHT - 120 - 70, _lines(rest))
    canvas.showPage()
    canvas.save()


def _lines(texts: list[str]) -> list[Any]:
    content: list[Any] = []
    for text in texts:
        content.append(paragraph(text, 13, font="Times-Roman", colour="#000000"))
        if text.startswith(("To ", "Yours")):
            content.append(gap(26))
    return content


def _scanned(typed: Path) -> list[bytes]:
    """Return each page as the JPEG of a flatbed scanner: crooked, grey paper, uneven light, noise."""
    noise = np.random.default_rng(1987)
    files = []
    for page in load_pages(typed, max_pixels=_PIXELS):
        assert page.image is not None  # noqa: S101 - narrows the type: a PDF page always has an image
        grey = page.image.convert("L").rotate((0.8, -0.6)[page.number % 2], Image.Resampling.BICUBIC, fillcolor=255)
        grey = grey.filter(ImageFilter.GaussianBlur(0.5))
        ink = np.asarray(grey, dtype=np.float64)
        light = np.linspace(238, 226, ink.shape[1])[None, :] - np.linspace(0, 6, ink.shape[0])[:, None]
        paper = 44 + (light - 44) * (ink / 255) + noise.normal(0, 5, ink.shape)
        file = io.BytesIO()
        Image.fromarray(np.clip(np.rint(paper), 0, 255).astype(np.uint8)).save(file, "JPEG", quality=72)
        files.append(file.getvalue())
    return files
