"""The chain on a device: the place of each of its tensors, and the runs over them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from mge_runtime.backends.base import Executor, ExecutorResult, Span, split
from mge_runtime.device.base import FIRST_RUNS
from mge_runtime.device.program import MOST_BATCHES, Addresses, Programs, Unit, shape_of
from mge_runtime.errors import BackendError
from mge_runtime.manifest import FRAME, Manifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mge_runtime.backends.base import Array
    from mge_runtime.calibrated import ExitPoint
    from mge_runtime.device.base import BorrowedMemory, Device, Event, HostBuffer, Stream
    from mge_runtime.fields import JsonValue
    from mge_runtime.manifest import GraphSpec, TensorSpec


_ALIGNMENT = 256  # bytes: what TensorRT asks of device memory


class DeviceExecutor(Executor):
    """Runs units in turn on one stream of one device.

    One run copies the frames in, launches the units and copies the wanted tensors out, then waits once. Where images
    may stop early it does so at each exit point, for what was made so far; images that go on are moved together on the
    device. It is used from one thread at a time.

    Args:
        manifest: of the chain.
        device: where it runs.
        open_units: opens a unit for each graph in the order they run, for this device and stream. Where one cannot be
            opened, those before it are closed again.
        cuda_graphs: whether to capture CUDA graphs.

    Raises:
        BundleError, BackendError: a unit cannot be opened, or memory is short; nothing is left behind.
    """

    def __init__(
        self,
        manifest: Manifest,
        device: Device,
        open_units: Callable[[Device, Stream], Iterable[Unit]],
        *,
        cuda_graphs: bool = True,
    ) -> None:
        self._manifest = manifest
        self._device = device
        device.activate()
        with FIRST_RUNS, ExitStack() as stack:
            self._stream = device.create_stream()
            stack.callback(self._stream.close)
            self._units: list[Unit] = []
            for unit in open_units(device, self._stream):
                stack.callback(unit.close)
                self._units.append(unit)
            self.max_batch = min((u.max_batch for u in self._units if u.max_batch is not None), default=None)
            self._min_batch = max(unit.min_batch for unit in self._units)
            self._events = [device.create_event() for _ in range(4)]
            for event in self._events:
                stack.callback(event.close)
            self._scratch = [_aligned(unit.scratch_bytes) for unit in self._units]
            self._space = Space(device, manifest, self.max_batch or 1, max(self._scratch))
            stack.callback(lambda: self._space.close())
            self._programs = Programs(device, self._stream, self._units, cuda_graphs=cuda_graphs)
            stack.callback(self._programs.close)
            self._resources = stack.pop_all()
        self._open = True

    def run(
        self, frames: Array, graphs: int, outputs: Collection[str], exits: Sequence[ExitPoint] = ()
    ) -> ExecutorResult:
        """As `Executor.run`; the steps are upload, chain and download on the device, and the host's part.

        Where images may stop early, "graph_1" (or "graphs_1_to_2") and so on stand for "chain".

        Raises:
            BackendError: a unit failed, or the engines were not built for this batch. The executor stays usable unless
                the device itself is lost.
        """
        start = time.perf_counter()
        self._check(frames)
        self._device.activate()
        with ExitStack() as turn:
            try:
                return self._run(frames, split(graphs, exits), set(outputs), start, turn)
            except BaseException:
                # Nothing may still run over memory that the caller now thinks is free; the error that led here is the
                # one worth telling.
                with suppress(Exception):
                    self._stream.synchronize()
                with suppress(Exception), FIRST_RUNS:
                    self._programs.close()
                raise

    def report(self) -> dict[str, JsonValue]:
        """Bytes of device memory and host buffers, whether CUDA graphs run and why not, copies so far.

        "opened" is what units say of themselves, as the layout they compute in and why not in another; "copies" are
        those between host and device, "row_copies" those that move images together on the device.
        """
        copies = self._device.copies
        return {
            "device": self._device.name,
            "units": len(self._units),
            "opened": {unit.name: dict(unit.opened) for unit in self._units if unit.opened},
            "max_batch": self.max_batch,
            "scratch_bytes": max(self._scratch),
            "scratch_bytes_if_not_shared": sum(self._scratch),
            "tensor_bytes": self._space.tensor_bytes,
            "host_buffer_bytes": self._device.allocated_host,
            "programs": self._programs.report(),
            "copies": {name: number for name, number in copies.items() if "host" in name},
            "row_copies": {name: number for name, number in copies.items() if "host" not in name},
        }

    def close(self) -> None:
        """Wait for what runs, then release everything; closing twice does nothing."""
        if not self._open:
            return
        self._open = False
        self._device.activate()
        with FIRST_RUNS, self._resources:
            self._stream.synchronize()

    def _run(
        self, frames: Array, spans: Sequence[Span], outputs: set[str], start: float, turn: ExitStack
    ) -> ExecutorResult:
        """Run; `turn` holds the turn of this process's first runs where one is needed, also while an error passes."""
        batch = len(frames)
        if batch > self._space.max_batch:  # units without a limit
            with FIRST_RUNS:  # it allocates
                self._grow(1 << (batch - 1).bit_length())  # seldom: addresses change, graphs are lost
        stream, graphs = self._stream, self._manifest.graphs
        before_upload, before_span, after_span, after_download = self._events
        running = np.arange(batch)  # the images that have not stopped, by row
        graphs_run = np.full(batch, spans[-1].last)
        times_ms: dict[str, float] = {}
        tensors: dict[str, Array] = {}
        for span in spans:
            size = self._fitting(len(running), batch)
            program = self._programs.get(span.first, span.last, self._space.addresses(size), turn)
            if span is spans[0]:
                self._upload(frames, before_upload)
            stream.record(before_span)
            program.enqueue()
            stream.record(after_span)
            wanted = _made(graphs[span.first : span.last]) & outputs
            looked_at = wanted if span.point is None else wanted | {span.point.logits}
            views = self._download(looked_at, len(running), after_download)
            program.done()
            turn.close()
            if span is spans[0]:
                times_ms["upload"] = before_span.ms_since(before_upload)
            times_ms[_step(span, spans)] = after_span.ms_since(before_span)
            order = np.argsort(running)  # rows go back to the order of the frames
            tensors |= {name: views[name][order] for name in wanted}
            if span.point is None:
                break
            stops = span.point.stops(views[span.point.logits])
            graphs_run[running[stops]] = span.last
            if stops.all():
                break
            if stops.any():
                later = graphs[span.last : spans[-1].last]
                read = {tensor.name for graph in later for tensor in graph.inputs} - _made(later)
                running = self._move_together(running, stops, read)
        times_ms["download"] = after_download.ms_since(after_span)
        passed = (time.perf_counter() - start) * 1e3
        times_ms["host"] = max(0.0, passed - sum(times_ms.values()))
        step_graphs = {_step(span, spans): span.first for span in spans}
        return ExecutorResult(tensors, times_ms, graphs_run, step_graphs)

    def _upload(self, frames: Array, before: Event) -> None:
        buffer, memory = self._space.frames, self._space.rows(FRAME, 0, len(frames))
        buffer.array[: memory.size].reshape(frames.shape)[...] = frames
        self._stream.record(before)
        self._device.upload(memory, buffer, memory.size, self._stream)

    def _download(self, names: Collection[str], count: int, after: Event) -> dict[str, Array]:
        """Copy the first `count` rows of tensors out and wait; the views hold them until the next download."""
        parts = {name: self._space.rows(name, 0, count) for name in sorted(names)}
        buffer = self._space.results(sum(_aligned(part.size) for part in parts.values()))
        views: dict[str, Array] = {}
        offset = 0
        for name, part in parts.items():
            self._device.download(buffer, offset, part, part.size, self._stream)
            spec = self._space.places[name].spec
            view = buffer.array[offset : offset + part.size].view(np.dtype(spec.dtype))
            views[name] = view.reshape(shape_of(spec, count))
            offset += _aligned(part.size)
        self._stream.record(after)
        self._stream.synchronize()
        return views

    def _move_together(
        self, running: NDArray[np.intp], stops: NDArray[np.bool_], tensors: Collection[str]
    ) -> NDArray[np.intp]:
        """Enqueue the copies that move the images that go on to the first rows of tensors that are read later.

        From the image in each row, and whether it stops, follows the image in each row afterwards.
        """
        stay = int(np.count_nonzero(~stops))
        free = np.flatnonzero(stops[:stay])  # rows that are left, each filled from behind
        behind = stay + np.flatnonzero(~stops[stay:])
        for name in sorted(tensors):
            for front, back in zip(free.tolist(), behind.tolist(), strict=True):
                target, source = self._space.rows(name, front, 1), self._space.rows(name, back, 1)
                self._device.copy_device(target, source, target.size, self._stream)
        moved = running.copy()
        moved[free] = running[behind]
        return moved[:stay]

    def _fitting(self, running: int, batch: int) -> int:
        """Rows to compute for the images that still run: some more, where that keeps the number of batch sizes small.

        The rows beyond hold images that have left; what comes out of them is not looked at.
        """
        step = -(-batch // MOST_BATCHES)
        return min(batch, max(self._min_batch, -(-running // step) * step))

    def _grow(self, batch: int) -> None:
        before = self._space.max_batch
        self._programs.close()
        self._space.close()
        try:
            self._space = Space(self._device, self._manifest, batch, max(self._scratch))
        except BaseException:  # too large for the device: what ran before runs again
            self._space = Space(self._device, self._manifest, before, max(self._scratch))
            raise

    def _check(self, frames: Array) -> None:
        if not self._open:
            raise BackendError("the chain is closed; open the bundle again with Pipeline.open")
        batch, least, most = len(frames), self._min_batch, self.max_batch
        if batch < least or (most is not None and batch > most):
            raise BackendError(
                f"asked to run {batch} frames at once; the engines were built for {least} to {most or 'any number'}: "
                "run as many, or build them for this too with "
                f"`mge-build --batch {min(batch, least)},{least},{max(batch, most or 1)}`"
            )


@dataclass(frozen=True)
class Place:
    """Where one tensor lies."""

    spec: TensorSpec
    offset: int  # bytes from the slab's start, a multiple of 256
    row_bytes: int  # of one image's part; rows follow each other without a gap


class Space:
    """One slab of device memory, and host buffers beside it.

    Every tensor between graphs has a place of its own, so that any of them can be asked for. Behind them lies the
    scratch memory, which all units share since they run in turn on one stream.

    Args:
        device: allocates.
        manifest: of the chain.
        max_batch: images there is room for, at least 1.
        scratch: bytes that the neediest unit asks for.

    Raises:
        BackendError: memory is short; nothing is left behind.
    """

    def __init__(self, device: Device, manifest: Manifest, max_batch: int, scratch: int) -> None:
        self.max_batch = max_batch
        self.places: dict[str, Place] = {}
        self.tensor_bytes = 0
        specs = {tensor.name: tensor for graph in manifest.graphs for tensor in (*graph.inputs, *graph.outputs)}
        for name in sorted(specs):
            row_bytes = prod(shape_of(specs[name], 1)) * np.dtype(specs[name].dtype).itemsize
            self.places[name] = Place(specs[name], self.tensor_bytes, row_bytes)
            self.tensor_bytes += _aligned(max_batch * row_bytes)
        self._device = device
        self._scratch = scratch
        with ExitStack() as stack:
            self._slab = device.allocate(self.tensor_bytes + scratch)
            stack.callback(self._slab.close)
            self.frames = device.allocate_host(max_batch * self.places[FRAME].row_bytes)
            stack.callback(self.frames.close)
            self._results = device.allocate_host(1)
            stack.callback(lambda: self._results.close())
            self._resources = stack.pop_all()

    def rows(self, name: str, first: int, count: int) -> BorrowedMemory:
        """Some rows of a tensor."""
        place = self.places[name]
        return self._slab.borrow(place.offset + first * place.row_bytes, count * place.row_bytes)

    def addresses(self, batch: int) -> Addresses:
        """What units are told."""
        base = self._slab.address
        tensors = {name: base + place.offset for name, place in self.places.items()}
        return Addresses(batch, tensors, base + self.tensor_bytes, self._scratch)

    def results(self, size: int) -> HostBuffer:
        """A host buffer of at least `size` bytes; what the last one held is gone."""
        if self._results.size < size:
            before, self._results = self._results, self._device.allocate_host(size)
            before.close()
        return self._results

    def close(self) -> None:
        """Release everything; closing twice does nothing."""
        self._resources.close()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _made(graphs: Sequence[GraphSpec]) -> set[str]:
    return {tensor.name for graph in graphs for tensor in graph.outputs}


def _step(span: Span, spans: Sequence[Span]) -> str:
    """What the time of a span is called."""
    if len(spans) == 1:
        return "chain"
    first, last = span.first + 1, span.last
    return f"graph_{first}" if first == last else f"graphs_{first}_to_{last}"
