"""What the store is measured on: pages of the tiny checkpoint, and synthetic pages with cluster structure.

    python benchmarks/store_data.py --cache DIR [--pages 2000]

encodes the pages once and keeps them in a folder, float16; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from colqwen3_retrievers.vectors.multi_vector import Float32, PackedEmbeddings

ROOT = Path(__file__).parents[1]
CROP = (416, 320)  # 13 x 10 visual tokens and the prompt's 13: pages a busy core can encode by the thousand
SEED = 20
FAMILY = 200  # synthetic pages that share details: more than the candidates first looked at


class Corpus(NamedTuple):
    """Pages to index and queries to ask."""

    name: str
    pages: PackedEmbeddings
    queries: list[Float32]

    @property
    def dim(self) -> int:
        """Components of a token embedding."""
        return self.pages.dim


def tiny(cache: Path, n_pages: int = 2000, n_queries: int = 200) -> Corpus:
    """Crops of the held-out pages of the training, encoded by ``tiny``, and queries for words printed on them.

    Every held-out page gives up to four crops, from its corners, so that a query has near misses.
    """
    path = cache / f"tiny-{n_pages}.npz"
    if not path.exists():
        _encode_tiny(path, n_pages, n_queries)
    with np.load(path, allow_pickle=False) as kept:
        queries = np.split(kept["queries"].astype(np.float32), np.cumsum(kept["query_lengths"])[:-1])
        pages = PackedEmbeddings(kept["pages"], np.concatenate([[0], np.cumsum(kept["page_lengths"])]))
    return Corpus(f"tiny, {n_pages:,} crops", pages, queries)


def _encode_tiny(path: Path, n_pages: int, n_queries: int) -> None:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from colqwen3_retrievers import ColQwen3Encoder
    from training.heldout import draw_page, draw_queries

    path.parent.mkdir(parents=True, exist_ok=True)
    encoder = ColQwen3Encoder("tiny")
    width, height = CROP
    words: list[list[str]] = []
    made = []
    for number in range(-(-n_pages // 4)):
        page = draw_page(number)
        words.append(page.words)
        wide, high = page.image.size
        corners = [(0, 0), (wide - width, 0), (0, high - height), (wide - width, high - height)]
        crops = [page.image.crop((left, top, left + width, top + height)) for left, top in corners]
        made += [np.asarray(vector).astype(np.float16) for vector in encoder.encode_images(crops)]
        if number % 50 == 0:
            print(f"{len(made)} pages", flush=True)
    asked = [text for text, _ in draw_queries(words, n_queries, 4, SEED)]
    queries = [np.asarray(vector) for vector in encoder.encode_queries(asked)]
    made = made[:n_pages]
    np.savez(
        path,
        pages=np.concatenate(made),
        page_lengths=[len(page) for page in made],
        queries=np.concatenate(queries),
        query_lengths=[len(query) for query in queries],
    )


def clustered(dim: int, n_pages: int = 2000, tokens: int = 700, n_queries: int = 60, seed: int = SEED) -> Corpus:
    """Pages whose tokens gather around topics of their own and topics of all, and queries with near ties.

    Each query draws its tokens from one page, and the pages of its neighbourhood share most of what it asks for, so
    that ranks 2 to 10 lie close together: recall@10 is hard.
    """
    rng = np.random.default_rng(seed)
    topics = _unit(rng.standard_normal((256, dim), dtype=np.float32))
    families = _unit(rng.standard_normal((n_pages // FAMILY + 1, 40, dim), dtype=np.float32))
    lengths = rng.integers(tokens * 3 // 4, tokens * 5 // 4, n_pages)
    pages = np.empty((int(lengths.sum()), dim), dtype=np.float16)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    for i in range(n_pages):
        n = int(lengths[i])
        own = _unit(rng.standard_normal((24, dim), dtype=np.float32))
        shared = topics[rng.choice(len(topics), 12)]
        near = _unit(families[i // FAMILY] + 0.35 / np.sqrt(dim) * rng.standard_normal((40, dim), dtype=np.float32))
        centres = np.concatenate([own, shared, near])
        weights = rng.dirichlet(np.full(len(centres), 0.7))
        picked = centres[rng.choice(len(centres), n, p=weights)]
        spread = 0.55 / np.sqrt(dim) * rng.standard_normal((n, dim), dtype=np.float32)
        pages[offsets[i] : offsets[i + 1]] = _unit(picked + spread)
    packed = PackedEmbeddings(pages, offsets)
    queries = []
    for _ in range(n_queries):
        page = int(rng.integers(n_pages))
        n = int(rng.integers(22, 31))
        details = families[page // FAMILY][rng.choice(40, n)]
        drawn = packed[page][rng.choice(len(packed[page]), n)].astype(np.float32)
        mixed = np.where(rng.random((n, 1)) < 0.7, details, drawn)
        queries.append(_unit(mixed + 0.6 / np.sqrt(dim) * rng.standard_normal((n, dim), dtype=np.float32)))
    return Corpus(f"clustered, d={dim}", packed, queries)


def random_page(seed: int, tokens: int = 256, dim: int = 128) -> Float32:
    """One page of random unit rows."""
    return _unit(np.random.default_rng(seed).standard_normal((tokens, dim), dtype=np.float32))


def _unit(rows: Float32) -> Float32:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def main() -> None:
    """Encode the pages and keep them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--pages", type=int, default=2000)
    options = parser.parse_args()
    corpus = tiny(options.cache, options.pages)
    print(f"{corpus.name}: {corpus.pages.lengths.mean():.0f} tokens a page, {len(corpus.queries)} queries")


if __name__ == "__main__":
    main()
