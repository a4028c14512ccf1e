"""Signals that ask a block of work to stop: unwinding it, or noted until it can stop by itself."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mge_runtime.errors import MGEError

# Ctrl-C, a scheduler's stop, a closed terminal (which Windows has no signal for).
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupt:
    """What a `with` block knows of a signal that asks it to stop.

    The first signal raises KeyboardInterrupt and later ones do not disturb the unwinding; where signals are `noted`,
    the first one is only noted and a second one raises. Signals that the caller ignores, as `nohup` does, stay ignored;
    outside the main thread no handler is set.
    """

    def __init__(self, consequence: str = "", *, noted: bool = False) -> None:
        self.consequence = consequence  # what the error says of the result; the block may change it as it gets on
        self.received: signal.Signals | None = None  # the first signal
        self._noted = noted
        self._held = 0
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.received is not None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            kept = (signal.SIG_IGN, None)  # None: set by other than Python code
            self._previous = {n: signal.getsignal(n) for n in _SIGNALS if signal.getsignal(n) not in kept}
            for number in self._previous:
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        first = self.received is None
        if first:
            self.received = signal.Signals(number)
        if first is not self._noted and not self._held:
            raise KeyboardInterrupt


@contextmanager
def interruptible(work: str, consequence: str, kind: type[MGEError]) -> Generator[Interrupt]:
    """Let a signal unwind the block, so that its temporary files go, and become one error.

    On its way up the interrupt may become another exception or get lost, so anything that leaves the block after a
    signal counts as the interrupt.

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
    try:
        with interrupt:
            yield interrupt
    except BaseException as error:
        if interrupt.received is None:
            raise
        raise kind(f"{work} was interrupted ({interrupt.received.name}): {interrupt.consequence}") from error
