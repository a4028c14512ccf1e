"""The lines of `mge-info` on the machine: what it is, which engines fit it, and what runs there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, cast

from mge_runtime.files import format_bytes

__all__ = ["engine_lines", "here_lines", "machine_line"]


def engine_lines(facts: dict[str, Any]) -> Iterator[str]:
    """The engines of the bundle, then those of the cache.

    Args:
        facts: what `describe` returned. The engines' details are free JSON of whoever wrote them: what is not of the
            expected shape is left out.
    """
    if not facts["engines"] and not facts["cached_engines"]:
        yield "none; ONNX alone"
    for target, engine in facts["engines"].items():
        yield from _engine(target, engine)
    for engine in facts["cached_engines"]:
        yield from _engine(f"{engine['target']} {engine['place']}", engine)


def machine_line(machine: dict[str, Any]) -> str:
    """The machine in one line, from `Machine.to_json`."""
    parts = [machine["board"]] if machine["board"] else []
    parts += [f"{machine['system']} {machine['arch']}", f"Python {machine['python']}"]
    for number, gpu in enumerate(machine["gpus"]):
        shared = " shared with the CPU" if gpu["integrated"] else ""
        parts.append(f"cuda:{number} {_gpu(gpu)}, {format_bytes(gpu['memory'])}{shared}")
    if not machine["gpus"]:
        parts.append("no GPU")
    if machine["driver_cuda"]:
        parts.append(f"driver for CUDA {machine['driver_cuda']}")
    parts += [f"{name} {version}" for name, version in machine["libraries"].items()]
    parts += [f"{name} broken" for name in machine["broken"]]
    return ", ".join(parts)


def here_lines(here: dict[str, Any]) -> Iterator[str]:
    """What runs, and what does not and why; backends that share a reason share a line."""
    if here["backend"] is None:
        yield f"no: {here['error']}"
        return
    status = f" ({here['status']})" if here["status"] else ""
    yield f"{here['backend']} on {here['device']}{status}: {here['reason']}"
    for (device, reason), others in groupby(here["passed_over"], lambda other: (other["device"], other["reason"])):
        yield f"not {', '.join(other['backend'] for other in others)} on {device}: {reason}"


def _engine(name: str, engine: dict[str, Any]) -> Iterator[str]:
    details = _table(engine["details"])
    plans = engine["plans"]
    batch = _list(details.get("batch"))
    batches = f"batch {batch[0]} to {batch[2]}, " if len(batch) == 3 else ""
    if batch and batch.count(batch[0]) == len(batch):
        batches = f"batch {batch[0]}, "
    size = format_bytes(sum(plans.values()))
    yield f"{name}: {len(plans)} graphs, {size}, {batches}{engine['status']}"
    if isinstance(version := details.get("version"), str):
        gpu = details.get("gpu")
        place = f"on {_gpu(_table(gpu))}" if gpu is not None else "ahead of time, without a GPU"
        yield f"  built by version {version}, {place}"
    if precision := _precision(_table(details.get("precision"))):
        yield f"  {precision}"
    scratch = [size for size in _table(_table(details.get("options")).get("scratch")).values() if isinstance(size, int)]
    if scratch:
        shared, apart = format_bytes(max(scratch)), format_bytes(sum(scratch))
        yield f"  activations: {shared} shared by all graphs, which run in turn; {apart} if each had its own"
    yield "  fits the machine" if engine["misfit"] is None else f"  does not fit: {engine['misfit']}"


def _precision(graphs: dict[str, Any]) -> str:
    """For example "fp16 (attested: engine): expert_1, expert_2; fp32 (attested: engine): expert_3"."""
    groups: dict[str, list[str]] = {}
    for graph, facts in graphs.items():
        kind, attested = _table(facts).get("type"), _table(facts).get("attested")
        groups.setdefault(f"{kind} (attested: {attested})" if attested else f"{kind} (not attested)", []).append(graph)
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in groups.items())


def _gpu(gpu: dict[str, Any]) -> str:
    return f"{gpu.get('name')} ({gpu.get('capability')}, {gpu.get('multiprocessors')} multiprocessors)"


def _table(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []
