"""``colqwen3 copy``: an index into another store."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from colqwen3_retrievers.cli.console import INDEX_HELP, print_message
from colqwen3_retrievers.index.copy import copy_index


def add_parser(commands: Any) -> None:
    """Add the command to those of ``colqwen3``."""
    parser = commands.add_parser("copy", help="copy an index to another store without encoding its pages again")
    parser.add_argument("src", metavar="SRC", help=INDEX_HELP)
    parser.add_argument("dst", metavar="DST", help="likewise; made if it is new")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="pages written together (64)")
    parser.add_argument("--no-images", dest="images", action="store_false", help="do not copy stored page images")
    parser.add_argument("--src-images-dir", metavar="DIR", help="the folder of the images of a Qdrant source")
    parser.add_argument("--dst-images-dir", metavar="DIR", help="the folder for the images of a Qdrant destination")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Copy the index, and return the exit code.

    Raises:
        ColQwen3Error: no such index, or one that cannot be copied there.
    """
    result = copy_index(
        options.src, options.dst, batch_size=options.batch_size, images=options.images,
        src_images_dir=options.src_images_dir, dst_images_dir=options.dst_images_dir,
        show_progress=importlib.util.find_spec("tqdm") is not None,
    )  # fmt: skip
    counts = f"{result.added} added, {result.updated} updated, {result.unchanged} unchanged"
    print(f"{counts}; {result.images} images written")
    if result.missing_images:
        print_message(f"{result.missing_images} pages have lost their image")
    return 0
