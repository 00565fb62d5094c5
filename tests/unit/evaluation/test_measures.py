"""Judging: what is counted, what is refused, and statistics against scipy and by simulation."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
from scipy import stats

from colqwen3_retrievers import Page, PageIndex
from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.evaluation import (
    Evaluation,
    JudgedSet,
    compare,
    evaluate,
    judge,
    read_judged_set,
    write_qrels,
    write_run,
)
from colqwen3_retrievers.evaluation.comparison import bootstrap_interval, holm, randomisation_test
from tests.hashing import HashingEncoder, picture


def made_by(values: dict[str, float]) -> Evaluation:
    """An evaluation in which MRR of each query is 1 / rank."""
    run = {
        query: {("x" if place == rank else f"o{place}"): 10.0 - place for place in range(1, 9)}
        for query, value in values.items()
        for rank in [round(1 / value)]
    }
    return judge(run, {query: {"x": 1} for query in values}, k=[8])


# -- measures ----------------------------------------------------------------------------------------------------------


def test_measures_by_hand_with_graded_relevance() -> None:
    run = {"q": {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}}
    got = judge(run, {"q": {"b": 2, "d": 1, "gone": 1, "a": 0, "c": -1}}, k=[2, 4]).measures
    ideal = 2 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    assert got["nDCG@4"] == pytest.approx((2 / math.log2(3) + 1 / math.log2(5)) / ideal)
    assert got["nDCG@2"] == pytest.approx((2 / math.log2(3)) / (2 + 1 / math.log2(3)))
    assert got["R@2"] == pytest.approx(1 / 3)
    assert got["R@4"] == pytest.approx(2 / 3)
    assert (got["RR@2"], got["Success@2"]) == (0.5, 1.0)


@pytest.mark.parametrize("relevant", ["a", "b", "c"])
def test_equal_scores_are_ranked_by_id(relevant: str) -> None:
    got = judge({"q": {"c": 1.0, "a": 1.0, "b": 1.0}}, {"q": {relevant: 1}}, k=[1, 3]).measures
    assert got["RR@3"] == pytest.approx(1 / ("abc".index(relevant) + 1))
    assert got["Success@1"] == (relevant == "a")


def test_scores_that_float32_cannot_tell_apart_keep_their_order() -> None:
    assert judge({"q": {"b": 1.0, "a": 1.0 + 1e-12}}, {"q": {"a": 1}}, k=[1]).measures["R@1"] == 1.0
    assert judge({"q": {"a": 1.0, "b": 1.0 + 1e-12}}, {"q": {"a": 1}}, k=[1]).measures["R@1"] == 0.0


def test_queries_without_a_relevant_page_are_not_counted_and_queries_without_results_count_zero() -> None:
    run = {"found": {"a": 1.0}, "none": {"a": 1.0}, "unasked": {"a": 1.0}, "empty": {}}
    qrels = {"found": {"a": 1}, "none": {"a": 0}, "empty": {"a": 1}, "lost": {"a": 1}}
    got = judge(run, qrels, k=[1])
    assert set(got.unjudged) == {"none", "unasked"}
    assert got.per_query["R@1"] == {"found": 1.0, "empty": 0.0, "lost": 0.0}
    assert got.measures["R@1"] == pytest.approx(1 / 3)
    assert judge({}, qrels, k=[1]).measures["nDCG@1"] == 0.0


def test_what_cannot_be_judged_is_refused() -> None:
    run, qrels = {"q": {"a": 1.0}}, {"q": {"a": 1}}
    with pytest.raises(ConfigError, match="no query has a relevant page"):
        judge(run, {"q": {"a": 0}})
    with pytest.raises(ConfigError, match="knows no 'nonsense'"):
        judge(run, qrels, measures=["nonsense"])
    with pytest.raises(ConfigError, match="k: expected a whole number from 1 to 1,000,000, got 0"):
        judge(run, qrels, k=[0])
    with pytest.raises(ConfigError, match="has the score nan"):
        judge({"q": {"a": math.nan}}, qrels)
    assert judge(run, qrels, k=[], measures=["AP"]).measures == {"AP": 1.0}


def test_a_measure_by_another_name_leaves_the_standard_ones_as_they_are() -> None:
    run, qrels = {"q": {"a": 1.0}}, {"q": {"a": 1}}
    got = judge(run, qrels, k=[5], measures=["MRR@5", "Recall@5", "nDCG(cutoff=5)", "RR@5"]).measures
    assert got == dict.fromkeys(["nDCG@5", "R@5", "Success@5", "RR@5", "MRR@5", "Recall@5", "nDCG(cutoff=5)"], 1.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nDCG@0", "cutoff cannot be 0"),  # trec_eval would end the process
        ("R@0", "cutoff cannot be 0"),
        ("Judged@0", "cutoff cannot be 0"),
        ("R@10000000000", "cutoff cannot be"),
        ("nDCG@1.5", "cutoff cannot be 1.5"),
        ("P(rel=0)@5", "rel cannot be 0"),
        ("nDCG(gains={1:1000000})", "gains cannot be"),  # would run for ever
        ("SetF(beta=1e400)", "beta cannot be inf"),
        ("ERR@5", "nothing here computes it"),
        ("INST", "needs the parameter max_rel"),
        ("alpha_nDCG@5", "nothing here computes it"),
        ("R", "needs the parameter cutoff"),
        ("", "knows no ''"),
        ("(" * 1000, "knows no"),
    ],
)
def test_measures_that_would_fail_are_refused_first(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        judge({"q": {"a": 1.0}}, {"q": {"a": 1}}, measures=[name])


def test_ids_may_hold_anything() -> None:
    names = ["a b", "a\0b", "a\0c", "a\u2028b", "7", "中"]
    run = {name: {page: float(-at) for at, page in enumerate(names)} for name in names}
    got = judge(run, {name: {name: 1} for name in names}, k=[6]).per_query["RR@6"]
    assert got == pytest.approx({name: 1 / (at + 1) for at, name in enumerate(names)})


def test_judgements_and_scores_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"relevance: .*to 10,000, got 3000000000"):  # would kill the process
        judge({"q": {"a": 1.0}}, {"q": {"a": 3_000_000_000}})
    with pytest.raises(ConfigError, match="has the score None"):
        judge({"q": {"a": None}}, {"q": {"a": 1}})  # type: ignore[dict-item]


# -- files -------------------------------------------------------------------------------------------------------------


def test_trec_files_say_the_same_to_another_reader(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    run = {f"q{i}": {f"p{j}": float(random.integers(0, 4)) for j in range(9)} for i in range(20)}  # many ties
    qrels = {f"q{i}": {f"p{j}": int(random.integers(0, 3)) for j in range(0, 9, 2)} | {"p1": 1} for i in range(20)}
    got = judge(run, qrels, k=[1, 5])
    write_run(tmp_path / "run", got.run)
    write_qrels(tmp_path / "qrels", got.qrels)
    again = ir_measures.calc_aggregate(
        [ir_measures.parse_measure(name) for name in ("nDCG@5", "R@1")],
        list(ir_measures.read_trec_qrels(str(tmp_path / "qrels"))),
        list(ir_measures.read_trec_run(str(tmp_path / "run"))),
    )
    assert {str(name): value for name, value in again.items()} == pytest.approx(
        {name: got.measures[name] for name in ("nDCG@5", "R@1")}
    )
    with pytest.raises(ConfigError, match="white space"):
        write_run(tmp_path / "run", {"q": {"a": 1.0}}, tag="my run")


def test_an_evaluation_is_read_as_it_was_written(tmp_path: Path) -> None:
    got = judge({"q": {"a": 1.0}}, {"q": {"a": 1}, "r": {"a": 0}}, k=[1])
    got.write(tmp_path / "a.json")
    assert Evaluation.read(tmp_path / "a.json") == got
    for name, text in (("b", "{}"), ("c", "no"), ("d", "[]"), ("e", '{"format": 7}'), ("f", "[" * 100_000)):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=name):
            Evaluation.read(tmp_path / name)
    with pytest.raises(ConfigError, match="No such file"):
        Evaluation.read(tmp_path / "missing")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    (root / "qrels").mkdir(parents=True)
    (root / "queries.jsonl").write_text('{"_id": "q1", "text": "red cat"}\n\n{"_id": "q2", "text": "blue dog"}\n')
    (root / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tp1\t1\nq2\tp2\t2\n")
    lines = [{"_id": "p1", "title": "the", "text": "red cat"}, {"id": "p2", "text": "blue dog"}]
    (root / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def test_a_folder_is_read(folder: Path) -> None:
    picture(1).save(folder / "scan.png")
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('\n{"_id": "p3", "image": "scan.png"}')
    judged = read_judged_set(folder)
    assert [(page.id, page.text, page.image is not None) for page in judged.pages()] == [
        ("p1", "the red cat", False), ("p2", "blue dog", False), ("p3", "", True),
    ]  # fmt: skip
    assert (list(judged.queries), judged.relevant("q2")) == (["q1", "q2"], {"p2"})


def test_queries_of_other_splits_are_left_out(folder: Path) -> None:
    (folder / "qrels" / "dev.tsv").write_text("q1 0 p1 1\n")  # TREC's columns, no header
    assert list(read_judged_set(folder, split="dev").queries) == ["q1"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("queries.jsonl", '{"_id": "q1", "text": "a"}\n{"_id": "q1", "text": "b"}', "queries.jsonl:2.*twice"),
        ("queries.jsonl", "{nonsense", "queries.jsonl:1: not JSON"),
        ("queries.jsonl", "[1]", "expected a JSON object"),
        ("queries.jsonl", '{"_id": 3, "text": "a"}', "expected an id"),
        ("queries.jsonl", '{"_id": "q1", "text": " "}', "queries.jsonl:1: query: give a text"),
        ("queries.jsonl", '{"_id": "q1", "image": "../../x.png"}', "is outside"),
        ("queries.jsonl", '{"_id": "q1", "text": "a"}', "judged queries are not in queries.jsonl: 'q2'"),
        ("qrels/test.tsv", "q1\tp1\tmuch", "no judgements after the header"),
        ("qrels/test.tsv", "q1\tp1\tmuch\nq2\tp2\t1", "test.tsv:1.*whole number"),  # a slip, no header
        ("qrels/test.tsv", "q1\tp1\t1\nq2\tp2\tmuch", "test.tsv:2.*whole number"),
        ("qrels/test.tsv", "q1\tp1\t0.5", "test.tsv:1.*whole number"),
        ("qrels/test.tsv", "q1\tp1\t3000000000", "test.tsv:1: relevance: .*from -10,000 to 10,000, got 3000000000"),
        ("qrels/test.tsv", "q1\tp1\t99999999999999999999", "test.tsv:1: relevance: .*got 1000000000"),
        ("queries.jsonl", "[" * 100_000, "queries.jsonl:1: not JSON: nested too deep"),
        ("queries.jsonl", '{"_id": "q1", "text": NaN}', "queries.jsonl:1: not JSON: NaN"),
        ("queries.jsonl", '{"_id": "q1", "image": "a\\u0000b.png"}', "queries.jsonl:1: .*null byte"),
        ("queries.jsonl", '{"_id": "q1", "image": "' + "a" * 5000 + '"}', "queries.jsonl:1: .*too long"),
        ("queries.jsonl", '{"_id": "q\\ud800", "text": "a"}', "queries.jsonl:1: .*not valid Unicode"),
        ("qrels/test.tsv", "q1\tp1\t1\nq1\tp1\t2", "test.tsv:2.*judged twice"),
        ("qrels/test.tsv", "", "no judgements"),
        ("qrels/test.tsv", "q1\tp1\t0", "no query has a relevant page"),
    ],
)
def test_bad_lines_are_named(folder: Path, file: str, text: str, message: str) -> None:
    (folder / file).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_judged_set(folder)


@pytest.mark.parametrize(
    "header", ["query-id\tcorpus-id\tlabel", "q\tdoc\tjudgement", "\n\nquery-id\tcorpus-id\tscore"]
)
def test_a_first_line_without_a_number_is_a_header(folder: Path, header: str) -> None:
    (folder / "qrels" / "test.tsv").write_text(f"{header}\nq1\tp1\t1.0\nq2\tp2\t2.0\r\n")
    judged = read_judged_set(folder)
    assert {query: dict(pages) for query, pages in judged.qrels.items()} == {"q1": {"p1": 1}, "q2": {"p2": 2}}


def test_queries_that_are_not_judged_are_not_read(folder: Path) -> None:
    with (folder / "queries.jsonl").open("a") as file:
        file.write('{"_id": "other", "text": ""}\n{"_id": "lost", "image": "gone.png"}\n')
    assert list(read_judged_set(folder).queries) == ["q1", "q2"]


def test_only_line_feeds_end_lines(folder: Path) -> None:
    for name in ("p\u2028x", "p\x85x", "p\x1cx", "p\u00a0x"):
        (folder / "qrels" / "test.tsv").write_text(f"q1\t{name}\t1\n", encoding="utf-8")
        assert read_judged_set(folder).relevant("q1") == {name}
        (folder / "qrels" / "test.tsv").write_text(f"q1 0 {name} 1\n", encoding="utf-8")
        assert read_judged_set(folder).relevant("q1") == {name}


def test_pages_of_a_tiff_and_texts_beside_pictures(folder: Path) -> None:
    picture(1).save(folder / "m.tif", save_all=True, append_images=[picture(2)])
    picture(3).save(folder / "a.png")
    lines = [
        {"_id": "second", "image": "m.tif", "page": 2}, {"_id": "first", "image": "m.tif"},
        {"_id": "words", "image": "a.png", "title": "the", "text": "words"},
    ]  # fmt: skip
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pages = {page.id: page for page in read_judged_set(folder).pages()}
    for name, seed in (("first", 1), ("second", 2), ("words", 3)):
        image = pages[name].image
        assert image is not None
        assert image.tobytes() == picture(seed).tobytes()
    assert (pages["words"].text, pages["first"].text) == ("the words", "")
    plain = Page(id="x", image=folder / "a.png")
    assert pages["words"].sha256 != plain.sha256  # the text is part of the content
    (folder / "corpus.jsonl").write_text('{"_id": "p", "image": "m.tif"}\n{"_id": "q", "image": "m.tif", "page": 1}')
    with pytest.raises(ConfigError, match=r"corpus.jsonl:2: m.tif page 1 is there under another id"):
        list(read_judged_set(folder).pages())
    for line in ({"_id": "p", "image": "m.tif", "page": 3}, {"_id": "p", "image": "a.png", "page": 2}):
        (folder / "corpus.jsonl").write_text(json.dumps(line))
        with pytest.raises(PageError, match=r"corpus.jsonl:1: there is no such page"):
            list(read_judged_set(folder).pages())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"_id": "p1", "text": "again"}', "twice"),
        ('{"_id": "p9"}', "expected an image, a pdf or a text"),
        ('{"_id": "p9", "image": "gone.png"}', "there is no file"),
        ('{"_id": "p9", "image": "https://example.com/a.png"}', "there is no file"),
        ('{"_id": "p9", "pdf": "corpus.jsonl", "page": 0}', "page: expected a whole number from 1, got 0"),
        ('{"_id": "p9", "image": "a\\u0000b.png"}', "null byte"),
        ('{"_id": "p9", "text": 3}', "title and text as texts"),
    ],
)
def test_bad_corpus_lines_are_named(folder: Path, line: str, message: str) -> None:
    with (folder / "corpus.jsonl").open("a") as file:
        file.write("\n" + line)
    with pytest.raises(ConfigError, match=f"corpus.jsonl:3.*{message}"):
        list(read_judged_set(folder).pages())


def test_missing_files_and_broken_images_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "corpus.jsonl").write_text('{"_id": "p1", "image": "broken.png"}')
    with pytest.raises(PageError, match=r"broken\.png"):
        list(read_judged_set(folder).pages())
    with pytest.raises(ConfigError, match=r"dev\.tsv: cannot be read"):
        read_judged_set(folder, split="dev")
    with pytest.raises(ConfigError, match="not a folder"):
        read_judged_set(tmp_path / "nowhere")
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(ConfigError, match="no corpus"):
        read_judged_set(folder).pages()


# -- an index ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path) -> Iterator[PageIndex]:
    encoder = HashingEncoder()
    with PageIndex.open(tmp_path / "index", encoder) as made:
        made.add(Page(id=name, text=text) for name, text in (("p1", "red cat"), ("p2", "blue dog"), ("p3", "red dog")))
        yield made
    encoder.threads.shutdown()


def test_an_index_is_judged_as_a_user_would_search_it(index: PageIndex) -> None:
    judged = JudgedSet({"q1": "red cat", "q2": "red", "q3": "dog"}, {"q1": {"p1": 1}, "q2": {"p2": 1}, "q3": {"p9": 0}})
    got = evaluate(index, judged, k=[1, 2])
    assert got.per_query["R@1"] == {"q1": 1.0, "q2": 0.0}
    assert got.unjudged == ("q3",)
    assert list(got.run["q1"]) == [hit.page.id for hit in index.search("red cat", k=2)]
    assert got.settings is not None
    assert (got.settings["pages"], got.settings["depth"]) == (3, 2)
    assert got.seconds is not None
    assert set(got.seconds) == {"load", "encode", "search"}
    assert len(evaluate(index, judged, k=[1], measures=["AP"]).run["q1"]) == 3  # no cutoff: asks for 100


def test_judgements_of_pages_the_index_does_not_hold(index: PageIndex) -> None:
    judged = JudgedSet({"q1": "red cat"}, {"q1": {"p1": 1, "P-9": 1}})
    with pytest.raises(ConfigError, match="1 relevant pages are not in the index: P-9; it holds 'p1'"):
        evaluate(index, judged)
    got = evaluate(index, judged, k=[3], allow_unknown_pages=True)
    assert (got.measures["R@3"], got.unknown_pages) == (0.5, ("P-9",))


def test_bad_arguments_and_bad_sets(index: PageIndex) -> None:
    judged = JudgedSet({"q1": "red cat"}, {"q1": {"p1": 1}})
    with pytest.raises(ConfigError, match="depth"):
        evaluate(index, judged, depth=0)
    with pytest.raises(ConfigError, match="4 pages are too few for nDCG@10; give at least 10"):
        evaluate(index, judged, depth=4)
    assert evaluate(index, judged, k=[1], measures=["AP"], depth=2).measures["AP"] == 1.0  # has no cutoff to fall below
    with pytest.raises(ConfigError, match="no queries"):
        JudgedSet({}, {})
    with pytest.raises(ConfigError, match="unknown query 'q2'"):
        JudgedSet({"q1": "a"}, {"q2": {"p": 1}})
    with pytest.raises(ConfigError, match=r"relevance: .*got 0.5"):
        JudgedSet({"q1": "a"}, {"q1": {"p": 0.5}})  # type: ignore[dict-item]


# -- comparison --------------------------------------------------------------------------------------------------------


def test_statistics_agree_with_scipy() -> None:
    random = np.random.default_rng(1)
    for n in (9, 60):
        differences = random.normal(0.2, 1, n)
        reference = stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(2)
        )
        assert randomisation_test(differences, 20_000, 0) == pytest.approx(
            reference.pvalue, abs=1e-9 if n == 9 else 0.02
        )
        low, high = bootstrap_interval(differences, 20_000, 0.9, 0)
        theirs = stats.bootstrap(
            (differences,), np.mean, confidence_level=0.9, method="percentile", rng=np.random.default_rng(3)
        ).confidence_interval
        assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_statistics_by_hand() -> None:
    assert randomisation_test(np.array([1.0, 1.0, 1.0, 1.0, 0.0]), 1000, 0) == 2 / 16  # zeros do not count
    assert randomisation_test(np.array([1.0, -1.0, 2.0]), 1000, 0) == 6 / 8  # sums of 4, 2, 2 and 0, of either sign
    assert randomisation_test(np.zeros(4), 1000, 0) == 1.0
    assert bootstrap_interval(np.array([0.0, 1.0]), 2000, 0.9, 0) == (0.0, 1.0)  # means of 0, 1/2 and 1, 1 : 2 : 1
    assert bootstrap_interval(np.array([0.5]), 2000, 0.9, 0) == (0.5, 0.5)
    first, second = (randomisation_test(np.arange(-9.0, 20.0), 200, 7) for _ in range(2))
    assert first == second  # the seed decides


def test_the_t_test_and_the_effect_are_those_of_the_differences() -> None:
    a = made_by({f"q{i}": 1 / (2 + i % 4) for i in range(20)})
    b = made_by({f"q{i}": 1 / (1 + i % 3) for i in range(20)})
    [row] = compare(a, b, measures=["RR@8"]).rows
    first, second = (np.array(list(made.per_query["RR@8"].values())) for made in (a, b))
    assert row.p_t == pytest.approx(stats.ttest_rel(second, first).pvalue)
    assert row.effect == pytest.approx((second - first).mean() / (second - first).std(ddof=1))
    assert row.difference == pytest.approx(b.measures["RR@8"] - a.measures["RR@8"])
    assert row.wins + row.ties + row.losses == 20


def test_where_nothing_differs_p_is_uniform() -> None:
    random = np.random.default_rng(4)
    found = [randomisation_test(random.normal(0, 1, 30), 199, seed) for seed in range(400)]
    assert stats.kstest(found, "uniform").pvalue > 0.001
    assert 0.02 < float(np.mean(np.array(found) <= 0.05)) < 0.09


def test_a_clear_difference_is_found_and_its_direction_told() -> None:
    worse, better = made_by(dict.fromkeys(map(str, range(30)), 0.5)), made_by(dict.fromkeys(map(str, range(30)), 1.0))
    row = compare(worse, better, measures=["RR@8"]).rows[0]
    assert (row.wins, row.losses, row.effect, row.p_t) == (30, 0, None, None)
    assert row.p == pytest.approx(1 / 10_001)
    assert row.interval == (0.5, 0.5)
    assert compare(better, worse, measures=["RR@8"]).rows[0].difference == -0.5
    same = compare(worse, worse)
    assert all(row.p == row.p_adjusted == 1 and row.ties == 30 for row in same.rows)


def test_holm_is_never_below_the_p_it_corrects() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_only_what_is_comparable_is_compared() -> None:
    a, b = made_by({"x": 0.5, "y": 1.0}), made_by({"x": 0.5, "z": 1.0})
    with pytest.raises(ConfigError, match="different judgements"):
        compare(a, b)
    with pytest.raises(ConfigError, match="'AP' is not in both"):
        compare(a, a, measures=["AP"])
    with pytest.raises(ConfigError, match="resamples"):
        compare(a, a, resamples=1)
    with pytest.raises(ConfigError, match="confidence"):
        compare(a, a, confidence=1.0)


def test_differences_that_sum_to_nothing_are_no_difference() -> None:
    for values in ([1 / 6, 1 / 12, -1 / 4], [0.1, 0.2, -0.3], [1 / 3, 1 / 3, -2 / 3]):
        assert randomisation_test(np.array(values), 10_000, 0) == 1.0
        assert randomisation_test(np.array(values * 20), 1_000, 0) == 1.0  # by random flips


def test_a_comparison_says_what_is_compared() -> None:
    values = {"x": 0.5, "y": 1.0}

    def of(**settings: object) -> Evaluation:
        return dataclasses.replace(made_by(values), settings={"set": "s", "pages": 9, "queries": 2} | settings)

    a, b = of(encoder={"pool_factor": 1, "dim": 320}), of(encoder={"pool_factor": 3, "dim": 320})
    done = compare(a, b)
    assert done.differing == {"encoder.pool_factor": (1, 3)}
    assert "encoder.pool_factor: A 1, B 3" in str(done)
    assert "the same settings" in str(compare(a, a))
    assert "not known" in str(compare(made_by(values), a))
    for other in (of(pages=90), of(set="t")):
        with pytest.raises(ConfigError, match=r"different sets .*A .*, B "):
            compare(of(), other)
        assert compare(of(), other, allow_other_set=True).n_queries == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(measures=None), "damaged"),
        (lambda v: v["measures"].update({"no@8": 1.0}), "knows no 'no@8'"),
        (lambda v: v["run"].update(x=[1]), "damaged"),
        (lambda v: v["run"]["x"].update(x="much"), "has the score 'much'"),
        (lambda v: v["qrels"].update(x={"x": 1.5}), r"page 'x': relevance: .*got 1\.5"),
        (lambda v: v.update(unknown_pages=3), "damaged"),
        (lambda v: v.pop("qrels"), "damaged.*'qrels'"),
        (lambda v: v.update(settings=[1]), "damaged"),
        (lambda v: v["measures"].update({"RR@8": math.nan}), "not JSON"),
    ],
)
def test_a_damaged_evaluation_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    made_by({"x": 0.5, "y": 1.0}).write(tmp_path / "a.json")
    values = json.loads((tmp_path / "a.json").read_text())
    change(values)
    (tmp_path / "a.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=rf"a\.json: .*{message}"):
        Evaluation.read(tmp_path / "a.json")


def test_measures_in_a_file_cannot_contradict_its_run(tmp_path: Path) -> None:
    got = made_by({"x": 0.5, "y": 1.0})
    dataclasses.replace(got, measures={"RR@8": 0.1, "nDCG@8": 0.1}, per_query={}).write(tmp_path / "a.json")
    again = Evaluation.read(tmp_path / "a.json")
    assert again.per_query == {name: got.per_query[name] for name in ("RR@8", "nDCG@8")}


def test_the_worst_queries() -> None:
    got = made_by({"x": 0.5, "y": 1.0, "z": 0.25})
    assert got.worst(2, "RR@8") == [("z", 0.25), ("x", 0.5)]
    with pytest.raises(ConfigError, match="'AP' was not computed"):
        got.worst(2, "AP")


def test_without_the_extra_the_pip_line_is_told() -> None:
    code = (
        "import sys; sys.modules['ir_measures'] = None; from colqwen3_retrievers.evaluation import judge\n"
        "try: judge({'q': {'a': 1.0}}, {'q': {'a': 1}})\n"
        "except ImportError as exc: print(exc)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == 'ir-measures is not installed: pip install "colqwen3-retrievers[eval]"'
