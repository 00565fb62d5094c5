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

# From the repository's root; a folder stands for all that is in it.
NEEDS = {
    "torch": [
        "tests/contracts", "tests/integration", "tests/checkpoints.py", "tests/reference.py", "scripts",
        "tests/unit/test_checkpoint.py", "tests/unit/test_encoder.py", "tests/unit/test_rendering.py",
        "src/colqwen3_retrievers/model.py", "src/colqwen3_retrievers/engines/torch.py",
        "src/colqwen3_retrievers/attention.py", "src/colqwen3_retrievers/text_trunk.py",
        "src/colqwen3_retrievers/vision_tower.py", "src/colqwen3_retrievers/torch_settings.py",
        "src/colqwen3_retrievers/packed_linear.py",
        "tests/unit/test_llama_index_embedding.py", "tests/unit/test_llama_index_retriever.py",
        "tests/unit/test_llama_index_reranker.py", "tests/unit/test_llama_index_writing.py",
        "src/colqwen3_retrievers/kernels", "tests/unit/test_page_cache.py",
        "tests/unit/test_langchain_retriever.py", "tests/unit/test_langchain_reranker.py", "tests/fault_server.py",
        "tests/frameworks/page_folder.py", "tests/frameworks/evidence_pages.py",
        "tests/unit/test_server_faults.py", "tests/unit/test_server_probe.py", "tests/unit/test_server_scoring.py",
        "tests/unit/test_server_safety.py",
    ],
    "httpx": [
        "tests/unit/test_server_faults.py", "tests/unit/test_server_probe.py", "tests/unit/test_server_scoring.py",
        "tests/unit/test_server_safety.py",
    ],
    "ir_measures": [
        "tests/unit/test_evaluation.py", "src/colqwen3_retrievers/evaluation", "tests/integration/test_eval*.py",
    ],
    "mteb": ["tests/integration/test_eval_mteb.py"],
    "triton": ["src/colqwen3_retrievers/kernels/triton_scan.py", "tests/contracts/test_fused_kernel.py"],
    "scipy": [
        "tests/unit/test_compression.py", "src/colqwen3_retrievers/compression.py", "tests/unit/test_evaluation.py",
        "src/colqwen3_retrievers/evaluation", "tests/integration/test_eval.py", "tests/integration/test_eval_index.py",
    ],
    "pypdfium2": [
        "tests/unit/test_pages.py", "tests/unit/test_pdf.py", "tests/unit/test_page_files.py",
        "tests/unit/test_llama_index_reader.py",
    ],
    "reportlab": [
        "tests/unit/test_llama_index_reader.py",
        "tests/bad_pages.py", "tests/unit/test_pages.py", "tests/unit/test_pdf.py", "tests/unit/test_page_files.py",
        "tests/unit/test_demo_documents.py", "src/colqwen3_retrievers/demo", "tests/unit/test_video.py",
        "tests/unit/test_images.py",
    ],
    "av": ["tests/unit/test_video.py"],
    "websockets": ["tests/integration/test_report_in_chromium.py"],
    "vllm": [  # an environment of its own: make test-vllm
        "tests/contracts/test_vllm_engine.py", "tests/integration/test_vllm_plugin.py",
        "src/colqwen3_retrievers/engines/vllm_model.py", "tests/contracts/test_server_engine.py",
        "tests/integration/test_server.py",
    ],
    "llama_index": [
        "tests/unit/test_llama_index_*.py", "src/colqwen3_retrievers/llama_index",
        "tests/integration/test_llama_index*.py", "tests/contracts/llama_index_contract.py",
        "tests/frameworks/llama_index_models.py", "tests/frameworks/page_folder.py",
    ],
    "qdrant_client": [
        "tests/contracts/test_qdrant_store.py", "tests/contracts/qdrant_*.py", "tests/unit/test_qdrant_*.py",
        "tests/unit/test_copying.py", "tests/integration/test_qdrant.py", "src/colqwen3_retrievers/stores/qdrant*.py",
    ],
    "qdrant_edge": [
        "tests/contracts/test_qdrant_store.py", "tests/contracts/qdrant_edge_engine.py",
        "tests/unit/test_qdrant_filters.py", "tests/integration/test_qdrant.py",
    ],
    "langchain_core": [
        "tests/unit/test_langchain_*.py", "src/colqwen3_retrievers/langchain", "tests/integration/test_langchain*.py",
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
