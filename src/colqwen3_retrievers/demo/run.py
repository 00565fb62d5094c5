"""Runs the demo: indexes the documents, asks the questions, writes the report."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from colqwen3_retrievers.demo import DEMO_QUESTIONS, write_demo_documents
from colqwen3_retrievers.demo.html_report import Answer, ShownPage, write_report
from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.pages.files import find_page_files
from colqwen3_retrievers.pages.loading import load_pages
from colqwen3_retrievers.pages.page import Hit, Query
from colqwen3_retrievers.retrieval.evidence import file_stem, page_map
from colqwen3_retrievers.vectors.multi_vector import MultiVector

N_SHOWN = 3
"""Pages shown for each question."""

_MARKER = ".colqwen3-demo"


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Counts of a demo run.

    Attributes:
        n_pages: pages indexed.
        n_questions: the demo's own questions, whose page is known.
        n_first: how many of them had that page first.
        report: the HTML file.
    """

    n_pages: int
    n_questions: int
    n_first: int
    report: Path


def run_demo(
    out: Path, documents: Sequence[str] = (), *, model: str = "tiny", questions: Sequence[str] = ()
) -> DemoResult:
    """Index the demo's documents, ask its questions, and write the answers.

    Prints the ranking of each question, writes ``report.html`` (one file, no server) and, under ``best/``, the first
    page of each question as PNG with the answering regions drawn. Paths, questions and the model are checked before an
    earlier run's report is removed.

    Args:
        out: folder to write into; the output of an earlier run is replaced.
        documents: PDFs, images or folders of the user's, indexed beside the demo's own as ``yours/...``, so that a
            ``report.pdf`` among them takes no page's place.
        model: checkpoint, as for :class:`ColQwen3Encoder`.
        questions: the user's questions, asked after the demo's.

    Raises:
        ConfigError: ``out`` holds files that no demo wrote, or a document that would be removed with them; an empty
            question.
        PageError: a document that is missing or cannot be read.
        CheckpointError: the model cannot be loaded.
    """
    for question in questions:
        Query(question)
    _check_folder(out, documents)
    user_pages = load_pages(list(documents))  # opens nothing yet
    targets: list[tuple[str, tuple[str, int] | None]] = [
        *((question, (source, page)) for question, source, page in DEMO_QUESTIONS),
        *((question, None) for question in questions),
    ]
    with ColQwen3Encoder(model) as encoder, contextlib.ExitStack() as stack:
        _ = encoder.info  # reads the checkpoint's files, so that a missing one is reported here
        _clear(out)
        write_demo_documents(out / "documents")
        index = stack.enter_context(PageIndex.open(out / "index", encoder))
        renamed = (page.replace(id=f"yours/{page.id}", source=f"yours/{page.source}") for page in user_pages)
        index.add(renamed, show_progress=True)  # first: a file may be broken
        index.add(load_pages(out / "documents"), show_progress=True)
        n_pages = len(index)
        print(f"{n_pages} pages indexed with {encoder.info.model} (dim {encoder.info.dim}).\n")
        queries = encoder.encode_queries([question for question, _ in targets])
        rankings = index.search_many(queries, k=N_SHOWN)
        (out / "best").mkdir()
        answers = []
        for number, ((question, target), query, hits) in enumerate(zip(targets, queries, rankings, strict=True), 1):
            first = (hits[0].page.source, hits[0].page.number) if hits else None
            pages = _draw_pages(index, query, hits, out / "best" / f"{number:02}")
            answer = Answer(question, pages, None if target is None else first == target)
            _print_ranking(answer)
            answers.append(answer)
        report = write_report(out / "report.html", answers, info=encoder.info, n_pages=n_pages)
    judged = [answer.right for answer in answers if answer.right is not None]
    print(f"\n{sum(judged)} of {len(judged)} questions had the page they quote first.")
    print(f"Report: {report}\nBest pages: {out / 'best'}")
    return DemoResult(n_pages, len(judged), sum(judged), report)


def _draw_pages(index: PageIndex, query: MultiVector, hits: Sequence[Hit], best: Path) -> tuple[ShownPage, ...]:
    """Draw the map of each hit, and write the first one's regions to a file whose path starts with ``best``."""
    shown: list[ShownPage] = []
    for hit, record in zip(hits, index.get([hit.page.id for hit in hits], vectors=True), strict=True):
        page = hit.page
        picture = page.image or Image.new("RGB", (640, 400), "white")
        regions = page_map(query, record.multi_vector)
        if not shown:
            name = f"{best.name}-{file_stem(Path(page.source).stem)}-page-{page.number}.png"
            (picture if regions is None else regions.overlay(picture, boxes=2)).save(best.with_name(name))
        if regions is None:
            shown.append(ShownPage(hit, picture))
        else:
            overlay, boxes = regions.overlay(picture), tuple(regions.boxes(top=2))
            shown.append(ShownPage(hit, overlay, boxes, regions.pooled))
    return tuple(shown)


def _print_ranking(answer: Answer) -> None:
    mark = {True: "+", False: "-", None: " "}[answer.right]
    ranking = "   ".join(
        f"{hit.page.source} p.{hit.page.number} {hit.score:.2f}" for hit in (page.hit for page in answer.pages)
    )
    print(f"{mark} {answer.question[:34]:34}  {ranking}", flush=True)


def _check_folder(out: Path, documents: Sequence[str]) -> None:
    """Refuse a folder that no earlier run wrote, and documents that are missing or would be removed with it."""
    if out.exists() and not (out / _MARKER).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not a demo's folder; choose another --out")
    for file in find_page_files(list(documents)):
        if file.path.resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"{file.path}: the demo replaces what is in {out}; choose another --out")


def _clear(out: Path) -> None:
    """Remove the output of an earlier run."""
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / _MARKER).write_text("Written by colqwen3 demo; the next run replaces this folder.\n", encoding="utf-8")
