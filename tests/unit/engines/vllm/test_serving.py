"""The command line of a server: what it says for each family, its chat templates, and the page that shows it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image

from colqwen3_retrievers.cli.main import main
from colqwen3_retrievers.engines.options import VLLMOptions
from colqwen3_retrievers.engines.vllm.folder import write_folder
from colqwen3_retrievers.engines.vllm.key import RequireKey
from colqwen3_retrievers.engines.vllm.serving import (
    CHAT_TEMPLATES,
    serve_command,
    server_environment,
    show_command,
)
from colqwen3_retrievers.errors import CheckpointError, ConfigError, EngineError
from colqwen3_retrievers.models.checkpoint import TINY, open_checkpoint
from colqwen3_retrievers.models.families import FAMILIES, Family
from colqwen3_retrievers.models.rendering import Renderer
from colqwen3_retrievers.models.tokenizer import PromptTokenizer
from colqwen3_retrievers.pages.page import Page, Query, Video
from conftest import NEEDS
from scripts.chat_templates import chat_template
from scripts.serving_commands import PAGE, START, STOP, command_lines
from tests.checkpoints import TinyCheckpoint, make_checkpoint

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda row: row.name)
IMAGE = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return make_checkpoint(tmp_path_factory.mktemp("made") / "nemotron", "nemotron")


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


# -- the command line --------------------------------------------------------------------------------------------------


@EVERY_FAMILY
def test_command_of_each_family(family: Family) -> None:
    command = serve_command(family.models[0])
    assert command[:3] == ["vllm", "serve", family.models[0]]
    assert option(command, "--runner") == "pooling"
    assert option(command, "--chat-template") == str(CHAT_TEMPLATES / f"{family.name}.jinja")
    assert json.loads(option(command, "--mm-processor-kwargs")) == {
        "size": {"shortest_edge": family.min_pixels, "longest_edge": family.max_pixels}
    }
    overrides = json.loads(option(command, "--hf-overrides"))
    assert (overrides.get("text_config") == {"is_causal": False}) == (family.name == "nemotron")
    assert ("Bidirectional" in overrides["architectures"][0]) == (family.name == "nemotron")
    assert json.loads(option(command, "--limit-mm-per-prompt")) == {"image": 1, "video": int(family.name == "tomoro")}
    assert {"--no-enable-prefix-caching", "--no-enable-chunked-prefill"} <= set(command)
    assert int(option(command, "--max-model-len")) >= family.max_pixels // 1024 + 8_000
    assert option(command, "--host") == "127.0.0.1"
    assert option(command, "--dtype") == "bfloat16"


def test_command_of_a_folder_is_read_off_the_checkpoint() -> None:
    command = serve_command("tiny", max_visual_tokens=100, served_name="mine", port=9000)
    assert command[2] == str(TINY)
    assert option(command, "--served-model-name") == "mine"
    assert option(command, "--port") == "9000"
    size = {"shortest_edge": 65_536, "longest_edge": 102_400}
    assert json.loads(option(command, "--mm-processor-kwargs")) == {"size": size}
    assert int(option(command, "--max-model-len")) == open_checkpoint("tiny").context_length


def test_options_reach_vllm() -> None:
    options = VLLMOptions(gpu_memory_utilization=0.5, tensor_parallel_size=2, max_model_len=2000, enforce_eager=True)
    command = serve_command("tiny", options=options, dtype="float16", extra=["--max-num-seqs", "8"])
    assert option(command, "--gpu-memory-utilization") == "0.5"
    assert option(command, "--tensor-parallel-size") == "2"
    assert option(command, "--max-model-len") == "2000"
    assert option(command, "--dtype") == "float16"
    assert "--enforce-eager" in command
    assert command[-2:] == ["--max-num-seqs", "8"]
    assert "--trust-request-mm-kwargs" in serve_command("tiny", videos=True)
    assert "--trust-request-mm-kwargs" not in command
    by_module = serve_command("tiny", launcher="python")
    assert by_module[:5] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(TINY)]
    assert by_module[5:] == serve_command("tiny")[3:]


def test_revision_of_a_hub_model_only(tmp_path: Path) -> None:
    name = "OpenSearch-AI/Ops-Colqwen3-4B"
    assert option(serve_command(name, revision="abc"), "--revision") == "abc"
    assert "--revision" not in serve_command("tiny", folder=tmp_path / "x", revision="abc")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "someone/finetune"}, "someone/finetune: not a model the family table names; give family= one of"),
        ({"model": "someone/finetune", "family": "colqwen2"}, "family 'colqwen2': expected one of"),
        ({"dtype": "int4"}, "dtype 'int4': expected"),
        ({"launcher": "docker"}, "launcher 'docker': expected vllm or python"),
        ({"port": 0}, "port: expected a whole number from 1 to 65,535, got 0"),
        ({"port": True}, "port: expected"),
        ({"max_visual_tokens": 0}, "max_visual_tokens: expected a whole number from 1, got 0"),
        ({"max_visual_tokens": 5000}, "max_visual_tokens 5000: .* reads at most 1280 a page"),
        ({"options": VLLMOptions(max_model_len=1000)}, "max_model_len 1000: a page takes up to 1312 tokens"),
        ({"options": VLLMOptions(max_model_len=10**6)}, "max_model_len 1000000: the model reads at most 8192"),
        ({"model": "OpenSearch-AI/Ops-Colqwen3-4B", "videos": True}, "videos: family ops has no prompt for them"),
        ({"extra": ["--api-key", "secret"]}, "--api-key: every user of the machine sees a command line"),
        ({"extra": ["--api-key=secret"]}, "set VLLM_API_KEY instead"),
        ({"extra": ["--api_key", "secret"]}, "set VLLM_API_KEY instead"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        serve_command(**{"model": "tiny", **arguments})


def test_a_hub_model_of_a_named_family_is_not_downloaded() -> None:
    command = serve_command("someone/finetune", family="ops")
    assert option(command, "--chat-template").endswith("ops.jinja")


def test_no_such_folder() -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        serve_command("/nowhere/at/all")


def test_shown_command_is_a_shells() -> None:
    command = serve_command("tiny", served_name="it's mine")
    assert shlex.split(show_command(command).replace("\\\n", "")) == command


# -- a folder vLLM can start from --------------------------------------------------------------------------------------


def test_folder_has_what_the_checkpoint_lacks(model: TinyCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vLLM needs tokenizer_config.json, which .* name a folder"):
        serve_command(model.folder)
    model.edit_config(auto_map={"AutoModel": "x.Y"})
    for _ in range(2):  # the second time over what the first wrote
        command = serve_command(model.folder, folder=tmp_path / "served")
    folder = Path(command[2])
    assert folder == tmp_path / "served"
    assert option(command, "--served-model-name") == str(model.folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["ColQwen3RetrieversBidirectionalModel"]
    assert config["text_config"]["is_causal"] is False
    assert "auto_map" not in config
    size = json.loads((folder / "preprocessor_config.json").read_text())["size"]
    assert size == {"shortest_edge": 65_536, "longest_edge": 1_310_720}
    for name in ("model.safetensors", "tokenizer.json"):
        assert (folder / name).samefile(model.folder / name)
    assert json.loads((model.folder / "config.json").read_text())["architectures"] == ["Qwen3VLNemotronEmbedModel"]


def test_folder_of_a_checkpoint_in_shards(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path / "ops", "ops")
    made.write(shards=3)
    serve_command(made.folder, folder=tmp_path / "served")
    again = open_checkpoint(tmp_path / "served", family="ops")
    assert again.fingerprint == open_checkpoint(made.folder).fingerprint


def test_folder_that_cannot_be(model: TinyCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="the checkpoint's own folder"):
        serve_command(model.folder, folder=model.folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match="file: cannot be written"):
        write_folder(open_checkpoint(model.folder), tmp_path / "file")


def test_folder_of_somebody_else_is_left_alone(model: TinyCheckpoint, tmp_path: Path) -> None:
    theirs = make_checkpoint(tmp_path / "theirs", "nemotron", seed=3)
    before = (theirs.folder / "model.safetensors").read_bytes()
    with pytest.raises(EngineError, match="theirs: holds other files; choose an empty folder"):
        serve_command(model.folder, folder=theirs.folder)
    assert (theirs.folder / "model.safetensors").read_bytes() == before


def test_folder_written_for_one_checkpoint_keeps_nothing_of_it_for_the_next(
    model: TinyCheckpoint, tmp_path: Path
) -> None:
    """vLLM reads every tensor file of a folder, or those that an index names."""
    other = make_checkpoint(tmp_path / "other", "nemotron", seed=3)
    other.write(shards=3)
    for folder in (other.folder, model.folder):
        serve_command(folder, folder=tmp_path / "served")
    assert [path.name for path in (tmp_path / "served").glob("*.safetensors*")] == ["model.safetensors"]


def test_folder_is_of_the_revision_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def opened(name: str, *, family: str | None, revision: str | None) -> object:
        asked.append(revision)
        return open_checkpoint("tiny")

    monkeypatch.setattr("colqwen3_retrievers.engines.vllm.serving.open_checkpoint", opened)
    serve_command("OpenSearch-AI/Ops-Colqwen3-4B", revision="abc", folder=tmp_path / "served")
    assert asked == ["abc"]


def test_options_that_no_shell_understands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "tiny", "--vllm-options=--x 'y"]) == 1
    assert "--vllm-options: No closing quotation" in capsys.readouterr().err


# -- chat templates ----------------------------------------------------------------------------------------------------


def rendered(family: Family, content: object, role: str = "user") -> str:
    """What vLLM would make of one message: Jinja in a sandbox, parts of type text, image and video."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((CHAT_TEMPLATES / f"{family.name}.jinja").read_text())

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    return template.render(messages=[{"role": role, "content": content}], raise_exception=refuse)


