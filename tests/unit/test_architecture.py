"""The house itself: imports go down only, importing costs nothing, public names stay."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import colqwen3_retrievers

PACKAGE = Path(colqwen3_retrievers.__file__).parent

# Higher may import lower. Within a floor of the design the order is spelled out by decimals; equals may not meet.
FLOORS = {
    "lazy": 0.0, "errors": 0.0, "paths": 0.1, "images": 0.1, "datatypes": 0.2, "documents": 0.3,
    "late_interaction": 1.0, "compression": 1.0, "single_vector": 1.1, "families": 1.0, "options": 1.0, "futures": 1.0,
    "safetensors_table": 1.0, "hub_files": 1.0, "engine_choice": 1.1,
    "codes": 1.1, "page_files": 1.1, "remote_images": 1.0, "pdf": 1.2, "video": 1.2, "pages": 1.3,
    "checkpoint": 2.0, "tokens": 2.0, "rendering": 2.1, "similarity_maps": 2.1,
    "torch_settings": 3.0, "packed_linear": 3.0,
    "kernels": 3.01, "attention": 3.01, "vision_tower": 3.1, "text_trunk": 3.1, "model": 3.2,
    "engines": 4.0, "engines.torch": 4.1,
    "engines.vllm_key": 4.01, "engines.vllm_folder": 4.01, "engines.vllm_names": 4.01,
    "engines.vllm_plugin": 4.02, "engines.vllm_model": 4.03, "engines.vllm": 4.1, "serving_templates": 2.0,
    "serving": 4.5,
    "engines.server_wire": 4.01, "engines.server_fleet": 4.01, "engines.server_transport": 4.01,
    "engines.server_reference": 4.01, "engines.server_probe": 4.02, "engines.server_client": 4.03,
    "engines.server_scoring": 4.04, "engines.server": 4.1, "worker": 4.2, "sharing": 4.3,
    "settings": 5.0, "submission": 5.05, "encoder_inputs": 5.06, "encoder": 5.1, "server_scores": 5.15,
    "stores": 5.2,
    "page_images": 5.9, "disk_cache": 5.8, "page_keys": 5.85, "page_cache": 5.9, "file_ledger": 5.8,
    "synced_files": 5.93, "adding": 5.95, "opened_index": 5.96,
    "searching": 5.97, "row_candidates": 5.98, "syncing": 5.97, "writing": 5.98,
    "index": 6.0,
    "evidence": 6.1, "copying": 6.5,
    "llama_index": 7.0, "langchain": 7.0, "demo": 7.0, "evaluation": 7.0, "console": 6.9,
    "search_command": 7.0, "index_command": 7.0,
    "cli": 8.0, "__main__": 9.0,
}  # fmt: skip
TORCH_FREE_BELOW = 3.0
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


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] == "engines" and len(parts) == 2 and parts[1] != "__init__":
        return ".".join(parts)
    return parts[0]


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


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    room = room_of(path)
    assert room in FLOORS, f"{room} stands on no floor"
    for module in imported_modules(path):
        if not module.startswith("colqwen3_retrievers."):
            continue
        parts = module.split(".")[1:]
        target = ".".join(parts[:2]) if ".".join(parts[:2]) in FLOORS else parts[0]
        if target.split(".")[0] == room.split(".")[0] and target in (room, room.split(".")[0]):
            continue
        if target in FLOORS:
            assert FLOORS[target] < FLOORS[room], f"{room} (floor {FLOORS[room]}) imports {target} ({FLOORS[target]})"


LIGHT = (
    "settings", "submission", "encoder", "index", "stores", "worker", "sharing", "page_cache", "cli", "disk_cache",
    "search_command", "index_command", "page_keys", "file_ledger", "synced_files", "syncing", "adding", "searching",
    "writing",
)  # fmt: skip


def light_sources() -> list[Path]:
    """What may be imported where torch and the frameworks are not."""
    return [path for path in sources() if FLOORS.get(room_of(path), 9) < TORCH_FREE_BELOW or room_of(path) in LIGHT]


@pytest.mark.parametrize("path", light_sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_low_floors_import_nothing_heavy(path: Path) -> None:
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


def test_files_stay_small_enough_to_know() -> None:
    large = {str(path.relative_to(PACKAGE)): lines for path in sources() if (lines := _lines(path)) > 370}
    assert not large


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())
