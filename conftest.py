"""What a test file needs beyond numpy and Pillow: where it is not installed, the file is left out and named.

So the suite runs bare too, which shows that the lower floors need no extra. And an index without a model, for all tests
that need no better one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from colqwen3_retrievers import PageIndex
    from tests.hashing import HashingEncoder

ROOT = Path(__file__).parent

SERVER_TESTS = [f"tests/unit/engines/server/test_{name}.py" for name in ("faults", "probe", "scoring", "safety")]

# From the repository's root; a folder stands for all that is in it.
NEEDS = {
    "torch": [
        "tests/contracts", "tests/integration", "tests/checkpoints.py", "tests/reference.py", "scripts",
        "src/colqwen3_retrievers/engines/torch", "src/colqwen3_retrievers/vectors/kernels",
        "src/colqwen3_retrievers/index/page_index.py",
        "tests/unit/models/test_checkpoint.py", "tests/unit/models/test_rendering.py",
        "tests/unit/encoding/test_encoder.py", "tests/unit/cache/test_page_cache.py",
        "tests/unit/llama_index/test_embedding.py", "tests/unit/llama_index/test_retriever.py",
        "tests/unit/llama_index/test_reranker.py", "tests/unit/llama_index/test_retriever_writing.py",
        "tests/unit/langchain/test_retriever.py", "tests/unit/langchain/test_reranker.py",
        "tests/frameworks/page_folder.py", "tests/frameworks/evidence_pages.py", "tests/fault_server.py",
        *SERVER_TESTS,
    ],
    "httpx": SERVER_TESTS,
    "ir_measures": [
        "tests/unit/evaluation", "src/colqwen3_retrievers/evaluation",
        "tests/integration/test_eval*.py",
    ],
    "mteb": ["tests/integration/test_eval_mteb.py"],
    "triton": ["src/colqwen3_retrievers/vectors/kernels/triton_scan.py", "tests/contracts/test_fused_kernel.py"],
    "scipy": [
        "tests/unit/evaluation/test_measures.py", "src/colqwen3_retrievers/evaluation",
        "tests/integration/test_eval.py", "tests/integration/test_eval_index.py",
    ],
    "pypdfium2": [
        "tests/unit/pages/test_loading.py", "tests/unit/pages/test_pdf.py", "tests/unit/pages/test_files.py",
        "tests/unit/llama_index/test_reader.py", "tests/unit/demo",
    ],
    "reportlab": [
        "tests/unit/llama_index/test_reader.py", "tests/bad_pages.py", "tests/unit/pages", "tests/unit/demo",
    ],
    "av": ["tests/unit/pages/test_video.py"],
    "websockets": ["tests/integration/test_report_in_chromium.py"],
    "vllm": [  # an environment of its own: make test-vllm
        "tests/contracts/test_vllm_engine.py", "tests/integration/test_vllm_plugin.py",
        "src/colqwen3_retrievers/engines/vllm/model.py", "tests/contracts/test_server_engine.py",
        "tests/integration/test_server.py",
    ],
    "llama_index": [
        "tests/unit/llama_index", "src/colqwen3_retrievers/llama_index",
        "tests/integration/llama_index", "tests/contracts/llama_index_contract.py",
        "tests/frameworks/llama_index_models.py", "tests/frameworks/page_folder.py",
    ],
    "qdrant_client": [
        "tests/contracts/test_qdrant_store.py", "tests/contracts/qdrant_*.py", "tests/unit/stores/qdrant",
        "tests/unit/index/test_copy.py", "tests/integration/test_qdrant.py", "src/colqwen3_retrievers/stores/qdrant",
    ],
    "qdrant_edge": [
        "tests/contracts/test_qdrant_store.py", "tests/contracts/qdrant_edge_engine.py",
        "tests/unit/stores/qdrant/test_filters.py", "tests/integration/test_qdrant.py",
    ],
    "langchain_core": [
        "tests/unit/langchain", "src/colqwen3_retrievers/langchain", "tests/integration/langchain",
    ],
}  # fmt: skip

_missing = [module for module in NEEDS if importlib.util.find_spec(module) is None]
_left_out: set[str] = set()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave a file out when something it needs is not installed."""
    if not collection_path.is_relative_to(ROOT):
        return None
    here = collection_path.relative_to(ROOT)
    for module in _missing:
        for pattern in NEEDS[module]:
            if here.match(pattern) or Path(pattern) in here.parents:
                _left_out.add(f"{here} ({module})")
                return True
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out."""
    if _left_out:
        terminalreporter.write_line(f"left out for want of an extra: {', '.join(sorted(_left_out))}")


@pytest.fixture
def encoder() -> Iterator[HashingEncoder]:
    """Late interaction without a model."""
    from tests.hashing import HashingEncoder  # where it is asked for: it needs the package

    made = HashingEncoder()
    yield made
    made.threads.shutdown()


@pytest.fixture
def index(tmp_path: Path, encoder: HashingEncoder) -> Iterator[PageIndex]:
    """An index in a folder, still empty."""
    from colqwen3_retrievers import PageIndex

    with PageIndex.open(tmp_path / "index", encoder) as made:
        yield made
