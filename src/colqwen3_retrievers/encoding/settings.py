"""An encoder's settings: checked, comparable, serialisable, and what they lead to once the checkpoint is opened."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from colqwen3_retrievers.encoding import shared_engine as sharing
from colqwen3_retrievers.encoding.engine_choice import choose_engine, engine_from_dict, engine_to_dict
from colqwen3_retrievers.engines import Engine
from colqwen3_retrievers.engines.options import EngineOptions, ServerOptions, TorchOptions, VLLMOptions
from colqwen3_retrievers.errors import ConfigError, EngineError, require
from colqwen3_retrievers.models.checkpoint import DEFAULT_MODEL, Checkpoint, open_checkpoint
from colqwen3_retrievers.models.families import VISUAL_TOKEN_SIDE, get_family
from colqwen3_retrievers.models.rendering import EncoderInput, Renderer
from colqwen3_retrievers.models.tokenizer import PromptTokenizer
from colqwen3_retrievers.pages.files import user_path
from colqwen3_retrievers.vectors.compression import pool_tokens, truncate
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo, Float32, MultiVector

DTYPES = ("auto", "bfloat16", "float16", "float32")

_PIXELS_A_TOKEN = VISUAL_TOKEN_SIDE**2
_WHERE_ELSE = {
    VLLMOptions: "vLLM takes those it sees (CUDA_VISIBLE_DEVICES)",
    ServerOptions: "a server has its own",
}


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """What :class:`colqwen3_retrievers.ColQwen3Encoder` was asked for; the arguments are described there.

    Raises:
        ConfigError: a value that no checkpoint could take.

    >>> EncoderSettings(model="tiny", dim=0)
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: dim: expected an integer from 1, got 0
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
        """Check what can be checked without the checkpoint."""
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r}: expected {', '.join(DTYPES)}")
        for name in ("dim", "pool_factor", "max_visual_tokens"):
            value = getattr(self, name)
            optional = value is None and name != "pool_factor"
            if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name}: expected an integer from 1, got {value!r}")
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
                f"device {self.device!r}: only the torch engine takes one; {_WHERE_ELSE[type(self.engine)]}"
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
            name = str(folder.absolute())  # it is the same folder wherever the process, or an index's reader, stands
        return cls(model=name, engine=options, url=urls, api_key=key, device=device, **others)

    def to_dict(self) -> dict[str, Any]:
        """Give JSON values by name; the key of a server is left out, and read from the environment again."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "api_key"}
        return {**values, "engine": engine_to_dict(self.engine), "url": list(self.url)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderSettings:
        """Make settings from :meth:`to_dict`'s values.

        Raises:
            ConfigError: an unknown engine or setting.
        """
        try:
            options = engine_from_dict(values["engine"])
            _, urls, key = choose_engine(options, values.get("url") or None, None, None)
            return cls(**{**values, "engine": options, "url": urls, "api_key": key})
        except (KeyError, TypeError, ValueError) as exc:
            raise ConfigError(f"encoder settings: {exc}") from exc

    def on_current_device(self) -> EncoderSettings:
        """Pin the CUDA device that is current in the calling thread: in another thread another one may be.

        Returns:
            Itself, unless it leaves the device or its number open and torch, already in use, sees CUDA.
        """
        torch = sharing.loaded_torch()
        if not isinstance(self.engine, TorchOptions):
            return self
        if self.device not in (None, "cuda") or torch is None or not torch.cuda.is_available():
            return self
        return dataclasses.replace(self, device=f"cuda:{torch.cuda.current_device()}")

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that are not the default, the model first."""
        return {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name != "api_key"
            and (item.name == "model" or getattr(self, item.name) != getattr(EncoderSettings(self.model), item.name))
        }


