"""Importing costs nothing, and public names stay; import-linter holds the order of imports (`make check`)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import colqwen3_retrievers

PACKAGE = Path(colqwen3_retrievers.__file__).parent

HEAVY = {
    "torch",
    "transformers",
    "scipy",
    "pypdfium2",
    "av",
    "llama_index",
    "langchain_core",
    "tokenizers",
    "reportlab",
    "qdrant_client",
}


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def imported_modules(path: Path, *, at_import: bool = False) -> list[str]:
    """Every module a file imports, those inside functions too; or only what importing the file runs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[str] = []

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if at_import and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path.name}: relative import"
                found.append(child.module or "")
                found.extend(f"{child.module}.{alias.name}" for alias in child.names)
            walk(child)

    walk(tree)
    return found


# Files here may import torch or a framework as they load.
HEAVY_FOLDERS = (
    "engines/torch", "engines/vllm", "vectors/kernels", "llama_index", "langchain", "demo", "evaluation",
)  # fmt: skip


def light_sources() -> list[Path]:
    """What may be imported where no extra is installed."""
    return [path for path in sources() if not str(path.relative_to(PACKAGE)).startswith(HEAVY_FOLDERS)]


@pytest.mark.parametrize("path", light_sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_importing_a_light_file_imports_nothing_heavy(path: Path) -> None:
    heavy = {module.split(".")[0] for module in imported_modules(path, at_import=True)} & HEAVY
    assert not heavy, f"importing {path.name} imports {heavy}"


def test_no_module_bears_a_public_name() -> None:
    rooms = {path.stem for path in sources()} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not rooms & set(colqwen3_retrievers.__all__)


def test_public_names() -> None:
    assert colqwen3_retrievers.__all__ == [
        "ColQwen3Encoder", "ColQwen3Error", "EncoderInfo", "Hit", "MultiVector", "PackedEmbeddings", "Page",
        "PageIndex", "QdrantOptions", "Query", "ServerOptions", "SimilarityMap", "TorchOptions", "VLLMOptions", "Video",
        "copy_index", "load_pages", "maxsim", "open_store", "similarity_map",
    ]  # fmt: skip
    for name in colqwen3_retrievers.__all__:
        assert getattr(colqwen3_retrievers, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = colqwen3_retrievers.nothing


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_costs_nothing() -> None:
    code = (
        "import sys; import colqwen3_retrievers as c; dir(c); "
        "print(sorted({m.split('.')[0] for m in sys.modules} & "
        f"{(HEAVY | {'numpy', 'PIL', 'huggingface_hub', 'sqlite3'})!r}))"
    )
    assert run_python(code) == "[]"


def test_making_an_encoder_loads_nothing_heavy() -> None:
    code = (
        "import sys; from colqwen3_retrievers import ColQwen3Encoder, PageIndex, load_pages; ColQwen3Encoder('tiny'); "
        f"print(sorted({{m.split('.')[0] for m in sys.modules}} & {HEAVY!r}))"
    )
    assert run_python(code) == "[]"
