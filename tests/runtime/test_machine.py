import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mge_runtime.machine
from mge_runtime.backends.onnxruntime import load_onnxruntime
from mge_runtime.errors import InputError
from mge_runtime.machine import Gpu, Machine, describe_machine

RECORDED = sorted(Path(__file__).with_name("machines").glob("*.json"))
ORIN = Machine(
    "linux", "aarch64", "3.10.12", (Gpu("Orin", "sm87", 64 << 30, 16, True),), None, "12.6", {"tensorrt": "10.3.0"}
)


# --- descriptions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_machines_are_what_is_printed(path):
    machine = Machine.from_json(path.read_bytes(), path.name)
    assert machine.to_json() == path.read_bytes()
    assert bool(machine.gpus) == (machine.gpu_problem is None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "orin.json is no JSON ("),
        ({"system": 3}, "orin.json: system is 3; expected a text: record the machine again with mge-info --machine"),
        ({"driver": "x"}, 'orin.json: driver is "x"; expected no field of this name: record'),
        ({"gpus": [{"name": "Orin"}]}, "orin.json: gpus[0].capability is null; expected this field, which is missing"),
        ({"gpus": [{**vars(ORIN.gpus[0]), "capability": "8.7"}]}, 'expected a compute capability such as "sm86"'),
        ({"gpus": [{**vars(ORIN.gpus[0]), "integrated": 1}]}, "gpus[0].integrated is 1; expected true or false"),
        ({"gpus": [{**vars(ORIN.gpus[0]), "multiprocessors": 0}]}, "expected a whole number of at least 1"),
        ({"libraries": {"tensorrt": None}}, "orin.json: libraries.tensorrt is null; expected a text"),
    ],
)
def test_a_wrong_field_is_named_by_its_path(change, message):
    data = ORIN.to_json()[:-9] if change is None else json.dumps({**json.loads(ORIN.to_json()), **change}).encode()
    with pytest.raises(InputError) as caught:
        Machine.from_json(data, "orin.json")
    assert message in str(caught.value)
    assert "bundle" not in str(caught.value)


# --- this machine -------------------------------------------------------------------------------------------------


def test_describing_a_machine_without_gpu_imports_no_library():
    code = (
        "import sys\n"
        "from mge_runtime.machine import describe_machine\n"
        "print(len(describe_machine().gpus))\n"
        "print([name for name in ('onnxruntime', 'tensorrt_rtx', 'cuda.core', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    gpus, loaded = done.stdout.splitlines()
    if int(gpus):
        pytest.skip("this machine has a GPU: its libraries are imported to see whether they work")
    assert loaded == "[]"


def test_versions_from_metadata_are_those_of_the_modules():
    onnxruntime = load_onnxruntime()
    machine = describe_machine()
    assert machine.libraries["onnxruntime"] == onnxruntime.__version__
    assert describe_machine(always=True).libraries == machine.libraries
    assert "CPUExecutionProvider" in describe_machine(["onnxruntime"], always=True).providers


def test_where_no_driver_is_it_says_so():
    machine = describe_machine()
    assert bool(machine.gpus) != bool(machine.gpu_problem)
    assert (machine.driver_cuda is None) == ("no NVIDIA driver is installed" in (machine.gpu_problem or ""))
    assert describe_machine(gpus=False).gpu_problem == "not asked for"


def test_a_folder_of_type_stubs_is_no_library(tmp_path, monkeypatch):
    """`tensorrt-stubs` leaves a folder `tensorrt` without a module, which Python takes for a namespace."""
    (tmp_path / "mge_test_stubs").mkdir()
    (tmp_path / "mge_test_stubs" / "__init__.pyi").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(mge_runtime.machine._LIBRARIES, "mge-test-stubs", "mge_test_stubs")
    assert "mge-test-stubs" not in describe_machine().libraries
    (tmp_path / "mge_test_stubs" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert describe_machine().libraries["mge-test-stubs"] == "unknown"


def test_a_library_that_cannot_be_imported_is_broken(tmp_path, monkeypatch):
    (tmp_path / "mge_test_broken.py").write_text("raise OSError('libnothing.so.1:\\n cannot open')")
    (tmp_path / "mge_test_sound.py").write_text("__version__ = '2.5'")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("broken", "sound")
    for name in names:
        monkeypatch.setitem(mge_runtime.machine._LIBRARIES, name, f"mge_test_{name}")
    assert {name: describe_machine().libraries[name] for name in names} == {"broken": "unknown", "sound": "unknown"}
    machine = describe_machine(names, always=True)
    assert machine.libraries["sound"] == "2.5"
    assert machine.broken == {"broken": "libnothing.so.1: cannot open"}
    assert "broken" not in machine.libraries


def test_the_board_is_what_the_device_tree_says(tmp_path, monkeypatch):
    monkeypatch.setattr(mge_runtime.machine, "_MODEL", tmp_path / "model")
    assert describe_machine().board is None
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    machine = describe_machine()
    assert machine.board == "NVIDIA Jetson AGX Orin Developer Kit"
    assert machine.is_jetson


@pytest.mark.gpu
def test_a_gpu_is_described():
    machine = describe_machine()
    if machine.driver_cuda is None:
        pytest.skip(machine.gpu_problem)
    assert machine.gpus, machine.gpu_problem
    assert all(gpu.name and gpu.memory > 1 << 30 and gpu.multiprocessors > 1 for gpu in machine.gpus)
    assert Machine.from_json(machine.to_json()) == machine
