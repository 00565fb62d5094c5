"""Shared drawing functions: paragraphs and tables in a box, and the colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reportlab.lib.colors import HexColor, white
from reportlab.lib.styles import ParagraphStyle
from reportlab.platypus import Frame, Paragraph, Spacer, Table, TableStyle

INK, NAVY, TEAL, GREY, PALE = "#1c2430", "#17365d", "#2a8c82", "#6b7785", "#eef2f6"


def paragraph(text: str, size: float = 12, *, font: str = "Helvetica", colour: str = INK, bullet: bool = False) -> Any:
    """Return a flowing paragraph, spaced for reading."""
    style = ParagraphStyle(
        "body", fontName=font, fontSize=size, leading=size * 1.45, spaceAfter=size * 0.75, textColor=HexColor(colour),
        leftIndent=size * 1.5 if bullet else 0, bulletIndent=size * 0.3, bulletFontSize=size,
    )  # fmt: skip
    return Paragraph(text, style, bulletText="•" if bullet else None)


def heading(text: str, size: float = 22) -> Any:
    """Return a heading with space below it."""
    return paragraph(text, size, font="Helvetica-Bold", colour=NAVY)


def table(
    rows: Sequence[Sequence[str]],
    widths: Sequence[float],
    *,
    size: float = 11,
    total: bool = False,
    figures: bool = True,
) -> Any:
    """Return a ruled table: header first, figures aligned right, and a total in bold last."""
    last = len(rows) - 1
    commands: list[tuple[Any, ...]] = [
        ("FONT", (0, 0), (-1, -1), "Helvetica", size),
        ("FONT", (0, 0), (-1, 0), "Helvetica-Bold", size),
        ("TEXTCOLOR", (0, 0), (-1, 0), white),
        ("BACKGROUND", (0, 0), (-1, 0), HexColor(NAVY)),
        ("ROWBACKGROUNDS", (0, 1), (-1, -1), [white, HexColor(PALE)]),
        ("TEXTCOLOR", (0, 1), (-1, -1), HexColor(INK)),
        ("ALIGN", (1, 0), (-1, -1), "RIGHT" if figures else "LEFT"),
        ("VALIGN", (0, 0), (-1, -1), "MIDDLE"),
        ("TOPPADDING", (0, 0), (-1, -1), 7),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 7),
        ("LINEBELOW", (0, -1), (-1, -1), 0.8, HexColor(NAVY)),
    ]
    if total:
        commands += [
            ("FONT", (0, last), (-1, last), "Helvetica-Bold", size),
            ("LINEABOVE", (0, last), (-1, last), 0.8, HexColor(NAVY)),
        ]
    return Table([list(row) for row in rows], colWidths=list(widths), style=TableStyle(commands), hAlign="LEFT")


def gap(points: float) -> Any:
    """Return vertical white space."""
    return Spacer(1, points)


def fill(canvas: Any, left: float, bottom: float, width: float, height: float, content: Sequence[Any]) -> None:
    """Draw flowing content from the top of a box, which must hold all of it."""
    rest = list(content)
    box = Frame(left, bottom, width, height, leftPadding=0, rightPadding=0, topPadding=0, bottomPadding=0)
    box.addFromList(rest, canvas)
    if rest:
        raise AssertionError(f"{len(rest)} parts of a demo page do not fit")


def bar(canvas: Any, left: float, bottom: float, width: float, height: float, colour: str) -> None:
    """Draw a filled rectangle."""
    canvas.setFillColor(HexColor(colour))
    canvas.rect(left, bottom, width, height, stroke=0, fill=1)


def line_of_text(
    canvas: Any, x: float, y: float, text: str, size: float, *, font: str = "Helvetica", colour: str = INK,
    right: bool = False,
) -> None:  # fmt: skip
    """Draw one line of text with its baseline at ``y``, beginning or ending at ``x``."""
    canvas.setFillColor(HexColor(colour))
    canvas.setFont(font, size)
    (canvas.drawRightString if right else canvas.drawString)(x, y, text)
