"""Forks at bad moments, and what was opened before one: no child hangs, reads wrong data or disturbs its parent.

As under ``gunicorn --preload`` and Celery, which open everything first and fork then.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, MultiVector, Page, PageIndex, fork, load_pages, open_store
from colqwen3_retrievers.cache.disk_cache import DiskCache
from colqwen3_retrievers.cache.page_cache import PageEmbeddingCache
from colqwen3_retrievers.pages import images
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore
from tests.checkpoints import make_checkpoint
from tests.contracts.store_contract import INFO, record, tokens
from tests.forking import again_and_again, answer_of_child, busy, held_elsewhere
from tests.hashing import HashingEncoder, picture

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # Python 3.12 warns of any fork beside threads
]

FORKS = 5
PDF = Path(images.__file__).parents[1] / "demo" / "documents" / "invoice.pdf"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "tomoro").folder


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork that hardly waits, as if the other thread had been in its block for longer than that."""
    monkeypatch.setattr(fork, "PATIENCE", 0.05)


def in_subprocess(code: str, *arguments: object) -> str:
    """What a script prints that starts with nothing imported."""
    prelude = "import os, sys, threading, warnings\nwarnings.simplefilter('ignore', DeprecationWarning)\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True, text=True, timeout=150, check=False, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


# -- files -------------------------------------------------------------------------------------------------------------


def first_text() -> str:
    return next(iter(load_pages(PDF))).text[:7]


