"""``colqwen3 eval`` and the user's index: what is in it is never changed; options and files are checked first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from colqwen3_retrievers import ColQwen3Encoder, Page, PageIndex
from colqwen3_retrievers.cli.main import main
from tests.checkpoints import make_checkpoint
from tests.hashing import picture

TINY = ["--model", "tiny", "--device", "cpu"]
TEXTS = {"p1": "red cat", "p2": "blue dog", "p3": "green bird"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    (root / "qrels").mkdir(parents=True)
    (root / "queries.jsonl").write_text('{"_id": "q1", "text": "red cat"}\n{"_id": "q2", "text": "blue dog"}\n')
    (root / "qrels" / "test.tsv").write_text("q1\tp1\t1\nq2\tp2\t1\n")
    write_corpus(root, TEXTS)
    return root


def write_corpus(root: Path, texts: dict[str, str]) -> None:
    (root / "corpus.jsonl").write_text("".join(json.dumps({"_id": n, "text": t}) + "\n" for n, t in texts.items()))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the pages that are encoded."""
    seen: list[str] = []
    plain = ColQwen3Encoder.encode_pages

    def encode(self: ColQwen3Encoder, pages: Iterable[Page], **options: Any) -> Any:
        listed = list(pages)
        seen.extend(page.id for page in listed)
        return plain(self, listed, **options)

    monkeypatch.setattr(ColQwen3Encoder, "encode_pages", encode)
    return seen


def make_index(place: Path, pages: dict[str, str], *, model: str = "tiny", **settings: Any) -> None:
    with (
        ColQwen3Encoder(model, device="cpu", **settings) as encoder,
        PageIndex.open(place, encoder) as index,
    ):
        index.add(Page(id=name, text=text, image=picture(7), metadata={"mine": True}) for name, text in pages.items())


def contents(place: Path) -> list[tuple[Any, ...]]:
    with PageIndex.open(place, read_only=True) as index:
        found = index.get(index.ids(), vectors=True)
        return [
            (r.page.id, r.page.text, r.page.metadata, r.image, r.multi_vector and r.multi_vector.vectors.tobytes())
            for r in found
        ]


