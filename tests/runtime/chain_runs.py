"""What tests of executors share: frames for the tiny chain, everything that it puts out, and how runs are compared."""

import numpy as np
import pytest

from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.backends.onnxruntime_cuda import OrtGraph
from mge_runtime.device.executor import DeviceExecutor

onnxruntime = load_onnxruntime()

EVERY = {
    "mean_logits_1", "mean_logits_2", "box_1", "box_2", "gate", "heatmap_1", "heatmap_2", "heatmap_3",
    "image_2", "image_3", "logits", "logits_1", "logits_2", "logits_3",
}  # fmt: skip


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


def open_graphs(bundle, device, stream, *, ort=onnxruntime, graphs=True):
    """The graphs of a bundle as units, one after the other."""
    for graph in bundle.manifest.graphs:
        yield OrtGraph(ort, bundle, graph, device, stream, graphs=graphs)


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
