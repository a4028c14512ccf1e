"""Memory for the tensors of a chain, on the device and on the host."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from mge_runtime.device.memory import HostBuffer, OwnedMemory
from mge_runtime.device.plan import TensorPlan
from mge_runtime.manifest import FRAME, Manifest

if TYPE_CHECKING:
    from mge_runtime.device.base import Device

__all__ = ["Space"]


class Space:
    """The slab on the device, host buffers for frames and answers.

    Args:
        device: allocates.
        manifest: of the chain.
        max_batch: images there is room for, at least 1.

    Raises:
        BackendError: memory is short; nothing is left behind.
    """

    def __init__(self, device: Device, manifest: Manifest, max_batch: int) -> None:
        self._device = device
        self.plan = TensorPlan(manifest, max_batch)
        with ExitStack() as stack:
            self.slab: OwnedMemory = device.allocate(self.plan.size)
            stack.callback(self.slab.close)
            self.frames: HostBuffer = device.allocate_host(self.plan.places[FRAME].size(max_batch))
            stack.callback(self.frames.close)
            self._resources = stack.pop_all()
        self._answers: HostBuffer | None = None
        self._spare: OwnedMemory | None = None

    def spare(self, size: int) -> OwnedMemory:
        """Device memory of at least `size` bytes for a moment, as where two rows change places; seldom allocated."""
        if self._spare is None or self._spare.size < size:
            self._close_spare()
            self._spare = self._device.allocate(max(size, 1))
        return self._spare

    def answers(self, size: int) -> HostBuffer:
        """A host buffer of at least `size` bytes; what the last one held is gone."""
        if self._answers is None or self._answers.size < size:
            self._close_answers()
            self._answers = self._device.allocate_host(max(size, 1))
        return self._answers

    def close(self) -> None:
        """Release everything; closing twice does nothing."""
        with self._resources:
            self._close_answers()
            self._close_spare()

    def _close_answers(self) -> None:
        if self._answers is not None:
            self._answers.close()
            self._answers = None

    def _close_spare(self) -> None:
        if self._spare is not None:
            self._spare.close()
            self._spare = None
