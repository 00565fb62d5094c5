"""Query encoding on the CPU: one by one, from 64 threads at once, and as one list.

    build/peers/bin/python benchmarks/queries.py [--write]       # sh benchmarks/peers.sh builds that environment
    python benchmarks/queries.py --quick                         # seconds; without peers where they are not installed

"From 64 threads" is what a server sees: each thread asks for one query of its own. Ours gathers them into batches;
the peers encode each for itself, all at once or one after the other behind a lock, and the better of the two counts.
"As one list" is a single call with 64 queries, in a batch of 64 for the peers. With the same weights and precision,
each in a process; all take turns.
"""

from __future__ import annotations

import statistics
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from encoding import worst_cosine
from participants import ask_options, participants
from peers import Peer, present
from random_checkpoint import checkpoints
from reporting import in_turn, machine, publish, ratio, table

AT_ONCE = 64


def draw_queries(count: int) -> list[str]:
    """Questions of 3 to 12 words."""
    rng = np.random.default_rng(3)
    text = "what was the revenue of in which region total payable before tax supply nickel alloy 2024 growth"
    return [" ".join(rng.choice(text.split(), rng.integers(3, 13))) for _ in range(count)]


def one_by_one(peer: Peer, queries: list[str]) -> list[np.ndarray]:
    """One after the other."""
    return [peer.queries([query], 1)[0] for query in queries]


def from_threads(peer: Peer, queries: list[str]) -> list[np.ndarray]:
    """Each from a thread of its own, at once."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda query: peer.queries([query], 1)[0], queries))


def from_threads_behind_a_lock(peer: Peer, queries: list[str]) -> list[np.ndarray]:
    """Each from a thread of its own, of which one at a time encodes."""
    lock = threading.Lock()

    def one(query: str) -> np.ndarray:
        with lock:
            return peer.queries([query], 1)[0]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, queries))


def as_one_list(peer: Peer, queries: list[str]) -> list[np.ndarray]:
    """In one call, in one batch."""
    return peer.queries(queries, len(queries))


THREADS = f"from {AT_ONCE} threads"
WAYS = {"one by one": (one_by_one,), THREADS: (from_threads, from_threads_behind_a_lock), "as one list": (as_one_list,)}
"""What is compared, and by which ways; where there are several, each participant's fastest counts."""


def measure(name: str, model: str | Path, dtype: str, queries: list[str], rounds: int) -> list[list[object]]:
    """Measure one checkpoint: rows of the table."""
    with participants(present(), model, dtype) as everybody:
        ways = {
            (who.name, way): lambda who=who, way=way: who.seconds(way, queries)
            for who in everybody
            for several in WAYS.values()
            for way in several
        }
        taken = in_turn(ways, rounds, clock=lambda way: way())
        times = {
            (who.name, how): min((taken[who.name, way] for way in several), key=statistics.median)
            for who in everybody
            for how, several in WAYS.items()
        }
        ours = everybody[0]
        made = ours.result(as_one_list, queries)
        rows: list[list[object]] = []
        for who in everybody:
            row: list[object] = [name, dtype, who.name]
            for how in WAYS:
                theirs = times[who.name, how]
                faster = "" if who is ours else f" (**{ratio(times[ours.name, how], theirs):.2f}x**)"
                row.append(f"{len(queries) / statistics.median(theirs):.0f}{faster}")
            row.append("" if who is ours else f"{worst_cosine(made, who.result(as_one_list, queries)):.6f}")
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Measure and print."""
    options = ask_options(__file__, __doc__, rounds=5)
    queries = draw_queries(AT_ONCE)
    rows: list[list[object]] = []
    with checkpoints(options.models) as opened:
        for name, model in opened:
            for dtype in options.dtypes:
                rows += measure(name, model, dtype, queries, options.rounds)
    columns = (
        "checkpoint", "precision", "who", "one by one", THREADS, "as one list",
        "worst cosine of a token with ours",
    )  # fmt: skip
    text = f"""# Query encoding on a CPU

Made by `build/peers/bin/python benchmarks/queries.py --write` on {machine("transformers", "numpy")}.

Queries a second, and in brackets how many times faster ours is (median of the ratios within {options.rounds} rounds).
{AT_ONCE} queries of 3 to 12 words and 10 augmentation tokens; asked for one after the other, by {AT_ONCE} threads with
one query each (at once, or one at a time behind a lock: whichever is faster), and in one call; everyone in a process of
its own. `tiny` comes with the package; `mid` is a random checkpoint of 297 M parameters in Qwen3-VL's shape.

{table(columns, rows)}
"""
    publish(__file__, text, write=options.write)


if __name__ == "__main__":
    main()
