"""Frames of videos, cameras and network streams, and predictions that are smoothed over them; needs PyAV."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mge_runtime.errors import InputError, OutputError, brief
from mge_runtime.files import atomic_path
from mge_runtime.machine import import_library, install_extra
from mge_runtime.prediction import softmax
from mge_runtime.sources import MAX_PIXELS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mge_runtime.prediction import Prediction


SILENCE = 10.0  # seconds without a byte, after which a source has failed
PATIENCE = 60.0  # seconds without a frame, for which a live source is connected to again
DAMAGED = 100  # frames in a row that cannot be decoded, after which a source has failed
_WAITS = (0.5, 1, 2, 4, 8)  # seconds before it is connected to again; then the last of them
# A file must lead to no other and to no host, so it may not be one of the playlists that FFmpeg knows; nor a stream to
# a file.
_CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,mxf,nut,ivf,gif,h264,hevc,m4v,mjpeg,mpjpeg"
_NETWORK = "rtsp,rtsps,rtp,http,https,tcp,tls,udp,crypto"


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame, upright."""

    image: NDArray[np.uint8]  # RGB [H, W, 3]
    seconds: float  # since the first frame, by the file's clock; of what is live by ours, since few streams have one
    wall: float  # when it was decoded, seconds since 1970
    number: int  # of the frames that were decoded, from 0; those that were dropped count


class _TooLargeError(InputError):
    """Frames beyond the limit, which connecting again makes no smaller."""


