from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.pages.video import load_video
from tests.bad_pages import image_bytes, one_page_pdf

av = pytest.importorskip("av")


def make_video(
    path: Path, *, frames: int = 50, rate: int = 10, size=(64, 48), turn: int | None = None, ratio=None
) -> Path:
    """Red in its top left quarter; the bottom right one brightens by 4 each frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.bit_rate = 2_000_000
        if turn is not None:
            stream.set_display_rotation(turn)
        if ratio is not None:
            stream.codec_context.sample_aspect_ratio = ratio
        for i in range(frames):
            pixels = np.zeros((size[1], size[0], 3), np.uint8)
            pixels[: size[1] // 2, : size[0] // 2] = (255, 0, 0)
            pixels[size[1] // 2 :, size[0] // 2 :] = min(255, 4 * i)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_one_frame_a_second_with_its_time(tmp_path):
    video = load_video(make_video(tmp_path / "a.mp4"))
    assert video.timestamps == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert {(frame.mode, frame.size) for frame in video.frames} == {("RGB", (64, 48))}
    for time, frame in zip(video.timestamps, video.frames, strict=True):
        assert frame.getpixel((5, 5))[0] > 180
        assert abs(frame.getpixel((60, 44))[1] - 40 * time) < 25


@pytest.mark.parametrize(("fps", "count"), [(0.5, 3), (2, 10), (10, 50), (1000, 50), (0.001, 1)])
def test_frames_a_second_are_as_asked_and_never_more_than_there_are(tmp_path, fps, count):
    assert len(load_video(make_video(tmp_path / "a.mp4"), fps=fps).frames) == count


@pytest.mark.parametrize("most", [1, 2, 3, 7, 10, 49])
def test_a_long_video_is_sampled_evenly_over_its_whole_length(tmp_path, most):
    video = load_video(make_video(tmp_path / "a.mp4"), fps=10, max_frames=most)
    assert most / 2 <= len(video.frames) <= most
    gaps = np.diff(video.timestamps)
    assert gaps.size == 0 or gaps.max() - gaps.min() < 0.1001
    assert gaps.size == 0 or 5.0 - video.timestamps[-1] <= gaps.max() + 0.1001


@pytest.mark.parametrize("most", [1, 100, 1000])
def test_frames_stay_within_the_pixel_bound(tmp_path, most):
    video = load_video(make_video(tmp_path / "a.mp4"), max_pixels=most)
    width, height = video.frames[0].size
    assert 1 <= width * height <= most
    if most == 1000:
        assert width * height > 900 and width / height == pytest.approx(4 / 3, rel=0.05)


@pytest.mark.parametrize(
    ("turn", "corner"), [(0, "top left"), (90, "bottom left"), (180, "bottom right"), (-90, "top right")]
)
def test_a_turned_recording_is_upright(tmp_path, turn, corner):
    frame = load_video(make_video(tmp_path / "a.mp4", turn=turn)).frames[0]
    assert frame.size == ((48, 64) if turn in (90, -90) else (64, 48))
    x, y = 5 if "left" in corner else frame.width - 6, 5 if "top" in corner else frame.height - 6
    assert frame.getpixel((x, y))[0] > 180


def test_pixels_that_are_not_square_are_stretched(tmp_path):
    from fractions import Fraction

    frame = load_video(make_video(tmp_path / "a.mp4", ratio=Fraction(2, 1))).frames[0]
    assert frame.size == (128, 48)


@pytest.mark.parametrize("suffix", ["mkv", "avi", "mov"])
def test_other_containers_are_read(tmp_path, suffix):
    assert len(load_video(make_video(tmp_path / f"a.{suffix}")).frames) == 5


def bad_file(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data) and folder / name


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:5,\nfile://%s\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("a.mp4", b"", "empty"),
        ("a.mp4", b"hello world " * 99, "not a video that can be read"),
        ("a.mkv", b"\x1aE\xdf\xa3" + bytes(500), "not a video that can be read"),
        ("a.mp4", one_page_pdf(), "not a video that can be read"),
        ("a.png", image_bytes("PNG"), "not a video that can be read"),
        ("a.wav", b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x44\xac\0\0\x88\x58\1\0\2\0\x10\0data\0\0\0\0", "a.wav: "),
    ],
)
def test_what_is_no_video_is_a_page_error_that_names_it(tmp_path, name, data, text):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PageError, match=text) as caught:
        load_video(tmp_path / name)
    assert name in str(caught.value)


def test_a_video_of_an_unknown_codec_is_a_page_error(tmp_path):
    data = make_video(tmp_path / "a.mkv").read_bytes()
    codec = re.search(rb"V_[A-Z0-9/]+", data).group()
    (tmp_path / "b.mkv").write_bytes(data.replace(codec, b"V_" + b"Z" * (len(codec) - 2)))
    with pytest.raises(PageError, match=r"b\.mkv: its codec is unknown"):
        load_video(tmp_path / "b.mkv")


def test_a_video_of_strips_is_a_page_error(tmp_path):
    make_video(tmp_path / "a.mp4", size=(1608, 4))
    with pytest.raises(PageError, match=r"a\.mp4: 1608 x 4: one side is more than 200 times"):
        load_video(tmp_path / "a.mp4")


def test_a_truncated_video_is_a_page_error_and_closes_its_file(tmp_path):
    data = make_video(tmp_path / "a.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(data[: len(data) // 2])
    before = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(PageError, match=r"b\.mp4"):
        load_video(tmp_path / "b.mp4")
    assert len(sorted(Path("/proc/self/fd").iterdir())) == len(before)


def test_a_playlist_does_not_open_the_files_it_names(tmp_path):
    target = make_video(tmp_path / "a.mp4")
    (tmp_path / "list.m3u8").write_bytes(PLAYLIST % str(target).encode())
    (tmp_path / "list.txt").write_bytes(b"ffconcat version 1.0\nfile a.mp4\n")
    with av.open(str(tmp_path / "list.m3u8")) as container:
        assert container.format.name == "hls"  # FFmpeg left to itself would follow it
    for name in ("list.m3u8", "list.txt"):
        with pytest.raises(PageError, match="not a video that can be read"):
            load_video(tmp_path / name)


def test_paths_that_are_no_files_are_errors(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for path, text in (
        (tmp_path, "not a regular"),
        (tmp_path / "pipe.mp4", "not a regular"),
        (tmp_path / "x.mp4", "No such"),
    ):
        with pytest.raises(PageError, match=text):
            load_video(path)
    for wrong in ("https://example.org/a.mp4", b"a.mp4", None, 3):
        with pytest.raises(ConfigError, match="expected the path of a file"):
            load_video(wrong)


@pytest.mark.parametrize(
    "arguments",
    [
        {"fps": 0},
        {"fps": -1},
        {"fps": float("nan")},
        {"fps": True},
        {"max_frames": 0},
        {"max_frames": 2.0},
        {"max_pixels": 0},
    ],
)
def test_wrong_arguments_are_config_errors(tmp_path, arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        load_video(tmp_path / "a.mp4", **arguments)


@pytest.mark.parametrize("error", [RuntimeError("x"), MemoryError(), AttributeError("x"), UserWarning("x")])
def test_whatever_a_decoder_raises_is_a_page_error(tmp_path, monkeypatch, error):
    def broken(*args, **kwargs):
        raise error

    make_video(tmp_path / "a.mp4")
    monkeypatch.setattr(av, "open", broken)
    with pytest.raises(PageError, match=r"a\.mp4: not a video that can be read") as caught:
        load_video(tmp_path / "a.mp4")
    assert caught.value.__cause__ is error
