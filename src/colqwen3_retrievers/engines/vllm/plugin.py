"""The vLLM plugin: registers our ColQwen3 models in each of vLLM's processes.

vLLM calls :func:`register` in the API server, in the engine's process and in every worker, through the entry point
``vllm.general_plugins``. Most of these never build a model, so only names are registered and nothing is imported; the
classes are in :mod:`colqwen3_retrievers.engines.vllm.model`, which says what it mends and decides, model by model,
whether there is anything to mend.

Tested with vLLM 0.32 (CPU build). ``VLLM_PLUGINS``, when set, must name ``colqwen3_retrievers``.
"""

from __future__ import annotations

import importlib.util
import logging
import os

from colqwen3_retrievers.engines.vllm.folder import BIDIRECTIONAL_ARCHITECTURE, CAUSAL_ARCHITECTURE

TESTED_VERSIONS = ("0.32",)
"""Versions of vLLM this plugin was tested with."""

NAME = "colqwen3_retrievers"
"""Name of the entry point, as ``VLLM_PLUGINS`` would list it."""

_CLASSES = "colqwen3_retrievers.engines.vllm.model"
_CAUSAL = f"{_CLASSES}:ColQwen3Causal"
_BIDIRECTIONAL = f"{_CLASSES}:ColQwen3Bidirectional"

ARCHITECTURES = {
    # ours, which no vLLM knows without the plugin: see colqwen3_retrievers.engines.vllm.serving
    CAUSAL_ARCHITECTURE: _CAUSAL,
    BIDIRECTIONAL_ARCHITECTURE: _BIDIRECTIONAL,
    # the families' own, so that a server somebody started in their own way is right too
    "ColQwen3": _CAUSAL,  # tomoro, sauerkraut, colpali
    "OpsColQwen3Model": _CAUSAL,
    "Qwen3VLNemotronEmbedModel": _BIDIRECTIONAL,
}
"""Architecture -> ``module:class``, as vLLM's registry takes it."""

_SAID = "COLQWEN3_VLLM_PLUGIN_SAID"  # inherited by the processes that vLLM starts

_log = logging.getLogger("vllm.colqwen3_retrievers")  # vLLM shows what is below its own name


def register() -> None:
    """Register the architectures with vLLM; called in each of its processes.

    What is mended is said by the one process that loads the model. Here only doubts are voiced, once for all processes.
    A vLLM whose ColQwen3 is laid out beyond recognition is left alone with its own names: it may well have been mended.
    Only ours are then registered, and whoever asks for one of those is told.
    """
    from vllm import ModelRegistry, __version__

    known = _upstream_is_known()
    for name, where in ARCHITECTURES.items():
        if known or name in (CAUSAL_ARCHITECTURE, BIDIRECTIONAL_ARCHITECTURE):
            ModelRegistry.register_model(name, where)
    if os.environ.get(_SAID):
        return
    os.environ[_SAID] = str(os.getpid())
    # warnings only: vLLM sets its logging up later, and what is said at INFO here is lost
    if not known:
        _log.warning(
            "colqwen3-retrievers: vLLM %s has no ColQwen3 where one was expected; its own architectures are left as "
            "they are. Tested with vLLM %s.", __version__, ", ".join(TESTED_VERSIONS),
        )  # fmt: skip
    elif not _is_tested(__version__):
        _log.warning(
            "colqwen3-retrievers: the plugin was tested with vLLM %s, this is %s.",
            ", ".join(TESTED_VERSIONS), __version__,
        )  # fmt: skip


def _upstream_is_known() -> bool:
    """Return whether vLLM has the module that ours builds on, without importing it."""
    try:
        return importlib.util.find_spec("vllm.model_executor.models.colqwen3") is not None
    except ImportError:
        return False


def _is_tested(version: str) -> bool:
    """Return whether a version is one of the tested series.

    >>> _is_tested("0.32.4"), _is_tested("0.32.0+cpu"), _is_tested("0.33.0"), _is_tested("0.320.0")
    (True, True, False, False)
    """
    return any(version == tested or version.startswith((f"{tested}.", f"{tested}+")) for tested in TESTED_VERSIONS)