class Video:
    """A source of frames: to be iterated once, and closed.

    A file yields every frame. A camera ("0" is the first) or an address (rtsp://, http:// with MJPEG, ...) is live: it
    is read in a thread, which keeps the newest frame alone, and connected to again where it fails. Rotation that a
    phone has noted is applied. Frames that cannot be decoded are passed over.
    """

    def __init__(self, source: str, *, max_pixels: int = MAX_PIXELS, patience: float = PATIENCE) -> None:
        """Open the source, so that a wrong name is said at once.

        Args:
            source: a path, the number of a camera, or an address.
            max_pixels: the most that a frame may have.
            patience: seconds without a frame after which a live source has failed.

        Raises:
            InputError: it cannot be opened, or has no video.
            BackendError: PyAV is not installed.
        """
        self.name = re.sub("(?<=://)[^/]*@", "", source)  # as it is shown: without a password
        self.live = source.isdecimal() or "://" in source
        self.read = 0  # frames that were decoded
        self.dropped = 0  # of these, frames of a live source that a newer one replaced
        self.damaged = 0  # frames that could not be decoded
        self.reconnected = 0
        self._source, self._max_pixels, self._patience = source, max_pixels, patience
        self._av: Any = import_library("av", install_extra("video"))
        self._av.logging.set_level(None)  # nothing of FFmpeg's on standard error; what matters is raised
        self._container: Any = self._open()  # None: the source has gone
        self._changed = threading.Condition()
        self._newest: Frame | None = None
        self._failure: BaseException | None = None
        self._closed = False
        self._started: float | None = None  # seconds, of the first frame
        self._thread = threading.Thread(target=self._keep_newest, name="mge-video", daemon=True) if self.live else None
        if self._thread is not None:
            self._thread.start()

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading; an iterator that waits ends."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is None:
            self._container.close()
        elif self._thread is not threading.current_thread():
            self._thread.join(0.5)  # it may wait for a silent source, which SILENCE ends

    def __iter__(self) -> Iterator[Frame]:
        """The frames.

        Raises:
            InputError: the source failed: damaged, too large, or silent for too long.
        """
        return self._arriving() if self.live else self._frames()

    def _arriving(self) -> Iterator[Frame]:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._newest or self._failure or self._closed, self._patience + 2 * SILENCE
                )
                if self._closed:
                    return
                if self._newest is None:  # the thread may have no end: sound goes on where the video does not
                    raise self._failure or InputError(f"{self.name} gives no frames any more; gave up")
                frame, self._newest = self._newest, None
            yield frame

    def _keep_newest(self) -> None:
        """The thread: whatever ends it reaches who waits for frames."""
        try:
            self._read_on()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _read_on(self) -> None:
        """Read until closed, and connect again where the source fails.

        Raises:
            InputError: no frame came for too long.
        """
        heard, reason, waits = time.monotonic(), "it ended", chain(_WAITS, repeat(_WAITS[-1]))
        while True:
            try:
                if self._container is None:
                    self._container = self._open()
                    self.reconnected += 1
                for frame in self._frames():
                    heard, waits = time.monotonic(), chain(_WAITS, repeat(_WAITS[-1]))
                    with self._changed:
                        self.dropped += self._newest is not None
                        self._newest = frame
                        self._changed.notify_all()
                    if self._closed:
                        return
            except _TooLargeError:
                raise
            except InputError as error:
                reason = brief(error)
            finally:
                if self._container is not None:
                    self._container.close()
                self._container = None
            if time.monotonic() - heard > self._patience:
                raise InputError(f"{self.name} gives no frames any more ({reason}); gave up")
            with self._changed:
                if self._changed.wait_for(lambda: self._closed, min(next(waits), self._patience)):
                    return

    def _open(self) -> Any:
        name, form = self._source, None
        options = {"max_pixels": str(self._max_pixels)}  # FFmpeg allocates nothing larger
        if name.isdecimal():
            name, form = f"/dev/video{name}", "video4linux2"
        elif self.live:
            options["protocol_whitelist"] = _NETWORK
        else:
            options |= {"protocol_whitelist": "file", "format_whitelist": _CONTAINERS}
            name = f"file:{os.path.abspath(name)}"  # noqa: PTH100 - Path would fold names that the system knows apart
        try:
            container = self._av.open(
                name, format=form, options=options, timeout=(SILENCE, SILENCE), metadata_errors="replace"
            )
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            raise InputError(
                f"cannot open the video {self.name}: {self._brief(error)}; expected a video file, the number of a "
                "camera, or an address such as rtsp://host/stream"
            ) from error
        stream = next(iter(container.streams.video), None)
        if stream is None or stream.codec_context is None:
            container.close()
            found = "no video" if stream is None else "a video of a kind that FFmpeg does not know here"
            raise InputError(f"{self.name} has {found} in it; expected a video file, a camera or a stream")
        stream.thread_type = "NONE" if self.live else "AUTO"  # frame threads hold frames back
        stream.codec_context.options = {"max_pixels": str(self._max_pixels)}
        try:
            self._check(stream.codec_context.width or 0, stream.codec_context.height or 0)
        except InputError:
            container.close()
            raise
        return container

    def _check(self, width: int, height: int) -> None:
        if width * height > self._max_pixels:
            raise _TooLargeError(
                f"{self.name} has frames of {width} x {height} pixels; expected at most {self._max_pixels} pixels: "
                "give it in a smaller size, or allow more with --max-pixels"
            )

    def _frames(self) -> Generator[Frame]:
        """Decode to the end of the source, as it is open now."""
        errors, bad, first = self._av.error, 0, True
        frames = self._decoded()
        while True:
            try:
                frame = next(frames)
            except (StopIteration, errors.EOFError):
                if not self.read and not self.live:
                    raise InputError(f"{self.name} has no frame that can be decoded; expected a video") from None
                return
            except errors.InvalidDataError as error:
                self.damaged, bad = self.damaged + 1, bad + 1
                if bad < DAMAGED:
                    frames = self._decoded()  # a generator that raised has ended
                    continue
                raise InputError(f"{self.name} is damaged: {DAMAGED} frames in a row cannot be decoded") from error
            except (errors.FFmpegError, OSError) as error:
                # FFmpeg's word for more than `max_pixels`; after good frames also for a damaged header.
                limit = first and isinstance(error, ValueError)
                raise (_TooLargeError if limit else InputError)(
                    f"cannot read {self.name} any further: {self._brief(error)}; expected whole frames of at most "
                    f"{self._max_pixels} pixels (--max-pixels)"
                ) from error
            bad, first = 0, False
            yield frame

    def _decoded(self) -> Generator[Frame]:
        stream = self._container.streams.video[0]
        for packet in self._container.demux():
            if self._closed:
                return
            for raw in packet.decode() if packet.stream.index == stream.index else ():
                yield self._frame(raw)

    def _brief(self, error: BaseException) -> str:
        return brief(error).replace(self._source, self.name)

    def _frame(self, raw: Any) -> Frame:
        self._check(raw.width, raw.height)
        # FFmpeg says by how many degrees to turn the frame counterclockwise.
        image = np.ascontiguousarray(np.rot90(raw.to_ndarray(format="rgb24"), round(raw.rotation / 90) % 4))
        rate = self._container.streams.video[0].average_rate or 25
        clock = float(self.read / rate if raw.time is None else raw.time)
        clock = time.monotonic() if self.live else clock
        if self._started is None:
            self._started = clock
        self.read += 1
        return Frame(image, clock - self._started, time.time(), self.read - 1)


