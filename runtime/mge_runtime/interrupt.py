"""Interrupted work ends in one line."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from mge_runtime.errors import MGEError

__all__ = ["Interrupt", "interruptible"]

# Ctrl-C, a scheduler's stop, a closed terminal (which Windows has no signal for).
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupt:
    """What a block knows of a signal that asks it to stop."""

    def __init__(self, consequence: str) -> None:
        self.consequence = consequence  # what the error says of the result; the block may change it as it gets on
        self.received: str | None = None  # the first signal's name
        self._held = 0

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.received is not None

    def __call__(self) -> None:
        """Raise an interrupt that got lost: Python ignores what is raised in a destructor, an import may swallow it.

        Raises:
            KeyboardInterrupt: a signal came.
        """
        if self.requested:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Generator[None]:
        """Raise nothing inside the block, only at its end: foreign code that calls back must not be torn open.

        The block should look at `requested` now and then.
        """
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if not self._held:
            self()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: the first signal raises, later ones do not disturb the unwinding."""
        del frame
        if self.received is None:
            self.received = signal.Signals(number).name
            if not self._held:
                raise KeyboardInterrupt


@contextmanager
def interruptible(work: str, consequence: str, kind: type[MGEError]) -> Generator[Interrupt]:
    """Let a signal unwind the block, so that its temporary files go, and become one error.

    On its way up the interrupt may become another exception or get lost, so anything that leaves the block after a
    signal counts as the interrupt. Signals that the caller ignores, as `nohup` does, stay ignored; outside the main
    thread no handler is set.

    Args:
        work: what is interrupted: "the export".
        consequence: what the error says of the result, unless the block changes it.
        kind: class of the error.

    Yields:
        What the block asks whether a signal came.

    Raises:
        MGEError: of this kind; a signal came.
    """
    interrupt = Interrupt(consequence)
    previous = {}
    try:
        if threading.current_thread() is threading.main_thread():
            kept = (signal.SIG_IGN, None)  # None: set by other than Python code
            previous = {number: signal.getsignal(number) for number in _SIGNALS if signal.getsignal(number) not in kept}
            for number in previous:
                signal.signal(number, interrupt.handle)
        yield interrupt
    except BaseException as error:
        if not interrupt.requested:
            raise
        raise kind(f"{work} was interrupted ({interrupt.received}): {interrupt.consequence}") from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
