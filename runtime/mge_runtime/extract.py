"""Plain files out of a bundle, for trtexec, Triton, DeepStream or C++."""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from pathlib import Path

from mge_runtime.bundle import Bundle
from mge_runtime.errors import BundleError
from mge_runtime.files import atomic_path
from mge_runtime.manifest import Manifest
from mge_runtime.spec import BATCH, StageSpec, TensorSpec
from mge_runtime.trt.batch import BatchRange
from mge_runtime.trt.engines import BundleEngines

__all__ = ["extract_bundle", "trtexec_script"]

SCRIPT = "trtexec.sh"


def extract_bundle(bundle: Bundle, folder: str | os.PathLike[str]) -> list[Path]:
    """Write every entry as an ordinary file, and the commands that would rebuild the engines with trtexec.

    Args:
        bundle: open.
        folder: where to; files of the same names are replaced, each whole or not at all.

    Returns:
        The files that were written: `onnx/<stage>.onnx` with `<stage>.weights` beside it, `engines/<target>/...`,
        `manifest.json`, `trtexec.sh`.

    Raises:
        BundleError: an entry was damaged.
        OutputError: the folder cannot be written.
    """
    written = bundle.extract(folder)
    batches: list[BatchRange] = []
    for target in bundle.targets:
        with suppress(BundleError):  # of another version of mge: the graphs come out all the same
            batches.append(BundleEngines(bundle, target).details.batch)
    script = Path(folder) / SCRIPT
    with atomic_path(script) as temporary:
        temporary.write_text(trtexec_script(bundle.manifest, batches[0] if batches else BatchRange()))
    script.chmod(script.stat().st_mode | 0o111)
    return [*written, script]


def trtexec_script(manifest: Manifest, batch: BatchRange) -> str:
    """A shell script that builds each stage's engine with trtexec, beside the extracted `onnx` folder.

    Args:
        manifest: of the bundle.
        batch: what to build for.
    """
    lines = [
        "#!/bin/sh",
        "# Rebuilds the engines of every stage with TensorRT's own tool (10.3 or newer), for the GPU of this machine.",
        "# Precision is in the graphs: --fp16 and its like are neither needed nor known to TensorRT 11. Not yet run.",
        "set -e",
        'cd "$(dirname "$0")"',
        "mkdir -p built",
        *(_command(stage, batch) for stage in manifest.stages),
    ]
    return "\n".join(lines) + "\n"


def _command(stage: StageSpec, batch: BatchRange) -> str:
    shapes = {
        option: ",".join(_shape(tensor, size) for tensor in stage.inputs)
        for option, size in zip(("minShapes", "optShapes", "maxShapes"), batch.sizes, strict=True)
    }
    options = [
        f"--onnx=onnx/{stage.name}.onnx",
        f"--saveEngine=built/{stage.name}.plan",
        "--stronglyTyped",
        "--noTF32",
        *(f"--{option}={value}" for option, value in shapes.items()),
        "--skipInference",
    ]
    return " \\\n  ".join(["trtexec", *map(shlex.quote, options)])


def _shape(tensor: TensorSpec, batch: int) -> str:
    return f"{tensor.name}:" + "x".join(str(batch if axis == BATCH else axis) for axis in tensor.shape)
