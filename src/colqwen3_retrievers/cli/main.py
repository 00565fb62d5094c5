"""The command line: ``colqwen3 index``, ``search``, ``delete``, ``info``, ``copy``, ``eval``, ``serve``, ``demo``.

Results go to standard output, everything else to standard error. Exit code 0 is success, 1 an error told on one line,
2 a wrong command line, 130 an interruption. An error may leave results: what a search found is printed, whatever
becomes of its pictures.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colqwen3_retrievers import __version__
from colqwen3_retrievers.cli.console import tell
from colqwen3_retrievers.cli.evaluate import add_eval_arguments, leave_model_open, run_eval
from colqwen3_retrievers.cli.index import add_delete_arguments, add_index_arguments, run_delete, run_index
from colqwen3_retrievers.cli.search import add_search_arguments, run_search
from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.engines.vllm.serving import add_serve_arguments, serve
from colqwen3_retrievers.errors import ColQwen3Error
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        The exit code.

    >>> main(["search", "revenue", "--index", "/nowhere/at/all"])
    1
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        code: int = options.command(options)
    except ColQwen3Error as exc:
        tell(exc)
        return 1
    except KeyboardInterrupt:
        tell("interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as exc:
        tell(f"{exc.filename or ''}: {exc.strerror or exc}")
        return 1
    return code


def _index(options: argparse.Namespace) -> int:
    return run_index(options, _encoder)


def _info(options: argparse.Namespace) -> int:
    if options.index:
        with PageIndex.open(options.index, read_only=True) as index:
            found: dict[str, Any] = {"index": str(options.index), "pages": len(index), **index.info.to_dict()}
            if isinstance(index.store, EmbeddedStore):
                found |= {"code_factor": index.store.code_factor, "code_bits": index.store.code_bits}
    else:
        found = _encoder(options).info.to_dict()
    if options.json:
        print(json.dumps(found, ensure_ascii=False, indent=1))
        return 0
    for name, value in found.items():
        print(f"{name:18} {', '.join(value) if isinstance(value, list) else value}")
    return 0


def _copy(options: argparse.Namespace) -> int:
    from colqwen3_retrievers.index.copy import copy_index

    done = copy_index(
        options.src,
        options.dst,
        batch_size=options.batch_size,
        show_progress=importlib.util.find_spec("tqdm") is not None,
        images=options.images,
        src_images_dir=options.src_images_dir,
        dst_images_dir=options.dst_images_dir,
    )
    print(f"{done.added} added, {done.updated} updated, {done.unchanged} unchanged; {done.images} images written")
    if done.missing_images:
        tell(f"{done.missing_images} pages have lost their image")
    return 0


def _eval(options: argparse.Namespace) -> int:
    return run_eval(options, _encoder, print)


def _demo(options: argparse.Namespace) -> int:
    from colqwen3_retrievers.demo.run import run_demo

    run_demo(Path(options.out), options.paths, model=options.model, questions=options.question)
    return 0


def _encoder(options: argparse.Namespace) -> ColQwen3Encoder:
    return ColQwen3Encoder(
        options.model,
        engine=options.engine,
        url=options.url or None,
        device=options.device,
        dtype=options.dtype,
        dim=options.dim,
        pool_factor=options.pool_factor,
        max_visual_tokens=options.max_visual_tokens,
        revision=options.revision,
        family=options.family,
        include_text=options.include_text,
    )


_URL = "of a vLLM server; repeat for a fleet (COLQWEN3_URL; the key from COLQWEN3_API_KEY)"
_PLACE = (
    "a folder, or qdrant://host:6333/collection (qdrants:// over TLS; the key from QDRANT_API_KEY), or, to try it "
    "without a server, qdrant+path:folder/collection"
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="colqwen3", description="Late-interaction retrieval over page images.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    index = commands.add_parser("index", help="add PDFs and images to an index")
    add_index_arguments(index, place=_PLACE)
    _model_options(index)
    index.set_defaults(command=_index)

    search = commands.add_parser("search", help="ask an index")
    add_search_arguments(search, place=_PLACE, url=_URL)
    search.set_defaults(command=run_search)

    delete = commands.add_parser("delete", help="forget pages of an index")
    add_delete_arguments(delete, place=_PLACE)
    delete.set_defaults(command=run_delete)

    info = commands.add_parser("info", help="tell what an index or a model is")
    info.add_argument("--index", metavar="INDEX", help=f"{_PLACE}; without it, the model is told about")
    info.add_argument("--json", action="store_true", help="print JSON")
    _model_options(info)
    info.set_defaults(command=_info)

    copy = commands.add_parser("copy", help="move an index to another store, encoding nothing again")
    copy.add_argument("src", metavar="SRC", help=_PLACE)
    copy.add_argument("dst", metavar="DST", help="the same, made when it is new")
    copy.add_argument("--batch-size", type=int, default=64, metavar="N", help="pages written together (64)")
    copy.add_argument(
        "--no-images", dest="images", action="store_false", help="leave stored page images where they are"
    )
    copy.add_argument("--src-images-dir", metavar="DIR", help="where the images of a Qdrant source lie")
    copy.add_argument("--dst-images-dir", metavar="DIR", help="where the images of a Qdrant destination are to lie")
    copy.set_defaults(command=_copy)

    evaluation = commands.add_parser("eval", help="judge retrieval on queries with known answers; compare two settings")
    add_eval_arguments(evaluation)
    _model_options(evaluation)
    leave_model_open(evaluation)
    evaluation.set_defaults(command=_eval)

    server = commands.add_parser("serve", help="print, or run, the command line of a vLLM server for a model")
    add_serve_arguments(server)
    server.set_defaults(command=serve)

    demo = commands.add_parser("demo", help="index some PDFs, ask questions, write a report")
    demo.add_argument("paths", nargs="*", metavar="PDF", help="PDFs of yours, beside the demo's own")
    demo.add_argument("--out", default="demo-output", metavar="DIR", help="where to write (demo-output)")
    demo.add_argument("--model", default="tiny", metavar="MODEL", help="checkpoint (tiny)")
    demo.add_argument("--question", action="append", default=[], metavar="TEXT", help="a question of yours; repeatable")
    demo.set_defaults(command=_demo)
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="MODEL", help="hub name, folder or 'tiny' (COLQWEN3_MODEL)")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub model")
    group.add_argument("--family", metavar="NAME", help="overrule the family told from the checkpoint")
    group.add_argument("--engine", default="auto", metavar="NAME", help="auto, torch, vllm or server")
    group.add_argument("--url", action="append", default=[], metavar="URL", help=_URL)
    group.add_argument("--device", metavar="NAME", help="cuda, mps or cpu")
    group.add_argument("--dtype", default="auto", metavar="NAME", help="auto, bfloat16, float16 or float32")
    group.add_argument("--dim", type=int, metavar="N", help="Matryoshka dim")
    group.add_argument("--pool-factor", type=int, default=1, metavar="N", help="document tokens pooled into one")
    group.add_argument("--max-visual-tokens", type=int, metavar="N", help="most visual tokens a page")
    group.add_argument("--include-text", action="store_true", help="put the text layer into the prompt")
