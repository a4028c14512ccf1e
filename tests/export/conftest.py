"""What an export starts from and what comes out: made once, since tracing a graph takes seconds."""

from types import SimpleNamespace

import onnx
import pytest

from mge.checkpoint import load_checkpoint, save_checkpoint
from mge_export import export
from mge_export.cli import main
from mge_export.experts import build_graphs
from mge_export.graph import export_graph
from mge_export.images import find_verify_images
from mge_export.precision import Precision
from mge_runtime.bundle import Bundle
from tests.helpers import tiny_models
from tests.helpers.commands import succeeds


@pytest.fixture(scope="session")
def tiny():
    """The module `tiny_models`."""
    return tiny_models


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder of ten small photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    tiny_models.save_photographs(folder)
    return folder


@pytest.fixture(scope="session")
def centered(photographs):
    """A model of two experts whose predictions differ between the photographs, and their frames."""
    model = tiny_models.make_model()
    frames = tiny_models.load_frames(photographs, model.config.preprocess)
    return tiny_models.center_heads(model, frames), frames


@pytest.fixture(scope="session")
def checkpoint(centered, tmp_path_factory):
    path = tmp_path_factory.mktemp("ckpt") / "best.pt"
    save_checkpoint(path, centered[0])
    return path


@pytest.fixture
def single(tmp_path):
    """A checkpoint of one expert, the smallest chain there is."""
    path = tmp_path / "best.pt"
    save_checkpoint(path, tiny_models.make_model(1, size=32))
    return path


@pytest.fixture(scope="session")
def remembered():
    """An `export_graph` that traces a graph of the same weights once in all tests."""
    traces = {}

    def trace(graph):
        weights = [(name, tensor.dtype, float(tensor.double().sum())) for name, tensor in graph.state_dict().items()]
        key = (graph.spec, graph.precision, tuple(weights))
        if key not in traces:
            traces[key] = export_graph(graph)
        return traces[key]

    return trace


@pytest.fixture
def traced_once(remembered, monkeypatch):
    """For exports of which something else than the trace is looked at."""
    monkeypatch.setattr(export, "export_graph", remembered)


@pytest.fixture(scope="session", params=[Precision.FP32, Precision.FP16], ids=["fp32", "fp16"])
def exported(request, centered, photographs, tmp_path_factory):
    """A model of two experts, exported: model, typed modules, bundle and the ONNX files that came out of it."""
    folder = tmp_path_factory.mktemp("exported")
    model, frames = centered
    images = find_verify_images(photographs, model.config.preprocess, 0)
    lines = []
    result = export.export_bundle(model, folder / "mge.plan", request.param, images, say=lines.append)
    with Bundle.open(result.path) as bundle:
        bundle.extract(folder)
    experts = build_graphs(model, request.param)
    names = [expert.spec.name for expert in experts]
    return SimpleNamespace(
        model=model,
        precision=request.param,
        experts=experts,
        result=result,
        path=result.path,
        folder=folder / "onnx",
        lines=lines,
        images=images,
        graphs={name: onnx.load(folder / f"onnx/{name}.onnx", load_external_data=False) for name in names},
        frames=frames,
    )


@pytest.fixture(scope="session")
def export_int8(photographs, checkpoint):
    """`mge-export --int8` as a user calls it: nine of ten photographs, drawn by the seed; returns what was said."""

    def export(calibration, path):
        given = {
            "--calib-method": "percentile", "--max-drop": "30", "--min-box-iou": "0.25", "--calib-seed": "3",
            "--calib-data": calibration, "--calib-images": 9, "--verify-data": photographs,
        }  # fmt: skip
        # Ten photographs and untrained heads decide closely: what is checked here is the graph, not the agreement.
        flags = ["--int8", "--force-few-images", "--allow-mismatch", "--target", "onnx"]
        options = [part for option in given.items() for part in option]
        return succeeds(main, "--ckpt", checkpoint, *options, *flags, "-o", path).output

    return export


@pytest.fixture(scope="session")
def quantized(centered, photographs, checkpoint, export_int8, remembered, tmp_path_factory):
    """A model of two experts in INT8: bundle, graphs and what was said."""
    folder = tmp_path_factory.mktemp("int8")
    path = folder / "mge.plan"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "export_graph", remembered)
        lines = export_int8(photographs, path).splitlines()
    with Bundle.open(path) as bundle:
        manifest = bundle.manifest
        bundle.extract(folder)
    graphs = {graph.name: onnx.load(folder / f"onnx/{graph.name}.onnx").graph for graph in manifest.graphs}
    return SimpleNamespace(
        model=load_checkpoint(checkpoint),
        manifest=manifest,
        path=path,
        folder=folder / "onnx",
        graphs=graphs,
        lines=lines,
        frames=centered[1],
    )
