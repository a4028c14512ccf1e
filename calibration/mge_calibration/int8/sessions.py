"""Run a stage's graph, as it is or quantised, over batches that are held in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime

from mge_calibration.int8.ranges import Magnitudes, pick_range
from mge_runtime.bundle.cpu_graph import cpu_graph
from mge_runtime.cpus import cpu_count

__all__ = ["Tensors", "default_workers", "learn_ranges", "open_graph", "run_batches"]

Tensors = dict[str, np.ndarray]  # by name, batch first
Run = Callable[[Mapping[str, np.ndarray]], Tensors]


def open_graph(model: onnx.ModelProto, outputs: Sequence[str] = ()) -> Run:
    """Open a graph in FP32 on the CPU, INT8 coded as TensorRT codes it.

    One thread: sums are then always of the same order, and the same images give the same ranges.

    Args:
        model: with its weights.
        outputs: tensors within the graph to put out beside its own outputs.
    """
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    own = [tensor.name for tensor in watched.graph.output]
    inputs = {tensor.name for tensor in watched.graph.input}
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in {*own, *inputs})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Its fusions would also quantise weights and biases that the graph leaves float.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    graph = cpu_graph(watched.SerializeToString(), fast=False)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_outputs()]
    taken = [tensor.name for tensor in session.get_inputs()]

    def run(feeds: Mapping[str, np.ndarray]) -> Tensors:
        values = session.run(names, {name: feeds[name] for name in taken})
        found: Tensors = dict(zip(names, (np.asarray(value) for value in values), strict=True))
        return found | {name: feeds[name] for name in outputs if name in inputs}

    return run


def run_batches(model: onnx.ModelProto, batches: Iterable[Mapping[str, np.ndarray]]) -> Tensors:
    """Run a graph over all batches; return its outputs, one after the other along the first axis."""
    run = open_graph(model)
    with ThreadPoolExecutor(default_workers()) as pool:
        found = list(pool.map(run, batches))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def learn_ranges(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Callable[[], Iterator[Mapping[str, np.ndarray]]], how: str
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Learn the range of each tensor: one pass for the largest magnitudes, for all but "max" another for histograms.

    Args:
        model: a stage, not quantised, with its weights.
        tensors: to learn the ranges of.
        batches: begins anew at each call.
        how: a method of `ranges.METHODS`.

    Returns:
        Tensor name -> the magnitude that becomes code 127 (a tensor of zeros gets 1), and tensor name -> the mean of
        each channel, [C].
    """
    run = open_graph(model, tensors)
    largest = dict.fromkeys(tensors, 0.0)
    sums: dict[str, np.ndarray] = {}
    images = 0
    for batch in batches():
        found = run(batch)
        images += len(next(iter(batch.values())))
        for name in tensors:
            sums[name] = sums.get(name, 0) + found[name].mean((2, 3), dtype=np.float64).sum(0)
            largest[name] = max(largest[name], float(np.abs(found[name]).max()))
    magnitudes = {name: Magnitudes(value or 1.0) for name, value in largest.items()}
    if how != "max":
        for batch in batches():
            found = run(batch)
            for name in tensors:
                magnitudes[name].add(found[name])
    ranges = {name: pick_range(seen, how) for name, seen in magnitudes.items()}
    return ranges, {name: total / images for name, total in sums.items()}


def default_workers() -> int:
    """Sessions that run at once, each with one thread."""
    return max(1, min(8, cpu_count()))
