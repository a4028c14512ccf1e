"""Pipelines lent to threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mge_runtime import Pipeline, PipelinePool
from mge_runtime.errors import BackendError, BundleError


def open_pool(path, size):
    return PipelinePool.open(path, size, device="cpu", threads=1)


def test_many_threads_share_few_pipelines(bundle_path, photos):
    with Pipeline.open(bundle_path, device="cpu", threads=1) as pipeline:
        expected = [pipeline.predict(photo) for photo in photos]
    in_use, most, lock = set(), 0, threading.Lock()

    def predict(photo):
        nonlocal most
        with pool.lend() as pipeline:
            with lock:
                assert pipeline not in in_use
                in_use.add(pipeline)
                most = max(most, len(in_use))
            prediction = pipeline.predict(photo)
            with lock:
                in_use.remove(pipeline)
        return prediction

    with open_pool(bundle_path, 2) as pool, ThreadPoolExecutor(6) as threads:
        found = list(threads.map(predict, photos * 3))
    assert most == 2
    for prediction, wanted in zip(found, expected * 3, strict=True):
        np.testing.assert_array_equal(prediction.logits, wanted.logits)


def test_a_pipeline_comes_back_after_an_error_and_who_waits_too_long_is_told(bundle_path, photos):
    with open_pool(bundle_path, 1) as pool:
        with pytest.raises(ZeroDivisionError), pool.lend():
            raise ZeroDivisionError
        with pool.lend(timeout=0) as pipeline:
            assert pipeline.predict(photos[0])
            with pytest.raises(BackendError, match=r"none of 1 pipelines became free within 0.01 s; open a larger"):
                pool.lend(timeout=0.01).__enter__()


def test_closing_waits_for_what_is_lent_and_ends_what_waits(bundle_path, photos):
    pool = open_pool(bundle_path, 1)
    with ThreadPoolExecutor(1) as threads:
        with pool.lend() as pipeline:
            closing = threads.submit(pool.close)
            assert not closing.done()
            assert pipeline.predict(photos[0])
        closing.result(10)
    pool.close()
    for _ in range(2):
        with pytest.raises(BackendError, match="the pool of pipelines is closed"):
            pool.lend().__enter__()
    with pytest.raises(BackendError, match="closed"):
        pipeline.predict(photos[0])


def test_what_cannot_be_opened(bundle_path, tmp_path):
    with pytest.raises(BackendError, match="asked for a pool of 0 pipelines"):
        open_pool(bundle_path, 0)
    with pytest.raises(BundleError):
        open_pool(tmp_path / "none.plan", 2)