@pytest.mark.usefixtures("impatient")
def test_while_another_thread_is_inside_pdfium(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pypdfium2")
    from colqwen3_retrievers.pages import pdf

    expected, text_of = first_text(), pdf._text

    def read(block: Callable[[], object]) -> None:
        monkeypatch.setattr(pdf, "_text", lambda *args: (block(), text_of(*args))[1])
        first_text()

    with busy(read):
        assert answer_of_child(first_text) == expected


def test_while_another_thread_reads_pdfs() -> None:
    pytest.importorskip("pypdfium2")
    expected = first_text()
    with again_and_again(first_text) as errors:
        assert [answer_of_child(first_text) for _ in range(FORKS)] == [expected] * FORKS
    assert not errors


def test_while_another_thread_opens_a_picture_before_any_encoder_exists() -> None:
    code = """
    import io
    from PIL import Image
    from colqwen3_retrievers.pages.images import open_header, open_image
    from tests.forking import answer_of_child, busy

    data = io.BytesIO()
    Image.new("RGB", (9, 7)).save(data, "PNG")
    before = list(warnings.filters)

    class Slow(io.BytesIO):
        def read(self, *size):
            if self.block is not None:
                block, self.block = self.block, None
                block()
            return super().read(*size)

    def opens(block):
        stream = Slow(data.getvalue())
        stream.block = block
        open_header(stream, name="slow.png")

    def child():
        clean = list(warnings.filters) == before
        return f"{clean} {open_image(data.getvalue()).size} {list(warnings.filters) == before}"

    with busy(opens):
        print(list(warnings.filters) == before, answer_of_child(child))
    print(list(warnings.filters) == before)
    """
    assert in_subprocess(code) == "False True (9, 7) True\nTrue"


def test_while_another_thread_decodes_the_same_picture() -> None:
    class Slow(Image.Image):
        block: Callable[[], object] = staticmethod(lambda: None)

        def load(self) -> Any:
            self.block()
            return super().load()

    image = Slow()
    image.im, image._size, image._mode = Image.new("RGB", (3, 2)).im, (3, 2), "RGB"

    def opens(block: Callable[[], object]) -> None:
        image.block = block
        images.open_image(image)

    with busy(opens):
        assert answer_of_child(lambda: str(images.open_image(image).size)) == "(3, 2)"


# -- encoding ----------------------------------------------------------------------------------------------------------


def test_in_mid_encode_the_child_gets_its_own_precision_back(tiny: Path) -> None:
    code = """
    import numpy as np, torch
    from colqwen3_retrievers import ColQwen3Encoder, Page
    from colqwen3_retrievers.engines.torch.engine import TorchEngine
    from colqwen3_retrievers.vectors.kernels.torch_settings import exact_matmul
    from tests.forking import answer_of_child, busy

    torch.set_float32_matmul_precision("medium")
    encoder = ColQwen3Encoder(sys.argv[1], device="cpu", dtype="float32")
    expected = encoder.encode_queries(["revenue"])[0].vectors

    def child():
        seen = [torch.get_float32_matmul_precision(), exact_matmul._inside]
        vectors = encoder.encode_queries(["revenue"])[0].vectors
        with exact_matmul:
            seen.append(torch.get_float32_matmul_precision())
        return f"{seen} {np.abs(vectors - expected).max() < 1e-5} {torch.get_float32_matmul_precision()}"

    def encodes(block):
        normalize = torch.nn.functional.normalize
        forward = torch.nn.Linear.forward
        def blocked(self, *args):
            block()
            return forward(self, *args)
        torch.nn.Linear.forward = blocked
        encoder.encode_queries(["another"])

    pending = None
    with busy(encodes):
        pending = encoder.submit_queries(["third"])
        print(torch.get_float32_matmul_precision(), len(exact_matmul._inside))
        print(answer_of_child(child))
        print(answer_of_child(lambda: str(pending.result(20))))
    print(len(pending.result(20)[0]) > 0, torch.get_float32_matmul_precision())
    """
    lines = in_subprocess(code, tiny).splitlines()
    assert lines[0] == "highest 1"
    assert lines[1] == "['medium', [], 'highest'] True medium"
    assert lines[2].startswith("EngineError: submitted before a fork, in the parent process")
    assert lines[3] == "True medium"


RERANKERS = {
    "llama_index": """
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
    from colqwen3_retrievers.llama_index import ColQwen3Reranker
    reranker = ColQwen3Reranker(model=sys.argv[1], device="cpu", top_n=1)
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in ("a cat", "revenue rose")]
    rerank = lambda: len(reranker.postprocess_nodes(nodes, QueryBundle("revenue")))
    """,
    "langchain_core": """
    from langchain_core.documents import Document
    from colqwen3_retrievers.langchain import ColQwen3Reranker
    reranker = ColQwen3Reranker(model=sys.argv[1], device="cpu", top_n=1)
    documents = [Document(text) for text in ("a cat", "revenue rose")]
    rerank = lambda: len(reranker.compress_documents(documents, "revenue"))
    """,
}


@pytest.mark.parametrize("where", ["resources", "checkpoint"])
@pytest.mark.parametrize("framework", RERANKERS)
def test_inside_a_rerankers_first_call(framework: str, where: str, tiny: Path) -> None:
    pytest.importorskip(framework)
    code = """
    from colqwen3_retrievers.encoding import opened_model
    from colqwen3_retrievers.retrieval import reranking
    from tests.forking import answer_of_child, busy

    def first_call(block):
        choose = reranking.Resources._encoder
        reranking.Resources._encoder = lambda *args: (block(), choose(*args))[1]
        rerank()

    def opens_checkpoint(block):
        make = opened_model.open_checkpoint
        opened_model.open_checkpoint = lambda *args, **kwargs: (block(), make(*args, **kwargs))[1]
        rerank()

    with busy(first_call if sys.argv[2] == "resources" else opens_checkpoint):
        print(answer_of_child(lambda: str(rerank()), seconds=60))
    """
    assert in_subprocess(textwrap.dedent(RERANKERS[framework]) + textwrap.dedent(code), tiny, where) == "1"


def test_embeddings_of_langchain_and_an_index_choose_their_encoder(tmp_path: Path) -> None:
    pytest.importorskip("langchain_core")
    from colqwen3_retrievers.langchain import ColQwen3Embeddings

    embeddings = ColQwen3Embeddings("tiny")
    with (
        PageIndex.open(tmp_path / "index", HashingEncoder()) as index,
        held_elsewhere(embeddings._lock),
        held_elsewhere(index._encoder_lock),
        held_elsewhere(index._records.lock),
    ):
        assert answer_of_child(lambda: f"{embeddings.page_encoder} {index.encoder.info.model}") == (
            "ColQwen3Encoder(model='tiny') hashing"
        )


# -- the cache ---------------------------------------------------------------------------------------------------------


def some(n: int) -> MultiVector:
    return MultiVector(tokens(n))


def test_while_another_thread_writes_the_cache(tmp_path: Path) -> None:
    with closing(DiskCache(tmp_path, 2**24)) as cache:
        cache.put("a", some(1))
        numbers = iter(range(10**6))

        def child() -> str:
            cache.put("child", some(2))
            kept = cache.get("a"), cache.get("child")
            return str([multi_vector is not None for multi_vector in kept])

        with again_and_again(lambda: cache.put(f"key {next(numbers)}", some(3))) as errors:
            assert [answer_of_child(child) for _ in range(FORKS)] == ["[True, True]"] * FORKS
        assert not errors
        assert cache.get("child") is not None


@pytest.mark.usefixtures("impatient")
def test_a_child_goes_without_a_cache_that_a_thread_is_stuck_in(tmp_path: Path) -> None:
    with closing(DiskCache(tmp_path, 2**24)) as cache:
        cache.put("a", some(1))
        with busy(lambda block: cache._write(lambda _: block())):
            assert answer_of_child(lambda: str((cache.get("a"), len(cache), cache.close()))) == "(None, 0, None)"
        assert cache.get("a") is not None


def test_pages_on_their_way_to_the_cache_are_the_parents(tmp_path: Path) -> None:
    class ByHand:
        info = INFO

        def __init__(self) -> None:
            self.started: list[Future[list[MultiVector]]] = []

        def submit_pages(self, pages: Any) -> Future[list[MultiVector]]:
            self.started.append(Future())
            return self.started[-1]

    def child(cache: PageEmbeddingCache, by_hand: ByHand, pending: Future[MultiVector]) -> str:
        again = cache.submit([Page(id="a", text="words")])[0]
        by_hand.started[-1].set_result([some(1)])
        cache.flush()
        return f"{len(again.result(5))} {len(cache)} {pending.exception(5)}"

    for folder in (None, tmp_path):
        by_hand = ByHand()
        with PageEmbeddingCache(by_hand, folder=folder) as cache:
            pending = cache.submit([Page(id="a", text="words")])[0]
            assert answer_of_child(partial(child, cache, by_hand, pending)).startswith("5 1 submitted before a fork")
            by_hand.started[-1].set_result([some(1)])
            assert len(pending.result(5)) == 5


# -- stores ------------------------------------------------------------------------------------------------------------


ORIGINAL = {"id": {"$in": ["p0", "p1", "p2", "p3"]}}


def use(store: EmbeddedStore) -> str:
    hits = [match.record.page.id for match in store.search([tokens(0)], 1, where=ORIGINAL)[0]]
    vectors = store.get(["p0"], vectors=True)[0].multi_vector
    return f"{hits} {np.array_equal(np.asarray(vectors), tokens(0, 1))} {store.read_only}"


def test_while_other_threads_read_and_write_the_store(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path / "index", info=INFO) as store:
        store.add([record(i, f"p{i}") for i in range(4)])
        numbers = iter(range(4, 10**6))

        def write() -> None:
            store.add([record(next(numbers), "changing")])
            store.delete(["changing"])

        expected = use(store).replace("False", "True")
        with again_and_again(write) as write_errors, again_and_again(lambda: use(store)) as read_errors:
            assert [answer_of_child(lambda: use(store)) for _ in range(FORKS)] == [expected] * FORKS
        assert not write_errors + read_errors
        assert sorted(store.ids())[:4] == ["p0", "p1", "p2", "p3"]


@pytest.mark.usefixtures("impatient")
def test_a_store_that_a_thread_is_stuck_in_is_refused_to_the_child(tmp_path: Path) -> None:
    """SQLite in the child would take locks of its parent for its own."""
    with EmbeddedStore(tmp_path / "index", info=INFO) as store:
        store.add([record(0, "p0")])

        def read(block: Callable[[], object]) -> None:
            with store._catalogue.reading():
                block()

        with busy(read):
            assert answer_of_child(lambda: str(len(store))).endswith(
                "a thread used it while this process was forked; open it after the fork"
            )
        assert len(store) == 1


def locks_on(path: Path) -> int:
    """How many locks this process has on a file."""
    inode = path.stat().st_ino
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" not in line]
    return sum(int(line[4]) == os.getpid() and int(line[5].split(":")[2]) == inode for line in lines)


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="Linux lists locks there")
def test_a_child_reads_under_locks_of_its_own(tmp_path: Path) -> None:
    """Connections left open in the parent would make SQLite believe that the child has theirs."""
    with EmbeddedStore(tmp_path / "index", info=INFO) as store:
        store.add([record(0, "p0")])
        files = [tmp_path / "index" / f"catalogue.sqlite{suffix}" for suffix in ("", "-shm")]

        def child() -> str:
            with store._catalogue.reading() as connection:
                connection.execute("SELECT * FROM state").fetchone()
                return str([locks_on(file) > 0 for file in files])

        assert answer_of_child(child) == "[True, True]"


