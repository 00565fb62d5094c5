"""MaxSim over everything it accepts, the k best of a stream, and what is refused. Kernels have their own contract."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

from colqwen3_retrievers.errors import ConfigError, DimensionError
from colqwen3_retrievers.vectors.late_interaction import chunk_bounds, maxsim, numpy_kernel, relevance
from colqwen3_retrievers.vectors.multi_vector import MultiVector, PackedEmbeddings


def unit(rng: np.random.Generator, n: int, dim: int = 16) -> np.ndarray:
    rows = rng.standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def slow_scores(queries: list[np.ndarray], documents: list[np.ndarray]) -> np.ndarray:
    scores = np.zeros((len(queries), len(documents)))
    for i, query in enumerate(queries):
        for j, document in enumerate(documents):
            for token in query.astype(float):
                scores[i, j] += max(float(token @ other) for other in document.astype(float))
    return scores


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def queries(rng: np.random.Generator) -> list[np.ndarray]:
    return [unit(rng, n) for n in (4, 1, 9)]


@pytest.fixture
def documents(rng: np.random.Generator) -> list[np.ndarray]:
    return [unit(rng, n) for n in (1, 30, 2, 7)]


# -- what maxsim accepts -----------------------------------------------------------------------------------------------

FORMS = {
    "arrays": list,
    "tuple": tuple,
    "nested lists": lambda arrays: [array.tolist() for array in arrays],
    "float64": lambda arrays: [array.astype(np.float64) for array in arrays],
    "multi-vectors": lambda arrays: [MultiVector(array) for array in arrays],
    "packed": PackedEmbeddings.pack,
}


@pytest.mark.parametrize("query_form", FORMS)
@pytest.mark.parametrize("document_form", FORMS)
def test_every_form_of_several_multi_vectors(queries, documents, query_form: str, document_form: str) -> None:
    scores = maxsim(FORMS[query_form](queries), FORMS[document_form](documents))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, slow_scores(queries, documents), atol=1e-6)


@pytest.mark.parametrize("form", [np.asarray, lambda array: array.tolist(), MultiVector], ids=["array", "list", "mv"])
def test_one_multi_vector_counts_as_one(queries, documents, form) -> None:
    expected = slow_scores(queries, documents)
    np.testing.assert_allclose(maxsim(form(queries[2]), form(documents[1])), expected[2:, 1:2], atol=1e-6)


def test_mean_divides_by_query_tokens(queries, documents) -> None:
    expected = slow_scores(queries, documents) / np.array([[4], [1], [9]])
    means = maxsim(queries, documents, mode="mean")
    assert means.dtype == np.float32
    np.testing.assert_allclose(means, expected, atol=1e-6)


def test_torch_tensors_on_the_cpu(queries, documents) -> None:
    torch = pytest.importorskip("torch")
    scores = maxsim([torch.from_numpy(query) for query in queries], torch.from_numpy(documents[1]))
    np.testing.assert_allclose(scores, slow_scores(queries, documents)[:, 1:2], atol=1e-6)


def test_a_page_at_minus_a_half_ranks_below_one_at_minus_four_tenths() -> None:
    far, near = [[-0.5, 0.8660254]], [[-0.4, 0.9165151], [-1.0, 0.0], [-0.9, 0.4358899]]
    assert maxsim([[1.0, 0.0]], [far, near]).round(5).tolist() == np.float32([[-0.5, -0.4]]).tolist()


@pytest.mark.parametrize("none", [[], (), PackedEmbeddings(np.empty((0, 16), dtype=np.float16), [0])], ids=type)
def test_no_queries_or_documents_give_an_empty_matrix(queries, documents, none) -> None:
    for scores, shape in (
        (maxsim(queries, none), (len(queries), 0)),
        (maxsim(none, documents), (0, len(documents))),
        (maxsim(none, none, mode="mean"), (0, 0)),
    ):
        assert (scores.shape, scores.dtype) == (shape, np.float32)
    with pytest.raises(ConfigError, match="document 0: expected shape"):
        maxsim(none, [[]])


def test_a_long_list_is_packed_block_by_block(rng, monkeypatch) -> None:
    documents = [unit(rng, n) for n in rng.integers(1, 9, 50)]
    whole = maxsim(unit(rng, 3), documents)
    seen: list[int] = []

    def counting(queries: PackedEmbeddings, block: PackedEmbeddings) -> np.ndarray:
        seen.append(len(block))
        return numpy_kernel(queries, block)

    monkeypatch.setattr("colqwen3_retrievers.vectors.late_interaction._BLOCK_FLOATS", 20 * 16)
    rng = np.random.default_rng(0)
    documents = [unit(rng, n) for n in rng.integers(1, 9, 50)]
    np.testing.assert_allclose(maxsim(unit(rng, 3), documents, kernel=counting), whole, rtol=0, atol=1e-6)
    assert sum(seen) == 50
    assert len(seen) > 5


def test_a_given_kernel_is_the_one_that_computes() -> None:
    def seven(queries: PackedEmbeddings, documents: PackedEmbeddings) -> np.ndarray:
        return np.full((len(queries), len(documents)), 7, dtype=np.float32)

    assert maxsim([[1.0]], [[1.0]], kernel=seven).tolist() == [[7.0]]
    assert maxsim([[1.0], [1.0]], [[1.0]], mode="mean", kernel=seven).tolist() == [[3.5]]


def test_memory_is_bounded_whatever_the_corpus() -> None:
    """All similarities would be 480 MB, those of one chunk 48 MB, the corpus in float32 20 MB; 15 are allowed."""
    documents = PackedEmbeddings(np.ones((40_000, 128), dtype=np.float16), np.arange(0, 40_001, 500))
    query = np.ones((3000, 128), dtype=np.float32)
    tracemalloc.start()
    maxsim(query, documents)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15e6, f"{peak / 1e6:.0f} MB"


def test_chunks_hold_whole_documents_and_all_of_them(rng) -> None:
    for _ in range(50):
        offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 40, 30))])
        bounds = chunk_bounds(offsets, 50)
        assert bounds[0] == 0
        assert bounds[-1] == 30
        assert all(a < b for a, b in itertools.pairwise(bounds))
        assert all(offsets[b] - offsets[a] <= 50 for a, b in itertools.pairwise(bounds))


# -- relevance ---------------------------------------------------------------------------------------------------------


def test_relevance_is_half_of_one_plus_the_mean() -> None:
    assert relevance(3.0, 4) == 0.875
    assert relevance(np.float32(-1.0), 4) == 0.375
    assert (relevance(4.001, 4), relevance(-4.001, 4)) == (1.0, 0.0)
    assert type(relevance(np.float32(0.5), 1)) is float


@pytest.mark.parametrize(("score", "tokens"), [(np.nan, 3), (np.inf, 3), (1.0, 0), (1.0, -1)])
def test_relevance_refuses(score: float, tokens: int) -> None:
    with pytest.raises(ConfigError):
        relevance(score, tokens)


# -- what is refused ---------------------------------------------------------------------------------------------------

ROW = [[1.0, 0.0]]
BAD = {
    "none": (None, "got NoneType"),
    "text": ("what was the revenue?", "got str"),
    "generator": ((row for row in [ROW]), None),
    "flat": ([1.0, 0.0], "expected shape"),
    "flat array": (np.ones(3), "expected shape"),
    "padded batch": (np.ones((2, 3, 2), dtype=np.float32), "padding"),
    "integers": (np.ones((2, 2), dtype=np.int64), "floating"),
    "no tokens": ([ROW, np.ones((0, 2))], "1: expected shape"),
    "ragged rows": ([[1.0, 0.0], [1.0]], "not a"),
    "ragged rows in a list": ([[[1.0, 0.0], [1.0]]], "0: not a"),
    "nan": ([ROW, [[np.nan, 0.0]]], "1: NaN"),
    "texts": (["a", "b"], "0: expected shape"),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("side", ["queries", "documents"])
def test_bad_multi_vectors(side: str, bad: object, message: str | None) -> None:
    arguments = (bad, ROW) if side == "queries" else (ROW, bad)
    with pytest.raises(ConfigError, match=message or "generator"):
        maxsim(*arguments)


def test_tensors_numpy_cannot_read_are_named() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ConfigError, match="document 1: not a"):
        maxsim(ROW, [ROW, torch.ones(1, 2, dtype=torch.bfloat16)])
    with pytest.raises(ConfigError, match="query 0: not a"):
        maxsim(torch.ones(1, 2, requires_grad=True), ROW)


def test_dims_that_differ() -> None:
    with pytest.raises(DimensionError, match="query against document: expected dim 2, got 3") as caught:
        maxsim(ROW, np.ones((1, 3)))
    assert (caught.value.expected, caught.value.actual) == (2, 3)
    with pytest.raises(DimensionError, match="query 1: expected dim 2, got 1"):
        maxsim([ROW, [[1.0]]], ROW)
    with pytest.raises(DimensionError, match="document 2: expected dim 2, got 1"):
        maxsim(ROW, [ROW, ROW, [[1.0]]])


@pytest.mark.parametrize("mode", ["max", "", None])
def test_unknown_mode(mode) -> None:
    with pytest.raises(ConfigError, match="mode: expected"):
        maxsim(ROW, ROW, mode=mode)


def test_a_list_of_packed_chunks_is_refused() -> None:
    with pytest.raises(ConfigError, match="list of PackedEmbeddings"):
        maxsim(ROW, [PackedEmbeddings.pack([ROW])])


def test_not_finite_packed_documents_are_named_by_their_place() -> None:
    bad = PackedEmbeddings(np.array([[1, 1], [np.inf, 0]], dtype=np.float16), [0, 1, 2])
    with pytest.raises(ConfigError, match="query 0 against document 1: NaN or infinity"):
        maxsim(ROW, bad)


def test_a_kernel_of_wrong_shape_is_refused() -> None:
    for wrong in (np.zeros((2, 1), dtype=np.float32), np.zeros((1, 1))):
        with pytest.raises(ConfigError, match="kernel: expected float32"):
            maxsim(ROW, ROW, kernel=lambda queries, documents, wrong=wrong: wrong)
