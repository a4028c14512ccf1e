"""Memory, copies, streams and events of every device; plan and arena, which are arithmetic over them."""

import gc
import weakref

import numpy as np
import pytest

from mge_runtime.bundle import Bundle
from mge_runtime.device import Arena, BorrowedMemory, TensorPlan
from mge_runtime.device.base import CaptureRefusedError
from mge_runtime.device.host import HostDevice
from mge_runtime.device.memory import OwnedMemory
from mge_runtime.errors import BackendError
from mge_runtime.manifest import FRAME


def test_owned_memory_is_freed_once(device):
    memory = device.allocate(1000)
    assert memory.address % 256 == 0
    assert device.allocated == 1000
    memory.close()
    memory.close()
    assert device.allocated == 0
    with pytest.raises(BackendError, match="after it was released"):
        _ = memory.address


def test_borrowed_memory_never_frees_and_keeps_its_owner_alive():
    freed = []
    owner = OwnedMemory(4096, 100, lambda: freed.append(True))
    part = owner.borrow(10, 20)
    assert isinstance(part, BorrowedMemory)
    assert (part.address, part.size) == (4106, 20)
    assert owner.borrow(10).size == 90
    assert not hasattr(part, "close")
    alive = weakref.ref(owner)
    del owner
    gc.collect()
    assert alive() is not None
    assert not freed
    alive().close()
    with pytest.raises(BackendError, match="after it was released"):
        _ = part.address
    assert freed == [True]


@pytest.mark.parametrize(("offset", "size"), [(90, 20), (-1, 5), (101, None), (0, 101)])
def test_a_part_beyond_the_end_is_refused(offset, size):
    with pytest.raises(BackendError, match="of 100 bytes"):
        OwnedMemory(0, 100, lambda: None).borrow(offset, size)


def test_a_copy_on_the_device_moves_its_bytes_alone_and_is_counted(device):
    sent = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    memory, buffer, stream = device.allocate(2000), device.allocate_host(1000), device.create_stream()
    buffer.array[:] = sent
    device.upload(memory, buffer, 1000, stream)
    device.upload(memory.borrow(1000), buffer, 1000, stream)
    device.copy_device(memory.borrow(1100, 50), memory.borrow(300, 60), 50, stream)
    device.download(buffer, 0, memory.borrow(1000), 1000, stream)
    stream.synchronize()
    sent[100:150] = sent[300:350]
    np.testing.assert_array_equal(buffer.array, sent)
    assert (device.counters.on_device, device.counters.on_device_bytes) == (1, 50)
    for target, source in ((memory.borrow(0, 49), memory), (memory, memory.borrow(0, 49))):
        with pytest.raises(BackendError, match=r"asked to copy 50 bytes between pieces of .*49"):
            device.copy_device(target, source, 50, stream)
    for owned in (memory, buffer, stream):
        owned.close()


def test_what_goes_up_comes_down_and_is_counted(device):
    sent = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    memory, out, back, stream = (
        device.allocate(2000), device.allocate_host(1000), device.allocate_host(600), device.create_stream()
    )  # fmt: skip
    out.array[:] = sent
    device.upload(memory.borrow(512), out, 1000, stream)
    device.download(back, 100, memory.borrow(512 + 300), 500, stream)
    stream.synchronize()
    np.testing.assert_array_equal(back.array[100:], sent[300:800])
    counters = device.counters
    assert (counters.host_to_device, counters.host_to_device_bytes) == (1, 1000)
    assert (counters.device_to_host, counters.device_to_host_bytes) == (1, 500)
    for used in (memory, out, back, stream):
        used.close()
    out.close()
    with pytest.raises(BackendError, match="after it was released"):
        _ = out.array


def test_a_copy_that_does_not_fit_is_refused(device):
    memory, buffer, stream = device.allocate(100), device.allocate_host(100), device.create_stream()
    with pytest.raises(BackendError, match="asked to copy 101 bytes"):
        device.upload(memory, buffer, 101, stream)
    with pytest.raises(BackendError, match="asked to copy 100 bytes between pieces of 99"):
        device.download(buffer, 1, memory, 100, stream)
    assert device.counters.host_to_device == device.counters.device_to_host == 0
    for used in (memory, buffer, stream):
        used.close()


def test_events_follow_each_other(device):
    stream, first, second = device.create_stream(), device.create_event(), device.create_event()
    stream.record(first)
    stream.record(second)
    stream.synchronize()
    assert second.ms_since(first) >= 0
    for used in (first, second, stream):
        used.close()


def test_the_host_refuses_graphs():
    device = HostDevice()
    with pytest.raises(CaptureRefusedError, match="no graphs"):
        device.capture(device.create_stream(), lambda: pytest.fail("nothing may run"))


@pytest.mark.gpu
def test_a_captured_copy_runs_at_each_launch(cuda):
    stream, memory = cuda.create_stream(), cuda.allocate(256)
    sent, back = cuda.allocate_host(256), cuda.allocate_host(256)
    graph = cuda.capture(stream, lambda: cuda.upload(memory, sent, 256, stream))
    for value in (3, 7):
        sent.array[:] = value
        graph.launch(stream)
        cuda.download(back, 0, memory, 256, stream)
        stream.synchronize()
        assert (back.array == value).all()

    def synchronizing():
        cuda.upload(memory, sent, 256, stream)
        stream.synchronize()

    with pytest.raises(CaptureRefusedError, match="cannot capture"):
        cuda.capture(stream, synchronizing)
    cuda.upload(memory, sent, 256, stream)  # the stream is as it was
    stream.synchronize()
    for used in (graph, memory, sent, back, stream):
        used.close()


@pytest.mark.gpu
def test_memory_that_is_not_there_is_one_line(cuda):
    with pytest.raises(BackendError, match=r"cuda:0 cannot allocate \d+ bytes: CUDA_ERROR_OUT_OF_MEMORY"):
        cuda.allocate(2**50)


@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_every_tensor_has_an_aligned_place_of_its_own(bundle_path, max_batch):
    with Bundle.open(bundle_path) as bundle:
        manifest = bundle.manifest
    plan = TensorPlan(manifest, max_batch)
    assert set(plan.places) == {FRAME, *(t.name for graph in manifest.graphs for t in graph.outputs)}
    end = 0
    for place in sorted(plan.places.values(), key=lambda place: place.offset):
        assert place.offset % 256 == 0
        assert place.offset >= end, "two tensors overlap"
        assert place.size(max_batch) == np.zeros(place.shape(max_batch), place.spec.dtype).nbytes
        end = place.offset + place.size(max_batch)
    assert end <= plan.size < end + 256


def test_an_arena_is_as_large_as_the_largest_unit(device):
    arena = Arena(device, [1000, 0, 300, 700])
    assert (arena.shared, arena.unshared) == (1024, 1024 + 512 + 768)
    assert device.allocated == 1024
    assert arena.address % 256 == 0
    arena.close()
    arena.close()
    none = Arena(device, [0, 0])
    assert (none.shared, none.unshared, none.address) == (0, 0, 0)
    none.close()
