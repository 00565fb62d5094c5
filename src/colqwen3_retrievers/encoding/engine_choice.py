"""Which engine: told from the arguments and the environment, and back from a dict."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from colqwen3_retrievers.engines.options import EngineOptions, ServerOptions, TorchOptions, VLLMOptions
from colqwen3_retrievers.errors import ConfigError

_OPTIONS: Final[dict[str, type[EngineOptions]]] = {"torch": TorchOptions, "vllm": VLLMOptions, "server": ServerOptions}
_NAMES: Final[dict[type[EngineOptions], str]] = {options: name for name, options in _OPTIONS.items()}
_EXPECTED = "expected auto, torch, vllm, server, or a TorchOptions, VLLMOptions or ServerOptions"


def choose_engine(
    engine: object, url: object, api_key: object, device: str | None
) -> tuple[EngineOptions, tuple[str, ...], str | None]:
    """Settle the engine, its servers and their key. An argument beats the environment, the environment the default.

    Args:
        engine: a name or options; ``"auto"`` is the server when a url is known, else torch.
        url: of a server, or several, for one fleet; None reads ``COLQWEN3_URL`` (several with commas between them).
        api_key: for the servers; None reads ``COLQWEN3_API_KEY``.
        device: asked for in this process; where ``engine`` is left open it means torch, which alone takes one.

    Returns:
        Options, urls and key; no urls and no key unless it is the server.

    Raises:
        ConfigError: no such engine, a server without url, a url beside another engine, or one that cannot be used.

    >>> choose_engine("auto", "http://gpu-1:8000/", None, None)[1]
    ('http://gpu-1:8000',)
    """
    asked = engine
    if engine == "auto":
        told = os.environ.get("COLQWEN3_ENGINE") or "auto"
        known = "server" if os.environ.get("COLQWEN3_URL") else "torch"
        asked = "server" if url is not None else "torch" if device is not None else known if told == "auto" else told
    if isinstance(asked, str):
        if asked not in _OPTIONS:
            raise ConfigError(f"engine {asked!r}: {_EXPECTED}")
        asked = _OPTIONS[asked]()
    if not isinstance(asked, EngineOptions):
        raise ConfigError(f"engine {asked!r}: {_EXPECTED}")
    if not isinstance(asked, ServerOptions):
        for name, value in (("url", url), ("api_key", api_key)):
            if value is not None:
                raise ConfigError(f"{name}: given beside engine {_NAMES[type(asked)]!r}, which asks no server")
        return asked, (), None
    urls = _urls(os.environ.get("COLQWEN3_URL", "").split(",") if url is None else url)
    if not urls:
        raise ConfigError("engine 'server': give url=, or set COLQWEN3_URL")
    key = (os.environ.get("COLQWEN3_API_KEY") if api_key is None else api_key) or None
    if key is not None and (
        not isinstance(key, str) or not key.isascii() or not key.isprintable() or key != key.strip()
    ):
        raise ConfigError("api_key: expected printable ASCII text without spaces around it")
    return asked, urls, key


def engine_to_dict(options: EngineOptions) -> dict[str, Any]:
    """Give options as JSON values, with the engine's name.

    >>> engine_to_dict(TorchOptions())["name"]
    'torch'
    """
    return {"name": _NAMES[type(options)], **dataclasses.asdict(options)}


def engine_from_dict(values: Mapping[str, Any]) -> EngineOptions:
    """Make options from :func:`engine_to_dict`'s values.

    Raises:
        ConfigError: an unknown engine.
        TypeError: an unknown option.
        KeyError: no name.

    >>> engine_from_dict({"name": "vllm", "tensor_parallel_size": 2}).tensor_parallel_size
    2
    """
    others = dict(values)
    name = others.pop("name")
    if name not in _OPTIONS:
        raise ConfigError(f"engine: expected torch, vllm or server, got {name!r}")
    return _OPTIONS[name](**others)


def _urls(given: object) -> tuple[str, ...]:
    """Check urls; a refused one is not quoted where it may hold a password."""
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, Sequence) or not all(isinstance(item, str) for item in given):
        raise ConfigError(f"url: expected a url or several, got {type(given).__name__}")
    urls = []
    for item in given:
        text = item.strip().rstrip("/")
        if not text:
            continue
        try:
            parts = urlsplit(text)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            sound = False
            parts = urlsplit("")
        if "@" in text.split("://", 1)[-1].split("/", 1)[0]:
            raise ConfigError("url: leave user and password out of it; api_key= takes a key")
        if any(mark in text for mark in "@?#"):
            raise ConfigError("url: expected http://host:port or https://host, without query; api_key= takes a key")
        if not sound:
            raise ConfigError(f"url {text!r}: expected http://host:port or https://host, without query")
        urls.append(text.removesuffix("/v1"))
    return tuple(dict.fromkeys(urls))
