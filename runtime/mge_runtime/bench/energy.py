"""Energy of the chain, from the counters of the GPU (NVML) or of the processor (RAPL), where they can be read."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mge_runtime.bench.contender import Contender

__all__ = ["Energy", "Meter", "find_meter", "measure_energy"]

_RAPL = Path("/sys/class/powercap")
_SECONDS = 5.0  # a package counter moves every millisecond, NVML's every 20 to 100


@dataclass(frozen=True)
class Meter:
    """A counter of energy."""

    name: str  # what it counts
    joules: Callable[[], float]  # since some moment
    wraps_at: float | None = None  # joules after which it starts again at 0


@dataclass(frozen=True)
class Energy:
    """What so many images took."""

    meter: str
    images: int
    seconds: float
    joules: float  # of everything that the counter counts, idle power included

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


def measure_energy(meter: Meter, chain: Contender, batch: int, seconds: float = _SECONDS) -> Energy:
    """Run the chain alone for a while.

    Args:
        meter: what counts.
        chain: warm.
        batch: images in one of its runs.
        seconds: for how long, at least.
    """
    runs = 0
    start, before = time.perf_counter(), meter.joules()
    while (passed := time.perf_counter() - start) < seconds or not runs:
        chain.run()
        runs += 1
    joules = meter.joules() - before
    if joules < 0 and meter.wraps_at is not None:
        joules += meter.wraps_at
    return Energy(meter.name, runs * batch, passed, joules)


def _rapl(root: Path) -> Meter | str:
    counters: list[Path] = []
    most = 0.0
    try:
        for zone in sorted(root.glob("intel-rapl:*")):
            if (zone / "name").read_text().startswith("package"):
                int((zone / "energy_uj").read_text())
                counters.append(zone / "energy_uj")
                most = int((zone / "max_energy_range_uj").read_text()) / 1e6
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return f"the processor's energy counters (RAPL) cannot be read: {reason}"
    if not counters:
        return "this system offers no energy counters of the processor (RAPL)"

    def joules() -> float:
        return sum(int(counter.read_text()) for counter in counters) / 1e6

    return Meter(f"RAPL, {len(counters)} processor package(s)", joules, most if len(counters) == 1 else None)


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

    return Meter(f"NVML, cuda:{index}", joules)
