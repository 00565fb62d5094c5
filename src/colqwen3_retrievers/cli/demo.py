"""``colqwen3 demo``: some PDFs indexed, questions asked, a report written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from colqwen3_retrievers.demo.run import run_demo


def add_parser(commands: Any) -> None:
    """Add the command to those of ``colqwen3``."""
    parser = commands.add_parser("demo", help="index some PDFs, ask questions, write a report")
    parser.add_argument("paths", nargs="*", metavar="PDF", help="PDFs of yours, beside the demo's own")
    parser.add_argument("--out", default="demo-output", metavar="DIR", help="the folder to write to (demo-output)")
    parser.add_argument("--model", default="tiny", metavar="MODEL", help="checkpoint (tiny)")
    parser.add_argument("--question", action="append", default=[], metavar="TEXT", help="a question; repeatable")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the demo, and return the exit code.

    Raises:
        ColQwen3Error: a folder, file, question or model that cannot be used.
    """
    run_demo(Path(options.out), options.paths, model=options.model, questions=options.question)
    return 0
