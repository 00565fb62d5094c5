"""Participants of a benchmark, each in a process of its own.

Two that share a process slow each other down: OpenMP gives each calling thread a pool of its own, and once the pools
have more threads than the machine has cores they stop to wait actively. Nobody would run them so.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from peers import Peer, open_peer


class Participant:
    """One way to encode, behind a pipe.

    Args:
        who: see :data:`peers.PEERS`.
        model: checkpoint.
        dtype: its precision.
    """

    def __init__(self, who: str, model: str | Path, dtype: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, who, model, dtype), daemon=True)
        self._process.start()
        theirs.close()
        self.name: str = self._pipe.recv()

    def seconds(self, work: Callable[..., Any], *given: object) -> float:
        """Run ``work(peer, *given)`` there and give how long it took; ``work`` is a module's own function."""
        self._pipe.send((work, given, False))
        return float(self._pipe.recv()[0])

    def result(self, work: Callable[..., Any], *given: object) -> Any:
        """Run ``work(peer, *given)`` there and give what it gave."""
        self._pipe.send((work, given, True))
        return self._pipe.recv()[1]

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10)
        self._process.terminate()


@contextlib.contextmanager
def participants(names: Sequence[str], model: str | Path, dtype: str) -> Iterator[list[Participant]]:
    """Start participants, and end them."""
    with contextlib.ExitStack() as stack:
        started = []
        for who in names:
            started.append(Participant(who, model, dtype))
            stack.callback(started[-1].close)
        yield started


def ask_options(script: str, description: str | None, *, rounds: int) -> argparse.Namespace:
    """Read the options that benchmarks of encoding have in common; ``--quick`` settles models, precisions and rounds.

    Args:
        script: its ``__file__``.
        description: its ``__doc__``, whose first line is shown.
        rounds: how many without being told.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0] if description else None)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--models", nargs="*", default=("tiny", "mid"), choices=("tiny", "small", "mid"))
    parser.add_argument("--dtypes", nargs="*", default=("float32", "bfloat16"))
    parser.add_argument("--quick", action="store_true", help="a little of a small checkpoint, one round")
    parser.add_argument("--write", action="store_true", help=f"put the table into benchmarks/{Path(script).stem}.md")
    options = parser.parse_args()
    if options.quick:
        options.models, options.dtypes, options.rounds = ("small",), ("float32",), 1
    return options


def _serve(pipe: Connection, who: str, model: str | Path, dtype: str) -> None:
    peer: Peer = open_peer(who, model, dtype)
    pipe.send(peer.name)
    while True:
        try:
            work, given, wanted = pipe.recv()
        except EOFError:
            return
        start = time.perf_counter()
        found = work(peer, *given)
        seconds = time.perf_counter() - start
        pipe.send((seconds, found if wanted else None))
