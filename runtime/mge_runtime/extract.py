"""Write a bundle's contents as plain files, for trtexec, Triton, DeepStream or C++."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mge_runtime.bundle import Bundle
from mge_runtime.files import atomic_path
from mge_runtime.manifest import BATCH, GraphSpec, Manifest
from mge_runtime.trt.target import BatchRange

__all__ = ["LABELS", "extract_bundle", "write_labels"]

LABELS = "labels.txt"


def extract_bundle(bundle: Bundle, folder: str | os.PathLike[str]) -> list[Path]:
    """Write every entry as an ordinary file, checked against its hash, and commands that build engines with trtexec.

    `onnx/chain.onnx`, the whole chain, and each `onnx/<graph>.onnx` are then ordinary ONNX models with external data.

    Args:
        bundle: open.
        folder: where to; files of the same names are replaced, each whole or not at all.

    Returns:
        The files that were written: those two with the `<graph>.weights` beside them, `onnx/labels.txt`, a class a
        line, `engines/<target>/...`, `manifest.json`, `calibration.json`, `trtexec.sh`.

    Raises:
        BundleError: an entry was damaged.
        OutputError: the folder cannot be written.
    """
    written: list[Path] = []
    for name in bundle.sizes:
        target = Path(folder) / name  # names were checked: none leads out of the folder
        with suppress(OSError):  # atomic_path says what is wrong with the folder
            target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary, temporary.open("wb") as out:
            out.writelines(bundle.chunks(name))
        written.append(target)
    script, labels = Path(folder) / "trtexec.sh", Path(folder) / "onnx" / LABELS
    with atomic_path(script) as temporary:
        temporary.write_text(_trtexec_script(bundle.manifest, BatchRange()))
    script.chmod(script.stat().st_mode | 0o111)
    write_labels(labels, bundle.manifest.class_names)
    return [*written, labels, script]


def write_labels(path: Path, class_names: Sequence[str]) -> None:
    """Write one class a line, by index.

    Raises:
        OutputError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")


def _trtexec_script(manifest: Manifest, batch: BatchRange) -> str:
    lines = [
        "#!/bin/sh",
        "# Builds the engine of every graph with full TensorRT's own tool (10.3 or newer), for this machine's GPU.",
        "# Precision is in the graphs: --fp16 and its like are neither needed nor known to TensorRT 11. Not yet run.",
        "# Engines of TensorRT-RTX are built with mge-build --target rtx:..., which needs no GPU.",
        "set -e",
        'cd "$(dirname "$0")"',
        "mkdir -p built",
        *(_command(graph, batch) for graph in manifest.graphs),
    ]
    return "\n".join(lines) + "\n"


def _command(graph: GraphSpec, batch: BatchRange) -> str:
    options = [f"--onnx=onnx/{graph.name}.onnx", f"--saveEngine=built/{graph.name}.plan", "--stronglyTyped", "--noTF32"]
    for option, size in zip(("minShapes", "optShapes", "maxShapes"), batch.sizes, strict=True):
        shapes = [
            f"{tensor.name}:" + "x".join(str(size if axis == BATCH else axis) for axis in tensor.shape)
            for tensor in graph.inputs
        ]
        options.append(f"--{option}={','.join(shapes)}")
    return " \\\n  ".join(["trtexec", *map(shlex.quote, options), "--skipInference"])
