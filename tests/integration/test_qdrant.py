"""An index over Qdrant: the whole way with pages and pictures, and the codes and candidates of its real engine."""

from __future__ import annotations

import dataclasses
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from colqwen3_retrievers import EncoderInfo, MultiVector, Page, PageIndex, open_store
from colqwen3_retrievers.errors import ConfigError, StoreError, StoreMismatchError
from colqwen3_retrievers.stores.protocol import Record
from colqwen3_retrievers.stores.qdrant.collection import QdrantOptions
from colqwen3_retrievers.vectors.late_interaction import maxsim
from tests.contracts.qdrant_edge_engine import EdgeEngine, to_query
from tests.contracts.qdrant_server import QdrantServer, serving
from tests.contracts.store_contract import INFO as CONTRACT
from tests.contracts.store_contract import record
from tests.hashing import HashingEncoder

DIM, TOKENS, PAGES = 32, 60, 120
INFO = EncoderInfo("ab12", "test", "tomoro", DIM, 1, 1280, False, 1)


@pytest.fixture
def server() -> Iterator[QdrantServer]:
    with serving() as server:
        yield server


def pages() -> list[Page]:
    made = [
        Page(source="a.pdf", number=n + 1, text=f"page {n} about tax", metadata={"year": 2020 + n}) for n in range(6)
    ]
    return [*made, Page(source="b.png", image=Image.new("RGB", (24, 16), "red"))]


def test_an_index_at_an_address(server: QdrantServer, encoder: HashingEncoder, tmp_path: Path) -> None:
    with PageIndex.open(server.address(), encoder, images_dir=tmp_path / "pictures") as index:
        done = index.add(pages())
        assert (done.added, len(index), index.location) == (7, 7, server.address())
        assert index.add(pages()).unchanged == 7
        hits = index.search("page 3", k=2, where={"year": {"$lt": 2025}}, window=1)
        assert hits[0].page.id == "a.pdf#page=4" and [p.number for p in hits[0].neighbours] == [3, 5]
        assert len(index.search("tax", k=9, group_by="source")) == 2
        assert index.delete(where={"year": {"$gte": 2024}}) == 2
    with PageIndex.open(server.address(), encoder, images_dir=tmp_path / "pictures", read_only=True) as reader:
        (shown,) = reader.get(["b.png#page=1"], vectors=True)
        assert shown.page.image is not None and shown.page.image.size == (24, 16)
        assert len(reader) == 5 and shown.multi_vector is not None
        with pytest.raises(StoreError, match="read_only=True"):
            reader.delete(["b.png#page=1"])
    with PageIndex.open(server.address(), encoder, images_dir=tmp_path / "pictures") as index:
        index.delete(["b.png#page=1"])
    assert not list((tmp_path / "pictures").rglob("*.png"))


def test_pictures_need_a_place_only_when_there_are_some(server: QdrantServer, encoder: HashingEncoder) -> None:
    with PageIndex.open(server.address(), encoder) as index:
        assert index.add(pages()[:6]).added == 6
        with pytest.raises(ConfigError, match=r"page 'b\.png#page=1': no folder for its image; give images_dir="):
            index.add(pages())
        assert len(index) == 6 and index.search("page 3", k=1)[0].page.number == 4


def test_another_process_opens_it_by_its_address(server: QdrantServer, encoder: HashingEncoder, tmp_path: Path) -> None:
    with PageIndex.open(server.address(), encoder, images_dir=tmp_path) as index:
        index.add(pages())
        index._encoder = None  # an encoder of this test cannot be pickled
        state = pickle.dumps(index)
    with pickle.loads(state) as copy:
        assert len(copy) == 7 and copy.store.read_only and copy.location == server.address()
        assert copy.get(["b.png#page=1"])[0].page.image.size == (24, 16)


def test_another_model_is_refused(server: QdrantServer, encoder: HashingEncoder) -> None:
    PageIndex.open(server.address(), encoder).close()
    with pytest.raises(StoreMismatchError, match="dim is"):
        open_store(server.address(), info=dataclasses.replace(encoder.info, dim=16))


