"""One vector a page and a query: what it computes, that it stays the same for ever, and that it finds pages."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys

import numpy as np
import pytest

from colqwen3_retrievers import MultiVector, maxsim
from colqwen3_retrievers.errors import ConfigError, DimensionError
from colqwen3_retrievers.vectors.single_vector import (
    SingleVectorSettings,
    _directions,
    _planes_and_signs,
    single_vector,
    single_vectors,
)

DIRECTIONS = SingleVectorSettings(token_dim=24, method="directions", dim=512, nearest=5)
FDE = SingleVectorSettings(token_dim=24, method="fde", dim=512)
BOTH = pytest.mark.parametrize("settings", [DIRECTIONS, FDE], ids=["directions", "fde"])


def unit(n: int, dim: int = 24, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# -- what it computes --------------------------------------------------------------------------------------------------


def test_directions_by_hand() -> None:
    page, query = unit(7, seed=1), unit(3, seed=2)
    directions = _directions(24, 512, 0)
    reach = [max(float(token @ directions[:, j]) for token in page) for j in range(512)]
    expected = np.array(reach) / np.linalg.norm(reach)
    np.testing.assert_allclose(single_vector(page, DIRECTIONS), expected, atol=1e-6)
    asked = np.zeros(512)
    for token in query:
        similar = [float(token @ directions[:, j]) for j in range(512)]
        least = sorted(similar, reverse=True)[DIRECTIONS.nearest - 1]
        asked += [max(value, 0) if value >= least else 0 for value in similar]
    expected = asked / np.linalg.norm(asked)
    np.testing.assert_allclose(single_vector(query, DIRECTIONS, is_query=True), expected, atol=1e-6)


def test_fde_by_hand() -> None:
    page, query = unit(9, seed=1), unit(3, seed=2)
    planes, signs = _planes_and_signs(24, 4, 0)
    made: dict[bool, list[float]] = {False: [], True: []}
    for is_query, rows in ((False, page), (True, query)):
        for r in range(4):
            codes = [sum(1 << b for b in range(4) if token @ planes[:, 4 * r + b] > 0) for token in rows]
            short = [token @ signs[:, 8 * r : 8 * r + 8] for token in rows]
            for partition in range(16):
                inside = [vector for vector, code in zip(short, codes, strict=True) if code == partition]
                if is_query:
                    made[True] += list(np.sum(inside, axis=0)) if inside else [0.0] * 8
                elif inside:
                    made[False] += list(np.mean(inside, axis=0))
                else:
                    apart = [(code ^ partition).bit_count() for code in codes]
                    made[False] += list(short[apart.index(min(apart))])
    for is_query, rows in ((False, page), (True, query)):
        expected = np.array(made[is_query]) / np.linalg.norm(made[is_query])
        np.testing.assert_allclose(single_vector(rows, FDE, is_query=is_query), expected, atol=1e-6)


@BOTH
def test_shape_dtype_and_length(settings: SingleVectorSettings) -> None:
    rows = unit(30).astype(np.float16)
    for is_query in (False, True):
        made = single_vector(rows, settings, is_query=is_query)
        assert (made.shape, made.dtype) == ((512,), np.float32)
        assert float(np.linalg.norm(made)) == pytest.approx(1, abs=1e-6)
    assert not np.allclose(single_vector(rows, settings), single_vector(rows, settings, is_query=True))


@BOTH
def test_the_order_of_tokens_does_not_matter(settings: SingleVectorSettings) -> None:
    rows = unit(30)
    for is_query in (False, True):
        one, other = (single_vector(made, settings, is_query=is_query) for made in (rows, rows[::-1]))
        difference = np.abs(one - other)
        # An empty partition takes the first of the tokens equally near, which is another one.
        assert difference.max() < 1e-6 or (settings.method == "fde" and not is_query)


def test_repeated_tokens_change_no_direction() -> None:
    rows = unit(30)
    one, other = single_vector(rows, DIRECTIONS), single_vector(np.repeat(rows, 3, axis=0), DIRECTIONS)
    np.testing.assert_allclose(one, other, atol=1e-6)  # BLAS rounds by the shape of a product


@BOTH
def test_several_at_once(settings: SingleVectorSettings) -> None:
    pages = [MultiVector(unit(n, seed=n)) for n in (1, 5, 40)]
    for is_query in (False, True):
        made = single_vectors(pages, settings, is_query=is_query)
        assert np.array_equal(made, np.stack([single_vector(page, settings, is_query=is_query) for page in pages]))
    assert single_vectors([], settings).shape == (0, 512)


# -- that it stays the same --------------------------------------------------------------------------------------------


def test_the_random_numbers_are_those_of_every_release() -> None:
    """Vectors stored with one release are compared with those of the next: these digests may never change."""
    directions = _directions(128, 2048, 0)
    planes, signs = _planes_and_signs(128, 16, 0)
    made = [hashlib.sha256((array > 0).tobytes()).hexdigest()[:16] for array in (directions, planes, signs)]
    assert made == ["a6e6de1890f58ae5", "bbca113a882266ba", "bf81f6f049044b49"]
    assert abs(float(directions.mean())) < 1e-3
    assert np.abs(directions.T[:64] @ directions[:, 64:256]).max() < 0.5


def test_fingerprint_tells_settings_apart() -> None:
    changes = [{"token_dim": 32}, {"method": "fde"}, {"dim": 1024}, {"nearest": 6}, {"seed": 1}]
    marks = {dataclasses.replace(DIRECTIONS, **change).fingerprint for change in changes}  # type: ignore[arg-type]
    assert len(marks | {DIRECTIONS.fingerprint}) == 6
    assert DIRECTIONS.fingerprint == dataclasses.replace(DIRECTIONS).fingerprint == "68081263c7404172"


@BOTH
def test_another_seed_makes_other_vectors(settings: SingleVectorSettings) -> None:
    rows = unit(20)
    other = dataclasses.replace(settings, seed=1)
    assert not np.allclose(single_vector(rows, settings), single_vector(rows, other))


def test_it_needs_numpy_alone() -> None:
    code = (
        "import sys; from colqwen3_retrievers.vectors.single_vector import SingleVectorSettings, single_vector; "
        "single_vector([[1.0, 0.0]], SingleVectorSettings(2)); "
        "print(sorted({'torch', 'scipy', 'PIL'} & {m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


# -- that it finds -----------------------------------------------------------------------------------------------------


@BOTH
def test_candidates_hold_what_maxsim_puts_first(settings: SingleVectorSettings) -> None:
    rng = np.random.default_rng(5)
    pages = [unit(60, seed=100 + n) for n in range(120)]
    queries, meant = [], []
    for _ in range(40):
        page = int(rng.integers(len(pages)))
        drawn = pages[page][rng.choice(60, 12, replace=False)] + 0.1 * rng.standard_normal((12, 24))
        queries.append((drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32))
        meant.append(page)
    exact = maxsim(queries, pages).argmax(axis=1)
    assert exact.tolist() == meant
    single = dataclasses.replace(settings, dim=2048)
    scores = single_vectors(queries, single, is_query=True) @ single_vectors(pages, single).T
    found = np.mean([best in np.argsort(-row)[:12] for row, best in zip(scores, exact, strict=True)])
    means = np.stack([query.mean(axis=0) for query in queries]) @ np.stack([page.mean(axis=0) for page in pages]).T
    by_mean = np.mean([best in np.argsort(-row)[:12] for row, best in zip(means, exact, strict=True)])
    assert found > by_mean + 0.05
    assert found >= 0.85


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"method": "mean"}, "method"), ({"dim": 0}, "dim"), ({"dim": 65_537}, "dim"), ({"dim": 512.0}, "dim"),
        ({"token_dim": 0}, "token_dim"), ({"nearest": 513}, "nearest"), ({"nearest": True}, "nearest"),
        ({"seed": -1}, "seed"), ({"method": "fde", "dim": 500}, "multiple of 128"),
    ],
)  # fmt: skip
def test_bad_settings(wrong: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        SingleVectorSettings(**{"token_dim": 24, "dim": 512, **wrong})  # type: ignore[arg-type]


@BOTH
def test_bad_multi_vectors(settings: SingleVectorSettings) -> None:
    with pytest.raises(DimensionError) as caught:
        single_vector(unit(3, dim=8), settings)
    assert (caught.value.expected, caught.value.actual) == (24, 8)
    for wrong in ([], [[1]], np.full((2, 24), np.nan), np.zeros((3, 24))):
        with pytest.raises(ConfigError):
            single_vector(wrong, settings)
    with pytest.raises(ConfigError, match=r"^1: "):
        single_vectors([unit(2), np.zeros((2, 24))], settings)
    with pytest.raises(DimensionError, match=r"^1: "):
        single_vectors([unit(2), unit(2, dim=8)], settings)
