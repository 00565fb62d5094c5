"""The demo's report: one HTML file with every picture inside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from colqwen3_retrievers.pages.page import Hit
from colqwen3_retrievers.retrieval.similarity_maps import POOLED_NOTE, Box
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo

_WIDTHS = (620, 300, 300)  # of the pages shown, the best one largest
_MAX_HEIGHT = 8_000
_VERDICTS = {True: ("right", "✓", "found first"), False: ("wrong", "✗", "not first"), None: ("dim", "·", "")}

_STYLE = """
:root { color-scheme: light; --ink: #1d2330; --dim: #667085; --line: #e3e6ec; --frame: #c81e1e;
  --good: #15803d; --bad: #b42318; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 2rem 1.25rem 4rem; color: var(--ink); background: #fafbfc;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 0; }
p { margin: .4rem 0; } .dim { color: var(--dim); font-size: .9rem; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.1rem;
  margin: 1.2rem 0; }
.head { display: flex; justify-content: space-between; gap: 1rem; align-items: baseline; margin-bottom: .8rem; }
.right { color: var(--good); } .wrong { color: var(--bad); }
.pages { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; flex: 1 1 220px; max-width: 620px; } figure:first-child { flex: 2.2 1 380px; }
.page { position: relative; border: 1px solid var(--line); border-radius: 4px; overflow: hidden; }
.region { position: absolute; border: 2px solid var(--frame); }
img { width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; margin-top: .35rem; } nav { columns: 3 260px; font-size: .92rem; }
nav a { display: block; color: inherit; text-decoration: none; padding: .08rem 0; }
nav a:hover { text-decoration: underline; }
"""


@dataclass(frozen=True, slots=True)
class ShownPage:
    """A ranked page as the report shows it.

    Attributes:
        hit: the page and its score.
        picture: the page with its map laid over it.
        boxes: the regions that answered, as fractions of the page; the report frames them.
        pooled: whether the page was pooled.
    """

    hit: Hit
    picture: Image.Image
    boxes: tuple[Box, ...] = ()
    pooled: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """A question and its pages, best first.

    Attributes:
        question: as asked.
        pages: the ranked pages.
        right: whether the first one is the page the question quotes; None when that page is unknown.
    """

    question: str
    pages: tuple[ShownPage, ...]
    right: bool | None


def write_report(path: Path, answers: Sequence[Answer], *, info: EncoderInfo, n_pages: int) -> Path:
    """Write the report to a file.

    Args:
        path: the HTML file; replaced if it is there.
        answers: questions with their ranked pages.
        info: the encoder that answered.
        n_pages: pages in the index.

    Returns:
        The path.

    >>> import tempfile
    >>> info = EncoderInfo("ab", "tiny", "tomoro", 128, 1, 1280, False, 1)
    >>> from colqwen3_retrievers import Page
    >>> page = ShownPage(Hit(Page(source="a<b>.pdf"), 3.5), Image.new("RGB", (8, 8)))
    >>> out = write_report(Path(tempfile.mkdtemp()) / "r.html", [Answer("x & y", (page,), True)], info=info, n_pages=1)
    >>> text = out.read_text(encoding="utf-8")
    >>> "x &amp; y" in text, "a&lt;b&gt;.pdf" in text, "http" in text
    (True, True, False)
    """
    judged = [answer.right for answer in answers if answer.right is not None]
    links = "".join(_link(number, answer) for number, answer in enumerate(answers, start=1))
    sections = "".join(_section(number, answer) for number, answer in enumerate(answers, start=1))
    path.write_text(
        f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>What the pages answered</title><style>{_STYLE}</style></head><body>
<h1>What the pages answered</h1>
<p>{n_pages} pages were read as images by <b>{html.escape(info.model)}</b> (family {html.escape(info.family)}, dim
{info.dim}) and ranked by MaxSim. {sum(judged)} of {len(judged)} questions that quote a page had that page first.</p>
<p class="dim">Colours show how similar each part of a page is to the question; frames mark the regions that stand out.
Scores are sums over the question's tokens and compare within one question only.</p>
<section><nav>{links}</nav></section>{sections}</body></html>
""",
        encoding="utf-8",
    )
    return path


def _link(number: int, answer: Answer) -> str:
    style, mark, _ = _VERDICTS[answer.right]
    return f'<a href="#q{number}"><span class="{style}">{mark}</span> {html.escape(answer.question)}</a>'


def _section(number: int, answer: Answer) -> str:
    style, mark, words = _VERDICTS[answer.right]
    figures = "".join(_figure(page, width) for page, width in zip(answer.pages, _WIDTHS, strict=False))
    return (
        f'<section id="q{number}"><div class="head"><h2>{html.escape(answer.question)}</h2>'
        f'<span class="{style}">{mark} {words}</span></div><div class="pages">{figures}</div></section>'
    )


def _figure(shown: ShownPage, width: int) -> str:
    page = shown.hit.page
    label = f" ({html.escape(page.label)})" if page.label and page.label != str(page.number) else ""
    name = f"{html.escape(page.source)}, page {page.number}{label}"
    regions = "".join(_region(box) for box in shown.boxes)
    pooled = f' <span class="dim">{POOLED_NOTE}</span>' if shown.pooled else ""
    return (
        f'<figure><div class="page"><img alt="{name}" src="data:image/jpeg;base64,{_jpeg(shown.picture, width)}">'
        f"{regions}</div><figcaption>{name} "
        f'<span class="dim">score {shown.hit.score:.2f}</span>{pooled}</figcaption></figure>'
    )


def _region(box: Box) -> str:
    place = f"left:{box.left:.2%};top:{box.top:.2%};width:{box.right - box.left:.2%};height:{box.bottom - box.top:.2%}"
    return f'<div class="region" style="{place}" title="region score {box.score:.2f}"></div>'


def _jpeg(picture: Image.Image, width: int) -> str:
    height = max(1, round(picture.height * width / picture.width))
    if height > _MAX_HEIGHT:  # JPEG ends at 65,500 pixels, and the browser scales the page to its place anyway
        width, height = max(1, round(width * _MAX_HEIGHT / height)), _MAX_HEIGHT
    buffer = io.BytesIO()
    picture.resize((width, height), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=82)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
