"""Run a graph, as it is or quantised, over images that are held in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx

from mge_calibration.int8.cpu import cpu_graph
from mge_calibration.int8.ranges import Magnitudes, pick_range
from mge_runtime.backends.onnxruntime import import_onnxruntime
from mge_runtime.machine import cpu_count

__all__ = ["BATCH", "Run", "Tensors", "default_workers", "learn_ranges", "open_graph", "run_all"]

BATCH = 4

Tensors = dict[str, np.ndarray]  # by name, batch first
Run = Callable[[Mapping[str, np.ndarray]], Tensors]


def open_graph(model: onnx.ModelProto, outputs: Sequence[str] = ()) -> Run:
    """Open a graph in FP32 on the CPU, INT8 coded as TensorRT codes it.

    One thread: sums are then always of the same order, and the same images give the same ranges.

    Args:
        model: with its weights.
        outputs: tensors within the graph to put out beside its own outputs.

    Returns:
        Runs it on one batch, from as many threads at a time as there are; tensors that it does not read are ignored.
    """
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    own = [tensor.name for tensor in watched.graph.output]
    inputs = {tensor.name for tensor in watched.graph.input}
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in {*own, *inputs})
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # Its fusions would also quantise weights and biases that the graph leaves float.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    graph = cpu_graph(watched, fast=False).SerializeToString()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_outputs()]
    taken = [tensor.name for tensor in session.get_inputs()]

    def run(feeds: Mapping[str, np.ndarray]) -> Tensors:
        values = session.run(names, {name: feeds[name] for name in taken})
        found: Tensors = dict(zip(names, (np.asarray(value) for value in values), strict=True))
        return found | {name: feeds[name] for name in outputs if name in inputs}

    return run


def run_all(run: Run, tensors: Mapping[str, np.ndarray], *, most: int | None = None, workers: int = 1) -> Tensors:
    """Run batch after batch; return the outputs, one after the other along the first axis.

    Args:
        run: on one batch.
        tensors: over all images.
        most: use the first so many images; None: all.
        workers: batches at once.
    """
    count = len(next(iter(tensors.values())))
    stop = count if most is None else min(most, count)
    batches = [
        {name: value[start : min(start + BATCH, stop)] for name, value in tensors.items()}
        for start in range(0, stop, BATCH)
    ]
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(run, batches))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def learn_ranges(
    model: onnx.ModelProto, wanted: Sequence[str], tensors: Mapping[str, np.ndarray], how: str
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Learn the range of each tensor: one pass for the largest magnitudes, for all but "max" another for histograms.

    Args:
        model: a graph, not quantised, with its weights.
        wanted: names of the tensors to learn the ranges of.
        tensors: its inputs, over all images.
        how: a method of `ranges.METHODS`.

    Returns:
        Tensor name -> the magnitude that becomes code 127 (a tensor of zeros gets 1), and tensor name -> the mean of
        each channel, [C].
    """
    run = open_graph(model, wanted)
    count = len(next(iter(tensors.values())))
    starts = range(0, count, BATCH)

    def batch(start: int) -> Tensors:
        return run({name: value[start : start + BATCH] for name, value in tensors.items()})

    largest = dict.fromkeys(wanted, 0.0)
    sums: dict[str, np.ndarray] = {}
    for start in starts:
        found = batch(start)
        for name in wanted:
            sums[name] = sums.get(name, 0) + found[name].mean((2, 3), dtype=np.float64).sum(0)
            largest[name] = max(largest[name], float(np.abs(found[name]).max()))
    magnitudes = {name: Magnitudes(value or 1.0) for name, value in largest.items()}
    if how != "max":
        for start in starts:
            found = batch(start)
            for name in wanted:
                magnitudes[name].add(found[name])
    ranges = {name: pick_range(seen, how) for name, seen in magnitudes.items()}
    return ranges, {name: total / count for name, total in sums.items()}


def default_workers() -> int:
    """Runs at once, each in one thread."""
    return max(1, min(8, cpu_count()))
