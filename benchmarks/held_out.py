"""Held-out pages of the tiny checkpoint's training at their full size, encoded once and kept in a folder.

    python benchmarks/held_out.py --cache DIR [--pages 300]

Another checkpoint has another fingerprint, and so another file in the folder: a table is never made of old embeddings.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from colqwen3_retrievers.vectors.multi_vector import Float32, PackedEmbeddings

ROOT = Path(__file__).parents[1]
SEED = 5


class HeldOut(NamedTuple):
    """Pages with queries for words printed on them.

    Attributes:
        pages: token embeddings of whole pages, float32, not pooled.
        visual: (start, stop) of the visual tokens of each page.
        queries: token embeddings, prompt and augmentation included, as they are searched with.
        content: tokens of each query that are its text; they come first.
        relevant: for each query, the positions of the pages that hold every word of it.
        model: what made them.
    """

    pages: PackedEmbeddings
    visual: list[tuple[int, int]]
    queries: list[Float32]
    content: list[int]
    relevant: list[set[int]]
    model: str


def held_out(cache: Path, n_pages: int = 300, n_queries: int = 300) -> HeldOut:
    """Give held-out pages and queries, from the folder when they are there."""
    from colqwen3_retrievers import ColQwen3Encoder

    encoder = ColQwen3Encoder("tiny")
    mark = f"{encoder.info.fingerprint[:12]}-{n_pages}-{n_queries}"
    path = cache / f"held-out-{mark}.npz"
    if not path.exists():
        _encode(encoder, path, n_pages, n_queries)
    with np.load(path, allow_pickle=False) as kept:
        queries = np.split(kept["queries"], np.cumsum(kept["query_lengths"])[:-1])
        pages = PackedEmbeddings(kept["pages"].astype(np.float32), np.concatenate([[0], kept["page_ends"]]))
        pairs = kept["relevant"]
        relevant = [set(pairs[pairs[:, 0] == i, 1].tolist()) for i in range(n_queries)]
        visual = [(int(a), int(b)) for a, b in kept["visual"]]
        content = kept["content"].tolist()
    return HeldOut(pages, visual, queries, content, relevant, f"tiny {encoder.info.fingerprint[:12]}")


def _encode(encoder: object, path: Path, n_pages: int, n_queries: int) -> None:
    from colqwen3_retrievers import ColQwen3Encoder

    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from training.heldout import draw_page, draw_queries

    assert isinstance(encoder, ColQwen3Encoder)
    path.parent.mkdir(parents=True, exist_ok=True)
    words: list[list[str]] = []
    made = []
    for number in range(n_pages):
        page = draw_page(number)
        words.append(page.words)
        made += encoder.encode_images([page.image])
        if number % 50 == 0:
            print(f"{number} pages encoded", flush=True)
    asked = draw_queries(words, n_queries, 4, SEED)
    queries = encoder.encode_queries([text for text, _ in asked])
    partial = path.with_suffix(".partial.npz")
    np.savez(
        partial,
        pages=np.concatenate([page.vectors for page in made]).astype(np.float16),
        page_ends=np.cumsum([len(page) for page in made]),
        visual=[page.visual.indices(len(page))[:2] if page.visual else (0, len(page)) for page in made],
        queries=np.concatenate([query.vectors for query in queries]),
        query_lengths=[len(query) for query in queries],
        content=[query.content.indices(len(query))[1] for query in queries],
        relevant=[(i, page) for i, (_, pages) in enumerate(asked) for page in sorted(pages)],
    )
    partial.replace(path)


def main() -> None:
    """Encode the pages and keep them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--pages", type=int, default=300)
    options = parser.parse_args()
    made = held_out(options.cache, options.pages)
    lengths = made.pages.lengths
    print(f"{made.model}: {len(made.pages)} pages of {lengths.mean():.0f} tokens, {len(made.queries)} queries")


if __name__ == "__main__":
    main()
