"""vLLM as somebody uses it who knows nothing of this package: run as a process of its own by the plugin's tests.

    python tests/vllm/plain.py RESULT.json PROMPTS.json FOLDER...

For each folder the result names how the prompts came out (lists of rows) or the error that stopped vLLM. With
``FIXED_UPSTREAM=1`` vLLM's ColQwen3 is first replaced by one that keeps the bias itself, as a later release may.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def mend_upstream() -> None:
    """Put a ColQwen3 that loads its own projection in the place of vLLM's."""
    import torch
    from vllm.model_executor.models import colqwen3

    class MendedColQwen3(colqwen3.ColQwen3Model):  # type: ignore[misc,name-defined]
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            everything = list(weights)
            head = {name.rpartition(".")[2]: value for name, value in everything if self._is_proj_weight(name)}
            dim, width = head["weight"].shape
            self.custom_text_proj = torch.nn.Linear(width, dim, dtype=head["weight"].dtype)
            self.embed_dim = dim
            self.custom_text_proj.upstream = True  # to tell it from a replacement
            loaded: set[str] = super().load_weights(everything)
            return loaded

    colqwen3.ColQwen3Model = MendedColQwen3


def main(result: str, prompts: str, *folders: str) -> None:
    """Encode the prompts with each folder's model."""
    if os.environ.get("FIXED_UPSTREAM"):
        mend_upstream()
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    found: dict[str, Any] = {}
    for folder in folders:
        asked = json.loads(Path(prompts).read_text())[folder]
        image = Image.fromarray(np.asarray(asked["image"], dtype=np.uint8))
        llm = None
        try:
            llm = LLM(folder, runner="pooling", dtype="float32", enforce_eager=True, max_model_len=2048,
                      limit_mm_per_prompt={"image": 1, "video": 0})  # fmt: skip
            outputs = llm.encode(
                [{"prompt": asked["query"]}, {"prompt": asked["page"], "multi_modal_data": {"image": image}}],
                pooling_task="token_embed", use_tqdm=False,
            )  # fmt: skip
            worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
            head = getattr(worker.model_runner.model, "custom_text_proj", None)
            found[folder] = {
                "rows": [output.outputs.data.tolist() for output in outputs],
                "class": type(worker.model_runner.model).__name__,
                "upstream_head": bool(getattr(head, "upstream", False)),
            }
            llm.llm_engine.engine_core.shutdown()
        except Exception as exc:  # the error is what the test wants to see
            found[folder] = {"error": repr(exc)}
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
