"""Runs of the tiny chain on a device: frames, every tensor's name, comparison, devices that replay or pretend CUDA."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mge_runtime.backends.onnxruntime import CpuExecutor, load_onnxruntime
from mge_runtime.backends.onnxruntime_cuda import OrtGraph, open_ort_chain
from mge_runtime.bundle import Bundle, write_bundle
from mge_runtime.chain import Chain
from mge_runtime.device.base import Graph
from mge_runtime.device.executor import DeviceExecutor
from tests.helpers.host_device import HostDevice

onnxruntime = load_onnxruntime()

EVERY = {
    "mean_logits_1", "mean_logits_2", "box_1", "box_2", "gate", "heatmap_1", "heatmap_2", "heatmap_3",
    "image_2", "image_3", "logits", "logits_1", "logits_2", "logits_3",
}  # fmt: skip
EXECUTORS = {
    "cpu": lambda bundle: CpuExecutor(bundle, threads=1),
    "device": lambda bundle: open_ort_chain(onnxruntime, bundle, HostDevice()),
}


def write_chain(tiny, path, change=lambda graph: graph.model(), manifest=lambda made: made):
    """Write a tiny bundle with other graphs, or another manifest; return its path."""
    graphs = tiny.make_graphs()
    write_bundle(path, manifest(tiny.make_manifest(graphs)), {graph.spec.name: change(graph) for graph in graphs})
    return path


def write_typed(tiny, path, kinds):
    """Write a tiny bundle whose plan says these precisions; None: it says nothing of a graph."""
    plans = {name: {"type": kind} if kind else {} for name, kind in kinds.items()}

    def change(graph):
        model = graph.model()
        return replace(model, cpu=model.graph if "int8" in kinds.values() else None)

    return write_chain(tiny, path, change, lambda made: replace(made, precision={**made.precision, **plans}))


def open_chain(path, executor="cpu", **options):
    """The chain of a bundle on the CPU, or on a `HostDevice` as a GPU runs it."""
    with Bundle.open(path, **options) as bundle:
        return Chain(bundle, EXECUTORS[executor](bundle))


def frames(count, seed=0):
    """Noise that grows from frame to frame."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3))
    return (noise * np.linspace(0.1, 1, count).reshape(-1, 1, 1, 1)).astype(np.uint8)


def shuffled_frames(count, seed=0):
    """The same in any order, so that not the first or the last leave a batch."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3))
    share = np.random.default_rng(seed + 1).permutation(np.linspace(0.1, 1, count))
    return (noise * share.reshape(-1, 1, 1, 1)).astype(np.uint8)


def same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def need_sessions(device):
    """Skip a test where ONNX Runtime has no sessions on this device."""
    if device.kind == "cuda":
        onnxruntime.preload_dlls()
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("onnxruntime was built without CUDA: onnxruntime-gpu is not installed")


def open_graphs(bundle, device, stream, *, ort=onnxruntime, cuda_graphs=True):
    """The graphs of a bundle as units, one after the other."""
    for graph in bundle.manifest.graphs:
        yield OrtGraph(ort, bundle, graph, device, stream, cuda_graphs=cuda_graphs)


def open_capturable(bundle, device, **options):
    """The chain on a device that lets everything be captured, as CUDA does."""

    def open_units(device, stream):
        for unit in open_graphs(bundle, device, stream):
            prepare = unit.prepare

            def capturable(addresses, stream, prepare=prepare):
                launch = prepare(addresses, stream)
                launch.why_not_captured = lambda _: None
                return launch

            unit.prepare = capturable
            yield unit

    return DeviceExecutor(bundle.manifest, device, open_units, **options)


class ReplayingDevice(HostDevice):
    """A host whose graphs do again what was enqueued, or nothing (`stale`), or that refuses. It notes what is asked."""

    def __init__(self, *, refusal=False, stale=False):
        super().__init__()
        self.refusal, self.stale, self.log = refusal, stale, []

    def capture(self, stream, enqueue):
        self.log.append("capture")
        if self.refusal:
            return super().capture(stream, enqueue)
        log, stale = self.log, self.stale

        class Replay(Graph):
            def launch(self, stream):  # noqa: ARG002
                log.append("launch")
                if not stale:
                    enqueue()

            def close(self):
                log.append("close")

        return Replay()


class CudaOnHost(HostDevice):
    """Says that it is CUDA: for what is asked of ONNX Runtime there, with `FakeCuda`."""

    kind = "cuda"


class FakeCuda:
    """ONNX Runtime that notes the options of CUDA's provider and refuses some, and opens the rest on the CPU."""

    __version__ = onnxruntime.__version__
    SessionOptions = onnxruntime.SessionOptions
    RunOptions = onnxruntime.RunOptions

    def __init__(self, refuses=lambda *_: False, providers=("CUDAExecutionProvider",)):
        self.refuses, self.tried, self.providers = refuses, [], list(providers)

    def InferenceSession(self, graph, options, providers, **_):
        (name, asked), fallback = providers
        assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
        tried = tuple(asked[option] == "1" for option in ("prefer_nhwc", "enable_cuda_graph", "use_tf32"))
        self.tried.append(tried)
        if self.refuses(*tried[:2]):
            raise RuntimeError("all compute graph nodes have not\nbeen partitioned")
        session = onnxruntime.InferenceSession(graph, options, providers=[fallback])
        return SimpleNamespace(
            get_inputs=session.get_inputs, get_outputs=session.get_outputs, get_providers=lambda: self.providers
        )
