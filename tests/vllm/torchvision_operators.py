"""Lets torchvision be imported beside a CPU build of torch. For the test environment only; nothing ships this.

torchvision's default wheel brings operators built for CUDA, which do not load beside a CPU build of torch; importing it
then fails, because it describes two operators that do not exist. Defining their schemas first is enough: the image
processors of Qwen3-VL, which vLLM imports, use neither. Where torchvision's own operators load, nothing is done.

A ``.pth`` file imports this module at the start of every Python process of the environment, the server's workers
included. That must cost nothing, so the schemas are defined only when torchvision is about to be imported.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


class _BeforeTorchvision:
    """An import finder that finds nothing, and is asked first."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        torch = importlib.import_module("torch")
        spec = importlib.util.find_spec("torchvision")
        for library in Path(spec.origin).parent.glob("_C*") if spec and spec.origin else ():
            with contextlib.suppress(OSError):
                torch.ops.load_library(str(library))
        for operator, schema in _SCHEMAS.items():
            if not hasattr(torch.ops.torchvision, operator):
                _LIBRARY.append(torch.library.Library("torchvision", "FRAGMENT"))
                _LIBRARY[-1].define(schema)


_LIBRARY: list[Any] = []  # a library's definitions go when it is collected

if not any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path):
    sys.meta_path.insert(0, _BeforeTorchvision())
