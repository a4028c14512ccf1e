"""What is ready to run: launches and programs by batch size, as many sizes as are worth keeping."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from mge_runtime.device.program import Program
from mge_runtime.device.unit import Addresses

if TYPE_CHECKING:
    from mge_runtime.device.arena import Arena
    from mge_runtime.device.base import Device, Stream
    from mge_runtime.device.space import Space
    from mge_runtime.device.unit import Launch, Unit
    from mge_runtime.fields import JsonValue

__all__ = ["MOST_BATCHES", "Programs"]

MOST_BATCHES = 8  # batch sizes that are kept ready; each has contexts and graphs of its own


class Programs:
    """Prepares units for a batch size when it is first asked for; the least recently used size makes way.

    Args:
        device: where everything runs.
        stream: what it runs on.
        units: of the chain, in order.
        arena: their scratch memory.
        graphs: whether to capture CUDA graphs.
    """

    def __init__(self, device: Device, stream: Stream, units: Sequence[Unit], arena: Arena, *, graphs: bool) -> None:
        self._device = device
        self._stream = stream
        self._units = units
        self._arena = arena
        self._graphs = graphs
        self._batches: OrderedDict[int, _Batch] = OrderedDict()

    def get(self, batch: int, first: int, last: int, space: Space) -> Program:
        """The program of graphs `first` to `last` - 1, counted from 0.

        Args:
            batch: rows that it computes.
            first: its first graph.
            last: one after its last graph.
            space: where the tensors lie, the same until `close`.

        Raises:
            BackendError: a unit cannot run this batch size.
        """
        ready = self._batches.get(batch)
        if ready is None:
            while len(self._batches) >= MOST_BATCHES:
                _, oldest = self._batches.popitem(last=False)
                oldest.close()
            ready = self._batches[batch] = _Batch()
        self._batches.move_to_end(batch)
        if (first, last) not in ready.programs:
            base = space.slab.address
            tensors = {place.spec.name: base + place.offset for place in space.plan.places.values()}
            addresses = Addresses(batch, tensors, self._arena.address, self._arena.shared)
            for number in range(first, last):
                if number not in ready.launches:
                    ready.add(number, self._units[number].prepare(addresses, self._stream))
            launches = [ready.launches[number] for number in range(first, last)]
            program = Program(self._device, self._stream, launches, graphs=self._graphs)
            ready.resources.callback(program.close)
            ready.programs[first, last] = program
        return ready.programs[first, last]

    def is_settled(self, batch: int, first: int, last: int) -> bool:
        """Whether a program is there and no longer changes: nothing is prepared, searched for or captured any more."""
        program = self._batches[batch].programs.get((first, last)) if batch in self._batches else None
        return program is not None and program.settled

    def report(self) -> list[JsonValue]:
        """Each program: its batch size, after how many graphs it begins (if any) and ends, whether CUDA captured it."""
        return [
            {"batch": size, **({"after": first} if first else {}), "graphs": last, **program.report()}
            for size, batch in self._batches.items()
            for (first, last), program in batch.programs.items()
        ]

    def close(self) -> None:
        """Release everything that is ready; nothing of it runs any more. It is made anew when it is asked for."""
        with ExitStack() as stack:
            while self._batches:
                stack.callback(self._batches.popitem()[1].close)


class _Batch:
    """What is ready for one batch size: launches by number of the unit, programs by first and last graph."""

    def __init__(self) -> None:
        self.launches: dict[int, Launch] = {}
        self.programs: dict[tuple[int, int], Program] = {}
        self.resources = ExitStack()

    def add(self, number: int, launch: Launch) -> None:
        self.resources.callback(launch.close)
        self.launches[number] = launch

    def close(self) -> None:
        """Release them, the last first: a graph goes before what it was captured from."""
        self.resources.close()