def test_a_killed_add_leaves_whole_pages_and_is_gone_on_with(server: QdrantServer) -> None:
    code = """
    import os, sys; sys.path.insert(0, os.getcwd())
    from colqwen3_retrievers import open_store
    from tests.contracts.store_contract import INFO, record
    open_store(sys.argv[1], info=INFO).add([record(n, f"p{n:04}") for n in range(2_000)])
    """
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), server.address()], cwd=root) as child:
        while sum("/points?" in path for _, path, _ in server.requests) < 3 and child.poll() is None:
            time.sleep(0.005)
        child.kill()
    assert child.returncode == -signal.SIGKILL
    with server.lock:  # the request that was under way is over
        pass
    records = [record(n, f"p{n:04}") for n in range(2_000)]
    with open_store(server.address(), info=CONTRACT) as store:
        kept = store.ids()
        assert 256 <= len(kept) < 2_000 and kept == [r.page.id for r in records[: len(kept)]]
        for back, given in zip(store.get(kept[-300:], vectors=True), records[len(kept) - 300 :], strict=False):
            assert np.asarray(back.multi_vector).tobytes() == np.asarray(given.multi_vector).tobytes()
        store.add(records)
        assert len(store) == 2_000


def topical_pages(seed: int) -> list[np.ndarray]:
    """Pages of clustered token embeddings, so that pooling and codes have something to keep."""
    rng = np.random.default_rng(seed)
    topics = rng.standard_normal((120, DIM))
    made = []
    for _ in range(PAGES):
        own = topics[rng.choice(120, 8, replace=False)]
        rows = own[rng.integers(0, 8, TOKENS)] + 0.6 * rng.standard_normal((TOKENS, DIM))
        made.append((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16).astype(np.float32))
    return made


def queries(rows: list[np.ndarray], count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(9)
    made = []
    for _ in range(count):
        page = rows[rng.integers(PAGES)]
        noisy = page[rng.choice(TOKENS, 12, replace=False)] + 0.15 * rng.standard_normal((12, DIM))
        made.append((noisy / np.linalg.norm(noisy, axis=1, keepdims=True)).astype(np.float32))
    return made


@pytest.mark.parametrize("graph", [0, 16])
def test_codes_and_candidates_of_the_real_engine(tmp_path: Path, graph: int) -> None:
    rows = topical_pages(1)
    engine = EdgeEngine(tmp_path, indexing_threshold=10)  # kilobytes: so that so few pages get codes too
    with serving(engine=engine) as server:
        store = open_store(server.address(), info=INFO, options=QdrantOptions(graph=graph, candidates=2))
        store.add([Record(Page(id=f"p{n:03}", sha256="0"), MultiVector(made)) for n, made in enumerate(rows)])
        asked = queries(rows, 12)
        before = store.search(asked, 10, exact=True)
        assert engine.optimize("pages") == 2 * PAGES  # both vectors lie in optimised segments now
        exact, fast = store.search(asked, 10, exact=True), store.search(asked, 10)
        found = 0
        for query, first, best, quick in zip(asked, before, exact, fast, strict=True):
            truth = maxsim([query], rows)[0]
            assert [m.record.page.id for m in first] == [m.record.page.id for m in best]
            for match in [*best, *quick]:
                assert match.score == pytest.approx(truth[int(match.record.page.id[1:])], abs=1e-3)
            found += len({m.record.page.id for m in best} & {m.record.page.id for m in quick})
        assert found >= 0.99 * 120
        # that candidates are found by codes and not by floats: their scores differ, by little
        last = [body["searches"] for _, path, body in server.requests if "query" in path][-1][0]
        from qdrant_client import models

        prefetch = models.QueryRequest.model_validate(last).prefetch
        alone = models.QueryRequest(**prefetch.model_dump(exclude={"prefetch", "lookup_from", "score_threshold"}))
        by_codes = engine.query_batch_points("pages", [alone])[0]["points"]
        alone.params = models.SearchParams(exact=True)
        by_floats = {p["id"]: p["score"] for p in engine.query_batch_points("pages", [alone])[0]["points"]}
        differences = [abs(p["score"] - by_floats[p["id"]]) for p in by_codes if p["id"] in by_floats]
        assert 1e-6 < max(differences) < 0.5
        assert to_query(alone).limit == 100
    engine.close()
