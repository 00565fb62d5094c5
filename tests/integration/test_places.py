"""Indexes and models stay what they are when the process, or they themselves, change place; and cold starts."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from colqwen3_retrievers import ColQwen3Encoder, Page, PageIndex
from colqwen3_retrievers.errors import CheckpointError, ConfigError
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tomoro"), "tomoro").folder


def test_an_open_index_stays_where_it_was_opened(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ColQwen3Encoder(model, device="cpu")
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        with PageIndex.open("idx", encoder) as index:
            index.add(Page(id=place, text=f"page of {place}"))
    monkeypatch.chdir(tmp_path / "a")
    with PageIndex.open("idx", encoder) as index:
        monkeypatch.chdir(tmp_path / "b")
        index.add(Page(id="more", text="another page of a"))
        assert len(index.search("page", k=9)) == 2
    for place, count in (("a", 2), ("b", 1)):
        with PageIndex.open(tmp_path / place / "idx", encoder) as index:
            assert len(index.search("page", k=9)) == count
    encoder.close()


def test_a_model_folder_is_known_by_its_absolute_place(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model, tmp_path / "ck" / "tomoro")
    monkeypatch.chdir(tmp_path)
    with PageIndex.open("idx", ColQwen3Encoder("ck/tomoro", device="cpu")) as index:
        index.add(Page(id="p", text="page"))
    monkeypatch.chdir("/")
    with PageIndex.open(tmp_path / "idx", read_only=True) as index:
        assert index.search("page")[0].page.id == "p"
    shutil.rmtree(tmp_path / "ck")
    gone = pytest.raises(CheckpointError, match="no such folder; has the model been moved")
    with PageIndex.open(tmp_path / "idx", read_only=True) as index, gone:
        index.search("page")


def test_a_home_folder_is_understood(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(model, tmp_path / "model")
    with PageIndex.open("~/idx", ColQwen3Encoder("~/model", device="cpu")) as index:
        index.add(Page(id="p", text="page"))
    assert (tmp_path / "idx").is_dir()


def test_copies_of_an_index_and_of_retrievers_open_it_for_reading(model: Path, tmp_path: Path) -> None:
    from colqwen3_retrievers.langchain import ColQwen3Retriever as LangChainRetriever
    from colqwen3_retrievers.llama_index import ColQwen3Retriever as LlamaIndexRetriever

    index = PageIndex.open(tmp_path / "idx", ColQwen3Encoder(model, device="cpu"))
    index.add(Page(source="a.pdf", number=n, text=f"page {n}") for n in (1, 2, 3))
    assert copy.deepcopy(index) is index
    for thing in (index, LlamaIndexRetriever(index, similarity_top_k=3), LangChainRetriever(index=index, k=3)):
        made = pickle.loads(pickle.dumps(thing))
        if isinstance(made, PageIndex):
            assert made.store.read_only
            assert len(made.search("page", k=9)) == 3
        elif isinstance(made, LlamaIndexRetriever):
            assert len(made.retrieve("page")) == len(copy.deepcopy(thing).retrieve("page")) == 3
        else:
            assert len(made.invoke("page")) == 3
    index.close()


def test_both_frameworks_filter_by_the_names_their_results_carry(model: Path, tmp_path: Path) -> None:
    from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters

    from colqwen3_retrievers.langchain import ColQwen3Retriever as LangChainRetriever
    from colqwen3_retrievers.llama_index import ColQwen3Retriever as LlamaIndexRetriever

    with PageIndex.open(tmp_path / "idx", ColQwen3Encoder(model, device="cpu")) as index:
        index.add(Page(source="a.pdf", number=n, label=f"x{n}", text=f"page {n}") for n in (1, 2, 3))
        for key, value in (("page", 2), ("page_label", "x2"), ("source", "a.pdf")):
            count = 3 if key == "source" else 1
            found = LangChainRetriever(index=index).invoke("page", filter={"$or": [{key: value}]})
            assert [document.metadata[key] for document in found] == [value] * count
            filters = MetadataFilters(filters=[MetadataFilter(key=key, value=value)])
            nodes = LlamaIndexRetriever(index, similarity_top_k=9, filters=filters).retrieve("page")
            assert [node.metadata[key] for node in nodes] == [value] * count
        with pytest.raises(ConfigError, match="filters: 'page'"):
            LlamaIndexRetriever(index, filters=MetadataFilters(filters=[MetadataFilter(key="page", value="two")]))


COLD = """
import sys, threading, time
from colqwen3_retrievers import ColQwen3Encoder, Page
assert "torch" not in sys.modules
encoder = ColQwen3Encoder(sys.argv[1], device=None)
def pages():
    for i in range(40):
        time.sleep(0.05)
        yield Page(id=str(i), text=f"page {i}")
found = []
threads = [threading.Thread(target=lambda: found.append(encoder.encode_queries(["a"]))) for _ in range(8)]
for thread in threads:
    thread.start()
print(len(encoder.encode_pages(pages())))
for thread in threads:
    thread.join()
print(len(found))
"""


def test_a_cold_process_may_be_asked_from_everywhere_at_once(model: Path) -> None:
    """While one thread imports torch, others go on submitting."""
    done = subprocess.run(
        [sys.executable, "-c", COLD, str(model)], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.split() == ["40", "8"], done.stderr
