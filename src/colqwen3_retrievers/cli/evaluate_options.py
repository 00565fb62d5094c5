"""The options of ``colqwen3 eval``: which there are, which belong to what, and what they say about an encoder."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, Final

from colqwen3_retrievers.errors import ConfigError, StoreMismatchError
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo

_MODEL: Final[dict[str, Any]] = {  # destination -> what holds where it was not given
    "model": None, "revision": None, "family": None, "engine": "auto", "url": [], "device": None, "dtype": "auto",
    "dim": None, "pool_factor": 1, "max_visual_tokens": None, "include_text": False,
}  # fmt: skip
_JUDGING = {"split", "k", "measure", "qrels", "json", "worst"}
_OF: Final[dict[str, set[str]]] = {
    "a folder": _JUDGING | {"index", "as_is", "depth", "exact", "allow_unknown", "run"} | _MODEL.keys(),
    "--from-run": _JUDGING | {"from_run"},
    "--mteb": {"exact", "json", "results"} | _MODEL.keys(),
    "--compare": {"measure", "json", "allow_other_set"},
}
_STATED = ("family", "dim", "pool_factor", "max_visual_tokens")


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's own options. None stands for what was not given, so that it can be told."""
    what = parser.add_argument_group("what is judged (one of)")
    what.add_argument("data", nargs="?", metavar="DATA", help="a BEIR-like folder: queries.jsonl, qrels/, corpus")
    what.add_argument("--mteb", nargs="+", metavar="NAME", help='mteb benchmarks or tasks, as "ViDoRe(v2)"')
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two files that --json wrote")
    add = parser.add_argument
    add("--index", metavar="INDEX", help="the index to ask; made of DATA's corpus when new, completed when pages miss")
    add("--as-is", action="store_true", help="ask the index as it is, comparing nothing with the corpus")
    add("--from-run", metavar="FILE", help="judge this TREC run by DATA's judgements; nothing is searched")
    add("--split", metavar="NAME", help="qrels/NAME.tsv (test)")
    add("-k", type=int, nargs="+", metavar="N", help="cutoffs (1 5 10)")
    add("--measure", action="append", metavar="NAME", help="ir-measures name; repeatable")
    add("--depth", type=int, metavar="N", help="pages asked for, at least the largest cutoff (which it is)")
    add("--exact", action="store_true", help="score every page")
    add("--allow-unknown", action="store_true", help="relevant pages not in the index count as missed")
    add("--allow-other-set", action="store_true", help="compare also over other pages or another set's name")
    add("--worst", type=int, metavar="N", help="show the queries that did worst by the first measure")
    add("--run", metavar="FILE", help="write the run as a TREC file")
    add("--qrels", metavar="FILE", help="write the judgements as a TREC file")
    add("--json", metavar="FILE", help="write everything, for --compare")
    add(
        "--results", metavar="DIR", help="with --mteb: keep mteb's result files; tasks that are there are not run again"
    )


def leave_model_open(parser: argparse.ArgumentParser) -> None:
    """Let the model options be None where they are not given: an index that is there says them then."""
    parser.set_defaults(**dict.fromkeys(_MODEL))


def check_mode(options: argparse.Namespace) -> str:
    """Tell what is to be done.

    Returns:
        ``"a folder"``, ``"--from-run"``, ``"--mteb"`` or ``"--compare"``.

    Raises:
        ConfigError: not exactly one of them, or options that it does not know.
    """
    if sum(given is not None for given in (options.data, options.mteb, options.compare)) != 1:
        raise ConfigError("eval: give a folder, or --mteb, or --compare")
    mode = "--mteb" if options.mteb else "--compare" if options.compare else "a folder"
    if mode == "a folder" and options.from_run is not None:
        mode = "--from-run"
    every = set().union(*_OF.values())
    given = {name for name in every if _is_given(getattr(options, name, None))}
    wrong = [f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}" for name in sorted(given - _OF[mode])]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: not for {mode}")
    if options.as_is and options.index is None:
        raise ConfigError("--as-is: give --index")
    if options.worst is not None and options.worst < 1:
        raise ConfigError(f"--worst: expected a number from 1, got {options.worst}")
    return mode


def encoder_options(options: argparse.Namespace, info: EncoderInfo | None, place: str) -> argparse.Namespace:
    """Fill in the model options that were not given: from an index that is there, else by default.

    Raises:
        StoreMismatchError: one that was given contradicts the index.
    """
    given = {name: value for name in _MODEL if _is_given(value := getattr(options, name, None))}
    known: Mapping[str, Any] = {}
    if info is not None:
        known = {name: getattr(info, name) for name in (*_STATED, "include_text")}
        if "model" not in given:
            known = {**known, "model": info.model, "revision": info.revision}
        differing = [
            f"--{name.replace('_', '-')} {given[name]}, but it was made with {known[name]}"
            for name in (*_STATED, "include_text")
            if name in given and given[name] != known[name]
        ]
        if differing:
            raise StoreMismatchError(f"{place}: {'; '.join(differing)}")
    return argparse.Namespace(**{**_MODEL, **known, **given})


def _is_given(value: object) -> bool:
    return value is not None and value is not False and value != []  # 0 is given, and refused later
