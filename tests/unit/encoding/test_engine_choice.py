"""Which engine an encoder takes, and that the key of a server stays in this process."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest

from colqwen3_retrievers import ColQwen3Encoder, ServerOptions, TorchOptions, VLLMOptions
from colqwen3_retrievers.encoding.engine_choice import choose_engine
from colqwen3_retrievers.errors import ConfigError

URL = "http://gpu-1:8000"
KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLQWEN3_ENGINE", "COLQWEN3_URL", "COLQWEN3_API_KEY"):
        monkeypatch.delenv(name, raising=False)


CHOICES: list[tuple[dict[str, str], dict[str, Any], type, tuple[str, ...]]] = [
    # environment, arguments -> options, urls
    ({}, {}, TorchOptions, ()),
    ({}, {"engine": "vllm"}, VLLMOptions, ()),
    ({}, {"url": URL}, ServerOptions, (URL,)),
    ({}, {"url": [URL, "https://gpu-2/colqwen/", URL]}, ServerOptions, (URL, "https://gpu-2/colqwen")),
    ({}, {"url": URL + "/v1/"}, ServerOptions, (URL,)),
    ({"COLQWEN3_URL": URL}, {}, ServerOptions, (URL,)),
    ({"COLQWEN3_URL": f"{URL}, http://gpu-2:8000"}, {}, ServerOptions, (URL, "http://gpu-2:8000")),
    ({"COLQWEN3_URL": URL}, {"engine": "torch"}, TorchOptions, ()),
    ({"COLQWEN3_URL": URL}, {"device": "cpu"}, TorchOptions, ()),
    ({"COLQWEN3_URL": URL, "COLQWEN3_ENGINE": "torch"}, {}, TorchOptions, ()),
    ({"COLQWEN3_URL": URL, "COLQWEN3_ENGINE": "auto"}, {}, ServerOptions, (URL,)),
    ({"COLQWEN3_ENGINE": "torch"}, {"url": URL}, ServerOptions, (URL,)),
    ({"COLQWEN3_ENGINE": "vllm"}, {}, VLLMOptions, ()),
    ({"COLQWEN3_ENGINE": "vllm"}, {"engine": TorchOptions(batch_tokens=7)}, TorchOptions, ()),
    ({"COLQWEN3_URL": "http://other:1"}, {"url": URL}, ServerOptions, (URL,)),
]


@pytest.mark.parametrize(("environment", "arguments", "options", "urls"), CHOICES, ids=str)
def test_an_argument_beats_the_environment_beats_the_default(
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    arguments: dict[str, Any],
    options: type,
    urls: tuple[str, ...],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    made = ColQwen3Encoder("tiny", **arguments).to_dict()
    assert made["engine"]["name"] == {TorchOptions: "torch", VLLMOptions: "vllm", ServerOptions: "server"}[options]
    assert tuple(made["url"]) == urls


BAD: list[tuple[dict[str, Any], str]] = [
    ({"engine": "server"}, "give url=, or set COLQWEN3_URL"),
    ({"engine": "torch", "url": URL}, "url: given beside engine 'torch'"),
    ({"engine": VLLMOptions(), "api_key": KEY}, "api_key: given beside engine 'vllm'"),
    ({"engine": "triton"}, "engine 'triton': expected auto, torch, vllm, server"),
    ({"url": "gpu-1:8000"}, "expected http://host:port"),
    ({"url": "ftp://gpu-1"}, "expected http://host:port"),
    ({"url": "http://gpu-1:99999"}, "expected http://host:port"),
    ({"url": "http://gpu-1:8000?key=1"}, "without query"),
    ({"url": 8000}, "url: expected a url or several, got int"),
    ({"url": URL, "device": "cuda"}, "device 'cuda': only the torch engine takes one; a server has its own"),
    ({"engine": "vllm", "device": "cuda"}, "CUDA_VISIBLE_DEVICES"),
    ({"url": URL, "dtype": "float16"}, "dtype 'float16': a server has its own"),
    ({"url": URL, "api_key": "two\nlines"}, "api_key: expected printable ASCII"),
    ({"url": URL, "engine": ServerOptions(), "api_key": 7}, "api_key: expected printable ASCII"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=str)
def test_what_does_not_fit_together_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ColQwen3Encoder("tiny", **arguments)
    assert KEY not in str(caught.value)


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="leave user and password out") as caught:
        ColQwen3Encoder("tiny", url="https://me:hunter2@gpu-1:8000")
    assert "hunter2" not in str(caught.value)


def test_the_key_is_nowhere_but_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ColQwen3Encoder("tiny", url=URL, api_key=KEY)
    shown = [
        repr(encoder),
        json.dumps(encoder.to_dict()),
        repr(pickle.dumps(encoder)),
        repr(vars(encoder)["_settings"]),
    ]
    assert not [text for text in shown if KEY in text]
    for copied in (copy.copy(encoder), copy.deepcopy(encoder)):
        assert vars(copied)["_settings"].api_key == KEY
    assert vars(pickle.loads(pickle.dumps(encoder)))["_settings"].api_key is None
    monkeypatch.setenv("COLQWEN3_API_KEY", "another")
    assert vars(pickle.loads(pickle.dumps(encoder)))["_settings"].api_key == "another"


@pytest.mark.parametrize(
    "engine", [TorchOptions(batch_tokens=9), VLLMOptions(max_model_len=99), ServerOptions(timeout=3)]
)
def test_settings_survive_a_dict(monkeypatch: pytest.MonkeyPatch, engine: Any) -> None:
    url = [URL, "http://gpu-2:1"] if isinstance(engine, ServerOptions) else None
    made = ColQwen3Encoder("tiny", engine=engine, url=url)
    monkeypatch.setenv("COLQWEN3_URL", "http://elsewhere")
    assert ColQwen3Encoder.from_dict(json.loads(json.dumps(made.to_dict()))).to_dict() == made.to_dict()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (VLLMOptions, {"gpu_memory_utilization": 0}, "gpu_memory_utilization: expected a number above 0"),
        (VLLMOptions, {"tensor_parallel_size": 0}, "tensor_parallel_size: expected a whole number from 1"),
        (VLLMOptions, {"max_model_len": True}, "max_model_len: expected a whole number from 1"),
        (ServerOptions, {"timeout": float("inf")}, "timeout: expected seconds above 0"),
        (ServerOptions, {"concurrency": 0}, "concurrency: expected a whole number from 1"),
        (ServerOptions, {"retries": -1}, "retries: expected a whole number from 0"),
        (ServerOptions, {"served_model": ""}, "served_model: expected a name"),
    ],
)
def test_bad_options(kind: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**options)


def test_choice_without_an_encoder() -> None:
    assert choose_engine("server", URL, KEY, None) == (ServerOptions(), (URL,), KEY)


@pytest.mark.parametrize(
    "url", ["https//me:hunter2@gpu-1", "http:///me:hunter2@gpu-1", "http://gpu-1?key=hunter2", "http://gpu-1#hunter2"]
)
def test_what_may_be_secret_in_a_refused_url_is_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="api_key= takes a key") as caught:
        ColQwen3Encoder("tiny", url=url)
    assert "hunter2" not in str(caught.value)


def test_an_empty_key_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLQWEN3_API_KEY", "another")
    assert choose_engine("server", URL, "", None)[2] is None


def test_an_empty_query_is_a_query() -> None:
    with pytest.raises(ConfigError, match="without query"):
        ColQwen3Encoder("tiny", url="http://gpu-1:8000/?")
