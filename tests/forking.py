"""Forks in tests: a child's answer, or that it hangs; and a thread of the parent that holds something."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def answer_of_child(work: Callable[[], str], seconds: float = 30) -> str:
    """Fork, do some work in the child, and return what it returned, what it raised, or "hangs"."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = work()
        except BaseException as exc:
            answer = f"{type(exc).__name__}: {exc}"
        os.write(send, answer.encode())
        os._exit(0)
    os.close(send)
    ready, _, _ = select.select([receive], [], [], seconds)
    if not ready:
        os.kill(child, signal.SIGKILL)
    answer = os.read(receive, 1 << 16).decode() if ready else "hangs"
    os.close(receive)
    os.waitpid(child, 0)
    return answer


@contextmanager
def busy(work: Callable[[Callable[[], object]], object]) -> Iterator[threading.Thread]:
    """Start a thread, and go on once it is where it calls the given function, which blocks until the block ends.

    In a child it does not block.
    """
    arrived, leave, parent = threading.Event(), threading.Event(), os.getpid()

    def block() -> None:
        if os.getpid() == parent:
            arrived.set()
            leave.wait(60)

    thread = threading.Thread(target=work, args=(block,))
    thread.start()
    if not arrived.wait(60):
        raise AssertionError("the thread never came there")
    try:
        yield thread
    finally:
        leave.set()
        thread.join(60)


@contextmanager
def held_elsewhere(block: Any) -> Iterator[None]:
    """Hold a lock, or be in another ``with`` block, in another thread."""

    def hold(stay: Callable[[], object]) -> None:
        with block:
            stay()

    with busy(hold):
        yield


@contextmanager
def again_and_again(work: Callable[[], object]) -> Iterator[list[BaseException]]:
    """Do some work in another thread for as long as the block lasts; yields its errors."""
    over, errors = threading.Event(), list[BaseException]()

    def repeat() -> None:
        while not over.is_set():
            try:
                work()
            except BaseException as exc:
                errors.append(exc)
                return

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield errors
    finally:
        over.set()
        thread.join(60)
