"""Units of work, which a backend supplies, and programs of them by batch size, as CUDA graphs where possible."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mge_runtime.device.base import FIRST_RUNS, CaptureRefusedError, Device, Graph, Stream

if TYPE_CHECKING:
    from mge_runtime.fields import JsonValue
    from mge_runtime.manifest import TensorSpec


MOST_BATCHES = 8  # batch sizes that are kept ready; each has contexts and graphs of its own


def shape_of(tensor: TensorSpec, batch: int) -> tuple[int, ...]:
    """The shape of a tensor for a batch."""
    return (batch, *(int(axis) for axis in tensor.shape[1:]))


@dataclass(frozen=True)
class Addresses:
    """Where a unit finds everything, for one batch size; fixed until its `Launch` is closed."""

    batch: int
    tensors: Mapping[str, int]  # device address by tensor name, of every tensor of the chain
    scratch: int  # device address of `scratch_bytes` bytes that others use before and after
    scratch_bytes: int  # at least as many as the unit asked for


class Launch(ABC):
    """A unit ready for one batch size: the same shapes and addresses at every run."""

    has_graph: bool = False  # whether the library behind it launches a graph that it captured itself

    @abstractmethod
    def enqueue(self, stream: Stream) -> None:
        """Put the work on the stream and return without waiting for it.

        Raises:
            BackendError: it cannot be started, or it failed.
        """

    @abstractmethod
    def why_not_captured(self, stream: Stream) -> str | None:
        """Why the chain cannot capture this in a graph of its own; None: it can. Asked after a first run."""

    @abstractmethod
    def close(self) -> None:
        """Release it; nothing of it runs any more. Closing twice does nothing."""


class Unit(ABC):
    """One graph of the chain: an engine of TensorRT, a session of ONNX Runtime."""

    name: str  # for people
    min_batch: int = 1
    max_batch: int | None = None  # None: no limit but memory
    scratch_bytes: int = 0  # memory it needs while it runs, for its largest batch
    opened: Mapping[str, JsonValue] = {}  # how it was opened, for the report

    @abstractmethod
    def prepare(self, addresses: Addresses, stream: Stream) -> Launch:
        """Get ready for a batch size.

        Raises:
            BackendError: it cannot run this batch size.
        """

    @abstractmethod
    def close(self) -> None:
        """Release it, after its launches. Closing twice does nothing."""


class Program:
    """Launches in turn on one stream, for one batch size.

    The first run is plain: libraries allocate and choose kernels then, which no capture allows. The second is captured
    and launched as a graph, as are all that follow. Where capture is refused every run is plain; the reason is kept.
    """

    def __init__(self, device: Device, stream: Stream, launches: Sequence[Launch], *, cuda_graphs: bool) -> None:
        self._device = device
        self._stream = stream
        self._launches = launches
        self._graph: Graph | None = None
        self._why_plain: str | None = None if cuda_graphs else "CUDA graphs are turned off"
        self._runs = 0  # that were waited for without an error

    @property
    def settled(self) -> bool:
        """Whether later runs are as the last one: it ran, and is captured or will never be."""
        return self._runs > 0 and (self._graph is not None or self._why_plain is not None)

    def enqueue(self) -> None:
        """Put one run on the stream.

        Raises:
            BackendError: a unit failed.
        """
        if self._runs > 0 and not self.settled:
            self._capture()
        if self._graph is not None:
            self._graph.launch(self._stream)
        else:
            self._enqueue_plain()

    def done(self) -> None:
        """What was enqueued has run, without an error."""
        self._runs += 1

    def report(self) -> dict[str, JsonValue]:
        """Whether it is a CUDA graph, why not, and how often it ran."""
        is_graph = self._graph is not None or all(launch.has_graph for launch in self._launches)
        why = self._why_plain or (None if is_graph else "captured at its second run")
        return {"cuda_graph": is_graph, "why": why, "runs": self._runs}

    def close(self) -> None:
        """Release the graph; the launches belong to others. Closing twice does nothing."""
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.close()

    def _capture(self) -> None:
        reasons = (launch.why_not_captured(self._stream) for launch in self._launches)
        self._why_plain = next((reason for reason in reasons if reason is not None), None)
        if self._why_plain is None:
            try:
                self._graph = self._device.capture(self._stream, self._enqueue_plain)
            except CaptureRefusedError as error:
                self._why_plain = str(error)

    def _enqueue_plain(self) -> None:
        for launch in self._launches:
            launch.enqueue(self._stream)


@dataclass
class _Batch:
    """What is ready for one batch size."""

    launches: dict[int, Launch] = field(default_factory=dict[int, Launch])  # by number of the unit
    programs: dict[tuple[int, int], Program] = field(default_factory=dict[tuple[int, int], Program])  # first, last
    resources: ExitStack = field(default_factory=ExitStack)  # closes the last first: graphs before what they captured


class Programs:
    """Prepares the units of a chain for a batch size when it is first asked for; the least recently used makes way."""

    def __init__(self, device: Device, stream: Stream, units: Sequence[Unit], *, cuda_graphs: bool) -> None:
        self._device = device
        self._stream = stream
        self._units = units
        self._cuda_graphs = cuda_graphs
        self._batches: OrderedDict[int, _Batch] = OrderedDict()

    def get(self, first: int, last: int, addresses: Addresses, turn: ExitStack) -> Program:
        """The program of graphs `first` to `last` - 1, counted from 0.

        Args:
            first: its first graph.
            last: one after its last graph.
            addresses: of the batch size that it computes; the same for one size until `close`.
            turn: takes the turn of this process's first runs, where something is yet to be prepared or captured.

        Raises:
            BackendError: a unit cannot run this batch size.
        """
        ready = self._batches.get(addresses.batch)
        program = None if ready is None else ready.programs.get((first, last))
        if program is None or not program.settled:
            turn.enter_context(FIRST_RUNS)
        if ready is None:
            while len(self._batches) >= MOST_BATCHES:
                self._batches.popitem(last=False)[1].resources.close()
            ready = self._batches[addresses.batch] = _Batch()
        self._batches.move_to_end(addresses.batch)
        if program is None:
            for number in range(first, last):
                if number not in ready.launches:
                    launch = ready.launches[number] = self._units[number].prepare(addresses, self._stream)
                    ready.resources.callback(launch.close)
            launches = [ready.launches[number] for number in range(first, last)]
            program = Program(self._device, self._stream, launches, cuda_graphs=self._cuda_graphs)
            ready.programs[first, last] = program
            ready.resources.callback(program.close)
        return program

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
                stack.callback(self._batches.popitem()[1].resources.close)
