"""Ctrl-C that waits for the end of a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

__all__ = ["Interrupt", "ignore_in_worker"]


class Interrupt:
    """Within the block, the first Ctrl-C only sets `requested`; a second one raises KeyboardInterrupt as usual."""

    requested = False

    def __enter__(self) -> Interrupt:
        self._previous = None
        # Only the main thread may set handlers; elsewhere (a notebook's worker, a test) Ctrl-C stays as it is.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def ignore_in_worker(worker: int) -> None:
    """Keep a data worker alive on Ctrl-C (the terminal signals the whole group), so that the step can end."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