@EVERY_FAMILY
def test_template_files_are_the_families(family: Family) -> None:
    """After a change of a family's row: write the files anew with chat_template()."""
    assert (CHAT_TEMPLATES / f"{family.name}.jinja").read_text(encoding="ascii") == chat_template(family)
    assert sorted(path.stem for path in CHAT_TEMPLATES.iterdir()) == sorted(FAMILIES)


@EVERY_FAMILY
@pytest.mark.parametrize("text", ["what was the revenue?", '  "quoted" {{ 7 }} {% raw %}\n'])
def test_templates_write_what_the_renderer_does(family: Family, text: str) -> None:
    renderer = Renderer(
        family, PromptTokenizer(TINY, model="tiny"), min_pixels=1024, max_pixels=65_536, context_length=8192,
        include_text=True,
    )  # fmt: skip
    part, image = {"type": "text", "text": text}, {"type": "image"}
    query = renderer.query(Query(text)).prompt
    assert rendered(family, text) == rendered(family, [part]) == query
    assert rendered(family, text, "document") == renderer.document(Page(id="p", text=text)).prompt
    alone = renderer.document(Page(id="p", image=IMAGE)).prompt
    beside = renderer.document(Page(id="p", image=IMAGE, text=text)).prompt
    assert rendered(family, [image]) == alone
    assert rendered(family, [image, part]) == rendered(family, [part, image]) == beside
    whole = {"type": "text", "text": beside}
    assert rendered(family, [image, whole]) == rendered(family, [whole, image]) == beside, "a whole prompt stands"


