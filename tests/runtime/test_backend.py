import subprocess
import sys
import types

import numpy as np
import pytest

from mge_runtime.backends.onnxruntime import OnnxRuntimeBackend, load_onnxruntime
from mge_runtime.backends.onnxruntime_cuda import preload_libraries
from mge_runtime.bundle import Bundle
from mge_runtime.chain import Chain
from mge_runtime.errors import BackendError
from mge_runtime.extract import extract_bundle


@pytest.fixture(scope="module")
def chain(bundle_path):
    with Bundle.open(bundle_path) as bundle:
        return Chain(bundle, OnnxRuntimeBackend(threads=1))


def frames(count, seed=0):
    """Seeded noise, each picture brighter than the one before."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3))
    return (noise * np.linspace(0.1, 1, count).reshape(-1, 1, 1, 1)).astype(np.uint8)


def by_hand(bundle, folder, batch):
    """The chain as anyone would run the extracted files: every graph once its inputs are there."""
    onnxruntime = load_onnxruntime()
    extract_bundle(bundle, folder)
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


def test_a_missing_onnxruntime_is_said_with_its_command():
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, *a):\n"
        "        if name == 'onnxruntime': raise ModuleNotFoundError('no', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from mge_runtime.backends.onnxruntime import OnnxRuntimeBackend\n"
        "from mge_runtime import BackendError\n"
        "try: OnnxRuntimeBackend()\n"
        "except BackendError as error: print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 'pip install "mge[cpu]"' in found.stdout


def test_an_old_or_broken_onnxruntime_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", types.SimpleNamespace(__version__="1.9.2"))
    with pytest.raises(BackendError, match=r"1\.9\.2 is too old; expected 1\.22"):
        OnnxRuntimeBackend()


@pytest.mark.parametrize(("verbose", "heard"), [(None, False), ("0", False), ("1", True), ("2", True)])
def test_onnx_runtime_writes_to_the_terminal_only_where_it_is_asked_to(bundle_path, monkeypatch, capfd, verbose, heard):
    """A run that fails is an error to ONNX Runtime's own log; to a user it is one line, the exception's."""
    code = (
        "import sys, numpy as np\n"
        "from mge_runtime import BackendError, Bundle\n"
        "from mge_runtime.backends.onnxruntime import OnnxRuntimeBackend\n"
        "with Bundle.open(sys.argv[1]) as bundle: chain = OnnxRuntimeBackend(threads=1).open_chain(bundle)\n"
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


def test_what_onnx_runtime_prints_while_it_looks_for_cuda_is_no_answer(capfd):
    preload_libraries(types.SimpleNamespace(preload_dlls=lambda: print("Failed to load libcudnn.so.9")))
    assert capfd.readouterr() == ("", "")


# --- running ------------------------------------------------------------------------------------------------------


def test_every_tensor_equals_the_extracted_files(chain, bundle_path, tmp_path):
    batch = frames(3)
    with Bundle.open(bundle_path) as bundle:
        expected = by_hand(bundle, tmp_path, batch)
        names = [t.name for graph in bundle.manifest.graphs for t in graph.outputs]
    found = chain.run(batch, outputs=names)
    assert found.answer == "logits"
    assert set(found.tensors) == set(names)
    for name in names:
        # One thread against several: sums may be taken in another order.
        np.testing.assert_allclose(found.tensors[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert np.ptp(found.tensors["box_1"], axis=0).max() > 0, "boxes must depend on the picture"


def test_only_what_is_asked_for_is_kept(chain):
    assert set(chain.run(frames(1)).tensors) == {
        *(f"logits_{k}" for k in (1, 2, 3)), *(f"heatmap_{k}" for k in (1, 2, 3)), "box_1", "box_2", "gate", "logits"
    }  # fmt: skip
    assert set(chain.run(frames(1), outputs=["image_2"]).tensors) == {"image_2", "logits"}
    with pytest.raises(BackendError, match="no graph has an output 'nothing'"):
        chain.run(frames(1), outputs=["nothing"])


def test_the_chain_stops_where_it_is_told(chain):
    whole = chain.run(frames(2), outputs=["mean_logits_1", "mean_logits_2", "logits_1"]).tensors
    first = chain.run(frames(2), graphs=1)
    assert list(first.step_ms) == ["expert_1"]
    assert first.answer == "mean_logits_1"
    assert set(first.tensors) == {"mean_logits_1", "logits_1", "heatmap_1", "box_1"}
    np.testing.assert_array_equal(first.tensors["mean_logits_1"], whole["logits_1"])
    second = chain.run(frames(2), graphs=2)
    np.testing.assert_array_equal(second.tensors["mean_logits_2"], whole["mean_logits_2"])
    assert list(chain.run(frames(2), graphs=3).step_ms) == ["expert_1", "expert_2", "expert_3"]
    for wrong in (0, 4, -1):
        with pytest.raises(BackendError, match="from 1 to 3"):
            chain.run(frames(1), graphs=wrong)


def test_tensors_go_when_they_are_done(bundle_path, monkeypatch):
    with Bundle.open(bundle_path) as bundle:
        executor = OnnxRuntimeBackend(threads=1).open_chain(bundle)
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


def test_a_batch_answers_as_its_images_do(chain):
    batch = frames(4)
    together = chain.run(batch).tensors["logits"]
    alone = np.concatenate([chain.run(batch[i : i + 1]).tensors["logits"] for i in range(4)])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
