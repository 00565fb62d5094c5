"""The command line of a vLLM server for a checkpoint, with everything that its family needs.

A server started otherwise answers, too, but with embeddings of another prompt, another size of image or without the
projection's bias, and without an error. This command line prevents that:

- its architecture is known to this package's vLLM plugin only: without the plugin vLLM does not start;
- its chat template writes the family's exact prompts, for our client and for any image or text message;
- images are bounded as in the family's training; prefix caching and chunked prefill, which drop rows, are off.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.engines.options import VLLMOptions
from colqwen3_retrievers.engines.vllm.folder import NEEDED_BY_VLLM, config_overrides, write_folder
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.models.checkpoint import open_checkpoint
from colqwen3_retrievers.models.families import FAMILIES, VISUAL_TOKEN_SIDE, Family, get_family
from colqwen3_retrievers.pages.files import user_path

CHAT_TEMPLATES = Path(__file__).parent / "chat_templates"
"""Folder of the chat templates, one file a family, written by ``scripts/chat_templates.py``."""

DTYPES = ("auto", "bfloat16", "float16", "float32")
LAUNCHERS = ("vllm", "python")

_NATIVE_CONTEXT = 262_144  # of Qwen3-VL; a hub checkpoint is not downloaded to read its own


class _ServedModel(NamedTuple):
    """Facts about a checkpoint that a command line needs."""

    name: str  # hub name or folder, for the server
    family: Family
    min_pixels: int  # of an image
    max_pixels: int
    context_length: int


def _served_model(
    model: str | os.PathLike[str], family: str | None, folder: str | os.PathLike[str] | None, revision: str | None
) -> _ServedModel:
    """Return the facts about a checkpoint; a hub model is not downloaded: vLLM does so, on the serving machine."""
    name = os.fspath(model)
    local = name == "tiny" or user_path(name).exists()
    if local or folder is not None or name.count("/") != 1:
        checkpoint = open_checkpoint(name, family=family, revision=None if local else revision)
        where = checkpoint.folder.absolute()
        if folder is not None:
            where = user_path(folder).absolute()
            write_folder(checkpoint, where)
        missing = [file for file in NEEDED_BY_VLLM if not (where / file).exists()]
        if missing:
            raise ConfigError(
                f"{name}: vLLM needs {' and '.join(missing)}, which the checkpoint lacks; "
                "name a folder for them (--folder DIR, folder=)"
            )
        pixels = checkpoint.min_pixels, checkpoint.max_pixels
        return _ServedModel(str(where), checkpoint.family, *pixels, checkpoint.context_length)
    rows = [row for row in FAMILIES.values() if name in row.models]
    if family is None and not rows:
        raise ConfigError(f"{name}: not a model the family table names; give family= one of {', '.join(FAMILIES)}")
    row = get_family(family) if family else rows[0]
    return _ServedModel(name, row, row.min_pixels, row.max_pixels, _NATIVE_CONTEXT)


def serve_command(
    model: str | os.PathLike[str],
    *,
    family: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    served_name: str | None = None,
    dtype: str = "bfloat16",
    max_visual_tokens: int | None = None,
    videos: bool = False,
    options: VLLMOptions | None = None,
    launcher: str = "vllm",
    extra: Sequence[str] = (),
) -> list[str]:
    """Build the command line of a vLLM server for a checkpoint.

    The API key is not part of it, since command lines are visible to every user of a machine: the server reads
    ``VLLM_API_KEY``, and requires it on every path that encodes.

    Args:
        model: hub name, folder or ``"tiny"``.
        family: its family, where the family table does not name the model.
        folder: a folder to write, with the files vLLM needs and links to the weights, to serve from. Needed when the
            checkpoint's own folder lacks those files; a hub model is then downloaded here, and otherwise by vLLM.
        revision: branch, tag or commit of a hub model.
        host: address to listen on; vLLM's own default is every address.
        port: from 1 to 65535.
        served_name: the model's name for clients; None takes ``model``.
        dtype: ``"bfloat16"``, ``"float16"`` (GPUs before Ampere), ``"float32"`` or ``"auto"``, with which vLLM makes a
            float32 checkpoint float16; the projection stays float32.
        max_visual_tokens: most visual tokens a page (32 x 32 pixels each); None takes the family's bound.
        videos: whether clients may send the times of a video's frames, as ours does; vLLM can allow this only together
            with all other settings of its image processor, so it is off by default.
        options: GPUs, memory, length; the same as of the in-process engine.
        launcher: ``"vllm"`` for ``vllm serve``, or ``"python"`` for ``python -m vllm.entrypoints.openai.api_server``.
        extra: further arguments for vLLM.

    Returns:
        The arguments, the program first.

    Raises:
        ConfigError: an invalid argument, a family that cannot be identified, or files that vLLM needs are missing and
            no ``folder`` is given.
        CheckpointError: a folder that is no checkpoint.
        EngineError: ``folder`` cannot be written.

    >>> command = serve_command("TomoroAI/tomoro-colqwen3-embed-4b", port=8123)
    >>> command[:5]
    ['vllm', 'serve', 'TomoroAI/tomoro-colqwen3-embed-4b', '--runner', 'pooling']
    """
    options = options or VLLMOptions()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}: expected {', '.join(DTYPES)}")
    if launcher not in LAUNCHERS:
        raise ConfigError(f"launcher {launcher!r}: expected {' or '.join(LAUNCHERS)}")
    port = whole_number(port, "port", least=1, most=65_535)
    if any(part.partition("=")[0].replace("_", "-") == "--api-key" for part in extra):  # vLLM takes both spellings
        raise ConfigError("--api-key: every user of the machine sees a command line; set VLLM_API_KEY instead")
    served = _served_model(model, family, folder, revision)
    max_pixels = _max_pixels(served, max_visual_tokens)
    row = served.family
    size = {"shortest_edge": min(served.min_pixels, max_pixels), "longest_edge": max_pixels}  # areas, despite the names
    length = options.context_length(served.context_length, max_pixels // VISUAL_TOKEN_SIDE**2)
    command = ["vllm", "serve", served.name]
    if launcher == "python":
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", served.name]
    command += ["--runner", "pooling", "--served-model-name", served_name or os.fspath(model)]
    if revision is not None and served.name == os.fspath(model):
        command += ["--revision", revision]
    command += ["--host", host, "--port", str(port), "--dtype", dtype, "--max-model-len", str(length)]
    command += ["--hf-overrides", json.dumps(config_overrides(row))]
    command += ["--mm-processor-kwargs", json.dumps({"size": size})]
    command += ["--limit-mm-per-prompt", json.dumps({"image": 1, "video": 1 if row.video else 0})]
    if videos:
        if row.video is None:
            raise ConfigError(f"videos: family {row.name} has no prompt for them")
        command += ["--trust-request-mm-kwargs"]
    command += ["--chat-template", str(CHAT_TEMPLATES / f"{row.name}.jinja")]
    command += ["--chat-template-content-format", "openai"]
    command += ["--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
    command += ["--middleware", "colqwen3_retrievers.engines.vllm.key.RequireKey"]
    command += ["--gpu-memory-utilization", str(options.gpu_memory_utilization)]
    if options.tensor_parallel_size > 1:
        command += ["--tensor-parallel-size", str(options.tensor_parallel_size)]
    if options.enforce_eager:
        command += ["--enforce-eager"]
    return [*command, *extra]


def _max_pixels(served: _ServedModel, max_visual_tokens: int | None) -> int:
    if max_visual_tokens is None:
        return served.max_pixels
    bound = served.max_pixels // VISUAL_TOKEN_SIDE**2
    max_visual_tokens = whole_number(max_visual_tokens, "max_visual_tokens", least=1)
    if max_visual_tokens > bound:
        raise ConfigError(f"max_visual_tokens {max_visual_tokens}: {served.name} reads at most {bound} a page")
    return max_visual_tokens * VISUAL_TOKEN_SIDE**2


def server_environment() -> dict[str, str]:
    """Return the environment of a server: this process's, with the API key where vLLM reads it.

    ``VLLM_API_KEY`` is taken from ``COLQWEN3_API_KEY`` when only that is set, so that one variable serves both ends.
    """
    environment = dict(os.environ)
    key = environment.get("COLQWEN3_API_KEY")
    if key and not environment.get("VLLM_API_KEY"):
        environment["VLLM_API_KEY"] = key
    return environment


def show_command(command: Sequence[str]) -> str:
    r"""Return a command to paste into a shell, one option a line.

    >>> print(show_command(["vllm", "serve", "a model", "--port", "8000", "--enforce-eager"]))
    vllm serve 'a model' \
      --port 8000 \
      --enforce-eager
    """
    lines: list[str] = []
    for part in command:
        if part.startswith("--") and lines:
            lines.append(shlex.quote(part))
        elif lines:
            lines[-1] += " " + shlex.quote(part)
        else:
            lines.append(shlex.quote(part))
    return " \\\n  ".join(lines)