@EVERY_FAMILY
def test_videos_only_where_there_is_a_prompt(family: Family) -> None:
    if family.video is None:
        with pytest.raises(jinja2.TemplateError, match=f"family {family.name} has no prompt for videos"):
            rendered(family, [{"type": "video"}])
        return
    renderer = Renderer(
        family, PromptTokenizer(TINY, model="tiny"), min_pixels=1024, max_pixels=65_536, context_length=8192
    )
    prompt = renderer.document(Page(id="p", video=Video((IMAGE, IMAGE)))).prompt
    assert rendered(family, [{"type": "video"}]) == prompt.replace("<0.5 seconds>", "")  # vLLM writes the marks


# -- printing, running, keys -------------------------------------------------------------------------------------------


def test_serve_prints(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--port", "81", "--gpus", "2", "--gpu-memory", "0.5", "--vllm-options=--max-num-seqs 8"]
    assert main(["serve", "tiny", *arguments]) == 0
    printed = shlex.split(capsys.readouterr().out.replace("\\\n", ""))
    options = VLLMOptions(tensor_parallel_size=2, gpu_memory_utilization=0.5)
    assert printed == serve_command("tiny", port=81, options=options, extra=["--max-num-seqs", "8"])


def run(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "colqwen3_retrievers", "serve", "tiny", "--run"], text=True, capture_output=True,
        timeout=60, check=False, cwd=Path(__file__).parents[4], env={**os.environ, "PATH": str(path), **environment},
    )  # fmt: skip


