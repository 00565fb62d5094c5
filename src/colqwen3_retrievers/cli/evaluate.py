"""``colqwen3 eval``: a folder of queries or a run judged, mteb's tasks scored, two evaluations compared."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any, Final

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.cli.console import MODEL_DEFAULTS, add_model_options, make_encoder
from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ColQwen3Error, ConfigError, StoreMismatchError
from colqwen3_retrievers.evaluation.comparison import compare
from colqwen3_retrievers.evaluation.corpus_index import corpus_index
from colqwen3_retrievers.evaluation.files import check_outputs, write_json
from colqwen3_retrievers.evaluation.judged import JudgedSet, read_judged_set
from colqwen3_retrievers.evaluation.measures import DEFAULT_CUTOFFS, parse_measures
from colqwen3_retrievers.evaluation.measuring import evaluate
from colqwen3_retrievers.evaluation.mteb import MtebRun, run_mteb
from colqwen3_retrievers.evaluation.results import Evaluation, judge
from colqwen3_retrievers.evaluation.trec import decode_id, read_run, write_qrels, write_run
from colqwen3_retrievers.pages.files import IMAGE_SUFFIXES
from colqwen3_retrievers.pages.page import Query
from colqwen3_retrievers.stores.location import is_qdrant
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo

_JUDGING: Final = {"split", "k", "measure", "qrels", "json", "worst"}
_OPTIONS: Final[dict[str, set[str]]] = {  # mode -> the options it takes
    "a folder": _JUDGING | {"index", "as_is", "depth", "exact", "allow_unknown", "run"} | MODEL_DEFAULTS.keys(),
    "--from-run": _JUDGING | {"from_run"},
    "--mteb": {"exact", "json", "results"} | MODEL_DEFAULTS.keys(),
    "--compare": {"measure", "json", "allow_other_set"},
}
_SET_SUFFIXES: Final = (*IMAGE_SUFFIXES, ".pdf", ".tsv", ".jsonl")
_INDEX_SETTINGS: Final = ("family", "dim", "pool_factor", "max_visual_tokens", "include_text")


def add_parser(commands: Any) -> None:
    """Add the command to those of ``colqwen3``."""
    parser = commands.add_parser("eval", help="judge retrieval on queries with known answers; compare two settings")
    modes = parser.add_argument_group("what is evaluated (one of)")
    modes.add_argument("data", nargs="?", metavar="DATA", help="a BEIR-like folder: queries.jsonl, qrels/, corpus")
    modes.add_argument("--mteb", nargs="+", metavar="NAME", help='mteb benchmarks or tasks, as "ViDoRe(v2)"')
    modes.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two files that --json wrote")
    add = parser.add_argument
    add("--index", metavar="INDEX", help="the index to search; made of DATA's corpus if new, completed if pages miss")
    add("--as-is", action="store_true", help="search the index without comparing it with the corpus")
    add("--from-run", metavar="FILE", help="judge this TREC run by DATA's judgements; nothing is searched")
    add("--split", metavar="NAME", help="qrels/NAME.tsv (test)")
    add("-k", type=int, nargs="+", metavar="N", help="cutoffs (1 5 10)")
    add("--measure", action="append", metavar="NAME", help="ir-measures name; repeatable")
    add("--depth", type=int, metavar="N", help="pages to retrieve, at least the largest cutoff (the default)")
    add("--exact", action="store_true", help="score every page")
    add("--allow-unknown", action="store_true", help="count relevant pages that the index lacks as missed")
    add("--allow-other-set", action="store_true", help="compare also over other pages or another set's name")
    add("--worst", type=int, metavar="N", help="show the queries with the lowest values of the first measure")
    add("--run", metavar="FILE", help="write the run as a TREC file")
    add("--qrels", metavar="FILE", help="write the judgements as a TREC file")
    add("--json", metavar="FILE", help="write everything, for --compare")
    add("--results", metavar="DIR", help="with --mteb: keep mteb's result files; tasks that have one are not run again")
    add_model_options(parser)
    parser.set_defaults(**dict.fromkeys(MODEL_DEFAULTS), command=run)  # None: not given, so the index's own applies


def run(options: argparse.Namespace) -> int:
    """Evaluate what the options name, print the results, and return the exit code.

    Raises:
        ConfigError: not exactly one of DATA, ``--mteb`` and ``--compare``, options of another mode, or data that cannot
            be used; mteb tasks that failed, after the others.
        ColQwen3Error: no such index or model.
    """
    mode = _mode(options)
    if mode == "--compare":
        return _compare(options)
    if mode == "--mteb":
        return _mteb(options)
    cutoffs, names = options.k or DEFAULT_CUTOFFS, options.measure or ()
    # Whatever can be refused without opening a page is refused here, before anything is encoded.
    parse_measures(cutoffs, names).depth(options.depth)
    judged = read_judged_set(options.data, split=options.split or "test")
    if mode == "--from-run":
        trec_run = _decode_unknown_ids(read_run(options.from_run, decode=False), judged)
        _check_outputs(options)
        settings = {"set": judged.name, "run": Path(options.from_run).name, "queries": len(judged.queries)}
        evaluation = dataclasses.replace(judge(trec_run, judged.qrels, k=cutoffs, measures=names), settings=settings)
    else:
        _check_corpus(options, judged)
        _check_outputs(options)
        evaluation = _evaluate(options, judged)
    _report(evaluation, judged, options)
    return 0


def _mode(options: argparse.Namespace) -> str:
    """Return the key of ``_OPTIONS`` that the options ask for, having refused options of other modes."""
    if sum(value is not None for value in (options.data, options.mteb, options.compare)) != 1:
        raise ConfigError("eval: give a folder, or --mteb, or --compare")
    mode = "--mteb" if options.mteb else "--compare" if options.compare else "a folder"
    if mode == "a folder" and options.from_run is not None:
        mode = "--from-run"
    given = {name for name in set().union(*_OPTIONS.values()) if _is_given(getattr(options, name))}
    wrong = [f"-{name}" if len(name) == 1 else _flag(name) for name in sorted(given - _OPTIONS[mode])]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: not for {mode}")
    if options.as_is and options.index is None:
        raise ConfigError("--as-is: give --index")
    if options.worst is not None:
        whole_number(options.worst, "--worst", least=1)
    return mode


def _is_given(value: object) -> bool:
    return value is not None and value is not False  # 0 is given, and refused later


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _encoder(options: argparse.Namespace, info: EncoderInfo | None = None, place: str = "") -> ColQwen3Encoder:
    """Make the encoder; options that were not given are those of an existing index, else the defaults."""
    given = {name: value for name in MODEL_DEFAULTS if _is_given(value := getattr(options, name))}
    known: dict[str, Any] = {}
    if info is not None:
        known = {name: getattr(info, name) for name in _INDEX_SETTINGS}
        contradictions = [
            f"{_flag(name)} {given[name]}, but it was made with {value}"
            for name, value in known.items()
            if name in given and given[name] != value
        ]
        if contradictions:
            raise StoreMismatchError(f"{place}: {'; '.join(contradictions)}")
        if "model" not in given:
            known |= {"model": info.model, "revision": info.revision}
    return make_encoder(argparse.Namespace(**{**MODEL_DEFAULTS, **known, **given}))


def _compare(options: argparse.Namespace) -> int:
    a, b = (Evaluation.read(path) for path in options.compare)
    check_outputs({"--json": options.json}, options.compare)
    try:
        comparison = compare(a, b, measures=options.measure, allow_other_set=options.allow_other_set)
    except ConfigError as exc:
        raise ConfigError(str(exc).replace("allow_other_set", "--allow-other-set")) from exc
    print(f"A is {options.compare[0]}, B is {options.compare[1]}")
    print(comparison)
    if options.json:
        write_json(options.json, dataclasses.asdict(comparison))
    return 0


def _mteb(options: argparse.Namespace) -> int:
    check_outputs({"--json": options.json})

    def report(task: str, scores: MtebRun) -> None:
        for part, score in scores.scores.get(task, {}).items():
            print(f"{task:48} {part:20} {score:.4f}")
        if task in scores.failed:
            print(f"{task:48} failed: {scores.failed[task]}")
        if options.json:
            write_json(options.json, dataclasses.asdict(scores))  # now: the next task may take hours, and fail

    with _encoder(options) as encoder:
        scores = run_mteb(encoder, options.mteb, exact=options.exact, results=options.results, report=report)
    for name, mean in scores.means.items():
        print(f"{name:48} {'mean of tasks':20} {'no mean, as tasks failed' if mean is None else f'{mean:.4f}'}")
    if options.json:
        write_json(options.json, dataclasses.asdict(scores))
    if scores.failed:
        count = len(scores.failed) + len(scores.scores)
        raise ConfigError(f"mteb: {len(scores.failed)} of {count} tasks failed: {', '.join(scores.failed)}")
    return 0


def _check_outputs(options: argparse.Namespace) -> None:
    """Refuse outputs that cannot be written, or that would replace a file of the set, the index or the run."""
    data = Path(options.data)
    outputs = {"--json": options.json, "--run": options.run, "--qrels": options.qrels}
    inputs = [
        data / name for name in ("queries.jsonl", "corpus.jsonl", "corpus", f"qrels/{options.split or 'test'}.tsv")
    ]
    inputs += [Path(options.index)] if options.index is not None and not is_qdrant(options.index) else []
    inputs += [Path(options.from_run)] if options.from_run is not None else []
    # A line of the set may name any such file below its folder.
    inputs += [
        Path(output)
        for output in outputs.values()
        if output is not None
        and Path(output).suffix.lower() in _SET_SUFFIXES
        and os.path.isfile(output)  # noqa: PTH113 - is_file() raises for a long name
        and data.resolve() in Path(output).resolve().parents
    ]
    check_outputs(outputs, inputs)


def _check_corpus(options: argparse.Namespace, judged: JudgedSet) -> None:
    if options.index is None and not judged.has_corpus:
        raise ConfigError(f"{options.data}: no corpus.jsonl and no corpus folder; give --index")
    if options.as_is:
        return
    listed = judged.listed_ids()  # checks every line of the list
    if options.allow_unknown:
        return
    unknown = judged.absent(page for query in judged.qrels for page in judged.relevant(query))
    if unknown:
        raise ConfigError(
            f"{options.data}: {len(unknown)} relevant pages are not in the corpus: {', '.join(unknown[:3])}"
            f"{'' if listed is not None else ' (those of a corpus folder are called a.pdf#page=3)'}; "
            "--allow-unknown counts them as missed"
        )


def _evaluate(options: argparse.Namespace, judged: JudgedSet) -> Evaluation:
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="colqwen3-eval-"))
        place = options.index or str(Path(scratch) / "index")
        index = stack.enter_context(
            corpus_index(
                place, judged, lambda info: _encoder(options, info, place),
                as_is=options.as_is or not judged.has_corpus,
                keep_images=options.index is not None,
            )
        )  # fmt: skip
        evaluation = evaluate(
            index, judged, k=options.k or DEFAULT_CUTOFFS, measures=options.measure or (), depth=options.depth,
            exact=options.exact, allow_unknown_pages=options.allow_unknown,
        )  # fmt: skip
    if options.index is not None or evaluation.settings is None:
        return evaluation
    return dataclasses.replace(evaluation, settings={**evaluation.settings, "index": None})  # it was temporary


def _report(evaluation: Evaluation, judged: JudgedSet, options: argparse.Namespace) -> None:
    count = len(next(iter(evaluation.per_query.values())))
    print(f"{count} queries judged, {len(evaluation.unjudged)} without a relevant page")
    for name, value in evaluation.measures.items():
        print(f"{name:12} {value:.4f}")
    if evaluation.seconds:
        print(f"encoding {evaluation.seconds['encode']:.2f} s, searching {evaluation.seconds['search']:.2f} s")
    if options.worst:
        _print_worst(evaluation, judged, options.worst)
    failure: ColQwen3Error | None = None
    for path, write in (
        (options.json, evaluation.write),
        (options.run, lambda path: write_run(path, evaluation.run)),
        (options.qrels, lambda path: write_qrels(path, evaluation.qrels)),
    ):
        if path:
            try:
                write(path)
            except ColQwen3Error as exc:  # such as a full disk: the other files may be on another
                failure = failure or exc
    if failure is not None:
        raise failure


def _print_worst(evaluation: Evaluation, judged: JudgedSet, n: int) -> None:
    print(f"worst by {next(iter(evaluation.per_query))}, with the rank of the first relevant page:")
    for query, value in evaluation.worst(n):
        relevant = judged.relevant(query)
        ranks = (rank for rank, page in enumerate(evaluation.run.get(query, {}), start=1) if page in relevant)
        question = judged.queries[query]
        text = (question.text if isinstance(question, Query) else question) or "(an image)"
        print(f"{value:.4f}  {next(ranks, '-'):>4}  {query}  {' '.join(text.split())[:80]}")


def _decode_unknown_ids(run: dict[str, dict[str, float]], judged: JudgedSet) -> dict[str, dict[str, float]]:
    """Decode the ids of a TREC run that the set does not know as they are written."""
    queries = set(judged.queries)
    pages = {page for row in judged.qrels.values() for page in row}

    def decoded(name: str, ids: set[str]) -> str:
        return name if name in ids else decode_id(name)

    result = {
        decoded(query, queries): {decoded(page, pages): score for page, score in row.items()}
        for query, row in run.items()
    }
    if not queries & result.keys():
        raise ConfigError(f"--from-run: no query of {judged.name} is in it; it has {next(iter(result))!r}")
    return result
