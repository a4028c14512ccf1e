"""Plain files out of a bundle, for trtexec, Triton, DeepStream or C++."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mge_runtime.bundle import Bundle
from mge_runtime.errors import BundleError
from mge_runtime.fields import JsonValue
from mge_runtime.files import atomic_path
from mge_runtime.manifest import BATCH, GraphSpec, Manifest, TensorSpec
from mge_runtime.trt.engines import BundleEngines
from mge_runtime.trt.target import BatchRange

__all__ = ["LABELS", "extract_bundle", "trtexec_script", "write_labels"]

SCRIPT = "trtexec.sh"
LABELS = "labels.txt"


def extract_bundle(bundle: Bundle, folder: str | os.PathLike[str]) -> list[Path]:
    """Write every entry as an ordinary file, and the commands that would rebuild engines with trtexec.

    Args:
        bundle: open.
        folder: where to; files of the same names are replaced, each whole or not at all.

    Returns:
        The files that were written: `onnx/chain.onnx`, the whole chain, `onnx/<graph>.onnx`, both with the
        `<graph>.weights` beside them, `onnx/labels.txt`, a class a line, `engines/<target>/...`, `manifest.json`,
        `trtexec.sh` for the default batch sizes, and one beside the engines of each TensorRT target with the options
        that they were built with.

    Raises:
        BundleError: an entry was damaged.
        OutputError: the folder cannot be written.
    """
    written = bundle.extract(folder)
    scripts = {Path(folder) / SCRIPT: trtexec_script(bundle.manifest, BatchRange())}
    for target in bundle.targets:
        with suppress(BundleError):  # of another version of mge: the graphs come out all the same
            engines = BundleEngines(bundle, target)
            if engines.target.backend == "tensorrt":
                place = Path(folder) / "engines" / target / SCRIPT
                options = engines.details.options
                scripts[place] = trtexec_script(
                    bundle.manifest,
                    engines.details.batch,
                    level=options.get("optimization_level"),
                    workspace=options.get("workspace"),
                    top="../..",
                )
    for script, text in scripts.items():
        with atomic_path(script) as temporary:
            temporary.write_text(text)
        script.chmod(script.stat().st_mode | 0o111)
    labels = Path(folder) / "onnx" / LABELS
    write_labels(labels, bundle.manifest.class_names)
    return [*written, labels, *scripts]


def write_labels(path: Path, class_names: Sequence[str]) -> None:
    """Write one class a line, by index.

    Raises:
        OutputError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")


def trtexec_script(
    manifest: Manifest,
    batch: BatchRange,
    *,
    level: JsonValue = None,
    workspace: JsonValue = None,
    top: str = ".",
) -> str:
    """A shell script that builds each graph's engine with trtexec, from the extracted `onnx` folder.

    Args:
        manifest: of the bundle.
        batch: what to build for.
        level: optimisation level, 0 to 5; None: trtexec's default.
        workspace: bytes that a layer may use beside its tensors; None: all of the device's.
        top: the folder with `onnx`, from the script's.
    """
    extra = [] if level is None else [f"--builderOptimizationLevel={level}"]
    extra += [] if workspace is None else [f"--memPoolSize=workspace:{workspace}B"]
    lines = [
        "#!/bin/sh",
        "# Builds the engine of every graph with full TensorRT's own tool (10.3 or newer), for this machine's GPU.",
        "# Precision is in the graphs: --fp16 and its like are neither needed nor known to TensorRT 11. Not yet run.",
        "# Engines of TensorRT-RTX are built with mge-build --target rtx:..., which needs no GPU.",
        "set -e",
        'cd "$(dirname "$0")"',
        "mkdir -p built",
        *(_command(graph, batch, extra, top) for graph in manifest.graphs),
    ]
    return "\n".join(lines) + "\n"


def _command(graph: GraphSpec, batch: BatchRange, extra: Sequence[str], top: str) -> str:
    shapes = {
        option: ",".join(_shape(tensor, size) for tensor in graph.inputs)
        for option, size in zip(("minShapes", "optShapes", "maxShapes"), batch.sizes, strict=True)
    }
    options = [
        f"--onnx={top}/onnx/{graph.name}.onnx",
        f"--saveEngine=built/{graph.name}.plan",
        "--stronglyTyped",
        "--noTF32",
        *(f"--{option}={value}" for option, value in shapes.items()),
        *extra,
        "--skipInference",
    ]
    return " \\\n  ".join(["trtexec", *map(shlex.quote, options)])


def _shape(tensor: TensorSpec, batch: int) -> str:
    return f"{tensor.name}:" + "x".join(str(batch if axis == BATCH else axis) for axis in tensor.shape)