@dataclass(frozen=True, slots=True, eq=False)
class OpenedSettings:
    """Settings that met their checkpoint.

    Attributes:
        settings: as asked for.
        checkpoint: opened; its weights are not loaded.
        info: what shapes the multi-vectors.
        renderer: makes engine inputs.
    """

    settings: EncoderSettings
    checkpoint: Checkpoint
    info: EncoderInfo
    renderer: Renderer

    @classmethod
    def open(cls, settings: EncoderSettings) -> OpenedSettings:
        """Open the checkpoint and check the settings against it.

        Raises:
            CheckpointError: it cannot be had or understood.
            ConfigError: a dim it was not trained for, or more visual tokens than it reads.
            MissingExtraError: tokenizers is not installed, or scipy, for pooling.
        """
        checkpoint = open_checkpoint(
            settings.model,
            revision=settings.revision,
            family=settings.family,
            weights=not isinstance(settings.engine, ServerOptions),
        )
        family = checkpoint.family
        dim = settings.dim or checkpoint.dim
        if dim not in checkpoint.matryoshka_dims:
            allowed = ", ".join(map(str, checkpoint.matryoshka_dims))
            raise ConfigError(f"dim {dim}: {settings.model} was trained for {allowed}")
        bound = checkpoint.max_pixels // _PIXELS_A_TOKEN
        tokens = settings.max_visual_tokens or bound
        if tokens > bound:
            raise ConfigError(f"max_visual_tokens {tokens}: {settings.model} reads at most {bound} a page")
        info = EncoderInfo(
            fingerprint=checkpoint.fingerprint,
            model=settings.model,
            family=family.name,
            dim=dim,
            pool_factor=settings.pool_factor,
            max_visual_tokens=tokens,
            include_text=settings.include_text,
            rendering_version=family.rendering_version,
            verified=family.verified,
            unverified=family.unverified,
            revision=settings.revision,
        )
        context = checkpoint.context_length
        if isinstance(settings.engine, VLLMOptions):
            context = settings.engine.context_length(context, tokens)
        renderer = Renderer(
            family,
            PromptTokenizer(checkpoint.folder, model=settings.model),
            min_pixels=checkpoint.min_pixels,
            max_pixels=min(checkpoint.max_pixels, tokens * _PIXELS_A_TOKEN),
            context_length=context,
            include_text=settings.include_text,
            truncate=settings.truncate,
        )
        if settings.pool_factor > 1:
            require("pooling", "scipy.cluster")  # told now, and not after a page was encoded
        return cls(settings, checkpoint, info, renderer)

    def finish(self, item: EncoderInput, rows: Float32) -> MultiVector:
        """Apply the tail, which every engine's token embeddings go through here and nowhere else.

        Args:
            item: what was encoded.
            rows: float32 (n_tokens, full dim) from an engine.

        Returns:
            The multi-vector: truncated to the Matryoshka dim, L2-normalised in float32, documents pooled.

        Raises:
            EngineError: the rows are not one a token, or not finite.
        """
        if len(rows) != len(item):
            raise EngineError(f"the engine gave {len(rows)} rows for {len(item)} tokens")
        if not np.isfinite(rows).all():
            raise EngineError("the engine gave NaN or infinity; float16 overflows in some models, bfloat16 does not")
        vectors, clusters = truncate(rows, self.info.dim), None
        if self.info.pool_factor > 1 and not item.is_query:
            vectors, clusters = pool_tokens(vectors, self.info.pool_factor)
        return MultiVector(
            vectors, content=item.content, visual=item.visual, tokens=item.tokens, grid=item.grid, clusters=clusters
        )

    def engine(self) -> tuple[Hashable, Callable[[], Engine]]:
        """Say what engine this asks for, and how to load it.

        Returns:
            A key, which two encoders that may share an engine have in common: nothing of the tail, and of the rendering
            only what the engine itself has to allow for. And a function that loads the weights, or reaches the server;
            it raises CheckpointError, ConfigError or EngineError.

        Raises:
            ConfigError: no such device.
            MissingExtraError: what the engine runs on is not installed.
        """
        options, checkpoint = self.settings.engine, self.checkpoint
        most = min(checkpoint.max_pixels, self.info.max_visual_tokens * _PIXELS_A_TOKEN)
        same = (str(checkpoint.folder.resolve()), self.info.fingerprint, checkpoint.family.name, options)
        if isinstance(options, ServerOptions):
            require("server", "httpx")
            from colqwen3_retrievers.engines.server.engine import ServerEngine

            urls, api_key = self.settings.url, self.settings.api_key
            return (*same, urls, api_key, most), lambda: ServerEngine(
                checkpoint, urls=urls, api_key=api_key, options=options, max_pixels=most
            )
        dtype = self.settings.dtype
        if isinstance(options, VLLMOptions):
            require("vllm", "vllm")
            from colqwen3_retrievers.engines.vllm.engine import VLLMEngine

            return (*same, dtype, most), lambda: VLLMEngine(checkpoint, dtype=dtype, options=options, max_pixels=most)
        require("torch", "torch")
        require("torch", "transformers")
        from colqwen3_retrievers.engines.torch.engine import TorchEngine, settle_device, settle_dtype

        device = settle_device(self.settings.device)
        dtype = settle_dtype(dtype, device)
        return (*same, device, dtype), lambda: TorchEngine(checkpoint, device=device, dtype=dtype, options=options)
