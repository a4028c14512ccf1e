"""ONNX Runtime on the CPU: the library, and the chain against its extracted files."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from mge_runtime.backends.onnxruntime import CpuExecutor, import_onnxruntime, load_onnxruntime
from mge_runtime.backends.onnxruntime_cuda import preload_libraries
from mge_runtime.errors import BackendError
from tests.helpers.chain_runs import EVERY, frames

onnxruntime = load_onnxruntime()


def by_hand(bundle, folder, batch):
    """The chain as anyone would run the extracted files: every graph once its inputs are there."""
    bundle.extract(folder)
    tensors, todo = {"frame": batch}, list(bundle.manifest.graphs)
    while todo:
        graph = next(s for s in todo if all(t.name in tensors for t in s.inputs))
        session = onnxruntime.InferenceSession(
            folder / "onnx" / f"{graph.name}.onnx", providers=["CPUExecutionProvider"]
        )
        names = [node.name for node in session.get_outputs()]
        values = session.run(names, {t.name: tensors[t.name] for t in graph.inputs})
        tensors.update(zip(names, values, strict=True))
        todo.remove(graph)
    return tensors


# --- the library --------------------------------------------------------------------------------------------------


def test_a_missing_old_or_broken_onnxruntime_is_said_with_its_command(monkeypatch, tmp_path):
    old = SimpleNamespace(__version__="1.9.2", __spec__=SimpleNamespace(origin="onnxruntime.py"))
    monkeypatch.setitem(sys.modules, "onnxruntime", old)
    with pytest.raises(BackendError, match=r"1\.9\.2 is too old; expected 1\.22.*install mge again"):
        import_onnxruntime()
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(
        BackendError, match=r"module onnxruntime is not installed: install mge again, with its extra cpu$"
    ):
        import_onnxruntime()
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('bad\\nELF')")
    sys.path.append(str(tmp_path))
    with pytest.raises(BackendError, match=r"cannot be imported: bad ELF; install it again"):
        import_onnxruntime()


@pytest.mark.parametrize(("verbose", "heard"), [(None, False), ("0", False), ("1", True), ("2", True)])
def test_onnx_runtime_writes_to_the_terminal_only_where_it_is_asked_to(bundle_path, monkeypatch, capfd, verbose, heard):
    """A run that fails is an error to ONNX Runtime's own log; to a user it is one line, the exception's."""
    code = (
        "import sys, numpy as np\n"
        "from mge_runtime import BackendError, Bundle\n"
        "from mge_runtime.backends.onnxruntime import CpuExecutor\n"
        "with Bundle.open(sys.argv[1]) as bundle: chain = CpuExecutor(bundle, threads=1)\n"
        "last, rows = bundle.manifest.graphs[-1], {'frame': np.zeros((1, 32, 32, 3), np.uint8)}\n"
        "rows |= {t.name: np.zeros((n, *t.shape[1:]), np.float32) for n, t in enumerate(last.inputs) if n != 1}\n"
        "rows['image_3'] = np.zeros((1, 3, 32, 32), np.float32)\n"
        "try: chain._run(last, rows)\n"
        "except BackendError as error: print(error)\n"
    )
    monkeypatch.delenv("MGE_VERBOSE", raising=False)
    if verbose is not None:
        monkeypatch.setenv("MGE_VERBOSE", verbose)
    subprocess.run([sys.executable, "-c", code, bundle_path], check=True)
    output, errors = capfd.readouterr()
    assert "ONNX Runtime failed in graph" in output
    assert ("[E:onnxruntime" in errors) == heard, errors
    assert heard or errors == ""


def test_what_onnx_runtime_prints_while_it_looks_for_cuda_is_not_printed(capfd):
    preload_libraries(SimpleNamespace(preload_dlls=lambda: print("Failed to load libcudnn.so.9")))
    assert capfd.readouterr() == ("", "")


# --- running ------------------------------------------------------------------------------------------------------


def test_every_tensor_equals_the_extracted_files(expected, bundle, tmp_path):
    batch = frames(3)
    wanted = by_hand(bundle, tmp_path, batch)
    found = expected.run(batch, outputs=EVERY)
    assert set(found.tensors) == EVERY == {t.name for graph in bundle.manifest.graphs for t in graph.outputs}
    for name in EVERY:
        # One thread against several: sums may be taken in another order.
        np.testing.assert_allclose(found.tensors[name], wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert np.ptp(found.tensors["box_1"], axis=0).max() > 0, "boxes must depend on the image"


def test_only_what_is_asked_for_is_kept(expected):
    assert set(expected.run(frames(1)).tensors) == {
        *(f"logits_{k}" for k in (1, 2, 3)), *(f"heatmap_{k}" for k in (1, 2, 3)), "box_1", "box_2", "gate", "logits"
    }  # fmt: skip
    assert set(expected.run(frames(1), outputs=["image_2"]).tensors) == {"image_2", "logits"}
    with pytest.raises(BackendError, match="no graph has an output 'nothing'"):
        expected.run(frames(1), outputs=["nothing"])


def test_the_chain_stops_where_it_is_told(expected):
    whole = expected.run(frames(2), outputs=["mean_logits_1", "mean_logits_2", "logits_1"]).tensors
    first = expected.run(frames(2), graphs=1)
    assert list(first.times_ms) == ["expert_1"]
    assert first.graphs_run.tolist() == [1, 1]
    assert set(first.tensors) == {"mean_logits_1", "logits_1", "heatmap_1", "box_1"}
    np.testing.assert_array_equal(first.tensors["mean_logits_1"], whole["logits_1"])
    second = expected.run(frames(2), graphs=2)
    np.testing.assert_array_equal(second.tensors["mean_logits_2"], whole["mean_logits_2"])
    assert list(expected.run(frames(2), graphs=3).times_ms) == ["expert_1", "expert_2", "expert_3"]
    for wrong in (0, 4, -1):
        with pytest.raises(BackendError, match="from 1 to 3"):
            expected.run(frames(1), graphs=wrong)


def test_tensors_go_when_they_are_done(bundle, monkeypatch):
    executor = CpuExecutor(bundle, threads=1)
    alive, run = {}, executor._run
    monkeypatch.setattr(
        executor, "_run", lambda graph, known: (alive.update({graph.name: set(known)}), run(graph, known))[1]
    )
    executor.run(frames(2), 3, ())
    assert alive == {
        "expert_1": {"frame"},
        "expert_2": {"frame", "image_2", "mean_logits_1", "logits_1"},
        "expert_3": {"frame", "image_3", "logits_1", "logits_2"},
    }
