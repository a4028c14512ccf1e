"""What `mge-bench` measures or checks: a bundle on one backend, and the images it is given."""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mge_runtime.backends import choose
from mge_runtime.bundle import Bundle
from mge_runtime.compare import TOLERANCES, Tolerances
from mge_runtime.decode import MAX_PIXELS, open_image
from mge_runtime.errors import InputError
from mge_runtime.machine import Machine, describe_machine
from mge_runtime.manifest import Manifest, Preprocess
from mge_runtime.pipeline import Pipeline
from mge_runtime.preprocess import to_frame

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from mge_runtime.decode import ImageSource
    from mge_runtime.sources import NamedImage


_MOST_IMAGES = 64  # their frames stay in memory, 600 kB each at 448 pixels
_SYNTHETIC, _HEIGHT, _WIDTH = 12, 960, 1280  # images (a batch of eight and a remainder), pixels


@dataclass(frozen=True)
class Subject:
    """A bundle on one backend."""

    path: Path
    manifest: Manifest
    manifest_sha256: str
    targets: tuple[str, ...]  # that the bundle holds engines for
    calibrated: bool
    backend: str  # "onnxruntime", "tensorrt" or "tensorrt-rtx"
    device: str  # "cpu" or "cuda:0"
    options: Mapping[str, Any]  # other arguments of `Pipeline.open`: threads, mmap, max_pixels
    machine: Machine
    open: Callable[..., Pipeline]  # opens it anew; takes `cuda_graphs` of `Pipeline.open`
    reference: Callable[..., Pipeline] | None  # opens ONNX Runtime on the CPU; None: that is what is checked

    @property
    def precision(self) -> str:
        """Of its graphs: "fp32", "fp16" or "int8"."""
        if self.manifest.is_int8:
            return "int8"
        return "fp32" if all(plan.get("type") == "fp32" for plan in self.manifest.precision.values()) else "fp16"

    @property
    def tolerances(self) -> Tolerances:
        """How far its outputs may be from a reference's: those of the export."""
        return TOLERANCES[self.precision]


def open_subject(
    path: str | os.PathLike[str],
    device: str = "auto",
    backend: str = "auto",
    threads: int | None = None,
    *,
    mmap: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> Subject:
    """Choose what runs a bundle here; takes what `Pipeline.open` takes.

    Where engines are missing that would run, the logger "mge_runtime" gets one line with the command to build them.

    Raises:
        BundleError: the file is missing, no bundle or damaged.
        BackendError: nothing can run it here.
    """
    options: dict[str, Any] = {"threads": threads, "mmap": mmap, "max_pixels": max_pixels}
    with Bundle.open(path) as bundle:
        bundle.verify()  # a report names the manifest's hash, and opening does not hash the weights
        choice = choose(device, backend, bundle=bundle)
        choice.warn_of_missing_engines()
        on_cpu = partial(Pipeline.open, path, "cpu", "onnxruntime", **options)
        return Subject(
            path=bundle.path,
            manifest=bundle.manifest,
            manifest_sha256=bundle.manifest_sha256,
            targets=bundle.targets,
            calibrated=bundle.calibration() is not None,
            backend=choice.backend,
            device=choice.device,
            options=options,
            machine=describe_machine(always=True),
            open=partial(Pipeline.open, path, choice.device, choice.backend, **options),
            reference=None if choice.device == "cpu" else on_cpu,
        )


@dataclass(frozen=True)
class Images:
    """Images as files and as frames."""

    files: tuple[ImageSource, ...]
    frames: NDArray[np.uint8]  # [N, S, S, 3], RGB, of the same images
    source: str  # for people

    @classmethod
    def read(
        cls,
        named: Sequence[NamedImage],
        subject: Subject,
        *,
        problem: Callable[[InputError], None],
        seconds: float = math.inf,
    ) -> Images:
        """The first 64 named images that can be read, as frames for a bundle; synthetic ones where none is named.

        Args:
            named: where to read from.
            subject: says how frames are made, and how many pixels an image may have.
            problem: is told of each image that cannot be read; it is left out.
            seconds: after which no more are read, but one.

        Raises:
            InputError: none can be read.
        """
        spec = subject.manifest.preprocess
        if not named:
            return cls.synthetic(spec)
        files: list[ImageSource] = []
        frames: list[NDArray[np.uint8]] = []
        problems: list[InputError] = []
        end = time.perf_counter() + seconds
        for image in named:
            if frames and (time.perf_counter() >= end or len(frames) == _MOST_IMAGES):
                break
            try:
                source = image.source()
                frames.append(to_frame(open_image(source, subject.options["max_pixels"]), spec)[0])
                files.append(source)
            except InputError as error:
                problems.append(error)
        if not frames:
            raise problems[0]
        for error in problems:
            problem(error)
        count = f"{len(files)}" if len(files) == len(named) else f"{len(files)} of {len(named)}"
        return cls(tuple(files), np.stack(frames), f"{count} named images")

    @classmethod
    def synthetic(cls, spec: Preprocess) -> Images:
        """`synthetic_image` as JPEG files, the same at every call.

        A network is less certain of them than of photographs, so differences change classes sooner.
        """
        files: list[bytes] = []
        for seed in range(_SYNTHETIC):
            buffer = io.BytesIO()
            synthetic_image(seed, _WIDTH, _HEIGHT).save(buffer, "JPEG", quality=90)
            files.append(buffer.getvalue())
        frames = np.stack([to_frame(open_image(file), spec)[0] for file in files])
        source = f"{_SYNTHETIC} synthetic JPEG files of {_WIDTH} x {_HEIGHT} pixels; name images to use them instead"
        return cls(tuple(files), frames, source)

    def batch(self, number: int, size: int) -> tuple[list[ImageSource], NDArray[np.uint8]]:
        """The images of one run, in turn and again from the start."""
        places = [(number * size + place) % len(self.files) for place in range(size)]
        return [self.files[place] for place in places], self.frames[places]


def synthetic_image(seed: int, width: int, height: int) -> Image:
    """A soft background, shapes and grain, in RGB; the same for a seed and a size in pixels."""
    from PIL import Image, ImageDraw

    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw, side = ImageDraw.Draw(image), min(width, height)
    for _ in range(6):
        x, y = random.uniform(0, (width, height))
        across, down = random.uniform(side / 20, side / 3, 2)
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        red, green, blue = (int(value) for value in random.integers(0, 256, 3))
        shape((x - across, y - down, x + across, y + down), fill=(red, green, blue))
    grain = random.normal(0, 8, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
