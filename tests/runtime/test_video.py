"""Videos and streams: every frame of a file, the newest of a stream, smoothing, damage, silence, limits."""

import functools
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import pytest
from PIL import Image

from mge_runtime import Pipeline, video
from mge_runtime.cli.run import main
from mge_runtime.errors import InputError, OutputError
from mge_runtime.prediction import softmax
from mge_runtime.video import Smoother, Video, video_writer
from tests.helpers.commands import fails, succeeds
from tests.helpers.images import NOISE

COMMAND = [sys.executable, "-c", "from mge_runtime.cli.run import main; main(prog_name='mge-run')"]
GRAY = range(20, 220, 20)  # of the frames, in their order


def shaded(gray, size=(64, 48)):
    """A gray frame that is darker to the right, so that a rotation shows."""
    row = np.linspace(1, 0.5, size[0])[None, :, None]
    return np.broadcast_to((gray * row).astype(np.uint8), (size[1], size[0], 3))


def write_video(path, *, rate=10, rotation=0, size=(64, 48), title=""):
    with av.open(str(path), "w") as container:
        container.metadata["title"] = title
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for gray in GRAY:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(shaded(gray, size)))))
        container.mux(stream.encode())
    if rotation:  # a phone notes it in the track's matrix, which no PyAV writes: 90 degrees clockwise
        content = bytearray(path.read_bytes())
        one = (1 << 16).to_bytes(4, "big")
        zero, minus = bytes(4), (-(1 << 16)).to_bytes(4, "big", signed=True)
        plain = one + zero * 3 + one + zero * 3 + (1 << 30).to_bytes(4, "big")
        place = content.index(plain, content.index(b"tkhd"))
        content[place : place + 20] = zero + one + zero + minus + zero
        path.write_bytes(content)
    return path


def jpeg(gray, size=(64, 48)):
    file = io.BytesIO()
    Image.fromarray(shaded(gray, size)).save(file, "JPEG")
    return file.getvalue()


def write_with_sound(file, more=0):
    """An MPEG transport stream of sound and video; `more` sound comes after it."""
    with av.open(file, "w", format="mpegts") as container:
        sound, video = container.add_stream("mp2", rate=16000), container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), "s16", "mono")
        silence.sample_rate = 16000
        for gray in GRAY:
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(shaded(gray)))))
            container.mux(sound.encode(silence))
        container.mux(video.encode())
        for _ in range(more):
            container.mux(sound.encode(silence))


def sound_goes_on(content):
    """Half of it at once, the rest bit by bit."""
    half = len(content) // 2
    yield content[:half]
    for start in range(half, len(content), 1880):
        yield content[start : start + 1880]
        time.sleep(0.05)


@contextmanager
def camera(*sessions, mjpeg=True):
    """A server whose connections are served by these functions in turn, the last one ever after; MJPEG, or as it is."""
    served = itertools.chain(sessions, itertools.repeat(sessions[-1]))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            session = next(served)
            if session is None:
                self.send_error(503)
                return
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame" if mjpeg else "video/mp2t")
            self.end_headers()
            head = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n"
            try:
                for part in session():
                    self.wfile.write(head % (len(part), part) if mjpeg else part)
            except OSError:
                pass

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/camera.mjpg"
    finally:
        server.shutdown()
        server.server_close()


def endless(pause=0.02, size=(64, 48)):
    for gray in itertools.cycle(GRAY):
        yield jpeg(gray, size)
        time.sleep(pause)


def few(pause=0.02):
    yield from itertools.islice(endless(pause), 15)


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(video, "SILENCE", 1.0)
    monkeypatch.setattr(video, "_WAITS", (0.05,))


def test_every_frame_of_a_file_comes_once_with_its_time(tmp_path):
    with Video(str(write_video(tmp_path / "a.mp4"))) as source:
        frames = list(source)
    assert [frame.number for frame in frames] == list(range(len(GRAY)))
    np.testing.assert_allclose([frame.seconds for frame in frames], np.arange(len(GRAY)) / 10, atol=1e-3)
    for frame, gray in zip(frames, GRAY, strict=True):
        assert frame.image.shape == (48, 64, 3)
        assert np.abs(frame.image.astype(int) - shaded(gray)).mean() < 6
    assert (source.read, source.dropped, source.damaged) == (len(GRAY), 0, 0)


def test_every_frame_of_a_file_with_sound_comes(tmp_path):
    write_with_sound(str(tmp_path / "a.ts"))
    with Video(str(tmp_path / "a.ts")) as source:
        assert len(list(source)) == len(GRAY)


def test_the_rotation_of_a_phone_is_applied(tmp_path):
    with Video(str(write_video(tmp_path / "a.mp4", rotation=90))) as source:
        frame = list(source)[-1]
    upright = np.rot90(shaded(GRAY[-1]), -1)  # clockwise
    assert frame.image.shape == upright.shape
    assert np.abs(frame.image.astype(int) - upright).mean() < 6


