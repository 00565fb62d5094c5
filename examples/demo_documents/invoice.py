"""The demo's invoice: line items and totals on one page, terms of payment on the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reportlab.pdfgen.canvas import Canvas

from examples.demo_documents.drawing import GREY, NAVY, bar, fill, gap, heading, line_of_text, paragraph, table

_WIDTH, _HEIGHT, _MARGIN = 595.28, 841.89, 60.0
_BOX = _WIDTH - 2 * _MARGIN

_ITEMS = (
    ("Oak conference table, 320 cm", 1, 2140_00),
    ("Swivel chair, burgundy leather", 12, 389_50),
    ("Acoustic panel, cork", 18, 74_25),
    ("Desk lamp with dimmer", 9, 58_90),
    ("Filing cabinet, fireproof", 2, 812_00),
    ("Assembly and removal of packaging", 1, 465_00),
)
_VAT_PERCENT = 20


def write(path: Path) -> None:
    """Write the invoice."""
    canvas = Canvas(str(path), pagesize=(_WIDTH, _HEIGHT), invariant=1)
    canvas.setTitle("Invoice HB-20871")
    _letterhead(canvas, 1)
    _first(canvas)
    canvas.showPage()
    _letterhead(canvas, 2)
    fill(canvas, _MARGIN, 70, _BOX, _HEIGHT - 210, _terms())
    canvas.showPage()
    canvas.save()


def _letterhead(canvas: Any, number: int) -> None:
    line_of_text(canvas, _MARGIN, _HEIGHT - 72, "Hollis & Birch", 24, font="Helvetica-Bold", colour=NAVY)
    line_of_text(canvas, _MARGIN, _HEIGHT - 90, "Office furniture since 1968", 10, colour=GREY)
    for row, text in enumerate(("47 Tannery Lane, Norwich", "accounts@hollisbirch.example")):
        line_of_text(canvas, _WIDTH - _MARGIN, _HEIGHT - 64 - 14 * row, text, 10, colour=GREY, right=True)
    bar(canvas, _MARGIN, _HEIGHT - 104, _BOX, 1.5, NAVY)
    line_of_text(canvas, _WIDTH - _MARGIN, 40, f"Page {number} of 2", 10, colour=GREY, right=True)


def _pounds(pence: int) -> str:
    return f"{pence // 100:,}.{pence % 100:02d}"


def _first(canvas: Any) -> None:
    top = _HEIGHT - 140
    for row, text in enumerate(
        ("Thornbury Veterinary Clinic", "Attn. Dr Priya Raghunathan", "9 Saddlers Row", "Ipswich IP1 4KD")
    ):
        line_of_text(canvas, _MARGIN, top - 16 * row, text, 12)
    facts = (
        ("Invoice number", "HB-20871"),
        ("Date", "27 January 2025"),
        ("Customer", "C-5519"),
        ("Due", "26 February 2025"),
    )
    for row, (name, value) in enumerate(facts):
        line_of_text(canvas, 350, top - 16 * row, name, 12, colour=GREY)
        line_of_text(canvas, _WIDTH - _MARGIN, top - 16 * row, value, 12, right=True)
    net = sum(count * price for _, count, price in _ITEMS)
    tax = net * _VAT_PERCENT // 100
    rows = [["Description", "Quantity", "Unit price £", "Amount £"]]
    rows += [[name, str(count), _pounds(price), _pounds(count * price)] for name, count, price in _ITEMS]
    sums = [["Summary", "£"], ["Subtotal", _pounds(net)], [f"Value added tax {_VAT_PERCENT}%", _pounds(tax)]]
    sums += [["Total payable", _pounds(net + tax)]]
    content = [
        heading("Invoice"),
        table(rows, [_BOX - 235, 65, 85, 85]),
        gap(20),
        table(sums, [_BOX - 110, 110], size=12, total=True),
        gap(24),
        paragraph("Delivered on 22 January 2025 by our own van. The walnut sideboard you asked for follows in March."),
    ]
    fill(canvas, _MARGIN, 70, _BOX, top - 70 - 90, content)


def _terms() -> list[Any]:
    bank = [
        ["Bank details", ""],
        ["Account name", "Hollis & Birch Ltd"],
        ["Sort code", "08-32-71"],
        ["Account number", "60184425"],
        ["Reference", "HB-20871"],
    ]
    texts = [
        "Payment is due within thirty days. A discount of 2.5% is granted if we receive the amount within ten days.",
        "Goods remain our property until they are paid for in full. Interest on overdue sums is charged at four per "
        "cent above base rate.",
        "Upholstery carries a guarantee of seven years, woodwork of fifteen. Scratches must be reported within 48 "
        "hours of delivery, with a photograph.",
        "Unused furniture can be returned within a fortnight for a restocking fee of £35 per item.",
    ]
    return [
        heading("Terms of payment"), *[paragraph(text, 12) for text in texts], gap(18),
        table(bank, [_BOX - 190, 190], size=12), gap(24),
        paragraph("Questions? Ask for Desmond Achterberg in accounts, extension 214.", 12),
    ]  # fmt: skip
