"""The command line: ``colqwen3 index``, ``search``, ``delete``, ``info``, ``copy``, ``eval``, ``serve``, ``demo``.

Results go to standard output, messages to standard error. Exit code 0 is success, 1 an error reported on one line, 2 a
wrong command line, 130 an interruption. A command may print results and still exit with 1: ``search`` prints its
ranking even if its pictures cannot be written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from colqwen3_retrievers import __version__
from colqwen3_retrievers.cli import copy, delete, demo, evaluate, index, info, search, serve
from colqwen3_retrievers.cli.console import console, print_message
from colqwen3_retrievers.errors import ColQwen3Error

_COMMANDS = (index, search, delete, info, copy, evaluate, serve, demo)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        The exit code.

    Raises:
        SystemExit: a wrong command line, or ``--help``.

    >>> main(["search", "revenue", "--index", "/nowhere/at/all"])
    1
    """
    parser = argparse.ArgumentParser(prog="colqwen3", description="Late-interaction retrieval over page images.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(subparsers)
    with console():
        options = parser.parse_args(arguments)
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    try:
        code: int = options.command(options)
    except ColQwen3Error as exc:
        print_message(exc)
        return 1
    except KeyboardInterrupt:
        print_message("interrupted")
        return 130
    except BrokenPipeError:  # such as `colqwen3 search ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as exc:
        print_message(f"{exc.filename or ''}: {exc.strerror or exc}")
        return 1
    return code
