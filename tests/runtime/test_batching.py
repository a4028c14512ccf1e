"""Images of many callers in common runs: when a run begins, and what befalls each image."""

import io
import threading
import weakref
from contextlib import closing, contextmanager

import numpy as np
import pytest
from PIL import Image

from mge_runtime import Pipeline
from mge_runtime.batching import Batcher
from mge_runtime.errors import BackendError, BundleError, InputError
from tests.helpers.chain_runs import write_chain
from tests.helpers.server import wait_until

SECONDS = 30


class Held(io.BytesIO):
    """An image whose decoding waits."""

    def __init__(self, pixels):
        super().__init__()
        Image.fromarray(pixels).save(self, "PNG")
        self.seek(0)
        self.begun, self.released = threading.Event(), threading.Event()

    def read(self, *arguments):
        self.begun.set()
        assert self.released.wait(SECONDS)
        return super().read(*arguments)


@contextmanager
def batching(path, streams=1, **options):
    """A batcher, and the sizes of its runs."""
    sizes = []
    opened = Pipeline.open(path, threads=1, streams=streams)
    with closing(Batcher(opened, on_run=sizes.append, **options)) as batcher:
        yield batcher, sizes


@pytest.mark.parametrize("streams", [1, 3])
def test_callers_get_their_own_predictions(bundle_path, photos, streams):
    with Pipeline.open(bundle_path) as pipeline:
        expected = [pipeline.predict(photo) for photo in photos]
    with batching(bundle_path, streams, batch=3, wait=SECONDS, decoders=4) as (batcher, sizes):
        futures = [batcher.submit(photo) for photo in photos * 10]
        for number, future in enumerate(futures):
            found, wanted = future.result(SECONDS), expected[number % len(photos)]
            np.testing.assert_allclose(found.logits, wanted.logits, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(found.boxes, wanted.boxes)
    assert sum(sizes) == len(futures)
    assert max(sizes) == 3


def test_a_decoded_image_waits_for_one_that_is_being_decoded(bundle_path, photos):
    held = Held(photos[1])
    with batching(bundle_path, wait=SECONDS) as (batcher, sizes):
        late = batcher.submit(held)
        held.begun.wait(SECONDS)
        early = batcher.submit(photos[0])
        threading.Timer(0.1, held.released.set).start()
        early.result(SECONDS)
        late.result(SECONDS)
    assert sizes == [2]


def test_it_waits_no_longer_than_the_deadline_and_alone_not_at_all(bundle_path, photos):
    held = Held(photos[1])
    with batching(bundle_path, wait=0.01) as (batcher, sizes):
        late = batcher.submit(held)
        held.begun.wait(SECONDS)
        batcher.submit(photos[0]).result(SECONDS)
        held.released.set()
        late.result(SECONDS)
    with batching(bundle_path, wait=10 * SECONDS) as (batcher, sizes_alone):
        batcher.submit(photos[0]).result(SECONDS)
    assert sizes == [1, 1]
    assert sizes_alone == [1]


def test_a_bad_image_fails_alone_and_a_cancelled_one_never_runs(bundle_path, photos):
    held = Held(photos[1])
    with batching(bundle_path, wait=0) as (batcher, sizes):
        cancelled = batcher.submit(held)
        held.begun.wait(SECONDS)
        good, bad = batcher.submit(photos[0]), batcher.submit(b"no image")
        assert isinstance(bad.exception(SECONDS), InputError)
        good.result(SECONDS)
        assert cancelled.cancel()
        held.released.set()
    assert sizes == [1]


def test_a_cancelled_image_is_not_even_decoded_and_let_go_at_once(bundle_path, photos):
    first, second = Held(photos[0]), Held(photos[1])
    with batching(bundle_path, decoders=1) as (batcher, _):
        batcher.submit(first)
        first.begun.wait(SECONDS)
        future, dropped = batcher.submit(second), weakref.ref(second)
        del second
        assert future.cancel()
        assert dropped() is None, "it stays in memory"
        first.released.set()


def test_closing_finishes_what_was_submitted(bundle_path, photos):
    held = Held(photos[0])
    with batching(bundle_path, batch=2) as (batcher, _):
        futures = [batcher.submit(source) for source in (held, *photos)]
        wait_until(futures[-1].done)
        threading.Timer(0.1, held.released.set).start()
    assert all(future.result(0).class_name for future in futures)
    batcher.close()
    with pytest.raises(BackendError, match="is closed"):
        batcher.submit(photos[0])


def test_a_run_that_fails_fails_for_its_images_and_the_next_one_is_tried(copy, photos):
    with batching(copy) as (batcher, _):
        copy.write_bytes(copy.read_bytes())  # in place
        for _ in range(2):
            assert isinstance(batcher.submit(photos[0]).exception(SECONDS), BundleError)


def test_an_image_that_overflows_fails_alone(tiny, bundle_path, photos, tmp_path):
    with Pipeline.open(bundle_path, threads=1) as pipeline:
        lowest = [float(pipeline.predict(photo).expert_logits[0].min()) for photo in photos]
    first, second = sorted(lowest)[:2]

    def change(graph):  # the square root of what is negative for one image alone
        if graph.spec.name == "expert_1":
            for node in graph.nodes:
                node.output[:] = ["was" if name == "logits_1" else name for name in node.output]
            least = graph.const("least", np.array([(first + second) / 2], np.float32))
            graph.node("Sqrt", [graph.node("Sub", ["was", least], "above")], "logits_1")
        return graph.model()

    held = Held(photos[0])
    with batching(write_chain(tiny, tmp_path / "mge.plan", change), wait=SECONDS) as (batcher, sizes):
        futures = [batcher.submit(held), *map(batcher.submit, photos[1:])]
        held.begun.wait(SECONDS)
        held.released.set()
        found = [future.exception(SECONDS) for future in futures]
    assert [type(error) for error in found].count(BackendError) == 1
    assert "logits_1 of the graph expert_1 holds NaN" in str(found[lowest.index(first)])
    assert max(sizes) > 1


@pytest.mark.parametrize("option", ["batch", "decoders"])
def test_numbers_below_one_are_refused(bundle_path, option):
    with Pipeline.open(bundle_path) as pipeline, pytest.raises(BackendError, match="at least 1 of each"):
        Batcher(pipeline, **{option: 0})
