"""``colqwen3 delete``: pages out of an index."""

from __future__ import annotations

import argparse
from typing import Any

from colqwen3_retrievers.cli.console import INDEX_HELP, json_filter, print_message
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.index.page_index import PageIndex


def add_parser(commands: Any) -> None:
    """Add the command to those of ``colqwen3``."""
    parser = commands.add_parser("delete", help="delete pages from an index")
    parser.add_argument("ids", nargs="*", metavar="ID", help="of a page, as search --json prints it")
    parser.add_argument("--where", metavar="JSON", help="a filter, as for search; with IDs, pages that match both")
    parser.add_argument("--index", required=True, metavar="INDEX", help=INDEX_HELP)
    parser.add_argument("--images-dir", metavar="DIR", help="the folder of page images, with Qdrant")
    parser.add_argument("--yes", action="store_true", help="delete the pages; without it they are only listed")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Delete pages, or list those that would be deleted.

    Returns:
        The exit code: 1 if pages were only listed.

    Raises:
        ColQwen3Error: no such index, a bad filter, or neither ids nor a filter.
    """
    where = json_filter(options.where) if options.where else None
    ids = options.ids or None
    with PageIndex.open(options.index, images_dir=options.images_dir, read_only=not options.yes) as index:
        if ids is None and not where:
            raise ConfigError("delete: give IDs, or --where to say which pages")
        if options.yes:
            print(f"{index.delete(ids, where=where)} deleted; {len(index)} pages in the index")
            return 0
        matches = index.ids(where)
        matches = matches if ids is None else sorted(set(matches) & set(ids))
    for page_id in matches:
        print(page_id)
    print_message(f"{len(matches)} pages would be deleted; --yes deletes them")
    return 1
