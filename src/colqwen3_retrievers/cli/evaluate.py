"""``colqwen3 eval``: the command line of this room."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

from colqwen3_retrievers.cli.evaluate_options import add_eval_arguments, check_mode, encoder_options, leave_model_open
from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ColQwen3Error, ConfigError
from colqwen3_retrievers.evaluation.comparison import compare
from colqwen3_retrievers.evaluation.corpus_index import corpus_index, is_there
from colqwen3_retrievers.evaluation.files import check_outputs, write_json
from colqwen3_retrievers.evaluation.judged import JudgedSet, read_judged_set
from colqwen3_retrievers.evaluation.measures import DEFAULT_CUTOFFS, parse_measures
from colqwen3_retrievers.evaluation.measuring import check_depth, evaluate, judge
from colqwen3_retrievers.evaluation.mteb import MtebRun, run_mteb
from colqwen3_retrievers.evaluation.results import Evaluation
from colqwen3_retrievers.evaluation.trec import decode_id, read_run, write_qrels, write_run
from colqwen3_retrievers.pages.files import IMAGE_SUFFIXES
from colqwen3_retrievers.pages.page import Query
from colqwen3_retrievers.stores.location import is_qdrant
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo

__all__ = ["add_eval_arguments", "leave_model_open", "run_eval"]

MakeEncoder = Callable[[argparse.Namespace], ColQwen3Encoder]
Say = Callable[[str], None]


def run_eval(options: argparse.Namespace, make_encoder: MakeEncoder, say: Say) -> int:
    """Run the command.

    Args:
        options: what the parser found.
        make_encoder: makes an encoder of the model options.
        say: prints a line of results.

    Returns:
        The exit code.

    Raises:
        ConfigError: not exactly one of DATA, ``--mteb`` and ``--compare``, options of another, and what they meet; in
            the end, mteb tasks that failed.
    """
    mode = check_mode(options)
    if mode == "--compare":
        return _compare(options, say)
    if mode == "--mteb":
        return _mteb(options, make_encoder, say)
    # All that can be refused without opening a page is refused here, before anything is encoded.
    asked = parse_measures(options.k or DEFAULT_CUTOFFS, options.measure or ())
    check_depth(asked, options.depth)
    judged = read_judged_set(options.data, split=options.split or "test")
    outputs = {"--json": options.json, "--run": options.run, "--qrels": options.qrels}
    data = Path(options.data)
    read = [data / name for name in ("queries.jsonl", "corpus.jsonl", "corpus", f"qrels/{options.split or 'test'}.tsv")]
    if options.index is not None and not is_qdrant(options.index):
        read.append(Path(options.index))
    if options.from_run is not None:
        read.append(Path(options.from_run))
    read += [path for path in outputs.values() if path is not None and _is_page_of(Path(path), data)]
    if mode == "--from-run":
        run = _known_ids(read_run(options.from_run, decode=False), judged)
        check_outputs(outputs, read)
        settings = {"set": judged.name, "run": Path(options.from_run).name, "queries": len(judged.queries)}
        got = judge(run, judged.qrels, k=options.k or DEFAULT_CUTOFFS, measures=options.measure or ())
        done = dataclasses.replace(got, settings=settings)
    else:
        _check_pages(options, judged)
        check_outputs(outputs, read)
        done = _evaluate(options, judged, make_encoder)
    _report(done, judged, options, say)
    return 0


def _compare(options: argparse.Namespace, say: Say) -> int:
    a, b = (Evaluation.read(path) for path in options.compare)
    check_outputs({"--json": options.json}, options.compare)
    try:
        done = compare(a, b, measures=options.measure, allow_other_set=options.allow_other_set)
    except ConfigError as exc:
        raise ConfigError(str(exc).replace("allow_other_set", "--allow-other-set")) from exc
    say(f"A is {options.compare[0]}, B is {options.compare[1]}")
    say(str(done))
    if options.json:
        write_json(options.json, dataclasses.asdict(done))
    return 0


def _mteb(options: argparse.Namespace, make_encoder: MakeEncoder, say: Say) -> int:
    check_outputs({"--json": options.json})

    def report(task: str, run: MtebRun) -> None:
        for part, score in run.scores.get(task, {}).items():
            say(f"{task:48} {part:20} {score:.4f}")
        if task in run.failed:
            say(f"{task:48} failed: {run.failed[task]}")
        if options.json:
            write_json(options.json, dataclasses.asdict(run))  # now: the next task may take hours, and fail

    encoder = make_encoder(encoder_options(options, None, ""))
    try:
        run = run_mteb(encoder, options.mteb, exact=options.exact, results=options.results, report=report)
    finally:
        encoder.close()
    for name, mean in run.means.items():
        told = "no mean, as tasks failed" if mean is None else f"{mean:.4f}"
        say(f"{name:48} {'mean of tasks':20} {told}")
    if options.json:
        write_json(options.json, dataclasses.asdict(run))
    if run.failed:
        raise ConfigError(f"mteb: {len(run.failed)} of {len(run.failed) + len(run.scores)} tasks failed: "
                          f"{', '.join(run.failed)}")  # fmt: skip
    return 0


def _check_pages(options: argparse.Namespace, judged: JudgedSet) -> None:
    if options.index is None and not judged.has_corpus:
        raise ConfigError(f"{options.data}: no corpus.jsonl and no corpus folder; give --index")
    if options.as_is:
        return
    listed = judged.listed_ids()  # which checks every line of the list
    if options.allow_unknown:
        return
    unknown = judged.absent(page for query in judged.qrels for page in judged.relevant(query))
    if unknown:
        raise ConfigError(
            f"{options.data}: {len(unknown)} relevant pages are not in the corpus: {', '.join(unknown[:3])}"
            f"{'' if listed is not None else ' (those of a corpus folder are called a.pdf#page=3)'}; "
            "--allow-unknown counts them as missed"
        )


def _evaluate(options: argparse.Namespace, judged: JudgedSet, make_encoder: MakeEncoder) -> Evaluation:
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="colqwen3-eval-"))
        place = options.index or str(Path(scratch) / "index")
        as_is = options.as_is or not judged.has_corpus
        if as_is and not is_there(place):
            raise ConfigError(f"{place}: no index there")

        def encoder(info: EncoderInfo | None) -> ColQwen3Encoder:
            return make_encoder(encoder_options(options, info, place))

        keep = options.index is not None
        index = stack.enter_context(corpus_index(place, judged, encoder, as_is=as_is, keep_images=keep))
        done = evaluate(
            index, judged, k=options.k or DEFAULT_CUTOFFS, measures=options.measure or (), depth=options.depth,
            exact=options.exact, allow_unknown_pages=options.allow_unknown,
        )  # fmt: skip
    if keep or done.settings is None:
        return done
    return dataclasses.replace(done, settings={**done.settings, "index": None})  # it is gone, its name says nothing


def _report(done: Evaluation, judged: JudgedSet, options: argparse.Namespace, say: Say) -> None:
    count = len(next(iter(done.per_query.values())))
    say(f"{count} queries judged, {len(done.unjudged)} without a relevant page")
    for name, value in done.measures.items():
        say(f"{name:12} {value:.4f}")
    if done.seconds:
        say(f"encoding {done.seconds['encode']:.2f} s, searching {done.seconds['search']:.2f} s")
    if options.worst:
        _worst(done, judged, options.worst, say)
    failed: ColQwen3Error | None = None
    for path, write in (
        (options.json, done.write),
        (options.run, lambda path: write_run(path, done.run)),
        (options.qrels, lambda path: write_qrels(path, done.qrels)),
    ):
        if path:
            try:
                write(path)
            except ColQwen3Error as exc:  # a disk that filled up meanwhile: the other files may lie on another
                failed = failed or exc
    if failed is not None:
        raise failed


def _worst(done: Evaluation, judged: JudgedSet, n: int, say: Say) -> None:
    say(f"worst by {next(iter(done.per_query))}, with the rank of the first relevant page:")
    for query, value in done.worst(n):
        relevant = judged.relevant(query)
        rank = next((at for at, page in enumerate(done.run.get(query, {}), start=1) if page in relevant), None)
        asked = judged.queries[query]
        text = (asked.text if isinstance(asked, Query) else asked) or "(an image)"
        say(f"{value:.4f}  {'-' if rank is None else rank:>4}  {query}  {' '.join(text.split())[:80]}")


def _is_page_of(path: Path, folder: Path) -> bool:
    """Whether a path is a file that lies in the set's folder and may be named by its lines."""
    if path.suffix.lower() not in (*IMAGE_SUFFIXES, ".pdf", ".tsv", ".jsonl"):
        return False
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        return path.is_file() and path.resolve().is_relative_to(folder.resolve())
    return False


def _known_ids(run: dict[str, dict[str, float]], judged: JudgedSet) -> dict[str, dict[str, float]]:
    """Decode the ids of a TREC run that the set does not know as they stand."""
    pages = {page for row in judged.qrels.values() for page in row}

    def known(name: str, ids: set[str]) -> str:
        return name if name in ids else decode_id(name)

    queries = set(judged.queries)
    told = {
        known(query, queries): {known(page, pages): score for page, score in row.items()} for query, row in run.items()
    }
    if not queries & told.keys():
        raise ConfigError(f"--from-run: no query of {judged.name} is in it; it has {next(iter(told))!r}")
    return told
