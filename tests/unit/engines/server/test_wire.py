"""What goes over the wire: pictures without loss, prompts as they are, answers read only when all of it agrees."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from colqwen3_retrievers.engines.server import wire
from colqwen3_retrievers.errors import EngineResponseError
from colqwen3_retrievers.models.families import FAMILIES
from colqwen3_retrievers.models.rendering import EncoderInput, VisualSpan


def picture(frames: int = 1, times: tuple[float, ...] = (), prompt: str = "P") -> EncoderInput:
    pixels = np.random.default_rng(3).integers(0, 255, (frames, 64, 96, 3), dtype=np.uint8)
    span = (VisualSpan(0, 2, 3),)
    return EncoderInput(False, prompt, np.zeros(9, dtype=np.int64), slice(0, 6), span, pixels, times)


def sent_frames(part: bytes, prefix: str) -> np.ndarray:
    (kind,) = [value for key, value in json.loads(part).items() if key != "type"]
    head, _, data = kind["url"].partition(",")
    assert head == prefix
    frames = [Image.open(io.BytesIO(base64.b64decode(one, validate=True))) for one in data.split(",")]
    assert all(frame.format == "PNG" for frame in frames)
    return np.stack([np.asarray(frame) for frame in frames])


def test_an_image_arrives_pixel_for_pixel() -> None:
    item = picture()
    assert np.array_equal(sent_frames(wire.picture_part(item), "data:image/png;base64"), item.pixels)


def test_a_video_arrives_pixel_for_pixel_without_the_frame_that_fills_its_pair() -> None:
    item = picture(4, (0.0, 0.5, 1.0, 1.0))
    assert item.pixels is not None
    assert np.array_equal(sent_frames(wire.picture_part(item), "data:video/jpeg;base64"), item.pixels[:3])
    assert wire.frame_times(item)["video"]["frames_indices"] == [0, 500, 1000]


@pytest.mark.parametrize(
    ("times", "needed"),
    [((0.0, 1.0), False), ((0.0, 1.0, 2.0, 2.0), False), ((0.0, 0.5), True), ((1.0, 2.0), True),
     (tuple(map(float, range(32))), False), (tuple(map(float, range(34))), True)],
)  # fmt: skip
def test_times_are_sent_where_a_server_would_take_others(times: tuple[float, ...], needed: bool) -> None:
    assert wire.needs_times(picture(len(times), times)) is needed


def test_a_videos_prompt_has_one_placeholder() -> None:
    template = FAMILIES["tomoro"].video or ""
    marks = "<0.5 seconds><|vision_start|><|video_pad|><|vision_end|><2.5 seconds>" + wire.VIDEO_PLACEHOLDER
    item = picture(4, (0.0, 1.0, 2.0, 3.0), template.replace("{visual}", marks).replace("{text}", ""))
    whole = template.replace("{visual}", wire.VIDEO_PLACEHOLDER).replace("{text}", "")
    assert wire.server_prompt(item) == whole
    assert wire.server_prompt(item, bare=True) == whole.replace(wire.VIDEO_PLACEHOLDER, "<|video_pad|>")


def test_texts_travel_as_token_ids() -> None:
    body = json.loads(wire.text_body([np.array([5, 6]), np.array([7])], wire.pooling_settings("m", "float16")))
    assert body["input"] == [[5, 6], [7]]
    assert (body["model"], body["encoding_format"], body["embed_dtype"]) == ("m", "bytes", "float16")


def test_a_message_is_json_whatever_the_text() -> None:
    text = 'a "quote", a \\ and\n\u2028 ü 😀'
    body = json.loads(wire.message_body(b'{"type":"image_url"}', text, {"model": "m"}))
    assert body["messages"] == [{"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": text}]}]
    assert body["model"] == "m"


def answer(*shapes: tuple[int, int], **changes: object) -> tuple[str, bytes]:
    items, at = [], 0
    for index, (n, dim) in enumerate(shapes):
        end = at + n * dim * 2
        items.append({"index": index, "embed_dtype": "float16", "endianness": "little", "start": at, "end": end,
                      "shape": [n, dim]})  # fmt: skip
        at = end
    items[0].update(changes)
    return json.dumps({"data": items}), np.arange(at // 2, dtype="<f2").tobytes()


def test_rows_are_read_in_the_order_asked_for() -> None:
    metadata, body = answer((2, 3), (1, 3))
    told = json.loads(metadata)
    told["data"].reverse()
    first, second = wire.decode(json.dumps(told), body, n_inputs=2, dtype="float16")
    assert first.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert second.tolist() == [[6, 7, 8]]
    assert first.dtype == np.float32


@pytest.mark.parametrize(
    "changes",
    [{"index": 1}, {"index": "0"}, {"start": 2}, {"end": 11}, {"shape": [3, 3]}, {"shape": [6]}, {"shape": [0, 3]},
     {"shape": [True, 6]}, {"shape": None}, {"shape": [-2, -3]}, {"embed_dtype": "float32"}, {"endianness": "big"},
     {"start": -12, "end": 0}, {"end": None}],
)  # fmt: skip
def test_an_answer_that_contradicts_itself_is_refused(changes: dict[str, object]) -> None:
    metadata, body = answer((2, 3), **changes)
    with pytest.raises(EngineResponseError):
        wire.decode(metadata, body, n_inputs=1, dtype="float16")


@pytest.mark.parametrize("metadata", [None, "", "[]", "{}", '{"data": 3}', '{"data": [3]}', "[" * 100_000, "\xff"])
def test_metadata_that_is_none_is_refused(metadata: str | None) -> None:
    with pytest.raises(EngineResponseError):
        wire.decode(metadata, b"\0" * 12, n_inputs=1, dtype="float16")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_numbers_that_are_not_finite_are_refused(value: float, dtype: str) -> None:
    rows = np.ones((2, 2), dtype=dtype)
    rows[1, 0] = value
    item = {"index": 0, "embed_dtype": dtype, "endianness": "little", "start": 0, "end": rows.nbytes, "shape": [2, 2]}
    with pytest.raises(EngineResponseError, match="NaN or infinity"):
        wire.decode(json.dumps({"data": [item]}), rows.tobytes(), n_inputs=1, dtype=dtype)