@pytest.mark.parametrize("more", [{"mine": "of the user"}, {"p1": "another text"}, {"mine": "x", "p1": "red cat"}])
def test_an_index_of_the_users_is_not_touched(
    more: dict[str, str], data: Path, tmp_path: Path, encoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    make_index(tmp_path / "index", more)
    before = contents(tmp_path / "index")
    encoded.clear()
    assert main(["eval", str(data), "--index", str(tmp_path / "index"), "--device", "cpu"]) == 1
    assert ("mine" if "mine" in more else "'p1' has another content") in capsys.readouterr().err
    assert contents(tmp_path / "index") == before
    assert encoded == []


def test_an_index_of_a_folder_with_other_pages_is_not_touched(
    data: Path, tmp_path: Path, encoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "corpus.jsonl").unlink()
    (data / "corpus").mkdir()
    picture(1).save(data / "corpus" / "a.png")
    (data / "qrels" / "test.tsv").write_text("q1\ta.png#page=1\t1\n")
    make_index(tmp_path / "index", {"mine": "of the user"})
    before = contents(tmp_path / "index")
    encoded.clear()
    assert main(["eval", str(data), "--index", str(tmp_path / "index"), "--device", "cpu"]) == 1
    assert "holds 1 pages that are not of the corpus: mine" in capsys.readouterr().err
    assert (contents(tmp_path / "index"), encoded) == (before, [])


def test_an_index_of_the_corpus_is_asked_and_an_unfinished_one_gone_on_with(
    data: Path, tmp_path: Path, encoded: list[str]
) -> None:
    place = tmp_path / "index"
    place.mkdir()  # empty: as good as new
    write_corpus(data, {"p1": TEXTS["p1"], "p2": TEXTS["p2"]})
    line = ["eval", str(data), "--index", str(place), "-k", "1", "--json"]
    assert main([*line, str(tmp_path / "a.json"), *TINY]) == 0
    assert encoded == ["p1", "p2"]
    encoded.clear()
    before = contents(place)
    assert main([*line, str(tmp_path / "b.json")]) == 0  # complete: by the model it knows
    assert (encoded, contents(place)) == ([], before)
    write_corpus(data, TEXTS)
    assert main([*line, str(tmp_path / "c.json")]) == 0
    assert encoded == ["p3"]
    assert contents(place)[:2] == before
    assert json.loads((tmp_path / "c.json").read_text())["settings"]["pages"] == 3


def test_another_writer_does_not_hinder_asking(data: Path, tmp_path: Path) -> None:
    assert main(["eval", str(data), "--index", str(tmp_path / "index"), "-k", "1", *TINY]) == 0
    with PageIndex.open(tmp_path / "index"):
        assert main(["eval", str(data), "--index", str(tmp_path / "index"), "-k", "1", "--device", "cpu"]) == 0


def test_an_index_keeps_the_pictures_of_its_pages(data: Path, tmp_path: Path) -> None:
    picture(1).save(data / "a.png")
    (data / "corpus.jsonl").write_text('{"_id": "p1", "image": "a.png", "text": "red cat"}\n{"_id": "p2", "text": "b"}')
    place = ["--index", str(tmp_path / "index")]
    assert main(["eval", str(data), *place, "-k", "1", *TINY, "--include-text"]) == 0
    with PageIndex.open(tmp_path / "index", read_only=True) as index:
        record = index.get(["p1"])[0]
        assert record.page.image is not None
        assert record.page.text == "red cat"
        assert index.info.include_text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--pool-factor", "1"], "--pool-factor 1, but it was made with 2"),
        (["--dim", "32"], "--dim 32, but it was made with"),
        (["--max-visual-tokens", "50"], "--max-visual-tokens 50, but it was made with"),
        (["--include-text"], "--include-text True, but it was made with False"),
        (["--family", "ops"], "--family ops, but it was made with"),
        (["--engine", "nonsense"], "engine 'nonsense'"),
        (["--dtype", "nonsense"], "dtype 'nonsense'"),
        (["--pool-factor", "0"], "--pool-factor 0, but"),
    ],
)
def test_model_options_that_contradict_an_index_are_refused(
    option: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_index(tmp_path / "index", {}, pool_factor=2)
    assert main(["eval", str(data), "--index", str(tmp_path / "index"), "--as-is", "--allow-unknown", *option]) == 1
    assert message in capsys.readouterr().err


def test_an_index_of_another_model_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, other = (make_checkpoint(tmp_path / str(seed), "tomoro", seed=seed).folder for seed in (1, 2))
    make_index(tmp_path / "index", TEXTS, model=str(own))
    line = ["eval", str(data), "--index", str(tmp_path / "index"), "--as-is", "--device", "cpu"]
    assert main([*line, "--model", str(other)]) == 1
    assert "fingerprint is" in capsys.readouterr().err
    assert main([*line, "--pool-factor", "1", "--dtype", "float32", "--engine", "torch"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--measure", "nDGC@5"], "knows no 'nDGC@5'"),
        (["--json", "{data}/queries.jsonl"], "queries.jsonl: it is read"),
        (["--qrels", "{data}/qrels/test.tsv"], "test.tsv: it is read"),
        (["--json", "{data}/a.png"], "a.png: it is read"),
        (["--json", "{data}"], "it is a folder"),
        (["--run", "{index}/catalogue.sqlite"], "which is read"),
        (["--json", "{data}/a.json", "--run", "{data}/a.json"], "--json names it too"),
    ],
)
def test_what_would_fail_at_the_end_fails_first(
    arguments: list[str], message: str, data: Path, tmp_path: Path, encoded: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    picture(1).save(data / "a.png")
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    place = tmp_path / "index"
    given = [part.format(data=data, index=place) for part in arguments]
    assert main(["eval", str(data), "--index", str(place), *TINY, *given]) == 1
    assert message in capsys.readouterr().err
    assert encoded == []
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before
    assert not place.exists()


@pytest.mark.parametrize("folder", [False, True])
def test_judgements_of_pages_that_are_not_there_are_told_first(
    folder: bool, data: Path, encoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if folder:
        (data / "corpus.jsonl").unlink()
        (data / "corpus").mkdir()
        picture(1).save(data / "corpus" / "a.png")
    (data / "qrels" / "test.tsv").write_text("q1\ta.png#page=1\t1\nq1\tgone#page=1\t1\n" if folder else "q1\tgone\t1\n")
    assert main(["eval", str(data), *TINY]) == 1
    assert "1 relevant pages are not in the corpus: gone" in capsys.readouterr().err
    assert encoded == []


@pytest.mark.parametrize("query", ['"text": "cat \\ud800"', '"image": "broken.png"'])
def test_a_query_that_cannot_be_encoded_is_told_first(
    query: str, data: Path, encoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "broken.png").write_bytes(b"no picture")
    (data / "queries.jsonl").write_text(f'{{"_id": "q1", {query}}}\n{{"_id": "q2", "text": "dog"}}')
    assert main(["eval", str(data), *TINY]) == 1
    assert "query 'q1': " in capsys.readouterr().err
    assert encoded == []


def test_a_run_is_judged_again_and_compared(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(data, {**TEXTS, "my page": "four words of text"})
    with (data / "qrels" / "test.tsv").open("a") as file:
        file.write("q1\tmy page\t1\n")
    files = {name: str(tmp_path / "out" / name) for name in ("a.json", "b.json", "c.json", "a.trec", "b.trec")}
    assert main(["eval", str(data), *TINY, "--json", files["a.json"], "--run", files["a.trec"], "--worst", "2"]) == 0
    out = capsys.readouterr().out
    assert "worst by nDCG@1" in out
    assert "q2  blue dog" in out
    judging = ["eval", str(data), "--from-run"]
    assert main([*judging, files["a.trec"], "--json", files["b.json"]]) == 0
    first, again = (json.loads(Path(files[name]).read_text()) for name in ("a.json", "b.json"))
    assert first["measures"] == again["measures"]
    assert "my page" in again["run"]["q1"]
    shutil.copy(files["a.trec"], files["b.trec"])
    assert main([*judging, files["b.trec"], "--json", files["c.json"]]) == 0
    capsys.readouterr()
    assert main(["eval", "--compare", files["b.json"], files["c.json"]]) == 0
    out = capsys.readouterr().out
    assert f"A is {files['b.json']}" in out
    assert "run: A 'a.trec', B 'b.trec'" in out
    Path(files["b.trec"]).write_text("other Q0 p1 1 1 t\n")
    assert main([*judging, files["b.trec"]]) == 1
    assert "no query of set is in it" in capsys.readouterr().err


def test_a_comparison_over_other_pages_has_to_be_asked_for(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    assert main(["eval", str(data), *TINY, "-k", "1", "--json", a]) == 0
    write_corpus(data, {**TEXTS, "p4": "more"})
    assert main(["eval", str(data), *TINY, "-k", "1", "--json", b, "--pool-factor", "2"]) == 0
    assert main(["eval", "--compare", a, b]) == 1
    assert "pages: A 3, B 4); --allow-other-set" in capsys.readouterr().err
    assert main(["eval", "--compare", a, b, "--allow-other-set"]) == 0
    out = capsys.readouterr().out
    assert "encoder.pool_factor: A 1, B 2" in out
    assert "index" not in out  # both were made in passing
    assert main(["eval", "--compare", a, b, "--allow-other-set", "--json", a]) == 1
    assert "it is read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"_id": "bad", "image": "scans/nope.png"}, "there is no file 'scans/nope.png'"),
        ({"_id": "bad"}, "expected an image, a pdf or a text"),
        ({"_id": "bad", "image": "seen.png", "page": 0}, "page: expected a whole number from 1"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--allow-unknown"]])
def test_a_line_that_cannot_be_used_is_told_before_anything_is_encoded(
    line: dict[str, Any], message: str, more: list[str], data: Path, encoded: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    picture(1).save(data / "seen.png")
    with (data / "corpus.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert main(["eval", str(data), *TINY, "--index", str(tmp_path / "new"), *more]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert "corpus.jsonl:4" in told
    assert encoded == []
    assert not (tmp_path / "new").exists()


def test_how_queries_were_encoded_is_compared(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    make_index(tmp_path / "index", TEXTS)
    asked = ["eval", str(data), "--index", str(tmp_path / "index"), "--as-is", "-k", "1"]
    assert main([*asked, "--dtype", "float32", "--json", a]) == 0
    assert main([*asked, "--dtype", "bfloat16", "--json", b]) == 0
    capsys.readouterr()
    assert main(["eval", "--compare", a, b]) == 0
    assert "dtype: A 'float32', B 'bfloat16'" in capsys.readouterr().out
