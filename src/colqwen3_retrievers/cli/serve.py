"""``colqwen3 serve``: the command line of a vLLM server, printed or run."""

from __future__ import annotations

from typing import Any

from colqwen3_retrievers.engines.vllm.serving import add_serve_arguments, serve


def add_parser(commands: Any) -> None:
    """Add the command to those of ``colqwen3``."""
    parser = commands.add_parser("serve", help="print, or run, the command line of a vLLM server for a model")
    add_serve_arguments(parser)
    parser.set_defaults(command=serve)