def test_of_a_stream_the_newest_frame_comes_and_the_rest_is_counted():
    with camera(endless) as address, Video(address) as source:
        frames = []
        for frame in source:
            frames.append(frame)
            time.sleep(0.3)  # a slow reader
            if len(frames) == 4:
                break
    numbers = [frame.number for frame in frames]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] > 10
    assert source.dropped >= numbers[-1] - len(frames) - 1
    seconds = [frame.seconds for frame in frames]
    assert seconds == sorted(seconds)


def test_a_stream_that_dies_is_connected_to_again_and_time_goes_on():
    with camera(few, None, None, endless) as address, Video(address) as source:
        frames = list(itertools.islice(source, 40))
    assert source.reconnected >= 1
    seconds = np.array([frame.seconds for frame in frames])
    assert (np.diff(seconds) >= 0).all()


def silent():
    yield from few(0)
    time.sleep(30)


def garbage():
    yield from few(0)
    while True:
        yield os.urandom(4000)
        time.sleep(0.001)


@pytest.mark.parametrize("session", [silent, garbage, few])
def test_a_stream_that_gives_nothing_any_more_ends_with_one_line(session):
    dead = itertools.chain([session], itertools.repeat(None))
    with camera(*itertools.islice(dead, 3)) as address, Video(address, patience=2) as source:
        started = time.monotonic()
        with pytest.raises(InputError, match="gives no frames any more"):
            list(source)
    assert time.monotonic() - started < 15
    assert source.read > 0


def test_a_stream_without_video_ends_with_one_line_while_its_sound_goes_on():
    file = io.BytesIO()
    write_with_sound(file, more=2000)
    session = functools.partial(sound_goes_on, file.getvalue())
    with camera(session, mjpeg=False) as address, Video(address, patience=1) as source:
        with pytest.raises(InputError, match=r"/camera.mjpg gives no frames any more; gave up"):
            list(source)
        assert source.read > 0


def test_a_password_is_not_shown(bundle_path):
    with camera(few, None) as address:
        address = address.replace("//", "//me:pass@word@")
        with Video(address, patience=0.1) as source, pytest.raises(InputError) as failed:
            list(source)
    with pytest.raises(InputError) as refused:
        Video(address)
    printed = fails(main, "--engine", bundle_path, "--video", address, "--json")
    for line in (source.name, str(failed.value), str(refused.value), printed):
        assert "http://127.0.0.1:" in line
        assert "word" not in line


def test_a_title_that_is_no_text_is_no_reason(tmp_path):
    path = write_video(tmp_path / "a.mp4", title="caffee")
    path.write_bytes(path.read_bytes().replace(b"caffee", b"caff\xe9s"))
    with Video(str(path)) as source:
        assert len(list(source)) == len(GRAY)


def test_damaged_frames_are_passed_over_and_counted(tmp_path):
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for gray in GRAY:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(shaded(gray)))))
    content = bytearray(path.read_bytes())
    starts = [found.start() for found in re.finditer(b"\xff\xd8\xff", content)]
    for number in (2, 5):  # the image, not the header of the next one
        content[starts[number] + 2 : starts[number + 1] - 20] = bytes(starts[number + 1] - starts[number] - 22)
    path.write_bytes(content)
    with Video(str(path)) as source:
        seconds = [frame.seconds for frame in source]
    assert seconds == pytest.approx([0, 0.1, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9])
    assert (source.read, source.damaged) == (8, 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.mp4", None, "cannot open the video"),
        ("empty.mp4", b"", "cannot open the video"),
        ("noise.mp4", NOISE.tobytes(), "cannot open the video|no frame|has no video"),
        (
            "list.m3u8",
            b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
            "cannot open the video|no frame",
        ),
        ("concat.txt", b"ffconcat version 1.0\nfile 'http://127.0.0.1:9/a.mp4'\n", "cannot open the video|no frame"),
    ],
)
def test_what_is_no_video_is_refused_in_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(Video(str(tmp_path / name)))


