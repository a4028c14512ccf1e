import importlib.util
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from mge_export.export import export_bundle
from mge_export.images import find_verify_images
from mge_export.precision import Precision
from mge_export.stages import build_stages
from mge_runtime.bundle import Bundle


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
    """A model of two experts, exported: model, stages, bundle and the ONNX files that came out of it."""
    folder = tmp_path_factory.mktemp("exported")
    model = tiny.make_model()
    frames = tiny.load_frames(photographs, model.config.preprocess)
    tiny.center_heads(model, frames)
    images = find_verify_images(photographs, model.config.preprocess, 0)
    lines = []
    result = export_bundle(model, folder / "mge.plan", request.param, images, say=lines.append)
    with Bundle.open(result.path) as bundle:
        bundle.extract(folder)
    stages = build_stages(model, request.param)
    return SimpleNamespace(
        model=model,
        precision=request.param,
        stages=stages,
        result=result,
        path=result.path,
        folder=folder / "onnx",
        lines=lines,
        images=images,
        graphs={
            s.spec.name: onnx.load(folder / "onnx" / f"{s.spec.name}.onnx", load_external_data=False) for s in stages
        },
        frames=frames,
    )
