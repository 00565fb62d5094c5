"""An encoder's settings: checked, comparable, serialisable; and the choice of its engine and servers."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.engines.options import EngineOptions, ServerOptions, TorchOptions, VLLMOptions
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.models.checkpoint import DEFAULT_MODEL
from colqwen3_retrievers.models.families import get_family
from colqwen3_retrievers.pages.files import user_path

DTYPES: Final = ("auto", "bfloat16", "float16", "float32")

_OPTIONS: Final[dict[str, type[EngineOptions]]] = {"torch": TorchOptions, "vllm": VLLMOptions, "server": ServerOptions}
_NAMES: Final[dict[type[EngineOptions], str]] = {options: name for name, options in _OPTIONS.items()}
_EXPECTED: Final = "expected auto, torch, vllm, server, or a TorchOptions, VLLMOptions or ServerOptions"
_DEVICE_HINTS: Final = {
    VLLMOptions: "vLLM takes those it sees (CUDA_VISIBLE_DEVICES)",
    ServerOptions: "a server has its own",
}


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """Settings of a :class:`colqwen3_retrievers.ColQwen3Encoder`, whose arguments are described there.

    Raises:
        ConfigError: a value that no checkpoint could take.

    >>> EncoderSettings(model="tiny", dim=0)
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: dim: expected a whole number from 1, got 0
    """

    model: str
    engine: EngineOptions = dataclasses.field(default_factory=TorchOptions)
    device: str | None = None
    dtype: str = "auto"
    dim: int | None = None
    pool_factor: int = 1
    max_visual_tokens: int | None = None
    revision: str | None = None
    family: str | None = None
    include_text: bool = False
    truncate: bool = False
    url: tuple[str, ...] = ()
    api_key: str | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r}: expected {', '.join(DTYPES)}")
        for name in ("dim", "pool_factor", "max_visual_tokens"):
            value = getattr(self, name)
            if value is not None or name == "pool_factor":
                object.__setattr__(self, name, whole_number(value, name, least=1))
        for name in ("include_text", "truncate"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        for name in ("device", "revision"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"{name}: expected a string, got {getattr(self, name)!r}")
        if self.family is not None:
            get_family(self.family)
        if self.device is not None and not isinstance(self.engine, TorchOptions):
            raise ConfigError(
                f"device {self.device!r}: only the torch engine takes one; {_DEVICE_HINTS[type(self.engine)]}"
            )
        if self.dtype != "auto" and isinstance(self.engine, ServerOptions):
            raise ConfigError(f"dtype {self.dtype!r}: a server has its own; it is chosen where the server is started")

    @classmethod
    def resolve(
        cls, model: object, engine: object, *, url: object, api_key: object, device: str | None, **others: Any
    ) -> EncoderSettings:
        """Fill in the model, the engine and its servers from the environment where the arguments leave them open.

        Raises:
            ConfigError: a setting that cannot be used.
        """
        if model is None:
            model = os.environ.get("COLQWEN3_MODEL") or DEFAULT_MODEL
        if not isinstance(model, str | os.PathLike) or not os.fspath(model):
            raise ConfigError(f"model: expected a hub name or a folder, got {model!r}")
        options, urls, key = choose_engine(engine, url, api_key, device)
        name = str(os.fspath(model))
        folder = user_path(name)
        if name != "tiny" and folder.is_dir():
            name = str(folder.absolute())  # the same folder whatever the working directory of a later process
        return cls(model=name, engine=options, url=urls, api_key=key, device=device, **others)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values by name, without the key of a server, which is read from the environment again."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "api_key"}
        engine = {"name": _NAMES[type(self.engine)], **dataclasses.asdict(self.engine)}
        return {**values, "engine": engine, "url": list(self.url)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderSettings:
        """Return the settings that :meth:`to_dict` wrote.

        Raises:
            ConfigError: an unknown engine or setting.
        """
        try:
            arguments = dict(values["engine"])
            name = arguments.pop("name")
            if name not in _OPTIONS:
                raise ConfigError(f"engine: expected torch, vllm or server, got {name!r}")
            options, urls, key = choose_engine(_OPTIONS[name](**arguments), values.get("url") or None, None, None)
            return cls(**{**values, "engine": options, "url": urls, "api_key": key})
        except (KeyError, TypeError, ValueError) as exc:
            raise ConfigError(f"encoder settings: {exc}") from exc

    def on_current_device(self) -> EncoderSettings:
        """Pin the CUDA device that is current in the calling thread: in another thread another one may be.

        Returns:
            Itself, unless it leaves the device or its number open and torch, already in use, sees CUDA.
        """
        torch = loaded_torch()
        if not isinstance(self.engine, TorchOptions):
            return self
        if self.device not in (None, "cuda") or torch is None or not torch.cuda.is_available():
            return self
        return dataclasses.replace(self, device=f"cuda:{torch.cuda.current_device()}")

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that are not the default, the model first."""
        default = EncoderSettings(self.model)
        return {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name != "api_key"
            and (item.name == "model" or getattr(self, item.name) != getattr(default, item.name))
        }


