"""The demo's slides: landscape 16:9, with a bar chart and a line chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reportlab.graphics import renderPDF
from reportlab.graphics.charts.barcharts import VerticalBarChart
from reportlab.graphics.charts.linecharts import HorizontalLineChart
from reportlab.graphics.shapes import Drawing
from reportlab.lib.colors import HexColor
from reportlab.pdfgen.canvas import Canvas

from examples.demo_documents.drawing import GREY, INK, NAVY, TEAL, bar, fill, gap, line_of_text, paragraph, table

_WIDTH, _HEIGHT, _MARGIN = 720.0, 405.0, 48.0
_BOX = _WIDTH - 2 * _MARGIN


def write(path: Path) -> None:
    """Write the slides."""
    canvas = Canvas(str(path), pagesize=(_WIDTH, _HEIGHT), invariant=1)
    canvas.setTitle("Electric delivery vans: pilot review")
    _title(canvas)
    for number, draw in enumerate((_summary, _parcels, _energy, _drivers, _decision), start=2):
        bar(canvas, 0, _HEIGHT - 8, _WIDTH, 8, TEAL)
        line_of_text(canvas, _MARGIN, 20, "Larkfield Parcels · Pilot review", 10, colour=GREY)
        line_of_text(canvas, _WIDTH - _MARGIN, 20, str(number), 10, colour=GREY, right=True)
        draw(canvas)
        canvas.showPage()
    canvas.save()


def _heading(canvas: Any, text: str) -> None:
    line_of_text(canvas, _MARGIN, _HEIGHT - 58, text, 26, font="Helvetica-Bold", colour=NAVY)


def _bullets(canvas: Any, texts: list[str], left: float, width: float, top: float = 90) -> None:
    fill(canvas, left, 44, width, _HEIGHT - top - 44, [paragraph(text, 14, bullet=True) for text in texts])


def _title(canvas: Any) -> None:
    bar(canvas, 0, 0, _WIDTH, _HEIGHT, NAVY)
    bar(canvas, _MARGIN, 178, 90, 5, TEAL)
    line_of_text(canvas, _MARGIN, 232, "Electric delivery vans", 30, font="Helvetica-Bold", colour="#ffffff")
    line_of_text(canvas, _MARGIN, 198, "Review of the Nottingham pilot", 20, colour="#d7e3ef")
    line_of_text(canvas, _MARGIN, 140, "Larkfield Parcels, fleet committee", 14, colour="#d7e3ef")
    line_of_text(canvas, _MARGIN, 118, "Prepared by Ingrid Castellanos, 3 February 2025", 14, colour="#d7e3ef")
    canvas.showPage()


def _summary(canvas: Any) -> None:
    _heading(canvas, "What we learnt")
    _bullets(
        canvas,
        [
            "Forty-two vans ran for nine months from the depot at Colwick.",
            "A parcel cost 61 pence to deliver, against 74 pence with diesel.",
            "Range was never the bottleneck: the longest route was 118 kilometres.",
            "Charging at night needed a new transformer, which arrived late.",
            "Customers noticed the silence and praised it in 312 letters.",
        ],
        _MARGIN,
        _BOX,
    )


def _parcels(canvas: Any) -> None:
    _heading(canvas, "Parcels delivered by month")
    drawing = Drawing(400, 260)
    chart = VerticalBarChart()
    chart.x, chart.y, chart.width, chart.height = 48, 30, 340, 215
    chart.data = [(18.2, 19.6, 21.1, 20.4, 23.8, 31.5)]
    chart.categoryAxis.categoryNames = ["July", "August", "Sept.", "October", "Nov.", "Dec."]
    chart.valueAxis.valueMin, chart.valueAxis.valueMax, chart.valueAxis.valueStep = 0, 35, 5
    chart.bars[0].fillColor = HexColor(TEAL)
    chart.bars[0].strokeColor = None
    chart.barLabelFormat = "%.1f"
    chart.barLabels.nudge = 9
    _axes(chart, chart.barLabels)
    drawing.add(chart)
    renderPDF.draw(drawing, canvas, _MARGIN - 14, 58)
    line_of_text(canvas, _MARGIN, 46, "Thousands of parcels", 11, colour=GREY)
    _bullets(
        canvas,
        [
            "December was the peak: 31.5 thousand.",
            "Gloves and toys made up a quarter of the rush.",
            "Only 86 parcels were lost.",
        ],
        450,
        _WIDTH - 450 - _MARGIN,
        110,
    )


def _energy(canvas: Any) -> None:
    _heading(canvas, "Energy per kilometre")
    drawing = Drawing(420, 260)
    chart = HorizontalLineChart()
    chart.x, chart.y, chart.width, chart.height = 48, 30, 350, 215
    chart.data = [(214, 209, 216, 231, 252, 268), (198, 196, 199, 207, 219, 226)]
    chart.categoryAxis.categoryNames = ["July", "August", "Sept.", "October", "Nov.", "Dec."]
    chart.valueAxis.valueMin, chart.valueAxis.valueMax, chart.valueAxis.valueStep = 160, 280, 20
    for i, colour in enumerate((NAVY, TEAL)):
        chart.lines[i].strokeColor = HexColor(colour)
        chart.lines[i].strokeWidth = 2.5
    _axes(chart)
    drawing.add(chart)
    renderPDF.draw(drawing, canvas, _MARGIN - 14, 58)
    line_of_text(canvas, _MARGIN, 46, "Watt-hours per kilometre", 11, colour=GREY)
    line_of_text(canvas, 450, 268, "Without heat pump", 14, font="Helvetica-Bold", colour=NAVY)
    line_of_text(canvas, 450, 246, "With heat pump", 14, font="Helvetica-Bold", colour=TEAL)
    fill(
        canvas,
        450,
        60,
        _WIDTH - 450 - _MARGIN,
        165,
        [
            paragraph(
                "Frost adds a quarter to consumption. A heat pump halves the penalty and pays for itself in 26 months.",
                14,
            )
        ],
    )


def _axes(chart: Any, *labels: Any) -> None:
    for part in (chart.categoryAxis.labels, chart.valueAxis.labels, *labels):
        part.fontName, part.fontSize, part.fillColor = "Helvetica", 11, HexColor(INK)
    for axis in (chart.categoryAxis, chart.valueAxis):
        axis.strokeColor = HexColor(GREY)
    chart.valueAxis.visibleGrid = 1
    chart.valueAxis.gridStrokeColor = HexColor("#d5dbe2")


def _drivers(canvas: Any) -> None:
    _heading(canvas, "What drivers say")
    _bullets(
        canvas,
        [
            "37 of 40 drivers would not go back.",
            "Heated seats matter more than a heated cabin.",
            "The loading sill is too high for pallets.",
            "Regenerative braking takes two days to get used to.",
        ],
        _MARGIN,
        300,
    )
    rows = [
        ["Complaint", "Cases"],
        ["Charging cable frozen", "58"],
        ["Windscreen fogged", "33"],
        ["Sliding door jammed", "21"],
        ["Satellite navigation lost", "9"],
    ]
    fill(
        canvas,
        390,
        60,
        _WIDTH - 390 - _MARGIN,
        _HEIGHT - 150,
        [table(rows, [_WIDTH - 390 - _MARGIN - 70, 70], size=12)],
    )


def _decision(canvas: Any) -> None:
    _heading(canvas, "Decision wanted")
    rows = [
        ["Option", "Vans", "Investment", "Payback"],
        ["Stop the pilot", "0", "£0", "-"],
        ["Derby and Leicester", "110", "£4.35 million", "5.1 years"],
        ["Whole of the Midlands", "265", "£9.8 million", "6.7 years"],
    ]
    content = [
        table(rows, [_BOX - 330, 80, 140, 110], size=13),
        gap(22),
        paragraph("We recommend Derby and Leicester, to be ordered before the subsidy expires on 30 June.", 14),
        paragraph("Spare batteries should be leased from Volthaven, not bought.", 14),
    ]
    fill(canvas, _MARGIN, 44, _BOX, _HEIGHT - 90 - 44, content)
