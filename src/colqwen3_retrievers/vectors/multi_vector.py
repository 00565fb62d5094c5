"""Multi-vectors, alone and packed, and the record of everything that shaped them.

Plain data, checked once when it is created.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from colqwen3_retrievers.errors import ConfigError, DimensionError

Float32 = NDArray[np.float32]

_UNIT_TOLERANCE = 4e-3  # float16 rows of a few hundred components keep their length to about 1e-3


def as_token_embeddings(value: ArrayLike, *, name: str = "vectors") -> Float32:
    """Return ``value`` as float32, checked to be one multi-vector.

    Args:
        value: array-like of shape (n_tokens, dim), floating, finite, n_tokens >= 1, dim >= 1.
        name: what to call it in an error.

    Returns:
        float32 array of the same shape; ``value`` itself when it is one.

    Raises:
        ConfigError: wrong number of axes, no rows, not floating, or NaN or infinity inside.

    >>> as_token_embeddings([[0.6, 0.8]]).dtype
    dtype('float32')
    """
    try:
        array = np.asarray(value)
    except ValueError as exc:
        raise ConfigError(f"{name}: rows of unequal length are not a (n_tokens, dim) array") from exc
    except (TypeError, RuntimeError) as exc:  # tensors that numpy cannot take: bfloat16, with gradients, on a GPU
        raise ConfigError(f"{name}: cannot be read as an array: {exc}") from exc
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 1:
        raise ConfigError(f"{name}: expected shape (n_tokens >= 1, dim >= 1), got {array.shape}")
    if not np.issubdtype(array.dtype, np.floating):
        raise ConfigError(f"{name}: expected floating token embeddings, got {array.dtype}")
    array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise ConfigError(f"{name}: NaN or infinity inside")
    return array


@dataclass(frozen=True, slots=True, eq=False)
class MultiVector:
    """The token embeddings of one query or one document: what late interaction compares.

    Attributes:
        vectors: float32 (n_tokens, dim), unit rows, n_tokens >= 1, read-only. ``np.asarray(mv) is mv.vectors``.
        content: the tokens that are not prompt and not augmentation; of an image with a text, those of the text, since
            the instruction is between the two. See :attr:`user_tokens`.
        visual: the visual tokens, or None for text (and for videos, whose visual tokens are not contiguous).
        tokens: token strings of a query that has a text, or of a text; None otherwise.
        grid: (rows, cols) of the visual tokens in reading order, or None.
        clusters: int32 (n_original_tokens,), token -> pooled row, when the document was pooled; then ``content`` and
            ``visual`` slice ``clusters`` (the original tokens), not ``vectors``.

    Source: late interaction, Khattab and Zaharia 2020 (arXiv 2004.12832); over page images, Faysse et al. 2024
    (arXiv 2407.01449).

    >>> mv = MultiVector(np.asarray([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32))
    >>> len(mv), mv.dim, np.asarray(mv) is mv.vectors
    (2, 2, True)
    >>> MultiVector(np.zeros((0, 2), dtype=np.float32))
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: vectors: expected shape (n_tokens >= 1, dim >= 1), got (0, 2)
    """

    vectors: Float32
    content: slice = field(default_factory=lambda: slice(None))
    visual: slice | None = None
    tokens: tuple[str, ...] | None = None
    grid: tuple[int, int] | None = None
    clusters: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        vectors = as_token_embeddings(self.vectors).view()
        vectors.flags.writeable = False
        norms = np.sqrt(np.einsum("td,td->t", vectors, vectors))
        worst = int(np.abs(norms - 1).argmax())
        if abs(float(norms[worst]) - 1) > _UNIT_TOLERANCE:
            raise ConfigError(f"vectors: row {worst} has length {norms[worst]:.6f}, expected unit rows")
        n_original = len(vectors)
        if self.clusters is not None:
            clusters = np.asarray(self.clusters, dtype=np.int32)
            if clusters.ndim != 1 or clusters.size == 0 or clusters.min() < 0 or clusters.max() >= len(vectors):
                raise ConfigError("clusters: expected one pooled row index for each original token")
            object.__setattr__(self, "clusters", clusters)
            n_original = len(clusters)
        if self.tokens is not None and len(self.tokens) != n_original:
            raise ConfigError(f"tokens: {len(self.tokens)} strings for {n_original} tokens")
        if self.grid is not None and self.visual is not None:
            rows, cols = self.grid
            n_visual = len(range(n_original)[self.visual])
            if rows * cols != n_visual:
                raise ConfigError(f"grid: {rows} x {cols} for {n_visual} visual tokens")
        object.__setattr__(self, "vectors", vectors)

    def __reduce__(self) -> tuple[type[MultiVector], tuple[Any, ...]]:
        # by the constructor, so that a copy is checked and read-only too
        return MultiVector, (self.vectors, self.content, self.visual, self.tokens, self.grid, self.clusters)

    @property
    def dim(self) -> int:
        """Components of each token embedding."""
        return int(self.vectors.shape[1])

    def layout(self) -> dict[str, Any]:
        """Return everything but the vectors as JSON values, for :meth:`from_layout`.

        >>> mv = MultiVector(np.eye(2, dtype=np.float32), visual=slice(0, 2), grid=(1, 2))
        >>> mv.layout()["visual"], mv.layout()["grid"], mv.layout()["clusters"]
        ([0, 2, None], [1, 2], None)
        """
        return {
            "content": _bounds(self.content),
            "visual": None if self.visual is None else _bounds(self.visual),
            "tokens": None if self.tokens is None else list(self.tokens),
            "grid": None if self.grid is None else [int(side) for side in self.grid],
            "clusters": None if self.clusters is None else self.clusters.tolist(),
        }

    @classmethod
    def from_layout(cls, vectors: ArrayLike, layout: Mapping[str, Any]) -> MultiVector:
        """Return the multi-vector of these vectors and what :meth:`layout` returned.

        Args:
            vectors: float (n_tokens, dim), unit rows.
            layout: of the same multi-vector.

        Raises:
            ConfigError: the two do not belong together.

        >>> mv = MultiVector(np.eye(2, dtype=np.float32), tokens=("a", "b"))
        >>> MultiVector.from_layout(mv.vectors, mv.layout()).tokens
        ('a', 'b')
        """
        visual, tokens, grid, clusters = (layout[name] for name in ("visual", "tokens", "grid", "clusters"))
        return cls(
            np.asarray(vectors, dtype=np.float32),
            content=slice(*layout["content"]),
            visual=None if visual is None else slice(*visual),
            tokens=None if tokens is None else tuple(tokens),
            grid=None if grid is None else (grid[0], grid[1]),
            clusters=None if clusters is None else np.asarray(clusters, dtype=np.int32),
        )

    @property
    def user_tokens(self) -> NDArray[np.int64]:
        """Indices of the user's own tokens, int64, ascending: the visual ones and those of the text.

        They index the original tokens: ``vectors``, or ``clusters`` when the document was pooled.

        >>> rows = np.eye(6, dtype=np.float32)                  # mark, picture, instruction, text, augmentation
        >>> MultiVector(rows, content=slice(4, 5), visual=slice(1, 3), grid=(1, 2)).user_tokens.tolist()
        [1, 2, 4]
        """
        own = np.zeros(len(self.vectors) if self.clusters is None else len(self.clusters), dtype=np.bool_)
        own[self.content] = True
        if self.visual is not None:
            own[self.visual] = True
        return np.flatnonzero(own)

    def __len__(self) -> int:
        return len(self.vectors)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if dtype is not None and np.dtype(dtype) != self.vectors.dtype:
            return self.vectors.astype(dtype)
        return self.vectors.copy() if copy else self.vectors


def _bounds(part: slice) -> list[int | None]:
    return [None if bound is None else int(bound) for bound in (part.start, part.stop, part.step)]


class PackedEmbeddings:
    """Many multi-vectors laid end to end, so that a kernel needs neither padding nor a mask.

    Args:
        vectors: (total_tokens, dim), float32 or float16.
        offsets: int64 (n_documents + 1,), from 0 to total_tokens, strictly increasing: every document has a token.

    Raises:
        ConfigError: the offsets do not cut the vectors into documents of at least one token.

    >>> packed = PackedEmbeddings.pack([np.eye(2, dtype=np.float32), np.ones((1, 2), dtype=np.float32)])
    >>> len(packed), packed.dim, packed.lengths.tolist(), packed[1].shape
    (2, 2, [2, 1], (1, 2))
    """

    __slots__ = ("offsets", "vectors")

    def __init__(self, vectors: NDArray[np.floating[Any]], offsets: ArrayLike) -> None:
        array = np.asarray(vectors)
        cuts = np.asarray(offsets, dtype=np.int64)
        if array.ndim != 2 or array.dtype not in (np.float32, np.float16):
            raise ConfigError(
                f"vectors: expected float32 or float16 (total_tokens, dim), got {array.dtype} {array.shape}"
            )
        if cuts.ndim != 1 or cuts.size < 1 or cuts[0] != 0 or cuts[-1] != len(array) or (np.diff(cuts) < 1).any():
            raise ConfigError("offsets: expected 0 < ... < total_tokens, with at least one token a document")
        self.vectors = array
        self.offsets = cuts

    @classmethod
    def pack(cls, documents: Sequence[MultiVector | ArrayLike], *, dtype: DTypeLike = np.float32) -> PackedEmbeddings:
        """Lay multi-vectors end to end.

        Args:
            documents: multi-vectors or arrays (n_tokens, dim) of one dim; at least one.
            dtype: float32 or float16.

        Raises:
            ConfigError: no document, or one that is not a multi-vector.
            DimensionError: two documents of different dim.

        >>> PackedEmbeddings.pack([[[1.0, 0.0]]]).vectors.shape
        (1, 2)
        """
        arrays = [as_token_embeddings(np.asarray(doc), name=f"document {i}") for i, doc in enumerate(documents)]
        if not arrays:
            raise ConfigError("documents: expected at least one multi-vector")
        packed = lay_end_to_end(arrays, "document")
        return cls(packed.vectors.astype(dtype, copy=len(arrays) == 1), packed.offsets)  # never the caller's memory

    @property
    def dim(self) -> int:
        """Components of each token embedding."""
        return int(self.vectors.shape[1])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 (n_documents,)."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[np.floating[Any]]:
        """Return a view of one document's token embeddings, (n_tokens, dim)."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.vectors[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[NDArray[np.floating[Any]]]:
        return (self[i] for i in range(len(self)))


def lay_end_to_end(arrays: Sequence[Float32], name: str, first: int = 0) -> PackedEmbeddings:
    """Pack checked multi-vectors, uncopied when there is one.

    Args:
        arrays: float32 (n_tokens, dim) each, at least one.
        name: what to call one in an error.
        first: number of the first one, for errors.

    Raises:
        DimensionError: two of different dim.

    >>> len(lay_end_to_end([np.ones((2, 3), np.float32), np.ones((1, 3), np.float32)], "page"))
    2
    """
    for i, array in enumerate(arrays):
        if array.shape[1] != arrays[0].shape[1]:
            raise DimensionError(f"{name} {first + i}", expected=arrays[0].shape[1], actual=array.shape[1])
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])])
    return PackedEmbeddings(arrays[0] if len(arrays) == 1 else np.concatenate(arrays), offsets)


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """Everything that shapes a multi-vector: two infos that differ may not share an index.

    Attributes:
        fingerprint: hex digest of the checkpoint's config and projection weights.
        model: the name or folder it was loaded by; not compared.
        family: row of :mod:`colqwen3_retrievers.models.families`.
        dim: components of each token embedding.
        pool_factor: original document tokens for each kept one; 1 means no pooling.
        max_visual_tokens: most visual tokens a page.
        include_text: whether a page's text joins its prompt.
        rendering_version: version of the family's prompts and pixels.
        verified: whether the family's prompts and pixel bounds were confirmed by its authors' files.
        unverified: what was not.
        revision: the requested revision of a hub model; not compared.
        pool_method: how document tokens were pooled; :func:`~colqwen3_retrievers.vectors.compression.pool_tokens` is
            ``"hierarchical"``.

    >>> info = EncoderInfo("ab12", "tiny", "tomoro", 128, 1, 1280, False, 1)
    >>> EncoderInfo.from_dict(info.to_dict()) == info
    True
    """

    fingerprint: str
    model: str
    family: str
    dim: int
    pool_factor: int
    max_visual_tokens: int
    include_text: bool
    rendering_version: int
    verified: bool = True
    unverified: tuple[str, ...] = ()
    revision: str | None = None
    pool_method: str = "hierarchical"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values by field name."""
        return {**dataclasses.asdict(self), "unverified": list(self.unverified)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderInfo:
        """Return the info of :meth:`to_dict`'s values.

        Raises:
            ConfigError: a field is missing.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        try:
            known = {name: values[name] for name in names if name in values}
            return cls(**{**known, "unverified": tuple(known.get("unverified", ()))})
        except TypeError as exc:
            raise ConfigError(f"encoder info: {exc}") from exc


COMPARED: Final = ("fingerprint", "family", "dim", "pool_factor", "pool_method", "include_text", "rendering_version")
"""Fields of an :class:`EncoderInfo` that must agree before two multi-vectors may be compared."""
