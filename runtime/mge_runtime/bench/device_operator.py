"""One ONNX operator on memory of a device, timed: what the device can do at best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from mge_runtime.bench.contender import MILLISECONDS
from mge_runtime.bench.rounds import Stepped
from mge_runtime.bundle.wire import encoded, wire_field
from mge_runtime.errors import BackendError, brief

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mge_runtime.device.base import Device
    from mge_runtime.device.memory import OwnedMemory

__all__ = ["ONCE", "DeviceOperator", "operator_model"]

ONCE = "once"  # the step: one execution of the operator
_TYPES = {"float32": 1, "float16": 10}  # TensorProto.DataType
_IR_VERSION, _OPSET = 8, 17
_MOST_REPEATS = 1000
_GROUPS = 3
_CHUNK = 1 << 22  # bytes that are copied to the device at once


class DeviceOperator(Stepped):
    """One operator over operands that lie on the device, executed again and again within a run.

    Its step is the time of one execution, by the device's own events. Copies are not in it, and the launch from the
    host only where the device waits for it.

    Args:
        ort: the module `onnxruntime`, its libraries loaded.
        device: where; a `HostDevice` is the CPU.
        operator: "MatMul", "Relu", ...; its inputs and its output have one shape.
        operands: how many inputs.
        dtype: "float32" or "float16".
        shape: of every operand.
        threads: on the CPU.

    Raises:
        BackendError: ONNX Runtime has no such operator on this device, or memory is short; nothing is left behind.
    """

    unit = MILLISECONDS

    def __init__(
        self,
        ort: Any,
        device: Device,
        operator: str,
        operands: int,
        dtype: str,
        shape: Sequence[int],
        threads: int,
    ) -> None:
        self.name = f"{operator} of {' x '.join(map(str, shape))}, {dtype}"
        self.steps_ms = {}
        self.repeats = 1
        self._device = device
        device.activate()
        with ExitStack() as stack:
            self._stream = device.create_stream()
            stack.callback(self._stream.close)
            self._events = device.create_event(), device.create_event()
            for event in self._events:
                stack.callback(event.close)
            size = math.prod(shape) * np.dtype(dtype).itemsize
            names = [f"operand_{number}" for number in range(operands)]
            memory: dict[str, OwnedMemory] = {}
            for name in (*names, "result"):
                memory[name] = device.allocate(size)
                stack.callback(memory[name].close)
            for number, name in enumerate(names):
                self._fill(memory[name], size, np.dtype(dtype), seed=number)
            self._session: Any = self._open(ort, operator_model(operator, operands, dtype, shape), threads)
            self._binding: Any = self._session.io_binding()
            for name, piece in memory.items():
                bind = self._binding.bind_output if name == "result" else self._binding.bind_input
                bind(name, device.kind, device.index, np.dtype(dtype).type, tuple(shape), piece.address)
            self._options: Any = ort.RunOptions()
            if device.kind == "cuda":
                self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            self.run()  # whether it runs at all
            self._resources = stack.pop_all()

    def run(self) -> None:
        """Execute it `repeats` times and wait, three times over; the step is of the median, as contenders' are."""
        start, end = self._events
        self._device.activate()
        taken: list[float] = []
        for _ in range(_GROUPS):
            self._stream.record(start)
            try:
                for _ in range(self.repeats):
                    self._session.run_with_iobinding(self._binding, self._options)
            except Exception as error:  # ONNX Runtime's errors have no base class but Exception
                raise BackendError(f"ONNX Runtime failed in a {self.name}: {brief(error)}") from error
            self._stream.record(end)
            self._stream.synchronize()
            taken.append(end.ms_since(start) / self.repeats)
        self.steps_ms = {ONCE: median(taken)}

    def repeat_for(self, seconds: float) -> None:
        """Execute it so often that a run takes as long as this, or a little more."""
        self.run()
        wanted = seconds * 1e3 / _GROUPS / max(self.steps_ms[ONCE], 1e-6)
        self.repeats = min(_MOST_REPEATS, max(1, math.ceil(wanted)))

    def close(self) -> None:
        """Release session and memory; closing twice does nothing."""
        self._binding = self._session = None
        self._device.activate()
        self._resources.close()

    def _fill(self, memory: OwnedMemory, size: int, dtype: np.dtype[Any], seed: int) -> None:
        """Operands drawn between -1 and 1, the same piece again and again: what zeros would save, weights do not."""
        piece = min(size, _CHUNK)
        values: NDArray[Any] = np.random.default_rng(seed).uniform(-1, 1, piece // dtype.itemsize).astype(dtype)
        buffer = self._device.allocate_host(piece)
        try:
            buffer.array[:] = values.view(np.uint8)
            for offset in range(0, size, piece):
                part = min(piece, size - offset)
                self._device.upload(memory.borrow(offset, part), buffer, part, self._stream)
            self._stream.synchronize()
        finally:
            buffer.close()

    def _open(self, ort: Any, model: bytes, threads: int) -> Any:
        options = ort.SessionOptions()
        providers: list[Any] = ["CPUExecutionProvider"]
        if self._device.kind == "cuda":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            index, stream = str(self._device.index), str(self._stream.handle)
            # As the chain's sessions have it: FP32 means FP32.
            providers = [
                ("CUDAExecutionProvider", {"device_id": index, "user_compute_stream": stream, "use_tf32": "0"})
            ]
        else:
            options.intra_op_num_threads = threads
            options.add_session_config_entry("session.force_spinning_stop", "1")  # as the chain's
        try:
            return ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
        except Exception as error:
            raise BackendError(f"ONNX Runtime {ort.__version__} cannot open a {self.name}: {brief(error)}") from error


def operator_model(operator: str, operands: int, dtype: str, shape: Sequence[int]) -> bytes:
    """A graph of one node, from `operand_0`, ... to `result`.

    Field numbers are those of onnx.proto3.

    Returns:
        A serialised ModelProto.
    """
    names = [f"operand_{number}" for number in range(operands)]
    axes = b"".join(wire_field(1, _integer(1, size)) for size in shape)
    kind = wire_field(1, _integer(1, _TYPES[dtype]) + wire_field(2, axes))

    def text(number: int, value: str) -> bytes:
        return wire_field(number, value.encode())

    node = b"".join(text(1, name) for name in names) + text(2, "result") + text(4, operator)
    graph = wire_field(1, node) + text(2, operator)
    graph += b"".join(wire_field(11, text(1, name) + wire_field(2, kind)) for name in names)
    graph += wire_field(12, text(1, "result") + wire_field(2, kind))
    return _integer(1, _IR_VERSION) + wire_field(7, graph) + wire_field(8, _integer(2, _OPSET))


def _integer(number: int, value: int) -> bytes:
    return encoded(number << 3) + encoded(value)
