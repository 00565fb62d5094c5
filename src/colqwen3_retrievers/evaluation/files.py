"""Reads and writes the files of evaluations; what cannot be written is reported before the work, not after it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from colqwen3_retrievers.atomic_files import write_atomically
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.pages.files import reason_of


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")  # read_text() would replace a "\r" inside an id
    except (OSError, ValueError) as exc:
        if isinstance(exc, UnicodeDecodeError):
            raise ConfigError(f"{path}: not UTF-8") from exc
        raise ConfigError(f"{path}: cannot be read: {reason_of(exc)}") from exc


def parse_json(text: str, where: str) -> Any:
    """Parse JSON, without NaN and infinities.

    Raises:
        ConfigError: not JSON, or nested too deeply.

    >>> parse_json('{"a": 1}', "a.json")
    {'a': 1}
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as exc:
        reason = "nested too deep" if isinstance(exc, RecursionError) else exc
        raise ConfigError(f"{where}: not JSON: {reason}") from exc


def write_text(path: str | Path, text: str) -> None:
    r"""Write a text file whole or not at all, following links; a pipe or a device is written to directly.

    Raises:
        ConfigError: it cannot be written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "new" / "a.txt"
    >>> write_text(path, "a\n")
    >>> path.read_text(), [file.name for file in path.parent.iterdir()]
    ('a\n', ['a.txt'])
    """
    try:
        data = text.encode("utf-8")
        if _is_device(Path(path)):
            Path(path).write_bytes(data)
            return
        target = Path(path).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_no_folder(target)

        def write(file: IO[bytes]) -> None:
            file.write(data)
            if target.exists():
                shutil.copymode(target, file.name)

        write_atomically(target, write, durable=True)
    except (OSError, ValueError, RuntimeError) as exc:  # ValueError: a NUL in the path; RuntimeError: a loop of links
        raise ConfigError(f"{path}: cannot be written: {reason_of(exc)}") from exc


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON, as :func:`write_text` does.

    Raises:
        ConfigError: it cannot be written.
    """
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1))


def check_outputs(outputs: Mapping[str, str | None], inputs: Iterable[str | Path] = ()) -> None:
    """Check that files can be written, and make their folders.

    Args:
        outputs: option -> path; None if it was not given.
        inputs: files and folders that must not change; an output must be none of them and in none of them.

    Raises:
        ConfigError: an output that cannot be written, that is an input, or that two options name. It names the option.

    >>> check_outputs({"--json": "set/qrels/test.tsv"}, ["set/qrels"])
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: --json set/qrels/test.tsv: it is in set/qrels, which is read
    """
    options: dict[Path, str] = {}
    inputs = list(inputs)
    for option, given in outputs.items():
        if given is None:
            continue
        try:
            if _is_device(Path(given)):
                continue
            path = Path(given).resolve()
            if path in options:
                raise ConfigError(f"{option} {given}: {options[path]} names it too")
            options[path] = option
            for name in inputs:
                source = Path(name).resolve()
                if path == source or (source.is_file() and path.is_file() and source.samefile(path)):
                    raise ConfigError(f"{option} {given}: it is read; give another name")
                if path.is_relative_to(source):
                    raise ConfigError(f"{option} {given}: it is in {name}, which is read")
            _check_writable(path)
        except ConfigError:
            raise
        except (OSError, ValueError, RuntimeError) as exc:
            raise ConfigError(f"{option} {given}: cannot be written: {reason_of(exc)}") from exc


def _check_writable(path: Path) -> None:
    _check_no_folder(path)
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(13, "it is read-only")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def _check_no_folder(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(21, "it is a folder")


def _is_device(path: Path) -> bool:
    """Return whether a path is that of a pipe or a terminal, which cannot be replaced; /dev/stdout may be a file."""
    return path.is_relative_to("/dev") or (path.exists() and not path.is_file() and not path.is_dir())


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
