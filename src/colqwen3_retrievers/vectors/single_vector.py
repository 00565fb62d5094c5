"""A bridge to stores that know one vector a document: candidates from there, exact MaxSim over them afterwards.

One vector cannot hold what hundreds of token embeddings say. It finds most of the pages that MaxSim would put first
among its own first hundred, and it never finds them all: ``benchmarks/bridge.md`` says how many. Where a multi-vector
store can be had, it finds them better and in fewer bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike

from colqwen3_retrievers.errors import ConfigError, DimensionError
from colqwen3_retrievers.vectors.multi_vector import Float32, MultiVector, as_token_embeddings

Method = Literal["fde", "directions"]
"""How one vector is made of many."""

VERSION: Final = 1
"""Of what the methods compute: vectors of two versions may not be compared."""

_MAX_DIM = 65_536
_BITS, _PROJECTED = 4, 8  # of "fde": 16 partitions, each token embedding cut down to 8 components in them
_BLOCK = _PROJECTED << _BITS  # components a repetition


@dataclass(frozen=True, slots=True)
class SingleVectorSettings:
    """How single vectors are made: to be stored beside them, for only vectors of equal settings compare.

    ``"fde"`` (the default) is a fixed dimensional encoding: MUVERA, Dhulipala et al. 2024 (arXiv 2405.19504).
    Hyperplanes cut the space into 16 partitions (SimHash); a page gives the mean of its tokens in each, an empty one
    the token nearest to it by its bits; a query gives sums. Each is cut down to 8 components by random signs, and all
    is repeated ``dim / 128`` times.

    ``"directions"`` describes a page by how far its token embeddings reach in ``dim`` fixed random directions w: the
    vector holds the maximum over tokens of w · token, which is the support function of the page, sampled. MaxSim asks
    this very function, at the query's tokens; a query asks it at the ``nearest`` directions of each of its tokens,
    weighted by their similarity. It finds a little more than ``"fde"`` where pages are made of clear clusters, and
    little more than chance where the tokens of a page reach far in every direction, as those of ``tiny`` do.

    Args:
        token_dim: dim of the token embeddings.
        method: ``"fde"`` or ``"directions"``.
        dim: components of the single vector, 1 to 65,536; for ``"fde"`` a multiple of 128. More find more.
        nearest: for ``"directions"``: directions a query token asks at, 1 to ``dim``. ``"fde"`` takes no notice.
        seed: of the directions, hyperplanes and signs, from 0. The same on every machine and release.

    Raises:
        ConfigError: a value out of its range.

    >>> settings = SingleVectorSettings(token_dim=128)
    >>> settings.dim, SingleVectorSettings.from_dict(settings.to_dict()) == settings
    (2048, True)
    >>> settings.fingerprint == SingleVectorSettings(token_dim=128, seed=7).fingerprint
    False
    """

    token_dim: int
    method: Method = "fde"
    dim: int = 2048
    nearest: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.method not in ("directions", "fde"):
            raise ConfigError(f'method: expected "directions" or "fde", got {self.method!r}')
        bounds = {"token_dim": (1, _MAX_DIM), "dim": (1, _MAX_DIM), "nearest": (1, self.dim), "seed": (0, 2**63 - 1)}
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ConfigError(f"{name}: expected a whole number from {least:,} to {most:,}, got {value!r}")
        if self.method == "fde" and self.dim % _BLOCK:
            raise ConfigError(f"dim: expected a multiple of {_BLOCK} for fde, got {self.dim}")

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that shapes the vectors: two of different fingerprints may not share a store."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Give JSON values by name, with the version of what they mean."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SingleVectorSettings:
        """Make settings of :meth:`to_dict`'s values.

        Raises:
            ConfigError: a value is missing, unknown or out of its range, or another version.
        """
        given = dict(values)
        version = given.pop("version", None)
        if version != VERSION:
            raise ConfigError(f"single-vector settings: version {version!r}; this release makes {VERSION}")
        names = {item.name for item in dataclasses.fields(cls)}
        if given.keys() != names:
            wrong = ", ".join(sorted(given.keys() ^ names))
            raise ConfigError(f"single-vector settings: missing or unknown: {wrong}")
        return cls(**given)


def single_vector(
    vectors: MultiVector | ArrayLike, settings: SingleVectorSettings, *, is_query: bool = False
) -> Float32:
    """Make one vector of a multi-vector. Documents and queries are made differently.

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
        made = _reach_of_query(rows, settings) if is_query else _reach(rows, settings)
    else:
        made = _encoding(rows, settings, is_query=is_query)
    length = float(np.linalg.norm(made.astype(np.float64)))
    if not length > 0:
        raise ConfigError("vectors: the token embeddings cancel out; no vector stands for them")
    unit: Float32 = (made / length).astype(np.float32)
    return unit


