"""Every notebook runs from top to bottom, in a process of its own, and says what it should.

The last one needs a vLLM: ``make test`` runs it once more with ``VLLM_PYTHON``, and then it must show one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

# What stands in the outputs of a notebook: the right pages found, and their bytes handed to the chat model.
SAYS = {
    "1_visual_rag_in_llama_index": [
        r"Added\(added=17, updated=0, unchanged=0, skipped=0\)\nAdded\(added=0, updated=0, unchanged=17, skipped=0\)",
        r"report\.pdf, page 6, best region from",
        r"no language model\) I was handed 2 page images:\n  file_name: report\.pdf page: 6",
        r"report\.pdf#page=6 was handed over: True",
        r"invoice\.pdf, page 2\n(.*\n){2}encoded:  2 ",
        r"I was handed 1 page image:\n  \[1\] file_name: scan\.pdf, page: 2: PNG",
        r"filtered: invoice\.pdf#page=1",
        r"by source, with neighbours: slides\.pdf#page=4 [\d.]+\n"
        r".*slides\.pdf#page=3 [\d.]+\n.*slides\.pdf#page=5 [\d.]+",
    ],
    "2_visual_rag_in_langchain": [
        r"report\.pdf, page 4 \(2\)",
        r"I was handed 2 page images:\n  \[1\] report\.pdf, page 5",
        r"report\.pdf#page=5 was handed over: True",
        r"ToolMessage +text, image\nAIMessage +text\n.*I was handed 1 page image:\n  \[1\] slides\.pdf, page 3: PNG",
        r"invoice\.pdf, page 1\nslides\.pdf, page 5\nreport\.pdf, page 6 \(4\)\nslides\.pdf, page 4",
    ],
    "3_late_interaction_explained": [
        r"1273 tokens of dim 128: 42 x 30 visual ones, 13 of the prompt",
        r"by hand:  13\.8\d+   maxsim:  13\.8\d+",
        r"first: report\.pdf#page=6",
    ],
    "4_serving_with_vllm": [
        r"--runner pooling",
        r"report\.pdf#page=4 \d",
        r"I was handed 1 page image:\n  file_name: report",
    ],
}
OF_VLLM = [
    r"a vLLM server answers",
    r"token embeddings from vLLM; least cosine with the torch engine: (1\.0|0\.9999)",
    r"the same fingerprint: True",
    r"32 questions; least cosine with the torch engine: (1\.0|0\.9999)",
]


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    return "\n".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client")
@pytest.mark.enable_socket
@pytest.mark.timeout(600)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "COLQWEN3_URL"):  # no chat model and no server of somebody else
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(FOLDER)}}).execute()
    said = printed(notebook)
    for expected in SAYS[path.stem] + (OF_VLLM if path.stem[0] == "4" and "VLLM_PYTHON" in os.environ else []):
        assert re.search(expected, said), f"{expected!r} is not in:\n{said}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_whole_and_small(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    said = printed(notebook)
    for expected in SAYS[path.stem] + (OF_VLLM if path.stem[0] == "4" else []):
        assert re.search(expected, said), expected
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert pictures
    streams = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream"
    ]
    assert {output.name for output in streams} == {"stdout"}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count == number for number, cell in enumerate(code, start=1))
    assert path.stat().st_size < 400_000


def test_all_four_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(SAYS)
