"""A checkpoint opened with an encoder's settings: what renders inputs, loads the engine and finishes its results."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np

from colqwen3_retrievers.encoding.settings import EncoderSettings
from colqwen3_retrievers.engines import Engine
from colqwen3_retrievers.engines.options import ServerOptions, VLLMOptions
from colqwen3_retrievers.errors import ConfigError, EngineError, require
from colqwen3_retrievers.models.checkpoint import Checkpoint, open_checkpoint
from colqwen3_retrievers.models.families import VISUAL_TOKEN_SIDE
from colqwen3_retrievers.models.rendering import EncoderInput, Renderer
from colqwen3_retrievers.models.tokenizer import PromptTokenizer
from colqwen3_retrievers.vectors.compression import pool_tokens, truncate
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo, Float32, MultiVector

_PIXELS_A_TOKEN = VISUAL_TOKEN_SIDE**2


@dataclass(frozen=True, slots=True, eq=False)
class OpenedModel:
    """A checkpoint and the settings checked against it; its weights are not loaded.

    Attributes:
        settings: of the encoder.
        checkpoint: opened.
        info: what shapes the multi-vectors.
        renderer: makes engine inputs.
        max_pixels: most pixels of a page.
    """

    settings: EncoderSettings
    checkpoint: Checkpoint
    info: EncoderInfo
    renderer: Renderer
    max_pixels: int

    @classmethod
    def open(cls, settings: EncoderSettings) -> OpenedModel:
        """Open the checkpoint and check the settings against it.

        Raises:
            CheckpointError: the checkpoint cannot be found or read.
            ConfigError: a dim it was not trained for, or more visual tokens than it reads.
            MissingExtraError: tokenizers is not installed.
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
        max_pixels = min(checkpoint.max_pixels, tokens * _PIXELS_A_TOKEN)
        renderer = Renderer(
            family,
            PromptTokenizer(checkpoint.folder, model=settings.model),
            min_pixels=checkpoint.min_pixels,
            max_pixels=max_pixels,
            context_length=context,
            include_text=settings.include_text,
            truncate=settings.truncate,
        )
        return cls(settings, checkpoint, info, renderer, max_pixels)

    def finish(self, item: EncoderInput, rows: Float32) -> MultiVector:
        """Apply the tail, the same one for the token embeddings of every engine.

        Args:
            item: the encoded input.
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
        """Return the key of the engine these settings need, and a function that loads it.

        Returns:
            A key, equal for two encoders that may share an engine: it holds nothing of the tail, and of the rendering
            only what the engine itself has to allow for. And a function that loads the weights, or reaches the server;
            it raises CheckpointError, ConfigError or EngineError.

        Raises:
            ConfigError: no such device.
            MissingExtraError: what the engine runs on is not installed.
        """
        options, checkpoint, max_pixels = self.settings.engine, self.checkpoint, self.max_pixels
        common = (str(checkpoint.folder.resolve()), self.info.fingerprint, checkpoint.family.name, options)
        if isinstance(options, ServerOptions):
            require("server", "httpx")
            from colqwen3_retrievers.engines.server.engine import ServerEngine

            urls, api_key = self.settings.url, self.settings.api_key
            return (*common, urls, api_key, max_pixels), lambda: ServerEngine(
                checkpoint, urls=urls, api_key=api_key, options=options, max_pixels=max_pixels
            )
        dtype = self.settings.dtype
        if isinstance(options, VLLMOptions):
            require("vllm", "vllm")
            from colqwen3_retrievers.engines.vllm.engine import VLLMEngine

            return (*common, dtype, max_pixels), lambda: VLLMEngine(
                checkpoint, dtype=dtype, options=options, max_pixels=max_pixels
            )
        require("torch", "torch")
        require("torch", "transformers")
        from colqwen3_retrievers.engines.torch.engine import TorchEngine, settle_device, settle_dtype

        device = settle_device(self.settings.device)
        dtype = settle_dtype(dtype, device)
        return (*common, device, dtype), lambda: TorchEngine(checkpoint, device=device, dtype=dtype, options=options)
