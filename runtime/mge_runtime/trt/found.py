"""The engines that lie ready for a bundle, each with the reason why it does not run here, if there is one."""

from __future__ import annotations

from dataclasses import dataclass

from mge_runtime.bundle import Bundle
from mge_runtime.errors import BundleError
from mge_runtime.machine import Gpu, Machine
from mge_runtime.trt.cache import cached_engines
from mge_runtime.trt.engines import BundleEngines, EngineSet
from mge_runtime.trt.fit import why_not

__all__ = ["FoundEngines", "find_engines"]


@dataclass(frozen=True)
class FoundEngines:
    """The engines of one target."""

    target: str
    place: str  # where they lie, for people
    in_bundle: bool  # or in the cache
    engines: EngineSet | None  # None: their description cannot be read
    problem: str | None  # why they do not run here, to follow `__str__`; None: they do

    def __str__(self) -> str:
        """For example "tensorrt-10.3-sm87-linux-aarch64 in the bundle"."""
        return f"{self.target} {self.place}"

    @property
    def backend(self) -> str:
        """Which backend they are for: "tensorrt" or "tensorrt-rtx"."""
        return "tensorrt-rtx" if self.target.startswith("tensorrt-rtx-") else "tensorrt"


def find_engines(bundle: Bundle, machine: Machine, gpu: Gpu | None, *, cache: bool) -> list[FoundEngines]:
    """Every engine that the bundle holds, then those of the cache. Descriptions are read, engines are not.

    Args:
        bundle: the bundle.
        machine: where they are to run.
        gpu: on which of its GPUs; None: it has none that can be used.
        cache: whether to look into this machine's cache too.
    """
    found: list[FoundEngines] = []
    for target in bundle.targets:
        try:
            engines = BundleEngines(bundle, target)
        except BundleError as error:
            found.append(FoundEngines(target, "in the bundle", True, None, f"cannot be read: {error}"))
        else:
            found.append(_judged(engines, bundle, machine, gpu, in_bundle=True))
    if cache:
        cached = cached_engines(bundle.manifest_sha256)
        found += [_judged(engines, bundle, machine, gpu, in_bundle=False) for engines in cached]
    return found


def _judged(engines: EngineSet, bundle: Bundle, machine: Machine, gpu: Gpu | None, *, in_bundle: bool) -> FoundEngines:
    built = engines.description.plans
    problem = why_not(engines.target, engines.details, built, machine, gpu, bundle.manifest)
    return FoundEngines(engines.description.target, engines.place, in_bundle, engines, problem)