class Smoother:
    """Predictions of one scene, smoothed over time: the weighted mean of log-probabilities, which decays.

    s(t) = sum_i d^(t - t_i) log p_i / sum_i d^(t - t_i) over the frames i until t, with d = 2^(-1 / half_life): the
    logarithmic opinion pool (Genest and Zidek, Statistical Science 1986) of what was seen, old frames counting less.
    Frames that were dropped make no difference to how fast it forgets. There are no tracks: one scene is one subject.
    """

    def __init__(self, half_life: float) -> None:
        """`half_life` > 0: seconds after which a frame counts half."""
        self._half_life = half_life
        self._seconds = 0.0
        self._sum: NDArray[np.float64] | None = None
        self._weight = 0.0

    def add(self, prediction: Prediction, seconds: float) -> Prediction:
        """The prediction of a frame at this time, with the scene's classes and probabilities instead of its own.

        Boxes, heat maps, experts and `rejected` stay the frame's; `set` and `coarse`, whose guarantee is for single
        images, are None.
        """
        temperature = prediction.temperature or 1.0
        logs = np.log(np.maximum(softmax(prediction.logits / np.float64(temperature)), 1e-30))
        decay = 0.5 ** (max(seconds - self._seconds, 0.0) / self._half_life)
        self._sum = logs if self._sum is None else decay * self._sum + logs
        self._weight = decay * self._weight + 1
        self._seconds = max(seconds, self._seconds)
        smooth = (self._sum / self._weight * temperature).astype(np.float32)
        return replace(prediction, logits=smooth, set=None, coarse=None)


class VideoWriter:
    """Writes an MP4 file whose frames keep their times, H.264 where PyAV has an encoder for it; by `video_writer`."""

    def __init__(self, container: Any) -> None:
        self._container = container
        self._stream: Any = None
        self._last = -1
        self.frames = 0

    def add(self, image: NDArray[np.uint8], seconds: float) -> None:
        """Append a frame, uint8 RGB [H, W, 3]; all are scaled to the first one's size, made even."""
        import av

        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        if self._stream is None:
            if "libx264" in av.codecs_available:
                quality = {"preset": "veryfast", "crf": "23"}
                self._stream = self._container.add_stream("libx264", rate=30, options=quality)
            else:  # a build of FFmpeg without what is under the GPL
                self._stream = self._container.add_stream("mpeg4", rate=30, bit_rate=4_000_000)
            self._stream.width, self._stream.height = (max(side // 2 * 2, 2) for side in (frame.width, frame.height))
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = Fraction(1, 1000)
        self._last, self.frames = max(round(seconds * 1000), self._last + 1), self.frames + 1
        scaled = frame.reformat(width=self._stream.width, height=self._stream.height, format="yuv420p")
        scaled.pts, scaled.time_base = self._last, Fraction(1, 1000)
        self._container.mux(self._stream.encode(scaled))

    def finish(self) -> None:
        """Write what the encoder holds back."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())


@contextmanager
def video_writer(path: Path) -> Generator[VideoWriter]:
    """Open an MP4 file that appears whole at the end of the block, or not at all.

    Raises:
        OutputError: it cannot be written.
        BackendError: PyAV is not installed.
    """
    av: Any = import_library("av", install_extra("video"))
    with atomic_path(path) as temporary:
        try:
            with av.open(str(temporary), "w", format="mp4") as container:
                writer = VideoWriter(container)
                yield writer
                writer.finish()
        except av.error.FFmpegError as error:
            raise OutputError(f"cannot write {path}: {brief(error)}; name another place for --save") from error
        if not writer.frames:
            raise OutputError(f"{path} is not written: there was no frame to draw")