def choose_engine(
    engine: object, url: object, api_key: object, device: str | None
) -> tuple[EngineOptions, tuple[str, ...], str | None]:
    """Choose the engine, its servers and their key. An argument beats the environment, the environment the default.

    Args:
        engine: a name or options; ``"auto"`` is the server when a url is known, else torch.
        url: of a server, or several, for one fleet; None reads ``COLQWEN3_URL`` (several with commas between them).
        api_key: for the servers; None reads ``COLQWEN3_API_KEY``.
        device: of this process; with ``engine="auto"`` it means torch, the only engine that takes one.

    Returns:
        Options, urls and key; no urls and no key unless the engine is the server.

    Raises:
        ConfigError: no such engine, a server without url, a url beside another engine, or one that cannot be used.

    >>> choose_engine("auto", "http://gpu-1:8000/", None, None)[1]
    ('http://gpu-1:8000',)
    """
    options = engine
    if engine == "auto":
        name = os.environ.get("COLQWEN3_ENGINE") or "auto"
        if url is not None:
            options = "server"
        elif device is not None:
            options = "torch"
        elif name != "auto":
            options = name
        else:
            options = "server" if os.environ.get("COLQWEN3_URL") else "torch"
    if isinstance(options, str) and options in _OPTIONS:
        options = _OPTIONS[options]()
    if not isinstance(options, EngineOptions):
        raise ConfigError(f"engine {options!r}: {_EXPECTED}")
    if not isinstance(options, ServerOptions):
        for name, value in (("url", url), ("api_key", api_key)):
            if value is not None:
                raise ConfigError(f"{name}: given beside engine {_NAMES[type(options)]!r}, which asks no server")
        return options, (), None
    urls = _checked_urls(os.environ.get("COLQWEN3_URL", "").split(",") if url is None else url)
    if not urls:
        raise ConfigError("engine 'server': give url=, or set COLQWEN3_URL")
    key = (os.environ.get("COLQWEN3_API_KEY") if api_key is None else api_key) or None
    if key is not None and (
        not isinstance(key, str) or not key.isascii() or not key.isprintable() or key != key.strip()
    ):
        raise ConfigError("api_key: expected printable ASCII text without spaces around it")
    return options, urls, key


def loaded_torch() -> Any:
    """Return torch if this process has imported it; None too while another thread is still importing it."""
    torch = sys.modules.get("torch")
    return None if torch is None or getattr(torch.__spec__, "_initializing", False) else torch


def _checked_urls(value: object) -> tuple[str, ...]:
    """Check urls; a refused one is not quoted where it may hold a password."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"url: expected a url or several, got {type(value).__name__}")
    urls = []
    for url in (text.strip().rstrip("/") for text in texts):
        if not url:
            continue
        if "@" in url.split("://", 1)[-1].split("/", 1)[0]:
            raise ConfigError("url: leave user and password out of it; api_key= takes a key")
        if any(mark in url for mark in "@?#"):
            raise ConfigError("url: expected http://host:port or https://host, without query; api_key= takes a key")
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            valid = False
        if not valid:
            raise ConfigError(f"url {url!r}: expected http://host:port or https://host, without query")
        urls.append(url.removesuffix("/v1"))
    return tuple(dict.fromkeys(urls))
