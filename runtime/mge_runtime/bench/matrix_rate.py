"""How fast this device multiplies matrices and moves memory, as ONNX Runtime does both: what the chain is held to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import numpy as np

from mge_runtime.backends.ort import import_onnxruntime
from mge_runtime.bench.device_operator import ONCE, DeviceOperator
from mge_runtime.cpus import cpu_count
from mge_runtime.errors import BackendError

if TYPE_CHECKING:
    from mge_runtime.backends import Choice
    from mge_runtime.device.base import Device
    from mge_runtime.manifest import Manifest

__all__ = ["Rates", "compute_type", "full_rate_size", "open_rates"]

_SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384)
_MOST_BYTES = 512 << 20  # of the three matrices
_MOST_MS = 30.0  # a few products run in every round of the bench
_RISE = 1.03  # a larger product must be so much faster, or the smaller one says as much
_LEVEL = 2
_RUNS = 6  # of a product that is tried, about: to find how often it runs, and then
_STREAMED = 128 << 20  # bytes that are read, and as many written: more than caches hold
_RUN_SECONDS = 0.02  # of a run in a round


class Rates:
    """The two operators, to be run in turn with the chain: `matrix` and `memory`.

    Args:
        matrix: a product of two square matrices.
        memory: an operator that reads an array and writes one.
        dtype: of both, "float32" or "float16".
        size: of the matrices, rows and columns.
    """

    def __init__(self, matrix: DeviceOperator, memory: DeviceOperator, dtype: str, size: int) -> None:
        self.matrix, self.memory, self.dtype, self.size = matrix, memory, dtype, size

    @property
    def matrix_flop(self) -> int:
        """Of one product; a multiply-accumulate is two."""
        return 2 * self.size**3

    @property
    def memory_bytes(self) -> int:
        """That one execution of `memory` reads and writes."""
        return 2 * _STREAMED

    def close(self) -> None:
        """Release both."""
        self.matrix.close()
        self.memory.close()


def compute_type(choice: Choice, manifest: Manifest) -> str:
    """The floating type whose rate the chain is held to.

    A CPU computes in FP32 whatever is stored: FP16 is widened when a stage is opened. On a GPU it is that of the
    stages; INT8 has FP16 around it.
    """
    kinds = {str(plan.get("type")) for plan in manifest.precision.values()}
    return "float16" if choice.device != "cpu" and kinds & {"fp16", "int8"} else "float32"


def open_rates(choice: Choice, manifest: Manifest, threads: int | None, seconds: float) -> Rates:
    """Find the size of a product that this device computes at its full rate, and open both operators.

    Args:
        choice: what runs the chain; the rates are ONNX Runtime's whatever that is.
        manifest: of the chain.
        threads: as for `Pipeline.open`.
        seconds: to spend on the search.

    Raises:
        BackendError: ONNX Runtime cannot run them on this device.
    """
    dtype = compute_type(choice, manifest)
    ort, device = _open_device(choice)
    count = threads or cpu_count()

    def product(size: int) -> DeviceOperator:
        return DeviceOperator(ort, device, "MatMul", 2, dtype, (size, size), count)

    def milliseconds(size: int) -> float:
        with closing(product(size)) as operator:
            operator.repeat_for(_RUN_SECONDS / 4)
            operator.run()
            return operator.steps_ms[ONCE]

    itemsize = np.dtype(dtype).itemsize
    size = full_rate_size([size for size in _SIZES if 3 * size * size * itemsize <= _MOST_BYTES], milliseconds, seconds)
    with ExitStack() as stack:
        matrix = stack.enter_context(closing(product(size)))
        shape = (_STREAMED // itemsize,)
        memory = stack.enter_context(closing(DeviceOperator(ort, device, "Relu", 1, dtype, shape, count)))
        matrix.repeat_for(_RUN_SECONDS)
        memory.repeat_for(_RUN_SECONDS)
        stack.pop_all()
    return Rates(matrix, memory, dtype, size)


def full_rate_size(sizes: list[int], milliseconds: Callable[[int], float], seconds: float) -> int:
    """The smallest size whose rate is within 3 % of the best.

    Args:
        sizes: rising.
        milliseconds: measures a product of a size.
        seconds: sizes that would not fit any more are not tried; nor are those whose product takes over 30 ms.
    """
    rates: dict[int, float] = {}  # FLOP / ms, but for a factor
    rate = best = spent = 0.0
    level = 0  # sizes in a row that brought nothing; one may have been disturbed
    for size in sizes:
        if rates:
            expected = size**3 / rate
            if expected > _MOST_MS or spent + _RUNS * expected > seconds * 1e3:
                break
        took = milliseconds(size)
        rate = rates[size] = size**3 / took
        spent += _RUNS * took
        level = level + 1 if rate < best * _RISE else 0
        best = max(best, rate)
        if level == _LEVEL:
            break
    return next(size for size, rate in rates.items() if rate * _RISE >= best)


def _open_device(choice: Choice) -> tuple[Any, Device]:
    """ONNX Runtime, and the device as memory it can bind."""
    if choice.device == "cpu":
        from mge_runtime.device.host import HostDevice

        return import_onnxruntime(), HostDevice()
    from mge_runtime.backends.onnxruntime_cuda import import_cuda_onnxruntime, preload_libraries
    from mge_runtime.device.cuda import CudaDevice

    if not choice.device.startswith("cuda:"):
        raise BackendError(f"no matrix rate is measured on {choice.device}; expected cpu or cuda:N")
    ort = import_cuda_onnxruntime()
    preload_libraries(ort)
    return ort, CudaDevice(int(choice.device.partition(":")[2]))
