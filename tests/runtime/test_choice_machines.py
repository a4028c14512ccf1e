"""What would run on machines that are not at hand, from their descriptions in `machines/`."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from mge_runtime.backends import choose, open_backend
from mge_runtime.bundle import Bundle, add_engine, write_bundle
from mge_runtime.cli.build import main as build
from mge_runtime.errors import BackendError, BundleError
from mge_runtime.machine import Gpu, Machine
from mge_runtime.machine_probe import describe_machine
from mge_runtime.trt.batch import BatchRange
from mge_runtime.trt.cache import store_engines
from mge_runtime.trt.engines import EngineDetails
from mge_runtime.trt.found import find_engines
from mge_runtime.trt.keep import native_library
from mge_runtime.trt.target import Target

FOLDER = Path(__file__).with_name("machines")
NO_PLAN = b"no engine: whoever deserialises this fails"


def recorded(name):
    return Machine.from_json((FOLDER / f"{name}.json").read_bytes(), name)


CPU, ORIN, THOR = map(recorded, ("bare-cpu-x86_64", "jetson-agx-orin-jetpack-6.2", "jetson-agx-thor-jetpack-7.1"))
RTX3060, RTX4090 = recorded("rtx-3060-linux-tensorrt-rtx-1.7"), recorded("rtx-4090-windows-tensorrt-rtx-1.7")
T4_RTX, T4, RTX5090 = recorded("t4-tensorrt-rtx-1.7"), recorded("t4-tensorrt-10.13"), recorded("rtx-5090-no-cuda-core")
H100_ORT, H100 = recorded("h100-onnxruntime-gpu"), recorded("h100-tensorrt-11.4")


@dataclass(frozen=True)
class Engine:
    target: str
    version: str
    gpu: Gpu | None = None
    left_out: tuple[str, ...] = ()  # stages


FOR_RTX = Engine("tensorrt-rtx-1.7-sm86-sm89-sm120-linux-x86_64", "1.7.1.116")
FOR_WINDOWS = replace(FOR_RTX, target="tensorrt-rtx-1.7-sm86-sm89-sm120-windows-x86_64")
FOR_ORIN = Engine("tensorrt-10.3-sm87-linux-aarch64", "10.3.0", ORIN.gpus[0])
FOR_THOR = Engine("tensorrt-10.13-sm110-linux-aarch64", "10.13.3", THOR.gpus[0])
FOR_T4 = Engine("tensorrt-10.13-sm75-linux-x86_64", "10.13.3.9", T4.gpus[0])
FOR_H100 = Engine("tensorrt-11.4-sm90-linux-x86_64", "11.4.0.106", H100.gpus[0])
EVERYWHERE = (FOR_RTX, FOR_WINDOWS, FOR_ORIN, FOR_THOR, FOR_T4, FOR_H100)


@pytest.fixture
def make(tiny, tmp_path, monkeypatch):
    """Make bundles, real ones, with bytes in place of engines; the working folder is theirs."""
    monkeypatch.chdir(tmp_path)

    def make(*engines, operators=None):
        graphs = tiny.make_stages()
        manifest = tiny.make_manifest(graphs)
        if operators is not None:
            plans = {
                stage: {**plan, "type": "fp16", "operators": operators} for stage, plan in manifest.precision.items()
            }
            manifest = replace(manifest, precision=plans)
        path = tmp_path / "mge.plan"
        write_bundle(path, manifest, {g.spec.name: g.model() for g in graphs})
        with Bundle.open(path) as bundle:
            digest, stages = bundle.manifest_sha256, [s.name for s in bundle.manifest.stages]
        for engine in engines:
            plans = {stage: NO_PLAN for stage in stages if stage not in engine.left_out}
            add_engine(path, engine.target, plans, details(engine).to_dict(), manifest_sha256=digest)
        return path

    return make


def details(engine):
    precision = {"expert_1": {"type": "fp16", "attested": "network"}}
    return EngineDetails(engine.version, engine.gpu, BatchRange(1, 1, 8), precision, {}, "mge test")


def chosen(path, machine, device="auto", backend="auto", **options):
    with Bundle.open(path) as bundle:
        return choose(device, backend, bundle=bundle, machine=machine, **options)


def refusal(path, machine, device="auto", backend="auto"):
    with pytest.raises(BackendError) as caught:
        chosen(path, machine, device, backend)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("machine", "backend", "target"),
    [
        (ORIN, "tensorrt", FOR_ORIN),
        (THOR, "tensorrt", FOR_THOR),
        (RTX3060, "tensorrt-rtx", FOR_RTX),
        (RTX4090, "tensorrt-rtx", FOR_WINDOWS),
        (T4, "tensorrt", FOR_T4),
        (H100, "tensorrt", FOR_H100),
    ],
)
def test_one_bundle_has_the_engine_for_each(make, machine, backend, target):
    choice = chosen(make(*EVERYWHERE), machine)
    assert (choice.backend, choice.device, choice.build) == (backend, "cuda:0", False)
    assert choice.engines.description.target == target.target
    assert choice.gpu == machine.gpus[0]
    assert choice.reason == f"the engines {target.target} in the bundle are for {machine.gpus[0]}"


@pytest.mark.parametrize(
    ("machine", "expected", "not_tensorrt"),
    [
        (CPU, "onnxruntime on cpu", "no NVIDIA driver is installed (libcuda.so.1 cannot be loaded)"),
        (
            RTX5090,
            "onnxruntime on cpu",
            'an NVIDIA driver for CUDA 13.2 is here, and cuda-core is not installed: pip install "cuda-core[cu13]"',
        ),
        (
            H100_ORT,
            "onnxruntime on cuda:0",
            'tensorrt is not installed: pip install "mge[tensorrt]" (on a Jetson it comes with JetPack)',
        ),
    ],
)
def test_the_same_bundle_runs_its_onnx_elsewhere(make, machine, expected, not_tensorrt):
    choice = chosen(make(*EVERYWHERE), machine)
    assert (str(choice), choice.engines, choice.build) == (expected, None, False)
    assert choice.passed_over[0].backend == "tensorrt"
    assert choice.passed_over[0].reason == not_tensorrt


@pytest.mark.parametrize(
    ("machine", "backend", "command"),
    [
        (ORIN, "tensorrt", "mge-build mge.plan (on this device)"),
        (THOR, "tensorrt", "mge-build mge.plan (on this device)"),
        (RTX3060, "tensorrt-rtx", "mge-build mge.plan --target rtx:sm86 --into-bundle (on any linux x86_64 machine)"),
        (RTX4090, "tensorrt-rtx", "mge-build mge.plan --target rtx:sm89 --into-bundle (on any windows x86_64 machine)"),
        (T4_RTX, "tensorrt-rtx", "mge-build mge.plan --target rtx:sm75 --into-bundle (on any linux x86_64 machine)"),
        (T4, "tensorrt", "mge-build mge.plan (on this device)"),
        (H100, "tensorrt", "mge-build mge.plan (on this device)"),
    ],
)
def test_without_engines_it_builds_and_names_the_command(make, machine, backend, command):
    choice = chosen(make(), machine)
    assert (choice.backend, choice.engines, choice.build) == (backend, None, True)
    assert choice.reason == (
        f"no engines are ready for {machine.gpus[0]} (the bundle has none): "
        f"they are built on opening, into the cache; to build them now: {command}"
    )


SMALL_ORIN = replace(ORIN.gpus[0], multiprocessors=14)
RTX3070 = replace(RTX3060, gpus=(Gpu("NVIDIA GeForce RTX 3070", "sm86", 8 << 30, 46),))
RTX3060_TENSORRT = replace(RTX3060, libraries={"tensorrt": "10.13.3.9", "cuda-core": "1.2.2"})


@pytest.mark.parametrize(
    ("machine", "engine", "why"),
    [
        (
            ORIN,
            replace(FOR_ORIN, gpu=SMALL_ORIN),
            "was built on Orin (sm87) with 14 multiprocessors, this GPU is Orin (sm87) with 16 multiprocessors",
        ),
        (ORIN, replace(FOR_ORIN, version="10.7.0"), "was built by tensorrt 10.7.0, 10.3.0 is installed here"),
        (ORIN, FOR_THOR, "is for sm110, this GPU is Orin (sm87)"),
        (ORIN, replace(FOR_ORIN, gpu=None), "does not say which GPU it was built on"),
        (ORIN, replace(FOR_ORIN, left_out=("gate",)), "has no engine for the stage gate"),
        (RTX3060, FOR_WINDOWS, "is for windows x86_64, this machine is linux x86_64"),
        (RTX4090, FOR_RTX, "is for linux x86_64, this machine is windows x86_64"),
        (
            RTX3060,
            replace(FOR_RTX, version="1.7.0.99"),
            "was built by tensorrt-rtx 1.7.0.99, 1.7.1.116 is installed here",
        ),
        (
            RTX3060,
            replace(FOR_RTX, target="tensorrt-rtx-1.7-sm120-sm121-linux-x86_64"),
            "is for sm120 or sm121, this GPU is NVIDIA GeForce RTX 3060 (sm86)",
        ),
        (
            RTX3060_TENSORRT,
            Engine("tensorrt-10.13-sm86-linux-x86_64", "10.13.3.9", RTX3070.gpus[0]),
            "was built on NVIDIA GeForce RTX 3070 (sm86) with 46 multiprocessors, "
            "this GPU is NVIDIA GeForce RTX 3060 (sm86) with 28 multiprocessors",
        ),
    ],
)
def test_an_engine_for_something_else_is_never_chosen_and_the_line_says_why(make, machine, engine, why):
    choice = chosen(make(engine), machine)
    assert (choice.engines, choice.build) == (None, True)
    assert choice.reason.startswith(
        f"no engines are ready for {machine.gpus[0]} ({engine.target} in the bundle {why}): they are built on opening"
    )


def test_engines_that_were_built_here_without_a_gpu_are_chosen_for_the_device(make):
    pytest.importorskip("tensorrt_rtx")
    path = make()
    built = CliRunner().invoke(build, [str(path), "--target", "rtx:sm86,sm120", "--into-bundle", "--batch", "1"])
    assert built.exit_code == 0, built.output
    machine = describe_machine(gpus=False)  # engines are for the platform they were built on
    here = replace(RTX3060, system=machine.system, arch=machine.arch, libraries={**machine.libraries})
    choice = chosen(path, here)
    assert (choice.backend, choice.build) == ("tensorrt-rtx", False)
    assert choice.engines.description.plans["expert_1"].size > 10_000
    assert chosen(path, replace(here, gpus=RTX4090.gpus)).reason.startswith(
        f"no engines are ready for NVIDIA GeForce RTX 4090 (sm89) ({choice.engines.description.target} in the bundle "
        "is for sm86 or sm120, this GPU is NVIDIA GeForce RTX 4090 (sm89)): "
    )


def test_rtx_engines_serve_every_gpu_of_their_capabilities(make):
    path = make(FOR_RTX)
    assert chosen(path, RTX3070).engines.description.target == FOR_RTX.target


def test_engines_that_are_ready_go_before_engines_to_build(make):
    both = replace(RTX3060, libraries={**RTX3060.libraries, "tensorrt": "10.13.3.9"})
    choice = chosen(make(FOR_RTX), both)
    assert (choice.backend, choice.build) == ("tensorrt-rtx", False)
    assert [(c.backend, c.build) for c in choice.passed_over] == [("tensorrt", True)]
    assert chosen(make(), both).backend == "tensorrt"


@pytest.mark.parametrize(
    ("machine", "backend", "line"),
    [
        (
            ORIN,
            "tensorrt-rtx",
            "(tensorrt-rtx on cuda:0: TensorRT-RTX does not serve sm87 (Jetson Orin); full TensorRT does); "
            "the bundle has engines for tensorrt-rtx-1.7-sm86-sm89-sm120-linux-x86_64; "
            "this device is Orin (sm87), linux aarch64; "
            "build for it with full TensorRT: mge-build mge.plan (on this device)",
        ),
        (
            THOR,
            "tensorrt-rtx",
            "(tensorrt-rtx on cuda:0: TensorRT-RTX does not serve sm110 (Jetson Thor); full TensorRT does); "
            "the bundle has engines for tensorrt-rtx-1.7-sm86-sm89-sm120-linux-x86_64; "
            "this device is NVIDIA Thor (sm110), linux aarch64; "
            "build for it with full TensorRT: mge-build mge.plan (on this device)",
        ),
        (
            H100_ORT,
            "tensorrt-rtx",
            "(tensorrt-rtx on cuda:0: TensorRT-RTX does not serve sm90 (Hopper); full TensorRT does); "
            "the bundle has engines for tensorrt-rtx-1.7-sm86-sm89-sm120-linux-x86_64; "
            "this device is NVIDIA H100 80GB HBM3 (sm90), linux x86_64; "
            "build for it with full TensorRT: mge-build mge.plan (on this device)",
        ),
        (
            RTX3060,
            "tensorrt",
            "(tensorrt on cuda:0: tensorrt is not installed: "
            'pip install "mge[tensorrt]" (on a Jetson it comes with JetPack)); '
            "the bundle has engines for tensorrt-rtx-1.7-sm86-sm89-sm120-linux-x86_64; "
            "this device is NVIDIA GeForce RTX 3060 (sm86), linux x86_64; "
            "then build for it: mge-build mge.plan (on this device)",
        ),
        (
            replace(ORIN, libraries={"cuda-core": "1.2.2"}),
            "tensorrt",
            "(tensorrt on cuda:0: tensorrt is not installed: TensorRT comes with JetPack: "
            "sudo apt install nvidia-jetpack, in an environment with --system-site-packages); "
            "the bundle has engines for tensorrt-rtx-1.7-sm86-sm89-sm120-linux-x86_64; "
            "this device is Orin (sm87), linux aarch64; then build for it: mge-build mge.plan (on this device)",
        ),
    ],
)
def test_who_insists_reads_what_was_found_what_is_here_and_what_to_do(make, machine, backend, line):
    start = f"nothing can run device 'auto' and backend '{backend}' "
    assert refusal(make(FOR_RTX), machine, backend=backend) == start + line


@pytest.mark.parametrize(
    ("operators", "refused"),
    [
        ({"Conv": {"float16": 9}, "Gemm": {"float32": 3}}, True),
        ({"Conv": {"float16": 9}, "MatMul": {"float32": 1, "float16": 2}}, True),
        ({"Conv": {"float16": 9}, "Gemm": {"float16": 3}, "Softmax": {"float32": 1}}, False),
    ],
)
def test_turing_takes_no_fp32_products(make, operators, refused):
    path = make(operators=operators)
    if not refused:
        assert chosen(path, T4_RTX).build
        return
    choice = chosen(path, T4_RTX)
    assert str(choice) == "onnxruntime on cpu"
    rtx = next(c for c in choice.passed_over if c.backend == "tensorrt-rtx")
    assert "cannot run on sm75: its " in rtx.reason
    assert "mge-export --fp16 --target rtx:sm75" in rtx.reason
    assert "mge-build" not in refusal(path, T4_RTX, backend="tensorrt-rtx")
    assert chosen(path, T4).build, "full TensorRT has FP32 products on Turing"
    assert chosen(path, RTX3060).build, "and TensorRT-RTX has them from Ampere on"


def test_the_cache_counts_on_this_machine_alone(make, monkeypatch, tmp_path):
    monkeypatch.setenv("MGE_CACHE_DIR", str(tmp_path / "cache"))
    path = make(replace(FOR_ORIN, version="10.7.0"))
    (tmp_path / "plan").write_bytes(NO_PLAN)
    with Bundle.open(path) as bundle:
        plans = {stage.name: tmp_path / "plan" for stage in bundle.manifest.stages}
        store_engines(bundle.manifest_sha256, Target.parse(FOR_ORIN.target), ORIN.gpus[0], plans, details(FOR_ORIN))
        found = find_engines(bundle, ORIN, ORIN.gpus[0], cache=True)
    assert [(f.in_bundle, f.problem is None) for f in found] == [(True, False), (False, True)]
    choice = chosen(path, ORIN, cache=True)
    assert not choice.build
    assert choice.engines.place.startswith("in the cache, ")
    assert chosen(path, ORIN).build
    assert "10.3.1 is installed" in chosen(path, with_version(ORIN, "tensorrt", "10.3.1"), cache=True).reason


def with_version(machine, library, version):
    return replace(machine, libraries={**machine.libraries, library: version})


def test_engines_nobody_here_can_read_are_passed_over(make):
    path = make(FOR_RTX)
    with Bundle.open(path) as bundle:
        digest = bundle.manifest_sha256
    add_engine(path, "tensorrt-rtx-1.7-sm86-linux-x86_64", {"gate": NO_PLAN}, {"note": 1}, manifest_sha256=digest)
    add_engine(path, "tensorrt-rtx-of-tomorrow", {"gate": NO_PLAN}, {}, manifest_sha256=digest)
    assert chosen(path, RTX3060).engines.description.target == FOR_RTX.target
    choice = chosen(path, with_version(RTX3060, "tensorrt-rtx", "1.8.0.1"))
    assert choice.build
    assert "cannot be read: " in choice.reason
    assert "is no target that this version of mge knows" in choice.reason


# --- the deserialiser ---------------------------------------------------------------------------------------------


@pytest.fixture
def locked(monkeypatch):
    """Fail when a byte of an engine is read, or anything that could deserialise one is loaded."""

    def view(_, name):
        raise AssertionError(f"{name} was read")

    def read(self, name):
        assert not name.endswith(".plan"), f"{name} was read"
        return original(self, name)

    original = Bundle.read
    monkeypatch.setattr(Bundle, "view", view)
    monkeypatch.setattr(Bundle, "read", read)
    monkeypatch.setitem(sys.modules, "mge_runtime.backends.tensorrt", None)


@pytest.mark.usefixtures("locked")
def test_choosing_reads_no_engine(make):
    path = make(*EVERYWHERE)
    for machine in (CPU, ORIN, THOR, RTX3060, RTX4090, T4_RTX, T4, H100, H100_ORT, RTX5090):
        chosen(path, machine)


@pytest.mark.usefixtures("locked")
def test_opening_asks_the_library_for_its_version_before_it_reads_an_engine(make):
    """The real TensorRT-RTX is loaded; a description of the machine that lags behind it is found out."""
    pytest.importorskip("tensorrt_rtx")
    path = make(replace(FOR_RTX, version="1.7.0.99"))
    with Bundle.open(path) as bundle:
        choice = choose(bundle=bundle, machine=with_version(RTX3060, "tensorrt-rtx", "1.7.0.99"))
        assert choice.engines is not None
        with pytest.raises(BackendError) as caught:
            open_backend(choice, bundle)
    assert str(caught.value).startswith(f"{FOR_RTX.target} in the bundle was built by tensorrt-rtx 1.7.0.99, 1.")
    assert str(caught.value).endswith(
        "build again: mge-build mge.plan --target rtx:sm86 --into-bundle (on any linux x86_64 machine)"
    )


def test_a_damaged_engine_is_no_engine(make):
    path = make(FOR_RTX)
    with Bundle.open(path) as bundle:
        offset = bundle.region(f"engines/{FOR_RTX.target}/gate.plan").offset
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"X")
    with Bundle.open(path) as bundle:
        engines = choose(bundle=bundle, machine=RTX3060).engines
        assert bytes(engines.plan("ingest")) == NO_PLAN
        with pytest.raises(BundleError, match=r"gate\.plan do not match"):
            engines.plan("gate")


@pytest.mark.parametrize(
    ("machine", "library"),
    [
        (ORIN, "tensorrt"),
        (THOR, "tensorrt"),
        (H100, "tensorrt"),
        (T4, "tensorrt"),
        (RTX3060, "tensorrt-rtx"),
        (RTX4090, "tensorrt-rtx"),
    ],
)
def test_a_machine_builds_with_the_library_it_has(machine, library):
    assert native_library(machine, 0) == library
    assert native_library(machine, 0, library) == library


@pytest.mark.parametrize(
    ("machine", "backend", "line"),
    [
        (ORIN, "tensorrt-rtx", "TensorRT-RTX does not serve sm87 (Jetson Orin); full TensorRT does"),
        (
            replace(ORIN, libraries={"cuda-core": "1.2.2"}),
            "auto",
            "tensorrt is not installed: TensorRT comes with JetPack: sudo apt install nvidia-jetpack",
        ),
        (replace(H100, libraries=H100.libraries | {"tensorrt": "12.0.1"}), "tensorrt", "tensorrt 12.0.1 is not served"),
        (replace(ORIN, libraries=ORIN.libraries | {"tensorrt": "8.6.2"}), "auto", "tensorrt 8.6.2 is not served"),
        (replace(RTX3060, broken={"tensorrt-rtx": "libcuda"}), "tensorrt-rtx", "cannot be imported (libcuda)"),
        (CPU, "auto", "there is no GPU cuda:0 here to build for (no NVIDIA driver is installed"),
        (RTX5090, "auto", "cuda-core is not installed"),
    ],
)
def test_where_nothing_can_build_one_line_says_why(machine, backend, line):
    with pytest.raises(BackendError) as caught:
        native_library(machine, 0, backend)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ("mge[rtx]" in str(caught.value)) == (backend == "tensorrt-rtx" and machine.gpus[0].name != "Orin")


def test_a_jetson_is_not_told_to_install_what_has_no_wheel_for_it():
    choice = choose(machine=replace(ORIN, libraries={"cuda-core": "1.2.2", "onnxruntime": "1.23.2"}))
    (reason,) = (other.reason for other in choice.passed_over if other.backend == "onnxruntime")
    assert (choice.device, reason) == ("cpu", "onnxruntime-gpu has no wheel for the GPU of a Jetson")


def test_engines_are_built_on_opening_and_what_fails_there_is_one_line(make):
    """Without a GPU the build ends where it would begin: at the device."""
    vendor = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra `rtx`)")
    if describe_machine().gpus:
        pytest.skip("there is a GPU here")
    machine = replace(RTX3060, libraries=RTX3060.libraries | {"tensorrt-rtx": vendor.__version__})
    said = []
    with Bundle.open(make()) as bundle:
        choice = choose(bundle=bundle, machine=machine)
        assert (choice.backend, choice.build) == ("tensorrt-rtx", True)
        with pytest.raises(BackendError, match=r"^cuda:0 cannot be opened: .*") as caught:
            open_backend(choice, bundle, say=said.append)
    assert "\n" not in str(caught.value)
    assert "no engines are ready for NVIDIA GeForce RTX 3060 (sm86)" in said[0]


def test_a_gpu_that_is_not_used_is_remarked(make):
    with Bundle.open(make(FOR_RTX)) as bundle:
        without = replace(RTX3060, libraries={"cuda-core": "1.2.2", "onnxruntime": "1.31.1"})
        remark = choose(bundle=bundle, machine=without).remark
        assert remark.startswith(
            "running with onnxruntime on cpu; not with tensorrt on cuda:0: tensorrt is not installed"
        )
        assert 'tensorrt_rtx is not installed: pip install "mge[rtx]"' in remark
        assert "\n" not in remark
        assert "cuda-core is not installed" in choose(bundle=bundle, machine=RTX5090).remark
        # What runs best, what was asked for, and a machine without a driver leave nothing to say.
        assert choose(bundle=bundle, machine=RTX3060).remark is None
        assert choose("cpu", bundle=bundle, machine=without).remark is None
        assert choose(bundle=bundle, machine=CPU).remark is None


def test_int8_is_not_left_to_a_library_that_nobody_has_seen_answer_it(make, tiny, tmp_path):
    with Bundle.open(make()) as bundle:
        assert str(choose(bundle=bundle, machine=H100_ORT)) == "onnxruntime on cuda:0"
    graphs = tiny.make_stages()
    manifest = tiny.make_manifest(graphs)
    manifest = replace(manifest, precision={**manifest.precision, "expert_1": {"type": "int8"}})
    write_bundle(tmp_path / "int8.plan", manifest, {g.spec.name: g.model() for g in graphs})
    with Bundle.open(tmp_path / "int8.plan") as bundle:
        choice = choose(bundle=bundle, machine=H100_ORT)
        assert str(choice) == "onnxruntime on cpu"
        assert "INT8 has not been checked with ONNX Runtime on CUDA" in choice.remark
