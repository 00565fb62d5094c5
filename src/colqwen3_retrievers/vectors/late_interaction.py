"""MaxSim, defined once: how a query's token embeddings are compared with a document's.

Queries and documents stay ragged from end to end. There is no padding, hence no mask, hence no zero row that could win
over a negative similarity. Every faster kernel is tested against :func:`numpy_kernel`, and is passed by the caller::

    scores = maxsim(queries, documents, kernel=torch_kernel("cuda"))
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, DimensionError
from colqwen3_retrievers.vectors.multi_vector import (
    Float32,
    MultiVector,
    PackedEmbeddings,
    as_token_embeddings,
    lay_end_to_end,
)

Mode = Literal["sum", "mean"]
MultiVectors: TypeAlias = MultiVector | ArrayLike | Sequence[MultiVector | ArrayLike] | PackedEmbeddings

CPU_CHUNK_BYTES = 1 << 21  # of document tokens in float32: 2 to 16 pages, which stay in a core's cache
CPU_TILE = 1 << 20  # similarities held at a time, 4 MB in float32
_BLOCK_FLOATS = 1 << 23  # components of a list of documents packed at a time, 32 MB in float32


class Kernel(Protocol):
    """Computes MaxSim: :func:`numpy_kernel`, or one from :mod:`colqwen3_retrievers.vectors.kernels`.

    A kernel is called with queries and documents of one dim, at least one of each, float32 or float16, and returns
    float32 (n_queries, n_documents): for each query and document, the sum over the query's tokens of the largest dot
    product with a token of the document. Products, sums and the result are float32 or better whatever the storage.
    ``tests/contracts/test_kernels.py`` is the contract as a class to subclass.
    """

    def __call__(self, queries: PackedEmbeddings, documents: PackedEmbeddings, /) -> Float32:
        """Score every query against every document."""
        ...


def chunk_bounds(offsets: NDArray[np.int64], max_tokens: int) -> list[int]:
    """Cut packed documents into chunks of whole documents.

    Args:
        offsets: int64 (n_documents + 1,), as in :class:`PackedEmbeddings`.
        max_tokens: the most tokens a chunk may have; a longer document is a chunk by itself.

    Returns:
        Document numbers ``[0, ..., n_documents]``: chunk i holds the documents ``bounds[i]`` to ``bounds[i + 1] - 1``.

    >>> chunk_bounds(np.array([0, 3, 4, 9, 10]), max_tokens=4)
    [0, 2, 3, 4]
    """
    bounds = [0]
    while bounds[-1] < len(offsets) - 1:
        first = bounds[-1]
        fits = int(np.searchsorted(offsets, offsets[first] + max_tokens, side="right")) - 1
        bounds.append(max(fits, first + 1))
    return bounds


def numpy_kernel(queries: PackedEmbeddings, documents: PackedEmbeddings, /) -> Float32:
    """Compute MaxSim with numpy: the reference, and the kernel wherever torch is not installed.

    Args:
        queries: at least one, float32 or float16.
        documents: at least one, of the same dim, float32 or float16.

    Returns:
        float32 (n_queries, n_documents), sums over query tokens. Similarities are float32 and are held some megabytes
        at a time; their sums are taken in float64, so that the order of the tokens does not show.

    >>> pack = PackedEmbeddings.pack
    >>> numpy_kernel(pack([[[1.0, 0.0]]]), pack([[[-0.5, 0.0]], [[-0.4, 0.0]]])).round(3).tolist()
    [[-0.5, -0.4000000059604645]]
    """
    tokens = queries.vectors.astype(np.float32, copy=False)
    scores = np.empty((len(queries), len(documents)), dtype=np.float32)
    bounds = chunk_bounds(documents.offsets, max(1, CPU_CHUNK_BYTES // (4 * queries.dim)))
    with np.errstate(invalid="ignore", over="ignore"):  # non-finite scores are refused by the caller, by name
        for first, last in itertools.pairwise(bounds):
            starts = documents.offsets[first:last]
            chunk = documents.vectors[starts[0] : documents.offsets[last]].astype(np.float32, copy=False)
            sums = np.zeros((last - first, len(queries)))
            rows = max(1, CPU_TILE // len(chunk))
            for row in range(0, len(tokens), rows):
                tile = tokens[row : row + rows]
                best = np.maximum.reduceat(chunk @ tile.T, starts - starts[0], axis=0)
                # A tile may begin and end inside a query: its part of the sum is added to what is there.
                q0 = int(np.searchsorted(queries.offsets, row, side="right")) - 1
                q1 = int(np.searchsorted(queries.offsets, row + len(tile), side="left"))
                cuts = np.maximum(queries.offsets[q0:q1], row) - row
                sums[:, q0:q1] += np.add.reduceat(best, cuts, axis=1, dtype=np.float64)
            scores[:, first:last] = sums.T
    return scores


def maxsim(
    queries: MultiVectors, documents: MultiVectors, *, mode: Mode = "sum", kernel: Kernel = numpy_kernel
) -> Float32:
    """Score every query against every document by late interaction.

    The score is the sum, over the query's tokens, of the largest dot product with any token of the document. Source:
    Khattab and Zaharia 2020 (arXiv 2004.12832), equation 3; over page images Faysse et al. 2024 (arXiv 2407.01449).

    Args:
        queries: one multi-vector (:class:`MultiVector` or array-like of shape (n_tokens, dim)), a list or tuple of
            them, or :class:`PackedEmbeddings`. One multi-vector counts as a list of one, and a list may be empty.
        documents: the same; packed documents may be in a memory-mapped file.
        mode: "sum", or "mean", which divides by the number of query tokens. Unit rows give sums in
            -n_query_tokens..n_query_tokens and means in -1..1.
        kernel: computes the sums; the default needs numpy only.

    Returns:
        float32 (n_queries, n_documents). Beyond it, memory is bounded whatever the number of documents: some tens of
        megabytes of copies and similarities. How documents are packed changes a sum of unit rows by rounding alone,
        less than 1e-6 a query token.

    Raises:
        ConfigError: something else was given, a multi-vector is malformed, the mode is unknown, or a NaN or infinity
            inside packed embeddings makes a score not finite.
        DimensionError: two dims differ.

    >>> query = [[1.0, 0.0], [0.0, 1.0]]
    >>> maxsim(query, [[[0.6, 0.8]], [[1.0, 0.0], [0.8, 0.6]]]).round(3).tolist()
    [[1.399999976158142, 1.600000023841858]]
    >>> maxsim(query, [[-1.0, 0.0]], mode="mean").tolist(), maxsim([], [query]).shape
    ([[-0.5]], (0, 1))
    """
    packed = _pack_queries(queries, mode)
    parts: list[Float32] = []
    seen = 0
    for block in _blocks(documents):
        if packed is not None:
            parts.append(_scores(packed, block, mode, kernel, seen))
        seen += len(block)
    if not parts:
        return np.empty((0 if packed is None else len(packed), seen), dtype=np.float32)
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def relevance(score: float, n_query_tokens: int) -> float:
    """Map a MaxSim sum to the range 0..1, keeping the order for one query.

    Args:
        score: a sum over query tokens (mode "sum") of unit rows.
        n_query_tokens: of that query, at least 1.

    Returns:
        (1 + score / n_query_tokens) / 2, clipped to 0..1: 1 is identical, 0.5 orthogonal, 0 opposite.

    Raises:
        ConfigError: the score is not finite, or there are no query tokens.

    >>> relevance(2.0, 2), relevance(0.0, 7), relevance(-3.0, 3)
    (1.0, 0.5, 0.0)
    """
    n_query_tokens = whole_number(n_query_tokens, "n_query_tokens", least=1)
    if not math.isfinite(score):
        raise ConfigError(f"score: expected a finite number, got {score}")
    return min(1.0, max(0.0, (1.0 + float(score) / n_query_tokens) / 2.0))


def _scores(queries: PackedEmbeddings, documents: PackedEmbeddings, mode: Mode, kernel: Kernel, seen: int) -> Float32:
    """Run a kernel on a block that begins at document ``seen``, and check its scores."""
    if queries.dim != documents.dim:
        raise DimensionError("query against document", expected=queries.dim, actual=documents.dim)
    if not len(documents):
        return np.empty((len(queries), 0), dtype=np.float32)
    scores = kernel(queries, documents)
    if scores.shape != (len(queries), len(documents)) or scores.dtype != np.float32:
        raise ConfigError(
            f"kernel: expected float32 {(len(queries), len(documents))}, got {scores.dtype} {scores.shape}"
        )
    finite = np.isfinite(scores)
    if not finite.all():
        query, document = (int(i) for i in np.argwhere(~finite)[0])
        raise ConfigError(f"query {query} against document {seen + document}: NaN or infinity inside, no score")
    if mode == "mean":
        return np.divide(scores, queries.lengths[:, None], dtype=np.float32)
    return scores


def _pack_queries(queries: MultiVectors, mode: Mode) -> PackedEmbeddings | None:
    """Return packed queries, None when there are none."""
    if mode not in ("sum", "mean"):
        raise ConfigError(f'mode: expected "sum" or "mean", got {mode!r}')
    if isinstance(queries, PackedEmbeddings):
        return queries if len(queries) else None
    members = _members(queries, "queries")
    if not members:
        return None
    return lay_end_to_end([_one(member, f"query {i}") for i, member in enumerate(members)], "query")


def _blocks(documents: object) -> Iterator[PackedEmbeddings]:
    """Yield documents as packed blocks of bounded size; what is packed already is one block, uncopied."""
    if isinstance(documents, PackedEmbeddings):
        yield documents
        return
    arrays: list[Float32] = []
    first = size = 0
    for i, member in enumerate(_members(documents, "documents")):
        array = _one(member, f"document {i}")
        if arrays and size + array.size > _BLOCK_FLOATS:
            yield lay_end_to_end(arrays, "document", first)
            arrays, first, size = [], i, 0
        arrays.append(array)
        size += array.size
    if arrays:
        yield lay_end_to_end(arrays, "document", first)


def _members(value: object, name: str) -> Sequence[object]:
    """Return a sequence of multi-vectors, of one or several."""
    expected = "a multi-vector, a list of multi-vectors or PackedEmbeddings"
    if isinstance(value, MultiVector):
        return [value]
    if hasattr(value, "__array__"):
        if np.ndim(value) == 3:
            raise ConfigError(f"{name}: a 3-D array may hold padding that wins over negative similarities; give a list")
        return [value]
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name}: expected {expected}, got {type(value).__name__}")
    if not value:
        return []
    if isinstance(value[0], PackedEmbeddings):
        raise ConfigError(f"{name}: expected {expected}, got a {type(value).__name__} of PackedEmbeddings")
    try:
        single = np.ndim(value[0]) == 1
    except ValueError:  # rows of unequal length: not a row, and refused below as a multi-vector
        single = False
    return [value] if single else value


def _one(value: object, name: str) -> Float32:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as exc:  # ragged rows; tensors in bfloat16, with gradients, on a GPU
        raise ConfigError(f"{name}: not a (n_tokens, dim) array: {exc}") from exc
    return as_token_embeddings(array, name=name)
