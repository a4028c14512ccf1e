"""Checks of engines that need no answer of theirs: what is refused, and what is known of their precision."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

from mge_runtime.backends import Choice, open_backend
from mge_runtime.bundle import Bundle, add_engine
from mge_runtime.errors import BackendError
from mge_runtime.fields import JsonValue
from mge_runtime.files import temporary_folder
from mge_runtime.machine import Gpu, Machine
from mge_runtime.selfcheck.check import Check, judged, not_run
from mge_runtime.selfcheck.subject import Subject
from mge_runtime.trt.engines import BundleEngines, EngineDetails, EngineSet, find_engines
from mge_runtime.trt.target import BatchRange, Target
from mge_runtime.trt.vendor import load_vendor

__all__ = ["check_attested", "check_refused"]

_NO_ENGINE = b"no engine: whoever deserialises this fails"
# Stands in where there is no GPU: descriptions decide, so no GPU is needed to see them decide.
_STAND_IN = Gpu("NVIDIA GeForce RTX 3060", "sm86", 12 * 2**30, 28)
_ELSEWHERE = (Gpu("Orin", "sm87", 32 * 2**30, 16, integrated=True), _STAND_IN)


def check_refused(subject: Subject) -> Check:
    """Engines for another GPU, another version and another operating system, put into a copy of the bundle.

    Each must be refused with one line, and none of their bytes may be read.

    Raises:
        BundleError: the bundle cannot be read.
        OutputError: there is no room for a copy.
    """
    expected = "each engine set that does not fit is refused with one line, before a byte of an engine is read"
    gpu = _gpu(subject)
    backend, version = _library(subject)
    machine = replace(
        subject.machine,
        gpus=subject.machine.gpus or (gpu,),
        libraries={**subject.machine.libraries, backend: version or "10.3.0"},
    )
    failures: list[str] = []
    lines: dict[str, JsonValue] = {}
    with temporary_folder("selfcheck") as folder:
        copy = folder / subject.path.name
        shutil.copyfile(subject.path, copy)
        for what, (target, details) in _misfits(backend, machine, gpu).items():
            plans = {graph.name: _NO_ENGINE for graph in subject.manifest.graphs}
            add_engine(copy, target.name, plans, details.to_dict(), manifest_sha256=subject.manifest_sha256)
            with Bundle.open(copy) as bundle:
                line = _refusal(bundle, target, machine, gpu, subject, opens=version is not None)
            # The place of the copy is nobody's business.
            lines[what] = line = line.replace(f"{folder}/", "")
            if not line or "\n" in line or target.name not in line:
                failures.append(f"engines for {what}: {line or 'not refused'}")
    found = "; ".join(f"{what}: {line}" for what, line in lines.items())
    if not subject.machine.gpus:
        found = f"there is no GPU here, so the device is a described one, {gpu}: {found}"
    if version is None:
        found += " (by description; neither tensorrt nor tensorrt_rtx is here to open them with)"
    return judged("engines that do not fit are refused", failures, found, expected, lines)


def check_attested(subject: Subject) -> Check:
    """What the engines' own descriptions say of their precision, and by what check.

    Raises:
        BundleError: a description is damaged.
    """
    name, expected = "the precision of every engine is attested", "for each graph the bundle's precision and who saw it"
    with Bundle.open(subject.path) as bundle:
        sets: list[EngineSet] = [BundleEngines(bundle, target) for target in bundle.targets]
        known = {(engines.target.name, engines.place) for engines in sets}
        if subject.engines is not None and (subject.engines.target.name, subject.engines.place) not in known:
            sets.append(subject.engines)
    if not sets:
        return not_run(name, f"the bundle has no engines, and {subject} runs none", expected)
    failures: list[str] = []
    counts: dict[str, JsonValue] = {}
    for engines in sets:
        tally = {"engine": 0, "network": 0}
        for graph in subject.manifest.graphs:
            problem, attested = _attestation(engines, graph.name, subject)
            if problem:
                failures.append(f"{engines.target} {engines.place}: graph {graph.name} {problem}")
            if attested in tally:
                tally[attested] += 1
        counts[engines.target.name] = cast("JsonValue", tally)
    found = "; ".join(
        f"{target}: attested by the engine {tally['engine']}, by the network {tally['network']}"
        for target, tally in cast("Mapping[str, Mapping[str, int]]", counts).items()
    )
    return judged(name, failures, found, expected, counts)


class _Watched(BundleEngines):
    """Engines that note whether anybody asked for their bytes."""

    read = 0

    def plan(self, graph: str) -> memoryview:
        self.read += 1
        return super().plan(graph)


def _refusal(bundle: Bundle, target: Target, machine: Machine, gpu: Gpu, subject: Subject, *, opens: bool) -> str:
    """The line that refuses the engines of a target; empty where they are not refused."""
    found = next(f for f in find_engines(bundle, machine, gpu, cache=False) if f.target == target.name)
    if found.problem is None:
        return ""
    if not opens:
        return f"{found} {found.problem}"
    engines = _Watched(bundle, target.name)
    index = _index(subject)
    choice = Choice(target.backend, f"cuda:{index}", "asked for by the check", (), engines, machine=machine)
    try:
        open_backend(choice, bundle)
    except BackendError as error:
        if engines.read:
            return ""
        return str(error)
    return ""


def _misfits(backend: str, machine: Machine, gpu: Gpu) -> dict[str, tuple[Target, EngineDetails]]:
    """By what does not fit: a target and its description."""
    version = machine.libraries[backend]
    short = ".".join(version.split(".")[:2])
    native = backend == "tensorrt"

    def details(built_on: Gpu, by: str) -> EngineDetails:
        return EngineDetails(by, built_on if native else None, BatchRange(), {}, {}, "mge-bench --selfcheck")

    elsewhere = next(other for other in _ELSEWHERE if other.capability != gpu.capability)
    system = "windows" if machine.system == "linux" else "linux"
    here = (gpu.capability,)
    return {
        "another GPU": (
            Target(backend, short, (elsewhere.capability,), machine.system, machine.arch),
            details(elsewhere, version),
        ),
        "another version": (Target(backend, "9.9", here, machine.system, machine.arch), details(gpu, "9.9.9")),
        "another operating system": (Target(backend, short, here, system, machine.arch), details(gpu, version)),
    }


def _library(subject: Subject) -> tuple[str, str | None]:
    """The TensorRT library to refuse with, and its version; None: none is here."""
    own = (subject.backend,) if subject.backend.startswith("tensorrt") else ()
    for name in (*own, "tensorrt", "tensorrt-rtx"):
        with suppress(BackendError):
            return name, load_vendor(name).version
    return "tensorrt", None


def _gpu(subject: Subject) -> Gpu:
    gpus, index = subject.machine.gpus, _index(subject)
    return gpus[index] if index < len(gpus) else _STAND_IN


def _index(subject: Subject) -> int:
    return int(subject.device.partition(":")[2] or 0)


def _attestation(engines: EngineSet, graph: str, subject: Subject) -> tuple[str | None, str | None]:
    """What is wrong with a graph's record, and by what check it was attested."""
    record: Mapping[str, Any] | None = engines.details.precision.get(graph)
    if record is None:
        return "has no record of its precision", None
    attested, kind = record.get("attested"), record.get("type")
    wanted = subject.manifest.precision.get(graph, {}).get("type", "unknown")
    if attested not in ("engine", "network"):
        return f"is attested by {attested!r}; expected the engine or the network", None
    if kind != wanted:
        return f"is recorded as {kind}; the bundle says {wanted}", attested
    # A build on the device notes the memory that the engine wants when its inspector is asked.
    asked = engines.details.options.get("scratch")
    if engines.details.gpu is not None and not (isinstance(asked, dict) and graph in asked):
        return "was built on its device, and the engine's inspector was not asked", attested
    return None, attested
