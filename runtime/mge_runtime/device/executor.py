"""The chain on a device: frames in, wanted tensors out, everything between in device memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, cast

import numpy as np

from mge_runtime.backends.base import Executor, ExecutorResult
from mge_runtime.device.arena import Arena
from mge_runtime.device.plan import aligned
from mge_runtime.device.program import Program
from mge_runtime.device.space import Space
from mge_runtime.device.unit import Addresses, Launch, Unit
from mge_runtime.errors import BackendError
from mge_runtime.manifest import FRAME, Manifest

if TYPE_CHECKING:
    from mge_runtime.backends.base import Array
    from mge_runtime.device.base import Device, Stream
    from mge_runtime.fields import JsonValue

__all__ = ["DeviceExecutor"]

_MOST_BATCHES = 8  # batch sizes that are kept ready; each has contexts and graphs of its own


class DeviceExecutor(Executor):
    """Runs units in turn on one stream of one device.

    One run copies the frames in, launches the units of the first segments and copies the wanted tensors out, then waits
    once. It is used from one thread at a time.

    Args:
        manifest: of the chain.
        device: where it runs.
        open_units: opens the units in the order they run, for this device and stream. Where one cannot be opened, those
            before it are closed again.
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
        self._graphs = graphs
        device.activate()
        with ExitStack() as stack:
            self._stream = device.create_stream()
            stack.callback(self._stream.close)
            self._units: list[Unit] = []
            for unit in open_units(device, self._stream):
                stack.callback(unit.close)
                self._units.append(unit)
            if [unit.segment for unit in self._units] != sorted(unit.segment for unit in self._units):
                raise BackendError("the chain's units are out of order; expected the order of its segments")
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
            self._batches: OrderedDict[int, _Batch] = OrderedDict()
            stack.callback(self._close_batches)
            self._resources = stack.pop_all()
        self._open = True

    def run(self, frames: Array, segments: int, outputs: Collection[str]) -> ExecutorResult:
        """As `Executor.run`; the steps are upload, chain and download on the device, and the host's part.

        Raises:
            BackendError: a unit failed, or the engines were not built for this batch. The executor stays usable unless
                the device itself is lost.
        """
        start = time.perf_counter()
        self._check(frames)
        self._device.activate()
        try:
            return self._run(frames, segments, outputs, start)
        except BaseException:
            # Nothing may still run over memory that the caller now thinks is free; the error that led here is the
            # one worth telling.
            with suppress(Exception):
                self._stream.synchronize()
            with suppress(Exception):
                self._close_batches()
            raise

    def report(self) -> dict[str, JsonValue]:
        """Bytes of device memory and host buffers, whether graphs run and why not, copies so far."""
        copies = self._device.counters
        programs = [
            {"batch": size, "segments": segments, **program.report()}
            for size, batch in self._batches.items()
            for segments, program in batch.programs.items()
        ]
        return {
            "device": self._device.name,
            "units": len(self._units),
            "max_batch": self.max_batch,
            "scratch_bytes": self._arena.shared,
            "scratch_bytes_if_not_shared": self._arena.unshared,
            "tensor_bytes": self._space.plan.size,
            "host_buffer_bytes": self._device.allocated_host,
            "programs": cast("list[JsonValue]", programs),
            "copies": {
                "host_to_device": copies.host_to_device,
                "host_to_device_bytes": copies.host_to_device_bytes,
                "device_to_host": copies.device_to_host,
                "device_to_host_bytes": copies.device_to_host_bytes,
            },
        }

    def close(self) -> None:
        """Wait for what runs, then release everything; closing twice does nothing."""
        if not self._open:
            return
        self._open = False
        self._device.activate()
        with self._resources:
            self._stream.synchronize()

    def _run(self, frames: Array, segments: int, outputs: Collection[str], start: float) -> ExecutorResult:
        batch = len(frames)
        if batch > self._space.plan.max_batch:  # units without a limit
            self._grow(1 << (batch - 1).bit_length())  # seldom: addresses change, graphs are lost
        program = self._program(batch, segments)
        space, stream, device = self._space, self._stream, self._device
        frame = space.plan.places[FRAME]
        size = frame.size(batch)
        space.frames.array[:size].reshape(frames.shape)[...] = frames
        before_upload, before_chain, after_chain, after_download = self._events
        stream.record(before_upload)
        device.upload(space.slab.borrow(frame.offset, size), space.frames, size, stream)
        stream.record(before_chain)
        program.enqueue()
        stream.record(after_chain)
        fetched = self._fetch(batch, segments, outputs)
        stream.record(after_download)
        stream.synchronize()
        program.done()
        tensors = {name: view.copy() for name, view in fetched.items()}
        on_device = {
            "upload": before_chain.ms_since(before_upload),
            "chain": after_chain.ms_since(before_chain),
            "download": after_download.ms_since(after_chain),
        }
        passed = (time.perf_counter() - start) * 1e3
        return ExecutorResult(tensors, {**on_device, "host": max(0.0, passed - sum(on_device.values()))})

    def _grow(self, batch: int) -> None:
        before = self._space.plan.max_batch
        self._close_batches()
        self._space.close()
        try:
            self._space = Space(self._device, self._manifest, batch)
        except BaseException:  # too large for the device: what ran before runs again
            self._space = Space(self._device, self._manifest, before)
            raise

    def _fetch(self, batch: int, segments: int, outputs: Collection[str]) -> dict[str, Array]:
        """Enqueue the copies of the wanted tensors; the views are filled after the stream has been waited for."""
        ran = {name for segment in self._manifest.segments[:segments] for name in segment.stages}
        made = {t.name for stage in self._manifest.stages if stage.name in ran for t in stage.outputs}
        places = [self._space.plan.places[name] for name in sorted(made & set(outputs))]
        buffer = self._space.answers(sum(aligned(place.size(batch)) for place in places))
        views: dict[str, Array] = {}
        offset = 0
        for place in places:
            size = place.size(batch)
            source = self._space.slab.borrow(place.offset, size)
            self._device.download(buffer, offset, source, size, self._stream)
            array = buffer.array[offset : offset + size].view(np.dtype(place.spec.dtype))
            views[place.spec.name] = array.reshape(place.shape(batch))
            offset += aligned(size)
        return views

    def _program(self, batch: int, segments: int) -> Program:
        ready = self._batches.get(batch)
        if ready is None:
            while len(self._batches) >= _MOST_BATCHES:
                _, oldest = self._batches.popitem(last=False)
                oldest.close()
            ready = self._batches[batch] = _Batch()
        self._batches.move_to_end(batch)
        if segments not in ready.programs:
            wanted = [unit for unit in self._units if unit.segment < segments]
            places = self._space.plan.places.values()
            base = self._space.slab.address
            tensors = {place.spec.name: base + place.offset for place in places}
            addresses = Addresses(batch, tensors, self._arena.address, self._arena.shared)
            while len(ready.launches) < len(wanted):
                ready.add(wanted[len(ready.launches)].prepare(addresses, self._stream))
            launches = ready.launches[: len(wanted)]
            program = Program(self._device, self._stream, launches, graphs=self._graphs)
            ready.resources.callback(program.close)
            ready.programs[segments] = program
        return ready.programs[segments]

    def _close_batches(self) -> None:
        with ExitStack() as stack:
            while self._batches:
                stack.callback(self._batches.popitem()[1].close)

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


class _Batch:
    """What is ready for one batch size: launches by unit, programs by number of segments."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.programs: dict[int, Program] = {}
        self.resources = ExitStack()

    def add(self, launch: Launch) -> None:
        self.resources.callback(launch.close)
        self.launches.append(launch)

    def close(self) -> None:
        """Release them, the last first: a graph goes before what it was captured from."""
        self.resources.close()