def test_a_file_leads_to_no_other(tmp_path):
    write_video(tmp_path / "other.mp4")
    (tmp_path / "clip.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    with pytest.raises(InputError, match="cannot open the video"):
        Video(str(tmp_path / "clip.mp4"))


def test_what_was_drawn_before_stays_where_there_is_no_frame(tmp_path, bundle_path):
    path = write_video(tmp_path / "a.ts")
    path.write_bytes(path.read_bytes()[:400])
    (tmp_path / "o.mp4").write_bytes(b"kept")
    fails(main, "--engine", bundle_path, "--video", path, "--save", tmp_path / "o.mp4")
    assert (tmp_path / "o.mp4").read_bytes() == b"kept"


def test_frames_beyond_the_limit_are_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    with pytest.raises(InputError, match="64 x 48 pixels; expected at most 1000 pixels"):
        Video(str(path), max_pixels=1000)


def large():
    yield from endless(size=(640, 480))


@pytest.mark.parametrize("sessions", [[large], [few, large]])
def test_a_stream_beyond_the_limit_is_not_connected_to_until_patience_ends(sessions):
    with (
        camera(*sessions) as address,
        pytest.raises(InputError, match=r"^cannot read .* expected whole frames of at most 10000 pixels"),
        Video(address, max_pixels=10_000) as source,
    ):
        list(source)


def test_no_camera_is_one_line():
    with pytest.raises(InputError, match="cannot open the video 97"):
        Video("97")


def test_smoothing_is_its_formula(bundle_path, photos):
    with Pipeline.open(bundle_path, device="cpu") as pipeline:
        predictions = [pipeline.predict(photo) for photo in photos[:4]]
    smoother, times = Smoother(0.5), [0.0, 0.1, 0.7, 0.75]
    for until in range(4):
        found = smoother.add(predictions[until], times[until])
        weights = [0.5 ** ((times[until] - moment) / 0.5) for moment in times[: until + 1]]
        logs = [np.log(softmax(p.logits / (p.temperature or 1))) for p in predictions[: until + 1]]
        expected = softmax(np.average(logs, axis=0, weights=weights))
        np.testing.assert_allclose(softmax(found.logits / (found.temperature or 1)), expected, atol=1e-5)
    assert np.array_equal(found.boxes, predictions[3].boxes)


def test_the_command_prints_and_draws_every_frame_of_a_file(tmp_path, bundle_path):
    path = write_video(tmp_path / "a.mp4")
    printed = succeeds(main, "--engine", bundle_path, "--video", path, "--json", "--save", tmp_path / "o.mp4")
    lines = [json.loads(line) for line in printed.stdout.splitlines() if line.startswith("{")]
    assert [line["frame"] for line in lines] == list(range(len(GRAY)))
    assert [line["seconds"] for line in lines] == pytest.approx([k / 10 for k in range(len(GRAY))], abs=2e-3)
    with Video(str(path)) as source, Pipeline.open(bundle_path, device="cpu") as pipeline:
        expected = [pipeline.predict(frame.image).class_name for frame in source]
    assert [line["class_name"] for line in lines] == expected
    with av.open(str(tmp_path / "o.mp4")) as container:
        drawn = [frame.time for frame in container.decode(video=0)]
    assert drawn == pytest.approx([line["seconds"] for line in lines], abs=2e-3)


def test_without_an_encoder_for_h264_there_is_another(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    with video_writer(tmp_path / "o.mp4") as writer:
        for number, gray in enumerate(GRAY):
            writer.add(shaded(gray), number / 10)
    with av.open(str(tmp_path / "o.mp4")) as container:
        frames = list(container.decode(video=0))
        assert container.streams.video[0].codec_context.name == "mpeg4"
    assert [frame.time for frame in frames] == pytest.approx([number / 10 for number in range(len(GRAY))], abs=2e-3)
    assert np.abs(frames[-1].to_ndarray(format="rgb24").astype(int) - shaded(GRAY[-1])).mean() < 6


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_signal_ends_a_camera_with_a_whole_file(tmp_path, bundle_path):
    with camera(endless) as address:
        arguments = ["--engine", bundle_path, "--video", address, "--save", tmp_path / "o.mp4", "--smooth", "0.5"]
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        shown = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGTERM)
        rest, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "dropped for newer ones" in said
    with av.open(str(tmp_path / "o.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == len(shown) + len(rest.splitlines())


def test_what_was_drawn_stays_where_the_bundle_is_overwritten(tmp_path, copy):
    with camera(endless) as address:
        arguments = ["--engine", copy, "--video", address, "--save", tmp_path / "o.mp4"]
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        shown = [process.stdout.readline() for _ in range(3)]
        copy.write_bytes(copy.read_bytes())
        rest, said = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "was overwritten while it was open" in said.splitlines()[-1]
    with av.open(str(tmp_path / "o.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == len(shown) + len(rest.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--video", "./a.mp4", "--save", "a.mp4"], "is the video itself"),
        (["a.png", "--video", "0"], "cannot use images"),
        (["--video", "0", "--save", "folder"], "a file that ends with .mp4"),
        (["--video", "0", "--top-k", "3"], "cannot use --top-k; add --json"),
        (["--smooth", "1", "a.png"], "--smooth averages over the frames"),
    ],
)
def test_options_that_do_not_fit_are_usage_errors(arguments, message):
    assert message in fails(main, *arguments, code=2)


def test_a_video_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(OutputError), video_writer(tmp_path / "no" / "o.mp4"):
        pass
