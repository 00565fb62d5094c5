"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_atomically(path: Path, data: bytes | Callable[[IO[bytes]], object], *, durable: bool = False) -> None:
    """Write a file under another name, then put it in its place, whatever stood there.

    Threads and processes may write the same file: each writes its own, and the last one stays.

    Args:
        path: of the file; its folder exists.
        data: the content, or a function that writes it to an open binary file.
        durable: whether the content is on the disk before the file takes its place (fsync).

    Raises:
        OSError: it cannot be written; nothing is left behind.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.txt"
    >>> write_atomically(path, b"whole")
    >>> path.read_bytes(), len(list(path.parent.iterdir()))
    (b'whole', 1)
    """
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")  # never longer than a name may be
    try:
        with partial.open("wb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
