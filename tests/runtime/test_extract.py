import numpy as np
import onnx

from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.bundle import Bundle
from tests.helpers.bundles import TARGET, add_engines


def test_what_comes_out_are_plain_files_and_ordinary_onnx_models(copy, tmp_path):
    add_engines(copy)
    with Bundle.open(copy) as bundle:
        written = bundle.extract(tmp_path / "out")
        graphs = bundle.manifest.graphs
    assert all(path.is_file() for path in written)
    assert (tmp_path / f"out/engines/{TARGET}/expert_3.plan").read_bytes() == b"engine"
    assert (tmp_path / "out/onnx/labels.txt").read_text().splitlines() == [f"bird {index}" for index in range(5)]
    onnxruntime, rng = load_onnxruntime(), np.random.default_rng(0)
    for graph in graphs:
        path = tmp_path / "out" / "onnx" / f"{graph.name}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        feeds = {t.name: (rng.random((2, *t.shape[1:])) * 255).astype(t.dtype) for t in graph.inputs}
        assert [v.shape for v in session.run(None, feeds)] == [(2, *t.shape[1:]) for t in graph.outputs]
