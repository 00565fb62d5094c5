"""One writer at a time: a file lock that the system drops with its process."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

from colqwen3_retrievers.errors import StoreError, StoreUnavailableError
from colqwen3_retrievers.fork import after_fork

if sys.platform == "win32":  # pragma: no cover - the same lock by the other system's call
    import msvcrt

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


_LOCKED_BYTE = 1 << 30  # past the text that names the holder, which others must be able to read


class WriterLock:
    """The right to write, held until :meth:`release` or the end of the process.

    It stays with the process that opened it: a forked child closes its copy of the file, which would keep the lock.

    Args:
        folder: the folder; ``writer.lock`` in it is created when missing and never removed, for removing a lock file
            lets two writers in.

    Raises:
        StoreUnavailableError: another writer holds it, in this process or another; the message says who.
        StoreError: the folder cannot be written to, or its file system has no locks.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "writer.lock"
        try:
            self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as exc:
            raise StoreError(f"{folder}: cannot be written to: {exc.strerror}") from exc
        after_fork(self._close)
        try:
            _lock(self._descriptor)
        except (BlockingIOError, PermissionError) as exc:
            who = _holder(path)
            self._close()
            raise StoreUnavailableError(
                f"{folder}: another writer has it open: {who}; read_only=True opens it"
            ) from exc
        except OSError as exc:
            self._close()
            raise StoreError(f"{folder}: its file system gives no lock: {exc.strerror}") from exc
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(holder).encode(), 0) if hasattr(os, "pwrite") else None
        except OSError:  # a full disk must not prevent opening, perhaps in order to delete
            pass

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._descriptor is not None:
            _unlock(self._descriptor)
            self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_bytes())
        own = holder["pid"] == os.getpid() and holder["host"] == socket.gethostname()
        return f"process {holder['pid']}{' (this one)' if own else ''} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"
