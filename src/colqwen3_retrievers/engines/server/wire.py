"""The wire format of a vLLM server: request bodies of ``/pooling``, and token embeddings as bytes.

Texts are sent as token ids, so that nothing is tokenised twice. Images are sent once, already resized, as PNG:
lossless, at the fastest level, since better ones save a few per cent of the bytes for several times the time. Token
embeddings are returned as float16, whose rounding (one part in 2048) is finer than that of a bfloat16 model.
"""

from __future__ import annotations

import base64
import enum
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from colqwen3_retrievers.errors import EngineResponseError
from colqwen3_retrievers.models.families import VIDEO_PLACEHOLDER
from colqwen3_retrievers.models.rendering import EncoderInput
from colqwen3_retrievers.vectors.multi_vector import Float32

RAW_TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)
"""A chat template that does not change a prompt: ours are complete, placeholders included."""

_PNG_LEVEL = 1
_BYTES = {"float16": 2, "float32": 4}
_MILLISECONDS = 1000


class Dialect(enum.Enum):
    """How an exact prompt with an image is sent to a server.

    Attributes:
        OWN_TEMPLATE: :data:`RAW_TEMPLATE` is sent with each request; the server must trust it.
        WHOLE_PROMPT: the served template does not change a whole prompt.
        USER_TURN: the served template writes the family's prompt around an image and the text after it.
    """

    OWN_TEMPLATE = "a template sent along"
    WHOLE_PROMPT = "a served template that leaves prompts as they are"
    USER_TURN = "a served template of the family"


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Return pixels as a PNG file.

    Args:
        pixels: uint8 (height, width, 3).

    >>> png(np.zeros((32, 32, 3), dtype=np.uint8))[1:4]
    b'PNG'
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()


def picture_part(item: EncoderInput) -> bytes:
    """Return an input's image or video as one JSON part of a message.

    Args:
        item: with pixels.

    Returns:
        JSON, ASCII.
    """
    assert item.pixels is not None  # noqa: S101 - narrows the type for the checker
    frames = [base64.b64encode(png(frame)) for frame in item.pixels[: n_frames(item)]]
    if item.is_video:
        # vLLM takes single frames under this name, and detects their format: they may be PNG
        return b'{"type":"video_url","video_url":{"url":"data:video/jpeg;base64,' + b",".join(frames) + b'"}}'
    return b'{"type":"image_url","image_url":{"url":"data:image/png;base64,' + frames[0] + b'"}}'


def n_frames(item: EncoderInput) -> int:
    """Return the frames to send: without a last one that only fills its pair, which the server repeats itself."""
    times = item.timestamps
    return len(times) - 1 if len(times) > 1 and times[-1] == times[-2] else max(1, len(times))


def frame_times(item: EncoderInput) -> dict[str, Any]:
    """Return a video's times as ``media_io_kwargs`` of vLLM: frame numbers in milliseconds."""
    indices = [round(time * _MILLISECONDS) for time in item.timestamps[: n_frames(item)]]
    return {
        "video": {
            "num_frames": -1, "fps": _MILLISECONDS, "frames_indices": indices,
            "total_num_frames": max(indices[-1] + 1, len(indices)),
        }
    }  # fmt: skip


def needs_times(item: EncoderInput) -> bool:
    """Return whether a video's times differ from vLLM's default: one frame a second, at most 32.

    >>> item = EncoderInput(False, "", np.zeros(1, dtype=np.int64), slice(0, 1), timestamps=(0.0, 1.0, 2.0, 2.0))
    >>> needs_times(item)
    False
    """
    times = item.timestamps[: n_frames(item)]
    return len(times) > 32 or times != tuple(float(i) for i in range(len(times)))


VIDEO_MARKS = 2
"""Tokens around ``<|video_pad|>`` that some servers replace with it, and others keep."""


def server_prompt(item: EncoderInput, *, bare: bool = False) -> str:
    """Return the prompt with one placeholder for the whole image or video, as vLLM expands it.

    A video's time marks are written by vLLM, between its time steps, each step with a vision start and end of its own.

    Args:
        item: with pixels.
        bare: whether a video's placeholder has no vision start and end, for a server that keeps those.
    """
    if not item.is_video:
        return item.prompt
    first = item.prompt.index("<", item.prompt.index("\n"))  # after "<|im_start|>user\n"
    last = item.prompt.rindex(VIDEO_PLACEHOLDER) + len(VIDEO_PLACEHOLDER)
    placeholder = "<|video_pad|>" if bare else VIDEO_PLACEHOLDER
    return item.prompt[:first] + placeholder + item.prompt[last:]


