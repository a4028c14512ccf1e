"""Energy of the chain, from the counters of the GPU (NVML) or of the processor (RAPL), where they can be read."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mge_runtime.bench.contender import Contender

__all__ = ["Counter", "Energy", "Meter", "find_meter", "measure_energy"]

_RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """One counter of energy."""

    joules: Callable[[], float]  # since some moment
    wraps_at: float | None = None  # joules after which it starts again at 0

    def since(self, before: float) -> float:
        """Joules since it stood there; it may have started again once meanwhile."""
        passed = self.joules() - before
        return passed + self.wraps_at if passed < 0 and self.wraps_at is not None else passed


@dataclass(frozen=True)
class Meter:
    """The counters of a device; a machine may have several processor packages, and each counter wraps by itself."""

    name: str  # what they count
    counters: tuple[Counter, ...]


@dataclass(frozen=True)
class Energy:
    """What so many images took."""

    meter: str
    images: int
    seconds: float
    joules: float  # of everything that the counters count, idle power included

    @property
    def joules_per_image(self) -> float:
        """On average."""
        return self.joules / self.images


def find_meter(device: str, root: Path = _RAPL) -> Meter | str:
    """The counter for a device, or why there is none.

    Args:
        device: "cpu" or "cuda:0".
        root: where Linux has its power caps.
    """
    return _nvml(int(device.partition(":")[2])) if device.startswith("cuda:") else _rapl(root)


def measure_energy(meter: Meter, chain: Contender, batch: int, seconds: float) -> Energy:
    """Run the chain alone for a while.

    Args:
        meter: what counts.
        chain: warm.
        batch: images in one of its runs.
        seconds: for how long, at least; a package counter moves every millisecond, NVML's every 20 to 100.
    """
    runs = 0
    start, before = time.perf_counter(), [counter.joules() for counter in meter.counters]
    while (passed := time.perf_counter() - start) < seconds or not runs:
        chain.run()
        runs += 1
    joules = sum(counter.since(then) for counter, then in zip(meter.counters, before, strict=True))
    return Energy(meter.name, runs * batch, passed, joules)


def _rapl(root: Path) -> Meter | str:
    counters: list[Counter] = []
    try:
        for zone in sorted(root.glob("intel-rapl:*")):
            if (zone / "name").read_text().startswith("package"):
                counter = partial(_microjoules, zone / "energy_uj")
                counter()  # whether it may be read
                counters.append(Counter(counter, _microjoules(zone / "max_energy_range_uj")))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return f"the processor's energy counters (RAPL) cannot be read: {reason}"
    if not counters:
        return "this system offers no energy counters of the processor (RAPL)"

    return Meter(f"RAPL, {len(counters)} processor package(s)", tuple(counters))


def _microjoules(file: Path) -> float:
    """What a file of microjoules holds, J."""
    return int(file.read_text()) / 1e6


def _nvml(index: int) -> Meter | str:
    """NVML numbers GPUs by bus, CUDA by speed unless CUDA_DEVICE_ORDER says otherwise: they are matched by bus id."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return "NVML's Python module is not installed: pip install nvidia-ml-py"
    try:
        runtime: Any = importlib.import_module("cuda.core")
        nvml.nvmlInit()
        handle: Any = nvml.nvmlDeviceGetHandleByPciBusId(runtime.Device(index).pci_bus_id.encode())
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # NVMLError, or a cuda-core without this name
        return f"NVML does not tell the energy of cuda:{index}: {' '.join(str(error).split())[:200]}"

    def joules() -> float:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3  # millijoules

    return Meter(f"NVML, cuda:{index}", (Counter(joules),))
