"""``colqwen3 info``: the settings of an index or a model."""

from __future__ import annotations

import argparse
from typing import Any

from colqwen3_retrievers.cli.console import INDEX_HELP, add_model_options, make_encoder, print_json, print_message
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore


def add_parser(commands: Any) -> None:
    """Add the command to those of ``colqwen3``."""
    parser = commands.add_parser("info", help="show the settings of an index or a model")
    parser.add_argument("--index", metavar="INDEX", help=f"{INDEX_HELP}; without it, the model is shown")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="do not compare the codes of a folder with their checksums, which reads all code files",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_model_options(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print the settings.

    Returns:
        The exit code: 1 if codes of the index are damaged.

    Raises:
        ColQwen3Error: no such index or model.
    """
    damaged = 0
    if options.index:
        with PageIndex.open(options.index, read_only=True) as index:
            settings = {"index": str(options.index), "pages": len(index), **index.info.to_dict()}
            if isinstance(index.store, EmbeddedStore):
                settings |= {"code_factor": index.store.code_factor, "code_bits": index.store.code_bits}
                if not options.quick:
                    damaged = settings["damaged_codes"] = index.store.count_damaged_codes()
    else:
        settings = make_encoder(options).info.to_dict()
    if options.json:
        print_json(settings)
    else:
        for name, value in settings.items():
            print(f"{name:18} {', '.join(value) if isinstance(value, list) else value}")
    if damaged:
        print_message(
            f"the codes of {damaged:,} of {settings['pages']:,} pages are missing or not what was written (their "
            "checksum differs): PageIndex.compact() makes them again"
        )
    return 1 if damaged else 0