def test_the_right_to_write_stays_with_the_parent(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    store = EmbeddedStore(folder, info=INFO)
    store.add([record(0, "p0")])
    gone, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # lives on after the parent has closed its store
        problems = [answer(lambda: store.add([record(1)])), answer(lambda: store.delete(["p0"])), answer(store.compact)]
        os.write(done[1], b"ready")
        os.read(gone[0], 1)
        problems.append(answer(lambda: EmbeddedStore(folder).add([record(2, "of the child")])))
        store.close()
        os.write(done[1], "\n".join(problems).encode())
        os._exit(0)
    assert os.read(done[0], 100) == b"ready"
    store.add([record(1, "p1")])
    store.close()
    EmbeddedStore(folder).close()  # the child's copy of the file does not hold the lock
    os.write(gone[1], b".")
    problems = os.read(done[0], 1 << 16).decode().splitlines()
    os.waitpid(child, 0)
    for end in (*gone, *done):
        os.close(end)
    assert all("opened for writing before a fork: the parent process keeps the right" in line for line in problems[:3])
    assert problems[3] == "None"
    with EmbeddedStore(folder, read_only=True) as reader:
        assert reader.ids() == ["of the child", "p0", "p1"]


def answer(work: Callable[[], object]) -> str:
    try:
        return str(work())
    except Exception as exc:
        return str(exc)


def test_the_parents_lock_outlives_its_children(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path / "index", info=INFO) as store:
        answer_of_child(lambda: str(store.close()))
        assert "another writer has it open" in answer(lambda: EmbeddedStore(tmp_path / "index"))
        store.add([record(0, "p0")])


def test_compacting_and_closing_after_forks(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path / "index", info=INFO) as store:
        store.add([record(i, f"p{i}") for i in range(8)])
        assert answer_of_child(lambda: str(len(store))) == "8"
        store.delete([f"p{i}" for i in range(4)])
        assert answer_of_child(lambda: str(len(store))) == "4"
        store.compact()
        assert answer_of_child(lambda: str(len(store))) == "4"
        assert answer_of_child(lambda: f"{store.close()} {answer(store.ids)}").endswith("the index is closed")
        assert len(store) == 4


@pytest.fixture
def index(tmp_path: Path) -> Iterator[PageIndex]:
    encoder = HashingEncoder()
    with PageIndex.open(tmp_path / "index", encoder) as index:
        index.add([Page(id=f"p{i}", source="a.pdf", number=i + 1, image=picture(i), text=f"word{i}") for i in range(3)])
        yield index
    encoder.threads.shutdown()


def test_an_index_opened_before_the_fork_serves_every_worker(index: PageIndex) -> None:
    query = index.get(["p1"], vectors=True)[0].multi_vector

    def search() -> str:
        hit = index.search(query, k=1)[0]
        return f"{hit.page.id} {hit.page.image.size}"

    assert [answer_of_child(search) for _ in range(2)] == [search()] * 2 == ["p1 (24, 16)"] * 2
    for write in (lambda: index.add([]), lambda: index.sync([]), lambda: index.delete(["p1"]), index.compact):
        assert "the parent process keeps the right to write" in answer_of_child(lambda w=write: str(w()))
    index.delete(["p2"])
    assert len(index) == 2


def test_front_ends_opened_before_the_fork(index: PageIndex) -> None:
    pytest.importorskip("llama_index.core")
    pytest.importorskip("langchain_core")
    from colqwen3_retrievers import langchain, llama_index

    first = llama_index.ColQwen3Retriever(index, similarity_top_k=1)
    second = langchain.ColQwen3Retriever(index=index, k=1)
    third = langchain.ColQwen3VectorStore(index)

    def ask() -> str:
        index.encoder.threads = type(index.encoder.threads)(1)  # of the test's own encoder
        nodes, documents = first.retrieve("word1"), second.invoke("word1")
        return f"{nodes[0].node.node_id} {documents[0].id} {third.similarity_search('word1', k=1)[0].id}"

    assert [answer_of_child(ask) for _ in range(2)] == ["p1 p1 p1"] * 2


def test_a_temporary_store_of_langchain_outlives_a_child_that_exits(tiny: Path) -> None:
    pytest.importorskip("langchain_core")
    code = """
    from pathlib import Path
    from colqwen3_retrievers.langchain import ColQwen3VectorStore
    from colqwen3_retrievers import ColQwen3Encoder
    store = ColQwen3VectorStore.from_texts(["a cat", "revenue rose"], ColQwen3Encoder(sys.argv[1], device="cpu"))
    child = os.fork()
    if child == 0:
        sys.exit(len(store.index))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), Path(store.index.location).exists(), len(store.index))
    """
    assert in_subprocess(code, tiny) == "2 True 2"


# -- Qdrant ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
@pytest.mark.parametrize("given", [False, True])
def test_qdrant_connects_anew(given: bool) -> None:
    client_of = pytest.importorskip("qdrant_client").QdrantClient
    from colqwen3_retrievers.stores.qdrant.store import QdrantStore
    from tests.contracts.qdrant_server import serving

    with serving(api_key="secret") as server:
        client = (
            client_of(port=server.port, api_key="secret", check_compatibility=False, https=False) if given else None
        )
        with open_qdrant(QdrantStore, server, client) as store:
            store.add([record(i, f"p{i}") for i in range(3)])
            parents = store._call._connected()

            def child() -> str:
                assert store._call._connected() is not parents, "its connections would be shared"
                store.add([record(7, f"of {os.getpid()}")])
                return f"{use_qdrant(store)} {answer(store.close)} {answer(store.ids)[-19:]}"

            expected = f"{use_qdrant(store)} None the index is closed"
            assert [answer_of_child(child) for _ in range(2)] == [expected] * 2
            server.faults = [1.0]
            call = threading.Thread(target=lambda: len(store))
            call.start()
            while server.faults:
                threading.Event().wait(0.01)
            assert answer_of_child(child) == expected, "while another thread waits for an answer"
            call.join(30)
            assert len(store) == 6
        if client is not None:
            client.close()


def open_qdrant(kind: Any, server: Any, client: Any) -> Any:
    if client is not None:
        return kind("pages", info=INFO, client=client)
    return open_store(server.address(), info=INFO, api_key="secret")


def use_qdrant(store: Any) -> str:
    return str([match.record.page.id for match in store.search([tokens(0)], 1)[0]])


def test_qdrant_in_memory_is_a_copy_and_in_a_folder_the_parents(tmp_path: Path) -> None:
    client_of = pytest.importorskip("qdrant_client").QdrantClient
    from colqwen3_retrievers.stores.qdrant.store import QdrantStore

    client = client_of(":memory:")
    with QdrantStore("pages", info=INFO, client=client) as store:
        store.add([record(0, "p0")])

        def hold(block: Callable[[], object]) -> None:
            with store._call._lock:
                block()

        with busy(hold):
            assert answer_of_child(lambda: use_qdrant(store)) == "['p0']"
    client.close()
    with open_store(f"qdrant+path:{tmp_path}/pages", info=INFO) as store:
        store.add([record(0, "p0")])
        assert answer_of_child(lambda: use_qdrant(store)).startswith("StoreUnavailableError: qdrant+path:")
        assert use_qdrant(store) == "['p0']"


def test_encoders_that_are_opened_by_another_thread(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from colqwen3_retrievers.encoding import opened_model, shared_engine

    encoder, make = ColQwen3Encoder(tiny, device="cpu"), opened_model.open_checkpoint

    def opens(block: Callable[[], object]) -> None:
        monkeypatch.setattr(opened_model, "open_checkpoint", lambda *a, **k: (block(), make(*a, **k))[1])
        encoder.opened()

    with busy(opens):
        assert answer_of_child(lambda: encoder.info.family) == "tomoro"
    tokenizer = encoder.opened().renderer._tokenizer

    with held_elsewhere(tokenizer._lock), held_elsewhere(shared_engine._lock):
        assert answer_of_child(lambda: str(len(tokenizer.encode("a").ids) > 0)) == "True"
        assert answer_of_child(lambda: encoder.encode_queries(["a"]) and "encoded", 60) == "encoded"
    encoder.close()
