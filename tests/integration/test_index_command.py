"""``colqwen3 index`` and ``delete``: what a first day brings, over real files and the model that comes along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from colqwen3_retrievers import PageIndex
from colqwen3_retrievers.cli.main import main

SMALL = ["--model", "tiny", "--max-visual-tokens", "64", "--device", "cpu"]


def draw(path: Path, shade: int, size: tuple[int, int] = (96, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, shade).save(path)


@pytest.fixture
def years(tmp_path: Path) -> Path:
    """A report of the same name in each of two folders."""
    draw(tmp_path / "years" / "2023" / "report.png", 40)
    draw(tmp_path / "years" / "2024" / "report.png", 200)
    return tmp_path / "years"


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "index")


def index(place: str, *line: str | Path) -> int:
    return main(["index", *map(str, line), "--index", place, *SMALL])


def test_a_second_folder_of_the_same_names(years: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert index(place, years / "2023") == 0
    assert index(place, years / "2024") == 1
    told = capsys.readouterr().err
    assert "2023/report.png" in told and "2024/report.png" in told and "--root" in told
    assert index(place, years / "2023", years / "2024") == 1
    assert "--root" in capsys.readouterr().err
    for more in ([], ["--sync"]):
        assert index(place, years / "2023", years / "2024", "--root", years, *more) == 0
    with PageIndex.open(place) as made:
        assert made.ids() == ["2023/report.png#page=1", "2024/report.png#page=1"]
    moved = years.rename(years.with_name("moved"))
    draw(moved / "2023" / "report.png", 90)
    assert index(place, moved) == 1
    assert "--moved" in capsys.readouterr().err
    assert index(place, moved, "--moved") == 0
    assert "0 added, 1 updated, 1 unchanged" in capsys.readouterr().out


def test_a_page_that_cannot_be_encoded_is_skipped(years: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    draw(years / "2023" / "a-line.png", 0, (9_000, 1))
    (years / "2023" / "broken.png").write_bytes(b"no picture")
    assert index(place, years) == 1
    assert index(place, years, years / "gone", "--skip-errors") == 0
    shown = capsys.readouterr()
    assert "2 added, 0 updated, 0 unchanged, 3 failed; 2 pages in the index\n" in shown.out
    lines = shown.err.splitlines()[-3:]
    assert all(line.startswith("colqwen3: ") for line in lines)
    assert [sum(name in line for line in lines) for name in ("a-line.png", "broken.png", "gone")] == [1, 1, 1]
    assert index(place, years, "--sync") == 1
    assert index(place, years, "--sync", "--skip-errors") == 0


def test_a_wrong_path_makes_no_index(place: str, tmp_path: Path) -> None:
    assert index(place, tmp_path / "gone") == 1
    assert not Path(place).exists()


def test_an_encrypted_pdf(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("reportlab")
    pytest.importorskip("pypdfium2")
    from tests.bad_pages import encrypted_pdf

    (tmp_path / "a.pdf").write_bytes(encrypted_pdf("geheim wort"))
    monkeypatch.delenv("COLQWEN3_PDF_PASSWORD", raising=False)
    assert index(place, tmp_path / "a.pdf") == 1
    assert "--password-file" in capsys.readouterr().err
    file = tmp_path / "password"
    for content, says in ((b"", "expected one line"), (b"geheim\nwort\n", "expected one line"), (b"\xff\xfe", "UTF-8")):
        file.write_bytes(content)
        assert index(place, tmp_path / "a.pdf", "--password-file", file) == 1
        told = capsys.readouterr().err
        assert says in told and "geheim" not in told and "xff" not in told
    assert index(place, tmp_path / "a.pdf", "--password-file", tmp_path / "none") == 1
    assert "none: cannot be read: No such file" in capsys.readouterr().err
    monkeypatch.setenv("COLQWEN3_PDF_PASSWORD", "wrong one")
    assert index(place, tmp_path / "a.pdf") == 1
    assert "wrong one" not in capsys.readouterr().err
    file.write_bytes(b"geheim wort\r\n")
    assert index(place, tmp_path / "a.pdf", "--password-file", file) == 0  # it beats the environment
    monkeypatch.setenv("COLQWEN3_PDF_PASSWORD", "geheim wort")
    draw(tmp_path / "new" / "b.png", 3)
    (tmp_path / "new" / "a.pdf").write_bytes(encrypted_pdf("geheim wort"))
    assert index(str(tmp_path / "other"), tmp_path / "new", "--sync") == 0


def test_metadata_filters_and_their_slips(years: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert index(place, years, "--metadata", "year=2024", "--metadata", "team=audit") == 0
    assert index(place, years, "--sync") == 0
    assert "2 unchanged" in capsys.readouterr().out
    search = ["search", "x", "--index", place, "--device", "cpu", "--where"]
    for where in ('{"page": 1, "year": {"$gte": 2024}}', '{"number": 1, "team": "audit"}'):
        assert main([*search, where]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 2
    assert main([*search, '{"yeer": 2024}']) == 0
    unknown = "colqwen3: where: no page has 'yeer' in its metadata; a page's own fields are id, source, number, label, "
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith(unknown) for line in lines) == 1 and "colqwen3: no pages" in lines
    assert main(["delete", "--index", place, "--where", '{"yeer": 2024}']) == 1
    assert capsys.readouterr().err.startswith(unknown)
    assert main([*search, '{"year": 1999, "page": 9}']) == 0
    assert "has 'year'" not in capsys.readouterr().err
    assert index(place, years, "--metadata", "year") == 1
    assert "KEY=VALUE" in capsys.readouterr().err


def test_delete(years: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert index(place, years) == 0
    capsys.readouterr()
    delete = ["delete", "--index", place]
    assert main([*delete]) == 1
    assert main([*delete, "--where", "{}", "--yes"]) == 1
    assert "give IDs, or --where" in capsys.readouterr().err
    ids = ["2023/report.png#page=1", "nobody"]
    assert main([*delete, *ids]) == 1
    shown = capsys.readouterr()
    assert shown.out == "2023/report.png#page=1\n"
    assert "1 pages would be deleted; --yes deletes them" in shown.err
    assert main([*delete, *ids, "--yes"]) == 0
    assert capsys.readouterr().out == "1 deleted; 1 pages in the index\n"
    assert main([*delete, "--where", json.dumps({"source": {"$text": "2024"}}), "--yes"]) == 0
    assert capsys.readouterr().out == "1 deleted; 0 pages in the index\n"


@pytest.mark.parametrize("command", ["index", "search", "delete"])
def test_help_names_what_can_be_asked(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "qdrant+path:" in shown
    if command == "search":
        assert "id, source, number, label, sha256, text, page" in shown
