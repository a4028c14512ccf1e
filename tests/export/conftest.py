import importlib.util
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from click.testing import CliRunner

from mge.checkpoint import load_checkpoint, save_checkpoint
from mge_export.cli import main
from mge_export.experts import build_graphs
from mge_export.export import export_bundle
from mge_export.images import find_verify_images
from mge_export.precision import Precision
from mge_runtime.bundle import Bundle
from mge_runtime.extract import extract_bundle


@pytest.fixture(scope="session")
def tiny():
    """The module `tiny_models`."""
    spec = importlib.util.spec_from_file_location("mge_tests_tiny_models", Path(__file__).with_name("tiny_models.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def photographs(tiny, tmp_path_factory):
    """A folder of ten small photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    tiny.save_photographs(folder)
    return folder


@pytest.fixture(scope="session", params=[Precision.FP32, Precision.FP16], ids=["fp32", "fp16"])
def exported(request, tiny, photographs, tmp_path_factory):
    """A model of two experts, exported: model, typed modules, bundle and the ONNX files that came out of it."""
    folder = tmp_path_factory.mktemp("exported")
    model = tiny.make_model()
    frames = tiny.load_frames(photographs, model.config.preprocess)
    tiny.center_heads(model, frames)
    images = find_verify_images(photographs, model.config.preprocess, 0)
    lines = []
    result = export_bundle(model, folder / "mge.plan", request.param, images, say=lines.append)
    with Bundle.open(result.path) as bundle:
        extract_bundle(bundle, folder)
    experts = build_graphs(model, request.param)
    return SimpleNamespace(
        model=model,
        precision=request.param,
        experts=experts,
        result=result,
        path=result.path,
        folder=folder / "onnx",
        lines=lines,
        images=images,
        graphs={
            s.spec.name: onnx.load(folder / "onnx" / f"{s.spec.name}.onnx", load_external_data=False) for s in experts
        },
        frames=frames,
    )


@pytest.fixture(scope="session")
def checkpoint(tiny, photographs, tmp_path_factory):
    """A model of two experts whose answers differ between the photographs."""
    path = tmp_path_factory.mktemp("ckpt") / "best.pt"
    model = tiny.make_model()
    save_checkpoint(path, tiny.center_heads(model, tiny.load_frames(photographs, model.config.preprocess)))
    return path


@pytest.fixture(scope="session")
def export_int8(photographs, checkpoint):
    """`mge-export --int8` as a user calls it: nine of ten photographs, drawn by the seed; returns what was said."""

    def export(calibration, path):
        given = {
            "--calib-method": "percentile", "--max-drop": "30", "--min-box-iou": "0.25", "--calib-seed": "3",
            "--calib-data": calibration, "--calib-images": 9, "--verify-data": photographs,
        }  # fmt: skip
        # Ten photographs and untrained heads decide closely: what is held here is the graph, not the agreement.
        flags = ["--int8", "--force-few-images", "--allow-mismatch", "--target", "onnx"]
        options = [str(part) for option in given.items() for part in option]
        found = CliRunner().invoke(main, ["--ckpt", str(checkpoint), *options, *flags, "-o", str(path)])
        assert found.exit_code == 0, found.output
        return found.output

    return export


@pytest.fixture(scope="session")
def quantised(tiny, photographs, checkpoint, export_int8, tmp_path_factory):
    """A model of two experts in INT8: bundle, graphs and what was said."""
    folder = tmp_path_factory.mktemp("int8")
    path = folder / "mge.plan"
    lines = export_int8(photographs, path).splitlines()
    with Bundle.open(path) as bundle:
        manifest = bundle.manifest
        extract_bundle(bundle, folder)
    names = [graph.name for graph in manifest.graphs]
    graphs = {name: onnx.load(folder / "onnx" / f"{name}.onnx").graph for name in names}
    model = load_checkpoint(checkpoint)
    frames = tiny.load_frames(photographs, model.config.preprocess)
    return SimpleNamespace(
        model=model, manifest=manifest, path=path, folder=folder / "onnx", graphs=graphs, lines=lines, frames=frames
    )  # fmt: skip
