"""Graphs of the chain that run without a break, for one batch size, as one CUDA graph where that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mge_runtime.device.base import CaptureRefusedError, Device, Graph, Stream

if TYPE_CHECKING:
    from mge_runtime.device.unit import Launch
    from mge_runtime.fields import JsonValue

__all__ = ["Program"]


class Program:
    """Launches in turn on one stream.

    The first run is plain: libraries allocate and choose kernels then, which no capture allows. The second is captured
    and launched as a graph, as are all that follow. Where capture is refused every run is plain; the reason is kept.

    Args:
        device: captures.
        stream: everything runs on it.
        launches: what runs, in order.
        graphs: whether to capture.
    """

    def __init__(self, device: Device, stream: Stream, launches: Sequence[Launch], *, graphs: bool) -> None:
        self._device = device
        self._stream = stream
        self._launches = launches
        self._graph: Graph | None = None
        self._why_plain: str | None = None if graphs else "graphs are turned off"
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
        if self._graph is None and self._why_plain is None and self._runs > 0:
            self._capture()
        if self._graph is not None:
            self._graph.launch(self._stream)
        else:
            self._enqueue_plain()

    def done(self) -> None:
        """What was enqueued has run, without an error."""
        self._runs += 1

    def report(self) -> dict[str, JsonValue]:
        """Whether it is a graph, why not, how often it ran, and the nodes of the graph by kind where they are known."""
        own = all(launch.has_graph for launch in self._launches)
        why = self._why_plain
        if why is None and self._graph is None and not own:
            why = "captured at its second run"
        nodes = None if self._graph is None else self._graph.nodes
        told: dict[str, JsonValue] = {} if nodes is None else {"nodes": dict(nodes)}
        return {"graph": self._graph is not None or own, "why": why, "runs": self._runs, **told}

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
