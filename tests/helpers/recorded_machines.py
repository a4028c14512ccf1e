"""The machines whose descriptions lie in `tests/runtime/machines/`, engines for them, and what is chosen there."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mge_runtime.backends import choose
from mge_runtime.bundle import Bundle, add_engine
from mge_runtime.errors import BackendError
from mge_runtime.machine import Gpu, Machine
from mge_runtime.trt.engines import EngineDetails
from mge_runtime.trt.target import BatchRange
from tests.helpers.chain_runs import write_chain

FOLDER = Path(__file__).parents[1] / "runtime" / "machines"
NO_PLAN = b"no engine: whoever deserializes this fails"


def recorded(name):
    return Machine.from_json((FOLDER / f"{name}.json").read_bytes(), name)


CPU, ORIN, THOR = map(recorded, ("bare-cpu-x86_64", "jetson-agx-orin-jetpack-6.2", "jetson-agx-thor-jetpack-7.1"))
RTX3060, RTX4090 = recorded("rtx-3060-linux-tensorrt-rtx-1.7"), recorded("rtx-4090-windows-tensorrt-rtx-1.7")
T4_RTX, T4, RTX5090 = recorded("t4-tensorrt-rtx-1.7"), recorded("t4-tensorrt-10.13"), recorded("rtx-5090-no-cuda-core")
H100_ORT, H100 = recorded("h100-onnxruntime-gpu"), recorded("h100-tensorrt-11.4")
RTX3070 = replace(RTX3060, gpus=(Gpu("NVIDIA GeForce RTX 3070", "sm86", 8 << 30, 46),))
NO_TENSORRT = replace(ORIN, libraries={"cuda-core": "1.2.2"})


@dataclass(frozen=True)
class Engine:
    target: str
    version: str
    gpu: Gpu | None = None
    left_out: tuple[str, ...] = ()  # graphs


FOR_RTX = Engine("tensorrt-rtx-1.7-sm86-sm89-sm120-linux-x86_64", "1.7.1.116")
FOR_WINDOWS = replace(FOR_RTX, target="tensorrt-rtx-1.7-sm86-sm89-sm120-windows-x86_64")
FOR_ORIN = Engine("tensorrt-10.3-sm87-linux-aarch64", "10.3.0", ORIN.gpus[0])
FOR_THOR = Engine("tensorrt-10.13-sm110-linux-aarch64", "10.13.3", THOR.gpus[0])
FOR_T4 = Engine("tensorrt-10.13-sm75-linux-x86_64", "10.13.3.9", T4.gpus[0])
FOR_H100 = Engine("tensorrt-11.4-sm90-linux-x86_64", "11.4.0.106", H100.gpus[0])
EVERYWHERE = (FOR_RTX, FOR_WINDOWS, FOR_ORIN, FOR_THOR, FOR_T4, FOR_H100)


def details(engine):
    precision = {"expert_1": {"type": "fp16", "attested": "network"}}
    return EngineDetails(engine.version, engine.gpu, BatchRange(1, 1, 8), precision, {}, "mge test")


def write_with_engines(tiny, path, *engines, **plan):
    """Write a tiny bundle that holds bytes in place of these engines; `plan` is said of each graph's precision."""

    def told(made):
        return replace(made, precision={name: {**known, **plan} for name, known in made.precision.items()})

    write_chain(tiny, path, manifest=told)
    with Bundle.open(path) as bundle:
        digest, graphs = bundle.manifest_sha256, [graph.name for graph in bundle.manifest.graphs]
    for engine in engines:
        plans = {graph: NO_PLAN for graph in graphs if graph not in engine.left_out}
        add_engine(path, engine.target, plans, details(engine).to_dict(), manifest_sha256=digest)
    return path


def lock_engines(patch):
    """Fail when a byte of an engine is read."""

    def view(_, name):
        pytest.fail(f"{name} was read")

    def read(self, name):
        assert not name.endswith(".plan"), f"{name} was read"
        return original(self, name)

    original = Bundle.read
    patch.setattr(Bundle, "view", view)
    patch.setattr(Bundle, "read", read)


def chosen(path, machine, device="auto", backend="auto", **options):
    """What runs a bundle on a machine; no engine is read for it."""
    with pytest.MonkeyPatch.context() as patch, Bundle.open(path) as bundle:
        lock_engines(patch)
        return choose(device, backend, bundle=bundle, machine=machine, **options)


def refusal(path, machine, device="auto", backend="auto"):
    with pytest.raises(BackendError) as caught:
        chosen(path, machine, device, backend)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_version(machine, library, version):
    return replace(machine, libraries={**machine.libraries, library: version})
