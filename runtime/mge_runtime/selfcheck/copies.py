"""That no tensor visits the host between graphs: copies are counted where they are made, and inside CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any, cast

from mge_runtime.fields import JsonValue
from mge_runtime.selfcheck.answers import programs
from mge_runtime.selfcheck.check import Check, judged, not_run
from mge_runtime.selfcheck.compare import compared_tensors
from mge_runtime.selfcheck.subject import Opened, Subject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["check_copies", "check_graph_copies"]

_RUNS = 4
_ON_CPU = "the chain runs on the CPU, where nothing is copied to a device"


def check_copies(subject: Subject, frames: NDArray[np.uint8]) -> Check:
    """What the device layer copies: the frames in, each wanted tensor out, and nothing else.

    Raises:
        BackendError: a run failed.
    """
    name = "one copy in, one out for each wanted tensor"
    outputs = compared_tensors(subject.manifest)
    expected = f"for each run 1 copy to the device (the frames) and {len(outputs)} from it, of just their bytes"
    with closing(subject.open(True)) as opened:
        if not opened.report():
            return not_run(name, _ON_CPU, expected)
        failures: list[str] = []
        numbers: dict[str, JsonValue] = {}
        for run in range(_RUNS):  # plain, captured, launched, and once more
            frame = frames[run % len(frames)][None]
            before = _counters(opened)
            tensors = opened.run(frame, outputs=outputs)
            after = _counters(opened)
            numbers = {key: after[key] - before[key] for key in after}
            wanted = {
                "host_to_device": 1,
                "host_to_device_bytes": frame.nbytes,
                "device_to_host": len(outputs),
                "device_to_host_bytes": sum(int(array.nbytes) for array in tensors.values()),
            }
            if numbers != wanted:
                failures.append(f"run {run + 1} copied {_line(numbers)}")
    return judged(name, failures, f"each run copied {_line(numbers)}", expected, numbers)


def check_graph_copies(subject: Subject, frames: NDArray[np.uint8]) -> Check:
    """What is copied inside the chain: the nodes of its CUDA graph, counted by direction.

    ONNX Runtime captures graphs of its own, which cannot be looked into; it opens a session with `enable_cuda_graph`
    only where no copy between host and device was put into its graph (microsoft/onnxruntime #16491).

    Raises:
        BackendError: a run failed.
    """
    name, expected = "no copy to or from the host between graphs", "0 copies between host and device inside a program"
    with closing(subject.open(True)) as opened:
        if not opened.report():
            return not_run(name, _ON_CPU, expected)
        for _ in range(3):
            opened.run(frames[:1])
        ran = programs(opened)
    program: Mapping[str, Any] = ran[0] if ran else {}
    if not program.get("graph"):
        return not_run(
            name, f"no CUDA graph was captured, whose copies could be counted: {program.get('why')}", expected
        )
    if subject.backend == "onnxruntime":
        found = (
            "ONNX Runtime opened every graph with enable_cuda_graph, which it refuses where it had to put in a copy; "
            "copies inside its kernels cannot be seen"
        )
        return judged(name, [], found, expected)
    nodes = cast("Mapping[str, Any] | None", program.get("nodes"))
    if not nodes:
        return not_run(name, "cuda-core does not show a graph's nodes; expected cuda-core 1.1 or newer", expected)
    copies = {kind: int(count) for kind, count in nodes.items() if kind.startswith(("copy_", "memcpy"))}
    host = {kind: count for kind, count in copies.items() if "host" in kind}
    unknown = {kind: count for kind, count in copies.items() if "unknown" in kind or kind.startswith("memcpy")}
    numbers: dict[str, JsonValue] = dict(nodes)
    if unknown and not host:
        return Check(name, "not run", f"the direction of copies is not known: {_line(unknown)}", expected, numbers)
    failures = [f"the graph holds {_line(host)}"] if host else []
    found = f"{sum(nodes.values())} nodes, {_line(copies) if copies else 'no copies'}"
    return judged(name, failures, found, expected, numbers)


def _counters(opened: Opened) -> dict[str, int]:
    return {key: int(value) for key, value in cast("Mapping[str, Any]", opened.report()["copies"]).items()}


def _line(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in counts.items())
