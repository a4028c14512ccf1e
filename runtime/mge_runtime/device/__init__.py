"""The device layer, under every backend that keeps tensors on a device.

base      `Device`, `Stream`, `Event`, `Graph`, memory: what a device can do
cuda      `CudaDevice`: an NVIDIA GPU, through cuda-core and cuda-bindings
program   `Unit`: what a backend supplies; and what is ready to run, by batch size, as a CUDA graph where possible
executor  `DeviceExecutor`: the chain on a device

Nothing here knows a backend; nothing but `cuda` knows CUDA.
"""
