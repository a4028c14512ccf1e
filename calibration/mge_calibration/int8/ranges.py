"""Run a graph over images that are held in memory, and learn from them how far each tensor's INT8 codes reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
from numpy.typing import NDArray

from mge_calibration.int8.cpu import cpu_graph
from mge_calibration.int8.insert import LEVELS
from mge_runtime.backends.onnxruntime import import_onnxruntime
from mge_runtime.machine import cpu_count

BATCH = 4
WORKERS = max(1, min(8, cpu_count()))  # runs at once, each in one thread
BINS = 2048  # of a histogram of magnitudes
STRIDE = 5  # of the values counted: neighbors are alike, and no usual width of a map is a multiple of it
_PERCENTILE = 99.99
_CANDIDATES = np.arange(LEVELS + 1, BINS + 1, 3)  # bins that a clipped range may keep; fewer could code exactly

Counts = NDArray[np.int64]

Tensors = dict[str, np.ndarray]  # by name, batch first
Run = Callable[[Mapping[str, np.ndarray]], Tensors]


def open_graph(model: onnx.ModelProto, outputs: Sequence[str] = ()) -> Run:
    """Open a graph in FP32 on the CPU, INT8 coded as TensorRT codes it.

    One thread: sums are then always of the same order, and the same images give the same ranges.

    Args:
        model: with its weights.
        outputs: tensors within the graph to return beside its own outputs.

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
    # Its fusions would also quantize weights and biases that the graph leaves float.
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


def run_all(run: Run, tensors: Mapping[str, np.ndarray], *, workers: int = WORKERS) -> Tensors:
    """Run batch after batch; return the outputs [N, ...] of all N images by name.

    Args:
        run: on one batch.
        tensors: inputs over all images, [N, ...] by name.
        workers: batches at once.
    """
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(run, _batches(tensors)))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _batches(tensors: Mapping[str, np.ndarray]) -> list[Tensors]:
    count = len(next(iter(tensors.values())))
    return [{name: value[start : start + BATCH] for name, value in tensors.items()} for start in range(0, count, BATCH)]


def learn_ranges(
    model: onnx.ModelProto, wanted: Sequence[str], tensors: Mapping[str, np.ndarray], how: str
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Learn the range of each tensor: one pass for the largest magnitudes, for all but "max" another for histograms.

    Args:
        model: a graph, not quantized, with its weights.
        wanted: names of the tensors to learn the ranges of.
        tensors: its inputs, over all images.
        how: one of `METHODS`.

    Returns:
        Tensor name -> the magnitude that becomes code 127 (a tensor of zeros gets 1), and tensor name -> the mean of
        each channel, [C].
    """
    run = open_graph(model, wanted)
    largest = dict.fromkeys(wanted, 0.0)
    sums: dict[str, np.ndarray] = {}
    for batch in _batches(tensors):
        found = run(batch)
        for name in wanted:
            sums[name] = sums.get(name, 0) + found[name].mean((2, 3), dtype=np.float64).sum(0)
            largest[name] = max(largest[name], float(np.abs(found[name]).max()))
    magnitudes = {name: Magnitudes(value or 1.0) for name, value in largest.items()}
    if how != "max":
        for batch in _batches(tensors):
            found = run(batch)
            for name in wanted:
                magnitudes[name].add(found[name])
    count = len(next(iter(tensors.values())))
    ranges = {name: seen.clip_range(how) for name, seen in magnitudes.items()}
    return ranges, {name: total / count for name, total in sums.items()}


class Magnitudes:
    """A histogram of |x| with a fixed end, filled batch by batch.

    Args:
        largest: the largest magnitude that will be seen, > 0.
    """

    def __init__(self, largest: float) -> None:
        self.largest = largest
        self.counts: Counts = np.zeros(BINS, np.int64)

    def add(self, values: NDArray[np.floating]) -> None:
        """Count a tensor of any shape, every `STRIDE`th of its values."""
        scaled = np.abs(values.reshape(-1)[::STRIDE]) * np.float32(BINS / self.largest)
        self.counts += np.bincount(np.minimum(scaled, BINS - 1).astype(np.int32), minlength=BINS)

    def clip_range(self, method: str) -> float:
        """The magnitude that becomes code 127, in (0, `largest`]; what is above it is clipped.

        Args:
            method: one of `METHODS`.
        """
        return METHODS[method](self.counts) * self.largest / BINS


def _percentile(counts: Counts) -> float:
    """The magnitude that 99.99 % of all values stay below or meet, as an upper edge of a bin."""
    return int(np.searchsorted(counts.cumsum(), counts.sum() * _PERCENTILE / 100)) + 1


def _mse(counts: Counts) -> float:
    """The range of the least expected squared error, of rounding and clipping together."""
    centers = np.arange(BINS) + 0.5
    steps = _CANDIDATES[:, None] / LEVELS
    coded = np.minimum(np.rint(centers / steps), LEVELS) * steps  # [candidates, bins]
    return int(_CANDIDATES[np.argmin((coded - centers) ** 2 @ counts)])


def _entropy(counts: Counts) -> float:
    """The range whose coded distribution tells least from the clipped one (Kullback-Leibler divergence).

    S. Migacz, "8-bit Inference with TensorRT", GTC 2017: the clipped tail is added to the last bin of the reference
    and not to what is coded. Exact zeros, which a ReLU makes and every range codes exactly, are left out.
    """
    best, least = BINS, np.inf
    counted = counts.astype(np.float64)
    counted[0] = counted[1]
    edges_of_codes = np.arange(LEVELS + 1) / (LEVELS + 1)
    for kept in _CANDIDATES:
        reference = counted[:kept].copy()
        coded = reference.copy()
        reference[-1] += counted[kept:].sum()
        starts = (edges_of_codes * kept).astype(np.int64)
        present = (reference > 0).astype(np.float64)
        sums, filled = np.add.reduceat(coded, starts), np.add.reduceat(present, starts)
        means = np.divide(sums, filled, out=np.zeros_like(sums), where=filled > 0)
        coded = np.repeat(means, np.diff(np.append(starts, kept))) * present
        divergence = _divergence(reference, coded)
        if divergence < least:
            best, least = int(kept), divergence
    return best


def _divergence(reference: NDArray[np.float64], coded: NDArray[np.float64]) -> float:
    """KL(reference || coded); infinite where something present is coded as absent."""
    total, other = reference.sum(), coded.sum()
    if total == 0 or other == 0:
        return np.inf
    present = reference > 0
    p, q = reference[present] / total, coded[present] / other
    return np.inf if (q == 0).any() else float((p * np.log(p / q)).sum())


METHODS: dict[str, Callable[[Counts], float]] = {
    "max": lambda _: BINS,
    "entropy": _entropy,
    "percentile": _percentile,
    "mse": _mse,
}
