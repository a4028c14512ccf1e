"""Mutated videos of every kind end in right-shaped frames or an InputError, soon."""

import time
from contextlib import suppress
from functools import cache
from tempfile import NamedTemporaryFile

import av
import numpy as np
import pytest
from hypothesis import given

from mge_runtime.errors import InputError
from mge_runtime.video import Video
from tests.helpers.damage import fuzz, mutated

MAX_PIXELS = 1_000_000
SECONDS = 20  # for one video, on a machine that is busy
FRAMES = 5
KINDS = {  # by suffix: codec, kind of pixels
    "mp4": ("libx264", "yuv420p"),
    "mov": ("png", "rgb24"),
    "avi": ("mjpeg", "yuvj420p"),
    "ts": ("mpeg2video", "yuv420p"),
    "webm": ("libvpx", "yuv420p"),
    "gif": ("gif", "rgb8"),
}


@cache
def seed_file(suffix):
    codec, pixels = KINDS[suffix]
    with NamedTemporaryFile(suffix=f".{suffix}") as file:
        with av.open(file.name, "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
            for number in range(FRAMES):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * number, np.uint8))
                container.mux(stream.encode(frame.reformat(format=pixels)))
            container.mux(stream.encode())
        return file.read()


def frames_of(suffix, data):
    with NamedTemporaryFile(suffix=f".{suffix}") as file:
        file.write(data)
        file.flush()
        with Video(file.name, max_pixels=MAX_PIXELS) as video:
            yield from video


@fuzz(50)
@given(drawn=mutated(KINDS, seed_file))
def test_mutated_videos_are_refused_or_decoded(drawn):
    start = time.process_time()
    with suppress(InputError):
        for frame in frames_of(*drawn):
            assert (frame.image.dtype, frame.image.ndim, frame.image.shape[2]) == (np.uint8, 3, 3)
            assert 0 < frame.image.shape[0] * frame.image.shape[1] <= MAX_PIXELS
            assert np.isfinite(frame.seconds)
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize("suffix", KINDS)
def test_the_videos_that_are_mutated_are_whole(suffix):
    assert len(list(frames_of(suffix, seed_file(suffix)))) == FRAMES


def test_a_video_of_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="a video of a kind that FFmpeg does not know"):
        list(frames_of("mp4", seed_file("mp4").replace(b"avc1", b"zzzz")))
