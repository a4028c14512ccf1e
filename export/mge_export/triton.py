"""A model repository for NVIDIA's Triton Inference Server, from a bundle: the chain, and its TensorRT engines."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mge_runtime.bundle import Bundle
from mge_runtime.bundle.archive import CHAIN
from mge_runtime.bundle.reader import LABELS
from mge_runtime.errors import ExportError, OutputError
from mge_runtime.files import atomic_path, temporary_folder
from mge_runtime.manifest import TensorSpec
from mge_runtime.trt.engines import EngineSet, bundle_engines

__all__ = ["write_triton"]

LARGEST_BATCH = 8  # images that the server may run at once
DELAY = 1000  # microseconds that an image may wait for others
_TYPES = {"uint8": "TYPE_UINT8", "float16": "TYPE_FP16", "float32": "TYPE_FP32", "int64": "TYPE_INT64"}


def write_triton(bundle: Bundle, folder: Path) -> list[Path]:
    """Write a bundle as models that Triton loads.

    `chain.onnx` on the ONNX Runtime backend is called as the bundle's file is, `birds` for `birds.plan`. For engines of
    TensorRT that the bundle holds there are a model for each, `birds_<graph>_<target>`, and an ensemble,
    `birds_<target>`, that chains them; its output is the logits, without a temperature. Triton has no backend for
    engines of TensorRT-RTX.

    Args:
        bundle: open.
        folder: where to; files of the same names are replaced, each whole or not at all.

    Returns:
        The files that were written.

    Raises:
        BundleError: an entry was damaged.
        ExportError: the bundle has no chain.
        OutputError: the folder cannot be written.
    """
    import onnx

    name = re.sub(r"[^\w.-]", "_", bundle.path.stem, flags=re.ASCII)
    written: list[Path] = []

    def write(path: Path, content: str | memoryview | Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make {path.parent}: {error.strerror}; name another for --triton") from error
        with atomic_path(path) as part:
            if isinstance(content, Path):
                shutil.copyfile(content, part)
            elif isinstance(content, str):
                part.write_text(content, "utf-8")
            else:
                part.write_bytes(content)
        written.append(path)

    manifest = bundle.manifest
    if CHAIN not in bundle.sizes:
        raise ExportError(f"{bundle.path} has no chain.onnx, which mge-export writes; export the checkpoint again")
    with temporary_folder("triton") as scratch:
        bundle.extract(scratch)
        chain = scratch / CHAIN
        graph = onnx.load(str(chain), load_external_data=False).graph
        for weights in sorted(chain.parent.glob("*.weights")):
            write(folder / name / "1" / weights.name, weights)
        write(folder / name / "1/model.onnx", chain)
        write(folder / name / LABELS, chain.with_name(LABELS))
    inputs, outputs = ([_spec(value) for value in values] for values in (graph.input, graph.output))
    write(folder / name / "config.pbtxt", "\n".join(_chain_config(name, inputs, outputs)) + "\n")
    for target in bundle.targets:
        engines = bundle_engines(bundle, target)
        if engines.target.backend != "tensorrt":
            continue
        for spec in manifest.graphs:
            model = f"{name}_{spec.name}_{target}"
            write(folder / model / "1/model.plan", engines.plan(spec.name))
            config = [*_head(model, "tensorrt", _most(engines)), *_tensors("input", spec.inputs)]
            write(folder / model / "config.pbtxt", "\n".join([*config, *_tensors("output", spec.outputs)]) + "\n")
        ensemble = f"{name}_{target}"
        (folder / ensemble / "1").mkdir(parents=True, exist_ok=True)  # Triton asks for a version, even an empty one
        write(folder / ensemble / LABELS, "".join(f"{label}\n" for label in manifest.class_names))
        write(folder / ensemble / "config.pbtxt", "\n".join(_ensemble_config(bundle, engines, name, ensemble)) + "\n")
    return written


def _most(engines: EngineSet) -> int:
    return engines.details.batch.sizes[-1]


def _head(name: str, backend: str, batch: int) -> list[str]:
    platform = 'platform: "ensemble"' if backend == "ensemble" else f'backend: "{backend}"'
    return [f"name: {json.dumps(name)}", platform, f"max_batch_size: {batch}"]


def _spec(value: object) -> TensorSpec:
    """What an ONNX graph says of an input or output."""
    from onnx import ValueInfoProto, helper

    assert isinstance(value, ValueInfoProto)  # noqa: S101 - for the type checker
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec(value.name, helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, shape)


def _tensors(kind: str, specs: Iterable[TensorSpec], labeled: str = "") -> Iterator[str]:
    """Inputs or outputs; the first axis is the batch, which Triton leaves out."""
    for spec in specs:
        labels = f' label_filename: "{LABELS}"' if spec.name == labeled else ""
        dims = ", ".join(map(str, spec.shape[1:]))
        yield f'{kind} [ {{ name: "{spec.name}" data_type: {_TYPES[spec.dtype]} dims: [ {dims} ]{labels} }} ]'


def _chain_config(name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Iterator[str]:
    yield from _head(name, "onnxruntime", LARGEST_BATCH)
    yield from _tensors("input", inputs)
    yield from _tensors("output", outputs, outputs[0].name)  # probabilities
    yield f"dynamic_batching {{ max_queue_delay_microseconds: {DELAY} }}"
    dims = ", ".join(map(str, inputs[0].shape[1:]))
    for batch in (1, LARGEST_BATCH):  # the first run of a size is slow
        frame = f'key: "{inputs[0].name}" value {{ data_type: TYPE_UINT8 dims: [ {dims} ] random_data: true }}'
        yield f'model_warmup [ {{ name: "batch of {batch}" batch_size: {batch} inputs {{ {frame} }} }} ]'


def _ensemble_config(bundle: Bundle, engines: EngineSet, name: str, ensemble: str) -> Iterator[str]:
    """Steps that pass tensors on under their own names, only those that a later step or the ensemble gives on."""
    manifest = bundle.manifest
    made = {spec.name: spec for graph in manifest.graphs for spec in graph.outputs}
    read = {spec.name for graph in manifest.graphs for spec in graph.inputs} | {manifest.logits}
    yield from _head(ensemble, "ensemble", _most(engines))
    yield from _tensors("input", manifest.graphs[0].inputs)
    yield from _tensors("output", [made[manifest.logits]], manifest.logits)
    yield "ensemble_scheduling {"
    for graph in manifest.graphs:
        model = f"{name}_{graph.name}_{engines.description.target}"
        yield f"  step [ {{ model_name: {json.dumps(model)} model_version: -1"
        for kind, specs in (("input", graph.inputs), ("output", graph.outputs)):
            for spec in specs:
                if spec.name in read:
                    yield f'    {kind}_map {{ key: "{spec.name}" value: "{spec.name}" }}'
        yield "  } ]"
    yield "}"
