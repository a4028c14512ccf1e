"""A model repository for NVIDIA's Triton Inference Server, from a bundle: the chain, and its TensorRT engines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from onnx import helper

from mge_runtime.bundle import Bundle
from mge_runtime.bundle.archive import CHAIN
from mge_runtime.bundle.reader import LABELS, write_labels
from mge_runtime.errors import ExportError, OutputError
from mge_runtime.manifest import TensorSpec
from mge_runtime.trt.engines import EngineSet, bundle_engines

LARGEST_BATCH = 8  # images that the server may run at once
_BATCHING = "dynamic_batching { max_queue_delay_microseconds: 1000 }"  # that an image may wait for others
_TYPES = {"uint8": "TYPE_UINT8", "float16": "TYPE_FP16", "float32": "TYPE_FP32", "int64": "TYPE_INT64"}


def check_repository(folder: Path) -> None:
    """Check that `write_triton` replaces nothing.

    Raises:
        OutputError: the folder has something in it.
        OSError: it cannot be listed.
    """
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} is there and not empty; remove it, or name a new folder for --triton")


def write_triton(bundle: Bundle, folder: Path) -> list[Path]:
    """Write a bundle as models that Triton loads.

    `chain.onnx` on the ONNX Runtime backend is called as the bundle's file is, `birds` for `birds.plan`. For engines of
    TensorRT that the bundle holds there are a model for each, `birds_<graph>_<target>`, and an ensemble,
    `birds_<target>`, that chains them; its output is the logits, without a temperature. Triton has no backend for
    engines of TensorRT-RTX.

    Args:
        bundle: open.
        folder: where to, new or empty; it is there whole or not at all.

    Returns:
        The files that were written.

    Raises:
        BundleError: an entry was damaged, or there is no `chain.onnx`.
        ExportError: the bundle has engines that do not take one image.
        OutputError: the folder has something in it, or cannot be written.
    """
    engines = [bundle_engines(bundle, target) for target in bundle.targets]
    engines = [found for found in engines if found.target.backend == "tensorrt"]
    for found in engines:
        if (least := found.details.batch.sizes[0]) > 1:
            raise ExportError(
                f"{bundle.path}: engines for {found.description.target} take {least} images at least, Triton may send "
                f"one; build them with --batch 1,{','.join(map(str, found.details.batch.sizes[1:]))}"
            )
    try:
        check_repository(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            made = Path(scratch, "models")
            written = [path.relative_to(made) for path in _write_models(bundle, engines, made)]
            if folder.exists():
                folder.rmdir()
            made.replace(folder)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}; name another folder for --triton") from error
    return [folder / path for path in written]


def _write_models(bundle: Bundle, engines: Sequence[EngineSet], folder: Path) -> list[Path]:
    name = re.sub(r"[^\w.-]", "_", bundle.path.stem, flags=re.ASCII)
    manifest, chain = bundle.manifest, folder / name
    bundle.extract(chain, bundle.chain_entries())
    version = (chain / CHAIN).parent.rename(chain / "1")
    (version / LABELS).rename(chain / LABELS)
    model = (version / Path(CHAIN).name).rename(version / "model.onnx")
    graph = onnx.load(str(model), load_external_data=False).graph
    _write_config(chain, _chain_config(name, *map(_specs, (graph.input, graph.output))))
    for found in engines:
        target = found.description.target
        for spec in manifest.graphs:
            part = folder / f"{name}_{spec.name}_{target}"
            (part / "1").mkdir(parents=True)
            (part / "1/model.plan").write_bytes(found.plan(spec.name))
            tensors = [*_tensors("input", spec.inputs), *_tensors("output", spec.outputs)]
            _write_config(part, [*_head(part.name, "tensorrt", _most(found)), *tensors, _BATCHING])
        ensemble = folder / f"{name}_{target}"
        (ensemble / "1").mkdir(parents=True)  # Triton asks for a version, even an empty one
        write_labels(ensemble / LABELS, manifest.class_names)
        _write_config(ensemble, _ensemble_config(bundle, found, name, ensemble.name))
    return [path for path in folder.rglob("*") if path.is_file()]


def _write_config(model: Path, lines: Iterable[str]) -> None:
    (model / "config.pbtxt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _most(engines: EngineSet) -> int:
    return engines.details.batch.sizes[-1]


def _head(name: str, backend: str, batch: int) -> list[str]:
    platform = 'platform: "ensemble"' if backend == "ensemble" else f'backend: "{backend}"'
    return [f"name: {json.dumps(name)}", platform, f"max_batch_size: {batch}"]


def _specs(values: Iterable[onnx.ValueInfoProto]) -> list[TensorSpec]:
    """What an ONNX graph says of its inputs or outputs."""
    specs = list[TensorSpec]()
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        specs.append(TensorSpec(value.name, helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, shape))
    return specs


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
    yield _BATCHING
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
