"""`chain.onnx`: the whole chain in one graph, for everybody who runs ONNX without this package.

Its one input is `frame`, uint8 RGB [B, S, S, 3]; its outputs are `probabilities`, `logits`, `gate` and each expert's
boxes and heat maps. `metadata_props` says what the classes are, how an image becomes a frame, and what boxes are in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import onnx
from onnx import compose, helper

from mge_calibration.temperature import TEMPERATURE, set_temperature
from mge_export.graph import OPSET, externalize, inlined, weights_name
from mge_runtime.bundle import Bundle
from mge_runtime.bundle.archive import CHAIN, weights_entry
from mge_runtime.bundle.reader import LABELS, write_labels
from mge_runtime.files import atomic_path
from mge_runtime.manifest import BATCH, FRAME, Manifest

PROBABILITIES = "probabilities"
_MOST_INLINE = 2**31 - 2**20  # bytes of weights inside a model: Protocol Buffers read no message of 2 GB


def join_graphs(manifest: Manifest, models: Mapping[str, onnx.ModelProto]) -> onnx.ModelProto:
    """Join the graphs of a chain into one, with a softmax behind it.

    Args:
        manifest: how they are wired, and what is said in the metadata.
        models: by graph; their weights stay where they are, in files beside the chain's.

    Returns:
        The chain at temperature 1.
    """
    # Graphs were written one by one and use the same inner names, which get the graph's name in front.
    graphs = [
        compose.add_prefix_graph(models[spec.name].graph, f"{spec.name}/", rename_inputs=False, rename_outputs=False)
        for spec in manifest.graphs
    ]
    size, classes = manifest.preprocess.size, len(manifest.class_names)
    scaled = f"{PROBABILITIES}/scaled"
    joined = helper.make_graph(
        [
            *(node for graph in graphs for node in graph.node),
            helper.make_node("Div", [manifest.logits, TEMPERATURE], [scaled], name=f"{PROBABILITIES}/div"),
            helper.make_node("Softmax", [scaled], [PROBABILITIES], name=f"{PROBABILITIES}/softmax", axis=1),
        ],
        "chain",
        [helper.make_tensor_value_info(FRAME, onnx.TensorProto.UINT8, [BATCH, size, size, 3])],
        [helper.make_tensor_value_info(PROBABILITIES, onnx.TensorProto.FLOAT, [BATCH, classes]), *_reported(manifest)],
        [tensor for graph in graphs for tensor in graph.initializer],
    )
    _share_weights(joined, half=False)
    # Q/DQ of INT8 need a later one (mge_calibration.int8.insert); the rest means the same in both.
    opset = max([OPSET, *(entry.version for model in models.values() for entry in model.opset_import)])
    model = helper.make_model(
        joined,
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=max(model.ir_version for model in models.values()),
        producer_name="mge",
        producer_version=version("mge"),
    )
    helper.set_model_props(model, _metadata(manifest))
    set_temperature(model, 1.0)
    return model


def _share_weights(graph: onnx.GraphProto, *, half: bool) -> None:
    """Make one initializer of weights at one place of a file, whoever reads them.

    Args:
        graph: changed in place.
        half: those in FP16, too: ONNX Runtime's CPU provider, which computes in FP32, converts weights ahead where they
            have one reader, else at every run, and then has no fast convolution for them (twice the time).
    """
    kept: dict[object, onnx.TensorProto] = {}
    names: dict[str, str] = {}
    for tensor in graph.initializer:
        place = tuple(entry.value for entry in tensor.external_data)
        shared = place and (half or tensor.data_type != onnx.TensorProto.FLOAT16)
        key = (tensor.data_type, *tensor.dims, *place) if shared else tensor.name
        names[tensor.name] = kept.setdefault(key, tensor).name
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    weights = list(kept.values())
    del graph.initializer[:]
    graph.initializer.extend(weights)


def write_chain(bundle: Bundle, path: Path) -> list[Path]:
    """Write a bundle's `chain.onnx` as one self-contained file, each weight once, and `labels.txt` beside it.

    Above 2 GB, which no ONNX file may have, the weights go to `<path>.data`.

    Args:
        bundle: open, with a `chain.onnx`.
        path: the file.

    Returns:
        The files that were written.

    Raises:
        OutputError: they cannot be written.
    """
    weights = {
        weights_name(spec.name): bundle.read(name)
        for spec in bundle.manifest.graphs
        if (name := weights_entry(spec.name)) in bundle.sizes
    }
    model = onnx.load_model_from_string(bundle.read(CHAIN))
    _share_weights(model.graph, half=True)  # each is stored in this file, where in the bundle they are referred to
    model = inlined(model, weights)
    written = [path]
    if sum(map(len, weights.values())) > _MOST_INLINE:
        written.append(path.with_name(f"{path.name}.data"))
        with atomic_path(written[1]) as temporary:
            temporary.write_bytes(externalize(model, written[1].name))
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
    labels = path.with_name(LABELS)
    write_labels(labels, bundle.manifest.class_names)
    return [*written, labels]


def _reported(manifest: Manifest) -> Sequence[onnx.ValueInfoProto]:
    """What the chain reports beside probabilities, in this order: logits, gate, boxes, heat maps."""
    specs = {tensor.name: tensor for spec in manifest.graphs for tensor in spec.outputs}
    names = [manifest.logits, manifest.gate, *(view.box for view in manifest.views)]
    names += [view.heatmap for view in manifest.views]
    return [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(specs[name].shape))
        for name in names
        if name is not None
    ]


def _metadata(manifest: Manifest) -> dict[str, str]:
    spec = manifest.preprocess
    return {
        "class_names": json.dumps(manifest.class_names, ensure_ascii=False),
        "resize": str(spec.resize),
        "size": str(spec.size),
        "mean": json.dumps(spec.mean),
        "std": json.dumps(spec.std),
        "crops": json.dumps(asdict(manifest.crops)),
        "mge": version("mge"),
    }
