"""The time that a run may take: one deadline for the whole, shares of what is left of it for its sections."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["NO_TIME", "UNBOUNDED", "Deadline", "TimeUp"]

NO_TIME = "no time was left; name more --seconds"  # why something was not measured


class TimeUp(BaseException):
    """The time is over. No `Exception`, so that nothing on its way takes it for a failure of its own."""


@dataclass(frozen=True)
class Deadline:
    """A moment of `time.perf_counter`, infinite where nothing bounds the run."""

    end: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """So many seconds from now."""
        return cls(time.perf_counter() + seconds)

    @property
    def left(self) -> float:
        """Seconds until then; negative when it has passed."""
        return self.end - time.perf_counter()

    def share(self, part: float, whole: float) -> Deadline:
        """The deadline of a section that may take `part` / `whole` of what is left."""
        return Deadline.after(self.left * part / whole)

    def seconds(self, otherwise: float) -> float:
        """What is left, or `otherwise` where nothing bounds the run."""
        return otherwise if math.isinf(self.end) else self.left

    def check(self) -> None:
        """Go on, or not: called between two measurements.

        Raises:
            TimeUp: it has passed.
        """
        if self.left <= 0:
            raise TimeUp

    @contextmanager
    def enforced(self) -> Generator[None]:
        """Raise `TimeUp` in the middle of the block: for foreign code, such as a compiler, that asks nobody.

        It takes a timer's signal and the main thread; on Windows and in other threads the block takes its time.

        Raises:
            TimeUp: the deadline has passed.
        """
        outside = threading.current_thread() is not threading.main_thread()
        if sys.platform == "win32" or outside or math.isinf(self.end):
            yield
            return

        raised: TimeUp | None = None

        def stop(*_signal: object) -> None:
            nonlocal raised
            handled = sys.exc_info()[1]
            while handled is not None:
                if handled is raised:
                    return  # it is on its way: what cleans up after it is not torn open
                handled = handled.__context__
            raised = TimeUp()
            raise raised

        self.check()
        previous = signal.signal(signal.SIGALRM, stop)
        # Again every second, unless it is on its way: what is raised in a destructor gets lost.
        signal.setitimer(signal.ITIMER_REAL, max(self.left, 1e-3), 1.0)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)


UNBOUNDED = Deadline(math.inf)
