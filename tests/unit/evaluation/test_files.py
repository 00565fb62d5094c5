"""Files of evaluations: nothing is written by halves, nothing that is read is overwritten, every id comes back."""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path

import pytest

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.evaluation.files import check_outputs, write_text
from colqwen3_retrievers.evaluation.trec import decode_id, encode_id, read_qrels, read_run, write_qrels, write_run

IDS = [
    "my page",
    "100%.pdf",
    "a%20b",
    "% 41",
    "%2 5",
    "%%20",
    "p\u2028x",
    "中 文",
    "tab\there",
    "nul\0",
    "\u00a0",
    "%41",
]


def test_every_id_comes_back_from_a_trec_file(tmp_path: Path) -> None:
    source = random.Random(0)
    names = IDS + ["".join(source.choices("%2 0aF\t\u2028é", k=6)) + "x" for _ in range(2000)]
    for name in names:
        assert decode_id(encode_id(name)) == name
        assert encode_id(name).split() == [encode_id(name)]
    assert encode_id("reports/a.pdf#page=3") == "reports/a.pdf#page=3"
    run = {query: {page: float(-at) for at, page in enumerate(IDS[:9])} for query in IDS[:9]}
    qrels = {query: {page: at - 1 for at, page in enumerate(IDS[:9])} for query in IDS[:9]}
    write_run(tmp_path / "run", run)
    write_qrels(tmp_path / "qrels", qrels)
    assert read_run(tmp_path / "run") == run
    assert read_qrels(tmp_path / "qrels") == qrels


def test_a_run_in_any_order_is_written_by_score(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"q": {"a": 1.0, "b": 2.0, "c": 2.0}})
    assert [line.split()[2:5] for line in (tmp_path / "run").read_text().splitlines()] == [
        ["b", "1", "2"], ["c", "2", "1.99999988"], ["a", "3", "1"],
    ]  # fmt: skip
    for score in (float("nan"), float("inf"), 1e300, None):
        with pytest.raises(ConfigError, match="has the score"):
            write_run(tmp_path / "run", {"q": {"a": score}})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q Q0 a 1 2.0\n", "run:1: expected 'query Q0 page rank score tag' with a number as score, got 'q Q0 a 1 2.0'"),
        ("q Q0 a 1 much t\n", "run:1: expected .* with a number as score, got 'q Q0 a 1 much t'"),
        ("q Q0 a 1 nan t\n", "run:1 has the score nan"),
        ("q Q0 a 1 2 t\n\nq Q0 a 2 1 t\n", "run:3: .*twice"),
        ("", "no lines"),
    ],
)
def test_bad_lines_of_a_run_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q 0 a\n", "qrels:1: expected 'query 0 page relevance' with a whole number as relevance, got 'q 0 a'"),
        ("\nq 0 a 0.5\n", "qrels:2: expected .*got 'q 0 a 0.5'"),
        ("q 0 a 20000\n", "qrels:1: relevance: .*got 20000"),
        ("q 0 a 1\r\nq 0 a 1\r\n", "qrels:2: .*comes twice"),
        ("\n", "no lines"),
    ],
)
def test_bad_lines_of_judgements_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "qrels").write_bytes(text.encode())
    with pytest.raises(ConfigError, match=message):
        read_qrels(tmp_path / "qrels")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    path.chmod(0o640)
    (tmp_path / "link").symlink_to(path)
    write_text(tmp_path / "link", "new")
    assert (path.read_text(), (tmp_path / "link").is_symlink()) == ("new", True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"a\.json: cannot be written: No space left"):
        write_text(path, "newer")
    assert path.read_text() == "new"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "link"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    check_outputs({"--json": os.devnull, "--run": os.devnull})
    write_text(os.devnull, "gone")
    assert not Path(os.devnull).is_file()


def test_outputs_are_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "q.tsv").write_text("x")
    (tmp_path / "hard").hardlink_to(tmp_path / "in" / "q.tsv")
    kept = [tmp_path / "in" / "q.tsv", tmp_path / "in"]
    check_outputs({"--json": str(tmp_path / "new" / "deep" / "a.json"), "--run": None}, kept)
    assert (tmp_path / "new" / "deep").is_dir()
    assert not list((tmp_path / "new" / "deep").iterdir())
    for name, message in (
        ("in/q.tsv", "it is read"), ("in/new", "it is in"), ("hard", "it is read"), ("in", "it is read"),
        ("new", "it is a folder"), ("file/x", "cannot be written"), ("a\0b", "null"), ("x" * 300, "too long"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"--json .*{message}"):
            check_outputs({"--json": str(tmp_path / name)}, kept)
    with pytest.raises(ConfigError, match=r"--run .*--json names it too"):
        check_outputs({"--json": str(tmp_path / "a"), "--run": f"{tmp_path}/in/../a"})
