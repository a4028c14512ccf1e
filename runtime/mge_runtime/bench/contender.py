"""What the bench times: one way of doing one batch, timed in turn with the others."""

from __future__ import annotations

from typing import Protocol

__all__ = ["MILLISECONDS", "Contender"]

MILLISECONDS = "ms"


class Contender(Protocol):
    """One way of doing one batch, with the batch in it: it is made for one batch size and opened ready to run.

    The bench calls `run` many times, in turn with other contenders in the same process, and takes the wall-clock time
    of each call. Whatever is done once (loading, tracing, compiling) belongs into the constructor, not into `run`.
    """

    @property
    def name(self) -> str:
        """What is timed, as the report names it."""
        ...

    @property
    def unit(self) -> str:
        """The unit of the figures that the report gives for it: "ms" for a batch."""
        ...

    def run(self) -> None:
        """Do the whole batch once and come back when the result is on the host."""
        ...

    def close(self) -> None:
        """Let go of what is held. May be called once, after the last `run`."""
        ...
