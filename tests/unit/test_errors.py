"""The error tree, and that every error survives the way between processes."""

from __future__ import annotations

import inspect
import pickle

import pytest

from colqwen3_retrievers import errors
from colqwen3_retrievers.errors import ColQwen3Error, require

TREE = {
    "ConfigError": "ColQwen3Error", "DimensionError": "ConfigError", "MissingExtraError": "ColQwen3Error",
    "CheckpointError": "ColQwen3Error", "EncodeError": "ColQwen3Error", "InputTooLongError": "EncodeError",
    "EngineError": "ColQwen3Error", "EngineTimeoutError": "EngineError", "EngineResponseError": "EngineError",
    "StoreError": "ColQwen3Error", "StoreMismatchError": "StoreError", "StoreUnavailableError": "StoreError",
    "PageError": "ColQwen3Error",
}  # fmt: skip

EXAMPLES = [
    errors.ConfigError("no"),
    errors.DimensionError("query", expected=3, actual=4),
    errors.MissingExtraError("pdf", "pypdfium2"),
    errors.CheckpointError("torn", missing=["a"], unexpected=["b"]),
    errors.EncodeError("no", index=3),
    errors.InputTooLongError("long", limit=5, actual=9, index=1),
    errors.EngineError("no", retryable=True),
    errors.EngineTimeoutError("slow"),
    errors.EngineResponseError("no", status_code=500, retryable=True),
    errors.StoreError("no"),
    errors.StoreMismatchError("no"),
    errors.StoreUnavailableError("no"),
    errors.PageError("broken", source="a.pdf", page=3),
]


def test_the_tree() -> None:
    found = {
        name: kind.__mro__[1].__name__
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, ColQwen3Error) and kind is not ColQwen3Error
    }
    assert found == TREE
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.MissingExtraError, ImportError)
    assert {type(example).__name__ for example in EXAMPLES} == set(TREE)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_survive_pickling_and_copying(error: ColQwen3Error) -> None:
    for other in (pickle.loads(pickle.dumps(error)), error.copy()):
        assert other is not error
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert vars(other) == vars(error)


def test_an_error_at_a_position_keeps_what_it_knows() -> None:
    moved = errors.InputTooLongError("long", limit=5, actual=9).at(7)
    assert (str(moved), moved.index, moved.limit, moved.actual) == ("input 7: long", 7, 5, 9)


def test_the_message_of_a_missing_extra_is_the_pip_line() -> None:
    with pytest.raises(errors.MissingExtraError, match=r'pip install "colqwen3-retrievers\[pdf\]"') as caught:
        require("pdf", "surely_not_installed.anywhere")
    assert caught.value.extra == "pdf"


def test_a_dependency_that_is_broken_inside_is_not_called_missing(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("packages")
    (folder / "broken_dependency.py").write_text("import something_it_needs")
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(ModuleNotFoundError, match="something_it_needs") as caught:
        require("pdf", "broken_dependency")
    assert not isinstance(caught.value, ColQwen3Error)
