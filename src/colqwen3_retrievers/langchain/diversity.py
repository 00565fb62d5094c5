"""Maximal marginal relevance by late interaction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.index.page_index import PageIndex
from colqwen3_retrievers.pages.page import Hit
from colqwen3_retrievers.vectors.kernels import default_kernel
from colqwen3_retrievers.vectors.late_interaction import Kernel, maxsim, numpy_kernel
from colqwen3_retrievers.vectors.multi_vector import Float32, MultiVector


def most_diverse(
    relevances: Sequence[float],
    documents: Sequence[MultiVector],
    k: int,
    lambda_mult: float = 0.5,
    *,
    kernel: Kernel = numpy_kernel,
) -> list[int]:
    """Choose documents that answer the query and do not repeat each other.

    Each step chooses the document with the highest ``lambda_mult * relevance - (1 - lambda_mult) * redundancy``. Its
    redundancy is the largest mean MaxSim, over its own content tokens, with a document chosen before. Source: Carbonell
    and Goldstein 1998, with late interaction as both similarities.

    Args:
        relevances: mean MaxSim of the query with each document, -1 to 1.
        documents: multi-vectors in the same order.
        k: most documents chosen, at least 1.
        lambda_mult: 1 for relevance alone, 0 for diversity alone; the first one chosen is always the most relevant.
        kernel: computes MaxSim, (k - 1) times all documents against one.

    Returns:
        Positions in the order chosen; of equal ones the first.

    Raises:
        ConfigError: ``lambda_mult`` is not within 0..1.

    >>> copy, other = MultiVector(np.eye(1, 2, 0, dtype=np.float32)), MultiVector(np.eye(1, 2, 1, dtype=np.float32))
    >>> most_diverse([0.9, 0.9, 0.5], [copy, copy, other], 2)
    [0, 2]
    """
    check_lambda(lambda_mult)
    if not documents:
        return []
    relevance = np.asarray(relevances, dtype=np.float64)
    contents = [_content(document) for document in documents]
    chosen = [int(relevance.argmax())]
    redundancy = np.full(len(documents), -np.inf)
    while len(chosen) < min(k, len(documents)):
        similarity = maxsim(contents, contents[chosen[-1]], mode="mean", kernel=kernel)[:, 0]
        redundancy = np.maximum(redundancy, similarity)
        gain = lambda_mult * relevance - (1 - lambda_mult) * redundancy
        gain[chosen] = -np.inf
        chosen.append(int(gain.argmax()))
    return chosen


def diverse_hits(
    index: PageIndex, query: MultiVector, hits: Sequence[Hit], k: int, lambda_mult: float = 0.5
) -> list[Hit]:
    """Choose hits that answer the query and do not repeat each other; see :func:`most_diverse`.

    Args:
        index: the index that was searched; the hits' multi-vectors are read from it.
        query: the query's multi-vector.
        hits: best first; a page deleted since the search is left out.
        k: most hits chosen, at least 1.
        lambda_mult: as for :func:`most_diverse`.

    Returns:
        At most ``k`` of the hits, in the order chosen.

    >>> diverse_hits(index, query, index.search(query, 20), 4)                             # doctest: +SKIP
    [Hit(page=Page(id='a.pdf#page=7', ...), score=17.3, neighbours=()), ...]
    """
    if lambda_mult == 1 or len(hits) < 2:
        return list(hits[:k])
    records = index.get([hit.page.id for hit in hits], vectors=True)
    vectors = {record.page.id: record.multi_vector for record in records if record.multi_vector is not None}
    stored = [hit for hit in hits if hit.page.id in vectors]
    relevances = [hit.score / len(query) for hit in stored]
    documents = [vectors[hit.page.id] for hit in stored]
    positions = most_diverse(relevances, documents, k, lambda_mult, kernel=default_kernel())
    return [stored[position] for position in positions]


def check_lambda(lambda_mult: float) -> None:
    """Check that a value is within 0..1.

    Raises:
        ConfigError: it is not.

    >>> check_lambda(2)
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: lambda_mult: expected a number from 0 to 1, got 2
    """
    if not isinstance(lambda_mult, int | float) or not math.isfinite(lambda_mult) or not 0 <= lambda_mult <= 1:
        raise ConfigError(f"lambda_mult: expected a number from 0 to 1, got {lambda_mult!r}")


def _content(document: MultiVector) -> Float32:
    """Token embeddings without the prompt, which all documents share; rows of a pooled document mix both."""
    rows = document.vectors if document.clusters is not None else document.vectors[document.user_tokens]
    return rows if len(rows) else document.vectors
