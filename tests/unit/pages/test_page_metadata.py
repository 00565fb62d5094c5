"""Metadata as people hand it over: numbers of numpy, times of pandas, paths and so on, kept as JSON values."""

from __future__ import annotations

import enum
import json
import uuid
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest

from colqwen3_retrievers import Page
from colqwen3_retrievers.errors import ConfigError


class Colour(enum.Enum):
    RED = "red"


CONVERTED: list[tuple[Any, Any]] = [
    (np.int64(3), 3),
    (np.uint8(3), 3),
    (np.float32(0.5), 0.5),
    (np.float64(2), 2.0),
    (np.longdouble(1.5), 1.5),
    (np.bool_(True), True),
    (np.str_("x"), "x"),
    (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    (np.array(7), 7),
    (np.datetime64("2024-05-01"), "2024-05-01"),
    (np.array(["2024-05-01T10:00:00.250"], dtype="datetime64[ns]"), ["2024-05-01T10:00:00.25"]),
    (date(2024, 5, 1), "2024-05-01"),
    (time(10, 30), "10:30:00"),
    (datetime(2024, 5, 1, 10), "2024-05-01T10:00:00"),
    (datetime(2024, 5, 1, 10, tzinfo=UTC), "2024-05-01T10:00:00+00:00"),
    (datetime(2024, 5, 1, 1, tzinfo=timezone(timedelta(hours=2))), "2024-04-30T23:00:00+00:00"),
    (datetime.min.replace(tzinfo=timezone(timedelta(hours=2))), "0001-01-01T00:00:00+02:00"),
    (Decimal("19.90"), 19.9),
    (Decimal("3.00"), 3),
    (Decimal(2**60 + 1), 2**60 + 1),
    (Fraction(1, 4), 0.25),
    (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    (PurePosixPath("reports/a.pdf"), "reports/a.pdf"),
    ({"b", "a"}, ["a", "b"]),
    (Colour.RED, "red"),
    ((1, np.int8(2)), [1, 2]),
    ({"deep": [np.int64(1), {"day": date(2024, 5, 1)}]}, {"deep": [1, {"day": "2024-05-01"}]}),
]


@pytest.mark.parametrize(("value", "kept"), CONVERTED, ids=lambda value: repr(value)[:40])
def test_values_of_common_types_become_json(value: Any, kept: Any) -> None:
    metadata = Page(id="a", metadata={"key": value}).metadata
    assert metadata == {"key": kept} and type(metadata["key"]) is type(kept)
    assert json.loads(json.dumps(metadata)) == metadata


def test_a_row_of_a_data_frame_is_metadata() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({
        "year": [2024, 2025], "price": [1.5, 2.0], "day": pandas.to_datetime(["2024-05-01", "2024-05-02"]),
        "sent": pandas.to_datetime(["2024-05-01T01:00+02:00"] * 2), "kind": pandas.Categorical(["a", "b"]),
        "final": [True, False],
    })  # fmt: skip
    for row in (frame.iloc[0].to_dict(), frame.to_dict("records")[0], dict(frame.iloc[0])):
        assert Page(id="a", metadata=row).metadata == {
            "year": 2024, "price": 1.5, "day": "2024-05-01T00:00:00", "sent": "2024-04-30T23:00:00+00:00", "kind": "a",
            "final": True,
        }  # fmt: skip
    for missing in (pandas.NaT, pandas.NA):
        with pytest.raises(ConfigError, match="'day': "):
            Page(id="a", metadata={"year": 2024, "day": missing})


@pytest.mark.parametrize(
    "value",
    [float("nan"), np.float32("nan"), np.float64("inf"), Decimal("NaN"), Decimal("sNaN"), Decimal("1e999"),
     np.datetime64("NaT"), np.timedelta64(1, "D"), timedelta(1), np.array([1.0, np.nan]), 1j, b"x", object(),
     Fraction(10**400)],
    ids=repr,
)  # fmt: skip
def test_what_has_no_json_value_is_an_error_that_names_its_key(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^page 'a': metadata must be JSON values by name: 'odd': "):
        Page(id="a", metadata={"good": 1, "odd": value})


def test_metadata_that_holds_itself_or_never_ends_is_an_error() -> None:
    circle: dict[str, Any] = {}
    circle["circle"] = circle
    deep: Any = "bottom"
    for _ in range(100_000):
        deep = [deep]
    for value in (circle, deep):
        with pytest.raises(ConfigError, match="'odd': "):
            Page(id="a", metadata={"odd": value})
