"""Importing the package: free, and with the pip line where LangChain is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import colqwen3_retrievers.langchain as ours

NAMES = [
    "ColQwen3Embeddings", "ColQwen3Reranker", "ColQwen3Retriever", "ColQwen3Translator", "ColQwen3VectorStore",
    "PageLoader", "create_page_retriever_tool", "docs_to_content_blocks", "move_tool_images",
    "move_tool_images_middleware", "page_key_encoder",
]  # fmt: skip


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_no_framework() -> None:
    code = (
        "import sys; import colqwen3_retrievers.langchain as ours; print(dir(ours)); "
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'langchain_core', 'torch', 'transformers'}))"
    )
    names, heavy = run_python(code).splitlines()
    assert names == str(sorted(NAMES))
    assert heavy == "[]"


def test_importing_the_classes_does_not_import_torch() -> None:
    # LangChain's base of loaders imports its text splitters, whose first releases import transformers: without them.
    code = (
        "import sys; sys.modules['langchain_text_splitters'] = None; "
        "from colqwen3_retrievers.langchain import *; ColQwen3Reranker(); ColQwen3Embeddings(); "
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'transformers'}))"
    )
    assert run_python(code) == "[]"


def test_without_langchain_the_message_is_the_pip_line() -> None:
    code = (
        "import sys; sys.modules['langchain_core'] = None\n"
        "try:\n    from colqwen3_retrievers.langchain import ColQwen3Retriever\n"
        "except ImportError as exc:\n    print(type(exc).__name__, exc)"
    )
    assert run_python(code) == (
        'MissingExtraError langchain-core is not installed: pip install "colqwen3-retrievers[langchain]"'
    )
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = ours.Nothing
