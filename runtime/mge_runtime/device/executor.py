"""The chain on a device: frames in, wanted tensors out, everything between in device memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import numpy as np

from mge_runtime.backends.base import Executor, ExecutorResult, Span, split
from mge_runtime.device.arena import Arena
from mge_runtime.device.base import FIRST_RUNS
from mge_runtime.device.plan import aligned, made_in, read_after
from mge_runtime.device.programs import MOST_BATCHES, Programs
from mge_runtime.device.rows import Rows
from mge_runtime.device.space import Space
from mge_runtime.device.unit import Unit
from mge_runtime.errors import BackendError
from mge_runtime.manifest import FRAME, Manifest

if TYPE_CHECKING:
    from mge_runtime.backends.base import Array
    from mge_runtime.calibrated import ExitPoint
    from mge_runtime.device.base import Device, Event, Stream
    from mge_runtime.fields import JsonValue

__all__ = ["DeviceExecutor"]


class DeviceExecutor(Executor):
    """Runs units in turn on one stream of one device.

    One run copies the frames in, launches the first units and copies the wanted tensors out, then waits
    once. Where images may stop early it waits after each exit point too, for the answer there; images that go on are
    moved together on the device, and all results are copied out at the end. It is used from one thread at a time.

    Args:
        manifest: of the chain.
        device: where it runs.
        open_units: opens a unit for each graph in the order they run, for this device and stream. Where one cannot be
            opened, those before it are closed again.
        graphs: whether to capture CUDA graphs.

    Raises:
        BundleError, BackendError: a unit cannot be opened, or memory is short; nothing is left behind.
    """

    def __init__(
        self,
        manifest: Manifest,
        device: Device,
        open_units: Callable[[Device, Stream], Iterable[Unit]],
        *,
        graphs: bool = True,
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
            limits = [unit.max_batch for unit in self._units if unit.max_batch is not None]
            self.max_batch = min(limits, default=None)
            self._min_batch = max((unit.min_batch for unit in self._units), default=1)
            self._arena = Arena(device, [unit.scratch_bytes for unit in self._units])
            stack.callback(self._arena.close)
            self._events = [device.create_event() for _ in range(4)]
            for event in self._events:
                stack.callback(event.close)
            self._space = Space(device, manifest, self.max_batch or 1)
            stack.callback(lambda: self._space.close())
            self._programs = Programs(device, self._stream, self._units, self._arena, graphs=graphs)
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
        """Bytes of device memory and host buffers, whether graphs run and why not, copies so far.

        "opened" is what units say of themselves, as the layout they compute in and why not in another; "copies" are
        those between host and device, "row_copies" those that move images together on the device.
        """
        copies = self._device.counters
        return {
            "device": self._device.name,
            "units": len(self._units),
            "opened": {unit.name: dict(unit.opened) for unit in self._units if unit.opened},
            "max_batch": self.max_batch,
            "scratch_bytes": self._arena.shared,
            "scratch_bytes_if_not_shared": self._arena.unshared,
            "tensor_bytes": self._space.plan.size,
            "host_buffer_bytes": self._device.allocated_host,
            "programs": self._programs.report(),
            "copies": {
                "host_to_device": copies.host_to_device,
                "host_to_device_bytes": copies.host_to_device_bytes,
                "device_to_host": copies.device_to_host,
                "device_to_host_bytes": copies.device_to_host_bytes,
            },
            "row_copies": {"on_device": copies.on_device, "on_device_bytes": copies.on_device_bytes},
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
        if batch > self._space.plan.max_batch:  # units without a limit
            with FIRST_RUNS:  # it closes programs
                self._grow(1 << (batch - 1).bit_length())  # seldom: addresses change, graphs are lost
        space, stream, manifest = self._space, self._stream, self._manifest
        before_upload, before_span, after_span, after_download = self._events
        rows = Rows(batch, outputs)
        graphs_run = np.full(batch, spans[-1].last)
        times_ms: dict[str, float] = {}
        fetched: dict[str, Array] = {}
        for span in spans:
            size = self._fitting(len(rows.running), batch)
            if not self._programs.is_settled(size, span.first, span.last):
                turn.enter_context(FIRST_RUNS)
            program = self._programs.get(size, span.first, span.last, space)
            if span is spans[0]:
                self._upload(frames, before_upload)
            stream.record(before_span)
            program.enqueue()
            stream.record(after_span)
            rows.add(made_in(manifest, span.first, span.last))
            # What is wanted is copied out once, behind the last span.
            fetched = self._fetch(rows) if span.point is None else self._fetch_answer(span.point.answer, rows)
            stream.record(after_download)
            stream.synchronize()
            program.done()
            turn.close()
            if span is spans[0]:
                times_ms["upload"] = before_span.ms_since(before_upload)
            times_ms[_step(span, spans)] = after_span.ms_since(before_span)
            if span.point is None:
                break
            stops = span.point.stops(fetched[span.point.answer])
            graphs_run[rows.running[stops]] = span.last
            if stops.all():
                stream.record(after_span)
                fetched = self._fetch(rows)
                stream.record(after_download)
                stream.synchronize()
                break
            if stops.any():
                rows.leave(stops, read_after(manifest, span.last, spans[-1].last), self._device, space, stream)
        times_ms["download"] = after_download.ms_since(after_span)
        # Rows go back to the order of the frames.
        tensors = {name: view[np.argsort(rows.images(name))] for name, view in fetched.items()}
        passed = (time.perf_counter() - start) * 1e3
        times_ms["host"] = max(0.0, passed - sum(times_ms.values()))
        step_graphs = {_step(span, spans): span.first for span in spans}
        return ExecutorResult(tensors, times_ms, graphs_run, step_graphs)

    def _upload(self, frames: Array, before: Event) -> None:
        place = self._space.plan.places[FRAME]
        size = place.size(len(frames))
        buffer = self._space.frames
        buffer.array[:size].reshape(frames.shape)[...] = frames
        self._stream.record(before)
        self._device.upload(self._space.slab.borrow(place.offset, size), buffer, size, self._stream)

    def _fitting(self, running: int, batch: int) -> int:
        """Rows to compute for the images that still run: some more, where that keeps the number of batch sizes small.

        The rows beyond hold images that have left; what comes out of them is not looked at.
        """
        step = -(-batch // MOST_BATCHES)
        return min(batch, max(self._min_batch, -(-running // step) * step))

    def _grow(self, batch: int) -> None:
        before = self._space.plan.max_batch
        self._programs.close()
        self._space.close()
        try:
            self._space = Space(self._device, self._manifest, batch)
        except BaseException:  # too large for the device: what ran before runs again
            self._space = Space(self._device, self._manifest, before)
            raise

    def _fetch(self, rows: Rows) -> dict[str, Array]:
        """Enqueue the copies of the wanted tensors; the views are filled after the stream has been waited for."""
        return self._download({name: len(rows.images(name)) for name in rows.made})

    def _fetch_answer(self, name: str, rows: Rows) -> dict[str, Array]:
        return self._download({name: len(rows.running)})

    def _download(self, counts: dict[str, int]) -> dict[str, Array]:
        """Enqueue the copies of so many rows of each tensor."""
        places = [(self._space.plan.places[name], count) for name, count in counts.items()]
        buffer = self._space.answers(sum(aligned(place.size(count)) for place, count in places))
        views: dict[str, Array] = {}
        offset = 0
        for place, count in places:
            size = place.size(count)
            source = self._space.slab.borrow(place.offset, size)
            self._device.download(buffer, offset, source, size, self._stream)
            array = buffer.array[offset : offset + size].view(np.dtype(place.spec.dtype))
            views[place.spec.name] = array.reshape(place.shape(count))
            offset += aligned(size)
        return views

    def _check(self, frames: Array) -> None:
        if not self._open:
            raise BackendError("the chain is closed; open the bundle again with Pipeline.open")
        frame = self._space.plan.places[FRAME]
        batch, least, most = len(frames), self._min_batch, self.max_batch
        if batch < least or (most is not None and batch > most):
            raise BackendError(
                f"asked to run {batch} frames at once; the engines were built for {least} to {most or 'any number'}: "
                f"build them for this too with `mge-build --batch {min(batch, least)},{least},{max(batch, most or 1)}`"
            )
        if frames.dtype != np.dtype(frame.spec.dtype) or frames.shape != frame.shape(batch):
            raise BackendError(
                f"cannot run frames of type {frames.dtype} and shape {list(frames.shape)}; "
                f"expected {frame.spec.dtype} {list(frame.shape(batch))}"
            )


def _step(span: Span, spans: Sequence[Span]) -> str:
    """What the time of a span is called."""
    if len(spans) == 1:
        return "chain"
    first, last = span.first + 1, span.last
    return f"graph_{first}" if first == last else f"graphs_{first}_to_{last}"
