"""The whole pipeline in real mteb: a small task of ViDoRe's shape, its data sets made in memory."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

from colqwen3_retrievers import ColQwen3Encoder
from colqwen3_retrievers.cli.main import main
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.evaluation import MtebSearch, run_mteb
from tests.hashing import HashingEncoder, picture

with warnings.catch_warnings():  # mteb and what it brings warn of their own deprecations when they are imported
    warnings.simplefilter("ignore")
    import datasets
    import mteb
    from datasets.exceptions import DatasetNotFoundError
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.models_protocols import SearchProtocol

# what mteb warns of while it works is not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore")

N = 12


class PagesRetrieval(AbsTaskRetrieval):
    """Find the page that shows the same picture, or has the same words; the last page answers no query."""

    metadata = TaskMetadata(
        name="PagesRetrieval", description="pages", reference="https://example.com", type="DocumentUnderstanding",
        dataset={"path": "nowhere/pages", "revision": "1"}, category="it2it", eval_splits=["test"],
        eval_langs=["eng-Latn"], main_score="ndcg_at_5", date=("2024-01-01", "2024-07-01"), domains=["Academic"],
        task_subtypes=["Image Text Retrieval"], license="mit", annotations_creators="derived", dialect=[],
        modalities=["text", "image"], sample_creation="found", bibtex_citation="",
    )  # fmt: skip

    def load_data(self, num_proc: int | None = None, **kwargs: object) -> None:
        images = [picture(i) for i in range(N)]
        corpus = datasets.Dataset.from_dict(
            {"id": [f"p{i}" for i in range(N)], "image": images},
            features=datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()}),
        )
        queries = datasets.Dataset.from_dict(
            {"id": [f"q{i}" for i in range(N - 1)], "text": ["words"] * (N - 1), "image": images[:-1]},
            features=datasets.Features(
                {"id": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
            ),
        )
        relevant = {f"q{i}": {f"p{i if i else N - 1}": 1} for i in range(N - 1)}  # q0 is judged wrongly: never first
        self.dataset = {
            "default": {"test": {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": None}}
        }
        self.data_loaded = True


WORDS = ("harbour", "alloy", "ledger", "window", "cedar", "marble", "copper", "orchid")


class PrintedRetrieval(PagesRetrieval):
    """Find the page on which a word is printed."""

    metadata = PagesRetrieval.metadata.model_copy(update={"name": "PrintedRetrieval", "category": "t2i"})

    def load_data(self, num_proc: int | None = None, **kwargs: object) -> None:
        names = [str(number) for number in range(len(WORDS))]
        corpus = datasets.Dataset.from_dict(
            {"id": names, "image": [printed(word) for word in WORDS]},
            features=datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()}),
        )
        queries = datasets.Dataset.from_dict({"id": names, "text": list(WORDS)})
        relevant = {name: {name: 1} for name in names}
        self.dataset = {
            "default": {"test": {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": None}}
        }
        self.data_loaded = True


class LanguagesRetrieval(PagesRetrieval):
    """The same pages under other ids, asked about in two languages; one page of the second is another."""

    metadata = PagesRetrieval.metadata.model_copy(
        update={"name": "LanguagesRetrieval", "eval_langs": {"english": ["eng-Latn"], "french": ["fra-Latn"]}}
    )

    def load_data(self, num_proc: int | None = None, **kwargs: object) -> None:
        super().load_data()
        plain = self.dataset.pop("default")["test"]
        self.dataset["english"] = {"test": plain}
        images = [picture(i) for i in range(N - 1)] + [picture(99)]
        renamed = datasets.Dataset.from_dict(
            {"id": [f"page {i}" for i in range(N)], "image": images},
            features=datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()}),
        )
        relevant = {f"q{i}": {f"page {i}": 1} for i in range(N - 1)}
        self.dataset["french"] = {"test": plain | {"corpus": renamed, "relevant_docs": relevant}}


class MissingRetrieval(PagesRetrieval):
    """A task whose data set cannot be had."""

    metadata = PagesRetrieval.metadata.model_copy(update={"name": "MissingRetrieval"})
    error: Exception = ValueError("BuilderConfig 'x' not found")

    def load_data(self, num_proc: int | None = None, **kwargs: object) -> None:
        raise self.error


class PrivateRetrieval(MissingRetrieval):
    """A task whose data set is not public."""

    metadata = PagesRetrieval.metadata.model_copy(update={"name": "PrivateRetrieval", "is_public": False})
    error = DatasetNotFoundError("gated")


class Benchmark:
    """A named list of tasks, as mteb gives it."""

    def __init__(self, *tasks: AbsTaskRetrieval) -> None:
        self.tasks = tasks


def printed(word: str) -> Image.Image:
    image = Image.new("RGB", (320, 224), "white")
    ImageDraw.Draw(image).text((40, 90), word, fill="black", font=ImageFont.load_default(28))
    return image


def test_mteb_judges_the_pipeline(encoder: HashingEncoder, tmp_path: Path) -> None:
    with MtebSearch(encoder, folder=tmp_path) as search:
        assert isinstance(search, SearchProtocol)
        done = mteb.evaluate(search, PagesRetrieval(), cache=None, show_progress_bar=False)
        assert len(encoder.encoded) == N
    [scores] = done.task_results[0].scores["test"]
    assert scores["recall_at_1"] == pytest.approx((N - 2) / (N - 1), abs=1e-4)
    assert scores["main_score"] == scores["ndcg_at_5"]
    assert done.model_name == "local/hashing"
    assert list(tmp_path.iterdir()) == []  # what was indexed is gone


def test_reranking_tasks_are_answered_among_their_candidates(encoder: HashingEncoder, tmp_path: Path) -> None:
    task = PagesRetrieval()
    task.load_data()
    data = task.dataset["default"]["test"]
    place = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default", "encode_kwargs": {}}
    with MtebSearch(encoder, folder=tmp_path) as search:
        with pytest.raises(ConfigError, match="no corpus yet"):
            search.search(data["queries"], top_k=3, **place)
        search.index(data["corpus"], num_proc=None, **place)
        among = {f"q{i}": ["p3", "p1"] for i in range(N - 1)}
        found = search.search(data["queries"], top_k=5, top_ranked=among, num_proc=None, **place)
    assert set(found["q3"]) == {"p1", "p3"}
    assert next(iter(found["q3"])) == "p3"


def test_the_meta_tells_settings_apart(encoder: HashingEncoder) -> None:
    with MtebSearch(encoder) as search, MtebSearch(encoder, exact=True) as exact:
        assert search.mteb_model_meta.experiment_kwargs != exact.mteb_model_meta.experiment_kwargs
        assert search.mteb_model_meta.embed_dim == encoder.info.dim


def test_the_meta_tells_precisions_apart() -> None:
    metas = []
    for dtype in ("float32", "bfloat16"):
        with ColQwen3Encoder("tiny", device="cpu", dtype=dtype) as one, MtebSearch(one) as search:
            metas.append(search.mteb_model_meta.experiment_kwargs)
    assert metas[0] | {"dtype": "bfloat16"} == metas[1] != metas[0]


def test_vidore_is_known_by_name_and_other_names_are_refused(encoder: HashingEncoder) -> None:
    for version in ("ViDoRe(v1)", "ViDoRe(v2)", "ViDoRe(v3)"):
        assert len(mteb.get_benchmark(version).tasks) > 3
    with pytest.raises(ConfigError, match="no benchmark or task 'Nothing'"):
        run_mteb(encoder, ["Nothing"])


def test_one_call_scores_tasks_by_name(encoder: HashingEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    # the registry would need a data set on the hub; all behind it is real
    monkeypatch.setattr(mteb, "get_task", lambda name: PagesRetrieval())
    scores = run_mteb(encoder, ["PagesRetrieval"])
    assert list(scores.scores) == ["PagesRetrieval"]
    assert scores.scores["PagesRetrieval"]["default test"] > 0.9
    assert scores.means == {"PagesRetrieval": scores.scores["PagesRetrieval"]["default test"]}
    assert scores.failed == {}


def test_tasks_that_fail_do_not_lose_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = {
        "Some": Benchmark(PrintedRetrieval(), MissingRetrieval(), PrivateRetrieval(), PagesRetrieval()),
        "All": Benchmark(PrintedRetrieval(), PagesRetrieval()),
    }
    monkeypatch.setattr(mteb, "get_benchmark", lambda name: tasks[name])
    line = ["eval", "--mteb", *tasks, "--model", "tiny", "--device", "cpu", "--json", str(tmp_path / "a.json")]
    assert main(line) == 1
    printed = capsys.readouterr()
    assert "2 of 4 tasks failed: MissingRetrieval, PrivateRetrieval" in printed.err
    assert "failed: ValueError: BuilderConfig 'x' not found" in printed.out
    assert "failed: its data set is private, or there is none: gated" in printed.out
    assert "no mean, as tasks failed" in printed.out
    kept = json.loads((tmp_path / "a.json").read_text())
    assert set(kept["scores"]) == {"PrintedRetrieval", "PagesRetrieval"}
    both = [scores["default test"] for scores in kept["scores"].values()]
    assert kept["means"] == {"Some": None, "All": pytest.approx(sum(both) / 2)}


def test_what_is_done_is_written_before_the_next_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: HashingEncoder
) -> None:
    class Interrupted(MissingRetrieval):
        error = KeyboardInterrupt()  # type: ignore[assignment]

    def benchmark(name: str) -> Benchmark:
        return Benchmark(PagesRetrieval(), Interrupted())

    monkeypatch.setattr(mteb, "get_benchmark", benchmark)
    line = ["eval", "--mteb", "X", "--model", "tiny", "--device", "cpu", "--json", str(tmp_path / "a.json")]
    assert main([*line, "--results", str(tmp_path / "results")]) == 130
    assert list(json.loads((tmp_path / "a.json").read_text())["scores"]) == ["PagesRetrieval"]
    [found] = (tmp_path / "results").rglob("PagesRetrieval.json")
    assert "experiments" in found.parts  # other settings have files of their own


def test_results_that_are_there_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: HashingEncoder
) -> None:
    monkeypatch.setattr(mteb, "get_task", lambda name: PagesRetrieval())
    first = run_mteb(encoder, ["PagesRetrieval"], results=tmp_path)
    encoder.encoded.clear()
    assert run_mteb(encoder, ["PagesRetrieval"], results=tmp_path) == first
    assert encoder.encoded == []
    run_mteb(encoder, ["PagesRetrieval"], results=tmp_path, exact=True)  # another setting
    assert len(encoder.encoded) == N


def test_a_page_is_encoded_once_for_all_subsets(encoder: HashingEncoder, tmp_path: Path) -> None:
    with MtebSearch(encoder, folder=tmp_path) as search:
        done = mteb.evaluate(search, LanguagesRetrieval(), cache=None, show_progress_bar=False)
        assert len(encoder.encoded) == N + 1
        [made] = tmp_path.iterdir()
        assert sorted(path.name for path in made.iterdir()) == ["2", "embeddings"]  # the first index is gone
    assert list(tmp_path.iterdir()) == []
    rows = done.task_results[0].scores["test"]
    scores = {row["hf_subset"]: row["recall_at_1"] for row in rows}
    assert scores["french"] == 1.0
    assert scores["english"] == pytest.approx((N - 2) / (N - 1), abs=1e-4)


def test_an_id_that_comes_twice_is_refused(encoder: HashingEncoder, tmp_path: Path) -> None:
    task = PagesRetrieval()
    task.load_data()
    corpus = task.dataset["default"]["test"]["corpus"]
    place = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default", "encode_kwargs": {}}
    with MtebSearch(encoder, folder=tmp_path) as search, pytest.raises(ConfigError, match="'p3' comes twice"):
        search.index(datasets.concatenate_datasets([corpus, corpus.select([3])]), **place)
    assert encoder.encoded == []


def test_one_command_scores_engine_pooling_and_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mteb, "get_task", lambda name: PrintedRetrieval())  # for want of a hub, as above
    line = ["eval", "--mteb", "PrintedRetrieval", "--model", "tiny", "--device", "cpu", "--pool-factor", "3"]
    assert main([*line, "--json", str(tmp_path / "scores.json")]) == 0
    [(part, score)] = json.loads((tmp_path / "scores.json").read_text())["scores"]["PrintedRetrieval"].items()
    assert part == "default test"
    assert score > 0.9
    assert f"{score:.4f}" in capsys.readouterr().out
