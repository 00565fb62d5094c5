"""``colqwen3 index``: files into an index.

The counts of pages are one line on standard output; each file or page that was skipped is one line on standard error.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from colqwen3_retrievers.cli.console import INDEX_HELP, add_model_options, make_encoder, print_message
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.evaluation.files import parse_json
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.pages.files import find_page_files, user_path
from colqwen3_retrievers.stores.location import is_qdrant

PASSWORD_VARIABLE = "COLQWEN3_PDF_PASSWORD"  # noqa: S105 - the name of a variable


def add_parser(commands: Any) -> None:
    """Add the command to those of ``colqwen3``."""
    parser = commands.add_parser("index", help="add PDFs and images to an index")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="file, folder or pattern")
    parser.add_argument("--index", required=True, metavar="INDEX", help=f"{INDEX_HELP}; made if it is new")
    parser.add_argument(
        "--root",
        metavar="DIR",
        help="a folder above every PATH that page names start from; by default each PATH itself. Required, and the "
        "same each time, if folders hold files of one name: report.pdf becomes 2024/report.pdf",
    )
    parser.add_argument(
        "--moved",
        action="store_true",
        help="the files have been moved and some have changed: replace those known by the same name",
    )
    parser.add_argument("--images-dir", metavar="DIR", help="the folder for page images; required with Qdrant")
    parser.add_argument(
        "--images", choices=("store", "reference", "none"), default="store", help="how page images are kept (store)"
    )
    parser.add_argument(
        "--metadata",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="stored with every page of these files, for filters; repeatable. A VALUE may be JSON: 2024, true",
    )
    parser.add_argument(
        "--password-file",
        metavar="FILE",
        help=f"a file of one line: the password of encrypted PDFs ({PASSWORD_VARIABLE})",
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="pages committed together (16)")
    parser.add_argument(
        "--skip-errors",
        action="store_true",
        help="skip files and pages that cannot be read or encoded; each is reported, and the exit code is 0",
    )
    parser.add_argument(
        "--sync",
        action="store_true",
        help="also delete the pages of files that no longer exist under PATH. Files that cannot be read are reported "
        "at the end; the exit code is then 1 without --skip-errors",
    )
    add_model_options(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Add files to an index, or synchronise it with them.

    Returns:
        The exit code.

    Raises:
        ColQwen3Error: the first error, without ``--skip-errors``; pages committed before it stay.
    """
    if is_qdrant(options.index) and options.images == "store" and options.images_dir is None:
        raise ConfigError("--images-dir: say where page images are kept beside Qdrant, or give --images none")
    metadata, password = _metadata(options.metadata), _password(options.password_file)
    encoder = make_encoder(options)
    if not options.sync:  # a wrong path is an error before an index is made; what is skipped is reported when read
        find_page_files(options.paths, root=options.root, on_error=_ignore if options.skip_errors else "raise")
    with PageIndex.open(options.index, encoder, images=options.images, images_dir=options.images_dir) as index:
        settings: dict[str, Any] = {
            "root": options.root, "metadata": metadata, "password": password, "moved": options.moved,
            "show_progress": True, "batch_size": options.batch_size,
        }  # fmt: skip
        if options.sync:
            result = index.sync(options.paths, **settings)
            for failure in result.failed:
                print_message(failure)
        else:
            result = index.add_files(
                options.paths, on_error=print_message if options.skip_errors else "raise", **settings
            )
        counts = [f"{result.added} added", f"{result.updated} updated", f"{result.unchanged} unchanged"]
        counts += [f"{result.removed} removed"] if options.sync else []
        counts += [f"{len(result.failed)} failed"] if result.failed else []
        print(f"{', '.join(counts)}; {len(index)} pages in the index")
    encoder.close()
    return 1 if result.failed and not options.skip_errors else 0


def _ignore(_: object) -> None:
    pass


def _metadata(pairs: list[str]) -> dict[str, Any]:
    """Parse KEY=VALUE pairs.

    >>> _metadata(["year=2024", "author=Ada", "code=007"])
    {'year': 2024, 'author': 'Ada', 'code': '007'}
    """
    metadata: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ConfigError(f"--metadata: expected KEY=VALUE, got {pair!r}")
        try:
            metadata[key] = parse_json(value, pair)
        except ConfigError:  # NaN and the like too
            metadata[key] = value
    return metadata


def _password(file: str | None) -> str | None:
    """Read the password of PDFs; no message quotes the content of the file."""
    if file is None:
        return os.environ.get(PASSWORD_VARIABLE) or None
    try:
        password = user_path(file).read_text(encoding="utf-8").rstrip("\r\n")
    except OSError as exc:
        raise ConfigError(f"--password-file: {file}: cannot be read: {exc.strerror or exc}") from exc
    except ValueError:
        raise ConfigError(f"--password-file: {file}: not UTF-8 text") from None
    if not password or "\n" in password:
        raise ConfigError(f"--password-file: {file}: expected one line, the password")
    return password
