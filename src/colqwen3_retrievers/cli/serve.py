"""``colqwen3 serve``: the command line of a vLLM server, printed or run."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import Any

from colqwen3_retrievers.engines.options import VLLMOptions
from colqwen3_retrievers.engines.vllm.serving import (
    DTYPES,
    LAUNCHERS,
    serve_command,
    server_environment,
    show_command,
)
from colqwen3_retrievers.errors import ConfigError, EngineError
from colqwen3_retrievers.models.families import FAMILIES

_ARGUMENTS = (
    "family", "folder", "revision", "host", "port", "served_name", "dtype", "max_visual_tokens", "videos", "launcher",
)  # fmt: skip


def add_parser(commands: Any) -> None:
    """Add the command to those of ``colqwen3``."""
    parser = commands.add_parser("serve", help="print, or run, the command line of a vLLM server for a model")
    add = parser.add_argument
    add("model", metavar="MODEL", help="hub name, folder or 'tiny'")
    add("--run", action="store_true", help="start the server instead of printing its command line")
    add("--family", choices=tuple(FAMILIES), help="of a model the family table does not name")
    add("--folder", metavar="DIR", help="write what vLLM needs beside the weights, and serve from there")
    add("--revision", metavar="REV", help="branch, tag or commit of a hub model")
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", type=int, default=8000, help="(8000)")
    add("--served-name", metavar="NAME", help="the name clients ask for (MODEL)")
    add("--dtype", default="bfloat16", choices=DTYPES, help="of the backbone (bfloat16)")
    add("--max-visual-tokens", type=int, metavar="N", help="most visual tokens a page")
    add("--videos", action="store_true", help="let clients say the times of a video's frames")
    add("--max-model-len", type=int, metavar="N", help="most tokens of one input")
    add("--gpus", type=int, default=1, metavar="N", help="GPUs the model is cut over (1)")
    share = VLLMOptions().gpu_memory_utilization
    add("--gpu-memory", type=float, default=share, metavar="SHARE", help=f"share of each GPU's memory ({share})")
    add("--launcher", choices=LAUNCHERS, default="vllm", help="vllm serve, or python -m ...")
    add("--vllm-options", default="", metavar="TEXT", help="further options for vLLM, in one text")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print the server's command line, or with ``--run`` replace this process by the server.

    Raises:
        ConfigError: an invalid argument.
        CheckpointError: a folder that is no checkpoint.
        EngineError: vLLM is not installed here.
    """
    try:
        extra = shlex.split(options.vllm_options)
    except ValueError as exc:
        raise ConfigError(f"--vllm-options: {exc}") from exc
    engine = VLLMOptions(
        gpu_memory_utilization=options.gpu_memory,
        tensor_parallel_size=options.gpus,
        max_model_len=options.max_model_len,
    )
    arguments = {name: getattr(options, name) for name in _ARGUMENTS}
    command = serve_command(options.model, options=engine, extra=extra, **arguments)
    if not options.run:
        print(show_command(command))
        return 0
    sys.stdout.flush()
    try:
        os.execvpe(command[0], command, server_environment())  # noqa: S606 - replacing this process is the point
    except OSError as exc:
        raise EngineError(f"{command[0]}: cannot be started: {exc.strerror}; is vLLM installed here?") from exc
