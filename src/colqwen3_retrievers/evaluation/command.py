"""``colqwen3 eval``: the command line of this room."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from colqwen3_retrievers.documents import Page
from colqwen3_retrievers.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.evaluation.comparison import compare
from colqwen3_retrievers.evaluation.judged import JudgedSet, read_judged_set
from colqwen3_retrievers.evaluation.measuring import DEFAULT_CUTOFFS, Evaluation, evaluate, measure_names
from colqwen3_retrievers.evaluation.mteb_search import run_mteb
from colqwen3_retrievers.evaluation.trec import write_qrels, write_run
from colqwen3_retrievers.index import PageIndex
from colqwen3_retrievers.stores import is_qdrant

MakeEncoder = Callable[[argparse.Namespace], ColQwen3Encoder]


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's own options."""
    what = parser.add_argument_group("what is judged (one of)")
    what.add_argument("data", nargs="?", metavar="DATA", help="a BEIR-like folder: queries.jsonl, qrels/, corpus")
    what.add_argument("--mteb", nargs="+", metavar="NAME", help='mteb benchmarks or tasks, as "ViDoRe(v2)"')
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two files that --json wrote")
    parser.add_argument("--index", metavar="INDEX", help="the index to ask; made of DATA's corpus when it is new")
    parser.add_argument("--as-is", action="store_true", help="ask the index as it is, adding nothing of the corpus")
    parser.add_argument("--split", default="test", metavar="NAME", help="qrels/NAME.tsv (test)")
    parser.add_argument("-k", type=int, nargs="+", default=list(DEFAULT_CUTOFFS), metavar="N", help="cutoffs (1 5 10)")
    parser.add_argument("--measure", action="append", default=[], metavar="NAME", help="ir-measures name; repeatable")
    parser.add_argument("--depth", type=int, metavar="N", help="pages asked for (the largest cutoff)")
    parser.add_argument("--exact", action="store_true", help="score every page")
    parser.add_argument("--allow-unknown", action="store_true", help="relevant pages not in the index count as missed")
    parser.add_argument("--run", metavar="FILE", help="write the run as a TREC file")
    parser.add_argument("--qrels", metavar="FILE", help="write the judgements as a TREC file")
    parser.add_argument("--json", metavar="FILE", help="write everything, for --compare")


def run_eval(options: argparse.Namespace, make_encoder: MakeEncoder, say: Callable[[str], None]) -> int:
    """Run the command.

    Args:
        options: what the parser found.
        make_encoder: makes an encoder of the model options.
        say: prints a line of results.

    Returns:
        The exit code.

    Raises:
        ConfigError: not exactly one of DATA, ``--mteb`` and ``--compare``, and what they meet.
    """
    if sum(given is not None for given in (options.data, options.mteb, options.compare)) != 1:
        raise ConfigError("eval: give a folder, or --mteb, or --compare")
    if options.compare:
        done = compare(Evaluation.read(options.compare[0]), Evaluation.read(options.compare[1]),
                       measures=options.measure or None)  # fmt: skip
        say(str(done))
        if options.json:
            Path(options.json).write_text(json.dumps(dataclasses.asdict(done), indent=1), encoding="utf-8")
        return 0
    if options.mteb:
        scores = run_mteb(make_encoder(options), options.mteb, exact=options.exact)
        for task, row in scores.items():
            for part, score in row.items():
                say(f"{task:48} {part:20} {score:.4f}")
        if options.json:
            Path(options.json).write_text(json.dumps(scores, indent=1), encoding="utf-8")
        return 0
    measure_names(options.k, options.measure)  # before anything is encoded
    judged = read_judged_set(options.data, split=options.split)
    _report(_evaluate(options, judged, make_encoder), options, say)
    return 0


def _evaluate(options: argparse.Namespace, judged: JudgedSet, make_encoder: MakeEncoder) -> Evaluation:
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="colqwen3-eval-"))
        if options.index is None and not judged.has_corpus:
            raise ConfigError(f"{options.data}: no corpus.jsonl and no corpus folder; give --index")
        adds = judged.has_corpus and not options.as_is
        place = options.index or str(Path(scratch) / "index")
        encoder = _encoder(options, place, adds, make_encoder)
        if encoder is not None:
            stack.callback(encoder.close)
        with PageIndex.open(place, encoder, images="none", read_only=not adds) as index:
            if adds:
                corpus: set[str] = set()
                index.add(_noting(judged.pages(), corpus), show_progress=True)
                others = sorted(set(index.ids()) - corpus)
                if others:
                    raise ConfigError(
                        f"{index.location}: holds {len(others)} pages that are not of the corpus: {others[0]}; "
                        "--as-is asks it as it is"
                    )
            return evaluate(
                index, judged, k=options.k, measures=options.measure, depth=options.depth, exact=options.exact,
                allow_unknown_pages=options.allow_unknown,
            )  # fmt: skip


def _encoder(options: argparse.Namespace, place: str, adds: bool, make_encoder: MakeEncoder) -> ColQwen3Encoder | None:
    """Make the encoder of the model options, or of what an index knows; None leaves that to the index."""
    there = is_qdrant(place) or Path(place).exists()
    if adds and (not there or is_qdrant(place)):
        return make_encoder(options)
    if not (options.model or options.device or options.url):
        return None
    with PageIndex.open(place, read_only=True) as index:
        info = index.info
    return ColQwen3Encoder.from_info(info, model=options.model, device=options.device, url=options.url or None)


def _noting(pages: Iterable[Page], ids: set[str]) -> Iterator[Page]:
    for page in pages:
        ids.add(page.id)
        yield page


def _report(done: Evaluation, options: argparse.Namespace, say: Callable[[str], None]) -> None:
    judged = len(next(iter(done.per_query.values())))
    say(f"{judged} queries judged, {len(done.unjudged)} without a relevant page")
    for name, value in done.measures.items():
        say(f"{name:12} {value:.4f}")
    if done.seconds:
        say(f"encoding {done.seconds['encode']:.2f} s, searching {done.seconds['search']:.2f} s")
    if options.json:
        done.write(options.json)
    if options.run:
        write_run(options.run, done.run)
    if options.qrels:
        write_qrels(options.qrels, done.qrels)
