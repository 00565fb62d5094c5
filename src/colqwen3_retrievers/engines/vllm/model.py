"""vLLM's ColQwen3 with nothing left out: what our plugin registers, imported only by processes that build a model.

What vLLM 0.32 does to a ColQwen3 checkpoint, and what is done about it here:

1. The projection's bias is dropped whenever the config names the dim.
2. Where only the weights tell the dim, and there is a bias, the engine does not start.
3. A bidirectional trunk runs causal, and its embeddings are read after the final norm instead of before it.
4. A tensor that the checkpoint lacks is in many places left as it was allocated, without an error.

Whether 1 and 2 need mending is not read off a version number but off the model itself, once vLLM has loaded it: when
the bias of the checkpoint stands in the model, nothing is replaced. What is done against 3 and 4 does not harm a vLLM
that does it itself. So a mended vLLM is not broken by this module.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm import __version__
from vllm.distributed.parallel_state import is_global_first_rank
from vllm.model_executor.models.colqwen3 import ColQwen3Model
from vllm.model_executor.models.interfaces_base import attn_type
from vllm.model_executor.models.utils import PPMissingLayer

from colqwen3_retrievers.engines.vllm.names import PROJECTION, mapped, renamed, sources
from colqwen3_retrievers.engines.vllm.plugin import TESTED_VERSIONS

_HEAD = "language_model.lm_head."

_log = logging.getLogger("vllm.colqwen3_retrievers")


class ColQwen3Causal(ColQwen3Model):  # type: ignore[misc]  # vLLM is not there when types are checked
    """ColQwen3 with its whole projection, in float32."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load as vLLM does, then see whether the projection is in the model whole, and whether anything is missing.

        Args:
            weights: names and tensors of the checkpoint.

        Returns:
            Names of the parameters that were filled.

        Raises:
            ValueError: tensors are missing.
        """
        projection: dict[str, Tensor] = {}
        seen: set[str] = set()

        def watched() -> Iterator[tuple[str, Tensor]]:
            for original, tensor in weights:
                name = renamed(original)
                seen.add(name)
                if name.startswith(f"{PROJECTION}."):
                    projection[name.removeprefix(f"{PROJECTION}.")] = tensor
                if not name.startswith("lm_head."):  # nothing here ever predicts a token
                    yield name, tensor

        self.language_model.lm_head = PPMissingLayer()
        loaded: set[str] = super().load_weights(watched())
        loaded |= self._complete_projection(projection)
        _check_complete(self, seen)
        return loaded

    def _complete_projection(self, tensors: dict[str, Tensor]) -> set[str]:
        """Put the checkpoint's projection in place of vLLM's where that one is not whole."""
        if not tensors:
            return set()
        if "weight" not in tensors:
            raise ValueError("the checkpoint has a projection bias, but no projection weight")
        present = {
            name: value for name, value in self.named_parameters() if not name.startswith(("visual.", "language_"))
        }
        if all(any(_is_same(value, tensor) for value in present.values()) for tensor in tensors.values()):
            _say("vLLM loads this checkpoint's projection whole by itself: the plugin changes nothing about it")
            return set()
        if not hasattr(self, PROJECTION):
            raise ValueError(
                f"this vLLM keeps the projection elsewhere than in {PROJECTION} and drops part of it: "
                "a newer colqwen3-retrievers is needed"
            )
        like = next(self.language_model.parameters())
        dim, width = tensors["weight"].shape
        # made and multiplied in float32 whatever the backbone's dtype: the forward pass casts to the weight's
        whole = nn.Linear(width, dim, bias="bias" in tensors, device=like.device, dtype=torch.float32)
        whole.requires_grad_(False)
        for name, tensor in tensors.items():
            getattr(whole, name).data.copy_(tensor)
        setattr(self, PROJECTION, whole)
        self.embed_dim = dim
        bias = " and its bias, which vLLM leaves out" if "bias" in tensors else ""
        _say(f"the plugin is active: it keeps the projection (dim {dim}){bias}")
        return {f"{PROJECTION}.{name}" for name in tensors}


@attn_type("encoder_only")
class ColQwen3Bidirectional(ColQwen3Causal):
    """ColQwen3 whose text trunk is bidirectional and read before its final norm."""

    def __init__(self, *, vllm_config: Any, prefix: str = "model") -> None:
        vllm_config.model_config.hf_config.text_config.is_causal = False  # before the attention layers are made
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load, then take the final norm's gain away; see :meth:`ColQwen3Causal.load_weights`.

        What is left of the norm scales each row as a whole, which the L2 normalisation that follows undoes. So this is
        exactly "before the norm", and does nothing where vLLM skips the norm itself.
        """
        loaded = super().load_weights(weights)
        norm = self.language_model.model.norm
        if isinstance(norm, PPMissingLayer):  # the last stage of a pipeline has it
            return loaded
        norm.weight.data.fill_(1.0)
        _say("the plugin is active: the text trunk runs bidirectional and is read before its final norm")
        return loaded


def _is_same(parameter: Tensor, tensor: Tensor) -> bool:
    if parameter.shape != tensor.shape:
        return False
    return torch.equal(parameter.detach(), tensor.to(device=parameter.device, dtype=parameter.dtype))


def _check_complete(model: Any, seen: set[str]) -> None:
    """Refuse a checkpoint that leaves a parameter unfilled: vLLM tracks whole modules, and not all of them."""
    if model.language_model.quant_config is not None:
        return  # quantised checkpoints have tensors of their own
    present = {mapped(name) for name in seen}
    missing = sorted(
        source
        for name, _ in model.named_parameters()
        if not name.startswith((PROJECTION, _HEAD))
        for source in sources(name, model.packed_modules_mapping)
        if source not in present
    )
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(f"tensors missing from the checkpoint: {shown}")


def _say(message: str) -> None:
    """Log once for all processes of an engine."""
    if is_global_first_rank():
        _log.info("colqwen3-retrievers: %s (vLLM %s; tested with %s)", message, __version__, ", ".join(TESTED_VERSIONS))