def single_vectors(
    multi_vectors: Sequence[MultiVector | ArrayLike], settings: SingleVectorSettings, *, is_query: bool = False
) -> Float32:
    """Make one vector of each of several multi-vectors. See :func:`single_vector`.

    Returns:
        float32 (n, dim), unit rows, in order; (0, dim) for none.

    Raises:
        DimensionError: token embeddings of another dim.
        ConfigError: one that is no multi-vector; its position is named.

    >>> single_vectors([[[1.0, 0.0]], [[0.0, 1.0]]], SingleVectorSettings(token_dim=2, dim=256)).shape
    (2, 256)
    """
    made = np.empty((len(multi_vectors), settings.dim), dtype=np.float32)
    for position, vectors in enumerate(multi_vectors):
        try:
            made[position] = single_vector(vectors, settings, is_query=is_query)
        except DimensionError as exc:
            raise DimensionError(f"{position}: token embeddings", expected=exc.expected, actual=exc.actual) from exc
        except ConfigError as exc:
            raise ConfigError(f"{position}: {exc}") from exc
    return made


def _reach(rows: Float32, settings: SingleVectorSettings) -> Float32:
    reach: Float32 = (rows @ _directions(settings.token_dim, settings.dim, settings.seed)).max(axis=0)
    return reach


def _reach_of_query(rows: Float32, settings: SingleVectorSettings) -> Float32:
    similarity = rows @ _directions(settings.token_dim, settings.dim, settings.seed)
    least = -np.partition(-similarity, settings.nearest - 1, axis=1)[:, settings.nearest - 1, None]
    weights: Float32 = np.where(similarity >= least, np.maximum(similarity, 0), 0).sum(axis=0)
    return weights


def _encoding(rows: Float32, settings: SingleVectorSettings, *, is_query: bool) -> Float32:
    """Give the fixed dimensional encoding, one repetition after the other, partition by partition."""
    repetitions = settings.dim // _BLOCK
    planes, signs = _planes_and_signs(settings.token_dim, repetitions, settings.seed)
    above = (rows @ planes).reshape(len(rows), repetitions, _BITS) > 0
    partitions = above @ (1 << np.arange(_BITS))  # (n_tokens, repetitions)
    projected = (rows @ signs).reshape(len(rows), repetitions, _PROJECTED)
    made = np.zeros((repetitions, 1 << _BITS, _PROJECTED), dtype=np.float32)
    np.add.at(made, (np.arange(repetitions), partitions), projected)
    if is_query:
        return made.ravel()
    counts = np.zeros((repetitions, 1 << _BITS), dtype=np.int64)
    np.add.at(counts, (np.arange(repetitions), partitions), 1)
    made /= np.maximum(counts, 1)[:, :, None]
    ones = np.array([number.bit_count() for number in range(1 << _BITS)])
    for repetition, empty in np.argwhere(counts == 0):
        nearest = int(ones[partitions[:, repetition] ^ empty].argmin())  # the first of equals
        made[repetition, empty] = projected[nearest, repetition]
    return made.ravel()


@functools.lru_cache(maxsize=8)
def _directions(token_dim: int, dim: int, seed: int) -> Float32:
    """Unit columns of random signs, float32 (token_dim, dim)."""
    return _random_signs((token_dim, dim), seed, 0) / np.float32(np.sqrt(token_dim))


@functools.lru_cache(maxsize=8)
def _planes_and_signs(token_dim: int, repetitions: int, seed: int) -> tuple[Float32, Float32]:
    planes = _random_signs((token_dim, repetitions * _BITS), seed, 1)
    signs = _random_signs((token_dim, repetitions * _PROJECTED), seed, 2)
    return planes, signs / np.float32(np.sqrt(_PROJECTED))


def _random_signs(shape: tuple[int, int], seed: int, stream: int) -> Float32:
    """Plus and minus one, from the raw bits of PCG64: numpy promises these alike in every release, its normals not."""
    count = shape[0] * shape[1]
    raw = np.random.PCG64(np.random.SeedSequence([seed, stream])).random_raw(-(-count // 64))
    bits = np.unpackbits(np.asarray(raw, dtype="<u8").view(np.uint8), count=count)
    return bits.astype(np.float32).reshape(shape) * 2 - 1
