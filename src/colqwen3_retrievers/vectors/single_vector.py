"""A bridge to stores of one vector a document: candidates from there, exact MaxSim over them afterwards.

One vector cannot hold what hundreds of token embeddings say. Most of the pages that MaxSim ranks first are among its
first hundred, but not all: see ``benchmarks/bridge.md``. A multi-vector store finds more of them in fewer bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import ArrayLike

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.errors import ConfigError, DimensionError
from colqwen3_retrievers.vectors.multi_vector import Float32, MultiVector, as_token_embeddings

Method = Literal["fde", "directions"]
"""How one vector is computed from many."""

VERSION: Final = 1
"""Version of the methods: vectors of two versions may not be compared."""

_MAX_DIM = 65_536
_BITS, _PROJECTED = 4, 8  # of "fde": 16 partitions, each token embedding cut down to 8 components in them
_BLOCK = _PROJECTED << _BITS  # components a repetition


@dataclass(frozen=True, slots=True)
class SingleVectorSettings:
    """How single vectors are computed; only vectors of equal settings may be compared.

    ``"fde"`` (the default) is a fixed dimensional encoding: MUVERA, Dhulipala et al. 2024 (arXiv 2405.19504).
    Hyperplanes cut the space into 16 partitions (SimHash); a page gives the mean of its tokens in each, an empty one
    the token nearest to it by its bits; a query gives sums. Each is cut down to 8 components by random signs, and all
    is repeated ``dim / 128`` times.

    ``"directions"`` describes a page by how far its token embeddings reach in ``dim`` fixed random directions w: the
    vector holds the maximum over tokens of w · token, which is the support function of the page, sampled. MaxSim
    evaluates this function at the query's tokens; a query vector does so at the ``nearest`` directions of each of its
    tokens, weighted by their similarity. It finds a little more than ``"fde"`` where pages have clear clusters, and
    little more than chance where the tokens of a page reach far in every direction, as those of ``tiny`` do.

    Args:
        token_dim: dim of the token embeddings.
        method: ``"fde"`` or ``"directions"``.
        dim: components of the single vector, 1 to 65,536; for ``"fde"`` a multiple of 128. More find more.
        nearest: for ``"directions"``: directions used for a query token, 1 to ``dim``; ignored by ``"fde"``.
        seed: of the directions, hyperplanes and signs, from 0. The same on every machine and release.

    Raises:
        ConfigError: a value out of its range.

    >>> settings = SingleVectorSettings(token_dim=128)
    >>> settings.dim, settings.fingerprint == SingleVectorSettings(token_dim=128, seed=7).fingerprint
    (2048, False)
    """

    token_dim: int
    method: Method = "fde"
    dim: int = 2048
    nearest: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("directions", "fde"):
            raise ConfigError(f'method: expected "directions" or "fde", got {self.method!r}')
        bounds = {"token_dim": (1, _MAX_DIM), "dim": (1, _MAX_DIM), "nearest": (1, self.dim), "seed": (0, 2**63 - 1)}
        for name, (least, most) in bounds.items():
            whole_number(getattr(self, name), name, least=least, most=most)
        if self.method == "fde" and self.dim % _BLOCK:
            raise ConfigError(f"dim: expected a multiple of {_BLOCK} for fde, got {self.dim}")

    @property
    def fingerprint(self) -> str:
        """Hex digest of all settings: vectors of different fingerprints may not share a store."""
        settings = {"version": VERSION, **dataclasses.asdict(self)}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def single_vector(
    vectors: MultiVector | ArrayLike, settings: SingleVectorSettings, *, is_query: bool = False
) -> Float32:
    """Return one vector for a multi-vector, of a document or, differently, of a query.

    Args:
        vectors: (n_tokens, token_dim), unit rows; a document may be pooled. Of a query, all tokens, as MaxSim takes.
        settings: the store's.
        is_query: whether it is a query.

    Returns:
        float32 (dim,), of length 1, so that cosine, inner product and Euclidean distance rank alike.

    Raises:
        DimensionError: token embeddings of another dim than ``settings.token_dim``.
        ConfigError: not a multi-vector, or one whose tokens cancel out.

    >>> settings = SingleVectorSettings(token_dim=2, dim=512)
    >>> page = single_vector([[1.0, 0.0], [0.6, 0.8]], settings)
    >>> query = single_vector([[0.8, 0.6]], settings, is_query=True)
    >>> page.shape, bool(page @ query > 0)
    ((512,), True)
    """
    rows = as_token_embeddings(np.asarray(vectors))
    if rows.shape[1] != settings.token_dim:
        raise DimensionError("token embeddings", expected=settings.token_dim, actual=rows.shape[1])
    if settings.method == "directions":
        reach: Float32 = rows @ _directions(settings.token_dim, settings.dim, settings.seed)
        vector = _query_weights(reach, settings.nearest) if is_query else reach.max(axis=0)
    else:
        vector = _encoding(rows, settings, is_query=is_query)
    length = float(np.linalg.norm(vector.astype(np.float64)))
    if not length > 0:
        raise ConfigError("vectors: the token embeddings cancel out; no vector stands for them")
    unit: Float32 = (vector / length).astype(np.float32)
    return unit


def single_vectors(
    multi_vectors: Sequence[MultiVector | ArrayLike], settings: SingleVectorSettings, *, is_query: bool = False
) -> Float32:
    """Return one vector for each of several multi-vectors. See :func:`single_vector`.

    Returns:
        float32 (n, dim), unit rows, in order; (0, dim) for none.

    Raises:
        DimensionError: token embeddings of another dim.
        ConfigError: one that is no multi-vector; its position is named.

    >>> single_vectors([[[1.0, 0.0]], [[0.0, 1.0]]], SingleVectorSettings(token_dim=2, dim=256)).shape
    (2, 256)
    """
    rows = np.empty((len(multi_vectors), settings.dim), dtype=np.float32)
    for position, vectors in enumerate(multi_vectors):
        try:
            rows[position] = single_vector(vectors, settings, is_query=is_query)
        except DimensionError as exc:
            raise DimensionError(f"{position}: token embeddings", expected=exc.expected, actual=exc.actual) from exc
        except ConfigError as exc:
            raise ConfigError(f"{position}: {exc}") from exc
    return rows


def _query_weights(similarity: Float32, nearest: int) -> Float32:
    least = -np.partition(-similarity, nearest - 1, axis=1)[:, nearest - 1, None]
    weights: Float32 = np.where(similarity >= least, np.maximum(similarity, 0), 0).sum(axis=0)
    return weights


def _encoding(rows: Float32, settings: SingleVectorSettings, *, is_query: bool) -> Float32:
    """Return the fixed dimensional encoding, one repetition after the other, partition by partition."""
    repetitions = settings.dim // _BLOCK
    planes, signs = _planes_and_signs(settings.token_dim, repetitions, settings.seed)
    above = (rows @ planes).reshape(len(rows), repetitions, _BITS) > 0
    partitions = above @ (1 << np.arange(_BITS))  # (n_tokens, repetitions)
    projected = (rows @ signs).reshape(len(rows), repetitions, _PROJECTED)
    encoding = np.zeros((repetitions, 1 << _BITS, _PROJECTED), dtype=np.float32)
    np.add.at(encoding, (np.arange(repetitions), partitions), projected)
    if is_query:
        return encoding.ravel()
    counts = np.zeros((repetitions, 1 << _BITS), dtype=np.int64)
    np.add.at(counts, (np.arange(repetitions), partitions), 1)
    encoding /= np.maximum(counts, 1)[:, :, None]
    ones = np.array([number.bit_count() for number in range(1 << _BITS)])
    for repetition, empty in np.argwhere(counts == 0):
        nearest = int(ones[partitions[:, repetition] ^ empty].argmin())  # the first of equals
        encoding[repetition, empty] = projected[nearest, repetition]
    return encoding.ravel()


@functools.lru_cache(maxsize=8)
def _directions(token_dim: int, dim: int, seed: int) -> Float32:
    """Return unit columns of random signs, float32 (token_dim, dim)."""
    return _random_signs((token_dim, dim), seed, 0) / np.float32(np.sqrt(token_dim))


@functools.lru_cache(maxsize=8)
def _planes_and_signs(token_dim: int, repetitions: int, seed: int) -> tuple[Float32, Float32]:
    planes = _random_signs((token_dim, repetitions * _BITS), seed, 1)
    signs = _random_signs((token_dim, repetitions * _PROJECTED), seed, 2)
    return planes, signs / np.float32(np.sqrt(_PROJECTED))


def _random_signs(shape: tuple[int, int], seed: int, stream: int) -> Float32:
    """Return random plus and minus ones, from the raw bits of PCG64, which numpy promises to keep in every release."""
    count = shape[0] * shape[1]
    raw = np.random.PCG64(np.random.SeedSequence([seed, stream])).random_raw(-(-count // 64))
    bits = np.unpackbits(np.asarray(raw, dtype="<u8").view(np.uint8), count=count)
    return bits.astype(np.float32).reshape(shape) * 2 - 1
