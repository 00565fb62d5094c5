"""Shared by the commands: messages, filters, and the options that choose a model."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any, Final

from colqwen3_retrievers.encoding.encoder import ColQwen3Encoder
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.evaluation.files import parse_json

INDEX_HELP: Final = (
    "a folder, or qdrant://host:6333/collection (qdrants:// over TLS; the key from QDRANT_API_KEY), or, without a "
    "server, qdrant+path:folder/collection"
)
URL_HELP: Final = "of a vLLM server; repeat for a fleet (COLQWEN3_URL; the key from COLQWEN3_API_KEY)"

MODEL_DEFAULTS: Final[dict[str, Any]] = {
    "model": None, "revision": None, "family": None, "engine": "auto", "url": [], "device": None, "dtype": "auto",
    "dim": None, "pool_factor": 1, "max_visual_tokens": None, "include_text": False,
}  # fmt: skip
"""Model options with their defaults; each is an argument of :class:`ColQwen3Encoder`."""


def print_message(message: object) -> None:
    """Print a message to standard error, on one line.

    >>> print_message(ConfigError("k: expected a whole number"))
    """
    print(f"colqwen3: {' '.join(str(message).split())}", file=sys.stderr)


def print_json(value: object) -> None:
    """Print a value as JSON, in ASCII where standard output cannot show every character.

    >>> print_json({"label": "iv"})
    {
     "label": "iv"
    }
    """
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    print(json.dumps(value, ensure_ascii=encoding != "utf8", indent=1))


@contextlib.contextmanager
def console() -> Iterator[None]:
    """Set up standard output and the library's log for a command.

    A character that standard output cannot show is printed as an escape, unless the user chose another treatment
    (``PYTHONIOENCODING=cp1252:replace``). Warnings of the library are messages like those of the command.
    """
    log, handler = logging.getLogger("colqwen3_retrievers"), _MessageHandler(logging.WARNING)
    stream: object = sys.stdout
    errors = stream.errors if isinstance(stream, io.TextIOWrapper) else None
    if isinstance(stream, io.TextIOWrapper) and errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="backslashreplace")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:
            with contextlib.suppress(OSError):  # it writes what is pending, perhaps to a pipe that was closed
                stream.reconfigure(errors=errors)


class _MessageHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print_message(record.getMessage())


def json_filter(text: str) -> dict[str, Any]:
    """Parse the value of ``--where``; names and operators are checked by the index.

    Raises:
        ConfigError: not a JSON object.

    >>> json_filter('{"page": {"$lte": 9}}')
    {'page': {'$lte': 9}}
    """
    value = parse_json(text, "--where")
    if not isinstance(value, dict):
        raise ConfigError("--where: expected a JSON object")
    return value


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of :data:`MODEL_DEFAULTS` to a command.

    >>> parser = argparse.ArgumentParser()
    >>> add_model_options(parser)
    >>> parser.parse_args(["--dim", "128"]).dim
    128
    """
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="MODEL", help="hub name, folder or 'tiny' (COLQWEN3_MODEL)")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub model")
    group.add_argument("--family", metavar="NAME", help="overrides the family detected from the checkpoint")
    group.add_argument("--engine", metavar="NAME", help="auto, torch, vllm or server (auto)")
    group.add_argument("--url", action="append", metavar="URL", help=URL_HELP)
    group.add_argument("--device", metavar="NAME", help="cuda, mps or cpu")
    group.add_argument("--dtype", metavar="NAME", help="auto, bfloat16, float16 or float32 (auto)")
    group.add_argument("--dim", type=int, metavar="N", help="Matryoshka dim")
    group.add_argument("--pool-factor", type=int, metavar="N", help="document tokens pooled into one (1)")
    group.add_argument("--max-visual-tokens", type=int, metavar="N", help="maximum visual tokens a page")
    group.add_argument("--include-text", action="store_true", help="put the text layer into the prompt")
    parser.set_defaults(**MODEL_DEFAULTS)


def make_encoder(options: argparse.Namespace) -> ColQwen3Encoder:
    """Make the encoder that the model options describe.

    Raises:
        ConfigError: an option that cannot be used.

    >>> make_encoder(argparse.Namespace(**MODEL_DEFAULTS | {"model": "tiny", "dim": 64})).info.dim
    64
    """
    settings = {name: getattr(options, name) for name in MODEL_DEFAULTS}
    return ColQwen3Encoder(**settings | {"url": options.url or None})
