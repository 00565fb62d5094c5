"""The vLLM plugin: what vLLM does without it, what it mends, and that it leaves a mended vLLM alone.

Runs in the environment that ``make test-vllm`` builds, against real vLLM in processes of its own.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from colqwen3_retrievers.engines.vllm.folder import architecture, write_folder
from colqwen3_retrievers.engines.vllm.plugin import ARCHITECTURES, NAME
from colqwen3_retrievers.models.checkpoint import open_checkpoint
from colqwen3_retrievers.models.families import FAMILIES
from colqwen3_retrievers.models.rendering import IMAGE_PLACEHOLDER
from tests.checkpoints import TinyCheckpoint, make_checkpoint
from tests.contracts.engine_contract import MIN_COSINE, SENTENCE, pictures
from tests.reference import QUERY, image_prompt, reference_embeddings
from tests.server_process import CPU_ENVIRONMENT, ServerProcess

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
MODELS = ("tomoro", "nemotron", "colpali")  # one for each fault: bias dropped, causal after the norm, no start at all


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyCheckpoint]:
    made = tmp_path_factory.mktemp("models")
    return {family: make_checkpoint(made / family, family, head_dim=32) for family in MODELS}


def test_every_familys_architecture_is_registered() -> None:
    [found] = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == NAME]
    assert found.value == "colqwen3_retrievers.engines.vllm.plugin:register"
    for family in FAMILIES.values():
        assert set(family.architectures) <= set(ARCHITECTURES)
        assert {ARCHITECTURES[name] for name in family.architectures} == {ARCHITECTURES[architecture(family)]}


def test_registering_imports_no_model() -> None:
    code = (
        "import sys, json; from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from vllm import ModelRegistry; archs = ModelRegistry.get_supported_archs();"
        "models = [name for name in sys.modules if 'models.colqwen3' in name or 'vllm_model' in name];"
        f"print(json.dumps([models, sorted(set({sorted(ARCHITECTURES)!r}) - set(archs))]))"
    )
    done = run_python("-c", code, VLLM_PLUGINS=NAME)
    assert json.loads(done.stdout.splitlines()[-1]) == [[], []]


def test_without_the_plugin_vllm_is_wrong(models: dict[str, TinyCheckpoint], tmp_path: Path) -> None:
    """When this fails, vLLM has mended a fault: say so in vllm_plugin.py, docs/serving.md and the changelog."""
    found, _ = run_plain(models, tmp_path, VLLM_PLUGINS="none")
    dropped = least_cosine(models["tomoro"], found["tomoro"]["rows"])
    assert dropped < MIN_COSINE, "vLLM keeps the projection bias now"
    without_bias = TinyCheckpoint(**{**vars(models["tomoro"]), "bias": 0.0})
    assert least_cosine(without_bias, found["tomoro"]["rows"]) >= MIN_COSINE, "it is the bias that was missing"
    assert "custom_text_proj.bias" in found["colpali"]["error"], "vLLM reads the dim from the weights now"
    assert least_cosine(models["nemotron"], found["nemotron"]["rows"]) < MIN_COSINE, "vLLM runs nemotron right now"


def test_with_the_plugin_anybodys_vllm_is_exact(models: dict[str, TinyCheckpoint], tmp_path: Path) -> None:
    """Not our engine, not our architecture names: the plugin is installed beside vLLM, and that is all."""
    found, log = run_plain(models, tmp_path)
    for family in MODELS:
        assert "error" not in found[family], found[family]
        assert least_cosine(models[family], found[family]["rows"]) >= MIN_COSINE
    assert found["tomoro"]["class"] == "ColQwen3Causal"
    assert log.count("the plugin is active: it keeps the projection (dim 48) and its bias") == 2
    assert log.count("the plugin is active: the text trunk runs bidirectional") == 1
    assert log.count("tested with 0.32") == 3


def test_a_vllm_that_keeps_the_bias_is_left_alone(models: dict[str, TinyCheckpoint], tmp_path: Path) -> None:
    fixed = {"tomoro": models["tomoro"], "colpali": models["colpali"]}
    found, log = run_plain(fixed, tmp_path, FIXED_UPSTREAM="1")
    for family, model in fixed.items():
        assert "error" not in found[family], found[family]
        assert found[family]["upstream_head"], "vLLM's own projection was replaced"
        assert least_cosine(model, found[family]["rows"]) >= MIN_COSINE
    assert "the plugin is active" not in log
    assert log.count("the plugin changes nothing") == 2


def test_reaches_the_workers_of_a_real_server(models: dict[str, TinyCheckpoint], tmp_path: Path) -> None:
    """API server, engine and worker, each a process of its own; asked as anybody would, with an image and no prompt."""
    model, image = models["nemotron"], pictures()[0]
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    with ServerProcess(model.folder, tmp_path, worker_processes=True, api_key="s3cret") as server:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(server, SENTENCE, key="wrong")
        page = ask(server, [{"type": "image_url", "image_url": {"url": url}}])
        query = ask(server, SENTENCE)
        log = server.log_text()
    expected = reference_embeddings(
        model, [image_prompt("nemotron"), QUERY["nemotron"] % SENTENCE], [image]
    )  # fmt: skip
    for want, got in zip(expected, (page, query), strict=True):
        assert got.shape == want.shape
        assert (got * want).sum(axis=1).min() >= MIN_COSINE
    assert "s3cret" not in log
    [said] = [line for line in log.splitlines() if "the plugin is active" in line]
    assert said.startswith("(Worker"), said


def test_our_server_does_not_start_without_the_plugin(models: dict[str, TinyCheckpoint], tmp_path: Path) -> None:
    server = ServerProcess(models["tomoro"].folder, tmp_path, environment={"VLLM_PLUGINS": "none"})
    with pytest.raises(AssertionError, match="the server ended with code"):
        server.start()
    assert "ColQwen3RetrieversModel" in server.log_text()
    assert "not supported" in server.log_text()


def ask(server: ServerProcess, content: Any, *, key: str = "s3cret") -> np.ndarray:
    body = {"task": "token_embed", "messages": [{"role": "user", "content": content}]}
    request = urllib.request.Request(
        f"{server.url}/pooling",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return np.asarray(json.load(answer)["data"][0]["data"], dtype=np.float32)


def run_plain(
    models: dict[str, TinyCheckpoint], work: Path, **environment: str
) -> tuple[dict[str, dict[str, Any]], str]:
    """Run vLLM over the models as their own configs name them; give what came out, and what was logged."""
    prompts, folders = {}, {}
    for family, model in models.items():
        folder = work / family
        write_folder(open_checkpoint(model.folder), folder)
        config = json.loads((model.folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config))
        folders[str(folder)] = family
        prompts[str(folder)] = {
            "query": QUERY[family] % SENTENCE, "page": image_prompt(family), "image": picture().tolist(),
        }  # fmt: skip
        assert IMAGE_PLACEHOLDER in prompts[str(folder)]["page"]
    (work / "prompts.json").write_text(json.dumps(prompts))
    done = run_python(
        "tests/vllm/plain.py", str(work / "result.json"), str(work / "prompts.json"), *folders, **environment
    )
    found = json.loads((work / "result.json").read_text())
    return {folders[folder]: result for folder, result in found.items()}, done.stdout + done.stderr


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, text=True, capture_output=True, timeout=600, check=False,
        env={**os.environ, **CPU_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def picture() -> np.ndarray:
    return np.asarray(pictures()[0])


def least_cosine(model: TinyCheckpoint, rows: list[list[list[float]]]) -> float:
    """The least similarity of any token to plain transformers."""
    prompts = [QUERY[model.family] % SENTENCE, image_prompt(model.family)]
    expected = reference_embeddings(model, prompts, [Image.fromarray(picture())])
    assert [len(part) for part in rows] == [len(part) for part in expected]
    return min(
        float((np.asarray(got) * want).sum(axis=1).min()) for got, want in zip(rows, expected, strict=True)
    )  # fmt: skip
