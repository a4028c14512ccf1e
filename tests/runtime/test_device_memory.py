"""Memory, copies, streams and events of every device, and where the tensors of a chain lie."""

import gc
import itertools
import weakref

import numpy as np
import pytest

from mge_runtime.device.base import CaptureRefusedError, OwnedMemory
from mge_runtime.device.executor import Space
from mge_runtime.errors import BackendError
from tests.helpers.host_device import HostDevice


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
    assert (part.address, part.size) == (4106, 20)
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


@pytest.mark.parametrize(("offset", "size"), [(90, 20), (-1, 5), (0, 101)])
def test_a_part_beyond_the_end_is_refused(offset, size):
    with pytest.raises(BackendError, match="of 100 bytes"):
        OwnedMemory(0, 100, lambda: None).borrow(offset, size)


def test_copies_move_their_bytes_alone_and_are_counted(device):
    sent = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    memory, out, back, stream = (
        device.allocate(2000), device.allocate_host(1000), device.allocate_host(1100), device.create_stream()
    )  # fmt: skip
    out.array[:] = sent
    device.upload(memory.borrow(512, 1488), out, 1000, stream)
    device.copy_device(memory.borrow(812, 50), memory.borrow(1012, 60), 50, stream)
    device.download(back, 100, memory.borrow(512, 1000), 1000, stream)
    stream.synchronize()
    sent[300:350] = sent[500:550]
    np.testing.assert_array_equal(back.array[100:], sent)
    assert device.copies == {
        "host_to_device": 1, "host_to_device_bytes": 1000, "device_to_host": 1, "device_to_host_bytes": 1000,
        "on_device": 1, "on_device_bytes": 50,
    }  # fmt: skip
    for used in (memory, out, back, stream):
        used.close()
    with pytest.raises(BackendError, match="after it was released"):
        _ = out.array


def test_a_copy_that_does_not_fit_is_refused(device):
    memory, buffer, stream = device.allocate(100), device.allocate_host(100), device.create_stream()
    part = memory.borrow(0, 99)
    for copy in (
        lambda: device.upload(part, buffer, 100, stream),
        lambda: device.download(buffer, 1, memory, 100, stream),
        lambda: device.copy_device(part, memory, 100, stream),
        lambda: device.copy_device(memory, part, 100, stream),
    ):
        with pytest.raises(BackendError, match=r"asked to copy 100 bytes between pieces of .*99"):
            copy()
    assert not any(device.copies.values())
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
def test_every_tensor_and_the_scratch_memory_have_aligned_places_of_their_own(bundle, max_batch):
    device = HostDevice()
    space = Space(device, bundle.manifest, max_batch, 512)
    specs = {t.name: t for graph in bundle.manifest.graphs for t in (*graph.inputs, *graph.outputs)}
    told = space.addresses(max_batch)
    assert set(told.tensors) == set(specs)
    assert all(space.rows(name, 0, max_batch).address == address for name, address in told.tensors.items())
    sizes = {name: np.zeros((max_batch, *t.shape[1:]), t.dtype).nbytes for name, t in specs.items()}
    ends = sorted((address, address + sizes[name]) for name, address in told.tensors.items())
    ends.append((told.scratch, told.scratch + told.scratch_bytes))
    assert all(start % 256 == 0 for start, _ in ends)
    assert all(end <= after for (_, end), (after, _) in itertools.pairwise(ends)), "two places overlap"
    assert ends[-1][1] - ends[0][0] == device.allocated
    space.close()
    space.close()
    assert (device.allocated, device.allocated_host) == (0, 0)
