"""``colqwen3 index`` and ``colqwen3 delete``: files into an index, pages out of it.

What became of the pages is one line on standard output; what could not be used is told on standard error, a line each.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

from colqwen3_retrievers.cli.console import json_filter, tell
from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ColQwen3Error, ConfigError
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.pages.files import find_page_files, user_path
from colqwen3_retrievers.stores.location import is_qdrant

PASSWORD_VARIABLE = "COLQWEN3_PDF_PASSWORD"  # noqa: S105 - the name of a variable


def add_index_arguments(parser: argparse.ArgumentParser, *, place: str) -> None:
    """Declare the arguments of ``colqwen3 index``, those of the model aside.

    Args:
        parser: of the command.
        place: what an index's location may be.

    >>> parser = argparse.ArgumentParser()
    >>> add_index_arguments(parser, place="a folder")
    >>> parser.parse_args(["2024/", "--index", "my-index", "--root", "."]).root
    '.'
    """
    parser.add_argument("paths", nargs="+", metavar="PATH", help="file, folder or pattern")
    parser.add_argument("--index", required=True, metavar="INDEX", help=f"{place}; made when it is new")
    parser.add_argument(
        "--root",
        metavar="DIR",
        help="what pages are named from, a folder above every PATH; else each PATH itself. Give it, and always the "
        "same, where folders hold files of one name: report.pdf becomes 2024/report.pdf",
    )
    parser.add_argument(
        "--moved",
        action="store_true",
        help="the files lie elsewhere now and some have changed: put them in place of those known by the same name",
    )
    parser.add_argument("--images-dir", metavar="DIR", help="where page images are kept; needed with Qdrant")
    parser.add_argument(
        "--images", choices=("store", "reference", "none"), default="store", help="what to keep of them"
    )
    parser.add_argument(
        "--metadata",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="kept with every page of these files, to filter by; repeatable. A VALUE that is JSON is that: 2024, true",
    )
    parser.add_argument(
        "--password-file",
        metavar="FILE",
        help=f"a file of one line: the password of encrypted PDFs ({PASSWORD_VARIABLE})",
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="pages committed together")
    parser.add_argument(
        "--skip-errors",
        action="store_true",
        help="go on after a file or page that cannot be read or encoded; each is told of, and the exit code stays 0",
    )
    parser.add_argument(
        "--sync",
        action="store_true",
        help="also forget the pages of files that are gone under PATH. What cannot be read is told of at the end, and "
        "is exit code 1 without --skip-errors",
    )


def run_index(options: argparse.Namespace, encoder_of: Callable[[argparse.Namespace], ColQwen3Encoder]) -> int:
    """Add files to an index, or make it agree with them.

    Args:
        options: of :func:`add_index_arguments`.
        encoder_of: makes the encoder that the options ask for.

    Returns:
        The exit code.

    Raises:
        ColQwen3Error: what ends the call; pages kept before stay.
    """
    if is_qdrant(options.index) and options.images == "store" and options.images_dir is None:
        raise ConfigError("--images-dir: say where page images are kept beside Qdrant, or give --images none")
    metadata, password = _metadata(options.metadata), _password(options.password_file)
    encoder = encoder_of(options)
    if not options.sync:  # before an index is made: a path may be wrong. What is skipped is told of when it is read
        find_page_files(options.paths, root=options.root, on_error=_pass if options.skip_errors else "raise")
    with PageIndex.open(options.index, encoder, images=options.images, images_dir=options.images_dir) as index:
        same: dict[str, Any] = {
            "root": options.root, "metadata": metadata, "password": password, "moved": options.moved,
            "show_progress": True, "batch_size": options.batch_size,
        }  # fmt: skip
        if options.sync:
            done = index.sync(options.paths, **same)
            for failed in done.failed:
                tell(failed)
        else:
            done = index.add_files(options.paths, on_error=tell if options.skip_errors else "raise", **same)
        became = [f"{done.added} added", f"{done.updated} updated", f"{done.unchanged} unchanged"]
        became += [f"{done.removed} removed"] if options.sync else []
        became += [f"{len(done.failed)} failed"] if done.failed else []
        print(f"{', '.join(became)}; {len(index)} pages in the index")
    encoder.close()
    return 1 if done.failed and not options.skip_errors else 0


def add_delete_arguments(parser: argparse.ArgumentParser, *, place: str) -> None:
    """Declare the arguments of ``colqwen3 delete``.

    Args:
        parser: of the command.
        place: what an index's location may be.

    >>> parser = argparse.ArgumentParser()
    >>> add_delete_arguments(parser, place="a folder")
    >>> parser.parse_args(["a.pdf#page=1", "--index", "my-index"]).yes
    False
    """
    parser.add_argument("ids", nargs="*", metavar="ID", help="of a page, as search --json prints it")
    parser.add_argument("--where", metavar="JSON", help="a filter, as for search; with IDs, pages that meet both")
    parser.add_argument("--index", required=True, metavar="INDEX", help=place)
    parser.add_argument("--images-dir", metavar="DIR", help="where page images lie, with Qdrant")
    parser.add_argument("--yes", action="store_true", help="delete them; without it they are only listed")


def run_delete(options: argparse.Namespace) -> int:
    """Forget pages, or list those that would be.

    Args:
        options: of :func:`add_delete_arguments`.

    Returns:
        The exit code: 1 when pages were only listed.

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
        meant = index.ids(where)
        meant = meant if ids is None else sorted(set(meant) & set(ids))
    for page_id in meant:
        print(page_id)
    tell(f"{len(meant)} pages would be deleted; --yes deletes them")
    return 1


def _metadata(given: list[str]) -> dict[str, Any]:
    """Read KEY=VALUE pairs.

    >>> _metadata(["year=2024", "author=Ada", "code=007"])
    {'year': 2024, 'author': 'Ada', 'code': '007'}
    """
    made: dict[str, Any] = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ConfigError(f"--metadata: expected KEY=VALUE, got {pair!r}")
        try:
            made[key] = json.loads(value, parse_constant=_refuse)
        except ValueError:
            made[key] = value
    return made


def _refuse(constant: str) -> Any:
    raise ValueError(constant)  # NaN and the like: no JSON, and so a text


def _password(file: str | None) -> str | None:
    """Read the password of PDFs; no message may quote what the file holds."""
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


def _pass(_: ColQwen3Error) -> None:
    """Go on without a word."""
