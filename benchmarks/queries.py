"""Query encoding on the CPU: one by one, from 64 threads at once, and as one list.

    build/peers/bin/python benchmarks/queries.py [--write]       # sh benchmarks/peers.sh builds that environment
    python benchmarks/queries.py --quick                         # seconds; without peers where they are not installed

"From 64 threads" is what a server sees: each thread asks for one query of its own. Ours gathers them into batches;
the peers encode each for itself, which their callers may do from several threads. "As one list" is a single call with
64 queries, in a batch of 64 for the peers. With the same weights and precision; all take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from encoding import worst_cosine
from peers import open_peers
from random_checkpoint import write_checkpoint
from reporting import in_turn, machine, publish, ratio, table

from colqwen3_retrievers import ColQwen3Encoder

AT_ONCE = 64
Call = Callable[[Sequence[str]], Sequence[object]]


def draw_queries(count: int) -> list[str]:
    """Questions of 3 to 12 words."""
    rng = np.random.default_rng(3)
    text = "what was the revenue of in which region total payable before tax supply nickel alloy 2024 growth"
    return [" ".join(rng.choice(text.split(), rng.integers(3, 13))) for _ in range(count)]


def ways_of(call: Call, queries: list[str], pool: ThreadPoolExecutor) -> dict[str, Callable[[], object]]:
    """The three ways of asking."""
    return {
        "one by one": lambda: [call([query]) for query in queries],
        f"from {AT_ONCE} threads": lambda: list(pool.map(lambda query: call([query]), queries)),
        "as one list": lambda: call(queries),
    }


def measure(name: str, model: str | Path, dtype: str, queries: list[str], rounds: int) -> list[list[object]]:
    """Measure one checkpoint: rows of the table."""
    with ColQwen3Encoder(model, engine="torch", device="cpu", dtype=dtype) as encoder:
        peers = open_peers(model, getattr(torch, dtype))
        calls: dict[str, Call] = {"**ours**": encoder.encode_queries}
        for peer in peers:
            calls[peer.name] = lambda given, peer=peer: peer.queries(given, len(given))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            ways = {(who, how): way for who, call in calls.items() for how, way in ways_of(call, queries, pool).items()}
            times = in_turn(ways, rounds)
        made = [np.asarray(query) for query in encoder.encode_queries(queries)]
        rows: list[list[object]] = []
        for who in calls:
            peer = next((peer for peer in peers if peer.name == who), None)
            row: list[object] = [name, dtype, who]
            for how in ways_of(encoder.encode_queries, queries, pool):
                theirs = times[who, how]
                faster = "" if peer is None else f" (**{ratio(times['**ours**', how], theirs):.2f}x**)"
                row.append(f"{len(queries) / statistics.median(theirs):.0f}{faster}")
            row.append("" if peer is None else f"{worst_cosine(made, peer.queries(queries, len(queries))):.6f}")
            rows.append(row)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="*", default=("tiny", "mid"), choices=("tiny", "small", "mid"))
    parser.add_argument("--dtypes", nargs="*", default=("float32", "bfloat16"))
    parser.add_argument("--quick", action="store_true", help="a small checkpoint, one round")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/queries.md")
    options = parser.parse_args()
    if options.quick:
        options.models, options.dtypes, options.rounds = ("small",), ("float32",), 1
    queries = draw_queries(AT_ONCE)
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            model: str | Path = "tiny"
            if name != "tiny":
                model = Path(folder) / name
                write_checkpoint(model, name)
            for dtype in options.dtypes:
                rows += measure(name, model, dtype, queries, options.rounds)
    columns = (
        "checkpoint", "precision", "who", "one by one", f"from {AT_ONCE} threads", "as one list",
        "worst cosine of a token with ours",
    )  # fmt: skip
    text = f"""# Query encoding on a CPU

Made by `build/peers/bin/python benchmarks/queries.py --write` on {machine("transformers", "numpy")}.

Queries a second, and in brackets how many times faster ours is (median of the ratios within {options.rounds} rounds).
{AT_ONCE} queries of 3 to 12 words and 10 augmentation tokens; asked for one after the other, by {AT_ONCE} threads at
once with one query each, and in one call. `tiny` comes with the package; `mid` is a random checkpoint of 297 M
parameters in Qwen3-VL's shape.

{table(columns, rows)}
"""
    publish(__file__, text, write=options.write)


if __name__ == "__main__":
    main()
