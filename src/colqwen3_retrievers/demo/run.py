"""The demo: real PDFs in, ranked pages out, with a picture of where each answer was found."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
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
from colqwen3_retrievers.pages.page import Hit, Page, Query
from colqwen3_retrievers.retrieval.evidence import file_stem
from colqwen3_retrievers.retrieval.similarity_maps import Box, similarity_map

N_SHOWN = 3
"""Pages shown for each question."""

_MARK = ".colqwen3-demo"


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What a run found.

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
    page of each question as PNG with the answering regions drawn.

    Args:
        out: folder to write into; what an earlier run left there is replaced.
        documents: PDFs, images or folders of the user's, indexed beside the demo's own as ``yours/...``, so that a
            ``report.pdf`` among them takes no page's place.
        model: checkpoint, as for :class:`ColQwen3Encoder`.
        questions: the user's questions, asked after the demo's.

    Returns:
        What was found.

    Raises:
        ConfigError: ``out`` holds something that no demo wrote, or a document that would go with it; an empty question.
        PageError: a document that is not there, or one that cannot be read.
        ColQwen3Error: see what it calls.

    What can be told beforehand (paths, questions, the model) is, before an earlier run's report is touched.
    """
    for question in questions:
        Query(question)
    _check(out, documents)
    mine = load_pages(list(documents))  # opens nothing yet
    asked: list[tuple[str, tuple[str, int] | None]] = [
        (question, (source, page)) for question, source, page in DEMO_QUESTIONS
    ]
    asked += [(question, None) for question in questions]
    answers: list[Answer] = []
    with ColQwen3Encoder(model) as encoder, contextlib.ExitStack() as opened:
        _ = encoder.info  # reads the checkpoint's files, so that there is one
        _clear(out)
        write_demo_documents(out / "documents")
        index = opened.enter_context(PageIndex.open(out / "index", encoder))
        index.add(_yours(mine), show_progress=True)  # first: a file may be broken
        index.add(load_pages(out / "documents"), show_progress=True)
        n_pages = len(index)
        print(f"{n_pages} pages indexed with {encoder.info.model} (dim {encoder.info.dim}).\n")
        vectors = encoder.encode_queries([question for question, _ in asked])
        found = index.search_many(vectors, k=N_SHOWN)
        (out / "best").mkdir()
        for number, ((question, wanted), query, hits) in enumerate(zip(asked, vectors, found, strict=True), start=1):
            shown: list[ShownPage] = []
            for hit, record in zip(hits, index.get([hit.page.id for hit in hits], vectors=True), strict=True):
                picture = hit.page.image or Image.new("RGB", (640, 400), "white")
                boxes: tuple[Box, ...] = ()
                pooled = False
                if not shown:
                    best = picture
                if record.multi_vector is not None and record.multi_vector.grid is not None:
                    found_at = similarity_map(query, record.multi_vector)
                    boxes, pooled = tuple(found_at.boxes(top=2)), found_at.pooled
                    if not shown:
                        best = found_at.overlay(picture, boxes=2)
                    picture = found_at.overlay(picture)
                shown.append(
                    ShownPage(hit.page.source, hit.page.number, hit.page.label, hit.score, picture, boxes, pooled)
                )
            first = (hits[0].page.source, hits[0].page.number) if hits else None
            right = None if wanted is None else first == wanted
            _print_answer(question, hits, right)
            if shown:
                stem = file_stem(Path(shown[0].source).stem)
                best.save(out / "best" / f"{number:02}-{stem}-page-{shown[0].number}.png")
            answers.append(Answer(question, tuple(shown), right))
        judged = [answer.right for answer in answers if answer.right is not None]
        report = write_report(out / "report.html", answers, info=encoder.info, n_pages=n_pages)
    print(f"\n{sum(judged)} of {len(judged)} questions had the page they quote first.")
    print(f"Report: {report}\nBest pages: {out / 'best'}")
    return DemoResult(n_pages, len(judged), sum(judged), report)


def _print_answer(question: str, hits: Sequence[Hit], right: bool | None) -> None:
    mark = {True: "+", False: "-", None: " "}[right]
    ranked = "   ".join(f"{hit.page.source} p.{hit.page.number} {hit.score:.2f}" for hit in hits)
    print(f"{mark} {question[:34]:34}  {ranked}")
    sys.stdout.flush()


def _yours(pages: Iterable[Page]) -> Iterator[Page]:
    """Give the user's pages under names that none of the demo's own has."""
    for page in pages:
        yield page.replace(id=f"yours/{page.id}", source=f"yours/{page.source}")


def _check(out: Path, documents: Sequence[str]) -> None:
    """Refuse a folder that no earlier run wrote, and documents that are not there or would go with what it left."""
    if out.exists() and not (out / _MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not a demo's folder; choose another --out")
    for file in find_page_files(list(documents)):
        if file.path.resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"{file.path}: the demo replaces what is in {out}; choose another --out")


def _clear(out: Path) -> None:
    """Empty a folder that an earlier run wrote."""
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / _MARK).write_text("Written by colqwen3 demo; the next run replaces this folder.\n", encoding="utf-8")
