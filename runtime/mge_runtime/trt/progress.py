"""Progress of a build, and a way to stop it: TensorRT asks after every step whether to go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mge_runtime.trt.api import Api

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["Progress", "make_monitor"]

Progress = Callable[[float, str], bool]  # share done in [0, 1] and the phase's name -> whether to go on


def make_monitor(api: Api, progress: Progress) -> trt.IProgressMonitor:
    """A monitor that tells `progress` of every step.

    Phases nest, and each has its share of one step of its parent; the share done never falls. An exception that
    `progress` raises stops the build and is kept as `error`: it must not pass through TensorRT.
    """

    class Monitor(api.IProgressMonitor):
        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)  # the binding wants its own, not super()'s
            self.error: BaseException | None = None
            self._phases: dict[str, tuple[float, float, int]] = {}  # name -> where it starts, its width, its steps
            self._done: dict[str, int] = {}
            self._share = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            start, width = 0.0, 1.0
            if parent_phase in self._phases:
                start, parent_width, steps = self._phases[parent_phase]
                width = parent_width / max(steps, 1)
                start += width * min(self._done[parent_phase], steps - 1)
            self._phases[phase_name] = (start, width, num_steps)
            self._done[phase_name] = 0
            self._tell(start, phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            start, width, steps = self._phases.get(phase_name, (0.0, 0.0, 1))
            self._done[phase_name] = step + 1
            return self._tell(start + width * (step + 1) / max(steps, 1), phase_name)

        def phase_finish(self, phase_name: str) -> None:
            start, width, _ = self._phases.pop(phase_name, (0.0, 0.0, 1))
            self._tell(start + width, phase_name)

        def _tell(self, share: float, phase: str) -> bool:
            self._share = min(1.0, max(self._share, share))
            if self.error is None:
                try:
                    if progress(self._share, phase):
                        return True
                except BaseException as error:
                    self.error = error
            return False

    return Monitor()