def test_serve_becomes_the_server(tmp_path: Path) -> None:
    """A program in vLLM's place tells what it was started with."""
    program = tmp_path / "vllm"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys, json; print(json.dumps([sys.argv[1:], os.environ['VLLM_API_KEY']]))"
    )
    program.chmod(0o755)
    done = run(tmp_path, COLQWEN3_API_KEY="k1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [serve_command("tiny")[1:], "k1"]
    assert json.loads(run(tmp_path, COLQWEN3_API_KEY="k1", VLLM_API_KEY="k2").stdout)[1] == "k2"


def test_serve_where_vllm_is_not(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1
    assert "colqwen3: vllm: cannot be started" in done.stderr


def test_environment_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv("COLQWEN3_API_KEY", raising=False)
    assert "VLLM_API_KEY" not in server_environment()


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[RequireKey]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    yield RequireKey(app)


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/pooling", [], 401),
        ("/score", [(b"authorization", b"Bearer wrong")], 401),
        ("/rerank", [(b"authorization", b"Basic s3cret")], 401),
        ("/v1/models", [(b"authorization", b"s3cret")], 401),
        ("/health/../pooling", [], 401),
        ("/pooling", [(b"authorization", b"Bearer s3cret")], 200),
        ("/pooling", [(b"authorization", b"bearer s3cret")], 200),
        ("/health", [], 200),
        ("/metrics", [], 200),
    ],
)
def test_key_is_asked_for_where_it_encodes(guarded: RequireKey, path: str, headers: list[Any], status: int) -> None:
    assert asked(guarded, {"type": "http", "method": "POST", "path": path, "headers": headers}) == status


def test_no_key_no_question(monkeypatch: pytest.MonkeyPatch, guarded: RequireKey) -> None:
    monkeypatch.delenv("VLLM_API_KEY")
    unguarded = RequireKey(guarded._app)
    assert asked(unguarded, {"type": "http", "method": "POST", "path": "/pooling", "headers": []}) == 200


def asked(app: RequireKey, scope: dict[str, Any]) -> int:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    asyncio.run(app(scope, receive, send))
    return sent[0]["status"]


def test_page_shows_the_commands() -> None:
    """After a change: python scripts/serving_commands.py."""
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(START)[1].split(STOP)[0] == command_lines()


def test_make_runs_every_test_that_needs_vllm_or_triton() -> None:
    root = PAGE.parents[1]
    made = (root / "Makefile").read_text().partition("VLLM_TESTS :=")[2].partition("\n\n")[0]
    listed = made.replace("\\\n", " ").split("\n")[0].split()
    needed = {*NEEDS["vllm"], *NEEDS["triton"]}
    assert set(listed) == {path for path in needed if path.startswith("tests/")}
    assert all((root / path).is_file() for path in listed)


def test_the_commands_of_the_readme_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    text = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\$ colqwen3 (serve .+?) --run", text, flags=re.MULTILINE)
    assert len(commands) == len(FAMILIES)
    for command in commands:
        assert main(command.split()) == 0, command
        assert "--runner pooling" in capsys.readouterr().out
