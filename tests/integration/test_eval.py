"""``colqwen3 eval``: a folder of PDFs and judgements, an index that is there, and two settings side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from colqwen3_retrievers.cli.main import main
from colqwen3_retrievers.demo import DEMO_QUESTIONS, write_demo_documents
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = make_checkpoint(tmp_path_factory.mktemp("tomoro"), "tomoro").folder
    return ["--model", str(folder), "--max-visual-tokens", "60", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("judged")
    write_demo_documents(root / "corpus")
    for path in sorted((root / "corpus").iterdir())[1:]:
        path.unlink()
    [source] = [path.name for path in (root / "corpus").iterdir()]
    (root / "qrels").mkdir()
    (root / "queries.jsonl").write_text('{"_id": "q1", "text": "revenue"}\n{"_id": "q2", "text": "invoice"}\n')
    (root / "qrels" / "test.tsv").write_text(f"q1\t{source}#page=1\t1\nq2\t{source}#page=2\t2\n")
    return root


def test_a_folder_is_indexed_judged_and_exported(
    data: Path, model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--run", str(tmp_path / "run"), "--qrels", str(tmp_path / "qrels"), "--json", str(tmp_path / "a.json")]
    place = ["--index", str(tmp_path / "index")]
    assert main(["eval", str(data), *place, *model, "-k", "1", "3", *files]) == 0
    out = capsys.readouterr().out
    assert "2 queries judged" in out
    assert "nDCG@3" in out
    rows = [line.split() for line in (tmp_path / "run").read_text().splitlines()]
    assert {row[0] for row in rows} == {"q1", "q2"}
    assert [int(row[3]) for row in rows if row[0] == "q1"] == [1, 2]  # the file has two pages
    assert len((tmp_path / "qrels").read_text().splitlines()) == 2
    # the index is there now: it is asked again, by the model it knows
    assert main(["eval", str(data), *place, "--as-is", "-k", "1", "3", "--json", str(tmp_path / "b.json")]) == 0
    first, again = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert first["run"] == again["run"]
    capsys.readouterr()
    assert main(["eval", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert "0/2/0" in capsys.readouterr().out


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's annual report, whose pages ``corpus.jsonl`` names one by one, and questions that its pages answer."""
    root = tmp_path_factory.mktemp("printed")
    write_demo_documents(root / "pdfs")
    name = DEMO_QUESTIONS[0][1]
    asked = [(text, page) for text, source, page in DEMO_QUESTIONS if source == name]
    assert len(asked) >= 5
    (root / "qrels").mkdir()
    count = max(page for _, page in asked)
    lines = [{"_id": f"p{page}", "pdf": f"pdfs/{name}", "page": page} for page in range(1, count + 1)]
    queries = [{"_id": f"q{number}", "text": text} for number, (text, _) in enumerate(asked)]
    for file, content in {"corpus": lines, "queries": queries}.items():
        (root / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    judged = (f"q{number}\tp{page}\t1\n" for number, (_, page) in enumerate(asked))
    (root / "qrels" / "test.tsv").write_text("".join(judged))
    return root


@pytest.mark.parametrize("store", ["folder", "qdrant"])
def test_tiny_finds_what_is_printed(
    store: str, printed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "index")
    if store == "qdrant":
        pytest.importorskip("qdrant_client")
        place = f"qdrant+path:{tmp_path / 'qdrant'}/pages"
    arguments = ["eval", str(printed), "--index", place, "--model", "tiny", "--device", "cpu", "-k", "1", "5"]
    assert main([*arguments, "--json", str(tmp_path / "a.json")]) == 0
    assert "nDCG@5" in capsys.readouterr().out
    measures = json.loads((tmp_path / "a.json").read_text())["measures"]
    assert measures["R@1"] == 1.0
    assert measures["nDCG@5"] == 1.0
    # all is there: asked again by what it knows, adding nothing
    assert main(["eval", str(printed), "--index", place, "--device", "cpu", "--json", str(tmp_path / "b.json")]) == 0
    first, again = (json.loads((tmp_path / name).read_text())["run"] for name in ("a.json", "b.json"))
    assert {query: list(pages)[:5] for query, pages in again.items()} == {q: list(p) for q, p in first.items()}
    assert main(["eval", str(printed), "--index", place, "--pool-factor", "2"]) == 1
    assert "--pool-factor 2, but it was made with 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a folder, or --mteb, or --compare"),
        (["/nowhere"], "not a folder"),
        (["/nowhere", "--compare", "a", "b"], "give a folder"),
        (["--compare", "/nowhere/a", "/nowhere/b"], "cannot be read"),
        (["--compare", "a", "b", "-k", "3", "--run", "r", "--index", "i"], "--index, -k, --run: not for --compare"),
        (["--mteb", "X", "--depth", "3", "--split", "dev"], "--depth, --split: not for --mteb"),
        (["/nowhere", "--results", "r"], "--results: not for a folder"),
        (["/nowhere", "--from-run", "r", "--model", "tiny", "--dim", "0"], "--dim, --model: not for --from-run"),
        (["/nowhere", "--as-is"], "--as-is: give --index"),
        (["/nowhere", "--measure", "nDGC@5"], "knows no 'nDGC@5'"),
        (["/nowhere", "--depth", "5"], "too few for nDCG@10"),
        (["/nowhere", "--worst", "0"], "--worst"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