def user_turn(prompt: str, placeholder: str) -> str:
    """Return the part of a prompt after an image, up to the end of the turn.

    >>> user_turn("<|im_start|>user <P>Describe the image.<|im_end|><|endoftext|>", "<P>")
    'Describe the image.'
    """
    return prompt.partition(placeholder)[2].partition("<|im_end|>")[0]


def text_body(token_ids: Sequence[NDArray[np.int64]], settings: Mapping[str, Any]) -> bytes:
    """Return a ``/pooling`` request for prompts given as token ids."""
    ids = [one.tolist() for one in token_ids]
    return json.dumps({**settings, "input": ids}, separators=(",", ":")).encode()


def message_body(part: bytes, text: str, settings: Mapping[str, Any]) -> bytes:
    """Return a ``/pooling`` request for one conversation of one message.

    Args:
        part: of :func:`picture_part`, or nothing.
        text: after it.
        settings: the other keys of the request.
    """
    parts = [*([part] if part else []), json.dumps({"type": "text", "text": text}).encode()]
    rest = json.dumps(dict(settings), separators=(",", ":")).encode()
    return b'{"messages":[{"role":"user","content":[' + b",".join(parts) + b"]}]," + rest[1:]


def pooling_settings(model: str, dtype: str) -> dict[str, Any]:
    """Return the keys of every ``/pooling`` request."""
    return {
        "model": model, "task": "token_embed", "encoding_format": "bytes", "embed_dtype": dtype, "endianness": "little",
    }  # fmt: skip


def expected_bytes(n_tokens: int, dim: int, dtype: str) -> int:
    """Return the bytes of ``n_tokens`` token embeddings."""
    return n_tokens * dim * _BYTES[dtype]


def decode(metadata: str | None, body: bytes, *, n_inputs: int, dtype: str) -> list[Float32]:
    """Return the token embeddings of a ``/pooling`` answer of ``encoding_format="bytes"``.

    Args:
        metadata: the header of that name: JSON with the offsets and shape of each input's rows.
        body: the rows, end to end.
        n_inputs: number of inputs sent.
        dtype: the requested dtype.

    Returns:
        For each input in order, float32 (n_tokens, dim), finite.

    Raises:
        EngineResponseError: the header is missing or no JSON, disagrees with the body, or a number is not finite.

    >>> rows = np.eye(2, dtype=np.float16)
    >>> item = {"index": 0, "embed_dtype": "float16", "endianness": "little", "start": 0, "end": 8, "shape": [2, 2]}
    >>> decode(json.dumps({"data": [item]}), rows.tobytes(), n_inputs=1, dtype="float16")[0].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if metadata is None:
        raise EngineResponseError("the answer has no metadata header: is it vLLM's, or has a proxy cut it off?")
    try:
        items = json.loads(metadata)["data"]
        places = {item["index"]: item for item in items}
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise EngineResponseError("the answer's metadata header is not vLLM's JSON") from exc
    if len(items) != n_inputs or set(places) != set(range(n_inputs)):
        raise EngineResponseError(f"the answer is about {len(items)} inputs, {n_inputs} were sent")
    results: list[Float32] = []
    at = 0
    for index in range(n_inputs):
        shape, start, end = _place(places[index], dtype)
        if start != at or end > len(body):
            raise EngineResponseError(
                f"input {index} of the answer should lie in bytes {start} to {end} of {len(body)}, after byte {at}"
            )
        rows = np.frombuffer(body, dtype=f"<f{_BYTES[dtype]}", count=math.prod(shape), offset=start)
        rows = rows.astype(np.float32).reshape(shape)
        if not np.isfinite(rows).all():
            raise EngineResponseError("the server gave NaN or infinity; float16 overflows in some models: try bfloat16")
        results.append(rows)
        at = end
    if at != len(body):
        raise EngineResponseError(f"the answer has {len(body)} bytes, its metadata header tells of {at}")
    return results


def _place(item: Any, dtype: str) -> tuple[tuple[int, int], int, int]:
    """Return the shape, first byte and end of one item of the metadata header."""
    try:
        shape, start, end = tuple(item["shape"]), item["start"], item["end"]
        encoding = item["embed_dtype"], item["endianness"]
    except (KeyError, TypeError) as exc:
        raise EngineResponseError("the answer's metadata header is not vLLM's JSON") from exc
    whole = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    if not whole or len(shape) != 2 or min(shape) < 1 or end - start != math.prod(shape) * _BYTES[dtype]:
        raise EngineResponseError(f"the answer has rows of shape {list(shape)} in bytes {start!r} to {end!r}")
    if encoding != (dtype, "little"):
        raise EngineResponseError(f"the answer is {encoding[0]}, {encoding[1]} endian; expected {dtype}, little")
    return (shape[0], shape[1]), start, end
