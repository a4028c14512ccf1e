"""The device layer, shared by every backend that keeps tensors on a device.

memory    owned and borrowed device memory, host buffers
base      `Device`, `Stream`, `Event`, `Graph`: what a device can do; counts what it copies
host      `HostDevice`: the CPU          cuda   `CudaDevice`: cuda-core and cuda-bindings
plan      where each tensor of a chain lies in one slab
space     that slab, and the host buffers beside it
arena     scratch memory that units share which run in turn
unit      `Unit`: what a backend puts in: it enqueues work over given addresses
program   some units for one batch size, as a CUDA graph where that is possible
programs  those that are ready, by batch size
rows      which image lies in which row, where images leave a batch early
executor  `DeviceExecutor`: the chain on a device

Nothing here knows a backend; nothing but `cuda` knows CUDA.
"""

from mge_runtime.device.arena import Arena
from mge_runtime.device.base import CaptureRefusedError, CopyCounters, Device, Event, Graph, Stream
from mge_runtime.device.executor import DeviceExecutor
from mge_runtime.device.memory import BorrowedMemory, HostBuffer, Memory, OwnedMemory
from mge_runtime.device.plan import Place, TensorPlan
from mge_runtime.device.unit import Launch, Unit

__all__ = [
    "Arena",
    "BorrowedMemory",
    "CaptureRefusedError",
    "CopyCounters",
    "Device",
    "DeviceExecutor",
    "Event",
    "Graph",
    "HostBuffer",
    "Launch",
    "Memory",
    "OwnedMemory",
    "Place",
    "Stream",
    "TensorPlan",
    "Unit",
]
