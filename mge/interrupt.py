"""Signals that ask a training to stop, held until the end of a step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

__all__ = ["Interrupt", "shield_worker"]

# Ctrl-C, a scheduler's stop, a closed terminal (which Windows has no signal for).
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupt:
    """Within the block, the first signal is only noted; a second one raises KeyboardInterrupt.

    A signal that the caller ignores, as `nohup` does with SIGHUP, stays ignored.
    """

    received: int | None = None  # the first signal

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.received is not None

    def __enter__(self) -> Interrupt:
        self._previous = {}
        # Only the main thread may set handlers; elsewhere (a notebook's worker, a test) signals stay as they are.
        if threading.current_thread() is threading.main_thread():
            kept = (signal.SIG_IGN, None)  # None: set by other than Python code
            self._previous = {n: signal.getsignal(n) for n in _SIGNALS if signal.getsignal(n) not in kept}
            for number in self._previous:
                signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested:
            raise KeyboardInterrupt
        self.received = number


def shield_worker(worker: int) -> None:
    """Take a data worker out of the process group, which a terminal or `timeout` signals, so that the step can end.

    Ignoring the signals would not do: a worker that ignores SIGTERM cannot be ended by the process that started it.
    """
    del worker
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    else:  # Windows
        signal.signal(signal.SIGINT, signal.SIG_IGN)
