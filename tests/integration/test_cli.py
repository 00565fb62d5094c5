"""The command line, over real PDFs and a random checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, Page, PageIndex
from colqwen3_retrievers.cli.main import main
from colqwen3_retrievers.cli.search import draw_hits
from colqwen3_retrievers.demo import write_demo_documents
from colqwen3_retrievers.retrieval.similarity_maps import POOLED_NOTE
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tomoro"), "tomoro").folder


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    write_demo_documents(folder)
    return folder


@pytest.fixture(scope="module")
def indexed(model: Path, documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "pages"
    small = ["--model", str(model), "--max-visual-tokens", "100", "--device", "cpu"]
    assert main(["index", str(documents), "--index", str(folder), *small]) == 0
    return folder


def test_indexing_again_encodes_nothing_again(
    model: Path, documents: Path, indexed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--model", str(model), "--max-visual-tokens", "100", "--device", "cpu"]
    assert main(["index", str(documents), "--index", str(indexed), *small]) == 0
    assert capsys.readouterr().out == "0 added, 0 updated, 17 unchanged; 17 pages in the index\n"


def test_search_prints_a_ranking(indexed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "revenue", "--index", str(indexed), "-k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3"]
    scores = [float(line.split()[1]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    assert all(".pdf, page " in line for line in lines)


def test_search_with_the_model_in_another_place(
    indexed: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    assert main(["search", "revenue", "--index", str(indexed), "--model", str(moved), "--device", "cpu"]) == 0
    elsewhere = capsys.readouterr().out
    assert main(["search", "revenue", "--index", str(indexed)]) == 0
    assert capsys.readouterr().out == elsewhere
    other = make_checkpoint(tmp_path / "other", "tomoro", seed=9).folder
    assert main(["search", "revenue", "--index", str(indexed), "--model", str(other)]) == 1
    assert "fingerprint" in capsys.readouterr().err


def test_search_as_json_with_a_filter(indexed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = json.dumps({"source": "slides.pdf"})
    assert main(["search", "revenue", "--index", str(indexed), "--json", "--where", where, "-k", "20"]) == 0
    hits = json.loads(capsys.readouterr().out)
    assert len(hits) == 6
    assert {hit["source"] for hit in hits} == {"slides.pdf"}
    assert all(Path(hit["image"]).is_file() for hit in hits)


def test_search_by_image_finds_that_page(indexed: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["search", "x", "--index", str(indexed), "--json", "-k", "17"]) == 0
    stored = {hit["id"]: hit["image"] for hit in json.loads(capsys.readouterr().out)}
    wanted = "report.pdf#page=4"
    picture = tmp_path / "page.png"
    picture.write_bytes(Path(stored[wanted]).read_bytes())
    assert main(["search", "--image", str(picture), "--index", str(indexed), "--json", "-k", "1"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["id"] == wanted


def test_heatmaps_are_written(indexed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "revenue", "--index", str(indexed), "-k", "2", "--heatmap", str(tmp_path / "why")]) == 0
    written = sorted((tmp_path / "why").glob("*.png"))
    assert len(written) == 2
    with Image.open(written[0]) as drawn:
        assert drawn.size[0] > 500
    assert str(written[0]) in capsys.readouterr().err


def test_regions_are_listed_as_json_and_drawn_for_each_token(
    indexed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["search", "net revenue", "--index", str(indexed), "-k", "1", "--json", "--heatmap", str(tmp_path / "why")]
    assert main(line) == 0
    [hit] = json.loads(capsys.readouterr().out)
    assert hit["pooled"] is False
    assert hit["heatmaps"] == [str(path) for path in (tmp_path / "why").iterdir()]
    assert 1 <= len(hit["boxes"]) <= 3
    for box in hit["boxes"]:
        assert 0 <= box["left"] < box["right"] <= 1
        assert 0 <= box["top"] < box["bottom"] <= 1
        assert -1 <= box["score"] <= 1
    assert main([*line, "--heatmap-tokens"]) == 0
    [again] = json.loads(capsys.readouterr().out)
    assert again["boxes"] == hit["boxes"]
    assert len(again["heatmaps"]) >= 3
    assert all(Path(path).is_file() and "-token-" in path for path in again["heatmaps"][1:])


def test_maps_of_a_pooled_index_say_so(
    model: Path, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [source] = [str(path) for path in documents.iterdir() if path.name == "invoice.pdf"]
    small = ["--model", str(model), "--max-visual-tokens", "100", "--device", "cpu", "--pool-factor", "3"]
    assert main(["index", source, "--index", str(tmp_path / "pooled"), *small]) == 0
    line = ["search", "total", "--index", str(tmp_path / "pooled"), "-k", "1", "--heatmap", str(tmp_path / "why")]
    capsys.readouterr()
    assert main([*line, "--json"]) == 0
    told = capsys.readouterr()
    [hit] = json.loads(told.out)
    assert hit["pooled"] is True
    assert hit["boxes"]
    assert f"invoice.pdf, page {hit['page']}: {POOLED_NOTE}" in told.err
    assert len(list((tmp_path / "why").glob("*.png"))) == 1


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """An index in tmp_path that points to its originals."""
    for name in ("one", "two"):
        Image.effect_noise((320, 256), 90 if name == "one" else 30).save(tmp_path / f"{name}.png")
    line = ["index", str(tmp_path), "--index", str(tmp_path / "scans"), "--model", "tiny", "--images", "reference"]
    assert main([*line, "--max-visual-tokens", "100", "--device", "cpu"]) == 0
    return tmp_path / "scans"


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize("what", ["deleted", "changed", "broken"])
def test_a_page_that_cannot_be_drawn_is_still_found(
    what: str, form: list[str], scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["search", "revenue", "--index", str(scans), *form]
    assert main(line) == 0
    plain = capsys.readouterr().out
    one = tmp_path / "one.png"
    match what:
        case "deleted":
            one.unlink()
        case "changed":
            shutil.copy(tmp_path / "two.png", one)
        case "broken":
            one.write_bytes(b"no picture")
    assert main([*line, "--heatmap", str(tmp_path / "why")]) == 0
    shown = capsys.readouterr()
    told = [told for told in shown.err.splitlines() if "not drawn" in told]
    assert len(told) == 1
    assert "one.png, page 1: not drawn: " in told[0]
    assert ("has changed since" in told[0]) == (what == "changed")
    [written] = (tmp_path / "why").iterdir()
    assert written.name.endswith("two-1.png")
    if not form:
        assert shown.out == plain
        return
    hits = {hit["source"]: hit for hit in json.loads(shown.out)}
    assert [hit["id"] for hit in json.loads(plain)] == [hit["id"] for hit in json.loads(shown.out)]
    assert hits["one.png"].keys() - {"boxes", "pooled"} == json.loads(plain)[0].keys()
    assert hits["two.png"]["heatmaps"]


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_folder_that_cannot_be_written_costs_no_hits(
    form: list[str], scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    line = ["search", "revenue", "--index", str(scans), *form]
    assert main(line) == 0
    plain = capsys.readouterr().out
    assert main([*line, "--heatmap", str(tmp_path / "file" / "why")]) == 1
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1, "told once"
    assert "the overlay cannot be written" in shown.err
    if form:
        assert [hit["id"] for hit in json.loads(plain)] == [hit["id"] for hit in json.loads(shown.out)]
        assert all(hit["boxes"] and "heatmaps" not in hit for hit in json.loads(shown.out))
    else:
        assert shown.out == plain


def test_why_nothing_is_drawn_is_said(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["index", str(tmp_path / "one.png"), "--index", str(tmp_path / "none"), "--images", "none"]
    assert main([*line, "--model", "tiny", "--device", "cpu"]) == 0
    line = ["search", "revenue", "--heatmap", str(tmp_path / "why"), "--index"]
    assert main([*line, str(tmp_path / "none")]) == 0
    assert "one.png, page 1: not drawn: the index keeps no picture of it" in capsys.readouterr().err
    with PageIndex.open(tmp_path / "texts", ColQwen3Encoder("tiny", device="cpu")) as index:
        index.add(Page(source="notes.txt", text="revenue rose"))
    assert main([*line, str(tmp_path / "texts")]) == 0
    assert "notes.txt, page 1: not drawn: it has no regions" in capsys.readouterr().err
    with PageIndex.open(scans) as index:  # what a search finds may be gone before it is drawn
        [query] = index.encoder.submit_queries(["revenue"]).result()
        hits = index.search(query)
        index.delete([hits[0].page.id])
        evidence, complete = draw_hits(index, query, hits, tmp_path / "why", tokens=False)
    assert complete
    assert list(evidence) == [hits[1].page.id]
    assert capsys.readouterr().err.count("not drawn: it was deleted meanwhile") == 1
    assert len(list((tmp_path / "why").iterdir())) == 1


def test_a_folder_that_can_be_none_is_told_before_the_search(scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["search", "revenue", "--index", str(scans), "--json", "--heatmap", "~no-such-user/maps"]) == 1
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.startswith("colqwen3: ~no-such-user/maps: ")
    assert main(["search", "revenue", "--index", "~no-such-user/index"]) == 1
    assert capsys.readouterr().err.startswith("colqwen3: ~no-such-user/index: ")


def test_a_ranking_is_a_line_a_page(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.effect_noise((320, 256), 60).save(tmp_path / "a\nb.png")
    small = ["--model", "tiny", "--max-visual-tokens", "100", "--device", "cpu", "--images", "reference"]
    assert main(["index", str(tmp_path / "a\nb.png"), "--index", str(scans), *small]) == 0
    capsys.readouterr()
    assert main(["search", "revenue", "--index", str(scans)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert any(line.endswith("a b.png, page 1") for line in lines)


def test_a_long_name_makes_a_file_all_the_same(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{'𠮷' * 60}.png"  # four bytes each
    shutil.copy(tmp_path / "one.png", tmp_path / name)
    small = ["--model", "tiny", "--max-visual-tokens", "100", "--device", "cpu"]
    assert main(["index", str(tmp_path / name), "--index", str(scans), "--images", "reference", *small]) == 0
    query = " ".join(["財務部年度報告書" * 8, "revenue"])
    line = ["search", query, "--index", str(scans), "--json", "--heatmap", str(tmp_path / "why"), "--heatmap-tokens"]
    capsys.readouterr()
    assert main([*line, "--where", json.dumps({"source": name})]) == 0
    [hit] = json.loads(capsys.readouterr().out)
    assert len(hit["heatmaps"]) > 3
    assert len(set(hit["heatmaps"])) == len(hit["heatmaps"])


def test_info_of_an_index_and_of_a_model(indexed: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--index", str(indexed), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pages"], found["family"], found["dim"], found["max_visual_tokens"]) == (17, "tomoro", 48, 100)
    assert (found["code_factor"], found["code_bits"]) == (3, 8)
    assert main(["info", "--model", str(model)]) == 0
    shown = capsys.readouterr().out
    assert "fingerprint        " + found["fingerprint"] in shown
    assert "the lower pixel bound" in shown


BAD_LINES = [
    (["search", "x", "--index", "/nowhere/at/all"], "/nowhere/at/all"),
    (["search", "", "--index", "INDEX"], "query: give a text, an image, or both"),
    (["search", "x", "--index", "INDEX", "-k", "0"], "k"),
    (["search", "x", "--index", "INDEX", "--where", "{"], "--where: not JSON"),
    (["search", "x", "--index", "INDEX", "--where", "[]"], "--where: expected a JSON object"),
    (["search", "x", "--index", "INDEX", "--where", '{"year": {"$near": 3}}'], "$near"),
    (["search", "--image", "no.png", "--index", "INDEX"], "no.png"),
    (["info", "--model", "nowhere/at/all"], "no such folder, and not a hub name"),
    (["index", "/no/such.pdf", "--index", "NEW", "--model", "MODEL"], "/no/such.pdf"),
    (["index", "DOCS", "--index", "INDEX", "--model", "MODEL", "--dim", "7"], "dim 7"),
    (["demo", "--out", "DOCS"], "is not a demo's folder"),
    (["demo", "--out", "/proc/nothing/here"], "/proc/nothing"),
    (["search", "x", "--index", "INDEX", "--device", "warp"], "device 'warp'"),
]


@pytest.mark.parametrize(
    ("line", "message"), BAD_LINES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_errors_are_one_line_and_exit_code_1(
    line: list[str], message: str, indexed: Path, model: Path, documents: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"INDEX": str(indexed), "MODEL": str(model), "DOCS": str(documents), "NEW": str(tmp_path / "new")}
    assert main([places.get(word, word) for word in line]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.strip().splitlines()) == 1
    assert shown.err.startswith("colqwen3: ")
    assert message in shown.err


WRONG_LINES = [
    [], ["dance"], ["search", "x"], ["index", "--index", "d"], ["search", "x", "--index", "d", "--heatmap-tokens"],
    ["search", "x", "--index", "d", "--heatmap", ""],
]  # fmt: skip


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_wrong_command_line_is_exit_code_2(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert "usage: colqwen3" in shown
    assert "--heatmap" not in line[-2:] or "error: --heatmap" in shown


def test_the_installed_command_runs(indexed: Path) -> None:
    command = Path(sys.executable).parent / "colqwen3"
    for start in ([str(command)], [sys.executable, "-m", "colqwen3_retrievers"]):
        done = subprocess.run(
            [*start, "info", "--index", str(indexed)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("index ")


def test_serve_prints_a_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "tiny", "--port", "8123"]) == 0
    printed = capsys.readouterr().out
    assert "--runner pooling" in printed
    assert "--port 8123" in printed


def test_sync_forgets_what_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    for shade in (10, 200):
        Image.new("L", (320, 256), shade).save(folder / f"{shade}.png")
    command = ["index", str(folder), "--index", str(tmp_path / "index"), "--model", "tiny", "--sync"]
    assert main(command) == 0
    assert "2 added, 0 updated, 0 unchanged, 0 removed; 2 pages" in capsys.readouterr().out
    (folder / "10.png").unlink()
    assert main(command) == 0
    assert "0 added, 0 updated, 1 unchanged, 1 removed; 1 pages" in capsys.readouterr().out


def test_info_notices_damaged_codes(
    indexed: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(indexed, copy)
    (codes,) = copy.glob("codes-*")
    content = bytearray(codes.read_bytes())
    content[-1] ^= 1
    codes.write_bytes(content)
    assert main(["info", "--index", str(copy)]) == 1
    shown = capsys.readouterr()
    assert "damaged_codes      1\n" in shown.out
    assert "the codes of 1 of 17 pages are missing or not what was written" in shown.err
    assert main(["info", "--index", str(copy), "--quick"]) == 0
    assert "damaged_codes" not in capsys.readouterr().out
    codes.unlink()
    assert main(["info", "--index", str(copy), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["damaged_codes"] == 17
    with PageIndex.open(copy) as index:
        index.compact()
    assert main(["info", "--index", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["damaged_codes"] == 0


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_names_that_the_output_cannot_show_are_escaped(encoding: str, tmp_path: Path) -> None:
    """As on a Windows console, or under `LC_ALL=C`, with pages and a folder of Japanese names."""
    scans = tmp_path / "報告"
    scans.mkdir()
    Image.new("RGB", (64, 64), "white").save(scans / "売上\U0001f600.png")
    place = str(tmp_path / "索引")

    def run(*line: str) -> str:
        command = [sys.executable, "-m", "colqwen3_retrievers", *line]
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(command, capture_output=True, timeout=120, check=False, env=environment)
        assert done.returncode in (0, 1) and b"Traceback" not in done.stderr, done.stderr.decode(encoding)
        return done.stdout.decode(encoding)

    escaped = "売上\U0001f600.png" if encoding == "utf-8" else r"\u58f2\u4e0a\U0001f600.png"
    assert "1 added" in run("index", str(scans), "--index", place, "--model", "tiny", "--metadata", "題=年報")
    assert escaped in run("search", "x", "--index", place, "--heatmap", str(tmp_path / "絵"))
    (hit,) = json.loads(run("search", "x", "--index", place, "--json", "--where", '{"題": "年報"}'))
    assert hit["source"] == "売上\U0001f600.png" and hit["metadata"]["題"] == "年報"
    run("search", "x", "--index", place, "--where", '{"誤り": 1}')
    assert json.loads(run("info", "--index", place, "--json"))["index"] == place
    run("info", "--index", place)
    run("search", "x", "--index", str(tmp_path / "無"))
    run("copy", place, str(tmp_path / "写し"))
    assert escaped in run("delete", "--index", place, "--where", '{"題": "年報"}')
    run("index", str(tmp_path / "無.png"), "--index", place, "--model", "tiny")
    if encoding == "cp1252":
        run("demo", "--out", str(tmp_path / "見本"), str(scans / "無.pdf"))
        run("eval", str(tmp_path / "無"), "--index", place)
        run("serve", str(tmp_path / "無"))
