"""The demo's annual report: portrait A4, a cover and contents numbered in roman figures, then five numbered pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reportlab.pdfgen.canvas import Canvas

from examples.demo_documents.drawing import GREY, NAVY, TEAL, bar, fill, gap, heading, line_of_text, paragraph, table

_WIDTH, _HEIGHT, _MARGIN = 595.28, 841.89, 64.0
_BOX = _WIDTH - 2 * _MARGIN


def write(path: Path) -> None:
    """Write the report."""
    canvas = Canvas(str(path), pagesize=(_WIDTH, _HEIGHT), invariant=1)
    canvas.setTitle("Halden Marsh Instruments: Annual Report 2024")
    canvas.setAuthor("Halden Marsh Instruments plc")
    canvas.addPageLabel(0, style="ROMAN_LOWER", start=1)
    canvas.addPageLabel(2, style="ARABIC", start=1)
    _cover(canvas)
    for label, content in zip(("ii", "1", "2", "3", "4", "5"), _pages(), strict=True):
        bar(canvas, _MARGIN, _HEIGHT - 50, _BOX, 1.2, TEAL)
        line_of_text(canvas, _MARGIN, _HEIGHT - 43, "Halden Marsh Instruments", 9, colour=GREY)
        line_of_text(canvas, _WIDTH - _MARGIN, _HEIGHT - 43, "Annual Report 2024", 9, colour=GREY, right=True)
        line_of_text(canvas, _WIDTH - _MARGIN, 36, label, 10, colour=GREY, right=True)
        fill(canvas, _MARGIN, 60, _BOX, _HEIGHT - 60 - 84, content)
        canvas.showPage()
    canvas.save()


def _cover(canvas: Any) -> None:
    bar(canvas, 0, _HEIGHT - 330, _WIDTH, 330, NAVY)
    bar(canvas, 0, _HEIGHT - 338, _WIDTH, 8, TEAL)
    line_of_text(canvas, _MARGIN, _HEIGHT - 170, "Annual Report 2024", 30, font="Helvetica-Bold", colour="#ffffff")
    line_of_text(canvas, _MARGIN, _HEIGHT - 206, "Halden Marsh Instruments plc", 18, colour="#d7e3ef")
    lines = [
        "Precision scales, hygrometers and laboratory ovens",
        "Founded in Whitby in 1931",
        "Registered number 00417726",
    ]
    for row, text in enumerate(lines):
        line_of_text(canvas, _MARGIN, _HEIGHT - 390 - 24 * row, text, 14)
    line_of_text(canvas, _MARGIN, 70, "Approved by the board on 14 March 2025", 11, colour=GREY)
    canvas.showPage()


def _pages() -> list[list[Any]]:
    return [_contents(), _letter(), _quarters(), _regions(), _risks(), _outlook()]


def _contents() -> list[Any]:
    rows = [
        ["Section", "Page"], ["Letter from the chair", "1"], ["Results by quarter", "2"],
        ["Regions and employees", "3"], ["Principal risks", "4"], ["Outlook and calendar", "5"],
    ]  # fmt: skip
    return [
        heading("Contents"),
        table(rows, [_BOX - 80, 80], size=12),
        gap(28),
        heading("The year at a glance", 16),
        paragraph("Orders reached a record of 9,412 instruments.", 12, bullet=True),
        paragraph("The new hygrometer won the Brandt Prize for measurement.", 12, bullet=True),
        paragraph("Scrap in the foundry fell by a third.", 12, bullet=True),
        paragraph("Every apprentice who finished was offered a permanent post.", 12, bullet=True),
    ]


def _letter() -> list[Any]:
    texts = [
        "Dear shareholder,",
        "Last year I wrote that patience would be rewarded. It has been. After two difficult winters our customers "
        "returned, and the order book is fuller than at any time since the company was listed.",
        "The largest single contract came from the Norwegian dairy cooperative, which chose our ovens for forty "
        "creameries. It was won against three rivals, none of them cheaper by much, because our engineers had spent a "
        "week on site and understood how butterfat behaves in a humid room.",
        "Not everything went well. The move of the calibration workshop to Teesside took eleven weeks instead of four, "
        "and I apologise to the customers who waited. The causes are understood and the workshop now runs two shifts.",
        "We have also said farewell. Marguerite Oduya, our finance director for nineteen years, retired in September. "
        "Her successor is Tobias Lindqvist, who joins us from the shipping industry. The board thanks Marguerite for "
        "her calm judgement and her excellent memory.",
        "The board proposes a dividend of 17.4 pence a share, which is covered twice by earnings. We ask for your "
        "support at the general meeting, and we look forward to seeing many of you there.",
    ]
    return [
        heading("Letter from the chair"),
        *[paragraph(text, 13, font="Times-Roman") for text in texts],
        gap(14),
        paragraph("Eleanor Whitcombe", 13, font="Times-Italic"),
        paragraph("Chair of the board", 11, font="Times-Roman"),
    ]


def _quarters() -> list[Any]:
    rows = [
        ["£ thousand", "Q1", "Q2", "Q3", "Q4", "Year"],
        ["Revenue", "12,480", "13,115", "11,902", "15,637", "53,134"],
        ["Cost of sales", "(7,214)", "(7,530)", "(6,988)", "(8,841)", "(30,573)"],
        ["Gross profit", "5,266", "5,585", "4,914", "6,796", "22,561"],
        ["Research", "(1,120)", "(1,164)", "(1,207)", "(1,251)", "(4,742)"],
        ["Administration", "(2,043)", "(2,018)", "(2,076)", "(2,195)", "(8,332)"],
        ["Operating profit", "2,103", "2,403", "1,631", "3,350", "9,487"],
    ]
    cash = [
        ["£ thousand", "2024", "2023"],
        ["Cash from operations", "11,068", "8,290"],
        ["Capital expenditure", "(3,415)", "(5,127)"],
        ["Net cash at year end", "6,873", "2,046"],
    ]
    return [
        heading("Results by quarter"),
        paragraph(
            "Revenue grew by 8.3% over the previous year. The third quarter suffered from the closure of the furnace "
            "for relining; the fourth was the strongest in our history."
        ),
        gap(6),
        table(rows, [_BOX - 5 * 70, *[70] * 5], total=True),
        gap(26),
        heading("Cash flow", 16),
        table(cash, [_BOX - 2 * 90, 90, 90], total=True),
        gap(16),
        paragraph(
            "The revolving credit of £8.5 million was repaid in full in November and remains available until 2028."
        ),
    ]


def _regions() -> list[Any]:
    revenue = [
        ["Revenue by region, £ thousand", "2024", "2023", "Change"],
        ["United Kingdom and Ireland", "21,306", "20,954", "+1.7%"],
        ["Scandinavia", "14,278", "10,620", "+34.4%"],
        ["Rest of Europe", "10,944", "11,385", "-3.9%"],
        ["North America", "6,606", "6,102", "+8.3%"],
        ["Total", "53,134", "49,061", "+8.3%"],
    ]
    people = [
        ["Employees at year end", "2024", "2023"],
        ["Whitby works", "268", "259"],
        ["Teesside workshop", "74", "41"],
        ["Uppsala sales office", "19", "12"],
        ["All sites", "361", "312"],
    ]
    return [
        heading("Regions and employees"),
        table(revenue, [_BOX - 3 * 75, 75, 75, 75], total=True),
        gap(20),
        paragraph(
            "Scandinavia was the fastest growing region thanks to dairies and paper mills. In the rest of Europe, "
            "Italian pharmacies postponed purchases until the new labelling rules are published."
        ),
        gap(8),
        table(people, [_BOX - 2 * 75, 75, 75], total=True),
        gap(20),
        paragraph(
            "Twenty-three apprentices are in training, more than ever before. The rate of reportable accidents fell to "
            "0.42 per hundred thousand hours worked."
        ),
    ]


def _risks() -> list[Any]:
    risks = [
        ("Supply of nickel alloy", "One foundry in Sheffield delivers two thirds of our heating elements. A second "
         "supplier in Slovenia has been qualified and will deliver from June."),
        ("Currency", "A tenth of the krona against sterling moves operating profit by £380,000. Half of the exposure "
         "is hedged for twelve months."),
        ("Cyber attack", "In May a phishing message reached the payroll department. No data were lost. Hardware keys "
         "have since replaced passwords for every employee."),
        ("Flooding", "The Whitby works stand two metres above the harbour. A flood barrier costing £1.2 million will "
         "be finished before next winter; until then insurance carries an excess of £250,000."),
        ("Regulation", "The European directive on refrigerants may forbid the coolant used in our climate chambers "
         "after 2027. A replacement based on propane is being tested."),
    ]  # fmt: skip
    content: list[Any] = [heading("Principal risks")]
    for title, text in risks:
        content += [paragraph(title, 14, font="Helvetica-Bold", colour=TEAL), paragraph(text), gap(12)]
    return content


def _outlook() -> list[Any]:
    calendar = [
        ["Date", "Event"], ["8 May 2025", "Annual general meeting, Scarborough"],
        ["22 May 2025", "Dividend paid"], ["7 August 2025", "Half-year results"],
        ["19 November 2025", "Open day at the Whitby works"],
    ]  # fmt: skip
    return [
        heading("Outlook and calendar"),
        paragraph(
            "We expect revenue between £56 and £58 million in 2025. Prices rise by four per cent in April. Investment "
            "will be concentrated on the automatic balance code-named Kestrel, which enters production in October."
        ),
        paragraph(
            "Demand from breweries is hard to foresee: several are merging, and a merger usually delays the renewal of "
            "laboratories by a year. We therefore plan cautiously and will publish a revised forecast with the "
            "half-year figures."
        ),
        gap(10),
        heading("Financial calendar", 16),
        table(calendar, [150, _BOX - 150], figures=False),
        gap(26),
        heading("Advisers", 16),
        paragraph("Auditor: Pemberton Quayle LLP, Leeds"),
        paragraph("Registrar: Ashgrove Share Services, Bristol"),
        paragraph("Investor relations: telephone 01632 960 417"),
    ]
