"""The engine that runs vLLM in this process, for many pages on one or several GPUs.

vLLM takes our token ids and our pixels. Each image's run of placeholders is replaced by the one that vLLM expands, its
own resizing is off, and the token ids of every result are compared with ours, so that there is a row for each token.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import spawn
from pathlib import Path
from typing import Any

import numpy as np

from colqwen3_retrievers.engines import check_length, first_line
from colqwen3_retrievers.engines.options import VLLMOptions
from colqwen3_retrievers.engines.vllm.folder import architecture, write_folder
from colqwen3_retrievers.engines.vllm.plugin import NAME, register
from colqwen3_retrievers.errors import CheckpointError, ConfigError, EngineError, require
from colqwen3_retrievers.fork import ForkSafeLock, after_fork, finalize
from colqwen3_retrievers.models.checkpoint import Checkpoint
from colqwen3_retrievers.models.families import VISUAL_TOKEN_SIDE
from colqwen3_retrievers.models.rendering import EncoderInput
from colqwen3_retrievers.models.tokenizer import PromptTokenizer
from colqwen3_retrievers.vectors.multi_vector import Float32

_IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"
_MISSING_TENSORS = ("tensors missing from the checkpoint", "no module or parameter named", "were not initialized")

_WATCH_SECONDS = 0.5

_starting = ForkSafeLock()  # one engine at a time: vLLM reads its settings from the environment
_lock = ForkSafeLock()
_running = 0  # engines that share vLLM's state of the process


@after_fork
def _forget_engines() -> None:
    global _running
    _running = 0


class VLLMEngine:
    """A checkpoint in vLLM.

    vLLM starts a process for the model unless ``VLLM_ENABLE_V1_MULTIPROCESSING=0`` is set; both work. It uses the GPUs
    of ``CUDA_VISIBLE_DEVICES``.

    Args:
        checkpoint: an opened checkpoint.
        dtype: the backbone's; ``"auto"`` is bfloat16 on a GPU (float16 where it has none) and float32 elsewhere. The
            projection is float32 whatever this says.
        options: see :class:`colqwen3_retrievers.VLLMOptions`.
        max_pixels: most pixels of a rendered image, for which vLLM reserves memory.

    Raises:
        CheckpointError: the weights do not fill the model.
        ConfigError: options that do not fit this checkpoint or machine.
        EngineError: vLLM does not start.
        MissingExtraError: vLLM is not installed.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: str, options: VLLMOptions, max_pixels: int) -> None:
        require("vllm", "vllm")
        self.batch_tokens = options.batch_tokens
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._options = options
        self._max_pixels = max_pixels
        self._max_tokens = options.context_length(checkpoint.context_length, max_pixels // VISUAL_TOKEN_SIDE**2)
        self._before_video = _tokens_before_video(checkpoint)
        self._folder: Path | None = None
        self._remove_folder: Callable[[], object] = lambda: None
        self._closed = False
        self._llm: Any = None
        self._llm = self._start()

    def embed(self, inputs: Sequence[EncoderInput]) -> list[Float32]:
        """Encode rendered inputs; see :class:`colqwen3_retrievers.engines.Engine`.

        After vLLM's own process died, the next call starts another.

        Raises:
            InputTooLongError: an input is longer than ``max_model_len``; none of this call was encoded.
            EngineError: vLLM failed, or encoded other tokens than its input.
        """
        if self._closed:
            raise EngineError("the engine is closed")
        for item in inputs:
            check_length(item, self._max_tokens, f"vLLM was started for {self._max_tokens:,} (max_model_len)")
        if self._llm is None:
            self._llm = self._start()
        prompts = [prompt_of(item, before_video=self._before_video) for item in inputs]
        try:
            outputs = self._llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
        except Exception as exc:  # vLLM raises what its parts raise
            dead = _is_dead(exc)
            if dead:
                self._stop()
            raise EngineError(f"vLLM failed: {first_line(exc)}", retryable=dead) from exc
        if len(outputs) != len(inputs):
            raise EngineError(f"vLLM gave {len(outputs)} results for {len(inputs)} inputs")
        return [self._rows(item, output) for item, output in zip(inputs, outputs, strict=True)]

    def close(self) -> None:
        """End vLLM and its processes, and free its memory."""
        self._closed = True
        self._stop()

    def _rows(self, item: EncoderInput, output: Any) -> Float32:
        """Return the rows of one result, checked against its input."""
        used = np.asarray(output.prompt_token_ids, dtype=np.int64)
        if not np.array_equal(used, item.token_ids):
            marks = "this version of vLLM or of transformers unfolds an image or a video in a way not known here"
            if item.is_video:
                marks = f"{marks}, or the tokenizer splits a video's time marks otherwise alone than within the prompt"
            raise EngineError(f"vLLM encoded {len(used)} tokens where {len(item)} others were rendered: {marks}")
        rows: Float32 = np.asarray(output.outputs.data.float().cpu().numpy(), dtype=np.float32)
        if rows.shape != (len(item), self._checkpoint.dim):
            raise EngineError(
                f"vLLM gave token embeddings of shape {rows.shape}, expected {(len(item), self._checkpoint.dim)}"
            )
        return rows

    def _start(self) -> Any:
        global _running
        options, family = self._options, self._checkpoint.family
        self._folder = folder = Path(tempfile.mkdtemp(prefix="colqwen3-vllm-"))
        self._remove_folder = finalize(self, shutil.rmtree, folder, True)
        write_folder(self._checkpoint, folder, max_pixels=self._max_pixels)
        register()  # as vLLM does itself, unless the entry points are not installed
        from vllm import LLM

        with _lock:
            _running += 1
        try:
            with _starting, _engine_processes():
                llm = LLM(
                    model=str(folder),
                    runner="pooling",
                    dtype=settle_dtype(self._dtype),
                    max_model_len=self._max_tokens,
                    gpu_memory_utilization=options.gpu_memory_utilization,
                    tensor_parallel_size=options.tensor_parallel_size,
                    enforce_eager=options.enforce_eager,
                    # rows of cached tokens, or of an earlier chunk, would be missing
                    enable_prefix_caching=False,
                    enable_chunked_prefill=False,
                    mm_processor_kwargs={"do_resize": False},
                    mm_processor_cache_gb=0,  # a page is encoded once
                    limit_mm_per_prompt={"image": 1, "video": 1 if family.video else 0},
                )
            _watch(llm.llm_engine.engine_core)
            return llm
        except Exception as exc:  # vLLM raises what its parts raise
            self._stop()
            raise self._explained(exc) from exc

    def _explained(self, exc: Exception) -> Exception:
        """Return the error for vLLM's failure to start."""
        model, reasons = self._checkpoint.model, "\n".join(map(str, _links(exc)))
        if any(sign in reasons for sign in _MISSING_TENSORS):
            return CheckpointError(f"{model}: the weights do not fill vLLM's model: {first_line(exc)}")
        if architecture(self._checkpoint.family) in reasons:
            return EngineError(
                f"vLLM does not know the plugin's architectures: reinstall colqwen3-retrievers beside vLLM, and let "
                f"VLLM_PLUGINS (now {os.environ.get('VLLM_PLUGINS')!r}) name {NAME}"
            )
        if "gpu_memory_utilization" in reasons or "KV cache" in reasons:
            return ConfigError(f"{model}: vLLM has too little memory: {first_line(exc)}")
        return EngineError(f"{model}: vLLM does not start: {first_line(exc)}")

    def _stop(self) -> None:
        """End vLLM; its state of the process is freed with the last engine."""
        global _running
        llm, self._llm = self._llm, None
        folder, self._folder = self._folder, None
        if folder is None:
            return
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        with _lock:
            _running -= 1
            if _running == 0:
                from vllm.distributed import cleanup_dist_env_and_memory

                cleanup_dist_env_and_memory()
        gc.collect()
        self._remove_folder()


def prompt_of(item: EncoderInput, *, before_video: int = 0) -> dict[str, Any]:
    """Return a rendered input as a vLLM prompt.

    Args:
        item: a rendered input.
        before_video: tokens of the prompt before a video's first time mark; vLLM writes the time marks itself.

    Returns:
        ``prompt_token_ids``, with one placeholder for each image or video, and ``multi_modal_data`` for the pixels.

    >>> text = EncoderInput(is_query=True, prompt="a b", token_ids=np.array([4, 5]), content=slice(0, 2))
    >>> prompt_of(text)
    {'prompt_token_ids': [4, 5]}
    """
    ids = item.token_ids.tolist()
    if item.pixels is None:
        return {"prompt_token_ids": ids}
    first, last = item.spans[0], item.spans[-1]
    stop = last.start + last.rows * last.cols
    if not item.is_video:
        from PIL import Image

        folded = [*ids[: first.start + 1], *ids[stop:]]
        return {"prompt_token_ids": folded, "multi_modal_data": {"image": Image.fromarray(item.pixels[0])}}
    pad = [ids[first.start]]
    fold = pad if _unfolds_bare_pads() else [ids[first.start - 1], *pad, ids[stop]]
    metadata = {
        "fps": 1.0,
        "frames_indices": list(item.timestamps),  # at one frame a second, an index is a time
        "duration": float(max(item.timestamps)),
        "total_num_frames": len(item.pixels),
        "video_backend": "colqwen3_retrievers",
        "do_sample_frames": False,
    }
    return {
        "prompt_token_ids": [*ids[:before_video], *fold, *ids[stop + 1 :]],
        "multi_modal_data": {"video": (item.pixels, metadata)},
    }


def _tokens_before_video(checkpoint: Checkpoint) -> int:
    if checkpoint.family.video is None:
        return 0
    before = checkpoint.family.video.partition("{visual}")[0]
    return len(PromptTokenizer(checkpoint.folder, model=checkpoint.model).encode(before).ids)


def _unfolds_bare_pads() -> bool:
    """Return whether vLLM expands the bare pad of a video, or the pad between its marks (transformers < 5.10)."""
    from transformers import ProcessorMixin
    from transformers.models.qwen3_vl import Qwen3VLProcessor

    own = getattr(Qwen3VLProcessor, "replace_video_token", None)
    return own is not None and own is not getattr(ProcessorMixin, "replace_video_token", None)


def settle_dtype(dtype: str) -> str:
    """Return the dtype of a backbone in vLLM on this machine, for a requested ``dtype``.

    vLLM's own ``auto`` makes a float32 checkpoint float16, in which Qwen3-VL may overflow.
    """
    if dtype != "auto":
        return dtype
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return "float32"
    return "bfloat16" if torch.bfloat16 in current_platform.supported_dtypes else "float16"


@contextmanager
def _engine_processes() -> Iterator[None]:
    """Spawn vLLM's processes without running the caller's script again.

    A fork of this process would lack its threads but keep the locks they hold. A spawned process imports the caller's
    script, as ``multiprocessing`` does, and a script without an ``if __name__`` guard would start another engine.
    Nothing that vLLM passes on is defined in that script, so processes started by this thread do not import it.
    ``VLLM_WORKER_MULTIPROC_METHOD``, when set, is obeyed.
    """
    method = "VLLM_WORKER_MULTIPROC_METHOD"
    if os.environ.get(method):
        yield
        return
    ours, original = threading.get_ident(), spawn.get_preparation_data

    def without_main(name: str) -> dict[str, Any]:
        data: dict[str, Any] = original(name)
        if threading.get_ident() == ours:
            data.pop("init_main_from_path", None)
            data.pop("init_main_from_name", None)
        return data

    os.environ[method] = "spawn"
    spawn.get_preparation_data = without_main
    try:
        yield
    finally:
        spawn.get_preparation_data = original
        os.environ.pop(method, None)


def _watch(core: Any) -> None:
    """Wake the calls that wait for an engine's process that died.

    vLLM 0.32 notices the death, closes its sockets, and leaves a pending call waiting forever. Without such a process,
    or in a vLLM without these attributes, there is nothing to watch.
    """
    queue, resources = getattr(core, "outputs_queue", None), getattr(core, "resources", None)
    if queue is None or resources is None or not hasattr(resources, "engine_dead"):
        return
    alive = weakref.ref(core)

    def watch() -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        while alive() is not None:
            if resources.engine_dead:
                queue.put_nowait(EngineDeadError())
                return
            time.sleep(_WATCH_SECONDS)

    threading.Thread(target=watch, name="colqwen3-vllm-watch", daemon=True).start()


def _is_dead(exc: BaseException) -> bool:
    return any(type(link).__name__ == "EngineDeadError" for link in _links(exc))


def _links(exc: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = exc
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
